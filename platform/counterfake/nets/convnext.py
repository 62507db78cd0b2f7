"""ConvNeXt with one fakeness logit; the defaults are ConvNeXt-tiny.

Liu et al. 2022, https://arxiv.org/abs/2201.03545, figure 4 and section A.1. State-dict names are torchvision's, where the
layer norm after pooling is the first layer of the classifier; here it is the first of the head.
Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets.backbone import BackboneConfig, ImageNetInput, StochasticDepth

EPS = 1e-6  # of every layer norm
LAYER_SCALE = 1e-6  # factor that each residual branch starts with


@dataclass(frozen=True, kw_only=True)
class ConvNextConfig(BackboneConfig):
    """Images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,). H and W from 32 up."""

    depths: tuple[int, ...] = (3, 3, 9, 3)  # blocks of each stage
    widths: tuple[int, ...] = (96, 192, 384, 768)  # channels of each stage
    patch: int = 4  # side of the first convolution, which is also its stride
    drop_path: float = (
        0.1  # probability of leaving out the last residual branch; falls to 0 towards the first
    )
    dropout: float = 0.0

    PUBLIC: ClassVar = (
        ("features.", "features."),
        ("head.0.", "classifier.0."),
        ("classifier.", "classifier."),
    )

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths) or not self.depths or self.patch < 1:
            raise ConfigError(
                f"depths and widths need one number per stage and patch >= 1, got {self.depths}, {self.widths}, "
                f"{self.patch}"
            )

    def features(self) -> tuple[nn.Module, int]:
        first = nn.Conv2d(3, self.widths[0], self.patch, self.patch)
        layers: list[nn.Module] = [nn.Sequential(first, LayerNorm2d(self.widths[0], EPS))]
        last, done = max(sum(self.depths) - 1, 1), 0
        for number, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if number:
                before = self.widths[number - 1]
                layers.append(nn.Sequential(LayerNorm2d(before, EPS), nn.Conv2d(before, width, 2, 2)))
            drops = [self.drop_path * (done + index) / last for index in range(depth)]
            layers.append(nn.Sequential(*(Block(width, drop) for drop in drops)))
            done += depth
        return ImageNetInput(*layers), self.widths[-1]

    def head(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(channels, EPS), nn.Dropout(self.dropout), nn.Linear(channels, 1))

    def public_head(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(channels, EPS), nn.Identity(), nn.Linear(channels, 1000))

    @classmethod
    def tiny(cls) -> Self:
        return cls(depths=(1, 1), widths=(8, 16), patch=2, drop_path=0.0)


class Block(nn.Module):
    """Depthwise 7×7, layer norm, two dense layers on each pixel; scaled and added to the input."""

    def __init__(self, channels: int, drop: float) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            ChannelsLast(),
            nn.LayerNorm(channels, EPS),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            ChannelsFirst(),
        )
        self.drop = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return x + self.drop(self.layer_scale * self.block(x))


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)  # (N, H, W, C)


class ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)  # (N, C, H, W)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)
