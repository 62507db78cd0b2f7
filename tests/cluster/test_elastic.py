"""A run whose number of workers changes while it lasts, each time after `kill -9`: the same global batches, each id once.

Every phase is a driver of its own with a local Ray cluster of its own. A ledger, written by a hook in every worker
process, says which ids each rank was given at which step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from counterfake import checkpoint
from counterfake.cluster import group
from counterfake.cluster.train import TrainResult, fit, run_name
from counterfake.data import DataConfig, Loader
from counterfake.images import Preprocess
from counterfake.learners.gan import GanConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.records import Dataset, Sample, SplitRule, write_version
from counterfake.storage import open_store
from counterfake.workspace import Workspace

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.slow]

ROWS, BATCH, TICK, STEPS = 96, 16, 3, 60  # 6 steps an epoch, 10 epochs
PHASES = ((2, 9), (1, 24), (2, 0))  # workers, and the step after which the driver is killed; 0 = to the end
METRICS = {
    "d_loss": 0.2,
    "g_loss": 0.2,
}  # relative tolerance: each rank draws noise of its own, so bits differ

HOOK = '''
import importlib.abc, importlib.util, json, os, sys, time


class Finder(importlib.abc.MetaPathFinder):
    """Lets counterfake.data be imported as it is, then writes down every batch that a Loader gives."""

    def find_spec(self, name, path=None, target=None):
        if name != "counterfake.data":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            batches = module.Loader.batches

            def noted(self, *args, **kwargs):
                for batch in batches(self, *args, **kwargs):
                    while 0 < int(os.environ["STOP"]) <= batch.step:  # hangs until it is killed
                        time.sleep(1)
                    entry = {"step": batch.step, "rank": self.rank, "world": self.world, "ids": batch.ids}
                    with open(f"{os.environ['LEDGER']}/{os.getpid()}.jsonl", "a") as file:
                        file.write(json.dumps(entry) + "\\n")
                    yield batch

            module.Loader.batches = noted

        spec.loader.exec_module = exec_module
        return spec


if "LEDGER" in os.environ:
    sys.meta_path.insert(0, Finder())
'''

DRIVER = """
import json, os, signal, sys
from counterfake.cluster import session
from counterfake.cluster.train import fit
from counterfake.config import from_dict
from counterfake.loop import TrainJob
from counterfake.workspace import Workspace

order = json.loads(open(sys.argv[1]).read())
workspace = Workspace.at(order["home"])


def on_progress(tick):
    if order["stop"] and tick.step >= order["stop"]:
        os.kill(os.getpid(), signal.SIGKILL)


with session.session(workspace, cpus=2):
    result = fit(from_dict(TrainJob, order["job"]), workspace, on_progress=on_progress)
print(json.dumps({"steps": result.steps, "images": result.images, "metrics": result.metrics, "run_id": result.run_id}))
"""


def job(workers: int) -> TrainJob:
    return TrainJob(
        name="elastic",
        task="gan",
        data=DataConfig(uri="noise", batch_size=BATCH, preprocess=Preprocess(size=28, channels=1), threads=1),
        learner=GanConfig(generator=DcganGenerator.tiny(), discriminator=DcganDiscriminator.tiny()),
        loop=LoopConfig(steps=STEPS, tick_steps=TICK, preview_every_ticks=0, threads=1),
        workers=workers,
        cpus_per_worker=0.5,
    )


def drive(folder: Path, phase: int, workers: int, stop: int) -> subprocess.CompletedProcess[str]:
    """One phase in a process of its own; afterwards none of its workers lives."""
    from counterfake.config import to_dict

    ledger, hook = folder / f"ledger-{phase}", folder / "hook"
    for place in (ledger, hook):
        place.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    order = {"job": to_dict(job(workers)), "home": str(folder / "runs"), "stop": stop}
    (folder / "order.json").write_text(json.dumps(order))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder / "order.json")],
        env=os.environ
        | {
            "PYTHONPATH": str(hook),
            "LEDGER": str(ledger),
            "STOP": str(stop and stop + TICK),
            "RAY_ADDRESS": "local",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    _wait_until_gone([int(path.stem) for path in ledger.glob("*.jsonl")])
    return done


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.2)


def entries(folder: Path, phase: int) -> list[dict[str, object]]:
    lines = (line for path in (folder / f"ledger-{phase}").glob("*.jsonl") for line in path.open())
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may have been cut off


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    rng = np.random.default_rng(0)
    rows = (
        Sample(pixels=rng.integers(0, 256, (28, 28, 1), dtype=np.uint8), source="noise", split="train")
        for _ in range(ROWS)
    )
    sources = {"noise": {"licence": "CC0-1.0", "consent": "synthetic"}}
    uri = Workspace.at(folder / "runs").dataset("noise")
    write_version(uri, rows, sources=sources, splits=SplitRule(), rows_per_batch=8)
    return folder


@pytest.fixture(scope="module")
def phases(place: Path) -> list[subprocess.CompletedProcess[str]]:
    return [drive(place, phase, workers, stop) for phase, (workers, stop) in enumerate(PHASES)]


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> TrainResult:
    return fit(job(0), Workspace.at(place / "runs"))


def test_the_number_of_ray_workers_is_not_part_of_a_runs_name() -> None:
    data = {"training": {"digest": "d"}}
    assert run_name(job(2), data) == run_name(job(1), data) != run_name(job(0), data)


@pytest.mark.parametrize("content", [b"", b'{"ray_version": "2.6', b"{}"], ids=["empty", "cut off", "whole"])
def test_a_list_of_checkpoints_that_is_cut_off_is_removed(tmp_path: Path, content: bytes) -> None:
    store = open_store(tmp_path.as_uri())
    group._mend(store)  # nothing there yet
    store.put(group.SNAPSHOT, content)
    group._mend(store)
    assert store.exists(group.SNAPSHOT) == (content == b"{}")


def test_the_newest_whole_checkpoint_is_found_without_a_list(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    with group._unlisted(store) as nothing:
        assert nothing is None
    for number in (1, 2, 3):
        checkpoint.save(tmp_path / f"checkpoint_{number}", {"net": {"w": torch.ones(3)}}, {"step": number})
    (tmp_path / "checkpoint_4").mkdir()  # upload had begun: no state.json
    (tmp_path / "checkpoint_3" / "net.safetensors").write_bytes(b"cut off")
    with group._unlisted(store) as folder:
        assert folder is not None
        assert checkpoint.load(folder)[1]["step"] == 2


def expected(place: Path) -> list[list[str]]:
    """The ids of every global batch of the run, as one reader sees them."""
    workspace = Workspace.at(place / "runs")
    config = DataConfig(
        uri=workspace.dataset("noise"), batch_size=BATCH, preprocess=Preprocess(size=28, channels=1)
    )
    batches = Loader(config).batches()
    found = [next(batches).ids for _ in range(STEPS)]
    batches.close()
    return found


def test_the_run_completes_as_one_run_through_two_one_and_two_workers(
    phases: list[subprocess.CompletedProcess[str]], place: Path
) -> None:
    *killed, last = phases
    for number, done in enumerate(killed):
        assert done.returncode == -signal.SIGKILL, f"phase {number}: {done.stderr[-2000:]}"
    assert last.returncode == 0, last.stderr[-2000:]
    result = json.loads(last.stdout.strip().splitlines()[-1])
    assert (result["steps"], result["images"]) == (STEPS, STEPS * BATCH)
    assert [{e["world"] for e in entries(place, phase)} for phase in range(3)] == [{2}, {1}, {2}]
    starts = [min(int(str(e["step"])) for e in entries(place, phase) if e["step"]) for phase in range(3)]
    assert 1 == starts[0] < starts[1] < starts[2]  # each goes on where the one before had its last checkpoint


def test_every_rank_of_every_phase_gets_its_share_of_the_same_global_batches(
    phases: list[subprocess.CompletedProcess[str]], place: Path
) -> None:
    batches = expected(place)
    whole: set[int] = set()
    for phase, (workers, _) in enumerate(PHASES):
        share, given = BATCH // workers, Counter[int]()
        for entry in entries(place, phase):
            step, rank = int(str(entry["step"])), int(str(entry["rank"]))
            if step < STEPS:
                assert entry["ids"] == batches[step][rank * share : (rank + 1) * share]
                given[step] |= 1 << rank
        whole |= {step for step, ranks in given.items() if ranks == 2**workers - 1}
    assert whole == set(range(STEPS))


def test_each_id_comes_once_an_epoch_across_the_kills(
    phases: list[subprocess.CompletedProcess[str]], place: Path
) -> None:
    """By counting what the ranks were given: the ids of a step are those of the last phase that ran it."""
    given: dict[int, dict[int, list[str]]] = {}
    for phase in range(len(PHASES)):
        for step in {int(str(e["step"])) for e in entries(place, phase)}:
            if step or not phase:  # a preview looks at the first batch again
                given[step] = {}
        for entry in entries(place, phase):
            step = int(str(entry["step"]))
            if step or not phase:
                given[step][int(str(entry["rank"]))] = list(entry["ids"])  # type: ignore[call-overload]
    every = {
        sample.id
        for sample in Dataset.open(Workspace.at(place / "runs").dataset("noise")).samples(None, "train")
    }
    epoch = ROWS // BATCH
    for first in range(0, STEPS, epoch):
        seen = Counter(i for step in range(first, first + epoch) for ids in given[step].values() for i in ids)
        assert seen.keys() == every
        assert set(seen.values()) == {1}


def test_the_metrics_end_near_those_of_a_run_that_nothing_disturbed(
    phases: list[subprocess.CompletedProcess[str]], undisturbed: TrainResult
) -> None:
    metrics = json.loads(phases[-1].stdout.strip().splitlines()[-1])["metrics"]
    for name, tolerance in METRICS.items():
        assert metrics[name] == pytest.approx(undisturbed.metrics[name], rel=tolerance)
