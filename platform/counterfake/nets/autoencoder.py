"""The article's dense autoencoder: pixels -> hidden layers -> a small code -> the mirror of it -> pixels.

With its defaults (784-128-32-128-784) these are the layers of the Keras code in "A 6 Minute Introduction to the Technology
Powering Deepfakes", parameter for parameter: 209,968. The last layer gives logits; `decode` applies the sigmoid, so that
the learner can take the cross-entropy from logits, which is the same number without overflow.
Letters: N batch, C channels, H W pixels, K units of the code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets import NetConfig


@dataclass(frozen=True, kw_only=True)
class DenseAutoencoder(NetConfig):
    """Pictures (N, C, size, size) in [0, 1] -> pictures of the same shape in [0, 1], through `code_size` numbers >= 0."""

    size: int = 28  # pixels
    channels: int = 1
    hidden: tuple[int, ...] = (128,)  # units from the pixels to the code; the decoder mirrors them
    code_size: int = 32  # K; from as many as there are pixels on, copying needs no learning

    def __post_init__(self) -> None:
        sizes = (self.size, self.channels, self.code_size, *self.hidden)
        if min(sizes) < 1:
            raise ConfigError(f"an autoencoder needs sizes of at least 1, got {sizes}")

    @property
    def pixels(self) -> int:
        """Values of one picture."""
        return self.size * self.size * self.channels

    def build(self) -> Autoencoder:
        return Autoencoder(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8, hidden=(16,), code_size=4)


class Autoencoder(nn.Module):
    """Dense layers with ReLU; Glorot-uniform kernels and zero biases, as Keras starts."""

    def __init__(self, config: DenseAutoencoder) -> None:
        super().__init__()
        self.config = config
        down = (config.pixels, *config.hidden, config.code_size)
        self.encoder = nn.Sequential(*_dense(down), nn.ReLU(inplace=True))
        self.decoder = nn.Sequential(*_dense(down[::-1]))

    def encode(self, pictures: Tensor) -> Tensor:
        """pictures (N, C, H, W) in [0, 1] -> codes (N, K), >= 0."""
        return self.encoder(pictures.flatten(1))

    def decode(self, codes: Tensor) -> Tensor:
        """codes (N, K) -> pictures (N, C, H, W) in [0, 1]."""
        side = self.config.size
        return torch.sigmoid(self.decoder(codes)).view(-1, self.config.channels, side, side)

    def logits(self, pictures: Tensor) -> Tensor:
        """pictures (N, C, H, W) in [0, 1] -> logits of the reconstruction (N, C H W)."""
        return self.decoder(self.encode(pictures))

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures (N, C, H, W) in [0, 1] -> reconstructions of the same shape."""
        return self.decode(self.encode(pictures))


# -- private --------------------------------------------------------------------------------------------------------


def _dense(sizes: Sequence[int]) -> list[nn.Module]:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(inplace=True)]
    return layers[:-1]
