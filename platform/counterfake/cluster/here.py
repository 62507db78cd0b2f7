"""A training run without Ray: one worker, this process, checkpoints in the run's folder on storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from counterfake import precision
from counterfake.cluster.worker import Order, Progress, work
from counterfake.loop import Tick
from counterfake.storage import Store
from counterfake.temporary import temporary_folder


def run_here(order: Order, store: Store, on_progress: Progress | None) -> dict[str, Any]:
    """Train here -> the figures of the run and the URI of its last checkpoint."""
    host = _Host(order, store, on_progress)
    with precision.restored():
        summary = work(order, host)
    return {**summary, "checkpoint": host.last_uri()}


# -- private -----------------------------------------------------------------------------------------------------------


class _Host:
    """One process: checkpoints go to the run's folder on storage as they are."""

    def __init__(self, order: Order, store: Store, on_progress: Progress | None) -> None:
        self._store, self._on_progress = store, on_progress
        self._keep = order.job.loop.keep_checkpoints

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        steps = self._complete()
        if not steps:
            yield None
            return
        with temporary_folder() as temporary:
            yield self._store.download(steps[-1], temporary / "checkpoint")

    def report(self, tick: Tick, folder: Path | None) -> None:
        if folder:
            self._store.publish(folder, f"checkpoints/{folder.name}")
            self._prune()
        if self._on_progress:
            self._on_progress(tick)

    def agree(self, answer: dict[str, str]) -> dict[str, str]:
        return answer

    def last_uri(self) -> str:
        return f"{self._store.uri}/{self._complete()[-1]}"

    def _complete(self) -> list[str]:
        """Prefixes of complete checkpoints, oldest first: `state.json` is published last."""
        keys = (entry.key for entry in self._store.list("checkpoints/"))
        return sorted(key.removesuffix("/state.json") for key in keys if key.endswith("/state.json"))

    def _prune(self) -> None:
        for prefix in self._complete()[: -self._keep]:
            self._store.delete(f"{prefix}/state.json")  # first: from here on it is no checkpoint
            for entry in self._store.list(f"{prefix}/"):
                self._store.delete(entry.key)
