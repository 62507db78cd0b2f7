"""A store in a bucket. Objects carry their SHA-256 as metadata, so that a read knows what it should get.

Large objects go up and come down in parts of PART_BYTES, each with a deadline of its own. Needs of the server:
conditional puts (`If-None-Match: *`); capabilities.py finds out.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from counterfake.errors import CorruptError, NotFoundError, StorageError
from counterfake.storage import aws, deadlines
from counterfake.storage.deadlines import Again, Patience, Retries, drain, upload_body
from counterfake.storage.files import file_sha256, is_verified, mark_verified, staged
from counterfake.storage.store import EmptyError, Entry, Store

PART_BYTES = 16 << 20  # of multipart uploads and ranged downloads


class S3Store(Store):
    """s3://bucket/prefix at an endpoint, by default that of boto3's own settings."""

    is_local = False

    def __init__(self, uri: str, bucket: str, prefix: str, endpoint: str | None, deadline_s: float) -> None:
        super().__init__(uri)
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.retries = Retries(uri, deadline_s)
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._patience = Patience()
        self._clients: dict[float, Any] = {}  # by how long they bear silence
        self._fetching: dict[str, threading.Lock] = {}

    def __reduce__(self) -> tuple[type[S3Store], tuple[Any, ...]]:
        """Clients and locks do not travel between processes; the URI does."""
        where = (self.uri, self.bucket, self.prefix.rstrip("/"), self._endpoint, self.retries.deadline_s)
        return type(self), where

    @property
    def client(self) -> Any:
        return self._client(self.retries.stall_s)

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
        self.retries.call("write", key, lambda deadline: self._put(key, data, deadline))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        attempts = 0

        def attempt(deadline: float) -> bool:
            nonlocal attempts
            attempts += 1
            try:
                self._put(key, data, deadline, IfNoneMatch="*")
            except Exception as error:
                if aws.status(error) != 412:
                    raise
                # An earlier attempt may have been stored although its answer was lost.
                return attempts > 1 and self.read(key) == data
            return True

        return self.retries.call("write", key, attempt)

    def put_file(self, key: str, path: Path) -> None:
        if Path(path).stat().st_size <= 2 * PART_BYTES:
            self.put(key, Path(path).read_bytes())
        else:
            self._put_parts(key, Path(path))

    def delete(self, key: str) -> None:
        self._request("delete", key, "delete_object", **self._at(key))

    def fetch(self, key: str, *, sha256: str, cache: Path) -> Path:
        path = Path(cache) / "sha256" / sha256[:2] / sha256
        with self._lock:
            lock = self._fetching.setdefault(sha256, threading.Lock())
        with lock:  # one download for all threads; between processes the rename decides
            if not is_verified(path, sha256):
                with staged(path) as staging:
                    self._fetch_verified(key, staging, sha256)
                    os.replace(staging, path)
                mark_verified(path, sha256)
            with self._lock:
                self._fetching.pop(sha256, None)
        return path

    def filesystem(self) -> tuple[Any, str]:
        import pyarrow.fs

        meta, stall_s = self.client.meta, self.retries.stall_s
        retries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=self.retries.bulk_attempts())
        options: dict[str, Any] = {
            "region": meta.region_name or "us-east-1",
            "connect_timeout": stall_s,
            "request_timeout": stall_s,  # of silence; it has no time-out for a server that drips bytes
            "retry_strategy": retries,  # a copy in another process has pyarrow's own: 3 attempts
        }
        if not aws.is_amazon(meta.endpoint_url):
            scheme, _, host = meta.endpoint_url.partition("://")
            options |= {"endpoint_override": host, "scheme": scheme, "allow_bucket_creation": False}
        return pyarrow.fs.S3FileSystem(**options), f"{self.bucket}/{self.prefix}".rstrip("/")

    # -- what this package asks of a back end

    def _save(self, entry: Entry, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fetch_verified(entry.key, path, None)

    def _abort_uploads(self, before: float) -> int:
        removed = 0
        for upload in list(self._uploads()):
            if upload["Initiated"].timestamp() < before:
                target = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                with contextlib.suppress(NotFoundError):  # finished since
                    self._request("abort the upload of", upload["Key"], "abort_multipart_upload", **target)
                    removed += 1
        return removed

    def _server(self) -> tuple[str, str | None]:
        return self.bucket, self._endpoint

    def _rejects_wrong_checksums(self, key: str) -> bool:
        """One attempt: a server that refuses may call it a transient fault (BadDigest)."""
        wrong = self._object(key, b"bytes") | {"ContentMD5": _md5(b"other bytes")}
        try:
            self.client.put_object(**wrong)
        except Exception as error:
            if aws.status(error) == 400:
                return True
            raise aws.final(error, f"write {self.uri}/{key}") from error
        return False

    def _recorded(self, key: str) -> str | None:
        return str(((self._head(key) or {}).get("Metadata") or {}).get("sha256", ""))

    # -- requests

    def _client(self, stall_s: float) -> Any:
        with self._lock:
            if stall_s not in self._clients:
                self._clients[stall_s] = aws.make_client(self._endpoint, stall_s)
            return self._clients[stall_s]

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _request(self, verb: str, key: str, operation: str, **arguments: Any) -> Any:
        return self.retries.call(verb, key, lambda _: getattr(self.client, operation)(**arguments))

    def _head(self, key: str) -> dict[str, Any] | None:
        def attempt(_: float) -> dict[str, Any] | None:
            try:
                answer: dict[str, Any] = self.client.head_object(**self._at(key))
            except Exception as error:
                if aws.status(error) == 404:
                    return None
                raise
            return answer

        return self.retries.call("look up", key, attempt)

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

    # -- reading

    def _read(self, key: str, sha256: str | None, **extra: str) -> tuple[bytes, dict[str, Any]]:
        """(body, answer) of a GET. The first attempt is impatient: a stalled read is cheaper to repeat than to wait for."""
        stall_s = self.retries.stall_s
        stalls = itertools.chain([min(self._patience.seconds(), stall_s)], itertools.repeat(stall_s))
        return self.retries.call(
            "read", key, lambda deadline: self._get(key, deadline, next(stalls), sha256, **extra)
        )

    def _get(
        self, key: str, deadline: float, stall_s: float, sha256: str | None, **extra: str
    ) -> tuple[bytes, dict[str, Any]]:
        client, began = self._client(stall_s), time.monotonic()
        answer = client.get_object(**self._at(key), **extra)
        self._patience.learn(time.monotonic() - began)
        with contextlib.closing(answer["Body"]) as body:
            data = drain(body, int(answer["ContentLength"]), deadline - stall_s)
        recorded = None if "Range" in extra else answer.get("Metadata", {}).get("sha256")
        expected_digests = {digest for digest in (sha256, recorded) if digest}
        if expected_digests and {found := hashlib.sha256(data).hexdigest()} != expected_digests:
            raise Again(f"SHA-256 is {found[:16]}… instead of {min(expected_digests)[:16]}…")
        return data, answer

    def _fetch_verified(self, key: str, path: Path, sha256: str | None) -> None:
        """Download until the digest fits (the recorded one if none is given). Raises CorruptError."""
        wrong: set[str] = set()
        for _ in range(deadlines.ATTEMPTS):
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

    def _copy(self, key: str, path: Path) -> tuple[str | None, str]:
        """Download in ranges, each with its own deadline: (the SHA-256 recorded with the object, the one of what came).

        What came is hashed from memory, in order, while later ranges are on their way."""
        first, answer = self._first_part(key)
        size = int(answer.get("ContentRange", f"/{len(first)}").rpartition("/")[2])
        with _disk(path), open(path, "wb") as file, ThreadPoolExecutor(4) as pool:

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
        except EmptyError:
            return self._read(key, None)

    # -- writing

    def _object(self, key: str, data: bytes) -> dict[str, Any]:
        digest = {"sha256": hashlib.sha256(data).hexdigest()}
        return {**self._at(key), "Metadata": digest, "Body": data, "ContentMD5": _md5(data)}

    def _put(self, key: str, data: bytes, deadline: float, **extra: str) -> None:
        request = self._object(key, data) | {"Body": upload_body(data, deadline - self.retries.stall_s)}
        self.client.put_object(**request, **extra)

    def _put_parts(self, key: str, path: Path) -> None:
        digest = {"sha256": file_sha256(path)}
        made = self._request("write", key, "create_multipart_upload", **self._at(key), Metadata=digest)
        upload = {**self._at(key), "UploadId": made["UploadId"]}
        try:
            parts = []
            with open(path, "rb") as file:
                for number, data in enumerate(iter(lambda: file.read(PART_BYTES), b""), start=1):
                    put = functools.partial(self._put_part, upload, number, data)
                    parts.append({"PartNumber": number, "ETag": self.retries.call("write", key, put)})
            self._complete(key, upload, parts, digest["sha256"])
        except BaseException:
            with contextlib.suppress(Exception):
                self.client.abort_multipart_upload(**upload)
            raise

    def _put_part(self, upload: dict[str, Any], number: int, data: bytes, deadline: float) -> str:
        body = upload_body(data, deadline - self.retries.stall_s)
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
            if self._recorded(key) != sha256:
                raise


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # timeouts of the network are StorageErrors by now
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write {path}: {error.strerror}; free some disk space or move the cache"
        ) from error


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
