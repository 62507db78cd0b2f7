"""A detector that looks at frequencies: learned DCT bands and the phase spectrum, in front of a residual network.

Bands after F3-Net's frequency-aware decomposition (Qian et al. 2020, https://arxiv.org/abs/2007.09355, section 3.1): the
picture's DCT times a fixed band plus a learned mask in (-1, 1), transformed back; three bands and all frequencies. Phase after
SPSL (Liu et al. 2021, https://arxiv.org/abs/2103.01856, section 3.2): the picture rebuilt from its phases with every amplitude
set to one, where up-sampling by a generator leaves regular patterns. Different here: both in one net, a small residual network
instead of Xception, no patch statistics, no attention. All transforms are products with constant matrices, so that the net has no
complex numbers and exports to any runtime. Letters: N batch, C channels, S side of the picture, B bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets import NetConfig
from counterfake.nets.backbone import Detector, initialise
from counterfake.nets.resnet import ResNetConfig

# from and to, in units of S, of the sum of both frequency indices; F3-Net's low, middle and high band, and all
BANDS = ((0.0, 1 / 2.82), (1 / 2.82, 0.5), (0.5, 2.0), (0.0, 2.0))
LUMA = (0.299, 0.587, 0.114)
CHANNELS = 3 * len(BANDS) + 1  # that the residual network reads


@dataclass(frozen=True, kw_only=True)
class FrequencyConfig(NetConfig):
    """Images (N, 3, size, size) in [-1, 1] -> fakeness logits (N,)."""

    size: int = 256  # S, pixels; data.preprocess.size must be the same
    trunk: ResNetConfig = field(
        default_factory=lambda: ResNetConfig(blocks=(1, 1, 1, 1), width=32, dropout=0.2)
    )
    learned: bool = True  # masks learn; False keeps the fixed bands

    def __post_init__(self) -> None:
        if self.size < 16 or self.trunk.weights is not None:
            raise ConfigError(
                f"net.size must be at least 16 and trunk.weights none (its input has {CHANNELS} channels), "
                f"got {self.size} and {self.trunk.weights}"
            )

    def build(self) -> Detector:
        layers, channels = self.trunk.layers(CHANNELS)
        features = nn.Sequential(Spectra(self.size, learned=self.learned), nn.BatchNorm2d(CHANNELS))
        trunk = nn.Sequential(layers)
        net = Detector(nn.Sequential(features, trunk), self.trunk.head(channels), mirror=self.trunk.mirror)
        return net.apply(initialise)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=32, trunk=ResNetConfig.tiny())


class Spectra(nn.Module):
    """Pictures (N, 3, S, S) -> (N, 13, S, S): the picture in each of the four bands, and its phase-only image."""

    bands: Tensor
    cosines: Tensor
    waves: Tensor
    luma: Tensor

    def __init__(self, size: int, *, learned: bool = True) -> None:
        super().__init__()
        self.size = size
        self.masks = nn.Parameter(0.1 * torch.randn(len(BANDS), size, size), requires_grad=learned)
        self.register_buffer("bands", band_masks(size), persistent=False)
        self.register_buffer("cosines", dct_matrix(size), persistent=False)
        self.register_buffer("waves", fourier_matrices(size), persistent=False)
        self.register_buffer("luma", torch.tensor(LUMA).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.size, self.size):
            raise ConfigError(
                f"net.size is {self.size} but the pictures are {images.shape[3]}×{images.shape[2]}; set net.size and "
                "data.preprocess.size alike"
            )
        with torch.autocast(
            images.device.type, enabled=False
        ):  # bf16 has too few digits for sums over a picture
            images = images.float()
            return torch.cat([self.decomposed(images), self.phase_only((images * self.luma).sum(1))], dim=1)

    def decomposed(self, images: Tensor) -> Tensor:
        """images (N, 3, S, S) -> (N, 12, S, S): each band of frequencies alone. F3-Net's equation 1."""
        weights = self.bands + 2 * self.masks.sigmoid() - 1  # (B, S, S)
        spectrum = self.cosines @ images @ self.cosines.T  # (N, 3, S, S)
        parts = self.cosines.T @ (spectrum[:, None] * weights[:, None]) @ self.cosines  # (N, B, 3, S, S)
        return parts.flatten(1, 2)

    def phase_only(self, luma: Tensor) -> Tensor:
        """luma (N, S, S) -> (N, 1, S, S) with the same phases and all amplitudes 1; mean square 1. SPSL's equation 4."""
        cosine, sine = self.waves
        real = cosine @ luma @ cosine - sine @ luma @ sine
        imaginary = -(sine @ luma @ cosine) - cosine @ luma @ sine
        size = (real.square() + imaginary.square()).clamp_min(1e-12).sqrt()
        real, imaginary = real / size, imaginary / size
        back = (
            cosine @ real @ cosine
            - sine @ real @ sine
            - sine @ imaginary @ cosine
            - cosine @ imaginary @ sine
        )
        return back[:, None]


def band_masks(size: int) -> Tensor:
    """(B, S, S) of 0 and 1: which DCT coefficients belong to each band."""
    order = torch.arange(size)[:, None] + torch.arange(size)
    return torch.stack([((order >= low * size) & (order < high * size)).float() for low, high in BANDS])


def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II matrix (S, S): spectrum = D x Dᵀ, and Dᵀ transforms back."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * k[None, :] + 1) * k[:, None] / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.float()


def fourier_matrices(size: int) -> Tensor:
    """(2, S, S), symmetric: cosines and sines of the unitary discrete Fourier transform cos - i sin."""
    k = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi * ((k[:, None] * k[None, :]) % size) / size
    return (torch.stack([angle.cos(), angle.sin()]) / math.sqrt(size)).float()
