"""The search on a real local cluster: tiny nets, tiny pictures, real Optuna, ASHA and MLflow."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from counterfake import config, media
from counterfake.cluster.budget import Budget
from counterfake.cluster.findings import Trial, winner
from counterfake.cluster.space import SearchSpace
from counterfake.cluster.trials import _scheduler
from counterfake.cluster.tune import search
from counterfake.data import DataConfig
from counterfake.errors import ClusterError, ConfigError
from counterfake.images import Preprocess
from counterfake.learners.detector import DetectorConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.records import Sample, write_version
from counterfake.storage import open_store
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace

pytestmark = pytest.mark.cluster

SPACE = SearchSpace(
    settings={"learner.lr": {"log": [1e-4, 1e-2]}, "learner.label_smoothing": {"choice": [0.0, 0.1]}}
)

LAGGING = SearchSpace(settings={"learner.lr": {"choice": [1e-9, 3e-3, 1e-2]}})  # at 1e-9 nothing is learned


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with 160 pictures of noise; the fakes are brighter."""
    space = Workspace.at(tmp_path_factory.mktemp("tune") / "runs")
    rng = np.random.default_rng(0)

    def samples():
        for i in range(160):
            pixels = rng.integers(0, 180, (32, 32, 3), dtype=np.uint8) + np.uint8(60 * (i % 2))
            yield Sample(image=media.encode(pixels, "png"), fake=i % 2, source="noise", path=str(i))

    write_version(
        space.dataset("noise"), samples(), sources={"noise": {"licence": "CC0-1.0", "consent": "synthetic"}}
    )
    return space


def job(name: str, steps: int = 8, workers: int = 0) -> TrainJob:
    preprocess = Preprocess(size=32)
    return TrainJob(
        name=name,
        task="detector",
        data=DataConfig(uri="noise", batch_size=16, preprocess=preprocess, threads=1),
        validation=DataConfig(
            uri="noise", split="validation", batch_size=16, preprocess=preprocess, threads=1
        ),
        learner=DetectorConfig(net=MobileNetV2Config.tiny()),
        loop=LoopConfig(steps=steps, tick_steps=2, preview_every_ticks=0),
        workers=workers,
    )


def test_a_search_finds_records_and_returns_the_best(
    ray_local: object, prepared: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    result = search(job("tiny"), SPACE, prepared, trials=3, on_progress=said.append)
    assert len(result.trials) == 3
    assert {t.state for t in result.trials} <= {"finished", "stopped early"}
    assert result.concurrent == 2  # two CPUs, one for each trial
    finished = [t.value for t in result.trials if t.state == "finished" and t.value is not None]
    assert result.best.value == max(finished)  # one stopped early may have been better when it was stopped
    assert len(said) == 3
    assert capfd.readouterr().out == ""  # standard output belongs to results
    assert result.best.state == "finished"
    assert result.best.steps == 8
    best = config.override(job("again"), config.load_file(result.settings_file))
    assert best.learner.lr == result.best.settings["learner.lr"]  # type: ignore[attr-defined]
    tracker = Tracker.at(prepared)
    children = [tracker.read(r) for r in tracker.find("detector", {"mlflow.parentRunId": result.run_id})]
    assert sorted(c["run_id"] for c in children) == sorted(t.run_id for t in result.trials)
    assert {c["status"] for c in children} <= {"FINISHED", "KILLED"}
    assert {c["params"]["learner.lr"] for c in children} == {
        str(t.settings["learner.lr"]) for t in result.trials
    }
    assert {"pictures/search.png", "trials.json", "space.json"} <= set(tracker.files(result.run_id))
    assert tracker.read(result.run_id)["status"] == "FINISHED"
    started = time.monotonic()
    again = search(job("tiny"), SPACE, prepared, trials=3)
    assert time.monotonic() - started < 10  # no cluster is started and no trial runs
    assert again == dataclasses.replace(result, reused=True)


def test_a_process_that_dies_between_two_trials_costs_none(ray_local: object, prepared: Workspace) -> None:
    told: list[str] = []

    def kill_once(
        text: str,
    ) -> None:  # Tune is about to hand the process of the trial that ended to the next one
        if not told:
            for trial in _trials_of(os.getsid(0)):
                os.kill(trial, signal.SIGKILL)
        told.append(text)

    result = search(job("between"), SPACE, prepared, trials=3, scheduler="none", on_progress=kill_once)
    assert any("failed" in text for text in told)  # Tune gave one up
    assert [(t.state, t.steps) for t in result.trials] == [("finished", 8)] * 3
    tracker = Tracker.at(prepared)
    runs = [tracker.read(r) for r in tracker.find("detector", {"mlflow.parentRunId": result.run_id})]
    assert [run["status"] for run in runs] == ["FINISHED"] * 3


def test_a_trial_may_be_a_ray_train_run_of_its_own(ray_local: object, prepared: Workspace) -> None:
    result = search(job("workers", steps=4, workers=2), SPACE, prepared, trials=1)
    assert result.concurrent == 1  # two workers fill the two CPUs; the trial itself holds none
    assert result.best.state == "finished"
    assert result.best.steps == 4
    assert result.best.value is not None


def test_a_population_goes_on_from_the_best_ones_checkpoint(ray_local: object, prepared: Workspace) -> None:
    """Seven exchanges: enough for a trial that lags to be found, whichever reports first."""
    result = search(job("population", 16), LAGGING, prepared, trials=3, scheduler="pbt", grace=1 / 8)
    assert [t.state for t in result.trials] == ["finished"] * 3
    assert [t.steps for t in result.trials] == [16] * 3
    tracker = Tracker.at(prepared)
    runs = [tracker.read(r) for r in tracker.find("detector", {"mlflow.parentRunId": result.run_id})]
    clones = [run for run in runs if "-from-" in run["name"]]
    assert clones
    for clone in clones:
        step = int(clone["name"].split("-")[-2])
        history = tracker.history(clone["run_id"], "loss")
        assert all(at > step for at, _ in history)  # the donor's steps are not trained again
        if history:
            assert history[0][0] == step + 2
    for trial in result.trials:  # what a trial ended with is what its last run was trained with
        run = next(r for r in runs if r["run_id"] == trial.run_id)
        assert run["params"]["learner.lr"] == str(trial.settings["learner.lr"])
        assert trial.settings["learner.lr"] in (1e-9, 3e-3, 1e-2)
    searches = open_store(f"{prepared.storage}/searches/{result.name}")
    assert not [e for e in searches.list() if "/checkpoint_" in e.key]  # the copies are swept away
    assert result.cpu_hours > 0


def test_a_spent_budget_ends_the_search_with_what_it_has(ray_local: object, prepared: Workspace) -> None:
    budget = Budget(cpu_hours=1e-6)  # less than any first report takes
    result = search(job("budget"), SPACE, prepared, trials=4, budget=budget)
    measured = [t for t in result.trials if t.value is not None]
    assert 1 <= len(measured) <= 2  # as many as ran at once
    assert {(t.state, t.steps) for t in measured} == {("stopped early", 2)}
    assert result.best in measured
    assert result.cpu_hours > budget.cpu_hours


def test_what_cannot_run_is_refused_before_it_starts(ray_local: object, prepared: Workspace) -> None:
    with pytest.raises(ClusterError, match=r"needs 3 x 1 CPU, the cluster has room for 2"):
        changes = {"workers": 3, "data.batch_size": 12, "data.lanes": 3}
        search(config.override(job("big"), changes), SPACE, prepared, trials=1)
    with pytest.raises(ConfigError, match=r"did you mean learner\.lr"):
        search(job("typo"), SearchSpace(settings={"learner.lrr": {"log": [1e-4, 1e-2]}}), prepared, trials=1)
    with pytest.raises(ConfigError, match="needs held-out rows"):
        search(dataclasses.replace(job("blind"), validation=None), SPACE, prepared, trials=1)
    assert not open_store(f"{prepared.storage}/searches").list("big-search")


def test_the_winner_ran_to_its_end_though_another_was_better_when_it_was_stopped() -> None:
    trials = [_ended("a", 0.7, "finished"), _ended("b", 0.9, "stopped early"), _ended("c", 0.8, "finished")]
    assert winner(trials, "max").name == "c"
    assert winner(trials, "min").name == "a"
    assert winner([_ended("b", 0.9, "stopped early"), _ended("d", 0.1, "failed")], "max").name == "b"


@pytest.mark.parametrize("unit", ["steps", "images", "epochs"])
def test_no_last_report_stops_a_trial_however_bad_it_is(unit: str) -> None:
    loop = {"steps": 0, "epochs": 0, "images": 0} | {unit: 90}
    plan = {
        "job": {"loop": loop},
        "scheduler": "asha",
        "grace": 1 / 3,
        "reduction": 3.0,
    }  # a rung lies exactly at the end
    scheduler = _scheduler(plan)
    scheduler.set_search_properties("auc", "max")
    attribute = {"steps": "step", "epochs": "epoch", "images": "images"}[unit]
    for number in range(4):
        trial = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)
        report = {attribute: 92, "auc": 1.0 - 0.2 * number, "last": True}  # a batch beyond the duration
        assert scheduler.on_trial_result(None, trial, report) == "CONTINUE"
        scheduler.on_trial_complete(None, trial, report)


def _ended(name: str, value: float, state: str) -> Trial:
    settings = {"learner.lr": value}
    return Trial(name=name, settings=settings, value=value, steps=8, state=state, run_id=name, seconds=1.0)  # type: ignore[arg-type]


# A search in a process of its own, so that it can be killed as a whole.
_SCRIPT = """
import sys, json, time
from counterfake import config
from counterfake.cluster import session
from counterfake.cluster.space import SearchSpace
from counterfake.cluster.tune import search
from counterfake.loop import TrainJob
from counterfake.workspace import Workspace
import counterfake.learners, counterfake.nets

order = json.loads(sys.argv[1])
workspace = config.from_dict(Workspace, order["workspace"])
job, space = config.from_dict(TrainJob, order["job"]), SearchSpace(settings=order["space"])
with session.session(workspace, cpus=2):
    how = {name: order[name] for name in ("trials", "scheduler", "grace")}
    result = search(job, space, workspace, **how, on_progress=lambda s: print(s, flush=True))
    from ray.util import placement_group_table
    for _ in range(50):  # Ray removes them behind our back
        groups = sorted({group["state"] for group in placement_group_table().values()})
        if groups == ["REMOVED"]:
            break
        time.sleep(0.2)
found = [[t.name, t.state, t.steps] for t in result.trials]
print(json.dumps([result.run_id, found, groups, result.cpu_hours]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_eight_trials_survive_a_killed_driver_and_a_crash(prepared: Workspace) -> None:
    """TU-1: all finish, none twice, no placement group leaks. The crash takes every trial in flight."""
    command = _command(prepared, job("killed", steps=16), trials=8, scheduler="none")
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert first.stdout is not None
    try:
        _read_until(first.stdout, "trial 1:")  # one trial is done, others are not
        for trial in _trials_of(first.pid):
            os.kill(trial, signal.SIGKILL)
        _read_until(first.stdout, "trial 2:")
        time.sleep(2)  # so often the state of the search is written
    finally:
        _kill_all(first)
    state = open_store(_search_of(prepared, "killed"))
    assert not state.exists("result.json")  # there is something left to do
    spending = open_store(state.uri.replace("/searches/", "/spending/"))
    spent = json.loads(spending.read("spent.json"))["trial_seconds"]
    second = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=400, check=True)
    run_id, found, groups, cpu_hours = json.loads(second.stdout.splitlines()[-1])
    names = [name for name, _, _ in found]
    assert len(set(names)) == 8
    assert {(state, steps) for _, state, steps in found} == {("finished", 16)}
    assert groups == ["REMOVED"]
    assert cpu_hours > spent / 3600 > 0  # what the killed search had spent counts as well
    tracker = Tracker.at(prepared)
    assert tracker.find("detector", {"counterfake.search": tracker.read(run_id)["name"]}) == [run_id]
    children = [tracker.read(r) for r in tracker.find("detector", {"mlflow.parentRunId": run_id})]
    owned = [name for c in children for name in names if c["name"].endswith(f"-{name}")]
    assert sorted(owned) == sorted(names)  # one run per trial: none was begun twice
    assert not [c for c in children if c["status"] == "RUNNING"]


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_population_survives_a_killed_driver(prepared: Workspace) -> None:
    """Killed at its first exchange, of which Tune's state knows nothing yet."""
    base = job("population-killed", steps=16)
    command = _command(prepared, base, trials=4, scheduler="pbt", space=LAGGING, grace=1 / 8)
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    tracker = Tracker.at(prepared)
    try:
        while not (begun := _runs_of(prepared, "population-killed", "-from-")):
            assert first.poll() is None, "the search ended before any exchange"
            time.sleep(0.1)
    finally:
        _kill_all(first)
    begun |= _runs_of(prepared, "population-killed", "")
    second = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=500, check=True)
    run_id, found, groups, _ = json.loads(second.stdout.splitlines()[-1])
    names = [name for name, _, _ in found]
    assert len(set(names)) == 4
    assert {(state, steps) for _, state, steps in found} == {("finished", 16)}
    assert groups == ["REMOVED"]
    children = [tracker.read(r) for r in tracker.find("detector", {"mlflow.parentRunId": run_id})]
    assert len({c["name"] for c in children}) == len(children)  # no run was begun twice
    assert begun <= {c["run_id"] for c in children}
    originals = [c["name"].rpartition("-")[2] for c in children if "-from-" not in c["name"]]
    assert sorted(originals) == sorted(names)  # the trials are those that were killed
    assert not [c for c in children if c["status"] == "RUNNING"]


def _command(
    workspace: Workspace,
    base: TrainJob,
    *,
    trials: int,
    scheduler: str,
    space: SearchSpace = SPACE,
    grace: float = 0.25,
) -> list[str]:
    order = {
        "workspace": config.to_dict(workspace),
        "job": config.to_dict(base),
        "space": {path: dict(domain) for path, domain in space.settings.items()},
        "trials": trials,
        "scheduler": scheduler,
        "grace": grace,
    }
    return [sys.executable, "-c", _SCRIPT, json.dumps(order)]


def _kill_all(search: subprocess.Popen[str]) -> None:
    """The driver and its raylet, GCS and workers."""
    os.killpg(search.pid, signal.SIGKILL)
    search.wait()


def _runs_of(workspace: Workspace, search: str, part: str) -> set[str]:
    """Ids of the MLflow runs of the trials of a search, of those with `part` in their name."""
    store = open_store(workspace.training)
    folders = {entry.key for entry in store.list(f"{search}-search-") if entry.key.endswith("/run.json")}
    return {json.loads(store.read(key))["run_id"] for key in folders if part in key}


def _read_until(lines: Iterable[str], wanted: str) -> None:
    """Past the line that has `wanted`; Ray says of a crash what it has to say in between."""
    assert any(wanted in line for line in lines), f"the search ended without {wanted}"


def _trials_of(session: int) -> list[int]:
    """The processes of the trials of the search that leads this session; Ray gives each its own group."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            inside = entry.name.isdigit() and os.getsid(int(entry.name)) == session
            if inside and b"ImplicitFunc" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    assert found, "no trial runs"
    return found


def _search_of(space: Workspace, name: str) -> str:
    keys = {
        entry.key.partition("/")[0]
        for entry in open_store(f"{space.storage}/searches").list(f"{name}-search")
    }
    return f"{space.storage}/searches/{keys.pop()}"
