"""What a store is: objects by key under one URI, and folders of them that appear whole.

The contract that local.py and s3.py keep and everybody else relies on.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from counterfake.errors import NotFoundError, StorageError
from counterfake.storage.files import TEMPORARY, inside

PROBE = "probe-"  # prefix of the keys that capabilities.py tries a store with


@dataclasses.dataclass(frozen=True)
class Entry:
    """One object of a listing. `modified` is seconds since 1970."""

    key: str
    size: int
    modified: float


class EmptyError(StorageError):
    """A range was asked for that begins after the object's last byte."""


class UnsupportedError(StorageError):
    """The server knows the request but does not implement it."""


class Store(abc.ABC):
    """Objects by key under one URI. Safe to use from several threads."""

    is_local: bool  # its objects are files here, which `fetch` need not copy

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __repr__(self) -> str:
        return f"Store({self.uri})"

    @abc.abstractmethod
    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        """The whole object, verified. Raises NotFoundError, CorruptError, StorageTimeoutError."""

    @abc.abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; fewer only at the object's end."""

    @abc.abstractmethod
    def exists(self, key: str) -> bool: ...

    @abc.abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Every object whose key starts with `prefix`, sorted by key."""

    @abc.abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write or replace; a reader sees the old bytes or the new ones, never a part."""

    @abc.abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless the key exists; of several writers at once exactly one gets True."""

    @abc.abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """Like `put`, from a local file of any size."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""

    @abc.abstractmethod
    def fetch(self, key: str, *, sha256: str, cache: Path) -> Path:
        """A local file with exactly these bytes: the object's own file, or a verified copy in `cache` by digest."""

    @abc.abstractmethod
    def filesystem(self) -> tuple[Any, str]:
        """(pyarrow.fs.FileSystem, root path on it), for bulk reads and Ray."""

    def publish(self, folder: Path, prefix: str, *, last: str = "state.json") -> None:
        """Every file of `folder` under `prefix`, the marker file `last` after all others.

        A reader that waits for the marker never sees half a folder.
        """
        folder = Path(folder)
        if not (folder / last).is_file():
            raise StorageError(f"{folder} has no {last}, which marks it as complete; nothing was published")
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        for name in [n for n in names if n != last] + [last]:
            self.put_file(f"{prefix.rstrip('/')}/{name}", folder / name)

    def download(self, prefix: str, dest: Path) -> Path:
        """The opposite of `publish`: all objects under `prefix` as the folder `dest`, which appears whole or not at all."""
        prefix = prefix.rstrip("/") + "/"
        entries = self.list(prefix)
        if not entries:
            raise NotFoundError(f"nothing is stored under {self.uri}/{prefix}; check the URI")
        dest = Path(dest)
        dest.parent.mkdir(parents=True, exist_ok=True)
        staging = dest.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            for entry in entries:
                self._save(entry, inside(staging, entry.key.removeprefix(prefix)))
            if dest.exists():
                shutil.rmtree(dest)
            os.replace(staging, dest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return dest

    def abort_stale_uploads(self, older_than_s: float) -> int:
        """Remove what killed writers left, if begun so long ago -> how many.

        Multipart uploads on S3, temporary files on a file system, and objects of `probe`. No other object is touched.
        """
        before = time.time() - older_than_s
        left = [entry.key for entry in self.list(PROBE) if entry.modified < before]
        for key in left:
            self.delete(key)
        return len(left) + self._abort_uploads(before)

    # -- what the back ends tell this package, and nobody else

    @abc.abstractmethod
    def _save(self, entry: Entry, path: Path) -> None:
        """The object as the local file `path`."""

    @abc.abstractmethod
    def _abort_uploads(self, before: float) -> int:
        """The uploads begun before this time (seconds since 1970) -> how many there were."""

    def _server(self) -> tuple[str, str | None]:
        """Stores that share it can do the same things."""
        return self.uri, None

    def _rejects_wrong_checksums(self, key: str) -> bool:
        """An upload whose checksum does not fit is refused; `key` may be written."""
        return True

    def _recorded(self, key: str) -> str | None:
        """The SHA-256 kept beside the object, where the store keeps one."""
        return None
