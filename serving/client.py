"""A small client for the detection service, with retries that are safe: judging a picture twice changes nothing."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from counterfake.errors import ConfigError, MediaError, ServiceError
from counterfake.media import sniff

RETRY_STATUS = (429, 502, 503, 504)


def detect(url: str, data: bytes | str | Path, *, timeout: float = 60.0, retries: int = 4) -> dict[str, Any]:
    """The verdict on a picture, given as bytes or as a path. MediaError if it is refused, ServiceError otherwise."""
    body = data if isinstance(data, bytes) else Path(data).read_bytes()
    kind = sniff(body)
    content_type = f"image/{kind}" if kind in ("jpeg", "png", "webp") else "application/octet-stream"
    request = urllib.request.Request(
        _endpoint(url, "v1/detect"), data=body, headers={"Content-Type": content_type}, method="POST"
    )
    return _send(request, timeout, retries)


def models(url: str, *, timeout: float = 10.0) -> dict[str, Any]:
    """What GET /v1/models says."""
    return _send(urllib.request.Request(_endpoint(url, "v1/models")), timeout, 0)


def _endpoint(url: str, path: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"url {url!r} is no address of a service; write http://host:port")
    return f"{url.rstrip('/')}/{path}"


def _send(request: urllib.request.Request, timeout: float, retries: int) -> dict[str, Any]:
    for attempt in range(retries + 1):
        wait = 0.2 * 2**attempt
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            if error.code not in RETRY_STATUS or attempt == retries:
                raise _refused(error) from None
            wait = max(wait, _seconds(error.headers.get("Retry-After")))
        except (ValueError, TypeError):
            raise ServiceError(
                f"{request.full_url} answered something that is no JSON object; is this the address of the service?"
            ) from None
        except (OSError, HTTPException) as error:
            if attempt == retries:
                reason = getattr(error, "reason", error)
                raise ServiceError(
                    f"no answer from {request.full_url} ({reason}); is it running? `counterfake serve` starts it"
                ) from error
        time.sleep(wait)
    raise AssertionError("unreachable")


def _seconds(retry_after: str | None) -> float:
    return min(float(retry_after), 60.0) if retry_after and retry_after.isdecimal() else 0.0  # else a date


def _refused(error: urllib.error.HTTPError) -> Exception:
    try:
        problem = json.load(error)
        reason, detail = problem["reason"], problem["detail"]
    except (ValueError, KeyError, TypeError):
        return ServiceError(
            f"{error.url} answered {error.code} {error.reason}, which is no answer of this service"
        )
    if error.code < 500 and reason in MediaError.REASONS:
        return MediaError(reason, detail)
    return ServiceError(f"{error.url} answered {error.code}: {detail}")
