"""Losses of adversarial training, each a function of logits or of a critic, each with its formula.

G generator, D discriminator, x real, z noise, l = D(G(z)), s the sigmoid; D's logits are higher for real. Each side of
D's loss is its own mean and the two are added, so that a smaller last batch of reals weighs as much as its fakes.
Letters: N rows, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["non_saturating", "minimax", "lsgan", "hinge", "wasserstein"]
Critic = Callable[[Tensor], Tensor]  # pictures (N, C, H, W) -> logits (N,)


def discriminator_loss(name: Loss, real: Tensor, fake: Tensor) -> Tensor:
    """D's loss from logits of real (N,) and fake (M,) pictures -> scalar.

    lsgan: Mao et al. 2017 (https://arxiv.org/abs/1611.04076), eq. 9; hinge: Lim & Ye 2017 (https://arxiv.org/abs/1705.02894);
    wasserstein: Arjovsky et al. 2017 (https://arxiv.org/abs/1701.07875), eq. 2; else Goodfellow et al. 2014, eq. 1."""
    if name == "lsgan":
        return 0.5 * mean((real - 1) ** 2) + 0.5 * mean(fake**2)
    if name == "hinge":
        return mean(F.relu(1 - real)) + mean(F.relu(1 + fake))
    if name == "wasserstein":
        return mean(fake) - mean(real)
    return mean(F.softplus(-real)) + mean(F.softplus(fake))  # -log s(D(x)) - log(1 - s(l))


def generator_loss(name: Loss, fake: Tensor) -> Tensor:
    """G's loss from the logits of its pictures (M,) -> scalar."""
    if name == "lsgan":
        return 0.5 * ((fake - 1) ** 2).mean()
    if name in ("hinge", "wasserstein"):
        return -fake.mean()
    if name == "minimax":
        return -F.softplus(fake).mean()  # log(1 - s(l)), Goodfellow et al. 2014, eq. 1
    return F.softplus(-fake).mean()  # -log s(l)


# (dL_G/dl) / (dL_D/dl), where it is defined for every logit: what lets one pass through D serve both players
GRADIENT_RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "non_saturating": lambda logits: -torch.exp(-logits.clamp(min=-50.0)),  # (s - 1) / s
    "minimax": lambda logits: -torch.ones_like(logits),  # -s / s
    "wasserstein": lambda logits: -torch.ones_like(logits),  # -1 / 1
}


def r1_penalty(critic: Critic, real: Tensor, gamma: float) -> Tensor:
    """gamma/2 * E |dD/dx|^2 at real x (N, C, H, W) -> scalar with a graph; Mescheder et al. 2018, eq. 9
    (https://arxiv.org/abs/1801.04406). 0 of no rows."""
    return gamma / 2 * mean(_squared_slopes(critic, real))


def gradient_penalty(critic: Critic, real: Tensor, fake: Tensor, mix: Tensor, weight: float) -> Tensor:
    """weight * E (|dD/dm| - 1)^2 at m = mix x + (1 - mix) G(z) -> scalar with a graph; Gulrajani et al. 2017, eq. 3
    (https://arxiv.org/abs/1704.00028). real and fake (N, C, H, W), mix (N,) uniform in [0, 1]."""
    share = mix[:, None, None, None]
    slopes = _squared_slopes(critic, share * real + (1 - share) * fake)
    return weight * mean(((slopes + 1e-12).sqrt() - 1) ** 2)  # the root has no gradient at 0


def mean(values: Tensor) -> Tensor:
    """The mean; 0 of no rows, which is what a rank may get of an epoch's last batch."""
    return values.sum() / max(len(values), 1)


# -- private --------------------------------------------------------------------------------------------------------


def _squared_slopes(critic: Critic, pictures: Tensor) -> Tensor:
    """|dD/dx|^2 of each picture (N,), itself differentiable. Exact where no layer of the critic mixes rows."""
    leaf = pictures.detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(leaf).sum(), leaf, create_graph=True)
    return slope.square().flatten(1).sum(dim=1)
