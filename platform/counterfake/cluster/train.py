"""`fit`: one training job, on N Ray Train workers or in this process, as one MLflow run, resumed until it is finished.

The run's folder `<storage>/training/<name>-<digest of the job and its data>` holds `run.json` (which MLflow run),
checkpoints, `bundle/` and at the end `result.json`. The same job again continues it, or returns what it gave.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterfake import audit, config
from counterfake.bundle import read, source_commit
from counterfake.cluster.group import run_on_ray
from counterfake.cluster.here import run_here
from counterfake.cluster.worker import Order, Progress
from counterfake.data import DataConfig, Loader
from counterfake.errors import ConfigError, TrackingError
from counterfake.loop import TrainJob
from counterfake.records import Dataset
from counterfake.storage import Store, open_store
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run gave."""

    name: str  # of the run: job name and digest
    run_id: str  # of MLflow
    checkpoint: str  # URI of the last checkpoint
    bundle: Path | None  # local folder
    metrics: dict[str, float]  # of the last tick, with val_… if there is a validation split
    steps: int
    images: int
    weights_digest: str  # of the whole learner state: equal digests mean equal runs, bit for bit
    seconds: float  # wall time of `fit`, restarts included, of the process that finished the run
    images_per_second: float  # over all steps, without checkpoints and start-up
    registered: str = ""  # "name/version" where job.register_as is set
    stopped: str = ""  # why the run ended before its duration; "" if it did not
    rollbacks: Sequence[dict[str, Any]] = ()  # step, to_step, lr_factor, reason of each return
    reused: bool = False  # the job had been finished before; nothing was trained


def fit(
    job: TrainJob,
    workspace: Workspace,
    *,
    on_progress: Progress | None = None,
    parent_run: str | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainResult:
    """Train `job` to its end. `on_progress` sees each tick; `callbacks` are Ray Train's (Tune needs one).

    Raises ConfigError, NotFoundError, ClusterError, TrackingError, or DataError for a version whose audit found a leak,
    before anything is trained, TrainingError and its children while it is."""
    started = time.perf_counter()
    job, dataset = _pin(job, workspace)
    allowed = _admit(job, workspace)
    # Opening the data refuses what does not fit before anything starts.
    Loader(job.data, world=max(job.workers, 1), cache=workspace.cache)
    _admit_rows(job, workspace)
    name = run_name(job, dataset)
    store = open_store(f"{workspace.training}/{name}")
    if store.exists("result.json"):
        logger.info(
            "%s was finished before; this is its result (another seed, name or setting makes a new run)", name
        )
        result = json.loads(store.read("result.json"))
        _end_run(workspace, store, result)
        return _finish(job, workspace, store, result, reused=True)
    run = _open_run(job, workspace, store, name, dataset, parent_run, allowed)
    order = Order(
        job=job,
        workspace=workspace,
        name=name,
        run_id=run.id,
        dataset=dataset["training"],
        commit=source_commit() or "",
    )
    with run:
        if job.workers:
            summary = run_on_ray(order, on_progress, callbacks)
        else:
            summary = run_here(order, store, on_progress)
        result = {**summary, "name": name, "run_id": run.id, "seconds": time.perf_counter() - started}
        store.put("result.json", config.canonical_json(result))
        run.json("result.json", result)
    return _finish(job, workspace, store, result, reused=False)


def run_name(job: TrainJob, dataset: dict[str, Any]) -> str:
    """`<job name>-<hash>` of everything that decides the result: all settings and the content of the data.

    How many Ray workers share the work is not part of it: with another number a run goes on where it was, over the same
    global batches. Ray or this process is: they keep their checkpoints apart."""
    settings = config.to_dict(dataclasses.replace(job, notes="", register_as="", workers=min(job.workers, 1)))
    return f"{job.name}-{config.digest({'job': settings, 'dataset': dataset})[:12]}"


def run_folder(job: TrainJob, workspace: Workspace) -> Store:
    """The folder of the job's run on storage, begun or not."""
    job, dataset = _pin(job, workspace)
    return open_store(f"{workspace.training}/{run_name(job, dataset)}")


# -- private --------------------------------------------------------------------------------------


def _pin(job: TrainJob, workspace: Workspace) -> tuple[TrainJob, dict[str, Any]]:
    """The job with its datasets fixed to the versions of this moment, and what they are."""
    job_data, training = _pin_data(job.data, workspace)
    if job.validation is None:
        return dataclasses.replace(job, data=job_data), {"training": training}
    held_out, validation = _pin_data(job.validation, workspace)
    return dataclasses.replace(job, data=job_data, validation=held_out), {
        "training": training,
        "validation": validation,
    }


def _pin_data(data: DataConfig, workspace: Workspace) -> tuple[DataConfig, dict[str, Any]]:
    if not data.uri:
        raise ConfigError(
            "data.uri is not set; name a dataset, for example --set data.uri=faces, or a full URI"
        )
    uri = workspace.dataset(data.uri)
    found = Dataset.open(uri)
    version = found.version(found.pinned)
    base = uri.rpartition("@")[0] if found.pinned is not None else uri
    facts = {"uri": base, "version": version.number, "digest": version.digest, "sources": version.sources}
    return dataclasses.replace(data, uri=f"{base}@{version.number}"), facts


def _admit(job: TrainJob, workspace: Workspace) -> list[str]:
    """Kinds of leaks that the job is allowed to train with. Raises DataError for one that it is not."""
    uris = [job.data.uri] + ([job.validation.uri] if job.validation is not None else [])
    found: set[str] = set()
    for uri in dict.fromkeys(uris):
        dataset = Dataset.open(uri, cache=workspace.cache)
        found.update(audit.admit(dataset, dataset.version(), allow_leaks=job.data.allow_leaks))
    return sorted(found)


def _admit_rows(job: TrainJob, workspace: Workspace) -> None:
    """Show the learner the counts of its rows; conditions of `where` on columns that are not counted rule out none."""
    dataset = Dataset.open(job.data.uri, cache=workspace.cache)
    counts = dataset.version(dataset.pinned).counts_of(job.data.split, job.data.where)
    job.learner.admit(counts, f"{job.data.uri.rpartition('/')[2]} split {job.data.split}")


def _open_run(
    job: TrainJob,
    workspace: Workspace,
    store: Store,
    name: str,
    dataset: dict[str, Any],
    parent: str | None,
    leaks: list[str],
) -> Run:
    """The MLflow run of this folder: the one it was begun with, or a new one."""
    tracker = Tracker.at(workspace)
    if store.exists("run.json"):
        known = json.loads(store.read("run.json"))
        if known["tracking_uri"] == workspace.tracking_uri:
            logger.info("%s goes on as MLflow run %s", name, known["run_id"])
            return tracker.resume(known["run_id"])
    tags = {"counterfake.run": name, "counterfake.commit": source_commit() or ""}
    tags |= {"counterfake.allowed_leaks": ", ".join(leaks)} if leaks else {}
    run = tracker.start(job.task, job.name, parent=parent, tags=tags, params=config.to_dict(job))
    for context, facts in dataset.items():
        run.dataset(facts["uri"], facts["version"], facts["digest"], context)
    run.json("job.json", config.to_dict(job))
    store.put("run.json", config.canonical_json({"run_id": run.id, "tracking_uri": workspace.tracking_uri}))
    return run


def _end_run(workspace: Workspace, store: Store, result: dict[str, Any]) -> None:
    """End the MLflow run of a finished training whose driver was killed before it could.

    The result does not need MLflow: where that is away, or another one by now, the run stays as it is."""
    if json.loads(store.read("run.json"))["tracking_uri"] != workspace.tracking_uri:
        return
    try:
        if Tracker.at(workspace).read(result["run_id"])["status"] != "FINISHED":
            with Run(workspace.tracking_uri, result["run_id"]) as run:
                run.json("result.json", result)
    except TrackingError as error:
        logger.warning("%s is finished, but its MLflow run may not say so: %s", result["name"], error)


def _finish(
    job: TrainJob, workspace: Workspace, store: Store, result: dict[str, Any], *, reused: bool
) -> TrainResult:
    folder = store.download("bundle", workspace.home / "models" / result["name"])
    read(folder)  # verifies every digest
    registered = ""
    if job.register_as:
        from counterfake.registry import Registry

        tags = {"counterfake.run": result["name"]}
        registered = (
            Registry.at(workspace)
            .register(folder, job.register_as, run_id=result["run_id"], tags=tags)
            .reference
        )
    known = {field.name for field in dataclasses.fields(TrainResult)}
    figures = {key: value for key, value in result.items() if key in known}
    return TrainResult(**{**figures, "bundle": folder, "registered": registered, "reused": reused})
