"""Squared error blurs, an adversary sharpens: the same U-Net paints the next frame of moving digits both ways.

    counterfake run study-blur mse-vs-gan-blur           two runs of 4,000 steps
    counterfake run study-blur mse-vs-gan-blur-smoke     two runs of 60 small steps, to see that it runs

Both numbers are printed, on digits held out: the squared error, which the first should win, and the sharpness (mean gradient
of the painted frame / of the true one; 1 = as sharp as the truth), which the second should. Every run is an ordinary
training job; the study killed and started again goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from counterfake.data import DataConfig
from counterfake.errors import ConfigError
from counterfake.images import Preprocess
from counterfake.learners.next_frame import NextFrameConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator
from counterfake.nets.unet import UNetConfig
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.training import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlurStudyJob:
    """One training job, once for each weight of the adversary."""

    base: TrainJob  # its learner must be a NextFrameConfig; the study sets adversary_weight
    adversary_weights: tuple[float, ...] = (0.0, 0.01)

    def __post_init__(self) -> None:
        if not isinstance(self.base.learner, NextFrameConfig) or self.base.validation is None:
            raise ConfigError("base must be a training job of a NextFrameConfig with a validation split")


def run(job: BlurStudyJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train once per weight; prints and returns error and sharpness of each on held-out digits."""
    console = console or Console(quiet=True)
    rows = []
    for weight in job.adversary_weights:
        result = train(_weighted(job, weight), workspace, console)
        rows.append(
            {
                "adversary weight": weight,
                "squared error": result["metrics"]["val_mse"],
                "sharpness": result["metrics"]["val_sharpness"],
                "run": result["run_id"],
            }
        )
    if not console.as_json:
        console.table("next frame, held-out digits", list(rows[0]), [list(row.values()) for row in rows])
    return {"rows": rows}


# -- presets --------------------------------------------------------------------------------------------------------


def mse_vs_gan_blur() -> BlurStudyJob:
    """Four frames of 64 px in, one out; two digits that turn at random where they meet a border."""
    return BlurStudyJob(base=_base(NextFrameConfig(), batch_size=32, steps=4_000))


def mse_vs_gan_blur_smoke() -> BlurStudyJob:
    """Canvases of 32 px, two frames in, narrow networks."""
    learner = NextFrameConfig(
        net=UNetConfig(size=32, inputs=2, width=8, depth=2),
        adversary=DcganDiscriminator(size=32, channels=3, width=8, dropout=0.0, spectral_norm=True),
    )
    return BlurStudyJob(base=_base(learner, batch_size=16, steps=60))


PRESETS: dict[str, Callable[[], BlurStudyJob]] = {
    "mse-vs-gan-blur": mse_vs_gan_blur,
    "mse-vs-gan-blur-smoke": mse_vs_gan_blur_smoke,
}


# -- private --------------------------------------------------------------------------------------------------------


def _base(learner: NextFrameConfig, *, batch_size: int, steps: int) -> TrainJob:
    data = DataConfig(uri="mnist", batch_size=batch_size, preprocess=Preprocess(size=28, channels=1))
    return TrainJob(
        name="mse-vs-gan-blur",
        task="next_frame",
        data=data,
        validation=dataclasses.replace(data, split="test", batch_size=100),
        learner=learner,
        loop=LoopConfig(
            steps=steps, tick_steps=max(1, steps // 20), checkpoint_every_ticks=10, precision="bf16"
        ),
    )


def _weighted(job: BlurStudyJob, weight: float) -> TrainJob:
    assert isinstance(job.base.learner, NextFrameConfig), "checked when the study was made"
    learner = dataclasses.replace(job.base.learner, adversary_weight=weight)
    return dataclasses.replace(job.base, name=f"{job.base.name}-{weight:g}", learner=learner)
