"""From "the alias has moved" to "the new ensemble answers", or to a refusal that leaves the live one alone.

A candidate is fetched, verified and tried on golden pictures here, before any replica hears of it. Then every detector
replica loads it beside the live one and says so; only when all of them hold it does it go live. Requests carry the
digest they are judged by, so that no verdict mixes two versions. Nothing here is on the path of a request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from counterfake.errors import CheckpointError, CounterfakeError
from counterfake.telemetry import Telemetry
from serving.schemas import Following, Model

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holding:
    """What one live detector replica has in memory."""

    member: str
    digests: frozenset[str]  # of ensembles
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # digest -> why it did not load


class Source(Protocol):
    """Where versions come from. Both calls block and may take seconds."""

    def newest(self) -> tuple[int, str]:
        """(version, digest) the followed reference stands for now. CounterfakeError if that cannot be known."""

    def stage(self, version: int, digest: str) -> Model:
        """Fetched, verified and tried. CheckpointError for a bundle that must not go live, else CounterfakeError."""


class Follower:
    """The live, the previous and the candidate ensemble. All methods belong to one event loop."""

    def __init__(
        self,
        reference: str,
        live: Model,
        source: Source,
        telemetry: Telemetry,
        *,
        switch_seconds: float,
        deploy_seconds: float,
        on_new_members: Callable[[Model], None] = lambda model: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.live, self.previous, self.candidate = live, None, None
        self._source, self._telemetry, self._clock = source, telemetry, clock
        self._switch_seconds, self._deploy_seconds = switch_seconds, deploy_seconds
        self._on_new_members = on_new_members
        self._refused: str | None = None
        self._deadline = 0.0
        self._status = Following(reference=reference, state="live", swapped_at=clock())
        self._show_live()
        for outcome in ("live", "refused"):  # there from the start: an increase from nothing is no increase
            telemetry.count("counterfake_model_swaps_total", 0, outcome=outcome)

    live: Model
    previous: Model | None
    candidate: Model | None

    @property
    def status(self) -> Following:
        """What /v1/models says about the followed alias."""
        return self._status

    @property
    def hold(self) -> tuple[Model, ...]:
        """What detector replicas should have in memory, the live one first."""
        wanted = (self.live, self.candidate, self.previous)
        return tuple({model.digest: model for model in wanted if model is not None}.values())

    async def poll(self, holdings: Iterable[Holding]) -> None:
        """Look once where the alias points; stage what is new. Never raises for what MLflow, storage or a bundle do."""
        try:
            version, digest = await asyncio.to_thread(self._source.newest)
        except CounterfakeError as error:
            self._telemetry.count("counterfake_follow_errors_total")
            self._say("unreachable", str(error))
            return
        now = self._clock()
        self._telemetry.set("counterfake_follow_success_timestamp_seconds", now)
        self._say(self._status.state if self._status.state != "unreachable" else "live", polled_at=now)
        if digest == self.live.digest:
            self.candidate, self._refused = None, None
            self._say("live", candidate=None)
        elif digest != self._refused and (self.candidate is None or self.candidate.digest != digest):
            await self._stage(version, digest, {holding.member for holding in holdings})

    def advance(self, holdings: Iterable[Holding]) -> None:
        """Make the candidate live once every detector replica holds it; refuse it if one cannot or time is up."""
        candidate, holdings = self.candidate, list(holdings)
        if candidate is None:
            return
        failed = next((h for h in holdings if candidate.digest in h.failed), None)
        if failed is not None:
            self._refuse(candidate.digest, f"detector {failed.member}: {failed.failed[candidate.digest]}")
        elif self._is_held(candidate, holdings):
            self._swap(candidate)
        elif self._clock() > self._deadline:
            self._refuse(
                candidate.digest,
                "the detector replicas did not load it in time; to retry, move the alias back for a few polls and promote it again",
            )

    # -- private ----------------------------------------------------------------------------------------------------

    async def _stage(self, version: int, digest: str, members: set[str]) -> None:
        self.candidate = None
        self._say("staging", f"version {version}", candidate=digest)
        try:
            model = await asyncio.to_thread(self._source.stage, version, digest)
        except CheckpointError as error:
            self._refuse(digest, str(error))
            return
        except CounterfakeError as error:  # storage or MLflow away: the next poll tries again
            self._telemetry.count("counterfake_follow_errors_total")
            self._say("unreachable", str(error))
            return
        except (
            Exception
        ) as error:  # a bundle may make any library raise anything; it must not end the following
            logger.exception("candidate %s failed its trial", digest)
            self._refuse(digest, f"its trial failed with {type(error).__name__}: {error}")
            return
        new = {member.name for member in model.members} - members
        self.candidate = model
        self._deadline = self._clock() + (self._deploy_seconds if new else self._switch_seconds)
        self._say("switching", f"version {version}", candidate=digest)
        if new:
            self._on_new_members(model)

    def _is_held(self, model: Model, holdings: list[Holding]) -> bool:
        for member in model.members:
            replicas = [holding for holding in holdings if holding.member == member.name]
            if not replicas or any(model.digest not in holding.digests for holding in replicas):
                return False
        return True

    def _swap(self, candidate: Model) -> None:
        logger.info("version %s (%s) is live", candidate.version, candidate.digest)
        self.previous, self.live, self.candidate, self._refused = self.live, candidate, None, None
        self._telemetry.count("counterfake_model_swaps_total", outcome="live")
        self._say("live", candidate=None, swapped_at=self._clock())
        self._show_live()

    def _refuse(self, digest: str, why: str) -> None:
        logger.error("candidate %s is refused: %s", digest, why)
        self.candidate, self._refused = None, digest
        self._telemetry.count("counterfake_model_swaps_total", outcome="refused")
        self._say("refused", why.splitlines()[0][:300], candidate=digest)

    def _say(self, state: str, detail: str | None = None, **changes: float | str | None) -> None:
        if detail is None:
            detail = self._status.detail if state == self._status.state else ""
        self._status = self._status.model_copy(update={"state": state, "detail": detail, **changes})

    def _show_live(self) -> None:
        self._telemetry.clear("counterfake_model_info")
        labels = {"name": self.live.name, "version": str(self.live.version), "digest": self.live.digest[:12]}
        self._telemetry.set("counterfake_model_info", 1, **labels)
        self._telemetry.clear("counterfake_detector_in_use")
        for member in self.live.members:
            self._telemetry.set("counterfake_detector_in_use", 1, detector=member.name)
