"""Search a detector's settings with Ray Tune: Optuna proposes, ASHA stops the weak early, each trial is a training run.

    counterfake run tune-detector detector-demo                               2 cores: about 1 min, 4 trials of 100 steps
    counterfake run tune-detector detector-search --set train.data.uri=ciplab \\
        --set train.validation.uri=ciplab --set train.learner.net.weights=FILE     8 cores: about 2 h, 24 trials

Result: the trials as nested MLflow runs under one parent, a picture of the search, and `searches/NAME.yaml`, which
`counterfake run train-detector PRESET --settings FILE` takes. The same search again goes on where it was killed; a
space of your own: `--set space_file=FILE`, lines like `learner.lr: {log: [1e-5, 1e-2]}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from counterfake.cluster.space import SearchSpace
from counterfake.config import override
from counterfake.errors import ConfigError
from counterfake.loop import TrainJob
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
    metric: str = "val_auc"  # of the training ticks
    mode: Literal["max", "min"] = "max"
    grace: float = 0.25  # share of a trial before it may be stopped
    reduction: float = 3.0  # one trial in so many goes on at each rung
    concurrent: int = 0  # trials at once, at most; 0 = as many as fit
    seed: int = 0  # of the proposals; training has its own

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"a search needs at least 1 trial, got {self.trials}")


def run(job: TuneJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Search, and return the best settings, all trials, and where the settings file is."""
    from counterfake.cluster.tune import search  # not at import: a preset must not load MLflow

    console = console or Console(quiet=True)
    console.event(both_classes([job.train.data, job.train.validation], workspace))
    space = SearchSpace.from_file(job.space_file) if job.space_file else SearchSpace(settings=job.space)
    console.stage(
        f"search {', '.join(space.settings)} around {job.base} on {job.train.data.uri}: {job.trials} trials"
    )
    result = search(
        job.train,
        space,
        workspace,
        trials=job.trials,
        metric=job.metric,
        mode=job.mode,
        grace=job.grace,
        reduction=job.reduction,
        concurrent=job.concurrent,
        seed=job.seed,
        on_progress=console.event,
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
        "reused": result.reused,
    }


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
