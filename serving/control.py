"""The one process of which there is only one: it adds up the metrics of all others and follows the alias.

Every replica reports here once a heartbeat: its cumulative metrics and the ensembles it holds. The answer tells it what
to hold and which ensemble is live. Requests never come here, so this process may stop and start again at any time: what
it knows lies on object storage, written before it is shown, so that a counter on /metrics never falls.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from typing import Any

from counterfake.errors import CounterfakeError, NotFoundError
from counterfake.storage import Store, open_store
from counterfake.telemetry import Telemetry, Totals
from counterfake.workspace import Workspace
from serving.follow import Follower, Holding
from serving.heart import Directive, Report
from serving.models import RegistrySource
from serving.schemas import Model
from serving.settings import APPLICATION, Settings

logger = logging.getLogger(__name__)

SAVE_SECONDS = 20.0
SHOW_SECONDS = 5.0  # that /metrics waits for what it shows to be stored
FORGET_SECONDS = 3600.0


def place(settings: Settings, name: str) -> str:
    """Key of what a service keeps on storage. Services on one storage keep apart by their port."""
    return f"serving/{APPLICATION}-{settings.port}/{name}.json"


def write_start(settings: Settings, workspace: Workspace, model: Model) -> str:
    """Record what a new deployment begins with; a running one goes on with what it follows. Returns the build id."""
    build = uuid.uuid4().hex
    body = {"build": build, "live": model.model_dump()}
    open_store(workspace.storage).put(place(settings, "start"), json.dumps(body).encode())
    return build


class Control:
    """Ray Serve deployment with exactly one replica."""

    def __init__(self, settings: Settings, workspace: Workspace) -> None:
        self._settings, self._workspace = settings, workspace
        self._store = open_store(workspace.storage)
        start, state = (_read(self._store, place(settings, name)) for name in ("start", "state"))
        if not start:
            missing = f"{workspace.storage}/{place(settings, 'start')}"
            raise NotFoundError(f"{missing} is missing; start the application with serving.app")
        self._build = start["build"]
        live = state["live"] if state.get("build") == self._build else start["live"]
        self._totals = Totals.from_state(state["totals"]) if state else Totals()
        self._telemetry, self._sequence, self._process = Telemetry(), 0, f"control#{uuid.uuid4().hex[:12]}"
        self._holdings: dict[str, tuple[float, Holding]] = {}
        self._saving, self._asked, self._saved = asyncio.Lock(), 0, 0
        self._save_task: asyncio.Task[None] | None = None
        self._follower = Follower(
            settings.model,
            Model.model_validate(live),
            RegistrySource(settings.model, workspace),
            self._telemetry,
            switch_seconds=settings.switch_seconds,
            deploy_seconds=settings.ready_seconds,
            on_new_members=self._redeploy,
        )
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._save_sometimes())]

    async def sync(self, report: Report) -> Directive:
        """One heartbeat."""
        self._take(report)
        self._follower.advance(self._live_holdings())
        follower = self._follower
        return Directive(
            live=follower.live, previous=follower.previous, hold=follower.hold, following=follower.status
        )

    async def metrics(self, report: Report) -> bytes:
        """The Prometheus page, with the caller's own newest counts in it."""
        self._take(report)
        self._sequence += 1
        own = self._telemetry.snapshot()
        now = time.time()
        self._totals.add(self._process, self._sequence, own, now=now, role="control")
        page = self._totals.render(now=now, within_seconds=max(10.0, 5 * self._settings.heartbeat_seconds))
        self._save_task = asyncio.create_task(self._save())
        await asyncio.wait(
            {self._save_task}, timeout=SHOW_SECONDS
        )  # storage away: the page is shown all the same
        return page

    # -- private ----------------------------------------------------------------------------------------------------

    def _take(self, report: Report) -> None:
        now = time.time()
        self._totals.add(report.process, report.sequence, report.snapshot, now=now, role=report.role)
        if report.holding is not None:
            self._holdings[report.process] = (now, report.holding)

    def _live_holdings(self) -> list[Holding]:
        oldest = time.time() - max(5.0, 5 * self._settings.heartbeat_seconds)
        self._holdings = {name: entry for name, entry in self._holdings.items() if entry[0] >= oldest}
        return [holding for _, holding in self._holdings.values()]

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            before = self._follower.live.digest
            try:
                await self._follower.poll(self._live_holdings())
                self._follower.advance(self._live_holdings())
            except (
                Exception
            ):  # nothing may end the following: a restart would be the only way to take it up again
                logger.exception("looking at the followed alias failed")
                self._telemetry.count("counterfake_follow_errors_total")
            if self._follower.live.digest != before:
                await self._save()

    async def _save_sometimes(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            self._totals.forget(time.time(), FORGET_SECONDS)
            await self._save()

    async def _save(self) -> None:
        """All that was counted before this call is stored after it. Calls that wait for the same write share it."""
        self._asked += 1
        mine = self._asked
        async with self._saving:
            if self._saved >= mine:
                return
            covers, data = self._asked, json.dumps(self._state()).encode()
            try:
                await asyncio.to_thread(self._store.put, place(self._settings, "state"), data)
            except (CounterfakeError, OSError) as error:  # counts may fall if this process also dies now
                logger.warning("the state of %s was not saved: %s", APPLICATION, error)
            self._saved = covers

    def _state(self) -> dict[str, Any]:
        return {
            "build": self._build,
            "live": self._follower.live.model_dump(),
            "totals": self._totals.state(),
        }

    def _redeploy(self, model: Model) -> None:
        """An ensemble with other detectors: add their deployments; Serve rolls the gateway. Leaves unused ones there."""
        import ray

        from serving import app

        members = dict.fromkeys([m.name for kept in self._follower.hold for m in kept.members])
        task = ray.remote(num_cpus=0, max_retries=1)(app.redeploy)
        task.remote(self._settings, self._workspace, tuple(members), self._build)
        logger.info("deploying detectors %s for version %s", ", ".join(members), model.version)


def _read(store: Store, key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(store.read(key)))
    except NotFoundError:
        return {}
