"""The critic of a face swap: is each patch of the picture photographed, given the bent face the painter was shown?

shaoanlu/faceswap-GAN v2.2, from its description: it reads the picture beside the distorted input (6 channels), four 4×4
convolutions of stride 2 and self-attention before the last, and gives a logit per patch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from counterfake.nets import NetConfig
from counterfake.nets.swap_family import SelfAttention, initialise

SLOPE = 0.2


@dataclass(frozen=True, kw_only=True)
class SwapDiscriminatorConfig(NetConfig):
    """Pictures ‖ inputs (N, 6, S, S) in [0, 1] -> logits of patches (N, 1, S/16, S/16); higher = photographed."""

    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of the stride-2 convolutions
    attention: bool = True  # before the last of them

    def build(self) -> nn.Module:
        return SwapDiscriminator(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(widths=(8, 8))


class SwapDiscriminator(nn.Module):
    """A patch critic without any layer that mixes rows."""

    def __init__(self, config: SwapDiscriminatorConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((6, *config.widths)):
            if config.attention and outputs == config.widths[-1] and layers:
                layers.append(SelfAttention(inputs))
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(config.widths[-1], 1, 3, padding=1))
        self.apply(initialise)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures * 2 - 1)  # centred
