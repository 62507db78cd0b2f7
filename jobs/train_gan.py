"""Train a generator of pictures against a discriminator.

    counterfake run ingest mnist --set source.path=FOLDER      once; the four MNIST files, gzipped or not
    counterfake run train-gan dcgan-mnist-s4 --workers 2       the article's recipe, 50 epochs of 60,000 digits
    counterfake run train-gan dcgan-mnist-smoke                200 small steps, to see that it runs
    counterfake run train-gan dcgan-faces-demo                 32 px faces of `faces-demo`, as in `make demo`
    counterfake run train-gan dcgan-faces-64 --set workers=4 --set gpus_per_worker=1

Hardware: any. The step alone does 700 to 770 digits/s on 2 cores (1,190 in bf16), so an epoch of MNIST takes a minute or
more; 3 epochs on 2 busy workers took 7 minutes (EXPERIMENTS). Expected of dcgan-mnist-s4: both accuracies of the
discriminator drift towards 50 %; after 3 epochs no digit can be read. The article's 50 were not run yet.
The generator is exported as a bundle, the 4 x 4 grids are in MLflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from counterfake.data import DataConfig
from counterfake.images import Preprocess
from counterfake.learners.gan import GanConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.training import train

DIGITS = Preprocess(size=28, channels=1)


def run(job: TrainJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train, export, and register where `register_as` is set; returns the figures of the run."""
    return train(job, workspace, console)


# -- presets --------------------------------------------------------------------------------------------------------


def dcgan_mnist_s4() -> TrainJob:
    """The article's DCGAN: MNIST, batch 256 with the last 96 kept, 50 epochs, a checkpoint every 5."""
    return TrainJob(
        name="dcgan-mnist-s4",
        task="gan",
        data=DataConfig(uri="mnist", batch_size=256, preprocess=DIGITS, drop_last=False),
        learner=GanConfig(),  # its defaults are the article's networks, loss and optimizers
        loop=LoopConfig(epochs=50, tick_steps=0, checkpoint_every_ticks=5),
    )


def dcgan_mnist_smoke() -> TrainJob:
    """The article's networks for 200 steps of 64 digits: shapes that might become digits."""
    return TrainJob(
        name="dcgan-mnist-smoke",
        task="gan",
        data=DataConfig(uri="mnist", batch_size=64, preprocess=DIGITS),
        learner=GanConfig(g_lr=2e-4, d_lr=2e-4, g_betas=(0.5, 0.999), d_betas=(0.5, 0.999)),
        loop=LoopConfig(steps=200, tick_steps=50, precision="bf16"),
    )


def dcgan_faces_64() -> TrainJob:
    """64 px faces from real pictures only; two million pictures, an averaged generator."""
    return TrainJob(
        name="dcgan-faces-64",
        task="gan",
        data=_real_faces("faces", size=64, batch_size=128),
        learner=_faces(size=64, width=64, halflife=10_000),
        loop=LoopConfig(images=2_000_000, tick_steps=200, checkpoint_every_ticks=5, precision="bf16"),
        register_as="dcgan-faces",
    )


def dcgan_faces_demo() -> TrainJob:
    """32 px faces in about a minute and a half on two workers of one core each."""
    return TrainJob(
        name="dcgan-faces-demo",
        task="gan",
        data=_real_faces("faces-demo", size=32, batch_size=64),
        learner=_faces(size=32, width=32, halflife=2_000),
        loop=LoopConfig(steps=900, tick_steps=50, preview_every_ticks=6, precision="bf16", threads=1),
        workers=2,
        cpus_per_worker=0.5,
        register_as="dcgan-faces",
    )


PRESETS: dict[str, Callable[[], TrainJob]] = {
    "dcgan-mnist-s4": dcgan_mnist_s4,
    "dcgan-mnist-smoke": dcgan_mnist_smoke,
    "dcgan-faces-64": dcgan_faces_64,
    "dcgan-faces-demo": dcgan_faces_demo,
}


# -- private --------------------------------------------------------------------------------------------------------


def _real_faces(uri: str, *, size: int, batch_size: int) -> DataConfig:
    return DataConfig(
        uri=uri, batch_size=batch_size, preprocess=Preprocess(size=size, crop="center"), where={"fake": 0}
    )


def _faces(*, size: int, width: int, halflife: int) -> GanConfig:
    """Radford et al. 2015: Adam 2e-4 with beta1 0.5; LeakyReLU 0.2. Spectral norm keeps D from winning early."""
    return GanConfig(
        generator=DcganGenerator(size=size, channels=3, width=width, slope=0.2, bn_momentum=0.1),
        discriminator=DcganDiscriminator(
            size=size, channels=3, width=width, slope=0.2, dropout=0.0, spectral_norm=True
        ),
        g_lr=2e-4,
        d_lr=2e-4,
        g_betas=(0.5, 0.999),
        d_betas=(0.5, 0.999),
        ema_halflife_images=halflife,
    )
