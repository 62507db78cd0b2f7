"""Train a generator of pictures against a discriminator.

    counterfake run ingest mnist --set source.path=FOLDER      once; the four MNIST files, gzipped or not
    counterfake run train-gan dcgan-mnist-s4 --workers 2       the article's recipe, 50 epochs of 60,000 digits
    counterfake run train-gan gan-dense-mnist                  the dense GAN of the articles, 400 epochs
    counterfake run train-gan gan-conditional                  a digit that is asked for; gan-conditional-512: by a vector
    counterfake run train-gan sngan-mnist                      the modern settings on digits; also sngan-fashion-mnist
    counterfake run train-gan sngan-anime-64                   little data: DiffAugment; sngan-ffhq-64, sngan-faces-64
    counterfake run train-gan dcgan-mnist-smoke                any NAME-smoke: small and short, to see that it runs
    counterfake run train-gan dcgan-faces-demo                 32 px faces of `faces-demo`, as in `make demo`
    counterfake run train-gan dcgan-faces-64 --set workers=4 --set gpus_per_worker=1

Hardware: any. Two quiet cores do 950 digits/s of the article's DCGAN in fp32 and 1,390 with --set loop.precision=bf16, so its
50 epochs of MNIST are 53 or 36 minutes of steps. Expected of dcgan-mnist-s4: both accuracies of the discriminator drift
towards 50 %; after 3 epochs no digit can be read, after 30 most can (FID 485 by mnist-classifier; 214 after 50).
`sngan-mnist` takes 44 minutes of one core in bf16 for its 600,000 digits; FID 24.7, 97.6 % of its samples are the digit
asked for. The 64 px SNGANs do 32 pictures/s on one core: their two million are for a GPU, and have no figures yet.
The generator is exported as a bundle. MLflow has a grid of samples for each preview and, where a tick is an epoch, a GIF
of them and the article's image_at_epoch_0001.png …, all marked as generated; the result and the tag `collapse` say if the discriminator won or the samples became one picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from counterfake import media, provenance
from counterfake.data import DataConfig
from counterfake.images import Preprocess
from counterfake.learners.diffaugment import DiffAugment
from counterfake.learners.gan import GanConfig, symptoms
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.nets.dense_gan import DenseDiscriminator, DenseGenerator
from counterfake.nets.sngan import SnganDiscriminator, SnganGenerator
from counterfake.temporary import temporary_folder
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.training import train

DIGITS = Preprocess(size=28, channels=1)
NO_SYMPTOM = "none seen"  # of the tag `collapse`
EPOCH_PICTURE = "image_at_epoch_{:04d}.png"  # the article's name
# Radford et al. 2015
RADFORD: dict[str, Any] = {
    "g_lr": 2e-4,
    "d_lr": 2e-4,
    "g_betas": (0.5, 0.999),
    "d_betas": (0.5, 0.999),
}


def run(job: TrainJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train, export, and register where `register_as` is set; returns the figures of the run and notes on its health."""
    console = console or Console(quiet=True)
    result = train(job, workspace, console)
    notes = symptoms(result["metrics"])
    for note in notes:
        console.event(f"note: {note}")
    record(job, workspace, result["run_id"], notes)
    return {**result, "notes": notes}


def record(job: TrainJob, workspace: Workspace, run_id: str, notes: list[str]) -> None:
    """Give MLflow the tag `collapse` and, where a tick is an epoch, the article's files: image_at_epoch_0001.png … where
    each has its preview, and a GIF like dcgan.gif. Again does no harm."""
    from counterfake.tracking import Tracker  # not at import: a preset must not load MLflow

    tracker, name = Tracker.at(workspace), f"{job.name.partition('-')[0]}.gif"
    with tracker.resume(run_id) as tracked:
        tracked.tags({"collapse": "; ".join(notes) or NO_SYMPTOM})
        previews = tracker.files(run_id, "previews/samples")
        if job.loop.tick_steps or not previews or name in tracker.files(run_id):
            return
        pictures = {path: tracker.load(run_id, path) for path in previews}
        files = {}
        if job.loop.preview_every_ticks == 1:
            files = {EPOCH_PICTURE.format(i): data for i, data in enumerate(pictures.values(), start=1)}
        files[name] = encode_gif(
            [pictures[path] for path in gif_frames(previews)], job.name
        )  # the last: it ends this
        with temporary_folder() as folder:
            for file, data in files.items():
                path = folder / file
                path.write_bytes(data)
                tracked.file(path, "" if file == name else "epochs")


def encode_gif(pictures: Sequence[bytes], maker: str) -> bytes:
    """Encoded pictures of one size as an endless GIF that is marked as generated."""
    return provenance.mark(media.encode_gif([media.decode_trusted(data) for data in pictures]), maker=maker)


def gif_frames(pictures: Sequence[str]) -> list[str]:
    """The article's choice of frames: file i (from 0) is shown if round(2 sqrt(i)) passes that of the last shown; the last
    file comes at the end again. 50 epochs give 1, 2, 3, 5, 7, 9, 12, 16, 20, 24, 29, 35, 41, 47 and 50."""
    chosen, last = [], -1
    for index, picture in enumerate(pictures):
        frame = round(2 * index**0.5)
        if frame > last:
            chosen.append(picture)
            last = frame
    return chosen + list(pictures[-1:])


# -- presets: the articles ------------------------------------------------------------------------------------------


def dcgan_mnist_s4() -> TrainJob:
    """The article's DCGAN: MNIST, batch 256 with the last 96 kept, 50 epochs, a checkpoint every 5, all ten of them kept.

    One thing is not the article's: `standing_batches` renews the statistics of batch norm for what is shown and exported."""
    return TrainJob(
        name="dcgan-mnist-s4",
        task="gan",
        data=DataConfig(uri="mnist", batch_size=256, preprocess=DIGITS, drop_last=False),
        learner=GanConfig(),  # its defaults are the article's networks, loss and optimizers
        loop=LoopConfig(epochs=50, tick_steps=0, checkpoint_every_ticks=5, keep_checkpoints=10),
        register_as="dcgan-mnist",
    )


def dcgan_mnist_smoke() -> TrainJob:
    """The article's networks for 200 steps of 64 digits: shapes that might become digits."""
    return TrainJob(
        name="dcgan-mnist-smoke",
        task="gan",
        data=DataConfig(uri="mnist", batch_size=64, preprocess=DIGITS),
        learner=GanConfig(**RADFORD),
        loop=LoopConfig(steps=200, tick_steps=50, precision="bf16"),
    )


def gan_dense_mnist() -> TrainJob:
    """The dense GAN: batch 128, 400 epochs; D first, then G through the D that has just moved."""
    return TrainJob(
        name="gan-dense-mnist",
        task="gan",
        data=DataConfig(uri="mnist", batch_size=128, preprocess=DIGITS),
        learner=GanConfig(
            generator=DenseGenerator(), discriminator=DenseDiscriminator(), alternate=True, **RADFORD
        ),
        loop=LoopConfig(epochs=400, tick_steps=0, checkpoint_every_ticks=10, preview_every_ticks=10),
    )


def gan_conditional() -> TrainJob:
    """The article's DCGAN told which digit: a code beside the noise, a map beside the picture (Mirza & Osindero 2014)."""
    return TrainJob(
        name="gan-conditional",
        task="gan",
        data=DataConfig(uri="mnist", batch_size=128, preprocess=DIGITS),
        learner=GanConfig(
            generator=DcganGenerator(classes=10),
            discriminator=DcganDiscriminator(classes=10, judge="map"),
            ema_halflife_images=10_000,
            **RADFORD,
        ),
        loop=LoopConfig(epochs=20, tick_steps=0, precision="bf16"),
    )


def gan_conditional_512() -> TrainJob:
    """The same told by a vector of 512 numbers per digit, judged by projection. `learner.embeddings` takes those of a text or
    picture encoder (.npy, 10 x 512); without them each digit has a fixed random direction."""
    return TrainJob(
        name="gan-conditional-512",
        task="gan",
        data=DataConfig(uri="mnist", batch_size=128, preprocess=DIGITS),
        learner=GanConfig(
            generator=DcganGenerator(classes=10, embedding=512),
            discriminator=DcganDiscriminator(classes=10, embedding=512),
            ema_halflife_images=10_000,
            **RADFORD,
        ),
        loop=LoopConfig(epochs=20, tick_steps=0, precision="bf16"),
    )


# -- presets: modern settings ---------------------------------------------------------------------------------------


def sngan_mnist() -> TrainJob:
    """Digits by class: hinge loss, spectral norm, projection, averaged generator."""
    return TrainJob(
        name="sngan-mnist",
        task="gan",
        data=DataConfig(uri="mnist", batch_size=64, preprocess=DIGITS),
        learner=_sngan(size=28, channels=1, width=32, classes=10, halflife=10_000),
        loop=LoopConfig(images=600_000, tick_steps=200, checkpoint_every_ticks=5, precision="bf16"),
        register_as="sngan-mnist",
    )


def sngan_fashion_mnist() -> TrainJob:
    """Clothes by class; otherwise `sngan-mnist`."""
    job, name = sngan_mnist(), "sngan-fashion-mnist"
    data = dataclasses.replace(job.data, uri="fashion-mnist")
    return dataclasses.replace(job, name=name, data=data, register_as=name)


def sngan_anime_64() -> TrainJob:
    """1,800 anime faces: DiffAugment, because so few pictures are soon known by heart."""
    return _faces_64("sngan-anime-64", "anime-faces", DiffAugment.paper())


def sngan_ffhq_64() -> TrainJob:
    """The real photographs of the StyleGAN-FFHQ set, a few hundred: DiffAugment."""
    return _faces_64("sngan-ffhq-64", "stylegan-ffhq", DiffAugment.paper())


def sngan_faces_64() -> TrainJob:
    """Procedural faces, 20,000 of `run ingest synthetic-faces`."""
    return _faces_64("sngan-faces-64", "faces", DiffAugment())


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


def _smoke(make: Callable[[], TrainJob], width: int = 0) -> Callable[[], TrainJob]:
    """The preset for 100 steps of 32 pictures, with networks of this width; 0 = their own."""

    def preset() -> TrainJob:
        job = make()
        assert isinstance(job.learner, GanConfig), f"{job.name} is no GAN"
        made: Any = job.learner.generator
        judge: Any = job.learner.discriminator
        if width:
            made, judge = (dataclasses.replace(net, width=width) for net in (made, judge))
        return dataclasses.replace(
            job,
            name=f"{job.name}-smoke",
            data=dataclasses.replace(job.data, batch_size=32),
            learner=dataclasses.replace(job.learner, generator=made, discriminator=judge),
            loop=LoopConfig(steps=100, tick_steps=25, precision="bf16", threads=1),
            register_as="",
        )

    return preset


PRESETS: dict[str, Callable[[], TrainJob]] = {
    "dcgan-mnist-s4": dcgan_mnist_s4,
    "dcgan-mnist-smoke": dcgan_mnist_smoke,
    "gan-dense-mnist": gan_dense_mnist,
    "gan-dense-mnist-smoke": _smoke(gan_dense_mnist),
    "gan-conditional": gan_conditional,
    "gan-conditional-smoke": _smoke(gan_conditional, width=16),
    "gan-conditional-512": gan_conditional_512,
    "gan-conditional-512-smoke": _smoke(gan_conditional_512, width=16),
    "sngan-mnist": sngan_mnist,
    "sngan-mnist-smoke": _smoke(sngan_mnist, width=8),
    "sngan-fashion-mnist": sngan_fashion_mnist,
    "sngan-fashion-mnist-smoke": _smoke(sngan_fashion_mnist, width=8),
    "sngan-anime-64": sngan_anime_64,
    "sngan-anime-64-smoke": _smoke(sngan_anime_64, width=8),
    "sngan-ffhq-64": sngan_ffhq_64,
    "sngan-ffhq-64-smoke": _smoke(sngan_ffhq_64, width=8),
    "sngan-faces-64": sngan_faces_64,
    "sngan-faces-64-smoke": _smoke(sngan_faces_64, width=8),
    "dcgan-faces-64": dcgan_faces_64,
    "dcgan-faces-demo": dcgan_faces_demo,
}


# -- private --------------------------------------------------------------------------------------------------------


def _real_faces(uri: str, *, size: int, batch_size: int) -> DataConfig:
    return DataConfig(
        uri=uri, batch_size=batch_size, preprocess=Preprocess(size=size, crop="center"), where={"fake": 0}
    )


def _faces(*, size: int, width: int, halflife: int) -> GanConfig:
    """LeakyReLU 0.2 as in Radford et al. Spectral norm keeps D from winning early."""
    return GanConfig(
        generator=DcganGenerator(size=size, channels=3, width=width, slope=0.2, bn_momentum=0.1),
        discriminator=DcganDiscriminator(
            size=size, channels=3, width=width, slope=0.2, dropout=0.0, spectral_norm=True
        ),
        ema_halflife_images=halflife,
        **RADFORD,
    )


def _sngan(*, size: int, channels: int, width: int, classes: int, halflife: int) -> GanConfig:
    """Hinge loss; D's rate is twice G's and it moves twice as often (the paper: the same rate, five times as often)."""
    shape: dict[str, Any] = {"size": size, "channels": channels, "width": width, "classes": classes}
    return GanConfig(
        generator=SnganGenerator(**shape),
        discriminator=SnganDiscriminator(**shape),
        loss="hinge",
        d_steps=2,
        alternate=True,
        g_lr=2e-4,
        d_lr=4e-4,
        g_betas=(0.0, 0.9),
        d_betas=(0.0, 0.9),
        lr_decay="linear",
        ema_halflife_images=halflife,
    )


def _faces_64(name: str, uri: str, augment: DiffAugment) -> TrainJob:
    learner = _sngan(size=64, channels=3, width=32, classes=0, halflife=10_000)
    return TrainJob(
        name=name,
        task="gan",
        data=_real_faces(uri, size=64, batch_size=64),
        learner=dataclasses.replace(learner, augment=augment),
        loop=LoopConfig(images=2_000_000, tick_steps=200, checkpoint_every_ticks=5, precision="bf16"),
        register_as=name,
    )
