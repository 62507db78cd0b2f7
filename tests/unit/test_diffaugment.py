"""Differentiable augmentation: gradients pass, strengths are as stated, ADA's controller follows its target."""

from __future__ import annotations

import pytest
import torch

from counterfake.errors import ConfigError
from counterfake.learners.diffaugment import Ada, AdaConfig, DiffAugment, diff_augment
from counterfake.learners.diffaugment import _recolour as recolour
from counterfake.learners.diffaugment import _warp as warp

CPU = torch.device("cpu")


def test_off_changes_nothing() -> None:
    images = torch.randn(4, 3, 8, 8)
    assert diff_augment(images, DiffAugment()) is images


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_reach_every_kept_pixel(channels: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(8, channels, 16, 16).requires_grad_()
    out = diff_augment(images, DiffAugment.paper())
    assert out.shape == images.shape
    out.square().sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).any(dim=(1, 2, 3)).all()


def test_pictures_do_not_mix() -> None:
    images = torch.rand(3, 3, 8, 8).requires_grad_()
    diff_augment(images, DiffAugment.paper())[1].sum().backward()
    assert images.grad is not None
    assert images.grad[0].abs().sum() == images.grad[2].abs().sum() == 0


def test_translation_moves_whole_pixels_and_fills_with_zero() -> None:
    torch.manual_seed(0)
    images = torch.ones(200, 1, 16, 16)
    moved = diff_augment(images, DiffAugment(translation=0.125))
    empty = (moved == 0).all(dim=3).sum(dim=(1, 2))  # rows
    assert set(empty.tolist()) == {0, 1, 2}  # at most 2 of 16 pixels
    assert set(moved.unique().tolist()) == {0.0, 1.0}


def test_translation_keeps_the_picture() -> None:
    image = torch.zeros(50, 1, 16, 16)
    image[:, :, 8, 8] = 1.0
    moved = diff_augment(image, DiffAugment(translation=0.25))
    assert (moved.sum(dim=(1, 2, 3)) == 1).all()
    places = moved.flatten(1).argmax(dim=1)
    assert (places // 16).min() == 4
    assert (places // 16).max() == 12


def test_cutout_takes_a_square_of_half_the_side() -> None:
    torch.manual_seed(0)
    gone = (diff_augment(torch.ones(300, 1, 16, 16), DiffAugment(cutout=0.5)) == 0).sum(dim=(1, 2, 3))
    assert gone.max() == 64
    assert gone.min() == 16  # centred on a corner


def test_saturation_leaves_the_grey_of_a_grey_picture() -> None:
    images = torch.full((5, 3, 4, 4), 0.3)
    out = diff_augment(images, DiffAugment(colour=True))
    torch.testing.assert_close(out, out[:, :1, :1, :1].expand_as(out))


def test_ada_at_probability_zero_is_the_identity() -> None:
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(Ada(AdaConfig(), CPU)(images), images, rtol=0, atol=1e-5)


def test_ada_at_probability_one_changes_every_picture_and_passes_gradients() -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16).requires_grad_()
    ada = Ada(AdaConfig(), CPU)
    ada.probability = torch.tensor(1.0)
    out = ada(images)
    assert ((out - images).abs().mean(dim=(1, 2, 3)) > 0.01).all()
    out.square().sum().backward()
    assert images.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_each_change_happens_with_the_given_probability() -> None:
    torch.manual_seed(0)
    images = torch.full((4000, 1, 2, 2), 0.5)
    changed = (recolour(images, torch.tensor(0.3)) - images).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert changed.float().mean().item() == pytest.approx(1 - 0.7**2, abs=0.03)  # brightness or contrast


def test_a_hue_turn_keeps_brightness_and_saturation() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 3, 4, 4)
    grey = images.mean(dim=1, keepdim=True)
    colour = images - grey
    turned = (colour.roll(1, dims=1) - colour.roll(-1, dims=1)) / 3**0.5
    torch.testing.assert_close(turned.mean(dim=1), torch.zeros(64, 4, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(turned.square().sum(dim=1), colour.square().sum(dim=1))


def test_a_warp_of_a_flat_picture_is_flat() -> None:
    images = torch.full((16, 1, 12, 12), 0.7)
    torch.testing.assert_close(warp(images, torch.tensor(1.0)), images)


def test_ada_rises_while_reals_are_recognised_and_falls_otherwise() -> None:
    ada = Ada(AdaConfig(interval=2, speed_kimg=0.1, most=0.8), CPU)
    for _ in range(2):
        ada.observe(torch.ones(10))  # r = 1 > .6
    assert ada.probability.item() == pytest.approx(20 / 100)
    for _ in range(4):
        ada.observe(torch.cat([torch.ones(6), -torch.ones(4)]))  # r = .2 < .6
    assert ada.probability.item() == 0
    for _ in range(40):
        ada.observe(torch.ones(10))
    assert ada.probability.item() == pytest.approx(0.8)


def test_ada_goes_on_where_it_was_stored() -> None:
    config = AdaConfig(interval=3, speed_kimg=0.1)
    first, second = Ada(config, CPU), Ada(config, CPU)
    for _ in range(4):
        first.observe(torch.ones(5))
    second.load_state_dict(first.state_dict())
    for ada in (first, second):
        ada.observe(torch.ones(5))
        ada.observe(torch.ones(5))
    assert first.probability == second.probability == pytest.approx(0.3)


def test_impossible_strengths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"translation in \[0, 1\)"):
        DiffAugment(translation=1.5)
    with pytest.raises(ConfigError, match="interval >= 1"):
        AdaConfig(interval=0)
