"""The HTTP side: FastAPI over a `Backend`. Knows pictures, verdicts and problems; knows neither Ray nor MLflow."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from counterfake import config, media, provenance
from counterfake.errors import MediaError
from counterfake.telemetry import CONTENT_TYPE, Telemetry
from serving import problems, uploads
from serving.observe import Observe
from serving.problems import ProblemError
from serving.schemas import PROBLEM_JSON, Following, Model, Models, Problem, Verdict
from serving.settings import Settings
from serving.verdicts import Score, compose

logger = logging.getLogger(__name__)

ABOUT = "Says whether a picture is real or fake, how sure it is, and which model said so."
PAGE = Path(__file__).parent / "page"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


class Overloaded(Exception):
    """The detectors have more waiting than they may."""


class Unavailable(Exception):
    """The part that was asked cannot be reached now; asking again later makes sense."""


class Backend(Protocol):
    """What the gateway needs from the rest of the application."""

    def model(self) -> Model | None:
        """The ensemble that answers now; None until the first one is there."""

    def following(self) -> Following | None:
        """How the followed alias stands."""

    async def score(self, model: Model, data: bytes) -> Mapping[str, Score]:
        """Every member's opinion of one picture, all from that model. Overloaded, Unavailable or MediaError."""

    async def metrics(self) -> bytes:
        """The Prometheus page of the whole application. Unavailable rather than a part of it."""


def create_app(backend: Backend, settings: Settings, telemetry: Telemetry) -> FastAPI:
    """The application behind `/`. One per process."""
    app = FastAPI(title="counterfake", version="1", docs_url=None, redoc_url=None, description=ABOUT)
    app.add_middleware(Observe, telemetry=telemetry)
    problems.install(app)
    _add_detection(app, backend, settings, telemetry)
    _add_status(app, backend)
    _add_page(app)
    return app


# -- routes ---------------------------------------------------------------------------------------------------------

_PICTURE = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "image/jpeg": _PICTURE,
        "image/png": _PICTURE,
        "image/webp": _PICTURE,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary"}},
            }
        },
    },
}
_PROBLEM: dict[str, Any] = {"model": Problem, "content": {PROBLEM_JSON: {}}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {**_PROBLEM, "description": "No picture in the request."},
    408: {**_PROBLEM, "description": "The body did not arrive in time."},
    413: {**_PROBLEM, "description": "Larger than the limit."},
    415: {**_PROBLEM, "description": "Not a JPEG, PNG or WEBP."},
    422: {**_PROBLEM, "description": "Damaged, a decompression bomb, or too small."},
    503: {**_PROBLEM, "description": "No model yet, or too busy; see Retry-After."},
    504: {**_PROBLEM, "description": "The detectors took too long."},
}


def _add_detection(app: FastAPI, backend: Backend, settings: Settings, telemetry: Telemetry) -> None:
    pool = ThreadPoolExecutor(settings.decode_threads, "decode")

    @app.post(
        "/v1/detect",
        response_model=Verdict,
        response_description="The verdict, what each detector thought, and which model said so.",
        responses=_PROBLEMS,
        openapi_extra={"requestBody": _BODY},
    )
    async def detect(request: Request) -> Response:
        """Is this picture real or fake? Takes a JPEG, PNG or WEBP as raw body or as multipart field `file`."""
        started = time.perf_counter()
        data = await uploads.read_picture(request, settings.limits, settings.upload_seconds)
        model = backend.model()
        if model is None:
            raise ProblemError(503, "no_model", "no model is loaded yet; try again in a few seconds", 5)
        received = time.perf_counter()
        look = functools.partial(_look, data, settings.limits)
        origin = await asyncio.get_running_loop().run_in_executor(pool, look)
        decoded = time.perf_counter()
        scores = await _score(backend, model, data, settings.answer_seconds)
        finished = time.perf_counter()
        marks = {
            "receive": (started, received),
            "decode": (received, decoded),
            "detectors": (decoded, finished),
        }
        timings = {f"{name}_ms": 1e3 * (end - begin) for name, (begin, end) in marks.items()}
        timings["total_ms"] = 1e3 * (finished - started)
        verdict = compose(model, scores, origin, request.scope["counterfake.request_id"], timings)
        _record(telemetry, verdict, len(data))
        return JSONResponse(verdict.model_dump())


def _add_status(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/models", response_model=Models, response_description="What answers now.")
    async def models() -> Models:
        """The ensemble that answers now, its detectors and held-out figures, and how the followed alias stands."""
        model = backend.model()
        return Models(models=(model,) if model else (), following=backend.following())

    @app.get("/healthz", response_model=dict[str, str], response_description="It is alive.")
    async def healthz() -> dict[str, str]:
        """200 as long as this process answers."""
        return {"status": "ok"}

    @app.get(
        "/readyz",
        response_model=dict[str, str],
        response_description="Which model is loaded.",
        responses={503: _PROBLEMS[503]},
    )
    async def readyz() -> dict[str, str]:
        """200 once a model is loaded and pictures can be judged."""
        model = backend.model()
        if model is None:
            raise ProblemError(503, "no_model", "no model is loaded yet", 5)
        return {"status": "ready", "model": f"{model.name}/{model.version}", "digest": model.digest}

    @app.get(
        "/metrics",
        response_class=Response,
        response_description="Every metric, summed over all processes.",
        responses={503: _PROBLEMS[503]},
    )
    async def metrics() -> Response:
        """Prometheus text format 0.0.4, for the whole application."""
        try:
            return Response(await backend.metrics(), media_type=CONTENT_TYPE)
        except Unavailable as error:
            raise ProblemError(503, "metrics_unavailable", str(error), 5) from error


def _add_page(app: FastAPI) -> None:
    files = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in _MEDIA_TYPES}

    def answer(name: str) -> Response:
        if name not in files:
            raise ProblemError(404, "not_found", f"the page has no file {name[:60]!r}")
        tag = f'"{hashlib.sha256(files[name]).hexdigest()[:16]}"'
        headers = {"Cache-Control": "no-cache", "ETag": tag}
        return Response(files[name], media_type=_MEDIA_TYPES[Path(name).suffix], headers=headers)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return answer("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return answer("docs.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return answer("icon.svg")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return answer(name)


# -- private --------------------------------------------------------------------------------------------------------


def _look(data: bytes, limits: media.Limits) -> dict[str, Any]:
    """Full decode within the limits, so that detectors only ever see sound pictures; what the file says of its origin."""
    media.decode(data, limits)
    return config.to_dict(provenance.read(data))


async def _score(backend: Backend, model: Model, data: bytes, seconds: float) -> Mapping[str, Score]:
    try:
        return await asyncio.wait_for(backend.score(model, data), seconds)
    except MediaError:
        raise
    except Overloaded:
        raise ProblemError(
            503, "overloaded", "too many pictures are waiting; try again in a second", 1
        ) from None
    except TimeoutError:
        raise ProblemError(
            504,
            "timeout",
            f"the detectors did not answer within {seconds:g} seconds; send the picture again",
            2,
        ) from None
    except Unavailable as error:
        logger.warning("detectors unavailable: %s", error)
        raise ProblemError(
            503, "detectors_unavailable", "no detector can answer now; send the picture again", 2
        ) from None


def _record(telemetry: Telemetry, verdict: Verdict, size: int) -> None:
    telemetry.observe("counterfake_upload_bytes", size)
    telemetry.count("counterfake_verdicts_total", verdict=verdict.verdict)
    if verdict.probability_fake is not None:
        telemetry.observe("counterfake_ensemble_score", verdict.probability_fake)
    if verdict.verdict not in ("real", "fake"):
        telemetry.count("counterfake_abstentions_total", reason=verdict.reason or verdict.verdict)
