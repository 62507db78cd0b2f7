"""`fit` on two real Ray Train workers and in this process: resuming, killing, refusing."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterfake import bundle
from counterfake.cluster import session, train
from counterfake.cluster.train import TrainResult, fit
from counterfake.config import override
from counterfake.data import DataConfig
from counterfake.errors import ClusterError, ConfigError, NonFiniteError, NotFoundError, TrackingError
from counterfake.images import Preprocess
from counterfake.learners.gan import GanConfig
from counterfake.loop import LoopConfig, Tick, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.records import Sample, SplitRule, write_version
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace

pytestmark = pytest.mark.cluster

STEPS, TICK = 50, 5


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with 96 pictures of 28 x 28 raw pixels."""
    workspace = Workspace.at(tmp_path_factory.mktemp("runs"))
    rng = np.random.default_rng(0)
    rows = (
        Sample(
            pixels=rng.integers(0, 256, (28, 28, 1), dtype=np.uint8),
            source="noise",
            split="train",
            path=str(i),
        )
        for i in range(96)
    )
    sources = {"noise": {"licence": "CC0-1.0", "consent": "synthetic"}}
    write_version(workspace.dataset("noise"), rows, sources=sources, splits=SplitRule(), rows_per_batch=8)
    return workspace


def job(name: str, **changes: Any) -> TrainJob:
    learner = GanConfig(generator=DcganGenerator.tiny(), discriminator=DcganDiscriminator.tiny())
    settings: dict[str, Any] = {
        "name": name,
        "task": "gan",
        "data": DataConfig(uri="noise", batch_size=16, preprocess=Preprocess(size=28, channels=1), threads=1),
        "learner": learner,
        "loop": LoopConfig(steps=STEPS, tick_steps=TICK, threads=1),
        "cpus_per_worker": 0.5,
    }
    return TrainJob(**{**settings, **changes})


def ray_workers() -> list[int]:
    """Process ids of the living Ray Train workers."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    return [a.pid for a in actors if "TrainWorker" in a.class_name]


def kill_one_worker_after(step: int, killed: list[int], seen: set[int]) -> Callable[[Tick], None]:
    """kill -9 of one of the workers, once, when a tick at `step` or later comes; `seen` collects all their ids."""

    def on_progress(tick: Tick) -> None:
        workers = ray_workers()
        seen.update(workers)
        if tick.step >= step and not killed:
            killed.append(max(workers))
            os.kill(killed[0], signal.SIGKILL)

    return on_progress


@pytest.fixture(scope="module")
def undisturbed(ray_local: object, shared: Workspace) -> TrainResult:
    return fit(job("twins", workers=2), shared)


def test_a_killed_worker_changes_no_bit_of_the_result(
    undisturbed: TrainResult, shared: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", session.current().dashboard)  # other clusters may run here
    killed: list[int] = []
    seen: set[int] = set()
    twin = job("twins", workers=2, notes="killed")
    elsewhere = dataclasses.replace(shared, storage=tmp_path.as_uri())
    disturbed = fit(
        override(twin, {"data.uri": shared.dataset("noise")}),
        elsewhere,
        on_progress=kill_one_worker_after(2 * TICK, killed, seen),
    )
    assert len(killed) == 1
    assert len(seen) >= 3  # the killed one was replaced in the middle of the run
    assert disturbed.weights_digest == undisturbed.weights_digest
    assert disturbed.metrics == undisturbed.metrics
    assert (disturbed.steps, disturbed.images) == (STEPS, STEPS * 16)
    assert disturbed.run_id != undisturbed.run_id


def test_the_run_is_one_mlflow_run_with_its_figures(undisturbed: TrainResult, shared: Workspace) -> None:
    tracker = Tracker.at(shared)
    found = tracker.read(undisturbed.run_id)
    assert found["status"] == "FINISHED"
    assert found["params"]["loop.steps"] == str(STEPS)
    assert found["metrics"].keys() >= {"d_loss", "g_loss", "images_per_second", "epoch"}
    assert [step for step, _ in tracker.history(undisturbed.run_id, "d_loss")] == list(
        range(TICK, STEPS + 1, TICK)
    )
    assert found["datasets"][0]["context"] == "training"
    assert f"previews/samples/{STEPS:08d}.png" in tracker.files(undisturbed.run_id, "previews")


def test_a_finished_job_returns_its_old_result(undisturbed: TrainResult, shared: Workspace) -> None:
    again = fit(job("twins", workers=2, notes="another note"), shared)
    assert again.reused
    assert dataclasses.replace(again, reused=False) == undisturbed


def test_the_bundle_holds_the_generator(undisturbed: TrainResult) -> None:
    assert undisturbed.bundle is not None
    found = bundle.read(undisturbed.bundle)
    assert found.kind == "generator"
    assert found.info["dataset"]["version"] == 1
    assert found.info["run_id"] == undisturbed.run_id
    assert set(bundle.load_nets(found)) == {"generator"}


def test_one_worker_sees_the_same_batches_as_two(undisturbed: TrainResult, shared: Workspace) -> None:
    """Not the same bits (noise is each rank's own), but the same rows and about the same losses."""
    alone = fit(job("alone"), shared)
    assert alone.images == undisturbed.images
    for name in ("d_loss", "g_loss"):
        assert alone.metrics[name] == pytest.approx(undisturbed.metrics[name], rel=0.2)


def test_more_cpus_than_there_are_is_refused_at_once(ray_local: object, shared: Workspace) -> None:
    started = time.perf_counter()
    with pytest.raises(ClusterError, match="2 workers with 64 CPUs each need 128 CPUs but the cluster has 2"):
        fit(job("greedy", workers=2, cpus_per_worker=64.0), shared)
    assert time.perf_counter() - started < 30  # before any worker is placed


def test_a_worker_larger_than_every_node_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from counterfake.cluster import group

    two = session.Cluster(address="", dashboard="", cpus=4.0, gpus=0.0, nodes=2)
    monkeypatch.setattr(session, "current", lambda: two)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2)
    group._check_resources(job("fits", workers=2, cpus_per_worker=2.0))
    with pytest.raises(ClusterError, match="the 2 nodes have room for 0"):
        group._check_resources(job("wide", workers=1, cpus_per_worker=3.0))


class Gone(BaseException):
    """Stands for the power cut."""


def test_without_workers_a_killed_run_goes_on_where_it_was(shared: Workspace) -> None:
    def cut(tick: Tick) -> None:
        if tick.step == 2 * TICK:
            raise Gone

    settings = job("here", loop=LoopConfig(steps=STEPS, tick_steps=TICK, seed=5, threads=1))
    whole = fit(dataclasses.replace(settings, name="whole"), shared)
    with pytest.raises(Gone):
        fit(settings, shared, on_progress=cut)
    seen: list[int] = []
    resumed = fit(settings, shared, on_progress=lambda tick: seen.append(tick.step))
    assert seen[0] == 3 * TICK
    assert resumed.weights_digest == whole.weights_digest
    history = Tracker.at(shared).history(resumed.run_id, "d_loss")
    assert [step for step, _ in history] == list(range(TICK, STEPS + 1, TICK))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("written", [False, True], ids=["no-result-yet", "result-written"])
def test_a_run_cut_off_at_its_very_end_is_ended_by_the_next_fit(
    request: pytest.FixtureRequest, shared: Workspace, workers: int, written: bool
) -> None:
    if workers:
        request.getfixturevalue("ray_local")
    loop = LoopConfig(steps=TICK, tick_steps=TICK, threads=1)
    settings = job(f"cut-{workers}-{written}", workers=workers, loop=loop)

    def cut(*_: Any, **__: Any) -> None:
        raise Gone

    training = "run_on_ray" if workers else "run_here"
    train_all = getattr(train, training)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Gone):
        patch.setattr(Run, "finish", cut)  # whoever is killed tells MLflow nothing
        if not written:
            patch.setattr(train, training, lambda *order: cut(train_all(*order)))
        fit(settings, shared)
    tracker = Tracker.at(shared)
    [run_id] = tracker.find("gan", {"mlflow.runName": settings.name})
    assert tracker.read(run_id)["status"] == "RUNNING"
    result = fit(settings, shared)
    assert (result.run_id, result.steps, result.reused) == (run_id, TICK, written)
    assert tracker.read(run_id)["status"] == "FINISHED"
    assert "result.json" in tracker.files(run_id)
    assert tracker.find("gan", {"mlflow.runName": settings.name}) == [run_id]


def test_a_finished_result_needs_no_mlflow(shared: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = job("offline", loop=LoopConfig(steps=TICK, tick_steps=TICK, threads=1))
    result = fit(settings, shared)
    elsewhere = dataclasses.replace(shared, tracking_uri="http://127.0.0.1:1")
    assert fit(settings, elsewhere) == dataclasses.replace(result, reused=True)

    def away(*_: Any) -> None:
        raise TrackingError("MLflow does not answer")

    monkeypatch.setattr(Tracker, "read", away)
    assert fit(settings, shared) == dataclasses.replace(result, reused=True)


def test_only_the_newest_checkpoints_are_kept(shared: Workspace) -> None:
    result = fit(job("kept"), shared)
    folder = Path(result.checkpoint.removeprefix("file://"))
    assert sorted(p.parent.name for p in folder.parent.glob("*/state.json")) == [
        f"step-{STEPS - TICK:08d}",
        f"step-{STEPS:08d}",
    ]


def test_a_diverging_run_fails_in_mlflow_with_its_reason(shared: Workspace) -> None:
    wild = GanConfig(
        generator=DcganGenerator.tiny(), discriminator=DcganDiscriminator.tiny(), d_lr=1e38, loss="lsgan"
    )
    with pytest.raises(NonFiniteError, match="became NaN or infinite at step"):
        fit(job("wild", learner=wild), shared)
    tracker = Tracker.at(shared)
    newest = tracker.find("gan", {"mlflow.runName": "wild"})[0]
    assert tracker.read(newest)["status"] == "FAILED"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": DataConfig(uri="", batch_size=16)}, ConfigError, "data.uri is not set"),
        ({"data": DataConfig(uri="nothing", batch_size=16)}, NotFoundError, "nothing"),
        ({"data": DataConfig(uri="noise@7", batch_size=16)}, NotFoundError, "7"),
        (
            {"data": DataConfig(uri="noise", batch_size=18), "workers": 9},
            ConfigError,
            "cannot be shared by 9 workers",
        ),
    ],
    ids=["no-uri", "no-dataset", "no-version", "lanes"],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    shared: Workspace, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(job("refused", **changes), shared)
    assert not list((shared.home / "training").glob("refused-*"))


def test_a_job_is_named_by_what_it_does() -> None:
    from counterfake.cluster.train import run_name

    data = {"training": {"digest": "d"}}
    first = run_name(job("n"), data)
    assert first == run_name(job("n", notes="x", register_as="y"), data)
    assert first != run_name(job("n", cpus_per_worker=1.0), data)
    assert first != run_name(job("n"), {"training": {"digest": "e"}})


def test_a_run_without_workers_does_not_load_ray(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, counterfake.cluster.train; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
