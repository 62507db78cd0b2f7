"""`search`: Ray Tune over dotted configuration paths. Every trial is an ordinary training job with its own MLflow run.

Optuna proposes and ASHA stops the weak early, or a population exchanges checkpoints (population.py). A trial without
workers trains in its own process; with workers it starts a Ray Train run, and as many trials run at once as really fit, so
that none waits for the CPUs of another. The search's folder `<storage>/searches/<name>` is the state of Tune: the same
search again goes on where it was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from counterfake import config
from counterfake.cluster import population, session
from counterfake.cluster.budget import NO_LIMIT, Budget, Spending, stopper
from counterfake.cluster.space import SearchSpace
from counterfake.cluster.train import fit
from counterfake.data import DataConfig
from counterfake.errors import ClusterError, ConfigError, TrainingError
from counterfake.evaluation.search import search_plot
from counterfake.loop import Tick, TrainJob
from counterfake.records import Dataset
from counterfake.storage import Store, open_store, write_atomic
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace

logger = logging.getLogger(__name__)

Scheduler = Literal["asha", "pbt", "none"]

MAX_FAILURES = 3  # restarts of a crashed trial, each from its last checkpoint
ROUNDS = 3  # of Tune, while the death of a process costs it trials
ENDING_SECONDS = (
    60  # for a stopped trial to end its MLflow run; after 2 s, Tune's own, the next one in its process fails
)

# Tune reads these from the environment only; a value that is there wins.
_FLAGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # it writes to standard output however quiet it is asked to be
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the curves
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # what a killed search forgets
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial as it ended."""

    name: str
    settings: dict[str, Any]  # dotted path -> value
    value: float | None  # the objective at its last report: of the weights it keeps; None = no report
    steps: int
    state: Literal["finished", "stopped early", "failed"]
    run_id: str  # of MLflow, nested under the search
    seconds: float
    error: str = ""
    run: str = ""  # name of its training run; of the last one, where a population exchanged checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a finished search gave."""

    name: str
    run_id: str  # of MLflow: the parent of all trials
    metric: str
    mode: str
    trials: tuple[Trial, ...]  # in the order of their start
    best: Trial
    importance: dict[str, float]  # share of the objective's variance each path explains; {} if too few trials
    settings_file: Path  # the best settings, for `--settings`
    concurrent: int  # trials at once
    seconds: float
    cpu_hours: float = 0.0  # of all trials, from start to last report, restarts included
    gpu_hours: float = 0.0
    reused: bool = False  # the search had been finished before


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
        return _from_dict({**json.loads(store.read("result.json")), "reused": True}, workspace)
    with session.session(workspace):
        slots = concurrency(
            _nodes(), workers=base.workers, cpus=base.cpus_per_worker, gpus=base.gpus_per_worker
        )
        slots = min(slots, trials, concurrent or trials)
        run = _open_run(base, space, workspace, store, name, {**plan, "concurrent": slots})
        with run, _listening(name, on_progress):
            grid = _tuned(plan, workspace, run.id, name, slots)
            runs = _runs(workspace, base.task, run.id)
            found = [_trial(result, metric, runs) for result in grid]
            result = _conclude(found, space, plan, workspace, run, name, slots, time.perf_counter() - started)
            spent = _spending(plan, workspace, name)
            result = dataclasses.replace(result, cpu_hours=spent.cpu_hours, gpu_hours=spent.gpu_hours)
            run.metrics({"cpu_hours": spent.cpu_hours, "gpu_hours": spent.gpu_hours}, step=0)
            _sweep(store)
    store.put("result.json", json.dumps(_to_dict(result), default=str).encode())
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


def winner(trials: Sequence[Trial], mode: str) -> Trial:
    """The best of those that ran to their end; of those stopped early only where there is no other.

    Values after different durations do not compare, and a trial that was stopped left no bundle."""
    measured = [t for t in trials if t.value is not None and t.state != "failed"]
    sign = 1 if mode == "max" else -1
    rivals = [t for t in measured if t.state == "finished"] or measured
    return max(rivals, key=lambda t: (sign * (t.value or 0.0), t.steps))


def importance(
    space: SearchSpace, settings: Sequence[Mapping[str, Any]], values: Sequence[float]
) -> dict[str, float]:
    """Share of the objective's variance that each path explains (fANOVA by Optuna); {} when that cannot be said."""
    if len(values) < 4 or len(set(values)) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {path: _distribution(*space.kind(path)) for path in space.settings}
    study = optuna.create_study()
    for row, value in zip(settings, values, strict=True):
        study.add_trial(optuna.create_trial(params=dict(row), distributions=distributions, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return {
        k: float(v) for k, v in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
    }


# -- private: before ------------------------------------------------------------------------------------------------


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


# -- private: Tune --------------------------------------------------------------------------------------------------


def _tuned(plan: dict[str, Any], workspace: Workspace, parent: str, name: str, slots: int) -> Any:
    """Tune's results, when no trial is lost to the death of a process any more, or after ROUNDS.

    Tune 2.60 counts the death of a process that it has just handed to a trial twice: first it begins the trial again,
    then it gives it up, though it has restarts left. The trial then waits for the end of the others."""
    from ray.exceptions import RayActorError

    for left in reversed(range(ROUNDS)):
        grid = _tuner(plan, workspace, parent, name, slots).fit()
        lost = sum(isinstance(result.error, RayActorError) for result in grid)
        if not (lost and left):
            break
        logger.warning("%d trials of %s lost their process and go on", lost, name)
    return grid


def _tuner(
    plan: dict[str, Any],
    workspace: Workspace,
    parent: str,
    name: str,
    slots: int,
) -> Any:
    """A new Tuner, or the one that was killed, from the state it left."""
    for key, value in _FLAGS.items():
        os.environ.setdefault(key, value)
    from ray import tune

    order = {**plan, "workspace": config.to_dict(workspace), "parent": parent, "name": name}
    trainable = tune.with_resources(tune.with_parameters(_run_trial, order=order), _resources(plan["job"]))
    filesystem, root = open_store(f"{workspace.storage}/searches").filesystem()
    if tune.Tuner.can_restore(f"{root}/{name}", storage_filesystem=filesystem):
        logger.info("search %s goes on from what it left", name)
        return tune.Tuner.restore(
            f"{root}/{name}",
            trainable,
            resume_errored=True,
            storage_filesystem=filesystem,
            param_space=_domains(plan),
        )
    return tune.Tuner(
        trainable,
        param_space=_domains(plan),
        tune_config=tune.TuneConfig(
            metric=plan["metric"],
            mode=plan["mode"],
            num_samples=plan["trials"],
            search_alg=_searcher(plan, slots),
            scheduler=_scheduler(plan),
            trial_dirname_creator=_trial_id,
            reuse_actors=True,  # importing torch and MLflow takes longer than a small trial
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[_teller(name, plan["metric"])],
            stop=stopper(_spending(plan, workspace, name)),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=_copies(plan, workspace)),
            verbose=0,
        ),
    )


def _run_trial(sampled: dict[str, Any], order: dict[str, Any]) -> None:
    """One trial: the base job with the sampled settings, to its end, in a process of Tune."""
    from ray import tune

    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(ENDING_SECONDS))
    trial = tune.get_context().get_trial_id()
    name = f"{order['name']}-{trial}"
    job = config.override(config.from_dict(TrainJob, order["job"]), {**sampled, "name": name})
    workspace = config.from_dict(Workspace, order["workspace"])
    exchanging = order["scheduler"] == "pbt"
    if exchanging:
        job = population.begin(job, sampled, trial, workspace)
    ended = False  # whether Tune knows of its end; with workers it is told here once more

    def tell(tick: Tick) -> None:
        nonlocal ended
        figures = {**tick.figures, "run": job.name}
        if order["metric"] not in tick.metrics:
            return
        ended = tick.last
        if exchanging:
            population.report(tick, figures, job, sampled, trial, workspace)
        else:
            tune.report(figures)

    if job.workers:
        from ray.tune.integration.ray_train import TuneReportCallback

        result = fit(job, workspace, parent_run=order["parent"], callbacks=[TuneReportCallback()])
    else:
        result = fit(job, workspace, parent_run=order["parent"], on_progress=tell)
    if not ended and order["metric"] in result.metrics:  # trained to its end before the search was killed
        tune.report(
            {
                **result.metrics,
                "step": result.steps,
                "images": result.images,
                "epoch": job.loop.epochs,
                "last": True,
                "run": job.name,
            }
        )


def _resources(job: Mapping[str, Any]) -> Any:
    """What Tune reserves. A trial with workers holds next to nothing itself: Ray Train reserves the CPUs."""
    from ray.tune import PlacementGroupFactory

    if job["workers"]:
        return PlacementGroupFactory([{"memory": 1.0}])  # one byte; an empty reservation is refused
    gpus = {"GPU": job["gpus_per_worker"]} if job["gpus_per_worker"] else {}
    return PlacementGroupFactory([{"CPU": job["cpus_per_worker"], **gpus}])


def _domains(plan: Mapping[str, Any]) -> dict[str, Any]:
    from ray import tune

    space = SearchSpace(settings=plan["space"])
    make: dict[str, Callable[[list[Any]], Any]] = {
        "log": lambda v: tune.loguniform(*v),
        "uniform": lambda v: tune.uniform(*v),
        "int": lambda v: tune.randint(v[0], v[1] + 1),
        "choice": tune.choice,
    }
    return {path: make[kind](values) for path in space.settings for kind, values in [space.kind(path)]}


def _searcher(plan: Mapping[str, Any], slots: int) -> Any:
    if plan["scheduler"] == "pbt":  # it proposes by itself, after a random start
        from ray.tune.search import BasicVariantGenerator

        return BasicVariantGenerator(random_state=plan["seed"])
    import optuna
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=plan["seed"], n_startup_trials=max(3, plan["trials"] // 4))
    return ConcurrencyLimiter(OptunaSearch(sampler=sampler), max_concurrent=slots)


def _scheduler(plan: Mapping[str, Any]) -> Any:
    """ASHA or PBT, counting in the unit of the job's own duration, so that trials with other batch sizes compare.

    The last report of a trial never stops it: its bundle is still to be written."""
    from ray.tune import schedulers

    if plan["scheduler"] == "none":
        return schedulers.FIFOScheduler()
    kind: Any = {"asha": schedulers.ASHAScheduler, "pbt": schedulers.PopulationBasedTraining}[
        plan["scheduler"]
    ]

    class UntilTheLast(kind):  # type: ignore[misc]
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if result.get("last"):
                return str(schedulers.TrialScheduler.CONTINUE)
            return str(super().on_trial_result(tune_controller, trial, result))

    loop = plan["job"]["loop"]
    unit, length = next(
        (u, loop[k]) for u, k in (("step", "steps"), ("epoch", "epochs"), ("images", "images")) if loop[k]
    )
    if plan["scheduler"] == "asha":
        return UntilTheLast(
            time_attr=unit,
            max_t=length,
            grace_period=plan["grace"] * length,
            reduction_factor=plan["reduction"],
        )
    space = SearchSpace(settings=plan["space"])
    return UntilTheLast(
        time_attr=unit,
        perturbation_interval=plan["grace"] * length,
        hyperparam_mutations=population.mutations(space, _domains(plan)),
        quantile_fraction=population.QUANTILE,
        custom_explore_fn=space.within,
        log_config=False,
    )


def _spending(plan: Mapping[str, Any], workspace: Workspace, name: str) -> Spending:
    # not in the search's own folder: a restored Tune puts back every file that it found there
    uri = f"{workspace.storage}/spending/{name}"
    return Spending.of(uri, Budget(**plan["budget"]), config.from_dict(TrainJob, plan["job"]))


def _copies(plan: Mapping[str, Any], workspace: Workspace) -> int | None:
    if plan["scheduler"] != "pbt":
        return None  # Tune is given no checkpoints
    return population.kept_checkpoints(
        config.from_dict(TrainJob, plan["job"]), plan["grace"], workspace.cache
    )


def _sweep(store: Store) -> None:
    """Delete the copies of checkpoints that a population exchanged; each run has its own."""
    for entry in list(store.list()):
        if "/checkpoint_" in entry.key:
            store.delete(entry.key)


def _trial_id(trial: Any) -> str:
    return str(trial.trial_id)


_listeners: dict[
    str, Callable[[str], None]
] = {}  # by search; Tune pickles its callbacks, a console cannot be


@contextlib.contextmanager
def _listening(search: str, on_progress: Callable[[str], None] | None) -> Iterator[None]:
    if on_progress is not None:
        _listeners[search] = on_progress
    try:
        yield
    finally:
        _listeners.pop(search, None)


def _tell(search: str, text: str) -> None:
    if search in _listeners:
        _listeners[search](text)


def _teller(search: str, metric: str) -> Any:
    from ray.tune import Callback

    class Teller(Callback):
        """One line per finished trial."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            done = 1 + sum(t.status == t.TERMINATED for t in trials if t is not trial)
            last = trial.last_result or {}
            said = ", ".join(f"{path}={_short(value)}" for path, value in trial.config.items())
            after = f"after step {last.get('step', 0)} ({said})"
            _tell(search, f"trial {done}: {metric} {_short(last.get(metric))} {after}")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _tell(search, f"trial {trial.trial_id} failed: {_reason(trial.get_error())}")

    return Teller()


# -- private: after -------------------------------------------------------------------------------------------------


def _runs(workspace: Workspace, task: str, parent: str) -> dict[str, dict[str, Any]]:
    """MLflow's view of the trials by name, of two runs the newer; one stopped from outside could not end its run itself."""
    tracker = Tracker.at(workspace)
    found: dict[str, dict[str, Any]] = {}
    for run_id in tracker.find(task, {"mlflow.parentRunId": parent}):
        run = tracker.read(run_id)
        if run["status"] == "RUNNING":
            Run(workspace.tracking_uri, run_id).finish("KILLED")
        found.setdefault(run["name"], run)  # whoever was killed before it wrote down its run began another
    return found


def _trial(result: Any, metric: str, runs: Mapping[str, Mapping[str, Any]]) -> Trial:
    last = result.metrics or {}
    trial_id = str(last.get("trial_id") or Path(result.path).name)
    name = last.get("run") or next((name for name in runs if name.endswith(f"-{trial_id}")), "")
    run = runs.get(name)
    value = last.get(metric)
    finished = run is not None and run["status"] == "FINISHED"
    return Trial(
        name=trial_id,
        settings={path: _scalar(v) for path, v in (result.config or {}).items()},
        value=float(value) if value is not None and math.isfinite(value) else None,
        steps=int(last.get("step", 0)),
        state="failed" if result.error is not None else "finished" if finished else "stopped early",
        run_id=run["run_id"] if run else "",
        seconds=float(last.get("time_total_s", 0.0)),
        error=_reason(result.error),
        run=name,
    )


def _conclude(
    found: list[Trial],
    space: SearchSpace,
    plan: Mapping[str, Any],
    workspace: Workspace,
    run: Run,
    name: str,
    slots: int,
    seconds: float,
) -> SearchResult:
    measured = [t for t in found if t.value is not None and t.state != "failed"]
    if not measured:
        reason = next((t.error for t in found if t.error), f"no trial reported {plan['metric']}")
        raise TrainingError(f"all {len(found)} trials of {name} failed; the first: {reason}")
    best = winner(measured, plan["mode"])
    weights = importance(
        space, [t.settings for t in measured], [t.value for t in measured if t.value is not None]
    )
    result = SearchResult(
        name=name,
        run_id=run.id,
        metric=plan["metric"],
        mode=plan["mode"],
        trials=tuple(found),
        best=best,
        importance=weights,
        settings_file=_write_settings(best, plan["metric"], workspace, name),
        concurrent=slots,
        seconds=seconds,
    )
    _log(result, space, run)
    return result


def _write_settings(best: Trial, metric: str, workspace: Workspace, name: str) -> Path:
    path = workspace.home / "searches" / f"{name}.yaml"
    head = f"# {metric} {_short(best.value)}: trial {best.name} of {name}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (head + yaml.safe_dump(best.settings, sort_keys=True)).encode())
    return path


def _log(result: SearchResult, space: SearchSpace, run: Run) -> None:
    picture = search_plot(
        [t.settings for t in result.trials],
        [t.value for t in result.trials],
        objective=result.metric,
        maximise=result.mode == "max",
        logarithmic=space.logarithmic,
        importance=result.importance,
    )
    run.picture("search", picture)
    run.json("trials.json", [dataclasses.asdict(t) for t in result.trials])
    run.file(result.settings_file)
    run.metrics({f"best_{result.metric}": result.best.value or 0.0, "trials": len(result.trials)}, step=0)
    run.metrics({f"importance.{path}": share for path, share in result.importance.items()}, step=0)
    run.params({"best": result.best.settings})


def _to_dict(result: SearchResult) -> dict[str, Any]:
    return {**dataclasses.asdict(result), "settings_file": result.settings_file.name}


def _from_dict(tree: dict[str, Any], workspace: Workspace) -> SearchResult:
    trials = tuple(Trial(**row) for row in tree["trials"])
    best = Trial(**tree["best"])
    path = _write_settings(best, tree["metric"], workspace, tree["name"])
    return SearchResult(**{**tree, "trials": trials, "best": best, "settings_file": path})


def _plain(space: SearchSpace) -> dict[str, Any]:
    return {path: {kind: values} for path in space.settings for kind, values in [space.kind(path)]}


def _distribution(kind: str, values: list[Any]) -> Any:
    from optuna import distributions

    if kind == "choice":
        return distributions.CategoricalDistribution(values)
    if kind == "int":
        return distributions.IntDistribution(*values)
    return distributions.FloatDistribution(*values, log=kind == "log")


def _scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _reason(error: Any) -> str:
    """The last line that names the error: what a person needs of a remote traceback."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
