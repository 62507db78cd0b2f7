"""boto3: its clients, and what its errors mean. Nothing else imports it or botocore, and this only when it is used."""

from __future__ import annotations

import functools
import re
import urllib.parse
from typing import Any

from counterfake.errors import NotFoundError, StorageError
from counterfake.storage.store import EmptyError, UnsupportedError


def make_client(endpoint: str | None, stall_s: float) -> Any:
    """A client of S3 that makes one attempt per request and gives up a socket silent for `stall_s` seconds."""
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
    if not is_amazon(client.meta.endpoint_url):
        client = make(s3={"addressing_style": "path"})  # bucket.host needs a DNS entry for each bucket
    return client


def is_amazon(endpoint: str) -> bool:
    """The endpoint is Amazon's own, not a compatible server."""
    return (urllib.parse.urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def status(error: BaseException) -> int | None:
    """The HTTP status; None where the server did not answer."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    found: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return found


def reason(error: BaseException) -> str:
    """One short line."""
    text = _code(error) or str(error) or type(error).__name__
    return re.sub(r"\s+", " ", text)[:200]


_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "BadDigest", "InternalError", "ThrottlingException"}


def is_transient(error: Exception) -> bool:
    """Another attempt may work."""
    import botocore.exceptions as aws
    import urllib3.exceptions as http

    if isinstance(error, aws.ClientError):
        found = status(error) or 0
        return (found >= 500 and found != 501) or found in (408, 409, 429) or _code(error) in _TRANSIENT_CODES
    network = (aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError)
    return isinstance(error, (*network, http.HTTPError, ConnectionError, TimeoutError))


def final(error: Exception, what: str) -> StorageError:
    """The error to raise where no other attempt would help; `what` is "read s3://bucket/key"."""
    code, found = _code(error), status(error)
    if code == "NoSuchBucket":
        return NotFoundError(f"cannot {what}: the bucket does not exist; create it or correct the URI")
    if code in ("NoSuchKey", "404") or found == 404:
        return NotFoundError(f"{what.partition(' ')[2]} does not exist")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(
            f"cannot {what}: no credentials; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL for a store that is not Amazon's"
        )
    if found in (401, 403):
        return StorageError(
            f"cannot {what}: refused ({code or found}); check the credentials and the bucket policy"
        )
    if found == 416:
        return EmptyError(f"cannot {what}: the object ends before the range that was asked for")
    if found == 501 or code == "NotImplemented":
        return UnsupportedError(f"cannot {what}: the server does not implement it ({code})")
    return StorageError(f"cannot {what}: {reason(error)}; check the endpoint and the URI")


# -- private --------------------------------------------------------------------------------------------------------


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


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
