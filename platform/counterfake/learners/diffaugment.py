"""Augmentation of what a discriminator sees, real and fake alike, through which the generator's gradient passes.

`diff_augment`: Zhao et al. 2020 (https://arxiv.org/abs/2006.10738), always on. `Ada`: Karras et al. 2020
(https://arxiv.org/abs/2006.06676), whose probability follows how far D overfits. Differences from the papers: ADA's
geometry is one bilinear warp with reflected borders, without the wavelet filters, and its colour part has no luma flip.
All draws come from torch's default generator on the pictures' device, which the loop seeds; nothing waits for the device.
Letters: N rows, C channels, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from counterfake import dist
from counterfake.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DiffAugment:
    """Which of the paper's three changes are made; 0 or False = not."""

    colour: bool = False  # brightness +-0.5, saturation 0 to 2, contrast 0.5 to 1.5
    translation: float = 0.0  # at most this share of the side, each axis; the paper's is 0.125
    cutout: float = 0.0  # side of the grey square / side of the picture; the paper's is 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.translation < 1 and 0 <= self.cutout <= 1):
            raise ConfigError(
                f"diffaugment needs translation in [0, 1) and cutout in [0, 1], got {self.translation}, {self.cutout}"
            )

    @classmethod
    def paper(cls) -> DiffAugment:
        """Colour, translation and cutout at the strengths of the paper."""
        return cls(colour=True, translation=0.125, cutout=0.5)


@dataclass(frozen=True, kw_only=True)
class AdaConfig:
    """Adaptive augmentation: p moves so that the share of reals that D calls real, 2 s - 1 = E sign D(x), meets `target`."""

    target: float = 0.6  # of E sign D(x)
    interval: int = 4  # D updates between adjustments
    speed_kimg: float = 500.0  # thousands of reals in which p goes from 0 to 1; 100 for little data
    most: float = 0.8  # p stays below: augmentations that always happen leak into the samples

    def __post_init__(self) -> None:
        if self.interval < 1 or self.speed_kimg <= 0 or not 0 < self.most <= 1:
            raise ConfigError(
                f"ada needs interval >= 1, speed_kimg > 0 and most in (0, 1], got {self.interval}, {self.speed_kimg}, {self.most}"
            )


def diff_augment(images: Tensor, config: DiffAugment) -> Tensor:
    """images (N, C, H, W) in [-1, 1] -> the same shape; each picture changed on its own. Values may leave the range."""
    if config.colour:
        images = _colour(images)
    if config.translation:
        images = _translate(images, config.translation)
    return _cutout(images, config.cutout) if config.cutout else images


class Ada:
    """The probability of augmentation and the signs it is steered by; all on the device."""

    def __init__(self, config: AdaConfig, device: torch.device) -> None:
        self.config = config
        self.probability = torch.zeros((), device=device)
        self._signs = torch.zeros(2, device=device)  # sum of sign D(x), rows
        self._updates = 0

    def __call__(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) -> each change made to each picture with the present probability."""
        return _recolour(_warp(images, self.probability), self.probability)

    def observe(self, real_logits: Tensor) -> None:
        """Note D's answers to a batch of reals (N,); adjusts p every `interval` calls, on all ranks alike."""
        seen = [real_logits.detach().sign().sum(), real_logits.new_tensor(len(real_logits))]
        self._signs = self._signs + torch.stack(seen)
        self._updates += 1
        if self._updates % self.config.interval:
            return
        signs, rows = dist.sum_over_ranks(self._signs).unbind()
        step = (
            (signs / rows.clamp(min=1) - self.config.target).sign() * rows / (self.config.speed_kimg * 1000)
        )
        self.probability = (self.probability + step).clamp(0, self.config.most)
        self._signs = torch.zeros_like(self._signs)

    def state_dict(self) -> dict[str, Any]:
        return {"probability": self.probability, "signs": self._signs, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.probability = state["probability"].to(self.probability)
        self._signs = state["signs"].to(self._signs)
        self._updates = state["updates"]


# -- private: DiffAugment ---------------------------------------------------------------------------------------------


def _colour(images: Tensor) -> Tensor:
    images = images + _per_picture(images) - 0.5
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * 2 * _per_picture(images)
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    return middle + (images - middle) * (_per_picture(images) + 0.5)


def _translate(images: Tensor, share: float) -> Tensor:
    """Whole pixels; what comes in from outside is 0, mid-grey, as in the paper."""
    n, _, height, width = images.shape
    down, right = (_between(round(side * share), n, images.device) for side in (height, width))
    rows = torch.arange(height, device=images.device)[None] - down[:, None]  # (N, H): where a row comes from
    columns = torch.arange(width, device=images.device)[None] - right[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    picture = torch.arange(n, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[picture, rows, columns].permute(0, 3, 1, 2)  # (N, C, H, W)
    return moved * inside[:, None].to(images.dtype)


def _cutout(images: Tensor, share: float) -> Tensor:
    """A square of 0 whose centre lies anywhere in the picture."""
    n, _, height, width = images.shape
    keep = torch.ones(n, height, width, dtype=torch.bool, device=images.device)
    inside = []
    for side in (height, width):
        edge = round(side * share)
        centre = torch.randint(0, side + (1 - edge % 2), (n, 1), device=images.device)
        place = torch.arange(side, device=images.device)[None] - (centre - edge // 2)
        inside.append((place >= 0) & (place < edge))
    keep &= ~(inside[0][:, :, None] & inside[1][:, None, :])
    return images * keep[:, None].to(images.dtype)


def _between(most: int, n: int, device: torch.device) -> Tensor:
    """Whole numbers (n,) uniform in [-most, most]."""
    return torch.randint(-most, most + 1, (n,), device=device)


def _per_picture(images: Tensor) -> Tensor:
    """(N, 1, 1, 1) uniform in [0, 1]."""
    return torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)


# -- private: ADA -----------------------------------------------------------------------------------------------------


def _warp(images: Tensor, probability: Tensor) -> Tensor:
    """Mirror, quarter turns, whole-pixel shift, scale, turn, stretch, shift: the paper's blitting and geometry, as one warp."""
    n, device = len(images), images.device

    def chosen(values: Tensor, share: Tensor) -> Tensor:
        """`values` (n,) for a random `share` of the pictures, 0 for the others."""
        return values * (torch.rand(n, device=device) < share)

    mirror = 1 - 2 * chosen((torch.rand(n, device=device) < 0.5).float(), probability)
    quarters = chosen(torch.randint(0, 4, (n,), device=device).float(), probability) * (math.pi / 2)
    once = 1 - (1 - probability).sqrt()  # two turns: together as often as one of probability p
    turn = quarters + chosen((torch.rand(n, device=device) * 2 - 1) * math.pi, once)
    scale = torch.exp2(chosen(0.2 * torch.randn(n, device=device), probability))
    stretch = torch.exp2(chosen(0.2 * torch.randn(n, device=device), probability))
    second = chosen((torch.rand(n, device=device) * 2 - 1) * math.pi, once)
    shift = torch.stack([chosen(0.25 * torch.randn(n, device=device), probability) for _ in range(2)], dim=1)
    zoom = torch.diag_embed(torch.stack([mirror / (scale * stretch), stretch / scale], dim=1))
    matrix = _rotation(turn) @ zoom @ _rotation(second)  # (N, 2, 2)
    places = F.affine_grid(torch.cat([matrix, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    return F.grid_sample(
        images, places.to(images.dtype), padding_mode="reflection", align_corners=False
    ).contiguous(memory_format=torch.channels_last)


def _rotation(angle: Tensor) -> Tensor:
    """(N,) radians -> (N, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def _recolour(images: Tensor, probability: Tensor) -> Tensor:
    """Brightness, contrast, hue and saturation; hue and saturation only where there are three channels."""
    n, device = len(images), images.device

    def chosen(values: Tensor) -> Tensor:
        return (values * (torch.rand(n, device=device) < probability))[:, None, None, None]

    images = images + chosen(0.2 * torch.randn(n, device=device))
    images = images * torch.exp2(chosen(0.5 * torch.randn(n, device=device)))
    if images.shape[1] != 3:
        return images
    grey = images.mean(dim=1, keepdim=True)
    colour = images - grey
    hue = chosen((torch.rand(n, device=device) * 2 - 1) * math.pi)
    # a turn about the grey axis (1, 1, 1): v cos + (k x v) sin, for v at right angles to k
    turned = (colour.roll(1, dims=1) - colour.roll(-1, dims=1)) / math.sqrt(3)
    colour = colour * hue.cos() + turned * hue.sin()
    return grey + colour * torch.exp2(chosen(torch.randn(n, device=device)))
