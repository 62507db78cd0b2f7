"""The trials of a search under Ray Tune: Optuna proposes, ASHA stops the weak early or a population exchanges checkpoints.

A trial is an ordinary training job: without workers it trains in a process of Tune, with workers it starts a Ray Train run
from there. The folder `<storage>/searches/<name>` is Tune's state, from which a killed search goes on. A `plan` says what is
asked: job, space, trials, metric, mode, scheduler, grace, reduction, seed, budget; all JSON, because each trial is sent it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from counterfake import config
from counterfake.cluster import population
from counterfake.cluster.budget import Budget, Spending, stopper
from counterfake.cluster.findings import reason, short
from counterfake.cluster.space import SearchSpace
from counterfake.cluster.train import fit
from counterfake.loop import Tick, TrainJob
from counterfake.storage import Store, open_store
from counterfake.workspace import Workspace

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # restarts of a crashed trial, each from its last checkpoint
ROUNDS = 3  # of Tune, while the death of a process costs it trials
ENDING_SECONDS = 60  # for a stopped trial to end its MLflow run; Tune's 2 s cost the next one in its process

# Tune reads these from the environment only; a value that is there wins.
_FLAGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # it writes to standard output however quiet it is asked to be
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the curves
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # what a killed search forgets
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_all(
    plan: dict[str, Any],
    workspace: Workspace,
    parent: str,
    name: str,
    slots: int,
    on_progress: Callable[[str], None] | None,
) -> Any:
    """Tune's results, when no trial is lost to the death of a process any more, or after ROUNDS.

    parent: MLflow run of the search; slots: trials at once; on_progress is told of each trial that ends.
    Tune 2.60 counts the death of a process that it has just handed to a trial twice: first it begins the trial again,
    then it gives it up, though it has restarts left. The trial then waits for the end of the others."""
    from ray.exceptions import RayActorError

    with _listening(name, on_progress):
        for left in reversed(range(ROUNDS)):
            grid = _tuner(plan, workspace, parent, name, slots).fit()
            lost = sum(isinstance(result.error, RayActorError) for result in grid)
            if not (lost and left):
                break
            logger.warning("%d trials of %s lost their process and go on", lost, name)
    return grid


def spending(plan: Mapping[str, Any], workspace: Workspace, name: str) -> Spending:
    """What the search `name` has spent, also before it was killed."""
    # not in the search's own folder: a restored Tune puts back every file that it found there
    uri = f"{workspace.storage}/spending/{name}"
    return Spending.of(uri, Budget(**plan["budget"]), config.from_dict(TrainJob, plan["job"]))


def sweep(store: Store) -> None:
    """Delete the copies of checkpoints that a population exchanged; each run has its own."""
    for entry in list(store.list()):
        if "/checkpoint_" in entry.key:
            store.delete(entry.key)


# -- private --------------------------------------------------------------------------------------------------------


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
            stop=stopper(spending(plan, workspace, name)),
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


def _copies(plan: Mapping[str, Any], workspace: Workspace) -> int | None:
    if plan["scheduler"] != "pbt":
        return None  # Tune is given no checkpoints
    return population.kept_checkpoints(
        config.from_dict(TrainJob, plan["job"]), plan["grace"], workspace.cache
    )


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
            said = ", ".join(f"{path}={short(value)}" for path, value in trial.config.items())
            after = f"after step {last.get('step', 0)} ({said})"
            _tell(search, f"trial {done}: {metric} {short(last.get(metric))} {after}")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _tell(search, f"trial {trial.trial_id} failed: {reason(trial.get_error())}")

    return Teller()
