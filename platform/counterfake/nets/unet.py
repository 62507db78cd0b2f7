"""U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597): pictures in, a picture out, details through skip connections.

Strided convolutions down, PixelShuffle up, no batch norm: a row's answer never depends on the others.
Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets import NetConfig

SLOPE = 0.2  # of every LeakyReLU


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetConfig):
    """(N, inputs, size, size) in [-1, 1] -> (N, outputs, size, size) in [-1, 1]."""

    size: int = 64  # pixels; a multiple of 2 ** depth
    inputs: int = 4  # channels read, for instance frames
    outputs: int = 1
    width: int = 32  # channels at full size; doubles with each halving
    depth: int = 4  # halvings
    most: int = 256  # channels, at most

    def __post_init__(self) -> None:
        if self.size % 2**self.depth:
            raise ConfigError(
                f"size {self.size} must be a multiple of {2**self.depth} to be halved {self.depth} times"
            )

    def build(self) -> UNet:
        return UNet(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=32, inputs=2, width=2, depth=2)


class UNet(nn.Module):
    """Encoder, decoder, and a skip connection at every size."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [min(config.width * 2**i, config.most) for i in range(config.depth + 1)]
        self.enter = nn.Conv2d(config.inputs, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1) for i in range(config.depth)
        )
        self.up = nn.ModuleList(
            nn.Conv2d(widths[i + 1], 4 * widths[i], 3, padding=1) for i in reversed(range(config.depth))
        )
        self.join = nn.ModuleList(
            nn.Conv2d(2 * widths[i], widths[i], 3, padding=1) for i in reversed(range(config.depth))
        )
        self.paint = nn.Conv2d(widths[0], config.outputs, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures (N, inputs, H, W) -> (N, outputs, H, W) in [-1, 1]."""
        x = F.leaky_relu(self.enter(pictures), SLOPE)
        kept = []
        for conv in self.down:
            kept.append(x)
            x = F.leaky_relu(conv(x), SLOPE)  # (N, 2 C, H/2, W/2)
        for conv, join in zip(self.up, self.join, strict=True):
            x = F.leaky_relu(F.pixel_shuffle(conv(x), 2), SLOPE)  # (N, C/2, 2 H, 2 W)
            x = F.leaky_relu(join(torch.cat([x, kept.pop()], dim=1)), SLOPE)
        return torch.tanh(self.paint(x))
