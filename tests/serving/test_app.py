"""The whole service on a local Ray cluster: HTTP equals MLflow, bad input is a problem, @champion is followed live,
counters never fall. One cluster for the module; the tests build on each other in file order."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from counterfake import bundle as bundles
from counterfake import media, predictor
from counterfake.ensemble import Ensemble
from counterfake.errors import MediaError, ServiceError
from counterfake.forensics.benford import BenfordConfig, features_of
from counterfake.forensics.forest import BenfordForest, ForestConfig
from counterfake.gate import Gate
from counterfake.images import Preprocess
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.registry import Registry
from counterfake.workspace import Workspace
from serving import client
from serving.settings import Autoscale, Settings
from tests.serving.browser import Page, browser

pytestmark = [pytest.mark.serving, pytest.mark.timeout(420)]

DIGITS = BenfordConfig(qualities=(90,), bases=(10,))


def picture(seed: int, side: int = 96, format: str = "jpeg") -> bytes:
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(0, 255, (side // 4, side // 4, 3)), np.ones((4, 4, 1)))
    pixels = np.clip(coarse + rng.normal(0, 8, coarse.shape), 0, 255).astype(np.uint8)
    return media.encode(pixels, format)  # type: ignore[arg-type]


def net_bundle(folder: Path, seed: int, broken: bool = False) -> Path:
    torch.manual_seed(seed)
    config = MobileNetV2Config.tiny()
    net = config.build()
    for _ in range(4):  # batch statistics, so that eval mode is not the identity
        net(torch.rand(8, 3, 64, 64) * 2 - 1)
    state = {k: v * math.nan if broken and v.is_floating_point() else v for k, v in net.state_dict().items()}
    made = bundles.write_nets(
        folder, kind="detector", name="cnn", nets={"detector": (config, state)}, preprocess=Preprocess(size=64), provenance={},
    )  # fmt: skip
    return made.folder


def ensemble_bundle(folder: Path, seed: int, broken: bool = False, third: bool = False) -> Path:
    rows = features_of([media.decode(picture(i)) for i in range(12)], DIGITS)
    forest = BenfordForest.fit(rows, np.arange(12) % 2, ForestConfig(trees=5))
    digits = bundles.write(
        folder / "digits", kind="benford", name="digits", config={"benford": DIGITS}, tensors=forest.tensors(),
        preprocess=None, provenance={},
    )  # fmt: skip
    members = {"cnn": net_bundle(folder / "cnn", seed, broken), "digits": digits.folder}
    if third:
        members["second-cnn"] = net_bundle(folder / "second", seed + 100)
    rng, fake = np.random.default_rng(seed), np.arange(200) % 2
    p = np.clip(0.5 + 0.3 * (fake[:, None] - 0.5) + rng.normal(0, 0.2, (200, len(members))), 0.01, 0.99)
    made = bundles.write(
        folder / "both", kind="ensemble", name="ensemble", config={"ensemble": Ensemble.fit(list(members), p, fake).to_dict()},
        tensors={}, preprocess=None, members=members, provenance={"dataset": {"uri": "faces", "version": 6, "digest": "x"}},
        evaluation={name: {"value": 0.9, "low": 0.8, "high": 0.95} for name in ("auc", "recall_real")} | {"n": 200},
    )  # fmt: skip
    return made.folder


@dataclass
class Service:
    url: str
    workspace: Workspace
    registry: Registry
    folders: dict[int, Path]  # bundle by registered version

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=20) as answer:
            return bytes(answer.read())

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        families = text_string_to_metric_families(self.get("/metrics").decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}

    def live(self) -> int:
        return int(client.models(self.url)["models"][0]["version"])


def wait_for(fact: Callable[[], Any], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if fact():
            return
        time.sleep(0.2)
    pytest.fail(f"{what}: not within {seconds} s")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    import socket

    from counterfake.cluster import session
    from serving import app

    root = tmp_path_factory.mktemp("service")
    workspace = Workspace.at(root / "runs")
    registry = Registry.at(workspace)
    folders = {}
    for version in (1, 2, 3, 4):
        folders[version] = ensemble_bundle(
            root / f"v{version}", version, broken=version == 3, third=version == 4
        )
        assert registry.register(folders[version], "ensemble").version == version
    registry.promote("ensemble", 1, gate=Gate())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = Settings(
        port=port,
        poll_seconds=0.5,
        heartbeat_seconds=0.25,
        batch_wait_seconds=0.02,  # so that pictures meet in a batch however slow the machine is
        limits=media.Limits(image_bytes=2_000_000),
        gateway=Autoscale(
            min_replicas=2, max_replicas=2, max_queued_requests=-1, max_ongoing_requests=64, cpus=0.1
        ),
    )
    with session.session(cpus=4):
        url = app.start(settings, workspace)
        try:
            yield Service(url, workspace, registry, folders)
        finally:
            app.stop()


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_http_gives_the_probability_that_mlflow_gives(service: Service, format: str) -> None:
    import mlflow

    mlflow.set_tracking_uri(service.workspace.tracking_uri)
    model = mlflow.pyfunc.load_model("models:/ensemble@champion")
    data = picture(5, format=format)
    answer = client.detect(service.url, data)
    assert answer["probability_fake"] == pytest.approx(model.predict([data])[0], abs=1e-5)
    local = predictor.load(service.folders[1]).verdict(data)  # type: ignore[union-attr]
    for field in ("verdict", "reason", "error_rate", "provenance", "faces"):
        assert answer[field] == local[field], field
    assert answer["model"] == local["model"] | {"version": 1}
    for ours, theirs in zip(answer["detectors"], local["detectors"], strict=True):
        assert ours == theirs | {"probability": pytest.approx(theirs["probability"], abs=1e-5)}


def test_pictures_judged_together_get_the_answers_they_get_alone(service: Service) -> None:
    pictures = [picture(seed) for seed in range(24)]
    alone = predictor.load(service.folders[1]).predict_bytes(pictures)
    answers: dict[int, float] = {}

    def ask(index: int) -> None:
        answers[index] = client.detect(service.url, pictures[index])["probability_fake"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(24)] == pytest.approx(alone, abs=1e-5)

    def batched() -> bool:
        samples = service.samples()  # a detector reports once a heartbeat
        pictures, batches = (
            samples.get((f"counterfake_batch_size_{n}", (("detector", "cnn"),)), 0) for n in ("sum", "count")
        )
        return pictures >= 24 and pictures > batches

    wait_for(batched, 15, "24 pictures in fewer than 24 batches")


def test_the_small_picture_that_one_detector_refuses_is_judged_by_the_other(service: Service) -> None:
    answer = client.detect(service.url, picture(3, side=40))
    assert [(d["name"], d["reason"]) for d in answer["detectors"]] == [("cnn", None), ("digits", "too_small")]
    assert answer["probability_fake"] is not None


BAD = {
    "empty": (b"", "image/jpeg", 400, "empty"),
    "text": (b"no picture at all, only words", "image/jpeg", 415, "unsupported"),
    "declared text": (picture(1), "text/plain", 415, "unsupported"),
    "truncated": (picture(1)[:500], "image/jpeg", 422, "undecodable"),
    "tiny": (picture(1, side=8), "image/jpeg", 422, "too_small"),
    "bomb": (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + bytes(9),
        "image/png",
        422,
        "bomb",
    ),
    "huge": (picture(1) + bytes(2_000_000), "image/jpeg", 413, "too_large"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_problem_over_http(service: Service, name: str) -> None:
    body, kind, status, reason = BAD[name]
    request = urllib.request.Request(f"{service.url}/v1/detect", body, {"Content-Type": kind}, method="POST")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code == status
    assert caught.value.headers["content-type"] == "application/problem+json"
    assert json.load(caught.value)["reason"] == reason


def test_an_answer_has_one_id_and_head_works_through_the_proxy(service: Service) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        service.get("/nothing")
    assert caught.value.headers.get_all("x-request-id") == [json.load(caught.value)["request_id"]]
    asked = urllib.request.Request(f"{service.url}/healthz", method="HEAD")
    with urllib.request.urlopen(asked, timeout=20) as answer:
        assert (answer.status, answer.read()) == (200, b"")


def test_the_client_says_what_is_wrong(service: Service) -> None:
    with pytest.raises(MediaError, match="JPEG, PNG or WEBP"):
        client.detect(service.url, b"words")
    with pytest.raises(ServiceError, match="counterfake serve"):
        client.detect("http://127.0.0.1:9", picture(1), retries=0)


def test_page_docs_models_and_readiness(service: Service) -> None:
    assert b"Real or fake?" in service.get("/")
    assert b"openapi.json" in service.get("/docs")
    assert "/v1/detect" in json.loads(service.get("/openapi.json"))["paths"]
    assert json.loads(service.get("/readyz"))["model"] == "ensemble/1"
    model = client.models(service.url)["models"][0]
    assert model["digest"] == bundles.read(service.folders[1]).digest
    assert [m["name"] for m in model["members"]] == ["cnn", "digits"]
    assert model["evaluation"]["auc"]["value"] == 0.9


def test_a_port_in_use_is_one_clear_line(service: Service) -> None:
    """As the command says it, on a Ray of its own; a service that is there goes on."""
    port = urllib.parse.urlsplit(service.url).port
    assert port is not None
    words = [
        sys.executable,
        "-m",
        "jobs",
        "serve",
        "--port",
        str(port),
        "--home",
        str(service.workspace.home),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert re.search(rf"^error: port {port} .* --port {port + 1}$", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
    assert service.live() == 1


WORDS = {"real": "Real", "fake": "Fake", "uncertain": "Uncertain", "no_verdict": "No verdict"}


def test_the_page_shows_the_verdict_of_the_api_in_a_real_browser(service: Service, tmp_path: Path) -> None:
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("chromium is not installed; Debian: apt-get install chromium")
    chosen, dropped, words = (tmp_path / name for name in ("chosen.jpg", "dropped.png", "words.txt"))
    chosen.write_bytes(picture(5))
    dropped.write_bytes(picture(6, format="png"))
    words.write_text("no picture at all")
    with browser(binary, tmp_path / "profile") as page:
        page.open(f"{service.url}/")
        page.wait("document.getElementById('service').textContent.startsWith('Serving ensemble version 1')")
        page.choose("#file", chosen)
        assert_shown(page, chosen, client.detect(service.url, chosen))
        page.drop(dropped)
        assert_shown(page, dropped, client.detect(service.url, dropped))
        assert page.problems == []
        page.choose("#file", words)
        page.wait("!document.getElementById('problem').hidden")
        assert "not a picture" in page.ask("document.getElementById('problem-title').textContent")
        assert page.ask("document.getElementById('result').hidden")
        page.open(f"{service.url}/docs")
        page.wait("document.body.textContent.includes('probability_fake')")


def assert_shown(page: Page, file: Path, answer: dict[str, Any]) -> None:
    """The page has judged this file, and what can be read on it is the API's answer."""
    page.wait(
        f"document.getElementById('caption').textContent.startsWith({json.dumps(file.name)})"
        " && !document.getElementById('verdict').hidden"
    )
    assert page.ask("document.getElementById('word').innerText") == WORDS[answer["verdict"]]
    shown = page.ask("document.getElementById('probability').innerText").rstrip(" %")
    if shown[0] in "<>":  # "<0.1" and ">99.9": no picture is said to be sure
        assert abs(answer["probability_fake"] - 0.5) > 0.4989
        assert (shown == ">99.9") == (answer["probability_fake"] > 0.5)
    else:
        assert float(shown) == pytest.approx(100 * answer["probability_fake"], abs=0.051)
    told = json.loads(page.ask("document.getElementById('json').textContent"))
    assert told["probability_fake"] == pytest.approx(answer["probability_fake"], abs=1e-5)
    rows = page.ask(
        "[...document.querySelectorAll('#detectors .name')].map((one) => one.firstChild.textContent)"
    )
    assert rows == [detector["name"] for detector in answer["detectors"]]


INFRA = Path(__file__).resolve().parents[2] / "infra"


class Prometheus:
    """A real server that scrapes the service every second and knows our rules."""

    def __init__(self, binary: str, target: str, folder: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1/query"
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(INFRA / "prometheus" / "rules.yml")],
            "scrape_configs": [{"job_name": "counterfake", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(settings))
        arguments = [
            binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
        ]  # fmt: skip
        self.process = subprocess.Popen(arguments)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series that answer a query; none while the server is not up. An error of the query's own is raised."""
        try:
            with urllib.request.urlopen(
                f"{self.url}?{urllib.parse.urlencode({'query': query})}", timeout=5
            ) as answer:
                return list(json.load(answer)["data"]["result"])
        except urllib.error.HTTPError:
            raise
        except OSError:
            return []


def test_a_real_prometheus_scrapes_the_page_and_the_dashboard_finds_its_series(
    service: Service, tmp_path: Path, free_port: int
) -> None:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed; Debian: apt-get install prometheus")
    with contextlib.suppress(MediaError):
        client.detect(service.url, b"a refusal")
    client.detect(service.url, picture(9))
    panels = json.loads((INFRA / "grafana" / "dashboards" / "counterfake.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    ours = [query for query in queries if "ray_serve_" not in query]  # Ray's own are on another page
    page = service.get("/metrics").decode()
    with_samples = {name for name, _ in service.samples()}
    declared = set(re.findall(r"^# TYPE (\w+)", page, re.MULTILINE))
    with Prometheus(binary, urllib.parse.urlsplit(service.url).netloc, tmp_path, free_port) as prometheus:
        count = 'sum(counterfake_http_requests_total{route="/v1/detect",status="200"})'
        wait_for(lambda: prometheus.ask(count), 30, "Prometheus did not answer for the request counter")
        (found,) = prometheus.ask(count)
        assert float(found["value"][1]) >= 1
        wait_for(lambda: prometheus.ask("counterfake:latency_p99:rate5m"), 30, "the rules were not evaluated")
        answered = 0
        for query in ours:
            series = set(re.findall(r"counterfake_\w+", query))
            assert {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in series} <= {
                re.sub(r"_total$", "", name) for name in declared
            }, f"{query} names what the live page does not have"
            result = prometheus.ask(query)
            assert result or not series <= with_samples, f"{query} finds nothing though its series are there"
            answered += bool(result)
    assert answered >= 20


class Traffic:
    """Requests and scrapes without pause; what they saw."""

    def __init__(self, service: Service) -> None:
        self.service, self.stopped = service, threading.Event()
        self.digests: list[str] = []
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self.fallen: list[str] = []
        self.threads = [threading.Thread(target=self.post), threading.Thread(target=self.scrape)]

    def __enter__(self) -> Traffic:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def post(self) -> None:
        seed = 0
        while not self.stopped.is_set():
            seed += 1
            started = time.perf_counter()
            try:
                answer = client.detect(self.service.url, picture(seed % 20), retries=0)
                self.digests.append(answer["model"]["digest"])
                self.seconds.append(time.perf_counter() - started)
            except Exception as error:
                self.failures.append(repr(error))

    def scrape(self) -> None:
        before: dict[Any, float] = {}
        while not self.stopped.is_set():
            try:
                now = self.service.samples()
            except urllib.error.HTTPError as error:
                if error.code != 503:  # all of it or nothing
                    self.failures.append(repr(error))
                time.sleep(0.2)
                continue
            for key, value in before.items():
                if key[0].endswith(("_total", "_count", "_bucket", "_sum")) and now.get(key, -1.0) < value:
                    self.fallen.append(f"{key}: {value} -> {now.get(key)}")
            before = now
            time.sleep(0.1)


def test_moving_champion_is_followed_live_without_a_failed_request(service: Service) -> None:
    with Traffic(service) as traffic:
        time.sleep(1.0)
        moved = time.monotonic()
        service.registry.promote("ensemble", 2, gate=Gate())
        wait_for(lambda: service.live() == 2, 60, "version 2 is not live")
        seconds = time.monotonic() - moved
        time.sleep(1.0)
    assert traffic.failures == []
    assert traffic.fallen == []
    first, second = (bundles.read(service.folders[v]).digest for v in (1, 2))
    assert set(traffic.digests) == {first, second}
    data = picture(5)
    wait_for(lambda: client.detect(service.url, data)["model"]["digest"] == second, 5, "all gateways follow")
    expected = predictor.load(service.folders[2]).predict_bytes([data])[0]
    assert client.detect(service.url, data)["probability_fake"] == pytest.approx(expected, abs=1e-5)
    assert service.samples()["counterfake_model_swaps_total", (("outcome", "live"),)] == 1
    print(f"\nfollowed in {seconds:.1f} s; {len(traffic.seconds)} requests, p50 {1e3 * np.median(traffic.seconds):.0f} ms, "
          f"slowest {1e3 * max(traffic.seconds):.0f} ms")  # fmt: skip


def test_a_broken_champion_is_refused_and_the_live_one_goes_on(service: Service) -> None:
    with Traffic(service) as traffic:
        service.registry.promote("ensemble", 3, gate=Gate())
        wait_for(lambda: _refused(service), 60, "not refused")
    assert traffic.failures == []
    assert service.live() == 2
    following = client.models(service.url)["following"]
    assert "cnn" in following["detail"]
    assert following["candidate"] == bundles.read(service.folders[3]).digest
    assert service.samples()["counterfake_model_swaps_total", (("outcome", "refused"),)] == 1
    service.registry.rollback("ensemble")
    wait_for(lambda: client.models(service.url)["following"]["state"] == "live", 30, "back to live")


def _refused(service: Service) -> bool:
    """Whether both gateways know: each hears of it by its own heartbeat, and any of them may answer."""
    return all(client.models(service.url)["following"]["state"] == "refused" for _ in range(12))


def replicas(deployment: str) -> list[dict[str, str]]:
    """Name and namespace of each actor of a deployment."""
    import ray

    found = ray.util.list_named_actors(all_namespaces=True)
    return [entry for entry in found if f"#{deployment}#" in entry["name"]]


def kill(deployment: str) -> None:
    import ray

    names = replicas(deployment)
    assert names, f"no replica of {deployment}"
    ray.kill(ray.get_actor(names[0]["name"], names[0]["namespace"]))


def test_no_counter_falls_when_control_and_a_gateway_are_killed(service: Service) -> None:
    for seed in range(5):
        client.detect(service.url, picture(seed))
    before = service.samples()
    kill("control")
    kill("gateway")
    with Traffic(service) as traffic:
        for seed in range(10):
            client.detect(service.url, picture(seed))
        wait_for(lambda: _scrapes(service), 60, "metrics are not back")
        after = service.samples()
    assert traffic.fallen == []
    for key, value in before.items():
        if key[0].endswith("_total"):
            assert after.get(key, -1.0) >= value, key
    assert service.live() == 2


def _scrapes(service: Service) -> bool:
    try:
        service.samples()
    except urllib.error.HTTPError:
        return False
    return True


def test_an_ensemble_with_another_detector_gets_its_deployment_without_a_restart(service: Service) -> None:
    before = service.samples()
    stay = {name: replicas(name) for name in ("control", "detector-cnn", "detector-digits")}
    with Traffic(service) as traffic:
        service.registry.promote("ensemble", 4, gate=Gate())
        wait_for(lambda: service.live() == 4, 120, "version 4 is not live")
        time.sleep(1.0)
    assert traffic.failures == []
    assert traffic.fallen == []
    for name, before_it in stay.items():
        assert any(replica in before_it for replica in replicas(name)), f"{name} was replaced"
    data = picture(5)
    wait_for(lambda: client.detect(service.url, data)["model"]["version"] == 4, 20, "all gateways follow")
    answer = client.detect(service.url, data)
    assert [d["name"] for d in answer["detectors"]] == ["cnn", "digits", "second-cnn"]
    assert answer["probability_fake"] == pytest.approx(
        predictor.load(service.folders[4]).predict_bytes([data])[0], abs=1e-5
    )
    after = service.samples()
    assert all(after.get(key, -1.0) >= value for key, value in before.items() if key[0].endswith("_total"))
