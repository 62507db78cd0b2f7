"""Squared error blurs, an adversary sharpens: the same U-Net paints the next frame of moving digits both ways.

    counterfake run train-classifier mnist               once: the network whose features judge the frames
    counterfake run study-blur mse-vs-gan-blur           two runs of 4,000 steps
    counterfake run study-blur mse-vs-gan-blur-smoke     two runs of 60 small steps, to see that it runs

Three numbers are printed, on digits held out: the squared error, which the first should win; the sharpness (mean gradient of
the painted frame / of the true one; 1 = as sharp as the truth), which the second should; and the FID of painted against true
frames, by the features of a classifier of digits that reads each frame shrunk to its 28 px: a figure of this study, not one
of the papers. Every run is an ordinary training job, nested below the study's; the study killed and started again goes on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterfake import arrays, images
from counterfake import bundle as bundles
from counterfake.data import DataConfig
from counterfake.errors import ConfigError
from counterfake.evaluation import generation, report
from counterfake.extractor import BundleExtractor, Extractor, ExtractorConfig
from counterfake.images import Preprocess
from counterfake.learners.next_frame import NextFrameConfig, moving_digits
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator
from counterfake.nets.unet import UNetConfig
from counterfake.workspace import Workspace
from jobs import evaluate
from jobs.console import Console
from jobs.studies import study
from jobs.training import train

BATCH = 100  # films painted at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlurStudyJob:
    """One training job, once for each weight of the adversary."""

    base: TrainJob  # its learner must be a NextFrameConfig; the study sets adversary_weight
    adversary_weights: tuple[float, ...] = (0.0, 0.01)
    frames: int = 5_000  # painted, and true ones, that the FID is of; at most the pictures of base.validation
    extractor: ExtractorConfig = dataclasses.field(default_factory=BundleExtractor)
    seed: int = 0  # of the motion in those

    def __post_init__(self) -> None:
        if not isinstance(self.base.learner, NextFrameConfig) or self.base.validation is None:
            raise ConfigError("base must be a training job of a NextFrameConfig with a validation split")
        if not self.adversary_weights or self.frames < 2:
            raise ConfigError("a study needs one adversary weight or more, and frames of 2 or more")


def run(job: BlurStudyJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train once per weight; prints and returns error, sharpness and FID of each on held-out digits."""
    console = console or Console(quiet=True)
    judge = _Judge(job, workspace)  # a judge that is missing is told before anything is trained
    with study(job, job.base.name, workspace) as kept:
        rows = [_row(job, weight, judge, workspace, kept.run_id, console) for weight in job.adversary_weights]
        found = {
            "rows": rows,
            "extractor": judge.extractor.name,
            "sha256": judge.extractor.sha256,
            "side": judge.extractor.size,
        }
        result = kept.keep(found, {"blur": plot(rows)})
    if not console.as_json:
        title = f"next frame, held-out digits; FID by {judge.extractor.name} at {judge.extractor.size} px"
        console.table(title, list(rows[0]), [list(row.values()) for row in rows])
    return result


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is printed below the table."""
    return {name: result[name] for name in ("extractor", "run_id", "file")}


def plot(rows: list[dict[str, Any]]) -> bytes:
    """Sharpness against squared error, a point for each weight; PNG."""
    points = {
        f"weight {row['adversary weight']:g}": [(row["squared error"], row["sharpness"])] for row in rows
    }
    return report.curves_plot(
        points, x="squared error", y="sharpness", title="what the adversary costs and gives"
    )


@torch.inference_mode()
def frames(
    bundle: Path, settings: NextFrameConfig, digits: NDArray[np.uint8], seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """digits (N, h, w, 1) in motion -> the next frame of each film as the bundle's network paints it, and as it is: (N, H, W, 1).

    The motion is that of `seed` for every network, and another one in each batch."""
    net = bundles.load_nets(bundles.read(bundle))["next_frame"]
    source = torch.Generator().manual_seed(seed)
    painted, true = [], []
    for part in torch.split(torch.from_numpy(digits).permute(0, 3, 1, 2), BATCH):
        film = moving_digits(
            images.to_float(part), frames=settings.net.inputs + 1, size=settings.net.size, digits=settings.digits,
            speed=settings.speed, source=source,
        )  # fmt: skip
        painted.append(images.to_uint8(net(film[:, :-1])))
        true.append(images.to_uint8(film[:, -1:]))
    made, real = (torch.cat(parts).permute(0, 2, 3, 1).numpy() for parts in (painted, true))
    return made, real


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


class _Judge:
    """The extractor, and the held-out digits whose films are judged."""

    def __init__(self, job: BlurStudyJob, workspace: Workspace) -> None:
        assert job.base.validation is not None, "checked when the study was made"
        self._job = job
        find = functools.partial(evaluate.resolve, workspace=workspace)
        self.extractor: Extractor = job.extractor.load(find, torch.device("cpu"))
        data = dataclasses.replace(job.base.validation, uri=workspace.dataset(job.base.validation.uri))
        self._digits = arrays.load(data, limit=job.frames, cache=workspace.cache).pixels

    def fid(self, bundle: Path) -> float:
        """Of the painted frames against the true ones."""
        assert isinstance(self._job.base.learner, NextFrameConfig), "checked when the study was made"
        made, real = frames(bundle, self._job.base.learner, self._digits, self._job.seed)
        ours, true = (generation.moments(self.extractor(pictures).values) for pictures in (made, real))
        return generation.frechet_distance(true, ours)


def _row(
    job: BlurStudyJob, weight: float, judge: _Judge, workspace: Workspace, parent: str, console: Console
) -> dict[str, Any]:
    """Train with one weight -> its figures."""
    result = train(_weighted(job, weight), workspace, console, parent_run=parent)
    return {
        "adversary weight": weight,
        "squared error": result["metrics"]["val_mse"],
        "sharpness": result["metrics"]["val_sharpness"],
        "FID": judge.fid(Path(result["bundle"])),
        "run": result["run_id"],
    }


def _weighted(job: BlurStudyJob, weight: float) -> TrainJob:
    assert isinstance(job.base.learner, NextFrameConfig), "checked when the study was made"
    learner = dataclasses.replace(job.base.learner, adversary_weight=weight)
    return dataclasses.replace(job.base, name=f"{job.base.name}-{weight:g}", learner=learner)
