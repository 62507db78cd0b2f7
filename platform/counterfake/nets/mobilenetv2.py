"""MobileNetV2 with one fakeness logit, and its public ImageNet weights.

Architecture: Sandler et al. 2018, https://arxiv.org/abs/1801.04381, table 2. State-dict names are torchvision's, so that
public weights load by name. Head: global average pooling, Dense 256, ReLU, BatchNorm, Dropout 0.2, one logit. A softmax
over two logits (a, b) depends on b - a only, so one logit is the same model with 257 parameters fewer.
Weights converted from TensorFlow pad stride-2 convolutions on the right and bottom only and use BatchNorm epsilon 1e-3:
`origin="tensorflow"`. With torchvision's convention the same weights still answer, less surely and without an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets.backbone import BackboneConfig, rounded
from counterfake.nets.depthwise import depthwise

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
class MobileNetV2Config(BackboneConfig):
    """Images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,). H and W from 32 up; no normalisation beyond [-1, 1]."""

    width_mult: float = 1.0  # factor on all channel counts, rounded to multiples of 8
    hidden: int = 256  # units of the head's dense layer
    stem_stride: int = 2  # 1 keeps small pictures (32 to 64 px) at full resolution once more
    origin: Origin = "tensorflow"  # padding and BatchNorm epsilon the weights were trained with

    def __post_init__(self) -> None:
        if self.stem_stride not in (1, 2) or self.width_mult <= 0:
            raise ConfigError(
                f"stem_stride must be 1 or 2 and width_mult > 0, got {self.stem_stride}, {self.width_mult}"
            )

    def features(self) -> tuple[nn.Module, int]:
        """All convolutions of table 2, and the number of channels they end with."""
        channels = rounded(32 * self.width_mult)
        layers: list[nn.Module] = [conv_bn(3, channels, stride=self.stem_stride, origin=self.origin)]
        for expansion, width, blocks, stride in STAGES:
            outputs = rounded(width * self.width_mult)
            for block in range(blocks):
                step = stride if block == 0 else 1
                layers.append(InvertedResidual(channels, outputs, step, expansion, self.origin))
                channels = outputs
        last = rounded(1280 * self.width_mult)  # the paper keeps 1,280 in narrow nets; ours narrow throughout
        layers.append(conv_bn(channels, last, kernel=1, origin=self.origin))
        return (HalfTurned if self.origin == "tensorflow" else nn.Sequential)(*layers), last

    def head(self, channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(channels, self.hidden),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(self.hidden),
            nn.Dropout(self.dropout),
            nn.Linear(self.hidden, 1),
        )

    @classmethod
    def tiny(cls) -> MobileNetV2Config:
        return cls(width_mult=0.25, hidden=16)


class HalfTurned(nn.Sequential):
    """Layers that see their pictures turned by 180°; what comes out is turned back.

    TensorFlow pads an even side by (0, 1) before a 3×3 convolution of stride 2. Turned, that is (1, 0), which padding=1 does with
    no padded copy: on a CPU 6 times as fast forward, twice backward. Its 3×3 convolutions are `Conv3x3` with `turned`."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.flip(2, 3)).flip(2, 3)  # type: ignore[no-any-return, no-untyped-call]


class Conv3x3(nn.Conv2d):
    """3×3 convolution, its kernel turned by 180° or not; the parameters are a Conv2d's."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, *, turned: bool) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
        self.turned = turned

    def forward(self, images: Tensor) -> Tensor:
        kernel = self.weight.flip(2, 3) if self.turned else self.weight
        if self.groups > 1:
            return depthwise(images, kernel, self.stride[0])
        return F.conv2d(images, kernel, None, self.stride, self.padding)


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


def conv_bn(
    inputs: int, outputs: int, *, kernel: Literal[1, 3] = 3, stride: int = 1, groups: int = 1, origin: Origin
) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU6; of origin "tensorflow" inside `HalfTurned`."""
    if kernel == 1:
        conv = nn.Conv2d(inputs, outputs, 1, bias=False)
    else:
        conv = Conv3x3(inputs, outputs, stride, groups, turned=origin == "tensorflow")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=_eps(origin)), nn.ReLU6(inplace=True))


def _eps(origin: Origin) -> float:
    return 1e-3 if origin == "tensorflow" else 1e-5
