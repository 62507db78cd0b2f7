"""The dense GAN of the articles and of many Keras tutorials: three hidden layers each, 28 px digits.

Generator 100-256-512-1024-784 with tanh, 1,486,352 parameters; discriminator 784-1024-512-256-1, 1,460,225. The article's
discriminator ends in a sigmoid; here it ends in the logit, and the loss holds the sigmoid. No batch norm: rows never mix.
Letters: N batch, C channels, H W pixels, Z noise.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.nets import NetConfig
from counterfake.nets.conditioning import Condition
from counterfake.nets.dcgan import LeakyDropout, init_like_keras


@dataclass(frozen=True, kw_only=True)
class DenseGenerator(NetConfig):
    """Noise (N, Z) -> pictures (N, C, size, size) in [-1, 1]."""

    size: int = 28  # pixels
    channels: int = 1
    noise_size: int = 100  # Z
    widths: tuple[int, ...] = (256, 512, 1024)  # of the hidden layers
    slope: float = 0.2  # of LeakyReLU
    classes: int = 0  # the generator is told one of so many; 0 = none
    embedding: int = 0  # length of the vector that stands for a class; 0 = the class itself

    def build(self) -> Generator:
        return Generator(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(noise_size=8, widths=(16, 16))


@dataclass(frozen=True, kw_only=True)
class DenseDiscriminator(NetConfig):
    """Pictures (N, C, size, size) in [-1, 1] -> logits (N,), higher = more real (the GAN convention)."""

    size: int = 28  # pixels
    channels: int = 1
    widths: tuple[int, ...] = (1024, 512, 256)
    slope: float = 0.2
    dropout: float = 0.3  # after each hidden layer
    classes: int = 0
    embedding: int = 0

    def build(self) -> Discriminator:
        return Discriminator(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(widths=(16, 16))


class Generator(nn.Module):
    """Dense layers with LeakyReLU, then tanh; a condition is concatenated with the noise (Mirza & Osindero 2014)."""

    def __init__(self, config: DenseGenerator) -> None:
        super().__init__()
        self.config, self.classes = config, config.classes
        self.condition = Condition(config.classes, config.embedding) if config.classes else None
        told = self.condition.width if self.condition else 0
        widths = (config.noise_size + told, *config.widths, config.channels * config.size**2)
        self.layers = _dense(widths)

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """noise (N, Z), with classes also what to draw -> pictures (N, C, H, W) in [-1, 1]."""
        x = torch.cat([noise, self.condition(condition)], dim=1) if self.condition else noise
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), self.config.slope)
        size = self.config.size
        return torch.tanh(self.layers[-1](x)).view(-1, self.config.channels, size, size)


class Discriminator(nn.Module):
    """Dense layers with LeakyReLU and dropout, one logit; a condition is concatenated with the pixels."""

    def __init__(self, config: DenseDiscriminator) -> None:
        super().__init__()
        self.config = config
        self.condition = Condition(config.classes, config.embedding) if config.classes else None
        told = self.condition.width if self.condition else 0
        self.layers = _dense((config.channels * config.size**2 + told, *config.widths, 1))
        self.activation = LeakyDropout(config.slope, config.dropout)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        """images (N, C, H, W) in [-1, 1], with classes also what they should show -> logits (N,)."""
        x = images.flatten(1)
        if self.condition:
            x = torch.cat([x, self.condition(condition).to(x.dtype)], dim=1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x).squeeze(1)


# -- private --------------------------------------------------------------------------------------------------------


def _dense(widths: tuple[int, ...]) -> nn.ModuleList:
    layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
    init_like_keras(layers)
    return layers
