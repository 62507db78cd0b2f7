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
import hashlib
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
PART_BYTES = 16 << 20  # of multipart uploads and ranged downloads; each part has its own deadline
CHUNK_BYTES = 1 << 20
_TEMPORARY = ".tmp-"  # prefix of file names that are not objects yet


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
    checksums: bool  # an upload whose Content-MD5 does not fit is refused

    def require(self, uri: str) -> None:
        """Raises StorageError where versions could overwrite each other."""
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


_PROBED: dict[tuple[str, str | None], Capabilities] = {}


def probe(store: Store) -> Capabilities:
    """Try what the store can do with two small objects, which are removed again. Remembered for this process."""
    where = (store.uri, getattr(store, "_endpoint", None))
    if where not in _PROBED:
        key = f"probe-{uuid.uuid4().hex}"
        store.put_if_absent(
            f"{key}-first", b""
        )  # a store that does not answer is found out by one call, not by eight
        store.delete(f"{key}-first")
        try:
            conditional = _one_wins(store, key)
            checksums = store._probe_checksums(f"{key}-md5")
        finally:
            store.delete(key)
        _PROBED[where] = Capabilities(conditional_writes=conditional, checksums=checksums)
    return _PROBED[where]


def _one_wins(store: Store, key: str) -> bool:
    """Of eight writers at once, and one more later. Swift 2.38 refuses the later one but lets two of the eight win."""
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda writer: store.put_if_absent(key, b"writer %d" % writer), range(8)))
    later = store.put_if_absent(key, b"later")
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


def verify_file(path: Path, sha256: str, name: str = "") -> Path:
    """`path`, after its bytes were hashed once in this process. Raises CorruptError naming the object."""
    status = path.stat()
    seen = (str(path), status.st_ino, status.st_size, status.st_mtime_ns, sha256)
    if seen not in _VERIFIED:
        found = file_sha256(path)
        if found != sha256:
            raise CorruptError(
                f"{name or path} has SHA-256 {found[:16]}… but was written as {sha256[:16]}…; "
                f"its bytes were altered: restore it from a copy, or delete it and write the version again"
            )
        _VERIFIED.add(seen)
    return path


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
        for folder, _, names in os.walk(top):
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
        return _create(path, staging.read_bytes())  # a file system without hard links
    return True


def _create(path: Path, data: bytes) -> bool:
    try:
        with open(path, "xb") as file:  # one writer wins; readers check the digest inside
            file.write(data)
    except FileExistsError:
        return False
    return True


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


class _S3Store(Store):
    def __init__(self, uri: str, bucket: str, prefix: str, endpoint: str | None, deadline_s: float) -> None:
        super().__init__(uri)
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.deadline_s = deadline_s
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._made: Any = None
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
        with self._lock:
            if self._made is None:
                self._made = _client(self._endpoint, min(STALL_SECONDS, self.deadline_s))
            return self._made

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        return self._call("read", key, lambda deadline: self._get(key, deadline, sha256))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:
            return b""
        span = f"bytes={start}-{start + length - 1}"
        return self._call("read", key, lambda deadline: self._get(key, deadline, None, Range=span))

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
        self._request("write", key, "put_object", **self._object(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        attempts = 0

        def attempt(_: float) -> bool:
            nonlocal attempts
            attempts += 1
            try:
                self.client.put_object(**self._object(key, data), IfNoneMatch="*")
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
            if path.exists():
                with contextlib.suppress(CorruptError):
                    return verify_file(path, sha256)
            with _staged(path) as staging:
                self._fetch_verified(key, staging, sha256)
                os.replace(staging, path)
        return verify_file(path, sha256, f"{self.uri}/{key}")

    def filesystem(self) -> tuple[Any, str]:
        import pyarrow.fs

        meta = self.client.meta
        options: dict[str, Any] = {"region": meta.region_name or "us-east-1"}
        if not _is_aws(meta.endpoint_url):
            scheme, _, host = meta.endpoint_url.partition("://")
            options |= {"endpoint_override": host, "scheme": scheme, "allow_bucket_creation": False}
        return pyarrow.fs.S3FileSystem(**options), f"{self.bucket}/{self.prefix}".rstrip("/")

    def _save(self, entry: Entry, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(3):
            recorded = self._copy(entry.key, path)
            if recorded is None or recorded == file_sha256(path):
                return
            time.sleep(0.1 * 2**attempt)
        raise CorruptError(
            f"{self.uri}/{entry.key} arrived altered three times; check the network and the store"
        )

    def _probe_checksums(self, key: str) -> bool:
        wrong = self._object(key, b"bytes") | {"ContentMD5": _md5(b"other bytes")}
        try:
            self.client.put_object(**wrong)
        except Exception as error:
            if _status(error) == 400:
                return True
            raise _final(error, f"write {self.uri}/{key}") from error
        self.delete(key)
        return False

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

    def _get(self, key: str, deadline: float, sha256: str | None, **extra: str) -> bytes:
        answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key, **extra)
        expected = int(answer["ContentLength"])
        data = bytearray()
        with contextlib.closing(answer["Body"]) as body:
            # read1 returns what one recv gave, so that a server that drips bytes cannot outlive the deadline
            raw = getattr(body, "_raw_stream", body)
            read = getattr(raw, "read1", raw.read)
            while len(data) < expected:
                if time.monotonic() > deadline:
                    raise _Again(f"stalled after {len(data)} of {expected} bytes")
                chunk = read(CHUNK_BYTES)
                if not chunk:
                    raise _Again(f"body ended after {len(data)} of {expected} bytes")
                data += chunk
        recorded = None if "Range" in extra else answer.get("Metadata", {}).get("sha256")
        expected_digests = {digest for digest in (sha256, recorded) if digest}
        if expected_digests and {found := hashlib.sha256(data).hexdigest()} != expected_digests:
            raise _Again(f"SHA-256 is {found[:16]}… instead of {min(expected_digests)[:16]}…")
        return bytes(data)

    def _copy(self, key: str, path: Path) -> str | None:
        """Download in ranges, each with its own deadline; the SHA-256 recorded with the object, if any."""
        head = self._head(key)
        if head is None:
            raise NotFoundError(f"{self.uri}/{key} does not exist")
        size = int(head["ContentLength"])
        with self._disk(path), open(path, "wb") as file, ThreadPoolExecutor(4) as pool:

            def part(start: int) -> None:
                data = self.read_range(key, start, min(PART_BYTES, size - start))
                if len(data) != min(PART_BYTES, size - start):
                    raise StorageError(f"{self.uri}/{key} changed while it was read; run again")
                os.pwrite(file.fileno(), data, start)

            list(pool.map(part, range(0, size, PART_BYTES)))
        recorded: str | None = head.get("Metadata", {}).get("sha256")
        return recorded

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

    def _fetch_verified(self, key: str, path: Path, sha256: str) -> None:
        for attempt in range(3):
            self._copy(key, path)
            if file_sha256(path) == sha256:
                return
            time.sleep(0.1 * 2**attempt)
        raise CorruptError(
            f"{self.uri}/{key} does not have SHA-256 {sha256[:16]}… after three downloads; "
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
                    part = {**upload, "PartNumber": number, "Body": data, "ContentMD5": _md5(data)}
                    answer = self._request("write", key, "upload_part", **part)
                    parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            self._complete(key, upload, parts, digest["sha256"])
        except BaseException:
            with contextlib.suppress(Exception):
                self.client.abort_multipart_upload(**upload)
            raise

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
        """Run `attempt(deadline)` until it works, gives a final error, or the attempts or the time are used up."""
        what = f"{verb} {self.uri}/{key}"
        start = time.monotonic()
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(self.deadline_s),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
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
                raise _Again(_reason(error)) from error
            raise _final(error, what) from error


def _client(endpoint: str | None, stall_s: float) -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()  # holds the service's description, most of what a client costs

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
        return status >= 500 or status in (408, 409, 429) or _code(error) in _TRANSIENT_CODES
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
    if status == 501 or code == "NotImplemented":
        return StorageError(f"cannot {what}: the server does not implement it ({code})")
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
