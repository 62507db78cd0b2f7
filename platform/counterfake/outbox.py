"""A bounded buffer that one background thread empties, in order, trying again until it works or a deadline passes.

The giver never waits: not for the network, and not for room (what does not fit is counted, and told at the end).
Knows nothing of MLflow; what it carries are functions to call, and points of metrics that travel in batches.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counterfake.errors import TrackingError
from counterfake.temporary import temporary_folder

logger = logging.getLogger(__name__)

MAX_ITEMS = 20_000  # calls waiting
MAX_POINTS = 200_000  # metric points waiting; about 30 MB
MAX_SPOOL_BYTES = 2 << 30  # files waiting on the local disk
POINTS_PER_CALL = 1000
RETRY_SECONDS = (0.2, 5.0)  # first and longest pause between attempts


@dataclass
class _Item:
    call: Callable[[], None]
    what: str  # for people: "file report.html"
    points: list[Any] = field(default_factory=list)
    send: Callable[[list[Any]], None] | None = None
    spooled: Path | None = None
    size: int = 0  # bytes spooled


class Outbox:
    """Give it things with `put` and `points`; `flush` waits; `close` stops the thread and removes spooled files."""

    def __init__(self, owner: str, *, permanent: Callable[[Exception], bool]) -> None:
        """owner: named in messages. permanent(error): trying again cannot help, so drop the item and tell."""
        self.owner = owner
        self._permanent = permanent
        self._items: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._points = self._spooled = 0
        self._lost: list[str] = []
        self._last_error = ""
        self._closed = self._hurry = False
        self._folder: Path | None = None
        self._held = contextlib.ExitStack()  # the folder
        self._thread: threading.Thread | None = None

    def put(self, call: Callable[[], None], what: str, spooled: Path | None = None) -> None:
        """Queue a call; `spooled` is a file of ours to delete once it has been sent."""
        size = spooled.stat().st_size if spooled else 0
        with self._changed:
            if len(self._items) >= MAX_ITEMS or self._spooled + size > MAX_SPOOL_BYTES:
                self._lose(what, "the buffer was full")
                self._unspool(spooled)
                return
            self._spooled += size
            self._append(_Item(call, what, spooled=spooled, size=size))

    def points(self, points: list[Any], send: Callable[[list[Any]], None]) -> None:
        """Queue metric points; neighbours in the queue are sent by one call of `send`."""
        with self._changed:
            if self._points + len(points) > MAX_POINTS:
                self._lose(f"{len(points)} metric points", "the buffer was full")
                return
            self._points += len(points)
            last = self._items[-1] if self._items else None
            waits = last is not None and last is not self._items[0]  # the thread may be sending the first
            if waits and last and last.send and len(last.points) + len(points) <= POINTS_PER_CALL:
                last.points.extend(points)
            else:
                self._append(_Item(lambda: None, "metric points", points=points, send=send))

    def spool(self, name: str) -> Path:
        """A path on the local disk: write the file there, then `put` its sending with `spooled`."""
        with self._changed:
            self._folder = self._folder or self._held.enter_context(temporary_folder())
            return Path(tempfile.mkdtemp(dir=self._folder)) / name

    def flush(self, seconds: float) -> None:
        """Wait until empty. Raises TrackingError naming what did not arrive, also what was dropped earlier."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            while self._items and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._hurry = False
            waiting = [f"{len(i.points)} metric points" if i.send else i.what for i in self._items]
            lost, self._lost = self._lost, []
        if waiting:
            raise TrackingError(
                f"{self.owner}: {_some(waiting)} did not arrive within {seconds:g} s ({self._last_error or 'slow'}); "
                "check the tracking server and run the same command again to continue the run"
            )
        if lost:
            raise TrackingError(f"{self.owner}: not stored: {_some(lost)}")

    def close(self) -> None:
        """Stop sending; what is still waiting is given up."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
        self._held.close()

    def _append(self, item: _Item) -> None:
        if self._closed:
            raise TrackingError(f"{self.owner} is finished; resume it before giving it more")
        self._items.append(item)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="counterfake-outbox", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        pause = RETRY_SECONDS[0]
        while (item := self._head()) is not None:
            try:
                item.send(item.points) if item.send else item.call()
            except Exception as error:  # whatever it is, training must go on; it is told by flush
                if self._permanent(error):
                    self._done(item, failed=error)
                    continue
                self._last_error = (
                    str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
                )
                logger.warning("%s: %s; trying again in %.1f s", self.owner, self._last_error, pause)
                self._rest(pause)
                pause = min(2 * pause, RETRY_SECONDS[1])
            else:
                pause = RETRY_SECONDS[0]
                self._done(item)

    def _head(self) -> _Item | None:
        with self._changed:
            while not self._items and not self._closed:
                self._changed.wait()
            return self._items[0] if self._items else None

    def _done(self, item: _Item, failed: Exception | None = None) -> None:
        with self._changed:
            if self._items and self._items[0] is item:
                self._items.popleft()
            self._points -= len(item.points)
            if failed is not None:
                self._lose(item.what, str(failed).strip().splitlines()[0][:200])
            self._spooled -= item.size
            self._unspool(item.spooled)
            self._changed.notify_all()

    def _rest(self, seconds: float) -> None:
        """Pause before the next attempt; shorter while somebody waits in `flush`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._hurry, timeout=seconds):
                return
            self._changed.wait_for(lambda: self._closed, timeout=min(seconds, 0.5))

    def _unspool(self, path: Path | None) -> None:
        if path is not None:
            shutil.rmtree(path.parent, ignore_errors=True)

    def _lose(self, what: str, why: str) -> None:
        logger.warning("%s: %s not stored: %s", self.owner, what, why)
        self._lost.append(f"{what} ({why})")


def _some(things: list[str]) -> str:
    shown = ", ".join(things[:5])
    return shown if len(things) <= 5 else f"{shown} and {len(things) - 5} more"
