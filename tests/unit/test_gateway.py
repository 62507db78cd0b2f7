"""The HTTP side over a fake backend: every answer is a verdict or a problem, and nothing a caller sends is a 5xx."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from collections.abc import AsyncIterator, Mapping

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from counterfake import media
from counterfake.ensemble import Ensemble
from counterfake.errors import MediaError
from counterfake.media import Limits
from counterfake.telemetry import Telemetry, Totals
from serving.gateway import Overloaded, Unavailable, create_app
from serving.schemas import PROBLEM_JSON, STATUS_OF_REASON, Following, Member, Model, Verdict
from serving.settings import Settings
from serving.verdicts import Score

ENSEMBLE = Ensemble(
    members=("cnn", "benford"),
    temperatures=(1.5, 1.0),
    weights=(0.8, 0.4),
    bias=0.1,
    quantiles={"real": 0.6, "fake": 0.5},
    alpha=0.05,
    n={"real": 40, "fake": 40},
)
MODEL = Model(
    name="ensemble",
    alias="champion",
    version=3,
    digest="ab" * 32,
    uri="file:///bundles/ab",
    members=(
        Member(name="cnn", kind="detector", version="c" * 12, digest="c" * 64),
        Member(name="benford", kind="benford", version="b" * 12, digest="b" * 64),
    ),
    ensemble=ENSEMBLE.to_dict(),
)
SETTINGS = Settings(
    limits=Limits(image_bytes=200_000, pixels=1_000_000), upload_seconds=0.4, answer_seconds=0.5
)


class FakeBackend:
    """A backend that says what it is told to."""

    def __init__(self, probabilities: Mapping[str, float], model: Model | None = MODEL) -> None:
        self.telemetry = Telemetry()
        self.probabilities, self.served = probabilities, model
        self.error: Exception | None = None
        self.scores: Mapping[str, Score] | None = None
        self.seconds = 0.0

    def model(self) -> Model | None:
        return self.served

    def following(self) -> Following | None:
        return Following(reference="ensemble@champion", state="live")

    async def score(self, model: Model, data: bytes) -> Mapping[str, Score]:
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        if self.scores is not None:
            return self.scores
        return {name: Score(probability=value) for name, value in self.probabilities.items()}

    async def metrics(self) -> bytes:
        if isinstance(self.error, Unavailable):
            raise self.error
        totals = Totals()
        totals.add("gateway#1", 1, self.telemetry.snapshot(), now=0.0, role="gateway")
        return totals.render(now=0.0)


def picture(format: str = "jpeg", side: int = 64) -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return media.encode(pixels, format)  # type: ignore[arg-type]


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend({"cnn": 0.9, "benford": 0.7})


def call(
    backend: FakeBackend, method: str, path: str, settings: Settings = SETTINGS, **request: object
) -> httpx.Response:
    async def send() -> httpx.Response:
        app = create_app(backend, settings, backend.telemetry)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)  # type: ignore[arg-type]

    return asyncio.run(send())


def post(
    backend: FakeBackend, body: object, kind: str | None = "image/jpeg", **more: object
) -> httpx.Response:
    headers = {"Content-Type": kind} if kind else {}
    return call(backend, "POST", "/v1/detect", content=body, headers=headers, **more)


def assert_problem(response: httpx.Response, status: int, reason: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_JSON
    body = response.json()
    assert {"type", "title", "status", "detail", "reason", "request_id"} == set(body)
    assert (body["status"], body["reason"]) == (status, reason)
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("how", ["raw", "multipart", "octets", "wrong type"])
def test_a_picture_gets_the_verdict_of_the_ensemble(backend: FakeBackend, format: str, how: str) -> None:
    data = picture(format)
    if how == "multipart":
        response = call(backend, "POST", "/v1/detect", files={"file": ("p.bin", data, "image/gif")})
    else:
        kind = {"raw": f"image/{format}", "octets": "application/octet-stream", "wrong type": "image/gif"}[
            how
        ]
        response = post(backend, data, kind)
    assert response.status_code == 200, response.text
    verdict = Verdict.model_validate(response.json())
    assert verdict.probability_fake == pytest.approx(float(ENSEMBLE.probability([[0.9, 0.7]])[0]), abs=1e-12)
    assert verdict.verdict == ENSEMBLE.verdict(verdict.probability_fake)
    assert [d.name for d in verdict.detectors] == ["cnn", "benford"]
    assert [d.weight for d in verdict.detectors] == [0.8, 0.4]
    assert verdict.model.digest == MODEL.digest
    assert verdict.request_id == response.headers["x-request-id"]


def test_an_uncertain_picture_is_not_called_real_or_fake(backend: FakeBackend) -> None:
    backend.probabilities = {"cnn": 0.5, "benford": 0.5}
    answer = post(backend, picture()).json()
    assert answer["verdict"] == "uncertain"
    assert answer["error_rate"] == 0.05


def test_head_has_the_headers_of_get_and_no_body(backend: FakeBackend) -> None:
    for path in ("/", "/healthz", "/readyz", "/v1/models"):
        whole, head = call(backend, "GET", path), call(backend, "HEAD", path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-length"] == str(len(whole.content))
    assert call(backend, "HEAD", "/v1/detect").status_code == 405


def test_the_id_that_a_proxy_gave_is_taken_over_if_it_looks_like_one(backend: FakeBackend) -> None:
    for sent, taken in (("1f67b6d6-ea54-4f83", True), ("no <id>", False), ("x" * 65, False)):
        answer = call(backend, "GET", "/nothing", headers={"X-Request-Id": sent})
        assert (answer.json()["request_id"] == sent) == taken
        assert ("x-request-id" in answer.headers) != taken, "the proxy says it itself"


def test_no_verdict_says_why_instead_of_a_word() -> None:
    narrow = Ensemble(**{**ENSEMBLE.to_dict(), "quantiles": {"real": 0.1, "fake": 0.1}, "subsets": ()})
    backend = FakeBackend(
        {"cnn": 0.5, "benford": 0.5}, MODEL.model_copy(update={"ensemble": narrow.to_dict()})
    )
    answer = post(backend, picture()).json()
    assert (answer["verdict"], answer["reason"]) == ("no_verdict", "out_of_domain")


def test_a_detector_that_cannot_answer_is_left_out_and_none_is_no_verdict(backend: FakeBackend) -> None:
    alone = Ensemble(
        **{
            **ENSEMBLE.to_dict(),
            "members": ("benford",),
            "temperatures": (1.0,),
            "weights": (1.0,),
            "subsets": (),
        }
    )
    fits = {**ENSEMBLE.to_dict(), "subsets": [alone.to_dict()]}
    backend.served = MODEL.model_copy(update={"ensemble": fits})
    backend.scores = {"cnn": Score(probability=None, reason="no_face"), "benford": Score(probability=0.7)}
    answer = post(backend, picture()).json()
    assert answer["probability_fake"] == pytest.approx(float(alone.probability([[0.7]])[0]), abs=1e-12)
    assert [(d["probability"], d["weight"], d["reason"]) for d in answer["detectors"]] == [
        (None, 0.0, "no_face"),
        (0.7, 1.0, None),
    ]
    backend.scores = dict.fromkeys(("cnn", "benford"), Score(probability=None, reason="no_face"))
    answer = post(backend, picture()).json()
    assert (answer["verdict"], answer["reason"], answer["probability_fake"]) == (
        "no_verdict",
        "no_face",
        None,
    )


def test_an_ensemble_without_a_fit_for_fewer_gives_no_verdict_when_a_detector_breaks(
    backend: FakeBackend,
) -> None:
    backend.scores = {"cnn": Score(probability=None, reason="failed"), "benford": Score(probability=0.7)}
    answer = post(backend, picture()).json()
    assert (answer["verdict"], answer["reason"], answer["probability_fake"]) == ("no_verdict", "failed", None)


CASES = {
    "empty": (b"", "image/jpeg", 400, "empty"),
    "text": (b"hello, this is no picture" * 9, "image/jpeg", 415, "unsupported"),
    "declared text": (picture(), "text/plain", 415, "unsupported"),
    "form": (picture(), "application/x-www-form-urlencoded", 415, "unsupported"),
    "gif": (b"GIF89a" + bytes(64), "image/gif", 415, "unsupported"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 415, "unsupported"),
    "mp4": (b"\0\0\0\x18ftypisom" + bytes(99), "video/mp4", 415, "unsupported"),
    "truncated": (picture()[:600], "image/jpeg", 422, "undecodable"),
    "bomb": (png_claiming(50_000, 50_000), "image/png", 422, "bomb"),
    "cut png": (png_claiming(500, 500), "image/png", 422, "undecodable"),
    "tiny": (picture(side=8), "image/jpeg", 422, "too_small"),
    "huge": (picture() + bytes(300_000), "image/jpeg", 413, "too_large"),
    "bad multipart": (b"--x\r\nnothing", "multipart/form-data; boundary=y", 400, "malformed"),
    "no boundary": (b"--x\r\nnothing", "multipart/form-data", 400, "malformed"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_a_problem_that_says_what_is_wrong(backend: FakeBackend, name: str) -> None:
    body, kind, status, reason = CASES[name]
    assert_problem(post(backend, body, kind), status, reason)


def test_a_body_without_a_length_is_cut_off_at_the_limit(backend: FakeBackend) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 50_000
            yield bytes(50_000)

    assert_problem(post(backend, endless()), 413, "too_large")
    assert sent <= 200_000 + 1_048_576


def test_a_body_that_trickles_is_ended(backend: FakeBackend) -> None:
    async def slow() -> AsyncIterator[bytes]:
        while True:
            yield b"\xff"
            await asyncio.sleep(0.1)

    assert_problem(post(backend, slow()), 408, "too_slow")


def test_multipart_without_a_file_is_empty(backend: FakeBackend) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="note"\r\n\r\nhi\r\n--x--\r\n'
    assert_problem(post(backend, body, "multipart/form-data; boundary=x"), 400, "empty")


def test_a_file_over_the_limit_inside_multipart_is_too_large(backend: FakeBackend) -> None:
    files = {"file": ("p.jpg", bytes(200_001), "image/jpeg")}
    assert_problem(call(backend, "POST", "/v1/detect", files=files), 413, "too_large")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.sampled_from(["jpeg", "png", "webp", "none"]), st.integers(0, 900))
def test_mutilated_pictures_never_give_a_5xx(
    backend: FakeBackend, noise: bytes, format: str, at: int
) -> None:
    whole = picture(format, 32) if format != "none" else b""
    at = min(at, len(whole))
    response = post(backend, whole[:at] + noise + whole[at + len(noise) :], "application/octet-stream")
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert response.headers["content-type"] == PROBLEM_JSON


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Overloaded("cnn"), 503, "overloaded"),
        (Unavailable("cnn"), 503, "detectors_unavailable"),
        (MediaError("too_small", "the face is too small"), 422, "too_small"),
        (RuntimeError("secret inside"), 500, "internal"),
    ],
    ids=["overloaded", "unavailable", "refused by a detector", "bug"],
)
def test_what_goes_wrong_behind_the_gateway(
    backend: FakeBackend, error: Exception, status: int, reason: str
) -> None:
    backend.error = error
    response = post(backend, picture())
    assert_problem(response, status, reason)
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)


def test_slow_detectors_are_a_504(backend: FakeBackend) -> None:
    backend.seconds = 2.0
    assert_problem(post(backend, picture()), 504, "timeout")


def test_readiness_follows_the_model_and_health_does_not(backend: FakeBackend) -> None:
    assert call(backend, "GET", "/readyz").json()["digest"] == MODEL.digest
    backend.served = None
    assert_problem(call(backend, "GET", "/readyz"), 503, "no_model")
    assert_problem(post(backend, picture()), 503, "no_model")
    assert call(backend, "GET", "/healthz").json() == {"status": "ok"}
    assert call(backend, "GET", "/v1/models").json()["models"] == []


def test_models_names_the_ensemble_and_how_the_alias_stands(backend: FakeBackend) -> None:
    answer = call(backend, "GET", "/v1/models").json()
    assert answer["models"][0]["digest"] == MODEL.digest
    assert [member["name"] for member in answer["models"][0]["members"]] == ["cnn", "benford"]
    assert answer["following"]["state"] == "live"


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/page/page.js", "/nothing", "/v1/detect", "/healthz"]
)
def test_every_answer_carries_the_security_headers(backend: FakeBackend, path: str) -> None:
    response = call(backend, "GET", path)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert len(response.headers["x-request-id"]) == 32
    assert "access-control-allow-origin" not in response.headers
    if response.status_code >= 400:
        assert response.headers["content-type"] == PROBLEM_JSON


@pytest.mark.parametrize("name", ["../gateway.py", "..%2fgateway.py", "index.html.bak", "%00"])
def test_the_page_gives_out_its_own_files_only(backend: FakeBackend, name: str) -> None:
    assert call(backend, "GET", f"/page/{name}").status_code == 404


def test_pages_load_nothing_from_elsewhere_and_have_no_inline_code(backend: FakeBackend) -> None:
    for path in ("/", "/docs"):
        text = call(backend, "GET", path).text
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text
        assert "style=" not in text
        assert "<style" not in text
        assert " onclick" not in text
        assert "<script src=" in text


def test_requests_verdicts_and_refusals_are_counted_by_route_template(backend: FakeBackend) -> None:
    post(backend, picture())
    post(backend, b"")
    call(backend, "GET", "/some/address")
    call(backend, "GET", "/page/page.js")
    page = call(backend, "GET", "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (
            s.name,
            s.labels.get("route") or s.labels.get("reason") or s.labels.get("verdict") or "",
            s.labels.get("status", ""),
        ): s.value
        for family in text_string_to_metric_families(page.text)
        for s in family.samples
    }
    assert samples["counterfake_http_requests_total", "/v1/detect", "200"] == 1
    assert samples["counterfake_http_requests_total", "/v1/detect", "400"] == 1
    assert samples["counterfake_http_requests_total", "other", "404"] == 1
    assert samples["counterfake_http_requests_total", "/page/{name}", "200"] == 1
    assert samples["counterfake_refusals_total", "empty", ""] == 1
    assert sum(v for (name, _, _), v in samples.items() if name == "counterfake_verdicts_total") == 1
    assert samples["counterfake_http_request_seconds_count", "/v1/detect", ""] == 2


def test_metrics_are_all_there_or_a_503(backend: FakeBackend) -> None:
    backend.error = Unavailable("the collector is restarting")
    assert_problem(call(backend, "GET", "/metrics"), 503, "metrics_unavailable")


def test_every_reason_a_picture_is_refused_for_has_its_status() -> None:
    assert set(STATUS_OF_REASON) == set(MediaError.REASONS)
    assert all(400 <= status < 500 for status in STATUS_OF_REASON.values())


def test_the_openapi_document_describes_both_ways_to_send_a_picture(backend: FakeBackend) -> None:
    spec = call(backend, "GET", "/openapi.json").json()
    content = spec["paths"]["/v1/detect"]["post"]["requestBody"]["content"]
    assert {"image/jpeg", "image/png", "image/webp", "multipart/form-data"} == set(content)
    assert {"Verdict", "Problem"} <= set(spec["components"]["schemas"])


def test_provenance_in_the_file_is_passed_on(backend: FakeBackend) -> None:
    provenance = pytest.importorskip("counterfake.provenance")
    marked = provenance.mark(picture("png"), maker="dcgan-faces@7")
    answer = post(backend, marked, "image/png").json()
    assert answer["provenance"]["maker"] == "dcgan-faces@7"
    assert not post(backend, picture("png"), "image/png").json()["provenance"]["maker"]


def test_pictures_are_not_read_into_the_log(backend: FakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    backend.error = RuntimeError("boom")
    post(backend, io.BytesIO(picture()).read())
    assert len(caplog.text) < 50_000
