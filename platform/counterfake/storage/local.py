"""A store in a folder of this machine or of a mounted file system: an object is a file, its key the path."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterfake.errors import CorruptError, NotFoundError, StorageError
from counterfake.storage.files import (
    TEMPORARY,
    copy_atomic,
    inside,
    verify_file,
    write_atomic,
    write_if_absent,
)
from counterfake.storage.store import Entry, Store


class FileStore(Store):
    """file:///absolute/folder. Files under a temporary name are no objects."""

    is_local = True

    def __init__(self, uri: str, root: Path) -> None:
        super().__init__(uri)
        self.root = root

    def path(self, key: str) -> Path:
        return inside(self.root, key)

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        with self._errors(key):
            data = self.path(key).read_bytes()
        _check(f"{self.uri}/{key}", data, sha256)
        return data

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._errors(key), open(self.path(key), "rb") as file:
            file.seek(start)
            return file.read(length)

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def list(self, prefix: str = "") -> list[Entry]:
        top = self.path(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        entries = []
        for folder, folders, names in os.walk(top):
            above = "" if Path(folder) == self.root else f"{Path(folder).relative_to(self.root).as_posix()}/"
            folders[:] = [name for name in folders if _meet(f"{above}{name}/", prefix)]
            for name in names:
                key = Path(folder, name).relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.startswith(TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):  # deleted since
                        status = os.stat(os.path.join(folder, name))
                        entries.append(Entry(key, status.st_size, status.st_mtime))
        return sorted(entries, key=lambda entry: entry.key)

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            write_atomic(self.path(key), data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._errors(key):
            return write_if_absent(self.path(key), data)

    def put_file(self, key: str, path: Path) -> None:
        with self._errors(key):
            copy_atomic(path, self.path(key))

    def delete(self, key: str) -> None:
        with self._errors(key):
            self.path(key).unlink(missing_ok=True)

    def fetch(self, key: str, *, sha256: str, cache: Path) -> Path:
        with self._errors(key):
            return verify_file(self.path(key), sha256, f"{self.uri}/{key}")

    def filesystem(self) -> tuple[Any, str]:
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), str(self.root)

    def _save(self, entry: Entry, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors(entry.key):
            shutil.copyfile(self.path(entry.key), path)

    def _abort_uploads(self, before: float) -> int:
        removed = 0
        for folder, _, names in os.walk(self.root):
            for path in (Path(folder, name) for name in names if name.startswith(TEMPORARY)):
                with contextlib.suppress(FileNotFoundError):  # finished since
                    if path.stat().st_mtime < before:
                        path.unlink()
                        removed += 1
        return removed

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFoundError(f"{self.uri}/{key} does not exist") from error
        except PermissionError as error:
            raise StorageError(f"{self.uri}/{key}: permission denied; check who owns {self.root}") from error
        except OSError as error:
            raise StorageError(
                f"{self.uri}/{key}: {error.strerror}; check the disk of {self.root}"
            ) from error


def _meet(folder: str, prefix: str) -> bool:
    """May the folder hold keys that start with the prefix."""
    return folder.startswith(prefix) or prefix.startswith(folder)


def _check(name: str, data: bytes, sha256: str | None) -> None:
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptError(f"{name} is not what was written (SHA-256 {sha256[:16]}…); restore it from a copy")
