"""`search`: Ray Tune over dotted configuration paths. Every trial is an ordinary training job with its own MLflow run.

Here a search is checked, named by everything that decides it, and given its MLflow run and as many trials at once as
really fit; trials.py runs them under Tune, findings.py says what they gave. The same search again goes on where it was
killed, or returns what it gave.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from counterfake import config
from counterfake.cluster import population, session
from counterfake.cluster.budget import NO_LIMIT, Budget
from counterfake.cluster.findings import SearchResult, conclude, from_dict, read, to_dict
from counterfake.cluster.space import SearchSpace
from counterfake.cluster.trials import run_all, spending, sweep
from counterfake.data import DataConfig
from counterfake.errors import ClusterError, ConfigError
from counterfake.loop import TrainJob
from counterfake.records import Dataset
from counterfake.storage import Store, open_store
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace

logger = logging.getLogger(__name__)

Scheduler = Literal["asha", "pbt", "none"]


def search(
    base: TrainJob,
    space: SearchSpace,
    workspace: Workspace,
    *,
    trials: int = 8,
    metric: str = "val_best_auc",
    mode: Literal["max", "min"] = "max",
    scheduler: Scheduler = "asha",
    grace: float = 0.25,
    reduction: float = 3.0,
    budget: Budget = NO_LIMIT,
    concurrent: int = 0,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> SearchResult:
    """The best settings of `space` around `base`, by `metric` of its ticks.

    grace: share of a trial's duration before ASHA may stop it, or between two exchanges of pbt; reduction: one in so many
    goes on at each rung of ASHA; budget: after which no trial begins or goes on; concurrent: at most so many at once (0 = as
    many as fit). Raises ConfigError or ClusterError before anything starts, TrainingError if every trial fails."""
    started = time.perf_counter()
    base = _prepared(base, workspace, metric)
    space.check(base)
    budget.check(base)
    if scheduler == "pbt":
        population.check(base, space, trials, concurrent)
    if trials < 1 or not 0 < grace <= 1 or reduction <= 1:
        raise ConfigError(
            f"trials {trials} and grace {grace:g} (0 to 1) must be positive, reduction {reduction:g} above 1"
        )
    plan = {
        "job": config.to_dict(base),
        "space": _plain(space),
        "trials": trials,
        "metric": metric,
        "mode": mode,
    }
    plan |= {"scheduler": scheduler, "grace": grace, "reduction": reduction, "seed": seed}
    plan |= {"budget": dataclasses.asdict(budget)}
    name = f"{base.name}-search-{config.digest(plan)[:12]}"
    store = open_store(f"{workspace.storage}/searches/{name}")
    if store.exists("result.json"):
        return from_dict({**json.loads(store.read("result.json")), "reused": True}, workspace)
    with session.session(workspace):
        slots = concurrency(
            _nodes(), workers=base.workers, cpus=base.cpus_per_worker, gpus=base.gpus_per_worker
        )
        slots = min(slots, trials, concurrent or trials)
        run = _open_run(base, space, workspace, store, name, {**plan, "concurrent": slots})
        with run:
            grid = run_all(plan, workspace, run.id, name, slots, on_progress)
            found = read(grid, metric, workspace, base.task, run.id)
            result = conclude(found, space, plan, workspace, run, name, slots, time.perf_counter() - started)
            spent = spending(plan, workspace, name)
            result = dataclasses.replace(result, cpu_hours=spent.cpu_hours, gpu_hours=spent.gpu_hours)
            run.metrics({"cpu_hours": spent.cpu_hours, "gpu_hours": spent.gpu_hours}, step=0)
            sweep(store)
    store.put("result.json", json.dumps(to_dict(result), default=str).encode())
    return result


def concurrency(nodes: Sequence[Mapping[str, float]], *, workers: int, cpus: float, gpus: float) -> int:
    """How many trials of `workers` (0 = one process) x `cpus` and `gpus` fit on the nodes at once.

    A worker lies on one node. Raises ClusterError with both numbers when not even one trial fits."""
    each = {"CPU": cpus, "GPU": gpus}
    wanted = {kind: amount for kind, amount in each.items() if amount > 0}
    slots = sum(
        min((math.floor(node.get(kind, 0.0) / amount + 1e-9) for kind, amount in wanted.items()), default=1)
        for node in nodes
    )
    fit_at_once = slots // max(1, workers)
    if not fit_at_once:
        per = ", ".join(f"{amount:g} {kind}" for kind, amount in wanted.items())
        have = "; ".join(", ".join(f"{node.get(kind, 0.0):g} {kind}" for kind in wanted) for node in nodes)
        raise ClusterError(
            f"a trial needs {max(1, workers)} x {per}, the cluster has room for {slots} such workers (nodes: {have}); "
            "lower train.workers or train.cpus_per_worker, or add nodes"
        )
    return fit_at_once


# -- private --------------------------------------------------------------------------------------------------------


def _prepared(base: TrainJob, workspace: Workspace, metric: str) -> TrainJob:
    """The base job with its data fixed to one version, reporting its objective at every tick."""
    if metric.startswith("val_") and base.validation is None:
        raise ConfigError(
            f"the objective {metric} needs held-out rows; set train.validation.uri and its split"
        )
    # a learner that exports its best weights, not its last, says which figure chose them
    kept = getattr(base.learner, "kept_metric", metric)
    if metric.startswith("val_") and metric != kept:
        raise ConfigError(
            f"the objective {metric} is not what a trial keeps its weights by; use {kept}, or set train.learner.select"
        )
    threads = base.loop.threads or max(1, int(base.cpus_per_worker))  # several trials share the machine
    return dataclasses.replace(
        base,
        data=_pinned(base.data, workspace),
        validation=base.validation and _pinned(base.validation, workspace),
        loop=dataclasses.replace(base.loop, checkpoint_every_ticks=1, threads=threads),
        register_as="",
    )


def _pinned(data: DataConfig, workspace: Workspace) -> DataConfig:
    if not data.uri:
        raise ConfigError("train.data.uri is not set; name a dataset, for example --set train.data.uri=faces")
    uri = workspace.dataset(data.uri)
    found = Dataset.open(uri)
    base = uri.rpartition("@")[0] if found.pinned is not None else uri
    return dataclasses.replace(data, uri=f"{base}@{found.version(found.pinned).number}")


def _open_run(
    base: TrainJob, space: SearchSpace, workspace: Workspace, store: Store, name: str, plan: dict[str, Any]
) -> Run:
    """The MLflow run of the search: the one it was begun with, or a new one."""
    tracker = Tracker.at(workspace)
    if store.exists("run.json"):
        known = json.loads(store.read("run.json"))
        if known["tracking_uri"] == workspace.tracking_uri:
            logger.info("search %s goes on as MLflow run %s", name, known["run_id"])
            return tracker.resume(known["run_id"])
    run = tracker.start(base.task, name, tags={"counterfake.search": name})
    run.params(
        {"base": config.to_dict(base), "search": {k: v for k, v in plan.items() if k not in ("job", "space")}}
    )
    run.json("space.json", _plain(space))
    store.put("run.json", config.canonical_json({"run_id": run.id, "tracking_uri": workspace.tracking_uri}))
    return run


def _nodes() -> list[dict[str, float]]:
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _plain(space: SearchSpace) -> dict[str, Any]:
    return {path: {kind: values} for path in space.settings for kind, values in [space.kind(path)]}
