"""The heartbeat of a replica: reports its metrics to Control, receives what to hold, and keeps going when Control is away."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from counterfake.telemetry import Snapshot, Telemetry
from serving.follow import Holding
from serving.schemas import Following, Model

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a replica says once a heartbeat."""

    process: str  # unique per start
    role: str  # "gateway" or "detector"
    sequence: int
    snapshot: Snapshot
    holding: Holding | None = None  # detectors only


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directive:
    """What a replica is told: the ensemble that answers, those to have in memory, and how the alias stands."""

    live: Model
    previous: Model | None  # still held everywhere; for a gateway that does not reach a new detector yet
    hold: tuple[Model, ...]
    following: Following


class Heart:
    """Beats until its process ends. `directive` is the last word of Control."""

    def __init__(
        self,
        control: Any,
        role: str,
        telemetry: Telemetry,
        seconds: float,
        *,
        holding: Callable[[], Holding | None] = lambda: None,
        on_directive: Callable[[Directive], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.directive: Directive | None = None
        self._control, self._role, self._telemetry, self._seconds = control, role, telemetry, seconds
        self._holding, self._on_directive = holding, on_directive
        self._process, self._sequence = f"{role}#{uuid.uuid4().hex[:12]}", 0
        self._task: asyncio.Task[None] | None = None

    def report(self) -> Report:
        """The next report; each has a higher sequence number."""
        self._sequence += 1
        return Report(
            process=self._process,
            role=self._role,
            sequence=self._sequence,
            snapshot=self._telemetry.snapshot(),
            holding=self._holding(),
        )

    async def beat(self) -> Directive:
        """One report and its answer."""
        directive: Directive = await self._control.sync.remote(self.report())
        self.directive = directive
        return directive

    async def start(self) -> None:
        """The first beat and what follows from it, waited for; then one every few seconds in the background."""
        directive = await self.beat()
        if self._on_directive is not None:
            await self._on_directive(directive)
        self._task = asyncio.create_task(self._go_on())

    async def last(self) -> None:
        """Report once more before the process ends, so that no count is lost."""
        if self._task is not None:
            self._task.cancel()
        try:
            await asyncio.wait_for(self._control.sync.remote(self.report()), 2.0)
        except Exception as error:  # the whole application may be going down
            logger.info("the last report did not arrive: %s", type(error).__name__)

    async def _go_on(self) -> None:
        following: asyncio.Task[None] | None = (
            None  # loading a model takes longer than a beat, and must not stop the beats
        )
        while True:
            await asyncio.sleep(self._seconds)
            try:
                directive = await asyncio.wait_for(self.beat(), 10.0 + self._seconds)
            except Exception as error:  # Control restarts by itself; this replica goes on with what it holds
                logger.warning("heartbeat failed: %s: %s", type(error).__name__, str(error).splitlines()[:1])
                continue
            if self._on_directive is not None and (following is None or following.done()):
                following = asyncio.ensure_future(self._on_directive(directive))
