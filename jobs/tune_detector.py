"""Search a detector's settings with Ray Tune: Optuna proposes, ASHA stops the weak early, each trial is a training run.

The objective is the AUC of the weights that a trial keeps. With `held_out=[MAKER]` no trial trains on that maker's fakes, and
the objective is the worst AUC over the makers of the validation split, the held-out one among them.

    counterfake run tune-detector detector-demo                               2 cores: about 1 min, 4 trials of 100 steps
    counterfake run tune-detector detector-search --set train.data.uri=ciplab \\
        --set train.validation.uri=ciplab --set train.learner.net.weights=FILE     8 cores: about 2 h, 24 trials
    … --set scheduler=pbt --set trials=8              a population: those that lag go on from the best ones' checkpoints
    … --set held_out=[MAKER] --set budget_cpu_hours=20

Result: the trials as nested MLflow runs under one parent, a picture of the search, and `searches/NAME.yaml`, which
`counterfake run train-detector PRESET --settings FILE` takes. The same search again goes on where it was killed; a
space of your own: `--set space_file=FILE`, lines like `learner.lr: {log: [1e-5, 1e-2]}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from counterfake.cluster.space import SearchSpace
from counterfake.config import override
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.learners.detector import DetectorConfig
from counterfake.loop import TrainJob
from counterfake.records import Dataset
from counterfake.versions import fits
from counterfake.workspace import Workspace
from jobs import train_detector
from jobs.console import Console
from jobs.training import both_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneJob:
    """One search around one training job."""

    base: str  # preset of train-detector that the best settings belong to
    train: TrainJob  # every trial, before its own settings
    space: dict[
        str, dict[str, Any]
    ]  # dotted path below `train` -> {"log" | "uniform" | "int" | "choice": values}
    space_file: str = ""  # YAML file that replaces `space`
    trials: int = 8
    held_out: tuple[str, ...] = ()  # makers whose fakes no trial trains on; they stay in the validation split
    metric: str = (
        ""  # of the training ticks; "" = the AUC of the kept weights, with held_out that of the worst maker
    )
    mode: Literal["max", "min"] = "max"
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    grace: float = 0.25  # share of a trial before ASHA may stop it, or between two exchanges of pbt
    reduction: float = 3.0  # ASHA: one trial in so many goes on at each rung
    budget_cpu_hours: float = 0.0  # of all trials together, after which none goes on; 0 = no limit
    budget_gpu_hours: float = 0.0
    concurrent: int = 0  # trials at once, at most; 0 = as many as fit
    seed: int = 0  # of the proposals; training has its own

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"a search needs at least 1 trial, got {self.trials}")


def run(job: TuneJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Search, and return the best settings, all trials, and where the settings file is."""
    from counterfake.cluster.budget import Budget
    from counterfake.cluster.tune import search  # not at import: a preset must not load MLflow

    console = console or Console(quiet=True)
    train = held_out(job.train, job.held_out, workspace) if job.held_out else job.train
    console.event(both_classes([train.data, train.validation], workspace))
    space = SearchSpace.from_file(job.space_file) if job.space_file else SearchSpace(settings=job.space)
    console.stage(
        f"search {', '.join(space.settings)} around {job.base} on {job.train.data.uri}: {job.trials} trials"
    )
    with console.progress("trials", job.trials) as advance:

        def ended(text: str) -> None:
            console.event(text)
            advance(1)

        result = search(
            train,
            space,
            workspace,
            trials=job.trials,
            metric=job.metric or getattr(train.learner, "kept_metric", "val_auc"),
            mode=job.mode,
            scheduler=job.scheduler,
            grace=job.grace,
            reduction=job.reduction,
            budget=Budget(cpu_hours=job.budget_cpu_hours, gpu_hours=job.budget_gpu_hours),
            concurrent=job.concurrent,
            seed=job.seed,
            on_progress=ended,
        )
    console.event(f"use them: counterfake run train-detector {job.base} --settings {result.settings_file}")
    return {
        "name": result.name,
        "run_id": result.run_id,
        "metric": result.metric,
        "best": {"value": result.best.value, "settings": result.best.settings, "run_id": result.best.run_id},
        "settings_file": str(result.settings_file),
        "importance": result.importance,
        "concurrent": result.concurrent,
        "trials": [dataclasses.asdict(trial) for trial in result.trials],
        "seconds": round(result.seconds, 2),
        "cpu_hours": round(result.cpu_hours, 4),
        "gpu_hours": round(result.gpu_hours, 4),
        "reused": result.reused,
    }


def held_out(train: TrainJob, makers: Sequence[str], workspace: Workspace) -> TrainJob:
    """The job without these makers' pictures in training, keeping the weights that judge the worst maker best.

    Raises ConfigError without a validation split, DataError where it has no fakes of one of them."""
    if train.validation is None or not isinstance(train.learner, DetectorConfig):
        raise ConfigError(
            "held_out needs a detector and a validation split to judge it on; set train.validation.uri"
        )
    there = _makers(train.validation, workspace, fakes=True)
    if missing := [maker for maker in makers if maker not in there]:
        raise DataError(
            f"{train.validation.uri} split {train.validation.split} has no fakes of the held-out {missing[0]!r}, only of "
            f"{', '.join(str(maker) for maker in there) or 'nobody'}; name one of these, or split the data by maker"
        )
    kept = [maker for maker in _makers(train.data, workspace) if maker not in makers]
    data = dataclasses.replace(train.data, where={**train.data.where, "maker": kept})
    return dataclasses.replace(
        train, data=data, learner=dataclasses.replace(train.learner, select="worst_auc")
    )


# -- presets --------------------------------------------------------------------------------------------------------


def detector_demo() -> TuneJob:
    """The demo's detector: rate and regularisation, short trials of one core each."""
    return TuneJob(
        base="mobilenetv2-demo",
        train=override(
            train_detector.mobilenetv2_demo(),
            {"name": "tune-demo", "loop.images": 3_200, "loop.tick_steps": 25, "loop.preview_every_ticks": 0},
        ),
        space={
            "learner.lr": {"log": [3e-4, 1e-2]},
            "learner.weight_decay": {"log": [1e-3, 0.3]},
            "learner.label_smoothing": {"choice": [0.0, 0.05, 0.1]},
        },
        trials=4,
    )


def detector_search() -> TuneJob:
    """Fine-tuning from ImageNet weights: how fast head and features move, and how much is held back."""
    return TuneJob(
        base="mobilenetv2-ciplab",
        train=override(train_detector.mobilenetv2_ciplab(), {"name": "tune-detector", "cpus_per_worker": 2}),
        space={
            "learner.lr": {"log": [1e-4, 5e-3]},
            "learner.features_lr_factor": {"log": [0.01, 1.0]},
            "learner.weight_decay": {"log": [1e-3, 0.3]},
            "learner.label_smoothing": {"uniform": [0.0, 0.15]},
            "learner.net.dropout": {"uniform": [0.0, 0.6]},
            "learner.freeze_images": {"int": [0, 6_000]},
            "learner.augmentation.probability": {"uniform": [0.0, 0.5]},
        },
        trials=24,
    )


PRESETS: dict[str, Callable[[], TuneJob]] = {
    "detector-demo": detector_demo,
    "detector-search": detector_search,
}


# -- private --------------------------------------------------------------------------------------------------------


def _makers(data: DataConfig, workspace: Workspace, *, fakes: bool = False) -> list[str | None]:
    """Makers of the rows of a split that data.where allows, of its fakes alone where asked; None = not recorded."""
    if not data.uri:
        raise ConfigError("data.uri is not set; name a dataset, like --set train.data.uri=faces@3")
    dataset = Dataset.open(workspace.dataset(data.uri))
    counts = dataset.version(dataset.pinned).counts
    rules = {k: v for k, v in data.where.items() if k in ("fake", "maker", "identity", "class_id")}
    found = {
        row["maker"]
        for row in counts
        if data.split in ("*", row["split"])
        and (row["fake"] == 1 or not fakes)
        and all(fits(row[k], v) for k, v in rules.items())
    }
    return sorted(found, key=str)
