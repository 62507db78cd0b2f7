"""Errors as `application/problem+json`: one shape for everything that is not an answer, with no inside of ours in it."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from counterfake.errors import MediaError
from serving.schemas import PROBLEM_JSON, STATUS_OF_REASON, TITLES, Problem


class ProblemError(Exception):
    """An answer that is a problem. `detail` is one line for the caller."""

    def __init__(self, status: int, reason: str, detail: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.reason, self.detail = status, reason, detail
        self.headers = {"Retry-After": str(retry_after_seconds)} if retry_after_seconds else {}


def response(
    status: int, reason: str, detail: str, request_id: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The problem as an HTTP answer."""
    problem = Problem(
        type=f"/docs#{reason}",
        title=TITLES.get(status, "The request was not understood"),
        status=status,
        detail=detail,
        reason=reason,
        request_id=request_id,
    )
    return JSONResponse(problem.model_dump(), status, headers, media_type=PROBLEM_JSON)


def install(app: FastAPI) -> None:
    """Every error that reaches `app` becomes a problem; the middleware catches what is left."""

    @app.exception_handler(ProblemError)
    async def _problem(request: Request, error: ProblemError) -> JSONResponse:
        return _answer(request, error.status, error.reason, error.detail, error.headers)

    @app.exception_handler(MediaError)
    async def _media(request: Request, error: MediaError) -> JSONResponse:
        return _answer(request, STATUS_OF_REASON.get(error.reason, 422), error.reason, str(error))

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _answer(request, 422, "invalid", f"{where}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        reason = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        detail = f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is"
        return _answer(request, error.status_code, reason, detail, dict(error.headers or {}))


def _answer(
    request: Request, status: int, reason: str, detail: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    request.scope["counterfake.reason"] = reason
    return response(status, reason, detail, request.scope.get("counterfake.request_id", ""), headers)
