"""What a search found: its trials as they ended, the best of them, how much each setting mattered; kept in MLflow and on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from counterfake.cluster.space import SearchSpace
from counterfake.errors import TrainingError
from counterfake.evaluation.search import search_plot
from counterfake.storage import write_atomic
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace


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


def read(results: Any, metric: str, workspace: Workspace, task: str, parent: str) -> list[Trial]:
    """The trials of Tune's results and of the MLflow runs below `parent`, in the order of their start."""
    runs = _runs(workspace, task, parent)
    return [_trial(result, metric, runs) for result in results]


def conclude(
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


def to_dict(result: SearchResult) -> dict[str, Any]:
    return {**dataclasses.asdict(result), "settings_file": result.settings_file.name}


def from_dict(tree: dict[str, Any], workspace: Workspace) -> SearchResult:
    trials = tuple(Trial(**row) for row in tree["trials"])
    best = Trial(**tree["best"])
    path = _write_settings(best, tree["metric"], workspace, tree["name"])
    return SearchResult(**{**tree, "trials": trials, "best": best, "settings_file": path})


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def reason(error: Any) -> str:
    """The last line that names the error: what a person needs of a remote traceback."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# -- private --------------------------------------------------------------------------------------------------------


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
        error=reason(result.error),
        run=name,
    )


def _write_settings(best: Trial, metric: str, workspace: Workspace, name: str) -> Path:
    path = workspace.home / "searches" / f"{name}.yaml"
    head = f"# {metric} {short(best.value)}: trial {best.name} of {name}\n"
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


def _distribution(kind: str, values: list[Any]) -> Any:
    from optuna import distributions

    if kind == "choice":
        return distributions.CategoricalDistribution(values)
    if kind == "int":
        return distributions.IntDistribution(*values)
    return distributions.FloatDistribution(*values, log=kind == "log")


def _scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
