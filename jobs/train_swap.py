"""Train a face swap: one network in which every person's face is painted in everyone's pose.

    counterfake run train-swap swap-demo                                    2 cores: about 90 s; features and colours swap
    counterfake run train-swap swap-shared-small --set data.uri=faces       any NAME-small: 64 px, minutes on 2 cores
    counterfake run train-swap swap-mask-gan-small --set data.uri=faces     with a mask, a critic, and three phases
    counterfake run train-swap swap-shared --set data.uri=faces --set workers=4 --set gpus_per_worker=1
                                                                            the code of 2017; one GPU: about a day
    counterfake run train-swap swap-df --set data.uri=research-faces --set purpose=detector-training

The faces need `face_box` and `identity`; points of eyes and mouth are used where they are known. Without data.where.identity
the `learner.people` best pictured people of the split are taken. Sources need the consent of the people shown; see consent.py.
Expected: the preview `swaps` shows each face (first column) as every person, in the same pose; swap-two-encoders fails at it,
and swap-unet gives much of the source back (EXPERIMENTS 2026-11-28).
A run that turns NaN, grey, or loses one person goes back to its last checkpoint at half the learning rate and says so.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from counterfake import labels
from counterfake.data import DataConfig, chosen
from counterfake.errors import ConfigError, DataError
from counterfake.images import Preprocess
from counterfake.learners.faceswap import MIN_PICTURES, FaceSwapConfig
from counterfake.learners.phases import Phase
from counterfake.learners.swap_losses import SwapLosses
from counterfake.learners.warp import WarpConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.swap import (
    SwapConfig,
    SwapMaskConfig,
    SwapPartsConfig,
    SwapTwoEncodersConfig,
    SwapUnetConfig,
)
from counterfake.nets.swap_dfl import SwapDfConfig, SwapLiaeConfig
from counterfake.nets.swap_discriminator import SwapDiscriminatorConfig
from counterfake.nets.swap_family import SwapFamily
from counterfake.records import Dataset
from counterfake.workspace import Workspace
from jobs import consent
from jobs.console import Console
from jobs.training import train


def run(job: TrainJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Choose the people, train, and return where model, checkpoint and run are."""
    job = prepared(job, workspace)
    return {**train(job, workspace, console), "people": job.data.where["identity"], "purpose": job.purpose}


def prepared(job: TrainJob, workspace: Workspace) -> TrainJob:
    """The job with its people named and the points its losses need. Raises DataError where consent is missing."""
    job = with_people(job, workspace)
    consent.require_for(job.data, job.purpose, workspace)
    assert isinstance(job.learner, FaceSwapConfig), "checked by with_people"
    data = dataclasses.replace(job.data, landmarks=job.data.landmarks or job.learner.losses.needs_points)
    learner = dataclasses.replace(job.learner, margin=data.preprocess.margin)
    return dataclasses.replace(job, data=data, learner=learner)


def with_people(job: TrainJob, workspace: Workspace) -> TrainJob:
    """The job with its people named. Raises DataError for fewer than two, or for people with too few pictures."""
    if not isinstance(job.learner, FaceSwapConfig):
        raise ConfigError(f"train_swap trains a FaceSwapConfig, the job has a {type(job.learner).__name__}")
    if not job.data.uri:
        raise ConfigError("data.uri is not set; name a dataset, like --set data.uri=faces@3")
    counts = pictures_per_person(job.data, workspace)
    named = job.data.where.get("identity")
    if named is not None:
        people = [named] if isinstance(named, str) else list(named)
        few = [f"{name} ({counts[name]})" for name in people if counts[name] < MIN_PICTURES]
        if few:
            raise DataError(
                f"each person needs {MIN_PICTURES} pictures with a face; too few of {', '.join(few)} in {job.data.uri}"
            )
    else:
        ranked = sorted(counts, key=lambda name: (-counts[name], name))
        people = sorted(
            [name for name in ranked if counts[name] >= MIN_PICTURES][: job.learner.people or None]
        )
    if len(people) < 2:
        raise DataError(
            f"face swapping needs two people with {MIN_PICTURES} pictures of their faces each; {job.data.uri} split {job.data.split} has"
            f" {len(counts)} people with {max(counts.values(), default=0)} pictures at most; ingest one folder per person, or more of each"
        )
    where = {**job.data.where, "identity": people}
    return dataclasses.replace(job, data=dataclasses.replace(job.data, where=where))


def pictures_per_person(data: DataConfig, workspace: Workspace) -> Counter[str]:
    """Rows of each identity in the split that can be trained on: with a face, and let through by the other filters.

    Raises DataError if no row has a face."""
    dataset = Dataset.open(workspace.dataset(data.uri), cache=workspace.cache)
    version = dataset.version(dataset.pinned)
    others = {name: value for name, value in data.where.items() if name != "identity"}
    keep, _ = chosen(dataset, version, dataclasses.replace(data, where=others))
    found = labels.read(dataset, version, data.split, "identity")
    codes, rows = np.unique(found.codes[keep & (found.codes >= 0)], return_counts=True)
    return Counter({found.values[code]: int(count) for code, count in zip(codes, rows, strict=True)})


# -- presets --------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "size": 64, "coverage": 0.8, "encoder": (24, 48, 96, 128), "code": 256, "upscaled": 128, "decoder": (64, 32, 16),
}  # fmt: skip
# A standard light: the code of a pale face meant nothing to the decoder of a dark one. 64 units: 256 were shared less
# (EXPERIMENTS 2026-11-28).
LIT: dict[str, Any] = {**SMALL, "normalise": True, "code": 64}
SMALL_DFL: dict[str, Any] = {
    "size": 64, "coverage": 0.8, "ae_dims": 64, "e_dims": 12, "d_dims": 16, "d_mask_dims": 6,
}  # fmt: skip
SMALL_IMAGES = (
    128_000  # of a NAME-small; 220 (shared) to 72 (against the critic) images per CPU-second in bf16
)
BENT_THEN_STRAIGHT = Phase(images=80_000), Phase(warp=False)
# faceswap-GAN v2.2: reconstruction 1, edges .1, eyes 30, adversary .1, mask |α| .01 and its variation .1
MASK_GAN = SwapLosses(mae=1.0, edge=0.1, eyes=30.0, adversarial=0.1, mask_l1=0.01, mask_tv=0.1)
# Of the NAME-small: eyes with brows and mouths, which move a pixel or two, before hair and walls
CLOSE = SwapLosses(mae=1.0, mse=10.0, eye_factor=6.0, mouth_factor=6.0, background=0.1)
# faceswap: eyes count three times, a mouth twice
PARTS = SwapLosses(mae=1.0, eye_factor=3.0, mouth_factor=2.0, parts=1.0, mask=1.0)
# SAEHD: 10 DSSIM + 10 MSE + 10 mask MSE, eyes and mouth 300, variation 1e-6, background .02, adversary .1
SAEHD = SwapLosses(
    mae=0.0, mse=10.0, dssim=10.0, mask=10.0, eyes=300.0, mouth=300.0, tv=1e-6, background=0.02, adversarial=0.1
)  # fmt: skip


def swap_two_encoders() -> TrainJob:
    """The naive design: an autoencoder per person, codes exchanged. It reconstructs, and cannot swap."""
    return _full("swap-two-encoders", FaceSwapConfig(net=SwapTwoEncodersConfig(), people=2))


def swap_two_encoders_small() -> TrainJob:
    """The naive design at the size of swap-shared-small. At the others' rate of 2e-3 a decoder was lost (EXPERIMENTS 2026-11-28)."""
    learner = dataclasses.replace(_fast(SwapTwoEncodersConfig(**SMALL)), lr=5e-4)
    return _small("swap-two-encoders-small", learner)


def swap_shared() -> TrainJob:
    """December 2017 in full: 64 px, 69.7 M parameters in the encoder, 6.2 M per person, 200,000 updates."""
    return _full("swap-shared", FaceSwapConfig(people=2))


def swap_shared_small() -> TrainJob:
    """The same design at 64 px in a standard light, with 1.3 M parameters in the encoder and 0.4 M per person: 10 CPU-minutes."""
    return _small("swap-shared-small", _close(SwapConfig(**LIT)), batch_size=16)


def swap_unet() -> TrainJob:
    """swap-shared with skip connections at 8×8 and 4×4; finer ones would carry the source's identity."""
    return _full("swap-unet", FaceSwapConfig(net=SwapUnetConfig(), people=2))


def swap_unet_small() -> TrainJob:
    """swap-shared-small with a skip connection at 4×4 alone: at 8×8 as well 98 % of the swaps were the source, at 4×4 30 %."""
    return _small("swap-unet-small", _close(SwapUnetConfig(**LIT, skip_side=4)), batch_size=16)


def swap_mask_gan() -> TrainJob:
    """faceswap-GAN v2.2: masks, a critic, 40,000 updates of 8 faces per person; a perceptual file joins after a fifth.

    `--set learner.losses.perceptual_weights=FILE --set learner.losses.perceptual=[.01,.1,.3,.1]`, a ResNet-50; ImageNet's
    MobileNetV2 with `--set learner.losses.perceptual_net=mobilenetv2`."""
    learner = FaceSwapConfig(
        net=SwapMaskConfig(),
        losses=MASK_GAN,
        phases=(Phase(images=128_000, adversarial=1.0), Phase(adversarial=1.0, perceptual=1.0)),
        lr=1e-4,
        people=2,
    )
    return _full("swap-mask-gan", learner, steps=40_000, batch_size=16)


def swap_mask_gan_small() -> TrainJob:
    """Masks taught by the rows' own, or by the faces' points; the critic in the last quarter: three phases in as many images
    as the others."""
    losses = dataclasses.replace(CLOSE, edge=0.1, mask=1.0, mask_tv=0.01, adversarial=0.1)
    learner = dataclasses.replace(
        _close(SwapMaskConfig(**LIT)),
        losses=losses,
        critic=SwapDiscriminatorConfig(widths=(16, 32, 64, 64)),
        phases=(
            Phase(images=64_000),
            Phase(images=32_000, warp=False),
            Phase(
                warp=False, adversarial=1.0, perceptual=1.0, lr_scale=0.5
            ),  # perceptual: where a file is set
        ),
    )
    return _small("swap-mask-gan-small", learner, batch_size=16)


def swap_parts() -> TrainJob:
    """swap-shared with a second head that paints eyes and mouth, taught by crops of them."""
    return _full("swap-parts", FaceSwapConfig(net=SwapPartsConfig(), losses=PARTS, people=2))


def swap_parts_small() -> TrainJob:
    """swap-shared-small with a second head for eyes and mouth."""
    net = SwapPartsConfig(**SMALL, parts=(32, 16, 8))
    return _small("swap-parts-small", dataclasses.replace(_fast(net), losses=PARTS))


def swap_df() -> TrainJob:
    """SAEHD's DF at 128 px: a decoder per person, masked training, three phases."""
    return _saehd("swap-df", SwapDfConfig())


def swap_df_small() -> TrainJob:
    """DF at 64 px, 5.3 M parameters for four people, without the critic."""
    return _small("swap-df-small", dataclasses.replace(_fast(SwapDfConfig(**SMALL_DFL)), losses=SAEHD))


def swap_liae() -> TrainJob:
    """SAEHD's LIAE at 128 px: one decoder, people differ in their codes."""
    return _saehd("swap-liae", SwapLiaeConfig())


def swap_liae_small() -> TrainJob:
    """LIAE at 64 px, 5.5 M parameters for four people, without the critic."""
    return _small("swap-liae-small", dataclasses.replace(_fast(SwapLiaeConfig(**SMALL_DFL)), losses=SAEHD))


def swap_demo() -> TrainJob:
    """48 px, four people of the demo faces, about 75 s on two cores."""
    net = SwapConfig(**{**SMALL, "size": 48})
    return TrainJob(
        name="swap-demo",
        task="faceswap",
        data=_faces("faces-demo", side=60, margin=1.4, batch_size=16),
        learner=dataclasses.replace(_fast(net), phases=(Phase(images=16_000), Phase(warp=False))),
        loop=LoopConfig(images=24_000, tick_steps=250, checkpoint_every_ticks=2, precision="bf16"),
        register_as="swap-faces",
    )


PRESETS: dict[str, Callable[[], TrainJob]] = {
    "swap-demo": swap_demo,
    "swap-two-encoders": swap_two_encoders,
    "swap-two-encoders-small": swap_two_encoders_small,
    "swap-shared": swap_shared,
    "swap-shared-small": swap_shared_small,
    "swap-unet": swap_unet,
    "swap-unet-small": swap_unet_small,
    "swap-mask-gan": swap_mask_gan,
    "swap-mask-gan-small": swap_mask_gan_small,
    "swap-parts": swap_parts,
    "swap-parts-small": swap_parts_small,
    "swap-df": swap_df,
    "swap-df-small": swap_df_small,
    "swap-liae": swap_liae,
    "swap-liae-small": swap_liae_small,
}


def _faces(uri: str, *, side: int, margin: float, batch_size: int) -> DataConfig:
    """Face crops, real pictures only."""
    preprocess = Preprocess(size=side, crop="face", margin=margin)
    return DataConfig(uri=uri, preprocess=preprocess, batch_size=batch_size, where={"fake": 0})


def _full(name: str, learner: FaceSwapConfig, *, steps: int = 200_000, batch_size: int = 128) -> TrainJob:
    """A design as it was published: for a GPU and a day; a checkpoint every 100 updates, as in 2017."""
    side = round(160 * learner.net.size / 64)
    return TrainJob(
        name=name,
        task="faceswap",
        data=_faces("faces", side=side, margin=1.75, batch_size=batch_size),
        learner=learner,
        loop=LoopConfig(steps=steps, tick_steps=100, checkpoint_every_ticks=1, preview_every_ticks=10),
        register_as=name,
    )


def _saehd(name: str, net: SwapFamily) -> TrainJob:
    """3.2 M images at 128 px: bent, straight with lr_dropout, then against a critic. What differs from SAEHD: nets/swap_dfl.py."""
    phases = (
        Phase(images=1_600_000),
        Phase(images=800_000, warp=False, lr_dropout=0.3),
        Phase(warp=False, lr_dropout=0.3, adversarial=1.0),
    )
    learner = FaceSwapConfig(net=net, losses=SAEHD, phases=phases, people=2, adam_eps=1e-7)
    return _full(name, learner, steps=200_000, batch_size=16)


def _small(name: str, learner: FaceSwapConfig, *, batch_size: int = 32) -> TrainJob:
    """A design at 64 px on procedural faces, for two CPU cores."""
    return TrainJob(
        name=name,
        task="faceswap",
        data=_faces("faces", side=80, margin=1.4, batch_size=batch_size),
        learner=learner,
        loop=LoopConfig(
            images=SMALL_IMAGES,
            tick_steps=3200 // batch_size,
            checkpoint_every_ticks=5,
            preview_every_ticks=5,
            precision="bf16",
        ),
        register_as=name,
    )


def _fast(net: SwapFamily) -> FaceSwapConfig:
    """For minutes instead of a day: four people, a higher rate that decays, and straight faces at the end."""
    return FaceSwapConfig(
        net=net,
        lr=2e-3,
        beta1=0.9,
        final_lr_factor=0.1,
        match_colour=False,
        people=4,
        phases=BENT_THEN_STRAIGHT,
        warp=WarpConfig(rotation=4.0, zoom=0.03, shift=0.02),
    )


def _close(net: SwapFamily) -> FaceSwapConfig:
    """`_fast` with the losses of CLOSE, half of the images straight and a rate that falls to almost nothing."""
    phases = Phase(images=64_000), Phase(warp=False)
    return dataclasses.replace(_fast(net), losses=CLOSE, phases=phases, final_lr_factor=0.02)
