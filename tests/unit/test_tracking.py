"""Runs in a real SQLite-backed MLflow, and in a server that comes and goes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from counterfake import provenance
from counterfake.errors import TrackingError
from counterfake.outbox import Outbox
from counterfake.tracking import Tracker


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def tracker(home: Path) -> Tracker:
    return Tracker(f"sqlite:///{home}/mlflow.db", (home / "artifacts").as_uri())


def test_a_run_holds_what_it_was_given(tracker: Tracker, home: Path) -> None:
    report = home / "report.txt"
    report.write_text("all well")
    run = tracker.start(
        "gan",
        "dcgan-faces",
        params={"learner": {"g_lr": 2e-4, "betas": [0.5, 0.999]}},
        tags={"commit": "abc"},
    )
    for step in range(30):
        run.metrics({"g_loss": step / 2, "d_loss@real": 1.0}, step)
    run.picture("grid", b"\x89PNG\r\n\x1a\n", step=20)
    run.picture("roc", b"\x89PNG\r\n\x1a\n")
    run.picture("made", np.zeros((20, 20, 3), np.uint8), maker="dcgan-faces")
    run.json("plan.json", {"a": 1})
    run.file(report)
    report.unlink()
    run.dataset("file:///data/faces@3", 3, "d" * 64, "training")
    run.finish()
    seen = tracker.read(run.id)
    assert seen["status"] == "FINISHED"
    assert seen["params"] == {"learner.g_lr": "0.0002", "learner.betas": "[0.5, 0.999]"}
    assert seen["metrics"] == {"g_loss": 14.5, "d_loss_real": 1.0}
    assert seen["tags"]["commit"] == "abc"
    assert seen["tags"]["dataset.training"] == "file:///data/faces@3"
    assert seen["datasets"] == [{"name": "faces@3", "digest": "d" * 36, "context": "training"}]
    assert tracker.history(run.id, "g_loss") == [(step, step / 2) for step in range(30)]
    assert tracker.files(run.id) == [
        "pictures/made.png",
        "pictures/roc.png",
        "plan.json",
        "previews/grid/00000020.png",
        "report.txt",
    ]
    assert tracker.load(run.id, "report.txt") == b"all well"
    mark = provenance.read(tracker.load(run.id, "pictures/made.png"))
    assert (mark.maker, mark.claims_synthetic) == ("dcgan-faces", True)
    assert seen["artifact_uri"].startswith((home / "artifacts" / "gan").as_uri())


def test_a_resumed_run_goes_on_under_its_id_and_parent(tracker: Tracker) -> None:
    parent = tracker.start("detector", "search")
    child = tracker.start("detector", "trial", parent=parent.id, params={"lr": 1})
    child.metrics({"loss": 2.0}, 1)
    child.close()
    again = tracker.resume(child.id)
    again.params({"lr": 1})
    again.metrics({"loss": 2.0}, 1)
    again.metrics({"loss": 1.0}, 2)
    again.finish()
    parent.finish()
    assert tracker.history(child.id, "loss") == [(1, 2.0), (2, 1.0)]
    assert tracker.find("detector", {"mlflow.parentRunId": parent.id}) == [child.id]


def test_long_values_are_cut_and_two_long_values_stay_two(tracker: Tracker) -> None:
    run = tracker.start("gan", "long")
    run.params({"a" * 300: "x" * 9000, "a" * 299 + "b": "x" * 8999 + "y"})
    run.finish()
    params = tracker.read(run.id)["params"]
    assert len(params) == 2
    assert all(len(key) <= 250 and len(value) == 6000 for key, value in params.items())
    assert len(set(params.values())) == 2


def test_a_param_that_changed_is_told_at_the_end_and_loses_nothing_else(tracker: Tracker) -> None:
    run = tracker.start("gan", "changed", params={"lr": 1})
    run.params({"lr": 2})
    run.metrics({"loss": 1.0}, 1)
    with pytest.raises(TrackingError, match="not stored: 1 params"):
        run.finish()
    assert tracker.read(run.id)["metrics"] == {"loss": 1.0}
    assert tracker.read(run.id)["status"] == "FINISHED"


def test_an_exception_marks_the_run_failed(tracker: Tracker) -> None:
    with pytest.raises(ZeroDivisionError), tracker.start("gan", "fails") as run:
        1 / 0  # noqa: B018
    seen = tracker.read(run.id)
    assert seen["status"] == "FAILED"
    assert seen["tags"]["error"] == "ZeroDivisionError: division by zero"


def test_a_run_that_is_stopped_from_outside_has_not_failed(tracker: Tracker) -> None:
    with pytest.raises(SystemExit), tracker.start("gan", "stopped") as run:
        raise SystemExit(0)
    assert tracker.read(run.id)["status"] == "KILLED"


def test_an_experiment_is_created_once_by_many_callers(tracker: Tracker) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: tracker.experiment("crowd"), range(8)))
    assert len(ids) == 1


@pytest.mark.slow
def test_several_processes_may_meet_a_fresh_database(tmp_path: Path) -> None:
    code = (
        "import sys; from counterfake.tracking import Tracker\n"
        "run = Tracker(sys.argv[1]).start('gan', 'race'); run.metrics({'a': 1}, 1); run.finish()"
    )
    uri = f"sqlite:///{tmp_path}/fresh/mlflow.db"
    crowd = [
        subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, cwd=tmp_path)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in crowd]
    assert [process.returncode for process in crowd] == [0, 0, 0]
    assert outputs == [b"", b"", b""]  # nothing on standard output
    assert len(Tracker(uri).find("gan", {"mlflow.runName": "race"})) == 3


def test_an_unreachable_server_is_one_line_soon(free_port: int) -> None:
    started = time.monotonic()
    with pytest.raises(
        TrackingError, match=rf"127.0.0.1:{free_port} does not answer.*mlflow server"
    ) as caught:
        Tracker(f"http://127.0.0.1:{free_port}").start("gan", "x")
    assert time.monotonic() - started < 30  # three seconds: MLflow's own retries are cut off
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"], ids=["path", "file"])
def test_a_plain_folder_is_refused_with_what_to_use(uri: str) -> None:
    with pytest.raises(TrackingError, match="sqlite:////absolute"):
        Tracker(uri).experiment("gan")


def test_a_database_in_an_impossible_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="cannot be made"):
        Tracker(f"sqlite:///{tmp_path}/file/mlflow.db").experiment("gan")


class _Server(BaseHTTPRequestHandler):
    """As much of MLflow's REST API as log_batch needs."""

    batches: list[bytes]

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.batches.append(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer()

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        pass


def test_training_never_waits_for_an_absent_server_and_everything_arrives_later(free_port: int) -> None:
    run = Tracker(f"http://127.0.0.1:{free_port}").resume("0" * 32)
    slowest = 0.0
    for step in range(2000):
        started = time.monotonic()
        run.metrics({"loss": float(step)}, step)
        slowest = max(slowest, time.monotonic() - started)
    assert slowest < 0.5  # a busy machine may pause any thread, a connection attempt takes seconds
    with pytest.raises(TrackingError, match=r"metric points.* did not arrive within 1 s"):
        run.flush(seconds=1.0)
    _Server.batches = []
    server = HTTPServer(("127.0.0.1", free_port), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run.finish(seconds=30)
    server.shutdown()
    server.server_close()
    assert sum(batch.count(b'"loss"') for batch in _Server.batches) == 2000
    assert len(_Server.batches) < 20  # points travel together


def test_a_full_buffer_drops_the_newest_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterfake.outbox.MAX_ITEMS", 3)
    gate, sent = threading.Event(), []
    outbox = Outbox("run x", permanent=lambda error: False)
    outbox.put(gate.wait, "first")
    for i in range(5):
        outbox.put(lambda i=i: sent.append(i), f"thing {i}")
    gate.set()
    with pytest.raises(TrackingError, match=r"not stored: thing 2 \(the buffer was full\), thing 3"):
        outbox.flush(10)
    assert sent == [0, 1]
    outbox.close()


def test_what_is_sent_keeps_its_order_across_failures() -> None:
    sent: list[int] = []
    failures = iter([True, False, True, True, False, False])

    def send(i: int) -> None:
        if next(failures, False):
            raise ConnectionError("away")
        sent.append(i)

    outbox = Outbox("run x", permanent=lambda error: False)
    for i in range(4):
        outbox.put(lambda i=i: send(i), f"thing {i}")
    outbox.flush(20)
    assert sent == [0, 1, 2, 3]
    outbox.close()
