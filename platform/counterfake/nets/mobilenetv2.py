"""MobileNetV2 with one fakeness logit, and its public ImageNet weights.

Architecture: Sandler et al. 2018, https://arxiv.org/abs/1801.04381, table 2. State-dict names are torchvision's, so that
public weights load by name. Head: global average pooling, Dense 256, ReLU, BatchNorm, Dropout 0.2, one logit. A softmax
over two logits (a, b) depends on b - a only, so one logit is the same model with 257 parameters fewer.
Weights converted from TensorFlow pad stride-2 convolutions on the right and bottom only and use BatchNorm epsilon 1e-3:
`origin="tensorflow"`. With torchvision's convention the same weights still answer, less surely and without an error.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import CheckpointError, ConfigError
from counterfake.nets import NetConfig

# (expansion, channels, blocks, stride of the first block); table 2 of the paper
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
Origin = Literal["tensorflow", "torch"]


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Config(NetConfig):
    """Images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,). H and W from 32 up; no normalisation beyond [-1, 1]."""

    width_mult: float = 1.0  # factor on all channel counts, rounded to multiples of 8
    hidden: int = 256  # units of the head's dense layer
    dropout: float = 0.2  # probability, before the logit
    stem_stride: int = 2  # 1 keeps small pictures (32 to 64 px) at full resolution once more
    origin: Origin = "tensorflow"  # padding and BatchNorm epsilon the weights were trained with
    weights: str | None = (
        None  # file of ImageNet weights (.pth, torchvision names); None = random initialisation
    )
    weights_sha256: str = (
        ""  # digest of that file: checked when `weights` is set, a record of the origin when not
    )

    def __post_init__(self) -> None:
        if self.stem_stride not in (1, 2) or self.width_mult <= 0:
            raise ConfigError(
                f"stem_stride must be 1 or 2 and width_mult > 0, got {self.stem_stride}, {self.width_mult}"
            )

    def build(self) -> MobileNetV2:
        """The network, with ImageNet features when `weights` is set. Raises CheckpointError if they do not fit."""
        net = MobileNetV2(self)
        if self.weights is not None:
            load_features(net, self.weights, self.weights_sha256)
        return net

    def without_weights(self) -> MobileNetV2Config:
        """The config to store beside trained weights: needs no file, keeps the digest of where it started."""
        digest = file_sha256(self.weights) if self.weights is not None else self.weights_sha256
        return replace(self, weights=None, weights_sha256=digest)

    @classmethod
    def tiny(cls) -> MobileNetV2Config:
        return cls(width_mult=0.25, hidden=16)


class MobileNetV2(nn.Module):
    """`features` (torchvision names), then `head` with one logit."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        self.features, self.channels = features(config)
        self.head = nn.Sequential(
            nn.Linear(self.channels, config.hidden),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(config.hidden),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 1),
        )
        self.apply(_initialise)

    def pooled(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> features (N, channels)."""
        return self.features(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,)."""
        return self.head(self.pooled(images)).squeeze(1)


class ImageNetClassifier(nn.Module):
    """The same features under the original 1,000-class layer; exists to check given weights on known photographs."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        self.features, channels = features(config)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(channels, 1000))

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> class logits (N, 1000)."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class SamePadConv2d(nn.Conv2d):
    """Stride-2 3×3 convolution padded (0, 1, 0, 1), as TensorFlow pads even sides; the parameters are a Conv2d's."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.pad(images, (0, 1, 0, 1)))


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise 3×3, project 1×1; added to its input when the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, origin: Origin) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [conv_bn(inputs, hidden, kernel=1, origin=origin)] if expansion != 1 else []
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *expand,
            conv_bn(hidden, hidden, stride=stride, groups=hidden, origin=origin),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs, eps=_eps(origin)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return images + self.conv(images) if self.residual else self.conv(images)


def features(config: MobileNetV2Config) -> tuple[nn.Sequential, int]:
    """All convolutions, and the number of channels they end with."""
    channels = _rounded(32 * config.width_mult)
    layers: list[nn.Module] = [conv_bn(3, channels, stride=config.stem_stride, origin=config.origin)]
    for expansion, width, blocks, stride in STAGES:
        outputs = _rounded(width * config.width_mult)
        for block in range(blocks):
            step = stride if block == 0 else 1
            layers.append(InvertedResidual(channels, outputs, step, expansion, config.origin))
            channels = outputs
    last = _rounded(1280 * config.width_mult)  # the paper keeps 1,280 in narrow nets; ours narrow throughout
    layers.append(conv_bn(channels, last, kernel=1, origin=config.origin))
    return nn.Sequential(*layers), last


def conv_bn(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1, origin: Origin
) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU6."""
    same = stride == 2 and origin == "tensorflow"
    conv = (SamePadConv2d if same else nn.Conv2d)(
        inputs, outputs, kernel, stride, padding=0 if same else kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=_eps(origin)), nn.ReLU6(inplace=True))


def load_features(net: nn.Module, path: str | Path, sha256: str = "") -> str:
    """Load `features.*` (and `classifier.*` where the net has one) from a state dict file; returns the file's SHA-256.

    Half precision is widened. Raises CheckpointError if the file has another digest, or lacks or mis-shapes a tensor.
    """
    digest = file_sha256(path)
    if sha256 and digest != sha256:
        raise CheckpointError(
            f"weights {path} have SHA-256 {digest[:12]}…, expected {sha256[:12]}…; get the right file"
        )
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch.load has no error of its own: pickle's, zipfile's, RuntimeError, KeyError, …
        raise CheckpointError(f"weights {path} are no PyTorch file of tensors; get the right file") from error
    if not isinstance(given, dict):
        raise CheckpointError(f"weights {path} hold a {type(given).__name__}, not tensors by name")
    own = net.state_dict()
    wanted = [name for name in own if name.startswith(("features.", "classifier."))]
    unfit = [n for n in wanted if n not in given or given[n].shape != own[n].shape]
    if unfit:
        raise CheckpointError(
            f"weights {path} do not fit: {len(unfit)} of {len(wanted)} tensors missing or of another shape, first"
            f" {unfit[0]}; given weights need width_mult=1 and torchvision's names"
        )
    net.load_state_dict({n: given[n].to(own[n].dtype) for n in wanted}, strict=False)
    return digest


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a weights file. Raises CheckpointError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"weights {path} cannot be read: {error.strerror}; set weights=none to start from random"
        ) from error


def _rounded(channels: float) -> int:
    """Nearest multiple of 8, never more than 10 % down; the paper's reference code."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _eps(origin: Origin) -> float:
    return 1e-3 if origin == "tensorflow" else 1e-5


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
