"""What the designs of face-swap networks share: their settings, what they give, and rows that go through modules of their own.

Every design maps faces (N, 3, S, S) in [0, 1] and the index of a person (N,) to those faces as that person. Pixels stay in
[0, 1] throughout. Letters: N batch, C channels, S side of a face in pixels, I people.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError, DataError
from counterfake.nets import NetConfig

SLOPE = 0.1  # of the LeakyReLU
Masks = Literal["", "face", "parts"]


class Painted(NamedTuple):
    """What a swap network gives; None where a design has no such thing."""

    face: Tensor  # (N, 3, S, S) in [0, 1]: the face as the asked person, composed where the design composes
    mask: Tensor | None = None  # (N, 1, S, S) in [0, 1]; 1 over what `SwapFamily.MASKS` says
    raw: Tensor | None = (
        None  # (N, 3, S, S) in [0, 1]: what was painted, before it was composed through the mask
    )


@dataclass(frozen=True, kw_only=True)
class SwapFamily(NetConfig):
    """Settings that every design has. `build()` gives a module with `forward(faces, identity, source) -> Painted`.

    `source` (N,) says whose face each row shows, where that is known: designs with an encoder or a place for codes per person ask."""

    identities: tuple[str, ...] = ()  # whose index is whose, in order; the learner fills it from the data
    size: int = 64  # pixels of the face that is read and painted
    coverage: float = (
        160 / 256
    )  # side of the region in the middle of a face crop that is read and painted / crop's side
    normalise: bool = False  # faces are read and painted in a standard light; see `standardise`

    MASKS: ClassVar[Masks] = ""  # what the design's mask covers; "" = it has none

    def __post_init__(self) -> None:
        if not 0 < self.coverage <= 1:
            raise ConfigError(f"coverage must lie in (0, 1], got {self.coverage}")

    def with_identities(self, names: tuple[str, ...]) -> Self:
        return replace(self, identities=names)

    def _named(self) -> tuple[str, ...]:
        """The people; raises ConfigError while there are none."""
        if not self.identities:
            raise ConfigError(
                f"{type(self).__name__}.identities is empty; name at least two, or let the learner fill it"
            )
        return self.identities


class Routes:
    """Which rows go through which of I modules. Making it is the only wait for the device in a step."""

    def __init__(self, index: Tensor, count: int) -> None:
        """index (N,) int64 in [0, I). Raises DataError for a row without identity (-1)."""
        self.order = index.argsort(stable=True)
        self.back = self.order.argsort()
        unknown, *self.counts = (index + 1).bincount(minlength=count + 1).tolist()
        if unknown:
            raise DataError(
                f"{unknown} of {len(index)} faces have no identity; choose some with data.where.identity"
            )

    def through(self, modules: Iterable[nn.Module], rows: Tensor) -> Tensor:
        """rows (N, …) -> (N, …), each through its own module.

        A module without rows still gets gradients, of zero: data-parallel ranks whose batches hold different people
        would otherwise wait for each other for ever."""
        modules = list(modules)
        groups = zip(modules, torch.split(rows[self.order], self.counts), self.counts, strict=True)
        made = torch.cat([module(group) for module, group, count in groups if count])
        return made[self.back] + self._nothing(modules)

    def _nothing(self, modules: list[nn.Module]) -> Tensor | float:
        """0 that depends on every parameter of the modules without rows."""
        idle = [
            p.sum()
            for m, count in zip(modules, self.counts, strict=True)
            if not count
            for p in m.parameters()
        ]
        return 0.0 * torch.stack(idle).sum() if idle and torch.is_grad_enabled() else 0.0


class Halve(nn.Module):
    """(N, C, h, w) -> (N, C', h/2, w/2): convolution 5×5 stride 2, LeakyReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 5, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        # pads 1 before and 2 after, as Keras' "same" does for an even side
        return F.leaky_relu(self.conv(F.pad(features, (1, 2, 1, 2))), SLOPE)


class Upscale(nn.Module):
    """(N, C, h, w) -> (N, C', 2h, 2w): convolution 3×3 to 4·C' channels, LeakyReLU, PixelShuffle."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4 * outputs, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(F.leaky_relu(self.conv(features), SLOPE), 2)


class SelfAttention(nn.Module):
    """(N, C, h, w) -> the same shape: every place looks at all others. Zhang et al. 2018, https://arxiv.org/abs/1805.08318,
    eq. 1 to 3: C / 8 channels of query and key, no scale, and a weight that starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query, self.key = (nn.Conv2d(channels, inner, 1) for _ in range(2))
        self.value = nn.Conv2d(channels, channels, 1)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        query, key, value = (
            layer(features).flatten(2).mT for layer in (self.query, self.key, self.value)
        )  # (N, hw, ·)
        seen = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (N, hw, C)
        return features + self.weight * seen.mT.view_as(features)


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


def initialise(module: nn.Module) -> None:
    """Keras' defaults, as the originals: Glorot uniform, zero bias."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
