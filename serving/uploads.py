"""The picture out of a request: raw body or multipart, counted while it streams, never more than the limit in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from counterfake.media import Limits
from serving.problems import ProblemError

ENVELOPE_BYTES = 64 * 1024  # of multipart boundaries and headers around the picture
HOW = "send the picture as the body with Content-Type: image/jpeg, image/png or image/webp, or as multipart field `file`"


async def read_picture(request: Request, limits: Limits, seconds: float) -> bytes:
    """The picture's bytes, not yet looked into. ProblemError 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    multipart = kind == "multipart/form-data"
    if not (multipart or kind.startswith("image/") or kind in ("", "application/octet-stream")):
        raise ProblemError(415, "unsupported", f"Content-Type {kind[:60]!r} is no picture; {HOW}")
    limit = limits.image_bytes + (ENVELOPE_BYTES if multipart else 0)
    try:
        body = await asyncio.wait_for(_read(request, limit), seconds)
    except TimeoutError:
        raise ProblemError(
            408, "too_slow", f"the body was not complete after {seconds:g} seconds; send it again"
        ) from None
    except ClientDisconnect:
        raise ProblemError(400, "empty", "the connection closed before the picture was complete") from None
    data = await _file_of(request, body) if multipart else body
    if not data:
        raise ProblemError(400, "empty", f"the request holds no picture; {HOW}")
    if len(data) > limits.image_bytes:
        raise _too_large(limits.image_bytes)
    return data


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


async def _file_of(request: Request, body: bytes) -> bytes:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, once(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise ProblemError(
            400, "malformed", f"the multipart body does not parse ({str(error)[:80]}); {HOW}"
        ) from None
    files = [value for value in form.values() if isinstance(value, UploadFile)]
    data = await files[0].read() if files else b""
    await form.close()
    return data


def _too_large(limit: int) -> ProblemError:
    return ProblemError(413, "too_large", f"the picture is larger than the limit of {limit:,} bytes")
