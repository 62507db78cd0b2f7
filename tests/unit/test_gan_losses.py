"""Losses against their closed forms and against autograd in double precision."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.learners.gan_losses import (
    GRADIENT_RATIOS,
    Loss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    r1_penalty,
)

REAL = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
FAKE = torch.tensor([-2.0, 0.25, 1.5], dtype=torch.float64)


def s(logits: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-logits))


# (D's, G's) written down from the papers
DEFINITIONS = {
    "non_saturating": (
        -torch.log(s(REAL)).mean() - torch.log(1 - s(FAKE)).mean(),
        -torch.log(s(FAKE)).mean(),
    ),
    "minimax": (-torch.log(s(REAL)).mean() - torch.log(1 - s(FAKE)).mean(), torch.log(1 - s(FAKE)).mean()),
    "lsgan": (((REAL - 1) ** 2).mean() / 2 + (FAKE**2).mean() / 2, ((FAKE - 1) ** 2).mean() / 2),
    "hinge": ((1 - REAL).clamp(min=0).mean() + (1 + FAKE).clamp(min=0).mean(), -FAKE.mean()),
    "wasserstein": (FAKE.mean() - REAL.mean(), -FAKE.mean()),
}


@pytest.mark.parametrize("name", get_args(Loss))
def test_losses_are_those_of_the_papers(name: Loss) -> None:
    d_loss, g_loss = DEFINITIONS[name]
    torch.testing.assert_close(discriminator_loss(name, REAL, FAKE), d_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(generator_loss(name, FAKE), g_loss, rtol=1e-12, atol=0)


def test_logits_and_labels_give_torchs_cross_entropy() -> None:
    bce = F.binary_cross_entropy_with_logits
    expected = bce(REAL, torch.ones_like(REAL)) + bce(FAKE, torch.zeros_like(FAKE))
    torch.testing.assert_close(discriminator_loss("non_saturating", REAL, FAKE), expected)


@pytest.mark.parametrize("name", get_args(Loss))
def test_float32_agrees_with_double_precision_at_large_logits(name: Loss) -> None:
    logits = torch.tensor([-60.0, -5.0, 0.0, 5.0, 60.0])
    exact = discriminator_loss(name, logits.double(), logits.double())
    torch.testing.assert_close(discriminator_loss(name, logits, logits).double(), exact, rtol=1e-6, atol=1e-6)
    assert generator_loss(name, logits).isfinite()


@pytest.mark.parametrize("name", sorted(GRADIENT_RATIOS))
def test_gradient_ratios_are_those_of_autograd(name: Loss) -> None:
    logits = torch.linspace(-8, 8, 33, dtype=torch.float64).requires_grad_()
    (g,) = torch.autograd.grad(generator_loss(name, logits), logits)
    (d,) = torch.autograd.grad(discriminator_loss(name, torch.zeros(1).double(), logits), logits)
    torch.testing.assert_close(GRADIENT_RATIOS[name](logits.detach()) * d, g, rtol=1e-10, atol=1e-15)


def test_no_reals_cost_nothing() -> None:
    none = torch.zeros(0)
    assert discriminator_loss("non_saturating", none, torch.zeros(4)).item() == pytest.approx(math.log(2))
    assert r1_penalty(Linear(), torch.zeros(0, 1, 4, 4), 1.0) == 0


class Linear(nn.Module):
    """D(x) = <w, x>: its slope is w everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(0)))

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1) @ self.weight


def test_r1_of_a_linear_critic_is_half_gamma_times_its_squared_weight() -> None:
    critic = Linear()
    penalty = r1_penalty(critic, torch.randn(5, 1, 4, 4), gamma=3.0)
    torch.testing.assert_close(penalty, 1.5 * critic.weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(critic.weight.grad, 3.0 * critic.weight.detach())  # d/dw gamma/2 |w|^2


def test_gradient_penalty_of_a_linear_critic_depends_on_its_norm_only() -> None:
    critic = Linear()
    pictures = torch.randn(2, 5, 1, 4, 4)
    penalty = gradient_penalty(critic, *pictures, torch.rand(5), weight=10.0)
    norm = critic.weight.detach().norm()
    torch.testing.assert_close(penalty, 10 * (critic.weight.norm() - 1) ** 2)
    penalty.backward()
    torch.testing.assert_close(critic.weight.grad, 20 * (norm - 1) * critic.weight.detach() / norm)


def test_gradient_penalty_is_taken_between_the_pictures() -> None:
    """D(x) = |x|^2 / 2 has slope x: at mix m the penalty is (|m x + (1 - m) f| - 1)^2."""
    real, fake = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    mix = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    between = mix.view(3, 1, 1, 1) * real + (1 - mix.view(3, 1, 1, 1)) * fake
    expected = ((between.flatten(1).norm(dim=1) - 1) ** 2).mean()
    found = gradient_penalty(lambda x: x.flatten(1).square().sum(1) / 2, real, fake, mix, weight=1.0)
    torch.testing.assert_close(found, expected)


def test_penalties_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    weight = critic[1].weight
    real = torch.randn(6, 1, 2, 2, dtype=torch.float64)

    def penalty() -> Tensor:
        return r1_penalty(lambda x: critic(x).squeeze(1), real, 2.0)

    penalty().backward()
    with torch.no_grad():
        weight[0, 0] += 1e-6
    above = penalty()
    with torch.no_grad():
        weight[0, 0] -= 2e-6
    slope = (above - penalty()) / 2e-6
    torch.testing.assert_close(weight.grad[0, 0], slope.detach(), rtol=1e-6, atol=1e-9)
