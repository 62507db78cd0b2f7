"""A training run on a group of Ray Train workers: start, restart after a failure, carry ticks back to the driver."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from counterfake import checkpoint, dist, errors
from counterfake.cluster import session
from counterfake.cluster.worker import Order, Progress, work
from counterfake.errors import (
    CheckpointError,
    ClusterError,
    CollapseError,
    ConfigError,
    CounterfakeError,
    NonFiniteError,
    NotFoundError,
    TrackingError,
    TrainingError,
)
from counterfake.loop import Tick, TrainJob
from counterfake.storage import Store, open_store
from counterfake.temporary import temporary_folder

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # restarts of the worker group before a run gives up
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray's list of a run's checkpoints
COLLECTIVE_SECONDS = 120  # a rank that hangs in an all-reduce; the group is then restarted
# The same after a restart: on every rank alike, or on rank 0 after its last report.
HOPELESS = (ConfigError, CheckpointError, NonFiniteError, CollapseError, TrackingError)


def run_on_ray(order: Order, on_progress: Progress | None, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Train on `order.job.workers` Ray workers -> rank 0's figures and the URI of the last checkpoint."""
    with session.session(order.workspace):
        _check_resources(order.job)
        _mend(open_store(f"{order.workspace.training}/{order.name}"))
        with _progress(on_progress) as actor:
            outcome = _fit_trainer(_trainer(order, actor, callbacks))
    summary: dict[str, Any] = outcome.return_value
    if failed := summary.get("failed"):
        raise getattr(errors, failed["kind"])(failed["message"])
    scheme = order.workspace.training.partition("://")[0]
    return {**summary, "checkpoint": f"{scheme}://{outcome.checkpoint.path}"}


# -- private -----------------------------------------------------------------------------------------------------------


class _RayHost:
    """One Ray Train worker: reports are a barrier of all ranks, checkpoints are uploaded by Ray."""

    def __init__(self, progress: Any, store: Store) -> None:
        self._progress = progress  # actor handle, or None
        self._store = store  # of the run's folder
        self._reported = False  # since then Ray knows the newest checkpoint on rank 0 only

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        import ray.train

        found = None if self._reported else ray.train.get_checkpoint()
        with found.as_directory() if found else _unlisted(self._store) as folder:
            yield Path(folder) if folder else None

    def report(self, tick: Tick, folder: Path | None) -> None:
        import ray.train

        self._reported = True
        last = ray.train.Checkpoint.from_directory(folder) if folder else None
        ray.train.report({**tick.figures, "images_per_second": tick.images_per_second}, checkpoint=last)
        if self._progress is not None and dist.is_main():
            self._progress.put.remote(dataclasses.asdict(tick))

    def agree(self, answer: dict[str, str]) -> dict[str, str]:
        from ray.train.collective import broadcast_from_rank_zero  # waits as long as a report, unlike gloo

        return broadcast_from_rank_zero(answer)


def _mend(store: Store) -> None:
    """Remove Ray's list of checkpoints if it is cut off: Ray 2.60 writes it in place, and a driver killed meanwhile
    would leave a run that never starts again. The workers then look for the newest checkpoint themselves."""
    try:
        json.loads(store.read(SNAPSHOT))
    except NotFoundError:
        return
    except ValueError:
        logger.warning("%s/%s is cut off; the checkpoints are looked for one by one", store.uri, SNAPSHOT)
        store.delete(SNAPSHOT)


@contextmanager
def _unlisted(store: Store) -> Iterator[Path | None]:
    """A copy of the newest checkpoint of a run that is whole, whether Ray knows of it or not; None if there is none."""
    keys = [entry.key for entry in store.list("checkpoint_") if entry.key.endswith(f"/{checkpoint.STATE}")]
    for key in sorted(keys, reverse=True):
        with temporary_folder() as temporary:
            folder = store.download(key.rpartition("/")[0], temporary / "checkpoint")
            try:
                checkpoint.load(folder)
            except CheckpointError as error:
                logger.warning("a checkpoint is passed over: %s", error)
                continue
            yield folder
            return
    yield None


def _on_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train runs on every worker -> rank 0's figures, or an error that a restart cannot mend."""
    import ray

    logging.basicConfig(level=logging.INFO)
    progress = ray.get_actor(settings["progress"]) if settings["progress"] else None
    try:
        order = Order.from_dict(settings["order"])
        return work(order, _RayHost(progress, open_store(f"{order.workspace.training}/{order.name}")))
    except HOPELESS as error:
        return {"failed": {"kind": type(error).__name__, "message": str(error)}}


def _fit_trainer(trainer: Any) -> Any:
    """Ray's result; a worker's error that a user can act on comes out as itself."""
    from ray.train import TrainingFailedError

    try:
        return trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        for cause in (getattr(f, "_base_exc", f) for f in failures.values()):
            if isinstance(cause, CounterfakeError):
                raise cause from None
        reason = str(error).strip().splitlines()[-1]
        raise TrainingError(
            f"training failed {MAX_FAILURES + 1} times, the last time with: {reason}"
        ) from error


def _trainer(order: Order, actor: str, callbacks: Sequence[Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    job = order.job
    filesystem, root = open_store(order.workspace.training).filesystem()
    resources = {"CPU": job.cpus_per_worker} | ({"GPU": job.gpus_per_worker} if job.gpus_per_worker else {})
    return TorchTrainer(
        _on_worker,
        train_loop_config={"order": order.to_dict(), "progress": actor},
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=job.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(
            backend="nccl" if job.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_SECONDS
        ),
        run_config=RunConfig(
            name=order.name,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=job.loop.keep_checkpoints),
            callbacks=list(callbacks),
        ),
    )


def _check_resources(job: TrainJob) -> None:
    """Refuse at once what Ray would wait for without end."""
    import ray

    cluster = session.current()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, each, there in (
        ("CPU", job.cpus_per_worker, cluster.cpus),
        ("GPU", job.gpus_per_worker, cluster.gpus),
    ):
        if job.workers * each > there:
            raise ClusterError(
                f"{job.workers} workers with {each:g} {kind}s each need {job.workers * each:g} {kind}s but the cluster has "
                f"{there:g}; lower workers or {kind.lower()}s_per_worker, or add nodes"
            )
        room = sum(int(node.get(kind, 0.0) / each + 1e-9) for node in nodes) if each else job.workers
        if job.workers > room:
            raise ClusterError(
                f"{job.workers} workers with {each:g} {kind}s each do not fit: a worker lies on one node, and the "
                f"{len(nodes)} nodes have room for {room}; lower workers or {kind.lower()}s_per_worker, or add larger nodes"
            )


@contextmanager
def _progress(on_progress: Progress | None) -> Iterator[str]:
    """The name of an actor that carries ticks from rank 0 to `on_progress` here; "" if nobody listens."""
    if on_progress is None:
        yield ""
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"progress-{uuid.uuid4().hex[:12]}"
    # on this node: it must outlive the loss of any other, after which new workers look for it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0)(_Mailbox).options(name=name, scheduling_strategy=here).remote()
    done = threading.Event()
    with ThreadPoolExecutor(1, "progress") as thread:
        listening = thread.submit(_listen, mailbox, on_progress, done)
        try:
            yield name
        finally:
            done.set()
            wait([listening])
            ray.kill(mailbox)
    listening.result()  # an error of on_progress comes out here, after training


class _Mailbox:
    """An actor that holds ticks until the driver asks."""

    def __init__(self) -> None:
        self._ticks: list[dict[str, Any]] = []

    def put(self, tick: dict[str, Any]) -> None:
        self._ticks.append(tick)

    def take(self) -> list[dict[str, Any]]:
        ticks, self._ticks = self._ticks, []
        return ticks


def _listen(mailbox: Any, on_progress: Progress, done: threading.Event) -> None:
    import ray

    last = False
    while not last:
        last = done.wait(0.3)
        for tick in ray.get(mailbox.take.remote()):
            on_progress(Tick(**tick))
