"""DF and LIAE, the designs of DeepFaceLab's SAEHD, written from their description (no code of it was used).

Both have an encoder, a dense "inter" that holds the code, and decoders with residual blocks that paint face and mask.
DF (`SwapDfConfig`): one inter for everyone, a decoder per person; the swap keeps the shape of the target's face.
LIAE (`SwapLiaeConfig`): one decoder for everyone. The first person is coded [AB, AB], person i [B_i, AB], where AB is an inter
for everyone and B_i one of person i alone; a face is swapped by coding it as somebody else. It takes over more of the
light and shape of the source. With two people this is the description's src = [AB, AB], dst = [B, AB]; more are ours.
Flags of "liae-ud": u, the code's length is normalised; d, the last stage paints four pixels per place.
Differences of the networks: PixelShuffle's order of channels. Of the training (presets swap-df and swap-liae): the critic is
faceswap-GAN's, of 6 channels and one logit per patch at 1/16 of the side, where SAEHD has a U-Net of two heads on the
masked source alone; it judges everyone, at 0.1; no true_face_power (a critic of codes), no cosine restarts of the rate
(cos 500), no style powers, no pretraining on other faces; Adam (5e-5, beta1 0.5, epsilon 1e-7, lr_dropout 0.3 without
warp), where SAEHD also offers AdaBelief and RMSprop; the true mask is the row's own where it has one, else an ellipse by
the face's points, where SAEHD takes a blurred hull of 68 landmarks or a segmentation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets.swap_family import (
    Halve,
    Masks,
    Painted,
    Routes,
    SwapFamily,
    Upscale,
    initialise,
)

STAGES = (1, 2, 4, 8)  # channels of the encoder's convolutions / e_dims
RESIDUAL_SLOPE = 0.2


@dataclass(frozen=True, kw_only=True)
class SwapDfConfig(SwapFamily):
    """One encoder and one inter for everyone, a decoder per person."""

    MASKS: ClassVar[Masks] = "face"

    size: int = 128  # pixels; a multiple of 32, or of 16 without `double`
    ae_dims: int = 256  # units of the code
    e_dims: int = 64  # channels of the encoder's first convolution
    d_dims: int = 64  # channels of the decoder's last stage but one, / 2
    d_mask_dims: int = 22  # the same of the mask: d_dims / 3
    unit: bool = True  # u: the code's length is normalised
    double: bool = True  # d: the last stage paints four pixels per place

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.stride:
            raise ConfigError(f"size {self.size} must be a multiple of {self.stride}")

    @property
    def stride(self) -> int:
        """Pixels per place of the inter's dense layer."""
        return 32 if self.double else 16

    @property
    def inter_channels(self) -> int:
        """Channels of an inter's output."""
        return self.ae_dims

    def build(self) -> nn.Module:
        return DfNet(self)

    @classmethod
    def tiny(cls) -> SwapDfConfig:
        return cls(identities=("a", "b"), size=32, ae_dims=8, e_dims=4, d_dims=4, d_mask_dims=2)


@dataclass(frozen=True, kw_only=True)
class SwapLiaeConfig(SwapDfConfig):
    """One encoder and one decoder for everyone, an inter for everyone and one per person but the first."""

    @property
    def inter_channels(self) -> int:
        return 2 * self.ae_dims

    def build(self) -> nn.Module:
        return LiaeNet(self)


class DfNet(nn.Module):
    """Encoder, inter, a decoder per person."""

    def __init__(self, config: SwapDfConfig) -> None:
        super().__init__()
        self.identities = config._named()
        self.encoder, self.inter = _Encoder(config), _Inter(config)
        self.decoders = nn.ModuleList(_Decoder(config, config.inter_channels) for _ in self.identities)
        self.apply(initialise)

    def forward(self, faces: Tensor, identity: Tensor, source: Tensor | None = None) -> Painted:
        """faces (N, 3, S, S) in [0, 1], who each becomes (N,) int64 -> faces and masks as those people."""
        codes = self.inter(self.encoder(faces))
        made = Routes(identity, len(self.decoders)).through(self.decoders, codes)
        return Painted(made[:, :3], made[:, 3:])


class LiaeNet(nn.Module):
    """Encoder, inters, one decoder."""

    def __init__(self, config: SwapLiaeConfig) -> None:
        super().__init__()
        self.identities = config._named()
        self.encoder = _Encoder(config)
        self.inter_all = _Inter(config)  # AB
        self.inter_own = nn.ModuleList(_Inter(config) for _ in self.identities[1:])  # B_1, B_2, …
        self.decoder = _Decoder(config, 2 * config.inter_channels)
        self.apply(initialise)

    def forward(self, faces: Tensor, identity: Tensor, source: Tensor | None = None) -> Painted:
        """The same as DfNet's: who a face becomes decides whose inter codes it."""
        seen = self.encoder(faces)
        inters = [self.inter_all, *self.inter_own]
        own = Routes(identity, len(inters)).through(inters, seen)
        made = self.decoder(torch.cat([own, self.inter_all(seen)], dim=1))
        return Painted(made[:, :3], made[:, 3:])


class _Encoder(nn.Module):
    """faces (N, 3, S, S) -> (N, 8 e_dims · (S / 16)²)."""

    def __init__(self, config: SwapDfConfig) -> None:
        super().__init__()
        channels = [3, *(factor * config.e_dims for factor in STAGES)]
        self.down = nn.Sequential(*(Halve(i, o) for i, o in itertools.pairwise(channels)))
        self.unit = config.unit

    def forward(self, faces: Tensor) -> Tensor:
        flat = self.down(faces).flatten(1)
        if not self.unit:
            return flat
        return flat * (flat.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt()


class _Inter(nn.Module):
    """(N, features) -> (N, inter_channels, 2s, 2s), s = S / stride: a code of ae_dims units, widened and upscaled."""

    def __init__(self, config: SwapDfConfig) -> None:
        super().__init__()
        self.side = config.size // config.stride
        self.narrow = nn.Linear(STAGES[-1] * config.e_dims * (config.size // 16) ** 2, config.ae_dims)
        self.widen = nn.Linear(config.ae_dims, config.inter_channels * self.side**2)
        self.up = Upscale(config.inter_channels, config.inter_channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.up(self.widen(self.narrow(features)).unflatten(1, (-1, self.side, self.side)))


class _Decoder(nn.Module):
    """codes (N, inputs, 2s, 2s) -> face and mask (N, 4, S, S) in [0, 1]."""

    def __init__(self, config: SwapDfConfig, inputs: int) -> None:
        super().__init__()
        face, mask = config.d_dims, config.d_mask_dims
        self.face = nn.Sequential(
            *(Upscale(inputs, 8 * face), _Residual(8 * face)),
            *(Upscale(8 * face, 4 * face), _Residual(4 * face)),
            *(Upscale(4 * face, 2 * face), _Residual(2 * face)),
            _Quarters(2 * face) if config.double else nn.Conv2d(2 * face, 3, 1),
        )
        last = [Upscale(2 * mask, mask)] if config.double else []
        self.mask = nn.Sequential(
            *(Upscale(inputs, 8 * mask), Upscale(8 * mask, 4 * mask), Upscale(4 * mask, 2 * mask)),
            *last,
            nn.Conv2d(mask if config.double else 2 * mask, 1, 1),
        )

    def forward(self, codes: Tensor) -> Tensor:
        return torch.cat([self.face(codes), self.mask(codes)], dim=1).sigmoid()


class _Residual(nn.Module):
    """Two 3×3 convolutions and the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.leaky_relu(self.first(x), RESIDUAL_SLOPE)
        return F.leaky_relu(self.second(inner) + x, RESIDUAL_SLOPE)


class _Quarters(nn.Module):
    """(N, C, h, w) -> (N, 3, 2h, 2w): four pixels per place, one by a 1×1 and three by 3×3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 3, 1)
        self.others = nn.ModuleList(nn.Conv2d(channels, 3, 3, padding=1) for _ in range(3))

    def forward(self, features: Tensor) -> Tensor:
        painted = torch.stack([self.first(features), *(conv(features) for conv in self.others)], dim=2)
        return F.pixel_shuffle(painted.flatten(1, 2), 2)  # channel-major: 3 groups of 4
