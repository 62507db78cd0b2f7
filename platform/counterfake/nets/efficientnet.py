"""EfficientNet-B0 to B7 with one fakeness logit.

Tan and Le 2019, https://arxiv.org/abs/1905.11946, table 1, and its compound scaling: `width_mult` and `depth_mult` of B4 are
1.4 and 1.8. State-dict names, BatchNorm epsilon and symmetric padding are torchvision's; weights converted from TensorFlow pad
and normalise otherwise and are not read. Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets.backbone import BackboneConfig, ImageNetInput, StochasticDepth, rounded
from counterfake.nets.depthwise import Depthwise

# (expansion, kernel, stride of the first block, channels, blocks); table 1 of the paper
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STEM = 32  # channels of the first convolution
SQUEEZE = 4  # input channels of a block / channels inside its squeeze-and-excitation


@dataclass(frozen=True, kw_only=True)
class EfficientNetConfig(BackboneConfig):
    """Images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,). Defaults: B0; B4 is `efficientnet_b4()`."""

    width_mult: float = 1.0  # factor on all channel counts, rounded to multiples of 8
    depth_mult: float = 1.0  # factor on the blocks of each stage, rounded up
    drop_path: float = (
        0.2  # probability of leaving out the last residual branch; falls to 0 towards the first
    )
    stem_stride: int = 2  # 1 keeps small pictures (32 to 64 px) at full resolution once more

    def __post_init__(self) -> None:
        if min(self.width_mult, self.depth_mult) <= 0 or self.stem_stride not in (1, 2):
            raise ConfigError(
                f"width_mult and depth_mult must be > 0 and stem_stride 1 or 2, got {self.width_mult}, "
                f"{self.depth_mult}, {self.stem_stride}"
            )

    def features(self) -> tuple[nn.Module, int]:
        channels = rounded(STEM * self.width_mult)
        layers: list[nn.Module] = [conv_bn(3, channels, 3, self.stem_stride)]
        counts = [math.ceil(stage[4] * self.depth_mult) for stage in STAGES]
        done = 0
        for (expansion, kernel, stride, width, _), count in zip(STAGES, counts, strict=True):
            outputs, blocks = rounded(width * self.width_mult), []
            for index in range(count):
                drop = self.drop_path * done / sum(counts)
                step = 1 if index else stride
                blocks.append(MBConv(channels, outputs, kernel, step, expansion, drop))
                channels, done = outputs, done + 1
            layers.append(nn.Sequential(*blocks))
        layers.append(conv_bn(channels, 4 * channels, 1))
        return ImageNetInput(*layers), 4 * channels

    @classmethod
    def tiny(cls) -> Self:
        return cls(width_mult=0.25, depth_mult=0.3, stem_stride=1)


def efficientnet_b4() -> EfficientNetConfig:
    """EfficientNet-B4, made for 380 px: 19,341,616 parameters under 1,000 classes."""
    return EfficientNetConfig(width_mult=1.4, depth_mult=1.8, dropout=0.4)


class MBConv(nn.Module):
    """Expand 1×1, depthwise, squeeze and excite, project 1×1; added to its input when the shape stays."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, drop: float
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [conv_bn(inputs, hidden, 1)] if expansion != 1 else []
        self.block = nn.Sequential(
            *expand,
            conv_bn(hidden, hidden, kernel, stride, each=True),
            SqueezeExcite(hidden, max(1, inputs // SQUEEZE)),
            conv_bn(hidden, outputs, 1, act=False),
        )
        self.residual = stride == 1 and inputs == outputs
        self.drop = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, outputs, H / stride, W / stride)."""
        return x + self.drop(self.block(x)) if self.residual else self.block(x)


class SqueezeExcite(nn.Module):
    """Each channel times a factor in (0, 1) that all channels' means decide (Hu et al. 2017, 1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        return x * self.fc2(nn.functional.silu(self.fc1(mean))).sigmoid()


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, each: bool = False, act: bool = True
) -> nn.Sequential:
    """Convolution (`each`: depthwise), BatchNorm and, with `act`, SiLU."""
    conv: nn.Module
    if each:
        conv = Depthwise(inputs, kernel, stride)
    else:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.SiLU(inplace=True)] if act else []))
