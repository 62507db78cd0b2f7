"""ASGI middleware around every request: an id, security headers, counts and seconds, and the last catch for errors."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from counterfake.telemetry import Telemetry
from serving import problems

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[0-9A-Za-z-]{8,64}")  # of a proxy in front; anything else is not repeated
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Observe:
    """Wraps an ASGI application. No answer leaves without the headers above, and none carries a stack trace."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["counterfake.request_id"] = request_id
        method, scope["method"] = scope["method"], {"HEAD": "GET"}.get(scope["method"], scope["method"])
        answer: dict[str, Any] = {"status": 0}

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
                _add_headers(MutableHeaders(scope=message), "" if request_id == given else request_id)
            elif method == "HEAD":  # the headers of GET, nothing more
                message = {**message, "body": b""}
            await send(message)

        started = time.perf_counter()
        self._telemetry.add("counterfake_http_in_flight", 1)
        try:
            await self._app(scope, receive, observed_send)
        except Exception:
            logger.exception("request %s to %s failed", request_id, scope["path"])
            scope["counterfake.reason"] = "internal"
            if answer["status"]:
                raise
            detail = f"an error of ours, logged with the id {request_id}; the picture may be sent again"
            failed = problems.response(500, "internal", detail, request_id)
            await failed(scope, receive, observed_send)
        finally:
            self._telemetry.add("counterfake_http_in_flight", -1)
            self._count(scope, method, answer["status"], time.perf_counter() - started)

    def _count(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        route = getattr(
            scope.get("route"), "path", "other"
        )  # the template, so that a scan of addresses adds no series
        method = method if method in METHODS else "other"
        self._telemetry.count(
            "counterfake_http_requests_total", route=route, method=method, status=str(status)
        )
        self._telemetry.observe("counterfake_http_request_seconds", seconds, route=route)
        reason = scope.get("counterfake.reason")
        if reason and status >= 500:
            self._telemetry.count("counterfake_errors_total", reason=reason)
        elif reason:
            self._telemetry.count("counterfake_refusals_total", reason=reason)


def _add_headers(headers: MutableHeaders, request_id: str) -> None:
    """request_id: "" where the proxy in front gave the id and says it itself."""
    if request_id:
        headers["X-Request-Id"] = request_id
    for name, value in SECURITY_HEADERS.items():
        headers[name] = value
    headers.setdefault("Cache-Control", "no-store")
