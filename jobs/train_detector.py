"""Train a detector of fakes: one of several networks with one logit.

    counterfake run train-detector mobilenetv2-demo                                 2 cores: about 30 s
    counterfake run train-detector cifake-32                                        CIFAKE, 32 px, from random weights
    counterfake run train-detector ciplab --set learner.net.weights=FILE            CIPLAB, 256 px; teaches itself composites
    counterfake run train-detector stylegan-ffhq-256 --set learner.net.weights=FILE
    counterfake run train-detector stylegan-ffhq-256-robust --set learner.net.weights=FILE    damaged as pictures that are shared
    counterfake run train-detector probe --set learner.net.backbone.weights=FILE    only the last layer learns
    counterfake run train-detector xception-299 --set gpus_per_worker=1 --set workers=2
    counterfake run train-detector mobilenetv2-s0 --set learner.net.weights=FILE    50 epochs of 96 px, after the article

FILE holds ImageNet weights with torchvision's names (mobilenet_v2_imagenet_fp16.pth; for torchvision's own weights of
MobileNetV2 add --set learner.net.origin=torch). Without it the features start from random, which needs tens of thousands
of pictures. `xception-299`, `efficientnet-b0`, `efficientnet-b4-380`, `resnet-18`, `convnext-tiny`, `mesonet` and `frequency`
are recipes for face crops of many thousand pictures and a GPU; their data set is `faces` unless data.uri and validation.uri
say otherwise. Published detectors, and a GAN's own discriminator, come in by `counterfake run import-detector`.
Speed of the step alone on one busy core, fp32 and bf16: cifake-32 230 to 270 and 320 to 470 pictures/s at batch 64,
MobileNetV2 at 192 px 19 to 31 and 46 to 48.
`val_auc` is measured at every checkpoint on data.split=validation, with several makers also of each one's fakes
(`val_auc.MAKER`, `val_worst_auc`); the model keeps the weights of the best one (learner.select). data.degradation makes
training pictures worse with the robustness grid's own functions; `stylegan-ffhq-256-robust` does, for about 1 ms of a decoding
thread per picture (256 px). The recipes on faces end after 3 epochs without a better val_auc.
Run to their end, in EXPERIMENTS: cifake-32 (20 epochs in 31 min on one thread: 95.9 %, 94.6 to 97.1, of the test pictures),
ciplab (73.6 %, 71.4 to 75.7, AUC .817, of five folds with near-copies on one side; the article's 75 % was measured on its own
training pictures), mobilenetv2-ciplab, the plain way (60.5 %, 55.3 to 65.3) and stylegan-ffhq-256 (28 min on one
thread: AUC .973, .953 to .990, accuracy 92.5 %).
mobilenetv2-demo is part of `make demo`. For the others there is no figure yet. `ciplab` needs the eyes of faces, which
its ingest finds in two of three, better five points: ingest with landmarks_model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from counterfake.data import DataConfig
from counterfake.images import Degradation, Preprocess
from counterfake.learners.augmentation import AugmentationConfig
from counterfake.learners.blending import BlendingConfig
from counterfake.learners.composites import CompositesConfig
from counterfake.learners.detector import DetectorConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets import NetConfig
from counterfake.nets.convnext import ConvNextConfig
from counterfake.nets.efficientnet import EfficientNetConfig, efficientnet_b4
from counterfake.nets.frequency import FrequencyConfig
from counterfake.nets.meso import MesoConfig
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.nets.probe import ProbeConfig
from counterfake.nets.resnet import ResNetConfig
from counterfake.nets.xception import XceptionConfig
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.training import both_classes, train


def run(job: TrainJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Check that both classes are there, train, and return where model, checkpoint and run are."""
    (console or Console(quiet=True)).event(both_classes([job.data, job.validation], workspace))
    return train(job, workspace, console)


# -- presets --------------------------------------------------------------------------------------------------------


def mobilenetv2_s0() -> TrainJob:
    """Article S0 after its public kernel: 96 px, mirror only, all layers, Adam, 50 epochs of batch 32."""
    learner = DetectorConfig(
        lr=1e-3,
        weight_decay=0.0,
        balance=False,
        clip_norm=0.0,
        final_lr_factor=0.01,  # the kernel steps 1e-3, 1e-4, 1e-5; a cosine between the same ends
        augmentation=dataclasses.replace(AugmentationConfig.off(), flip=0.5),
    )
    return _job("mobilenetv2-s0", "ciplab", 96, 32, learner, LoopConfig(epochs=50, tick_steps=0))


def mobilenetv2_ciplab() -> TrainJob:
    """Fine-tuning on about 1,200 composites: head first, features at a fifth of the rate, averaged weights."""
    learner = DetectorConfig(
        lr=1e-3,
        features_lr_factor=0.2,
        weight_decay=0.05,
        freeze_images=2_500,
        warmup_images=1_000,
        label_smoothing=0.05,
        ema_halflife_images=4_000,
        net=MobileNetV2Config(dropout=0.4),
        augmentation=AugmentationConfig(zoom=0.15, probability=0.1),
    )
    return _job("mobilenetv2-ciplab", "ciplab", 192, 32, learner, LoopConfig(epochs=30, tick_steps=0))


def mobilenetv2_demo() -> TrainJob:
    """A third of the width from random weights, 64 px, on the demo's faces and fakes."""
    learner = DetectorConfig(
        net=MobileNetV2Config(width_mult=0.35, hidden=64),
        lr=3e-3,
        weight_decay=0.05,
        warmup_images=1_000,
        ema_halflife_images=1_000,
        augmentation=AugmentationConfig(probability=0.2),
    )
    loop = LoopConfig(images=16_000, tick_steps=100)
    return _job("mobilenetv2-demo", "faces-demo", 64, 32, learner, loop, register_as="mobilenetv2-faces")


def ciplab() -> TrainJob:
    """Photoshop composites at their full 256 px: no interpolation, composites of our own making beside the given ones, mirror mean."""
    learner = DetectorConfig(
        net=MobileNetV2Config(dropout=0.4, mirror=True),
        lr=1e-3,
        features_lr_factor=0.3,
        weight_decay=0.05,
        freeze_images=2_000,
        warmup_images=1_500,
        label_smoothing=0.1,
        frozen_norms=True,
        ema_halflife_images=3_000,
        composites=CompositesConfig(share=0.25),
        augmentation=_whole_pixels(jitter=16),
    )
    loop = LoopConfig(epochs=12, tick_steps=0, precision="bf16")
    job = _job("ciplab", "ciplab", 256, 32, learner, loop)
    return dataclasses.replace(job, data=dataclasses.replace(job.data, landmarks=True))


def stylegan_ffhq_256() -> TrainJob:
    """StyleGAN faces at 256 px: their traces are fine and everywhere, so windows of 128 px are learned from, nothing is
    interpolated and little is blurred."""
    learner = DetectorConfig(
        net=MobileNetV2Config(mirror=True),
        lr=5e-4,
        features_lr_factor=0.4,
        weight_decay=0.02,
        freeze_images=1_500,
        warmup_images=1_000,
        label_smoothing=0.05,
        ema_halflife_images=2_000,
        augmentation=dataclasses.replace(_whole_pixels(jitter=0), crop=128),
    )
    return _job(
        "stylegan-ffhq-256",
        "stylegan-ffhq",
        256,
        32,
        learner,
        LoopConfig(epochs=120, tick_steps=0, precision="bf16"),
    )


def stylegan_ffhq_256_robust() -> TrainJob:
    """stylegan-ffhq-256 on pictures as they are shared: what the grid does to them, in the loader instead of on the device."""
    job = stylegan_ffhq_256()
    assert isinstance(job.learner, DetectorConfig), "made above"
    plain = dataclasses.replace(job.learner.augmentation, probability=0.0)  # or they would be blurred twice
    return dataclasses.replace(
        job,
        name="stylegan-ffhq-256-robust",
        register_as="stylegan-ffhq-256-robust",
        data=dataclasses.replace(job.data, degradation=Degradation(probability=0.25, share=0.1)),
        learner=dataclasses.replace(job.learner, augmentation=plain),
    )


def cifake_32() -> TrainJob:
    """CIFAKE at its own 32 px: a residual network whose first stage keeps the full resolution, from random weights."""
    learner = DetectorConfig(
        net=ResNetConfig(blocks=(2, 2, 2), width=32, small=True, dropout=0.1, mirror=True),
        lr=3e-3,
        weight_decay=0.05,
        warmup_images=8_000,
        label_smoothing=0.02,
        ema_halflife_images=8_000,
        augmentation=_whole_pixels(jitter=4, probability=0.0),
    )
    return _job(
        "cifake-32", "cifake", 32, 128, learner, LoopConfig(epochs=20, tick_steps=0, precision="bf16")
    )


def mesonet() -> TrainJob:
    """Meso4 from random weights: Adam 1e-3 at 256 px, as its authors did."""
    learner = DetectorConfig(net=MesoConfig(), weight_decay=0.0, warmup_images=1_000)
    return _faces("mesonet", 256, 76, learner)


def xception_299() -> TrainJob:
    """After FaceForensics++ (Rössler et al. 2019, 1901.08971): face crops of 299 px, the head first, then everything."""
    return _faces("xception-299", 299, 32, _fine_tuned(XceptionConfig(), lr=2e-4, freeze_images=90_000))


def efficientnet_b0() -> TrainJob:
    """The smallest EfficientNet, 224 px."""
    return _faces(
        "efficientnet-b0", 224, 64, _fine_tuned(EfficientNetConfig(), lr=1e-3, features_lr_factor=0.3)
    )


def efficientnet_b4_380() -> TrainJob:
    """Self-blended images' own recipe: SAM over SGD 1e-3, batch 32, EfficientNet-B4 at 380 px; half the real rows blended."""
    learner = DetectorConfig(
        net=efficientnet_b4(),
        optimizer="sgd",
        lr=1e-3,
        weight_decay=0.0,
        sam_rho=0.05,
        blending=BlendingConfig(share=0.5),
        augmentation=AugmentationConfig(jpeg=(40, 100), probability=0.5, blur=None, noise=None),
    )
    return _faces("efficientnet-b4-380", 380, 32, learner)


def resnet_18() -> TrainJob:
    """ResNet-18, 224 px, with the blur and JPEG of CNNDetection (Wang et al. 2019, 1912.11035)."""
    learner = _fine_tuned(ResNetConfig(dropout=0.2), lr=3e-4, features_lr_factor=0.3)
    shared = AugmentationConfig(zoom=0.0, shift=0.0, jpeg=(30, 100), blur=(0.1, 2.0), probability=0.5)
    return _faces("resnet-18", 224, 64, dataclasses.replace(learner, augmentation=shared))


def convnext_tiny() -> TrainJob:
    """ConvNeXt-tiny, 224 px."""
    return _faces("convnext-tiny", 224, 64, _fine_tuned(ConvNextConfig(), lr=3e-4, features_lr_factor=0.2))


def frequency() -> TrainJob:
    """Learned DCT bands and phase, 256 px: another kind of evidence than the others, for the ensemble."""
    learner = DetectorConfig(
        net=FrequencyConfig(), weight_decay=0.02, warmup_images=2_000, ema_halflife_images=4_000,
        augmentation=_whole_pixels(jitter=16),
    )  # fmt: skip
    return _faces("frequency", 256, 32, learner)


def probe() -> TrainJob:
    """A linear layer on frozen features; the backbone and its weights are settings."""
    learner = DetectorConfig(
        net=ProbeConfig(), weight_decay=0.01, warmup_images=0, augmentation=_whole_pixels(jitter=8)
    )
    return _faces("probe", 224, 64, learner)


PRESETS: dict[str, Callable[[], TrainJob]] = {
    "mobilenetv2-demo": mobilenetv2_demo,
    "mobilenetv2-ciplab": mobilenetv2_ciplab,
    "mobilenetv2-s0": mobilenetv2_s0,
    "ciplab": ciplab,
    "stylegan-ffhq-256": stylegan_ffhq_256,
    "stylegan-ffhq-256-robust": stylegan_ffhq_256_robust,
    "cifake-32": cifake_32,
    "mesonet": mesonet,
    "xception-299": xception_299,
    "efficientnet-b0": efficientnet_b0,
    "efficientnet-b4-380": efficientnet_b4_380,
    "resnet-18": resnet_18,
    "convnext-tiny": convnext_tiny,
    "frequency": frequency,
    "probe": probe,
}


# -- private --------------------------------------------------------------------------------------------------------


def _whole_pixels(jitter: int, probability: float = 0.1) -> AugmentationConfig:
    """Mirror, moves by whole pixels, light; a generator's finest traces survive because nothing is interpolated."""
    return AugmentationConfig(zoom=0.0, shift=0.0, jitter=jitter, contrast=0.15, probability=probability)


def _fine_tuned(net: NetConfig, **changes: Any) -> DetectorConfig:
    """Head first, then everything, averaged weights."""
    settings = {"weight_decay": 0.02, "freeze_images": 5_000, "warmup_images": 2_000, "label_smoothing": 0.05}
    return DetectorConfig(net=net, ema_halflife_images=10_000, **{**settings, **changes})


def _faces(name: str, side: int, batch_size: int, learner: DetectorConfig) -> TrainJob:
    loop = LoopConfig(epochs=10, tick_steps=0, precision="bf16", patience_ticks=3)
    return _job(name, "faces", side, batch_size, learner, loop)


def _job(
    name: str,
    uri: str,
    side: int,
    batch_size: int,
    learner: DetectorConfig,
    loop: LoopConfig,
    register_as: str = "",
) -> TrainJob:
    data = DataConfig(uri=uri, preprocess=Preprocess(size=side), batch_size=batch_size)
    return TrainJob(
        name=name,
        task="detector",
        data=data,
        validation=dataclasses.replace(data, split="validation", batch_size=128),
        learner=learner,
        loop=loop,
        register_as=register_as or name,
    )
