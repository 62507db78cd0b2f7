"""Train one detector with several seeds and judge each on held-out pictures: mean and standard deviation.

    counterfake run study-detector cifake-32 --set seeds=[0,1,2]
    counterfake run study-detector ciplab --set base.learner.net.weights=FILE --set split=test

A preset of train-detector is a preset here, with its settings under `base.`. The seed changes weights, dropout, augmentation and
the order of the data; the data and the splits stay. Every run is an ordinary training job, so a study that was killed goes on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from counterfake import predictor, scoring
from counterfake.errors import ConfigError
from counterfake.loop import TrainJob
from counterfake.workspace import Workspace
from jobs import train_detector
from jobs.console import Console
from jobs.studies import spread

FIGURES = ("auc", "average_precision", "eer", "accuracy", "recall_real", "recall_fake", "ece", "brier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedStudyJob:
    """One training job, once for every seed."""

    base: TrainJob
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "test"  # that the figures come from; never one that training or validation saw

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2:
            raise ConfigError(f"a standard deviation needs at least two different seeds, got {self.seeds}")
        seen = {self.base.data.split, self.base.validation.split if self.base.validation else ""}
        if self.split in seen or "*" in (self.split, *seen):
            raise ConfigError(
                f"split {self.split} was seen in training or validation; choose another, like test"
            )


def run(job: SeedStudyJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train and judge with every seed; prints the table and returns it with the figures of each run."""
    console = console or Console(quiet=True)
    runs = []
    for number, seed in enumerate(job.seeds, start=1):
        console.stage(f"{number}/{len(job.seeds)}: seed {seed}")
        trained = train_detector.run(seeded(job.base, seed), workspace, console=console)
        figures = _judged(job, trained["bundle"], workspace)
        runs.append({"seed": seed, "name": trained["name"], "bundle": trained["bundle"], **figures})
    lines = spread(runs, FIGURES, "seeds")
    if not console.as_json:
        console.table(
            f"{job.base.name} on {job.split}", list(lines[0]), [list(line.values()) for line in lines]
        )
    return {"table": lines, "runs": runs, "split": job.split}


def seeded(base: TrainJob, seed: int) -> TrainJob:
    """The job of one seed, under a name of its own, registered nowhere."""
    return dataclasses.replace(
        base,
        name=f"{base.name}-seed{seed}",
        loop=dataclasses.replace(base.loop, seed=seed),
        data=dataclasses.replace(base.data, seed=seed),
        register_as="",
    )


PRESETS: dict[str, Callable[[], SeedStudyJob]] = {
    name: functools.partial(lambda make: SeedStudyJob(base=make()), make)
    for name, make in train_detector.PRESETS.items()
}


# -- private --------------------------------------------------------------------------------------------------------


def _judged(job: SeedStudyJob, bundle: str, workspace: Workspace) -> dict[str, float]:
    detector = predictor.load(Path(bundle))
    data = dataclasses.replace(job.base.data, uri=workspace.dataset(job.base.data.uri), split=job.split)
    scored = scoring.score({detector.name: detector}, data, cache=workspace.cache).answered()
    found = scored.evaluate(scored.probabilities[detector.name], threshold=0.5, bootstraps=0, seed=0)
    return {name: float(found[name]["value"]) for name in FIGURES}
