"""Train a classifier of small pictures, whose features judge generators (`evaluate-generator`).

    counterfake run ingest mnist --set source.path=FOLDER      once; the four MNIST files
    counterfake run train-classifier mnist                     60,000 digits, 4 epochs, registered as mnist-classifier
    counterfake run train-classifier fashion-mnist             the same network on clothes
    counterfake run train-classifier mnist-smoke               200 steps, to see that it runs

Hardware: any. On one thread of 2 busy cores mnist took 270 s; expected: `val_accuracy` 0.994 after 4 epochs.
The digest of its bundle names the extractor: figures taken with another one are refused. `val_accuracy` is measured on the
test split at every checkpoint and chooses nothing; the weights are those of the last step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from counterfake.data import DataConfig
from counterfake.images import Preprocess
from counterfake.learners.classifier import ClassifierConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.training import train


def run(job: TrainJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train, measure on the held-out split, export and register; returns the figures of the run."""
    return train(job, workspace, console)


# -- presets --------------------------------------------------------------------------------------------------------


def mnist() -> TrainJob:
    """Digits: the extractor behind every figure of the MNIST generators."""
    data = DataConfig(uri="mnist", batch_size=128, preprocess=Preprocess(size=28, channels=1))
    return TrainJob(
        name="mnist-classifier",
        task="classifier",
        data=data,
        validation=dataclasses.replace(data, split="test", batch_size=500),
        learner=ClassifierConfig(),
        loop=LoopConfig(epochs=4, tick_steps=0),
        register_as="mnist-classifier",
    )


def fashion_mnist() -> TrainJob:
    """Clothes, ten kinds."""
    job = mnist()
    return dataclasses.replace(
        job,
        name="fashion-mnist-classifier",
        data=dataclasses.replace(job.data, uri="fashion-mnist"),
        validation=dataclasses.replace(job.data, uri="fashion-mnist", split="test", batch_size=500),
        loop=LoopConfig(epochs=8, tick_steps=0),
        register_as="fashion-mnist-classifier",
    )


def mnist_smoke() -> TrainJob:
    """200 steps of 64 digits."""
    job = mnist()
    return dataclasses.replace(
        job,
        name="mnist-classifier-smoke",
        data=dataclasses.replace(job.data, batch_size=64),
        loop=LoopConfig(steps=200, tick_steps=100),
        register_as="",
    )


PRESETS: dict[str, Callable[[], TrainJob]] = {
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "mnist-smoke": mnist_smoke,
}
