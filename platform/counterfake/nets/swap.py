"""Face-swap autoencoder: one encoder shared by all identities, one decoder each.

The network of December 2017 (recipe `swap-shared`): convolutions 5×5 stride 2, a dense bottleneck, PixelShuffle upscaling.
Everyone's face is encoded alike; whose decoder reads the code decides whose face comes out. Pixels are in [0, 1].
At the defaults the encoder has 69,662,976 parameters and each decoder 6,199,747.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError, DataError
from counterfake.nets import NetConfig

SLOPE = 0.1  # of every LeakyReLU


@dataclass(frozen=True, kw_only=True)
class SwapConfig(NetConfig):
    """Faces (N, 3, size, size) in [0, 1] and a decoder index (N,) -> faces of the same shape."""

    identities: tuple[str, ...] = ()  # whose decoder is whose, in order; the learner fills it from the data
    size: int = 64  # pixels; a multiple of 2 ** len(encoder)
    coverage: float = (
        160 / 256
    )  # side of the region in the middle of a face crop that is read and painted / crop's side
    normalise: bool = False  # faces are read and painted in a standard light; see `standardise`
    encoder: tuple[int, ...] = (128, 256, 512, 1024)  # channels of the stride-2 convolutions
    code: int = 1024  # units of the bottleneck
    upscaled: int = 512  # channels after the encoder's own upscaling
    decoder: tuple[int, ...] = (256, 128, 64)  # channels after each upscaling; one less than `encoder`

    def __post_init__(self) -> None:
        if not 0 < self.coverage <= 1:
            raise ConfigError(f"coverage must lie in (0, 1], got {self.coverage}")
        if self.size % 2 ** len(self.encoder):
            raise ConfigError(f"size {self.size} must be a multiple of {2 ** len(self.encoder)}")
        if len(self.decoder) != len(self.encoder) - 1:
            raise ConfigError(
                f"decoder has {len(self.decoder)} stages but the encoder halves {len(self.encoder)} times and doubles"
                f" once; it needs {len(self.encoder) - 1}"
            )

    def build(self) -> SwapNet:
        """The autoencoder; raises ConfigError while it has no identities."""
        if not self.identities:
            raise ConfigError("SwapConfig.identities is empty; name at least two, or let the learner fill it")
        return SwapNet(self)

    def with_identities(self, names: tuple[str, ...]) -> SwapConfig:
        return replace(self, identities=names)

    @classmethod
    def tiny(cls) -> SwapConfig:
        return cls(identities=("a", "b"), size=16, encoder=(8, 16), code=16, upscaled=16, decoder=(8,))


class SwapEncoder(nn.Module):
    """faces (N, 3, S, S) -> codes (N, upscaled, s, s) with s = S / 2 ** (stages - 1)."""

    def __init__(self, config: SwapConfig) -> None:
        super().__init__()
        channels = (3, *config.encoder)
        self.down = nn.ModuleList(nn.Conv2d(i, o, 5, stride=2) for i, o in itertools.pairwise(channels))
        self.side = config.size // 2 ** len(config.encoder)
        units = config.encoder[-1] * self.side**2
        self.narrow = nn.Linear(units, config.code)
        self.widen = nn.Linear(config.code, units)
        self.up = Upscale(config.encoder[-1], config.upscaled)

    def forward(self, faces: Tensor) -> Tensor:
        for conv in self.down:
            # side to half: pads 1 before and 2 after, as Keras' "same" does
            faces = F.leaky_relu(conv(F.pad(faces, (1, 2, 1, 2))), SLOPE)
        code = self.narrow(faces.flatten(1))  # (N, code)
        wide = self.widen(code).unflatten(1, (-1, self.side, self.side))  # (N, C, s, s)
        return self.up(wide)  # (N, upscaled, 2s, 2s)


class SwapDecoder(nn.Module):
    """codes (N, upscaled, s, s) -> faces (N, 3, S, S) in [0, 1] of one identity."""

    def __init__(self, config: SwapConfig) -> None:
        super().__init__()
        channels = (config.upscaled, *config.decoder)
        self.up = nn.Sequential(*(Upscale(i, o) for i, o in itertools.pairwise(channels)))
        self.paint = nn.Conv2d(channels[-1], 3, 5, padding=2)

    def forward(self, codes: Tensor) -> Tensor:
        return self.paint(self.up(codes)).sigmoid()


class Upscale(nn.Module):
    """(N, C, h, w) -> (N, C', 2h, 2w): convolution 3×3 to 4·C' channels, LeakyReLU, PixelShuffle."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4 * outputs, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(F.leaky_relu(self.conv(features), SLOPE), 2)


class SwapNet(nn.Module):
    """The shared encoder and a decoder per identity."""

    def __init__(self, config: SwapConfig) -> None:
        super().__init__()
        self.identities = config.identities
        self.encoder = SwapEncoder(config)
        self.decoders = nn.ModuleList(SwapDecoder(config) for _ in config.identities)
        self.apply(_initialise)

    def forward(self, faces: Tensor, identity: Tensor) -> Tensor:
        """faces (N, 3, S, S) in [0, 1], decoder of each row (N,) int64 -> faces (N, 3, S, S) as those identities.

        A decoder without rows still gets gradients, of zero: data-parallel ranks whose batches hold different
        identities would otherwise wait for each other for ever. Raises DataError for a row without identity (-1).
        """
        order = identity.argsort(stable=True)
        unknown, *counts = (
            (identity + 1).bincount(minlength=len(self.decoders) + 1).tolist()
        )  # the only sync of a step
        if unknown:
            raise DataError(
                f"{unknown} of {len(faces)} faces have no identity; choose some with data.where.identity"
            )
        groups = zip(self.decoders, self.encoder(faces)[order].split(counts), counts, strict=True)
        painted = torch.cat([decode(codes) for decode, codes, count in groups if count])
        return painted[order.argsort()] + self._nothing(counts)

    def matrix(self, faces: Tensor) -> Tensor:
        """faces (N, 3, S, S) -> (N, identities, 3, S, S): every face as everyone."""
        codes = self.encoder(faces)
        return torch.stack([decode(codes) for decode in self.decoders], dim=1)

    def _nothing(self, counts: list[int]) -> Tensor | float:
        """0 that depends on every parameter of the decoders without rows."""
        idle = [
            p.sum()
            for decode, count in zip(self.decoders, counts, strict=True)
            if not count
            for p in decode.parameters()
        ]
        return 0.0 * torch.stack(idle).sum() if idle and torch.is_grad_enabled() else 0.0


def standardise(faces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """faces (N, 3, H, W) in [0, 1] -> (the same with mean 0.5 and deviation 0.2 in the middle half, mean, deviation).

    Over all channels together, so that hues stay: how light a picture is, is neither learned nor taken for the person.
    Back: `faces = (out - 0.5) / 0.2 * deviation + mean`.
    """
    height, width = faces.shape[2:]
    middle = faces[:, :, height // 4 : -(height // 4), width // 4 : -(width // 4)]
    mean = middle.mean(dim=(1, 2, 3), keepdim=True)
    deviation = middle.std(dim=(1, 2, 3), keepdim=True).clamp(min=0.02)
    return ((faces - mean) / deviation * 0.2 + 0.5).clamp(0, 1), mean, deviation


def parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _initialise(module: nn.Module) -> None:
    """Keras' defaults, as the original: Glorot uniform, zero bias."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
