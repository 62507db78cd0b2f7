"""One member of the ensemble behind Ray Serve: holds the predictors of the live, previous and candidate ensembles.

Pictures are decoded side by side and predicted in batches: a batch is whatever has queued up while the last one ran.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from ray import serve

from counterfake import memory, predictor
from counterfake.errors import CounterfakeError
from counterfake.registry import Registry
from counterfake.telemetry import Telemetry
from counterfake.workspace import Workspace
from serving.follow import Holding
from serving.heart import Directive, Heart
from serving.schemas import Model
from serving.settings import Settings
from serving.verdicts import Score

logger = logging.getLogger(__name__)


class Detector:
    """Ray Serve deployment, one per member name. Its replicas load what Control tells them to."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, member: str, settings: Settings, workspace: Workspace, control: Any
    ) -> None:
        memory.keep()
        self._member, self._cache, self._limits = member, workspace.cache, settings.limits
        self._registry = Registry.at(workspace)
        self._telemetry = Telemetry()
        self._predictors: dict[str, Any] = {}  # by digest of the ensemble
        self._failed: dict[str, str] = {}
        self._loading = asyncio.Lock()
        self._decoding = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._predicting = ThreadPoolExecutor(1, "predict")
        self.reconfigure(
            {
                "batch_size": settings.batch_size,
                "batch_wait_seconds": settings.batch_wait_seconds,
                "threads": settings.threads,
            }
        )
        self._heart = Heart(
            control,
            "detector",
            self._telemetry,
            settings.heartbeat_seconds,
            holding=self._holding,
            on_directive=self._hold,
        )
        await self._heart.start()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Batching and threads, changed in place by Serve."""
        torch.set_num_threads(user_config["threads"])
        self._predict.set_max_batch_size(user_config["batch_size"])
        self._predict.set_batch_wait_timeout_s(user_config["batch_wait_seconds"])

    async def judge(self, ensemble: str, data: bytes) -> Score:
        """One picture by this member of the ensemble with that digest. MediaError if the member refuses it."""
        self._telemetry.add("counterfake_detector_queue", 1, detector=self._member)
        try:
            loaded = self._predictors.get(ensemble) or await self._load(ensemble)
            loop = asyncio.get_running_loop()
            decoded = await loop.run_in_executor(self._decoding, loaded.decode, data, self._limits)
            reason = loaded.refusal(decoded)
            if reason is not None:
                return Score(probability=None, reason=reason, faces=faces_of(decoded))
            probability = await self._predict((loaded, decoded, time.perf_counter()))
        finally:
            self._telemetry.add("counterfake_detector_queue", -1, detector=self._member)
        self._telemetry.observe("counterfake_detector_score", probability, detector=self._member)
        return Score(probability=probability, faces=faces_of(decoded))

    async def __del__(self) -> None:
        await self._heart.last()

    # -- private ----------------------------------------------------------------------------------------------------

    @serve.batch  # type: ignore[untyped-decorator]
    async def _predict(self, items: list[tuple[Any, Any, float]]) -> list[float]:
        started = time.perf_counter()
        for _, _, queued in items:
            self._telemetry.observe(
                "counterfake_detector_wait_seconds", started - queued, detector=self._member
            )
        answers = await asyncio.get_running_loop().run_in_executor(self._predicting, _predict_all, items)
        seconds = time.perf_counter() - started
        self._telemetry.observe("counterfake_detector_seconds", seconds, detector=self._member)
        self._telemetry.observe("counterfake_batch_size", len(items), detector=self._member)
        return answers

    def _holding(self) -> Holding:
        return Holding(member=self._member, digests=frozenset(self._predictors), failed=dict(self._failed))

    async def _hold(self, directive: Directive) -> None:
        """Load what is wanted, the live one first; drop what is no longer. A candidate that fails is only reported."""
        wanted = [model for model in directive.hold if self._digest_in(model)]
        for model in wanted:
            if model.digest in self._predictors or model.digest in self._failed:
                continue
            try:
                await self._load(model.digest)
            except Exception as error:  # whatever a bundle does; Control refuses it then
                logger.exception("ensemble %s does not load", model.digest)
                if model.digest == directive.live.digest:
                    raise
                self._failed[model.digest] = str(error) or type(error).__name__
        kept = {model.digest for model in directive.hold}
        self._predictors = {digest: loaded for digest, loaded in self._predictors.items() if digest in kept}
        self._failed = {digest: why for digest, why in self._failed.items() if digest in kept}

    def _digest_in(self, model: Model) -> str | None:
        return next((member.digest for member in model.members if member.name == self._member), None)

    async def _load(self, ensemble: str) -> Any:
        async with self._loading:
            if ensemble not in self._predictors:
                self._predictors[ensemble] = await asyncio.to_thread(self._read, ensemble)
            return self._predictors[ensemble]

    def _read(self, ensemble: str) -> Any:
        folder = self._registry.fetch_digest(ensemble, self._cache) / "members" / self._member
        if not folder.is_dir():
            raise CounterfakeError(f"ensemble {ensemble[:12]} has no detector {self._member}")
        logger.info("%s loads ensemble %s", self._member, ensemble[:12])
        return predictor.load(folder)


def faces_of(decoded: Any) -> list[dict[str, Any]]:
    """The faces a detector looked at, as plain data."""
    return [
        {"box": [float(value) for value in face.box], "score": float(face.score)}
        for face in getattr(decoded, "faces", None) or ()
    ]


def _predict_all(items: list[tuple[Any, Any, float]]) -> list[float]:
    """Probabilities in order; one forward pass per model, as during a switch two are asked at once."""
    answers = [0.0] * len(items)
    for loaded in {id(item[0]): item[0] for item in items}.values():
        chosen = [index for index, item in enumerate(items) if item[0] is loaded]
        for index, value in zip(chosen, loaded.predict([items[i][1] for i in chosen]), strict=True):
            answers[index] = float(value)
    return answers
