"""Local files that are old or new and never half, and whose bytes were verified once.

Each is written under a temporary name beside its place, synced to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from counterfake.errors import CorruptError, StorageError

TEMPORARY = ".tmp-"  # prefix of names of files and folders that are not finished


def write_atomic(path: Path, data: bytes) -> None:
    """Write or replace a local file: readers and a power cut see the old bytes or the new ones."""
    with staged(Path(path)) as staging:
        staging.write_bytes(data)
        _sync(staging)
        os.replace(staging, path)
    _sync(Path(path).parent)


def write_if_absent(path: Path, data: bytes) -> bool:
    """Write unless the file exists; of several writers at once exactly one gets True."""
    with staged(path) as staging:
        staging.write_bytes(data)
        _sync(staging)
        if not _link(staging, path):
            return False
    _sync(path.parent)
    return True


def copy_atomic(source: Path, path: Path) -> None:
    """Like `write_atomic`, from another file."""
    with staged(path) as staging:
        shutil.copyfile(source, staging)
        _sync(staging)
        os.replace(staging, path)
        _sync(path.parent)  # before the manifest that names it


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` (same file system, so that a rename is atomic), removed if it is still there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"folder {path.parent} cannot be made: {error.strerror}; choose a place that can be written"
        ) from error
    staging = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        yield staging
    finally:
        staging.unlink(missing_ok=True)


def inside(root: Path, key: str) -> Path:
    """The file of a key. Raises StorageError for a key that would lead out of `root`."""
    if key.startswith("/") or ".." in key.split("/"):
        raise StorageError(f"key {key!r} leaves {root}; keys are relative and without '..'")
    return root / key


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_VERIFIED: set[tuple[str, int, int, int, str]] = set()  # what `_identity` gave
_TICK_NS = 50_000_000  # a change within the clock tick of the last one leaves a file's time as it was


def verify_file(path: Path, sha256: str, name: str = "") -> Path:
    """`path`, after its bytes were hashed once in this process. Raises CorruptError naming the object."""
    seen = _identity(path, sha256)
    if seen not in _VERIFIED:
        began = time.time_ns()
        found = file_sha256(path)
        if found != sha256:
            raise CorruptError(
                f"{name or path} has SHA-256 {found[:16]}… but was written as {sha256[:16]}…; "
                f"its bytes were altered: restore it from a copy, or delete it and write the version again"
            )
        if began - seen[3] > _TICK_NS:
            _VERIFIED.add(seen)
    return path


def is_verified(path: Path, sha256: str) -> bool:
    """The file is there, and whole."""
    try:
        verify_file(path, sha256)
    except (FileNotFoundError, CorruptError):
        return False
    return True


def mark_verified(path: Path, sha256: str) -> None:
    """Spares `verify_file` the bytes of a file that were hashed on their way here."""
    _VERIFIED.add(_identity(path, sha256))


# -- private --------------------------------------------------------------------------------------------------------


def _identity(path: Path, sha256: str) -> tuple[str, int, int, int, str]:
    status = path.stat()
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns, sha256


def _link(staging: Path, path: Path) -> bool:
    try:
        os.link(staging, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return _rename_absent(staging, path)  # a file system without hard links
    return True


def _rename_absent(staging: Path, path: Path) -> bool:
    """Rename unless the name is taken: one step for all who lock the folder first. A killed writer leaves no lock and no part."""
    with _locked(path.parent):
        if path.exists():
            return False
        os.replace(staging, path)
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder for one writer of this machine, or of all where its file system keeps locks for all."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise StorageError(
                f"{folder} is on a file system with neither hard links nor locks ({error.strerror}), where two writers "
                f"could overwrite each other's version; choose a folder on another one"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
