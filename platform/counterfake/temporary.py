"""Temporary folders that go even when their owner was killed: whoever makes the next one beside it removes it.

An owner holds a lock on its folder, which the kernel lets go of with the process, however that ends. Locks need not reach
from machine to machine, so the machine's name is in the folder's, and another machine's folders are left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(where: Path | None = None) -> Iterator[Path]:
    """A new folder below `where` (None = the system's temporary one), removed at the end with all that is in it."""
    parent = Path(where or tempfile.gettempdir())
    _sweep(parent)
    made, lock = _held(parent)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


# -- private --------------------------------------------------------------------------------------------------------


def _prefix() -> str:
    return f"counterfake-work-{socket.gethostname()}-"


def _sweep(parent: Path) -> None:
    """Remove the folders below `parent` that nobody holds."""
    for name in os.listdir(parent):
        if name.rpartition("-")[0] + "-" != _prefix():
            continue
        with contextlib.suppress(OSError):  # somebody holds it, or was faster, or it is another user's
            lock = os.open(parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(parent / name)
            finally:
                os.close(lock)


def _held(parent: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that locks it."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))
        try:
            lock = os.open(made, os.O_RDONLY)
        except FileNotFoundError:
            continue  # taken for an abandoned one before it was locked
        with contextlib.suppress(OSError):  # a file system without locks, where nobody can take it either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return made, lock
        os.close(lock)
