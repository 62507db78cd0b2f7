"""Face-swap autoencoders around the network of December 2017, and four designs made from it.

`SwapConfig` (recipe `swap-shared`): convolutions 5×5 stride 2, a dense bottleneck, PixelShuffle upscaling. Everyone's face
is encoded alike; whose decoder reads the code decides whose face comes out. At the defaults the encoder has 69,662,976
parameters and each decoder 6,199,747. The others change one thing each:
`SwapTwoEncodersConfig` an encoder per person as well: the naive design, whose codes do not mean the same to two decoders.
`SwapUnetConfig` skip connections, of coarse features only.
`SwapMaskConfig` decoders that also paint where they are to be believed.
`SwapPartsConfig` decoders with a second head for eyes and mouth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake import dist
from counterfake.errors import ConfigError
from counterfake.nets.swap_family import (
    SLOPE,
    Masks,
    Painted,
    Routes,
    SelfAttention,
    SwapFamily,
    Upscale,
    initialise,
)

Placed = Callable[[Tensor], Tensor]  # codes (N, units) -> codes


@dataclass(frozen=True, kw_only=True)
class SwapConfig(SwapFamily):
    """One encoder for everyone, a decoder per person."""

    encoder: tuple[int, ...] = (128, 256, 512, 1024)  # channels of the stride-2 convolutions
    code: int = 1024  # units of the bottleneck
    upscaled: int = 512  # channels after the encoder's own upscaling
    decoder: tuple[int, ...] = (256, 128, 64)  # channels after each upscaling; one less than `encoder`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 2 ** len(self.encoder):
            raise ConfigError(f"size {self.size} must be a multiple of {2 ** len(self.encoder)}")
        if len(self.decoder) != len(self.encoder) - 1:
            raise ConfigError(
                f"decoder has {len(self.decoder)} stages but the encoder halves {len(self.encoder)} times and doubles"
                f" once; it needs {len(self.encoder) - 1}"
            )

    @property
    def code_side(self) -> int:
        """Side of the last encoder features; codes have twice that."""
        return self.size // 2 ** len(self.encoder)

    def build(self) -> nn.Module:
        """The autoencoder; raises ConfigError while it has no identities."""
        return SwapNet(self)

    @classmethod
    def tiny(cls) -> SwapConfig:
        return cls(identities=("a", "b"), size=16, encoder=(8, 16), code=16, upscaled=16, decoder=(8,))


@dataclass(frozen=True, kw_only=True)
class SwapTwoEncodersConfig(SwapConfig):
    """A whole autoencoder per person. A swap hands the code of one to the decoder of another, who never learned to read
    it: kept to show that the encoder has to be shared."""

    def build(self) -> nn.Module:
        return TwoEncoders(self)


@dataclass(frozen=True, kw_only=True)
class SwapUnetConfig(SwapConfig):
    """Skip connections from encoder features of at most `skip_side` pixels a side.

    Whatever goes around the bottleneck is the source's own face: finer skips carry its identity to the other person's
    decoder, which then copies instead of painting. Features of 8×8 of a face of 64 pixels do so as well: 98 % of the
    swaps were named as their source; with those of 4×4 alone, whose codes are moved but whose skips are not, 30 % were
    (EXPERIMENTS 2026-11-28), against 0 to 9 % without any."""

    LIMIT: ClassVar[int] = 8

    skip_side: int = 8  # pixels; at most LIMIT

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.code_side <= self.skip_side <= self.LIMIT:
            raise ConfigError(
                f"skip_side {self.skip_side} must lie between {self.code_side}, the encoder's last side, and {self.LIMIT}: "
                "finer skips carry the source's identity into the swap"
            )

    def build(self) -> nn.Module:
        return Unet(self)


@dataclass(frozen=True, kw_only=True)
class SwapMaskConfig(SwapConfig):
    """Decoders paint colours and α: face = α · colours + (1 − α) · input. shaoanlu/faceswap-GAN v2.2, reimplemented from its
    description: sigmoid in [0, 1] for its tanh in [-1, 1], attention in encoder and decoder at `attention_side` only."""

    MASKS: ClassVar[Masks] = "face"

    attention_side: int = 16  # pixels of the features with self-attention; 0 = none

    def build(self) -> nn.Module:
        return MaskNet(self)


@dataclass(frozen=True, kw_only=True)
class SwapPartsConfig(SwapConfig):
    """A second head per decoder that paints eyes and mouth, pasted through a mask it also paints."""

    MASKS: ClassVar[Masks] = "parts"

    parts: tuple[int, ...] = (
        128,
        64,
        32,
    )  # channels of the second head after each upscaling; as many as `decoder`

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.parts) != len(self.decoder):
            raise ConfigError(
                f"parts has {len(self.parts)} stages but decoder {len(self.decoder)}; give both as many"
            )

    def build(self) -> nn.Module:
        return PartsNet(self)

    @classmethod
    def tiny(cls) -> SwapPartsConfig:
        return cls(
            identities=("a", "b"), size=16, encoder=(8, 16), code=16, upscaled=16, decoder=(8,), parts=(8,)
        )


class SwapEncoder(nn.Module):
    """faces (N, 3, S, S) -> codes (N, upscaled, s, s) with s = S / 2 ** (stages - 1)."""

    def __init__(self, config: SwapConfig) -> None:
        super().__init__()
        channels = (3, *config.encoder)
        self.down = nn.ModuleList(nn.Conv2d(i, o, 5, stride=2) for i, o in itertools.pairwise(channels))
        self.side = config.code_side
        units = config.encoder[-1] * self.side**2
        self.narrow = nn.Linear(units, config.code)
        self.widen = nn.Linear(config.code, units)
        self.up = Upscale(config.encoder[-1], config.upscaled)

    def forward(self, faces: Tensor, placed: Placed = lambda code: code) -> Tensor:
        return self.up(self.coded(self.features(faces)[-1], placed))  # (N, upscaled, 2s, 2s)

    def features(self, faces: Tensor) -> list[Tensor]:
        """What each convolution gives, finest first; side halves each time."""
        found = []
        for number, conv in enumerate(self.down):
            # pads 1 before and 2 after, as Keras' "same" does
            faces = self.looked(number, F.leaky_relu(conv(F.pad(faces, (1, 2, 1, 2))), SLOPE))
            found.append(faces)
        return found

    def looked(self, number: int, features: Tensor) -> Tensor:
        """Features of convolution `number`, for designs that do more with them."""
        return features

    def coded(self, features: Tensor, placed: Placed) -> Tensor:
        """The last features through the bottleneck, whose codes `placed` may move: (N, C, s, s) -> (N, C, s, s)."""
        code = placed(self.narrow(features.flatten(1)))  # (N, code)
        return self.widen(code).unflatten(1, (-1, self.side, self.side))


class SwapDecoder(nn.Module):
    """codes (N, upscaled, s, s) -> faces (N, outputs, S, S) in [0, 1] of one identity."""

    def __init__(self, config: SwapConfig, inputs: int = 0, outputs: int = 3) -> None:
        super().__init__()
        channels = (inputs or config.upscaled, *config.decoder)
        self.up = nn.Sequential(*(Upscale(i, o) for i, o in itertools.pairwise(channels)))
        self.paint = nn.Conv2d(channels[-1], outputs, 5, padding=2)

    def forward(self, codes: Tensor) -> Tensor:
        return self.paint(self.up(codes)).sigmoid()


class SwapNet(nn.Module):
    """The shared encoder and a decoder per person. A swap moves the code from where the source's codes lie to where the
    target's do, see `Centres`."""

    def __init__(
        self,
        config: SwapConfig,
        encoder: Callable[[SwapConfig], nn.Module] = SwapEncoder,
        decoder: Callable[[SwapConfig], nn.Module] = SwapDecoder,
    ) -> None:
        super().__init__()
        self.identities = config._named()
        self.encoder = encoder(config)
        self.decoders = nn.ModuleList(decoder(config) for _ in config.identities)
        self.centres = Centres(len(config.identities), config.code)
        self.apply(initialise)

    def forward(self, faces: Tensor, identity: Tensor, source: Tensor | None = None) -> Painted:
        """faces (N, 3, S, S) in [0, 1], who each becomes (N,) int64 -> faces as those people.

        `source` (N,): whose faces are shown; without it, or where it is who the face becomes, its code stays where it is."""
        return self.composed(self.decoded(faces, identity, source), faces)

    def composed(self, made: Tensor, faces: Tensor) -> Painted:
        """What the decoders gave (N, their channels, S, S) as faces."""
        return Painted(made)

    def decoded(self, faces: Tensor, identity: Tensor, source: Tensor | None) -> Tensor:
        """What the decoders give: (N, their channels, S, S)."""
        routes = Routes(identity, len(self.decoders))
        codes = self.encoder(faces, lambda code: self.centres(code, identity, source))
        return routes.through(self.decoders, codes)


class Centres(nn.Module):
    """Mean and spread of each person's codes, learned by watching (moving averages over updates and ranks; no gradient).

    An encoder that everyone shares still puts each person's codes in a place of their own, where the decoder of another
    never was. Domain-specific normalisation (Chang et al. 2019, https://arxiv.org/abs/1906.03950), but only where a face
    changes its person, so that what is trained stays the design of 2017. EXPERIMENTS 2026-11-28: all of 192 swaps are
    named as their target with it, 86 % without."""

    RATE: ClassVar[float] = 0.01  # of the moving averages, per update
    LEAST: ClassVar[float] = 1e-6  # variance
    moments: Tensor  # (people, 2, units): means of codes and of their squares

    def __init__(self, people: int, units: int) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(people, 2, units))

    def forward(self, code: Tensor, identity: Tensor, source: Tensor | None) -> Tensor:
        """code (N, units) of faces of `source` (N,) -> as if they were of `identity` (N,)."""
        if self.training:
            self._watch(code.detach().float(), identity)
        if source is None:
            return code
        mean, square = self.moments.unbind(1)  # (people, units) each
        spread = (square - mean.square()).clamp(min=self.LEAST).sqrt()
        moved = (code - mean[source]) / spread[source] * spread[identity] + mean[identity]
        return torch.where((identity == source)[:, None], code, moved.to(code.dtype))

    @torch.no_grad()
    def _watch(self, code: Tensor, identity: Tensor) -> None:
        rows = torch.cat([code, code.square(), torch.ones_like(code[:, :1])], dim=1)
        sums = dist.sum_over_ranks(
            rows.new_zeros(len(self.moments), rows.shape[1]).index_add_(0, identity, rows)
        )
        pictures = sums[:, -1:]  # (people, 1)
        now = (sums[:, :-1] / pictures.clamp(min=1)).view_as(self.moments)
        self.moments.lerp_(now, (self.RATE * (pictures > 0).float())[:, :, None])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Models of before there were centres have none, and move no code."""
        state_dict.setdefault(f"{prefix}moments", torch.zeros_like(self.moments))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class TwoEncoders(nn.Module):
    """An encoder and a decoder per person."""

    def __init__(self, config: SwapConfig) -> None:
        super().__init__()
        self.identities = config._named()
        self.encoders = nn.ModuleList(SwapEncoder(config) for _ in config.identities)
        self.decoders = nn.ModuleList(SwapDecoder(config) for _ in config.identities)
        self.apply(initialise)

    def forward(self, faces: Tensor, identity: Tensor, source: Tensor | None = None) -> Painted:
        """`source` (N,): whose encoder reads each face; without it the asked person's own, which is a reconstruction."""
        readers = Routes(identity if source is None else source, len(self.encoders))
        codes = readers.through(self.encoders, faces)
        return Painted(Routes(identity, len(self.decoders)).through(self.decoders, codes))


class Unet(SwapNet):
    """Coarse encoder features beside the code; see SwapUnetConfig."""

    def __init__(self, config: SwapUnetConfig) -> None:
        extra = config.encoder[-2] if config.skip_side >= 2 * config.code_side else 0
        inputs = config.upscaled + extra
        super().__init__(config, _SkippingEncoder, lambda c: SwapDecoder(c, inputs))


class _SkippingEncoder(SwapEncoder):
    """codes ‖ features of the same side, and before that code ‖ the last features."""

    def __init__(self, config: SwapConfig) -> None:
        super().__init__(config)
        assert isinstance(config, SwapUnetConfig), "only SwapUnetConfig has skips"
        self.both = config.skip_side >= 2 * config.code_side
        self.up = Upscale(2 * config.encoder[-1], config.upscaled)

    def forward(self, faces: Tensor, placed: Placed = lambda code: code) -> Tensor:
        *_, finer, last = self.features(faces)
        codes = self.up(torch.cat([self.coded(last, placed), last], dim=1))  # (N, upscaled, 2s, 2s)
        return torch.cat([codes, finer], dim=1) if self.both else codes


class MaskNet(SwapNet):
    """Decoders of four channels: α and colours; see SwapMaskConfig."""

    def __init__(self, config: SwapMaskConfig) -> None:
        super().__init__(config, _LookingEncoder, _LookingDecoder)

    def composed(self, made: Tensor, faces: Tensor) -> Painted:
        alpha, colours = torch.split(made, [1, 3], dim=1)
        return Painted(alpha * colours + (1 - alpha) * faces, alpha, colours)


class _LookingEncoder(SwapEncoder):
    """With self-attention after the convolution that gives `attention_side`."""

    def __init__(self, config: SwapConfig) -> None:
        super().__init__(config)
        assert isinstance(config, SwapMaskConfig), "only SwapMaskConfig has attention"
        sides = [config.size // 2 ** (n + 1) for n in range(len(config.encoder))]
        self.at = sides.index(config.attention_side) if config.attention_side in sides else -1
        self.attention = SelfAttention(config.encoder[self.at]) if self.at >= 0 else nn.Identity()

    def looked(self, number: int, features: Tensor) -> Tensor:
        return self.attention(features) if number == self.at else features


class _LookingDecoder(SwapDecoder):
    """Four channels, with self-attention at `attention_side`."""

    def __init__(self, config: SwapConfig) -> None:
        super().__init__(config, outputs=4)
        assert isinstance(config, SwapMaskConfig), "only SwapMaskConfig has attention"
        sides = [config.code_side * 2 ** (n + 2) for n in range(len(config.decoder))]
        if config.attention_side in sides:
            at = sides.index(config.attention_side)
            self.up.insert(at + 1, SelfAttention(config.decoder[at]))


class PartsNet(SwapNet):
    """A head for the whole face and one for eyes and mouth; see SwapPartsConfig."""

    def __init__(self, config: SwapPartsConfig) -> None:
        super().__init__(config, SwapEncoder, _TwoHeads)

    def composed(self, made: Tensor, faces: Tensor) -> Painted:
        whole, parts, mask = torch.split(made, [3, 3, 1], dim=1)
        return Painted(mask * parts + (1 - mask) * whole, mask, parts)


class _TwoHeads(nn.Module):
    """codes (N, upscaled, s, s) -> whole face, parts, their mask: (N, 7, S, S) in [0, 1]."""

    def __init__(self, config: SwapConfig) -> None:
        super().__init__()
        assert isinstance(config, SwapPartsConfig), "only SwapPartsConfig has two heads"
        self.whole = SwapDecoder(config)
        channels = (config.upscaled, *config.parts)
        self.parts = nn.Sequential(
            *(Upscale(i, o) for i, o in itertools.pairwise(channels)),
            nn.Conv2d(channels[-1], 4, 5, padding=2),
            nn.Sigmoid(),
        )

    def forward(self, codes: Tensor) -> Tensor:
        return torch.cat([self.whole(codes), self.parts(codes)], dim=1)
