"""The phases of a training run as data, counted in images, so that they stay where they are at any batch size or resume.

A face swap is learned from bent faces until features have formed, then from straight ones, then against a critic. Which
phase is on follows from the images seen alone; nothing of it is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from counterfake.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What holds for so many images; factors are on the learner's own settings."""

    images: int = 0  # over all ranks; 0 = until the run ends, for the last phase only
    warp: bool = True  # the faces to read are bent; False = turned, moved and scaled only
    adversarial: float = 0.0  # factor on the critic's weight; 0 = it rests
    perceptual: float = 0.0  # factor on the perceptual weights; 0 = off
    mask_hinge: float = (
        0.0  # least mean of a face mask, pushed up to; 0 = its mean is pushed down (L1) instead
    )
    lr_scale: float = 1.0  # factor on every learning rate
    lr_dropout: float = 1.0  # share of the network's weights, drawn anew, that an update changes; SAEHD: 0.3

    def __post_init__(self) -> None:
        if self.images < 0 or min(self.adversarial, self.perceptual) < 0 or self.lr_scale <= 0:
            raise ConfigError(
                "a phase needs images, adversarial and perceptual >= 0 and lr_scale > 0; "
                f"got {self.images}, {self.adversarial}, {self.perceptual}, {self.lr_scale}"
            )
        if not 0 < self.lr_dropout <= 1:
            raise ConfigError(f"a phase's lr_dropout must lie in (0, 1], got {self.lr_dropout}")
        if not 0 <= self.mask_hinge < 1:
            raise ConfigError(f"a phase's mask_hinge must lie in [0, 1), got {self.mask_hinge}")


def check(phases: Sequence[Phase]) -> None:
    """Raises ConfigError for no phases, or one without an end that is not the last."""
    if not phases:
        raise ConfigError("phases is empty; give at least one, like [{}]")
    endless = [number for number, phase in enumerate(phases[:-1]) if not phase.images]
    if endless:
        raise ConfigError(
            f"phase {endless[0]} has images=0, which means until the end, but others follow; give it a number of images"
        )


def current(phases: Sequence[Phase], images: int) -> int:
    """Index of the phase of the next step after `images` images; the last one has no end."""
    ends = itertools.accumulate(phase.images for phase in phases[:-1])
    return sum(images >= end for end in ends)
