"""Registered ensembles as the service sees them: which bundle a reference means, and whether it is fit to go live."""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from counterfake import bundle as bundles
from counterfake import media, runtime
from counterfake.errors import CheckpointError, RegistryError, TrackingError
from counterfake.registry import Registry
from counterfake.workspace import Workspace
from serving.schemas import Member, Model

logger = logging.getLogger(__name__)


class RegistrySource:
    """Follows `reference` ("ensemble@champion", "ensemble/3") in a workspace's registry. A `follow.Source`."""

    def __init__(self, reference: str, workspace: Workspace) -> None:
        self._reference = reference
        self._cache = workspace.cache
        self._registry = Registry.at(workspace)

    def newest(self) -> tuple[int, str]:
        """(version, digest). RegistryError if there is no such model, TrackingError if MLflow is away."""
        found = self._registry.get(self._reference)
        return found.version, found.digest

    def stage(self, version: int, digest: str) -> Model:
        """Into the local cache, every digest verified, then tried on the golden pictures."""
        folder = self._registry.fetch_digest(digest, self._cache)
        model = describe(folder, self._reference, version, f"{self._registry.bundles_uri}/{digest}")
        examine(folder)
        return model

    def start(self) -> Model:
        """What to serve first. Without MLflow, the last promotion recorded in storage."""
        try:
            version, digest = self.newest()
        except RegistryError:
            raise
        except TrackingError as error:
            name, _, alias = self._reference.partition("@")
            promotions = self._registry.promotions(name, alias) if alias else []
            if not promotions:
                raise
            logger.warning("%s; starting with the last recorded promotion of %s", error, self._reference)
            version, digest = promotions[-1]["version"], promotions[-1]["digest"]
        return self.stage(version, digest)


def describe(folder: Path, reference: str, version: int, uri: str) -> Model:
    """What a bundle on disk says of itself. CheckpointError if it is no ensemble."""
    found = bundles.read(folder)
    if found.kind != "ensemble":
        raise CheckpointError(
            f"{reference} is a {found.kind}; an ensemble is served, and one detector can be an ensemble of one"
        )
    name, _, alias = reference.replace("@", "/").partition("/")
    return Model(
        name=name,
        alias=alias,
        version=version,
        digest=found.digest,
        uri=uri,
        members=tuple(_member(name, path) for name, path in found.members.items()),
        ensemble=found.config["ensemble"],
        calibration_id=found.config["ensemble"].get("calibration_id"),
        dataset=found.info.get("dataset"),
        run_id=found.info.get("run_id"),
        commit=found.info.get("commit"),
        created_at=found.info.get("created_at"),
        evaluation=_figures(found.evaluation or {}),
    )


def examine(folder: Path) -> None:
    """Load the bundle and try it: finite probabilities that repeat and do not depend on batch mates. CheckpointError."""
    from counterfake import predictor  # torch; gateways import this module and need none

    loaded = predictor.load(folder)
    if not isinstance(loaded, predictor.EnsemblePredictor):
        raise CheckpointError(f"{folder} holds a {type(loaded).__name__}, not an ensemble")
    for name, member in loaded.members.items():
        _try(name, member)


@functools.cache
def golden_pictures() -> tuple[bytes, ...]:
    """Three small pictures that never change: smooth, textured, and made of edges; as PNG, JPEG and WEBP."""
    rng = np.random.default_rng(20261120)
    y, x = np.mgrid[0:160, 0:128]
    smooth = np.stack([x * 2, y, 255 - x], axis=-1) % 256
    texture = rng.integers(0, 256, (160, 128, 3))
    edges = np.where(((x // 16 + y // 16) % 2)[..., None] == 0, 230, 40) * np.ones(3)
    return (
        media.encode(smooth.astype(np.uint8), "png"),
        media.encode(texture.astype(np.uint8), "jpeg"),
        media.encode(edges.astype(np.uint8), "webp"),
    )


# -- private --------------------------------------------------------------------------------------------------------


def _try(name: str, member: Any) -> None:
    decoded = []
    for picture in golden_pictures():
        one = member.decode(picture)
        if member.refusal(one) is None:  # a detector of faces refuses all of them: they show none
            decoded.append(one)
    if not decoded:
        return
    alone = [float(member.predict([one])[0]) for one in decoded]
    together = [float(value) for value in member.predict(decoded)]
    for a, b in zip(alone, together, strict=True):
        if not (math.isfinite(a) and 0 <= a <= 1):
            raise CheckpointError(
                f"detector {name} answers {a} for a golden picture; a probability was expected"
            )
        if abs(a - b) > 1e-5:
            raise CheckpointError(
                f"detector {name} answers {a} alone and {b} in a batch for the same picture"
            )


def _member(name: str, folder: Path) -> Member:
    found = bundles.read(folder)
    plain = Member(name=name, kind=found.kind, version=found.digest[:12], digest=found.digest)
    if found.kind != "detector":
        return plain
    chosen, why = runtime.select(found.info)
    return plain.model_copy(update={"runtime": chosen.name, "runtime_reason": why})


def _figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The headline figures of an evaluation: {metric: {value, low, high}} and counts."""
    keys = ("n", "n_real", "n_fake", "majority")
    measured = {k: v for k, v in evaluation.items() if isinstance(v, dict) and "value" in v}
    return {**{k: evaluation[k] for k in keys if k in evaluation}, **measured}
