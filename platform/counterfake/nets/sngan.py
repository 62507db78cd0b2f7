"""Residual GAN of "Spectral Normalization for GANs" (Miyato et al. 2018, https://arxiv.org/abs/1802.05957), for 28 to 128 px.

The generator's blocks double the side, the discriminator's halve it and every layer of it is spectrally normalised. With
`classes` the generator's batch norms take scale and shift from the class (de Vries et al. 2017) and the discriminator adds
a projection (Miyato & Koyama 2018, https://arxiv.org/abs/1802.05637, eq. 4). Differences from the paper: one width per
side (`width` doubles towards 4x4, at most `most`), the projection reads the mean, not the sum, over the pixels.
Letters: N batch, C channels, H W pixels, Z noise, K numbers of a condition.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from counterfake.errors import ConfigError
from counterfake.nets import NetConfig
from counterfake.nets.conditioning import Condition

SIZES = (28, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class SnganGenerator(NetConfig):
    """Noise (N, Z) -> pictures (N, C, size, size) in [-1, 1]."""

    size: int = 32  # pixels, one of SIZES
    channels: int = 3
    noise_size: int = 128  # Z
    width: int = 64  # channels at full size; doubles with each halving of the side
    most: int = 256  # channels, at most
    classes: int = 0  # the generator is told one of so many; 0 = none
    embedding: int = 0  # length of the vector that stands for a class; 0 = the class itself

    def __post_init__(self) -> None:
        _check_size(self.size)

    def build(self) -> Generator:
        return Generator(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=28, channels=1, noise_size=8, width=2)


@dataclass(frozen=True, kw_only=True)
class SnganDiscriminator(NetConfig):
    """Pictures (N, C, size, size) in [-1, 1] -> logits (N,), higher = more real (the GAN convention)."""

    size: int = 32  # pixels, one of SIZES
    channels: int = 3
    width: int = 64  # channels after the first block; doubles with each halving of the side
    most: int = 256
    classes: int = 0
    embedding: int = 0

    def __post_init__(self) -> None:
        _check_size(self.size)

    def build(self) -> Discriminator:
        return Discriminator(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=28, channels=1, width=2)


class Generator(nn.Module):
    """Dense to 4x4 (7x7 for 28 px), blocks that double the side, batch norm, ReLU, convolution, tanh."""

    def __init__(self, config: SnganGenerator) -> None:
        super().__init__()
        self.config, self.classes = config, config.classes
        widths = _widths(config.size, config.width, config.most)[::-1]  # from the smallest side up
        self.condition = Condition(config.classes, config.embedding) if config.classes else None
        told = self.condition.width if self.condition else 0
        side = _base(config.size)
        self.shape = (widths[0], side, side)
        self.dense = nn.Linear(config.noise_size, math.prod(self.shape))
        self.blocks = nn.ModuleList(UpBlock(i, o, told) for i, o in itertools.pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.paint = nn.Conv2d(widths[-1], config.channels, 3, padding=1)
        _initialise(self)

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """noise (N, Z), with classes also what to draw -> pictures (N, C, H, W) in [-1, 1]."""
        code = self.condition(condition) if self.condition else None  # (N, K)
        x = self.dense(noise).view(-1, *self.shape)  # (N, C, 4, 4)
        for block in self.blocks:
            x = block(x, code)  # (N, C, 2 H, 2 W)
        return torch.tanh(self.paint(F.relu(self.norm(x))))


class Discriminator(nn.Module):
    """Blocks that halve the side down to 4x4 (7x7 for 28 px), one at that side, mean over the pixels, one logit."""

    def __init__(self, config: SnganDiscriminator) -> None:
        super().__init__()
        self.config = config
        widths = _widths(config.size, config.width, config.most)[1:]
        self.first = FirstBlock(config.channels, widths[0])
        self.blocks = nn.ModuleList(DownBlock(i, o, shrink=True) for i, o in itertools.pairwise(widths))
        self.last = DownBlock(widths[-1], widths[-1], shrink=False)
        self.dense = nn.Linear(widths[-1], 1)
        self.condition = Condition(config.classes, config.embedding) if config.classes else None
        if self.condition:
            self.code = nn.Linear(self.condition.width, widths[-1], bias=False)
        _initialise(self)
        for layer in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
            spectral_norm(layer)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        """images (N, C, H, W) in [-1, 1], with classes also what they should show -> logits (N,)."""
        x = self.first(images)
        for block in self.blocks:
            x = block(x)  # (N, C, H/2, W/2)
        x = F.relu(self.last(x)).mean(dim=(2, 3))  # (N, C)
        logits = self.dense(x).squeeze(1)
        if self.condition:
            logits = logits + (self.code(self.condition(condition)) * x).sum(dim=1)
        return logits


class ConditionalNorm(nn.Module):
    """Batch norm whose scale and shift come from a condition (N, K); plain batch norm where K is 0."""

    def __init__(self, channels: int, told: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=told == 0)
        self.code = nn.Linear(told, 2 * channels, bias=False) if told else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        x = self.norm(x)
        if self.code is None:
            return x
        scale, shift = self.code(condition)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class UpBlock(nn.Module):
    """(N, C, H, W) -> (N, C', 2 H, 2 W): norm, ReLU, doubling, convolution, norm, ReLU, convolution; plus a short cut."""

    def __init__(self, inputs: int, outputs: int, told: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(inputs, told), ConditionalNorm(outputs, told)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        y = self.conv1(F.interpolate(F.relu(self.norm1(x, condition)), scale_factor=2.0))
        y = self.conv2(F.relu(self.norm2(y, condition)))
        return y + F.interpolate(
            self.short(x), scale_factor=2.0
        )  # 1x1: the same before doubling, at a quarter of the work


class FirstBlock(nn.Module):
    """(N, C, H, W) -> (N, C', H/2, W/2), without the ReLU that would cut the picture's dark half."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
        return y + self.short(F.avg_pool2d(x, 2))


class DownBlock(nn.Module):
    """(N, C, H, W) -> (N, C', H, W), half the side where it shrinks: ReLU, convolution, twice; plus a short cut."""

    def __init__(self, inputs: int, outputs: int, *, shrink: bool) -> None:
        super().__init__()
        self.shrink = shrink
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Conv2d(inputs, outputs, 1) if shrink or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(F.relu(x))))
        return self._half(y) + self.short(self._half(x))

    def _half(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.shrink else x


# -- private --------------------------------------------------------------------------------------------------------


def _check_size(size: int) -> None:
    if size not in SIZES:
        raise ConfigError(f"size is {size} px; an SNGAN is built for one of {', '.join(map(str, SIZES))}")


def _base(size: int) -> int:
    """Side of the smallest feature map."""
    return 7 if size == 28 else 4


def _widths(size: int, width: int, most: int) -> list[int]:
    """Channels at full size, at half of it, … down to the smallest side."""
    halvings = int(math.log2(size // _base(size)))
    return [min(width * 2**i, most) for i in range(halvings + 1)]


def _initialise(module: nn.Module) -> None:
    """Glorot uniform, with gain sqrt(2) in the blocks' 3x3 convolutions, zero biases: as the paper's own code."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            inside = isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2) if inside else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
