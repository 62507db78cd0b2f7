"""Training on a cluster of three nodes with one CPU each, one worker on every node, while workers, a node and the driver die.

Nodes are processes of this machine (`ray.cluster_utils.Cluster`), a node's death is `kill -9` of its raylet. The driver is a
process of its own that takes jobs from its standard input, so that it can be killed too. Every run is the same job under
another name: what disturbs it may change no bit of its weights.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from counterfake.config import to_dict
from counterfake.data import DataConfig
from counterfake.images import Preprocess
from counterfake.learners import LearnerConfig
from counterfake.learners.faceswap import FaceSwapConfig
from counterfake.learners.gan import GanConfig
from counterfake.learners.phases import Phase
from counterfake.learners.swap_losses import SwapLosses
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.nets.swap import SwapMaskConfig
from counterfake.nets.swap_discriminator import SwapDiscriminatorConfig
from counterfake.records import Sample, SplitRule, write_version
from counterfake.sources.synthetic import SyntheticSource
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.slow]

NODES, ROWS, BATCH, TICK, STEPS = 3, 192, 24, 5, 60
HANG_SECONDS = 8  # collective timeout of these runs
FAST_HEALTH = {  # of the cluster: a node that is gone is noticed after 3 s
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}

HOOK = '''
import importlib.abc, importlib.util, os, sys
from pathlib import Path


class Finder(importlib.abc.MetaPathFinder):
    """Lets the GAN learner be imported as it is; then its d_loss is NaN at the step that the file `nan` names."""

    def find_spec(self, name, path=None, target=None):
        if name != "counterfake.learners.gan":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            step, order = module.Gan.step, Path(os.environ["FAULTS"]) / "nan"

            def faulty(self, batch):
                metrics = step(self, batch)
                if order.exists() and self.steps == int(order.read_text()):
                    metrics["d_loss"] = metrics["d_loss"] * float("nan")
                return metrics

            module.Gan.step = faulty

        spec.loader.exec_module = exec_module
        return spec


if "FAULTS" in os.environ:
    sys.meta_path.insert(0, Finder())
'''

DRIVER = """
import dataclasses, json, sys
from counterfake.cluster import group, session
from counterfake.cluster.train import fit
from counterfake.config import from_dict
from counterfake.loop import TrainJob
from counterfake.workspace import Workspace

say = lambda value: print(json.dumps(value, default=str), file=answers, flush=True)
answers, sys.stdout = sys.stdout, sys.stderr
group.COLLECTIVE_SECONDS = int(sys.argv[2])
workspace = Workspace.at(sys.argv[1])
with session.session(workspace):
    say({"ready": True})
    for line in sys.stdin:
        try:
            job = from_dict(TrainJob, json.loads(line))
            result = fit(job, workspace, on_progress=lambda tick: say({"job": job.name, "step": tick.step}))
            say({"job": job.name, "result": dataclasses.asdict(result)})
        except Exception as error:
            say({"job": job.name, "error": f"{type(error).__name__}: {error}"})
"""


class Driver:
    """A process that runs one job after the other on the cluster; `send`, then `until` what it says."""

    def __init__(self, home: Path, address: str) -> None:
        environment = os.environ | {"RAY_ADDRESS": address}
        self._log = open(home / "driver.log", "a")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(home), str(HANG_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._said: list[tuple[float, dict[str, Any]]] = []
        self._ended, self._job = False, ""
        threading.Thread(target=self._listen, daemon=True).start()
        self.until(lambda said: "ready" in said)

    def send(self, job: TrainJob) -> None:
        assert self.process.stdin is not None
        self._said.clear()
        self._job = job.name
        self.process.stdin.write(json.dumps(to_dict(job)) + "\n")
        self.process.stdin.flush()

    def until(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 120.0) -> dict[str, Any]:
        """The first thing said since `send` that is wanted."""
        return self.when(wanted, seconds)[1]

    def when(
        self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 120.0, *, after: float = 0.0
    ) -> tuple[float, dict[str, Any]]:
        """When (time.monotonic) it was said, and what."""
        deadline = time.monotonic() + seconds
        while True:
            found = next((entry for entry in list(self._said) if entry[0] > after and wanted(entry[1])), None)
            if found:
                return found
            assert not self._ended, f"the driver ended; it said {self._said[-3:]}"
            assert time.monotonic() < deadline, f"not within {seconds} s; the driver said {self._said[-3:]}"
            time.sleep(0.05)

    def run(self, job: TrainJob) -> dict[str, Any]:
        """The result of a whole run."""
        self.send(job)
        return self.result()

    def result(self) -> dict[str, Any]:
        said = self.until(lambda said: "result" in said or "error" in said)
        assert "result" in said, said["error"]
        return dict(said["result"])

    def reach(self, step: int) -> float:
        """Wait until a tick at `step` or later -> when it came."""
        return self.when(lambda said: said.get("step", 0) >= step)[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if said.get("job", "") == self._job:  # a test that failed may have left another one running
                self._said.append((time.monotonic(), said))
        self._ended = True


@dataclasses.dataclass
class Place:
    """Where the tests run: files, cluster, driver."""

    home: Path
    faults: Path
    cluster: Any
    driver: Driver

    def workers(self) -> list[int]:
        """Process ids of the living Ray Train workers of this cluster: children of its raylets."""
        raylets = {node.all_processes["raylet"][0].process.pid for node in self.cluster.list_all_nodes()}
        return [pid for pid, parent, name in processes() if parent in raylets and "TrainWorker" in name]


def processes() -> Iterator[tuple[int, int, str]]:
    """(pid, parent's pid, command line) of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(folder.name), parent, (folder / "cmdline").read_text()
        except (OSError, ValueError):
            continue


def digits() -> NDArray[np.uint8]:
    """(ROWS, 28, 28, 1): the first of MNIST where it lies beside the checkout, else blobs."""
    folder = Path(os.environ.get("COUNTERFAKE_TEST_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "mnist" / "train-images-idx3-ubyte.gz"
    if path.is_file():
        with gzip.open(path) as file:
            data = file.read(16 + ROWS * 784)[16:]
        return np.frombuffer(data, np.uint8).reshape(ROWS, 28, 28, 1)
    grid, centre = np.mgrid[:28, :28], np.random.default_rng(0).uniform(8, 20, (ROWS, 2, 1, 1))
    distance = ((grid[None] - centre) ** 2).sum(axis=1)  # (ROWS, 28, 28)
    return (255 * np.exp(-distance / 30)).astype(np.uint8)[..., None]


def gan() -> tuple[LearnerConfig, DataConfig]:
    learner = GanConfig(generator=DcganGenerator.tiny(), discriminator=DcganDiscriminator.tiny())
    return learner, DataConfig(uri="digits", preprocess=Preprocess(size=28, channels=1))


def swap() -> tuple[LearnerConfig, DataConfig]:
    """A mask network of three people: bent, then straight against its critic."""
    learner = FaceSwapConfig(
        net=SwapMaskConfig.tiny().with_identities(()),
        critic=SwapDiscriminatorConfig.tiny(),
        losses=SwapLosses(edge=0.1, eyes=3.0, mask=1.0, adversarial=0.1),
        phases=(Phase(images=STEPS // 2 * BATCH), Phase(warp=False, adversarial=1.0)),
        lr=1e-3,
    )
    preprocess = Preprocess(size=24, crop="face", margin=1.4)
    return learner, DataConfig(uri="faces", preprocess=preprocess, landmarks=True)


LEARNERS = {"gan": gan, "swap": swap}


def job(name: str, kind: str = "gan", **loop: Any) -> TrainJob:
    learner, data = LEARNERS[kind]()
    return TrainJob(
        name=name,
        task="gan" if kind == "gan" else "faceswap",
        data=dataclasses.replace(data, batch_size=BATCH, lanes=6, threads=1),
        learner=learner,
        loop=LoopConfig(steps=STEPS, tick_steps=TICK, preview_every_ticks=0, threads=1, **loop),
        workers=NODES,
    )


def start_cluster() -> Any:
    """A head and two more nodes."""
    from ray._raylet import Config
    from ray.cluster_utils import Cluster

    Config.initialize("")  # Ray may have been imported before its settings were in the environment
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": FAST_HEALTH})
    for _ in range(NODES - 1):
        cluster.add_node(**NODE)
    return cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    from counterfake.cluster import session

    home, faults = tmp_path_factory.mktemp("nodes"), tmp_path_factory.mktemp("faults")
    samples = (Sample(pixels=p, source="digits", split="train", path=str(i)) for i, p in enumerate(digits()))
    sources = {"digits": {"licence": "CC0-1.0", "consent": "none"}}
    write_version(
        Workspace.at(home).dataset("digits"), samples, sources=sources, splits=SplitRule(), rows_per_batch=8
    )
    (faults / "sitecustomize.py").write_text(HOOK)
    people = SyntheticSource(identities=3, per_identity=16, size=32)
    facts, splits = {people.label: sources["digits"]}, SplitRule(fractions={"train": 1.0})
    uri = Workspace.at(home).dataset("faces")
    write_version(uri, people.samples(), sources=facts, splits=splits, rows_per_batch=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(faults))  # nodes and workers inherit it
        patch.setenv("FAULTS", str(faults))
        hang = {"RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(HANG_SECONDS)}  # of a report, as of an all-reduce
        for name, value in (session.FLAGS | hang).items():
            patch.setenv(name, value)
        session._secure()
        cluster = start_cluster()
        try:
            found = Place(home, faults, cluster, Driver(home, cluster.address))
            yield found
            found.driver.kill()
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def quiet(place: Place) -> Callable[[str], dict[str, Any]]:
    """The result of a job of each kind that nothing disturbs, run once."""
    return functools.cache(lambda kind: place.driver.run(job(f"undisturbed-{kind}", kind)))


@pytest.fixture(scope="module")
def undisturbed(quiet: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return quiet("gan")


def same(result: dict[str, Any], undisturbed: dict[str, Any]) -> bool:
    """Whether both runs gave the same weights, bit for bit, after the same steps, with the same figures."""
    return all(result[key] == undisturbed[key] for key in ("weights_digest", "metrics", "steps", "images"))


@pytest.mark.parametrize("kind", LEARNERS)
def test_three_nodes_train_with_one_worker_each(
    place: Place, quiet: Callable[[str], dict[str, Any]], kind: str
) -> None:
    assert (quiet(kind)["steps"], quiet(kind)["images"]) == (STEPS, STEPS * BATCH)
    assert len(place.cluster.list_all_nodes()) == NODES


def test_a_killed_worker_changes_no_bit(place: Place, undisturbed: dict[str, Any]) -> None:
    """TR-1."""
    place.driver.send(job("worker"))
    place.driver.reach(2 * TICK)
    killed = place.workers()
    assert len(killed) == NODES
    os.kill(killed[-1], signal.SIGKILL)
    since = time.monotonic()
    assert same(place.driver.result(), undisturbed)
    again = min(at for at, said in place.driver._said if at > since + 1 and "step" in said)
    print(f"first tick after the kill of a worker: {again - since:.1f} s")
    assert again - since <= 30


def test_a_hung_worker_is_found_and_replaced(place: Place, undisturbed: dict[str, Any]) -> None:
    """TR-7: within the collective timeout and 30 s."""
    place.driver.send(job("hung"))
    place.driver.reach(2 * TICK)
    stopped = place.workers()[-1]
    os.kill(stopped, signal.SIGSTOP)
    since = time.monotonic()
    at, _ = place.driver.when(lambda said: "step" in said, after=since + 2)
    print(f"first tick after the hang of a worker: {at - since:.1f} s")
    assert at - since <= HANG_SECONDS + 30
    assert same(place.driver.result(), undisturbed)
    assert stopped not in {pid for pid, _, _ in processes()}


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_killed_node_changes_no_bit(
    place: Place, quiet: Callable[[str], dict[str, Any]], kind: str
) -> None:
    """TR-2: at most 60 s after a node is there again."""
    undisturbed = quiet(kind)
    place.driver.send(job(f"node-{kind}", kind))
    place.driver.reach(2 * TICK)
    victim = sorted(place.cluster.worker_nodes, key=lambda node: node.unique_id)[0]
    place.cluster.remove_node(victim, allow_graceful=False)
    time.sleep(3)
    place.cluster.add_node(**NODE)
    since = time.monotonic()
    at, _ = place.driver.when(lambda said: "step" in said, after=since)
    print(f"first tick after a node was there again: {at - since:.1f} s")
    assert at - since <= 60
    assert same(place.driver.result(), undisturbed)


def test_a_value_that_is_not_finite_stops_before_its_report_and_leaves_a_good_checkpoint(
    place: Place, undisturbed: dict[str, Any]
) -> None:
    """TR-8."""
    order = place.faults / "nan"
    order.write_text("23")
    place.driver.send(job("nan"))
    error = place.driver.until(lambda said: "error" in said)["error"]
    assert error.startswith("NonFiniteError: d_loss became NaN or infinite at step 23")
    order.unlink()
    assert max(said.get("step", 0) for _, said in place.driver._said) == 20
    place.driver.send(job("nan"))
    assert place.driver.until(lambda said: "step" in said)["step"] == 20 + TICK
    assert same(place.driver.result(), undisturbed)


def test_early_stopping_ends_every_rank_at_one_tick(place: Place) -> None:
    settings = {"patience_ticks": 1, "stop_metric": "d_loss", "stop_mode": "max"}
    result = place.driver.run(job("early", **settings))
    assert result["stopped"].startswith("d_loss has not passed")
    assert result["steps"] < STEPS
    assert place.driver._said[-2][1]["step"] == result["steps"]


def test_a_killed_driver_goes_on_as_the_same_run_with_the_same_command(
    place: Place, undisturbed: dict[str, Any]
) -> None:
    """TR-3."""
    place.driver.send(job("driver"))
    place.driver.reach(2 * TICK)
    workers = place.workers()
    place.driver.kill()
    last = max(said.get("step", 0) for _, said in place.driver._said)
    place.driver = Driver(place.home, place.cluster.address)
    place.driver.send(job("driver"))
    first = place.driver.until(lambda said: "step" in said)["step"]
    assert first >= last - TICK  # at most one checkpoint interval is done again
    result = place.driver.result()
    assert same(result, undisturbed)
    assert not set(workers) & set(place.workers())
    tracker = Tracker.at(Workspace.at(place.home))
    assert [step for step, _ in tracker.history(result["run_id"], "d_loss")] == list(
        range(TICK, STEPS + 1, TICK)
    )
    assert len(tracker.find("gan", {"mlflow.runName": "driver"})) == 1
