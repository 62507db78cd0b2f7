"""file:// and s3:// as one: read, list, put-if-absent, publish atomically, digests, deadlines, retries.

The only home of boto3. Every call has a total deadline and a limited number of jittered retries; bodies that arrive
truncated or altered are read again, which boto3 never does. Objects written here carry their SHA-256 as metadata, so
that a read knows what it should get. Needs of the server: conditional puts (`If-None-Match: *`); `probe` finds out.
Keeps away from what the bytes mean: schema, versions and shards are records.py and versions.py.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import os
import re
import shutil
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from counterfake.errors import (
    ConfigError,
    CorruptError,
    NotFoundError,
    StorageError,
    StorageTimeoutError,
)

T = TypeVar("T")

DEADLINE_SECONDS = 120.0  # of one call, retries and waits included
ATTEMPTS = 8  # about 10 s of waiting at most before an endpoint that refuses is given up
STALL_SECONDS = 8.0  # a socket silent for so long is given up and the request made again
FIRST_STALL_SECONDS = (0.25, 0.5, 1.0, 2.0)  # of a read's first attempt; the server's usual pace chooses
RACES = 8  # of the probe; Swift 2.38 was found out by 8 of 10 single races
PART_BYTES = 16 << 20  # of multipart uploads and ranged downloads; each part has its own deadline
CHUNK_BYTES = 1 << 20
_TEMPORARY = ".tmp-"  # prefix of file names that are not objects yet
_PROBE = "probe-"  # prefix of the probe's keys


@dataclasses.dataclass(frozen=True)
class Entry:
    """One object of a listing. `modified` is seconds since 1970."""

    key: str
    size: int
    modified: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a store can do, as tried by `probe`."""

    conditional_writes: (
        bool  # put-if-absent is refused for a key that exists, also to writers at the same moment
    )
    checksums: (
        bool  # an upload whose Content-MD5 does not fit is refused; without it our own SHA-256 finds it
    )
    faithful: (
        bool  # bytes come back as they were written, and so does the SHA-256 kept as metadata beside them
    )

    def require(self, uri: str) -> None:
        """Raises StorageError where versions could overwrite each other or come back altered."""
        if not self.faithful:
            raise StorageError(
                f"{uri} does not give back what was written (bytes, or the metadata that holds their SHA-256); "
                f"use another server, or look for a proxy or gateway in between that alters objects"
            )
        if not self.conditional_writes:
            raise StorageError(
                f"{uri} does not keep conditional writes (If-None-Match: *), so two writers could overwrite each other's "
                f"version; use AWS S3, another server that keeps them, or file://"
            )


def open_store(uri: str, *, endpoint_url: str | None = None, deadline_s: float = DEADLINE_SECONDS) -> Store:
    """The store under `uri`: file:///absolute/folder or s3://bucket/prefix.

    The endpoint of S3 comes from the argument, else from boto3's own settings (AWS_ENDPOINT_URL, ~/.aws/config).
    Opens nothing yet: the first call does. Raises ConfigError for any other kind of URI.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return _FileStore(uri.rstrip("/"), Path(urllib.parse.unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        return _S3Store(uri.rstrip("/"), parts.netloc, parts.path.strip("/"), endpoint_url, deadline_s)
    raise ConfigError(f"storage {uri!r} is neither file:///absolute/folder nor s3://bucket/prefix")


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

    def abort_stale_uploads(self, older_than_s: float) -> int:
        """Remove what killed writers left, if begun so long ago -> how many.

        Multipart uploads on S3, temporary files on a file system, and objects of `probe`. No other object is touched.
        """
        before = time.time() - older_than_s
        left = [entry.key for entry in self.list(_PROBE) if entry.modified < before]
        for key in left:
            self.delete(key)
        return len(left) + self._abort_uploads(before)

    @abc.abstractmethod
    def _abort_uploads(self, before: float) -> int:
        """The uploads begun before this time (seconds since 1970) -> how many there were."""

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
        staging = dest.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            for entry in entries:
                self._save(entry, _inside(staging, entry.key.removeprefix(prefix)))
            if dest.exists():
                shutil.rmtree(dest)
            os.replace(staging, dest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return dest

    @abc.abstractmethod
    def _save(self, entry: Entry, path: Path) -> None:
        """The object as the local file `path`."""

    def _probe_checksums(self, key: str) -> bool:
        return True

    def _recorded(self, key: str) -> str | None:
        """The SHA-256 kept beside the object, where the store keeps one."""
        return None


class _EmptyError(StorageError):
    """A range was asked for that begins after the object's last byte."""


class _UnsupportedError(StorageError):
    """The server knows the request but does not implement it."""


_PROBED: dict[tuple[str, str | None], Capabilities] = {}  # of a bucket at an endpoint


def probe(store: Store) -> Capabilities:
    """Try what the store can do with a few small objects, which are removed again. Remembered for this process.

    Raises StorageError for a store that does not answer or refuses to write.
    """
    where = (getattr(store, "bucket", store.uri), getattr(store, "_endpoint", None))
    if where not in _PROBED:
        key = f"{_PROBE}{uuid.uuid4().hex}"
        # first: a store that does not answer is found out by one call, not by eight at once
        store.put(f"{key}-bytes", _EVERY_BYTE)
        try:
            faithful = _gives_back(store, f"{key}-bytes")
            conditional = faithful and all(_one_wins(store, f"{key}-{race}") for race in range(RACES))
            checksums = faithful and store._probe_checksums(f"{key}-md5")
        finally:
            with contextlib.suppress(StorageError):  # the first error is the one to tell
                for entry in store.list(key):
                    store.delete(entry.key)
        _PROBED[where] = Capabilities(conditional_writes=conditional, checksums=checksums, faithful=faithful)
    return _PROBED[where]


_EVERY_BYTE = bytes(range(256))


def _gives_back(store: Store, key: str) -> bool:
    try:
        found = store.read(key)
    except CorruptError:
        return False
    return found == _EVERY_BYTE and store._recorded(key) in (None, hashlib.sha256(_EVERY_BYTE).hexdigest())


def _one_wins(store: Store, key: str) -> bool:
    """Of eight writers at the same moment, and one more later. A server that looks first and then writes may refuse the
    later one and still let several of the eight win."""
    start = threading.Barrier(8, timeout=60)

    def write(writer: int) -> bool:
        start.wait()
        return store.put_if_absent(key, b"writer %d" % writer)

    try:
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        later = store.put_if_absent(key, b"later")
    except _UnsupportedError:
        return False
    return sum(won) == 1 and not later and store.read(key) == b"writer %d" % won.index(True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write or replace a local file: readers and a power cut see the old bytes or the new ones."""
    with _staged(Path(path)) as staging:
        staging.write_bytes(data)
        _sync(staging)
        os.replace(staging, path)
    _sync(Path(path).parent)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_VERIFIED: set[tuple[str, int, int, int, str]] = set()
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


def _identity(path: Path, sha256: str) -> tuple[str, int, int, int, str]:
    status = path.stat()
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns, sha256


# -- file:// --------------------------------------------------------------------------------------------------------


class _FileStore(Store):
    def __init__(self, uri: str, root: Path) -> None:
        super().__init__(uri)
        self.root = root

    is_local = True

    def path(self, key: str) -> Path:
        return _inside(self.root, key)

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
                if key.startswith(prefix) and not name.startswith(_TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):  # deleted since
                        status = os.stat(os.path.join(folder, name))
                        entries.append(Entry(key, status.st_size, status.st_mtime))
        return sorted(entries, key=lambda entry: entry.key)

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            write_atomic(self.path(key), data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self.path(key)
        with self._errors(key), _staged(path) as staging:
            staging.write_bytes(data)
            _sync(staging)
            if not _link(staging, path):
                return False
        _sync(path.parent)
        return True

    def put_file(self, key: str, path: Path) -> None:
        target = self.path(key)
        with self._errors(key), _staged(target) as staging:
            shutil.copyfile(path, staging)
            _sync(staging)
            os.replace(staging, target)
            _sync(target.parent)  # before the manifest that names it

    def delete(self, key: str) -> None:
        with self._errors(key):
            self.path(key).unlink(missing_ok=True)

    def fetch(self, key: str, *, sha256: str, cache: Path) -> Path:
        with self._errors(key):
            return verify_file(self.path(key), sha256, f"{self.uri}/{key}")

    def _abort_uploads(self, before: float) -> int:
        removed = 0
        for folder, _, names in os.walk(self.root):
            for path in (Path(folder, name) for name in names if name.startswith(_TEMPORARY)):
                with contextlib.suppress(FileNotFoundError):  # finished since
                    if path.stat().st_mtime < before:
                        path.unlink()
                        removed += 1
        return removed

    def filesystem(self) -> tuple[Any, str]:
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), str(self.root)

    def _save(self, entry: Entry, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors(entry.key):
            shutil.copyfile(self.path(entry.key), path)

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


def _inside(root: Path, key: str) -> Path:
    if key.startswith("/") or ".." in key.split("/"):
        raise StorageError(f"key {key!r} leaves {root}; keys are relative and without '..'")
    return root / key


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` (same file system, so that a rename is atomic), removed if it is still there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"folder {path.parent} cannot be made: {error.strerror}; choose a place that can be written"
        ) from error
    staging = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        yield staging
    finally:
        staging.unlink(missing_ok=True)


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


def _check(name: str, data: bytes, sha256: str | None) -> None:
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptError(f"{name} is not what was written (SHA-256 {sha256[:16]}…); restore it from a copy")


# -- s3:// ----------------------------------------------------------------------------------------------------------


class _Again(Exception):
    """A failure worth another attempt; the message is its short reason."""

    busy = False  # the server asks for time


_BACKOFF = tenacity.wait_random_exponential(multiplier=0.1, max=5)


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before another attempt: none after the first failure, unless the server is busy."""
    error = state.outcome.exception() if state.outcome else None
    return 0.0 if state.attempt_number == 1 and not getattr(error, "busy", True) else _BACKOFF(state)


class _S3Store(Store):
    def __init__(self, uri: str, bucket: str, prefix: str, endpoint: str | None, deadline_s: float) -> None:
        super().__init__(uri)
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.deadline_s = deadline_s
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._stall = min(STALL_SECONDS, deadline_s / 4)
        self._patience = _Patience()
        self._clients: dict[float, Any] = {}  # by how long they bear silence
        self._fetching: dict[str, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "endpoint": self._endpoint, "deadline_s": self.deadline_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Clients and locks do not travel between processes; the URI does."""
        fresh = open_store(state["uri"], endpoint_url=state["endpoint"], deadline_s=state["deadline_s"])
        self.__dict__.update(fresh.__dict__)

    is_local = False

    @property
    def client(self) -> Any:
        return self._client(self._stall)

    def _client(self, stall_s: float) -> Any:
        with self._lock:
            if stall_s not in self._clients:
                self._clients[stall_s] = _client(self._endpoint, stall_s)
            return self._clients[stall_s]

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        return self._read(key, sha256)[0]

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:
            return b""
        span = f"bytes={start}-{start + length - 1}"
        return self._read(key, None, Range=span)[0]

    def exists(self, key: str) -> bool:
        return self._head(key) is not None

    def list(self, prefix: str = "") -> list[Entry]:
        entries: list[Entry] = []
        token: dict[str, str] = {}
        while True:
            request = {"Bucket": self.bucket, "Prefix": self.prefix + prefix, **token}
            page = self._request("list", prefix, "list_objects_v2", **request)
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(self.prefix)
                entries.append(Entry(key, item["Size"], item["LastModified"].timestamp()))
            if not page.get("IsTruncated"):
                return sorted(entries, key=lambda entry: entry.key)
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def put(self, key: str, data: bytes) -> None:
        self._call("write", key, lambda deadline: self._put(key, data, deadline))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        attempts = 0

        def attempt(deadline: float) -> bool:
            nonlocal attempts
            attempts += 1
            try:
                self._put(key, data, deadline, IfNoneMatch="*")
            except Exception as error:
                if _status(error) != 412:
                    raise
                # An earlier attempt may have been stored although its answer was lost.
                return attempts > 1 and self.read(key) == data
            return True

        return self._call("write", key, attempt)

    def put_file(self, key: str, path: Path) -> None:
        if Path(path).stat().st_size <= 2 * PART_BYTES:
            self.put(key, Path(path).read_bytes())
        else:
            self._put_parts(key, Path(path))

    def delete(self, key: str) -> None:
        self._request("delete", key, "delete_object", Bucket=self.bucket, Key=self.prefix + key)

    def fetch(self, key: str, *, sha256: str, cache: Path) -> Path:
        path = Path(cache) / "sha256" / sha256[:2] / sha256
        with self._lock:
            lock = self._fetching.setdefault(sha256, threading.Lock())
        with lock:  # one download for all threads; between processes the rename decides
            if not _is_verified(path, sha256):
                with _staged(path) as staging:
                    self._fetch_verified(key, staging, sha256)
                    os.replace(staging, path)
                _VERIFIED.add(_identity(path, sha256))
            with self._lock:
                self._fetching.pop(sha256, None)
        return path

    def _abort_uploads(self, before: float) -> int:
        removed = 0
        for upload in list(self._uploads()):
            if upload["Initiated"].timestamp() < before:
                target = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                with contextlib.suppress(NotFoundError):  # finished since
                    self._request("abort the upload of", upload["Key"], "abort_multipart_upload", **target)
                    removed += 1
        return removed

    def _uploads(self) -> Iterator[dict[str, Any]]:
        """Every multipart upload under way."""
        token: dict[str, str] = {}
        while True:
            request = {"Bucket": self.bucket, "Prefix": self.prefix, **token}
            page = self._request("list the uploads of", "", "list_multipart_uploads", **request)
            yield from page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return
            token = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def filesystem(self) -> tuple[Any, str]:
        import pyarrow.fs

        meta = self.client.meta
        retries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_attempts(self.deadline_s, self._stall))
        options: dict[str, Any] = {
            "region": meta.region_name or "us-east-1",
            "connect_timeout": self._stall,
            "request_timeout": self._stall,  # of silence; it has no time-out for a server that drips bytes
            "retry_strategy": retries,  # a copy in another process has pyarrow's own: 3 attempts
        }
        if not _is_aws(meta.endpoint_url):
            scheme, _, host = meta.endpoint_url.partition("://")
            options |= {"endpoint_override": host, "scheme": scheme, "allow_bucket_creation": False}
        return pyarrow.fs.S3FileSystem(**options), f"{self.bucket}/{self.prefix}".rstrip("/")

    def _save(self, entry: Entry, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fetch_verified(entry.key, path, None)

    def _recorded(self, key: str) -> str | None:
        return str(((self._head(key) or {}).get("Metadata") or {}).get("sha256", ""))

    def _probe_checksums(self, key: str) -> bool:
        """One attempt: a server that refuses may call it a transient fault (BadDigest)."""
        wrong = self._object(key, b"bytes") | {"ContentMD5": _md5(b"other bytes")}
        try:
            self.client.put_object(**wrong)
        except Exception as error:
            if _status(error) == 400:
                return True
            raise _final(error, f"write {self.uri}/{key}") from error
        return False

    def _put(self, key: str, data: bytes, deadline: float, **extra: str) -> None:
        request = self._object(key, data) | {"Body": _body(data, deadline - self._stall)}
        self.client.put_object(**request, **extra)

    def _object(self, key: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        target = {"Bucket": self.bucket, "Key": self.prefix + key, "Metadata": {"sha256": digest}}
        return {**target, "Body": data, "ContentMD5": _md5(data)}

    def _head(self, key: str) -> dict[str, Any] | None:
        def attempt(_: float) -> dict[str, Any] | None:
            try:
                answer: dict[str, Any] = self.client.head_object(Bucket=self.bucket, Key=self.prefix + key)
            except Exception as error:
                if _status(error) == 404:
                    return None
                raise
            return answer

        return self._call("look up", key, attempt)

    def _read(self, key: str, sha256: str | None, **extra: str) -> tuple[bytes, dict[str, Any]]:
        """(body, answer) of a GET. The first attempt is impatient: a stalled read is cheaper to repeat than to wait for."""
        stalls = itertools.chain([min(self._patience.seconds(), self._stall)], itertools.repeat(self._stall))
        return self._call(
            "read", key, lambda deadline: self._get(key, deadline, next(stalls), sha256, **extra)
        )

    def _get(
        self, key: str, deadline: float, stall_s: float, sha256: str | None, **extra: str
    ) -> tuple[bytes, dict[str, Any]]:
        client, began = self._client(stall_s), time.monotonic()
        answer = client.get_object(Bucket=self.bucket, Key=self.prefix + key, **extra)
        self._patience.learn(time.monotonic() - began)
        with contextlib.closing(answer["Body"]) as body:
            data = _drain(body, int(answer["ContentLength"]), deadline - stall_s)
        recorded = None if "Range" in extra else answer.get("Metadata", {}).get("sha256")
        expected_digests = {digest for digest in (sha256, recorded) if digest}
        if expected_digests and {found := hashlib.sha256(data).hexdigest()} != expected_digests:
            raise _Again(f"SHA-256 is {found[:16]}… instead of {min(expected_digests)[:16]}…")
        return data, answer

    def _copy(self, key: str, path: Path) -> tuple[str | None, str]:
        """Download in ranges, each with its own deadline: (the SHA-256 recorded with the object, the one of what came).

        What came is hashed from memory, in order, while later ranges are on their way."""
        first, answer = self._first_part(key)
        size = int(answer.get("ContentRange", f"/{len(first)}").rpartition("/")[2])
        with self._disk(path), open(path, "wb") as file, ThreadPoolExecutor(4) as pool:

            def part(start: int) -> bytes:
                data = self.read_range(key, start, min(PART_BYTES, size - start))
                if len(data) != min(PART_BYTES, size - start):
                    raise StorageError(f"{self.uri}/{key} changed while it was read; run again")
                os.pwrite(file.fileno(), data, start)
                return data

            rest = pool.map(part, range(len(first), size, PART_BYTES))
            found = hashlib.sha256(first)
            os.pwrite(file.fileno(), first, 0)
            for data in rest:
                found.update(data)
        recorded: str | None = answer.get("Metadata", {}).get("sha256")
        return recorded, found.hexdigest()

    def _first_part(self, key: str) -> tuple[bytes, dict[str, Any]]:
        """(bytes, answer): its Content-Range tells the size, which saves a request to ask for it."""
        try:
            return self._read(key, None, Range=f"bytes=0-{PART_BYTES - 1}")
        except _EmptyError:
            return self._read(key, None)

    @contextlib.contextmanager
    def _disk(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # timeouts of the network are StorageErrors by now
            if isinstance(error, StorageError):
                raise
            raise StorageError(
                f"cannot write {path}: {error.strerror}; free some disk space or move the cache"
            ) from error

    def _fetch_verified(self, key: str, path: Path, sha256: str | None) -> None:
        """Download until the digest fits (the recorded one if none is given). Raises CorruptError."""
        wrong: set[str] = set()
        for _ in range(ATTEMPTS):
            recorded, found = self._copy(key, path)
            expected = sha256 or recorded
            if expected in (None, found):
                return
            if found in wrong:  # the same wrong bytes again: altered where they are stored, not on the way
                break
            wrong.add(found)
        raise CorruptError(
            f"{self.uri}/{key} has SHA-256 {found[:16]}… but was written as {str(expected)[:16]}…; "
            f"restore it from a copy, or delete it and write the version again"
        )

    def _put_parts(self, key: str, path: Path) -> None:
        target = {"Bucket": self.bucket, "Key": self.prefix + key}
        digest = {"sha256": file_sha256(path)}
        made = self._request("write", key, "create_multipart_upload", **target, Metadata=digest)
        upload = {**target, "UploadId": made["UploadId"]}
        try:
            parts = []
            with open(path, "rb") as file:
                for number, data in enumerate(iter(lambda: file.read(PART_BYTES), b""), start=1):
                    etag = self._call("write", key, functools.partial(self._put_part, upload, number, data))
                    parts.append({"PartNumber": number, "ETag": etag})
            self._complete(key, upload, parts, digest["sha256"])
        except BaseException:
            with contextlib.suppress(Exception):
                self.client.abort_multipart_upload(**upload)
            raise

    def _put_part(self, upload: dict[str, Any], number: int, data: bytes, deadline: float) -> str:
        body = _body(data, deadline - self._stall)
        answer = self.client.upload_part(**upload, PartNumber=number, Body=body, ContentMD5=_md5(data))
        return str(answer["ETag"])

    def _complete(
        self, key: str, upload: dict[str, Any], parts: Sequence[dict[str, Any]], sha256: str
    ) -> None:
        try:
            self._request(
                "write", key, "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}
            )
        except NotFoundError:
            # An earlier attempt may have been stored although its answer was lost.
            if ((self._head(key) or {}).get("Metadata") or {}).get("sha256") != sha256:
                raise

    def _request(self, verb: str, key: str, operation: str, **arguments: Any) -> Any:
        return self._call(verb, key, lambda _: getattr(self.client, operation)(**arguments))

    def _call(self, verb: str, key: str, attempt: Callable[[float], T]) -> T:
        """Run `attempt(deadline)` until it works, gives a final error, or the attempts or the time are used up.

        None begins so late that a connection and an answer which both stall would end after the deadline.
        """
        what = f"{verb} {self.uri}/{key}"
        start, last = time.monotonic(), self.deadline_s - 2 * self._stall
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(last),
            wait=_pause,
            retry=tenacity.retry_if_exception_type(_Again),
            reraise=True,
        )
        try:
            return retrying(self._once, attempt, start + self.deadline_s, what)
        except _Again as error:
            raise _gave_up(error, what, time.monotonic() - start, retrying, self.deadline_s) from error

    def _once(self, attempt: Callable[[float], T], deadline: float, what: str) -> T:
        try:
            return attempt(deadline)
        except (_Again, StorageError):
            raise
        except Exception as error:
            if _is_transient(error):
                again = _Again(_reason(error))
                again.busy = _status(error) is not None  # it did answer
                raise again from error
            raise _final(error, what) from error


def _attempts(deadline_s: float, stall_s: float) -> int:
    """Of the AWS SDK below pyarrow, so that one call ends by the deadline though each attempt stalls twice, in connecting and
    in the answer. Before attempt n + 1 it waits 2^(n-1) seconds at most."""
    fitting = (n for n in range(2, ATTEMPTS + 1) if 2 * n * stall_s + 2 ** (n - 1) - 1 <= deadline_s)
    return max(fitting, default=1)


class _Patience:
    """How long the first attempt of a read bears silence: eight times what this server usually needs for an answer.

    An epoch in order waits for each stalled request, so two seconds for every hundredth of a few milliseconds would make
    it many times as long. Later attempts have STALL_SECONDS, and teach it where the server has become slow.
    """

    def __init__(self) -> None:
        self._usual_s, self._answers = 0.0, 0

    def learn(self, seconds: float) -> None:
        """A moving average; threads may lose one of the other's answers, which does no harm."""
        weight = 0.1 if self._answers else 1.0
        self._usual_s += weight * (seconds - self._usual_s)
        self._answers += 1

    def seconds(self) -> float:
        wanted = 8 * self._usual_s if self._answers >= 16 else FIRST_STALL_SECONDS[-1]
        return next((step for step in FIRST_STALL_SECONDS if step >= wanted), FIRST_STALL_SECONDS[-1])


def _is_verified(path: Path, sha256: str) -> bool:
    """A whole file of ours; a damaged one is downloaded again."""
    try:
        verify_file(path, sha256)
    except (FileNotFoundError, CorruptError):
        return False
    return True


class _Body(io.BytesIO):
    """An upload that stops at the deadline. A socket's own time-out is for all of a bytes object, but for each block of a file."""

    def __init__(self, data: bytes, deadline: float) -> None:
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._deadline:
            raise _Again(f"the upload stalled after {self.tell()} bytes")
        return super().read(size)


def _body(data: bytes, deadline: float) -> bytes | _Body:
    """Small bodies go out at once: for a file the client would first ask the server to continue."""
    return data if len(data) <= CHUNK_BYTES else _Body(data, deadline)


def _drain(body: Any, expected: int, deadline: float) -> bytes:
    """All bytes of a response. Raises _Again if they are too few or come too slowly."""
    # read1 returns what one recv gave, so that a server that drips bytes cannot outlive the deadline
    raw = getattr(body, "_raw_stream", body)
    read = getattr(raw, "read1", raw.read)
    chunks: list[bytes] = []
    received = 0
    while received < expected:
        if time.monotonic() > deadline:
            raise _Again(f"stalled after {received} of {expected} bytes")
        chunk = read(min(CHUNK_BYTES, expected - received))
        if not chunk:
            raise _Again(f"body ended after {received} of {expected} bytes")
        chunks.append(chunk)
        received += len(chunk)
    return b"".join(chunks)


def _client(endpoint: str | None, stall_s: float) -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session(botocore_session=_session())

    def make(**style: Any) -> Any:
        settings = Config(
            connect_timeout=stall_s,
            read_timeout=stall_s,
            retries={"total_max_attempts": 1},  # ours know the deadline and look into the body
            max_pool_connections=32,
            # many S3-compatible servers reject the trailing checksums that are AWS's default; we verify SHA-256
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **style,
        )
        return session.client("s3", endpoint_url=endpoint, config=settings)

    client = make()
    if not _is_aws(client.meta.endpoint_url):
        client = make(s3={"addressing_style": "path"})  # bucket.host needs a DNS entry for each bucket
    return client


def _session() -> Any:
    """A new session, which reads the credentials of now, with the service descriptions of the first: 50 ms a client otherwise."""
    import botocore.session

    session = botocore.session.get_session()
    session.register_component("data_loader", _descriptions())
    return session


@functools.cache
def _descriptions() -> Any:
    import botocore.session

    return botocore.session.get_session().get_component("data_loader")


def _is_aws(endpoint: str) -> bool:
    return (urllib.parse.urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "BadDigest", "InternalError", "ThrottlingException"}


def _is_transient(error: Exception) -> bool:
    import botocore.exceptions as aws
    import urllib3.exceptions as http

    if isinstance(error, aws.ClientError):
        status = _status(error) or 0
        return (
            (status >= 500 and status != 501) or status in (408, 409, 429) or _code(error) in _TRANSIENT_CODES
        )
    network = (aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError)
    return isinstance(error, (*network, http.HTTPError, ConnectionError, TimeoutError))


def _reason(error: BaseException) -> str:
    text = _code(error) or str(error) or type(error).__name__
    return re.sub(r"\s+", " ", text)[:200]


def _final(error: Exception, what: str) -> StorageError:
    code, status = _code(error), _status(error)
    if code == "NoSuchBucket":
        return NotFoundError(f"cannot {what}: the bucket does not exist; create it or correct the URI")
    if code in ("NoSuchKey", "404") or status == 404:
        return NotFoundError(f"{what.partition(' ')[2]} does not exist")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(
            f"cannot {what}: no credentials; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL for a store that is not Amazon's"
        )
    if status in (401, 403):
        return StorageError(
            f"cannot {what}: refused ({code or status}); check the credentials and the bucket policy"
        )
    if status == 416:
        return _EmptyError(f"cannot {what}: the object ends before the range that was asked for")
    if status == 501 or code == "NotImplemented":
        return _UnsupportedError(f"cannot {what}: the server does not implement it ({code})")
    return StorageError(f"cannot {what}: {_reason(error)}; check the endpoint and the URI")


def _gave_up(error: _Again, what: str, seconds: float, retrying: Any, deadline_s: float) -> StorageError:
    tries = retrying.statistics.get("attempt_number", 1)
    story = f"cannot {what}: {tries} attempts in {seconds:.0f} s, the last: {error}"
    if str(error).startswith("SHA-256"):
        return CorruptError(f"{story}; the stored bytes were altered: restore the object from a copy")
    if tries < ATTEMPTS:
        return StorageTimeoutError(
            f"{story}; the deadline is {deadline_s:g} s: check that the endpoint is up"
        )
    return StorageError(f"{story}; check that the endpoint is up and the network is healthy, then run again")
