"""The demo around its stages: what a folder of one's own must hold, the port, the bar. The stages run in tests/cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from counterfake import media
from counterfake.ensemble import Ensemble
from counterfake.errors import ConfigError, DataError, ServiceError
from counterfake.records import Dataset, Sample, SplitRule, write_version
from counterfake.workspace import Workspace
from jobs import demo, tune_detector
from jobs.console import Console

MADE = {"made": {"licence": "CC0-1.0", "consent": "synthetic"}}


def own(workspace: Workspace, real: int, fake: int, fractions: dict[str, float]) -> Any:
    """What a stage sees of a walk over a folder of one's own with so many pictures."""
    noise = np.random.default_rng(0)
    rows = [
        Sample(
            image=media.encode(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8), "png"),
            source="made",
            fake=int(n >= real),
            maker="unknown" if n >= real else "camera",
        )
        for n in range(real + fake)
    ]
    write_version(
        workspace.dataset("demo-own"), rows, sources=MADE, splits=SplitRule(fractions=fractions, by="id")
    )
    return SimpleNamespace(workspace=workspace, data="demo-own")


def test_the_forty_pictures_of_each_kind_that_are_asked_for_are_enough(workspace: Workspace) -> None:
    walk = own(workspace, 40, 40, demo.OWN_SPLITS)
    counts = Dataset.open(workspace.dataset("demo-own")).version().counts
    found = {(row["split"], row["fake"]): row["rows"] for row in counts}
    assert found == {(s, fake): round(40 * f) for s, f in demo.OWN_SPLITS.items() for fake in (0, 1)}
    assert demo._alpha(walk) == pytest.approx(0.2)  # 1 / (0.4 * 10 + 1)


@pytest.mark.parametrize("rows", [6, 7, 10, 15, 22, 40, 90])
def test_the_ensemble_accepts_the_error_rate_chosen_for_a_small_folder(
    workspace: Workspace, rows: int
) -> None:
    alpha = demo._alpha(own(workspace, rows, rows, {"calibration": 1.0}))
    assert demo.ALPHA <= alpha <= 0.3
    fake = np.arange(2 * rows) % 2
    noise = np.random.default_rng(rows).normal(0, 0.2, (2 * rows, 2))
    made = Ensemble.fit(
        ["a", "b"], np.clip(0.5 + 0.3 * (fake[:, None] - 0.5) + noise, 0.01, 0.99), fake, alpha=alpha
    )
    assert made.alpha == alpha


def test_too_few_pictures_of_one_kind_are_named_with_how_many_are_needed(workspace: Workspace) -> None:
    with pytest.raises(DataError, match=r"5 pictures of one class .* put at least 40 real and 40 fake"):
        demo._alpha(own(workspace, 60, 5, {"calibration": 1.0}))


def test_a_folder_that_is_none_is_refused_before_the_port_is_looked_at(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"data=/nowhere is no folder; it must hold real/ and fake/"):
        demo.run(demo.DemoJob(data="/nowhere"), workspace)


def test_a_port_in_use_is_told_before_anything_is_made(workspace: Workspace) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} is in use.*--set port={port + 1}"):
            demo.run(demo.DemoJob(port=port), workspace)
    assert not workspace.home.exists()
    demo._require_free(port)  # free again


SERVER = """
import http.server, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
print("words", *sys.argv[1:], flush=True)
words = sys.argv
http.server.HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Ready).serve_forever()
"""


def kept(tmp_path: Path, port: int, python: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """(a walk that ends with KEEP=1, its events); `python` takes the place of the interpreter that serves."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{python}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(demo, "sys", SimpleNamespace(executable=str(interpreter)))
    events: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "event", events.append)
    walk = demo._Walk(demo.DemoJob(port=port, keep=True), Workspace.at(tmp_path / "runs"), console)
    walk.folder.mkdir(parents=True)
    return walk, events


def test_keep_leaves_a_service_that_outlives_the_demo_and_says_how_to_stop_it(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    walk, events = kept(
        tmp_path, free_port, f'exec "{sys.executable}" "{tmp_path}/server.py" "$@"', monkeypatch
    )
    assert demo._leave_running(walk) == f"http://127.0.0.1:{free_port}"
    stop = int(events[-1].partition("`kill ")[2].partition("`")[0])
    try:
        assert f"the page: http://127.0.0.1:{free_port}" in events[-1]
        assert demo._ready(walk.url)
        words = (walk.folder / "serve.log").read_text()
        assert (
            f"-m jobs serve --model ensemble@champion --port {free_port} --home {tmp_path / 'runs'}" in words
        )
    finally:
        os.kill(stop, signal.SIGTERM)
        os.waitpid(stop, 0)


def test_a_kept_service_that_does_not_come_up_names_its_log(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk, _ = kept(tmp_path, free_port, "exit 3", monkeypatch)
    with pytest.raises(ServiceError, match=r"did not come up; see .*serve\.log"):
        demo._leave_running(walk)


class Bars(Console):
    """A console that remembers its bars: [what, of how many, how far it came]."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.bars: list[list[Any]] = []

    @contextlib.contextmanager
    def progress(self, description: str, total: int | None, *, rate: str = "") -> Iterator[Any]:
        bar = [description, total, 0]
        self.bars.append(bar)

        def advance(count: int) -> None:
            bar[2] += count

        yield advance


def test_the_main_job_has_a_bar_over_its_stages(
    workspace: Workspace, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[str] = []
    monkeypatch.setattr(demo.session, "session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(demo._Walk, "take", lambda self, stage: walked.append(stage.__name__))
    monkeypatch.setattr(demo._Walk, "finish", lambda self: {})
    monkeypatch.setattr(demo, "_stop_serving", lambda: walked.append("stopped"))
    console = Bars()
    demo.run(demo.DemoJob(port=free_port), workspace, console=console)
    assert walked[-3:] == ["_served", "_metrics", "stopped"]
    assert console.bars == [["the main job", len(walked) - 1, len(walked) - 1]]


def test_a_search_has_a_bar_over_its_trials(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from counterfake.cluster import tune

    def search(*_: object, trials: int, on_progress: Any, **__: object) -> None:
        for number in range(trials - 1):
            on_progress(f"trial {number + 1}: done")
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(tune_detector, "both_classes", lambda *_: "")
    console = Bars()
    job = tune_detector.detector_demo()
    with pytest.raises(KeyboardInterrupt):
        tune_detector.run(job, workspace, console=console)
    assert console.bars == [["trials", job.trials, job.trials - 1]]
