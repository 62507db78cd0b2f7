"""Losses, regions and phases of face swapping: closed forms, a reference written as loops, and the truth of drawn faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from counterfake.errors import CheckpointError, ConfigError
from counterfake.images import Preprocess
from counterfake.learners import regions
from counterfake.learners import swap_losses as losses
from counterfake.learners.phases import Phase, check, current
from counterfake.learners.swap_losses import SwapLosses
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.nets.resnet import resnet50
from counterfake.sources.synthetic import portrait

MARGIN = 1.4


# -- pictures -------------------------------------------------------------------------------------------------------


def reference_ssim(x: NDArray[np.float64], y: NDArray[np.float64], window: int) -> float:
    """Wang et al. 2004, eq. 13, window by window: x and y (H, W)."""
    line = np.exp(-((np.arange(window) - (window - 1) / 2) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for top in range(x.shape[0] - window + 1):
        for left in range(x.shape[1] - window + 1):
            a, b = (p[top : top + window, left : left + window] for p in (x, y))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            both = (weights * (a - ma) * (b - mb)).sum()
            likeness = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
            values.append(likeness * (2 * both + 9e-4) / (va + vb + 9e-4))
    return float(np.mean(values))


@pytest.mark.parametrize("window", [3, 5, 11])
def test_ssim_is_the_papers_window_by_window(window: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((2, 14, 16))
    y = np.clip(x + rng.normal(scale=0.2, size=x.shape), 0, 1)
    expected = np.mean([reference_ssim(a, b, window) for a, b in zip(x, y, strict=True)])
    got = losses.ssim(*(torch.tensor(p, dtype=torch.float32)[None] for p in (x, y)), window)
    assert float(got) == pytest.approx(expected, abs=2e-4)


def test_ssim_of_two_plain_pictures_is_that_of_their_levels() -> None:
    """No contrast: (2ab + C1) / (a² + b² + C1)."""
    a, b = 0.3, 0.6
    x, y = (torch.full((1, 3, 16, 16), level) for level in (a, b))
    assert float(losses.ssim(x, y)) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-3)


def test_dssim_is_0_for_the_same_picture_and_has_a_gradient_towards_it() -> None:
    y = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert float(losses.dssim(y, y)) == pytest.approx(0, abs=1e-5)
    x = (y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    before = losses.dssim(x, y)
    before.backward()
    nearer = x.detach() - 0.5 * x.grad / x.grad.norm()
    assert losses.dssim(nearer, y) < before.detach()


def test_windows_are_odd_and_follow_the_side() -> None:
    assert [losses.window(side, 11.6) for side in (16, 64, 128, 256)] == [3, 5, 11, 23]
    assert losses.window(256, 23.2) == 11


def test_edges_and_variation_of_a_ramp() -> None:
    """A ramp of slope s varies by s along x and by nothing along y; against a flat picture its edges err by s."""
    ramp = torch.arange(8.0).expand(1, 1, 8, 8) * 0.05
    flat = torch.zeros_like(ramp)
    assert float(losses.total_variation(ramp)) == pytest.approx(0.05)
    assert float(losses.edge(ramp, flat)) == pytest.approx(0.05)
    assert float(losses.edge(ramp, ramp + 0.3)) == pytest.approx(
        0, abs=1e-6
    )  # levels are another loss's matter


def test_weights_multiply_and_do_not_renormalise() -> None:
    errors, region = torch.ones(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    region[:, :, :2] = 3.0
    assert float(losses.weighted_mean(errors, region)) == pytest.approx(1.5)
    assert float(losses.weighted_mean(errors, None)) == 1.0


@pytest.mark.parametrize(
    ("hinge", "expected"), [(0.0, 0.3), (0.5, 0.2), (0.2, 0.0)], ids=["L1", "0.5", "met"]
)
def test_a_mask_is_pushed_down_or_up_to_its_hinge(hinge: float, expected: float) -> None:
    assert float(losses.mask_size(torch.full((1, 1, 4, 4), 0.3), hinge)) == pytest.approx(expected)


def test_losses_refuse_what_contradicts_itself() -> None:
    with pytest.raises(ConfigError, match="belong together"):
        SwapLosses(perceptual=(1, 1, 1, 1))
    with pytest.raises(ConfigError, match="at least one of mae, mse and dssim"):
        SwapLosses(mae=0)
    with pytest.raises(ConfigError, match=r"losses.edge must not be negative, got -1"):
        SwapLosses(edge=-1)


# -- the critic -----------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """A critic whose logit is the mean of the picture, at one patch."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.mean(dim=(1, 2, 3), keepdim=True)


def test_lsgan_losses_of_a_known_critic() -> None:
    real, fake = torch.full((2, 6, 4, 4), 0.8), torch.full((2, 6, 4, 4), 0.3)
    assert float(losses.painter_loss(Brightness(), fake)) == pytest.approx(0.49)
    assert float(losses.critic_loss(Brightness(), real, fake, alpha=0.0)) == pytest.approx((0.04 + 0.09) / 2)


def test_mixup_asks_for_the_share_of_real() -> None:
    """A critic that tells the share exactly has no loss: black is fake, white is real."""
    torch.manual_seed(0)
    real, fake = torch.ones(64, 6, 4, 4), torch.zeros(64, 6, 4, 4)
    assert float(losses.critic_loss(Brightness(), real, fake, alpha=0.2)) == pytest.approx(0, abs=1e-9)
    pictures, share = losses.mixed(real, fake, 0.2)
    torch.testing.assert_close(pictures[:, :1, :1, :1], share)
    assert ((share < 0.1) | (share > 0.9)).float().mean() > 0.5  # Beta(.2, .2) keeps to the ends


def test_perceptual_distance_is_0_for_the_same_and_weighs_each_stage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "resnet50.safetensors"
    safetensors.torch.save_file(nn.Sequential(resnet50().layers(inputs=3)[0]).state_dict(), path)
    distance = losses.Perceptual((0.01, 0.1, 0.3, 0.1), str(path), torch.device("cpu"))
    x, y = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
    assert float(distance(y, y)) == 0
    distance(x, y).backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    double = losses.Perceptual((0.02, 0.2, 0.6, 0.2), str(path), torch.device("cpu"))
    torch.testing.assert_close(double(x, y), 2 * distance(x, y))
    with pytest.raises(ConfigError, match="needs 4 weights, got 2"):
        losses.Perceptual((0.1, 0.1), str(path), torch.device("cpu"))
    safetensors.torch.save_file({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="do not fit"):
        losses.Perceptual((0.1,) * 4, str(path), torch.device("cpu"))


def test_the_perceptual_network_may_be_mobilenetv2(tmp_path: Path) -> None:
    """Its stages are where the side halves: 24, 32, 96 and 320 channels."""
    torch.manual_seed(0)
    path = tmp_path / "mobile.safetensors"
    layers = MobileNetV2Config().features()[0].state_dict()
    safetensors.torch.save_file({f"features.{name}": value for name, value in layers.items()}, path)
    distance = losses.Perceptual((1.0,) * 4, str(path), torch.device("cpu"), "mobilenetv2")
    x = torch.rand(1, 3, 64, 64)
    assert [tuple(f.shape[1:]) for f in distance._stages(x)] == [
        (24, 16, 16), (32, 8, 8), (96, 4, 4), (320, 2, 2),
    ]  # fmt: skip
    assert float(distance(x, x)) == 0
    with pytest.raises(CheckpointError, match="do not fit"):
        losses.Perceptual((1.0,) * 4, str(path), torch.device("cpu"))


# -- regions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """60 procedural faces as 64 px crops: points (60, 5, 2) and exact face masks (60, 64, 64)."""
    crop = Preprocess(size=64, crop="face", margin=MARGIN)
    points, masks = [], []
    for person in range(60):
        face = portrait(1, person, person % 5, 96)
        points.append(crop.place(face.landmarks, (96, 96), face.face_box))
        masks.append(crop.apply(np.repeat(face.face_mask[:, :, None], 3, 2), face.face_box)[:, :, 0] > 127)
    return torch.tensor(points), torch.from_numpy(np.array(masks))


def test_the_face_region_covers_the_drawn_face(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    points, masks = drawn
    for given in (points, torch.full_like(points, torch.nan)):
        found = regions.maps(given, 64, MARGIN)[:, 0] > 0.5
        iou = (found & masks).sum(dim=(1, 2)) / (found | masks).sum(dim=(1, 2))
        assert float(iou.mean()) > 0.82


def test_each_part_lies_around_its_points(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    points, _ = drawn
    maps = regions.maps(points, 64, MARGIN)
    rows = torch.arange(len(points))
    for channel, place in ((1, points[:, 0]), (2, points[:, 1]), (3, (points[:, 3] + points[:, 4]) / 2)):
        x, y = place.floor().long().clamp(0, 63).unbind(1)
        assert (maps[rows, channel, y, x] == 1).all()
        assert maps[:, channel].mean() < 0.15


def test_unknown_points_are_the_usual_ones(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    points, _ = drawn
    away = (points - regions.usual(points, 64, MARGIN)).mean(dim=0).abs()
    assert float(away.max()) < 2.0  # pixels of 64, on average over people
    mixed = torch.stack([points[0], torch.full((5, 2), torch.nan)])
    maps = regions.maps(mixed, 64, MARGIN)
    torch.testing.assert_close(maps[1], regions.maps(mixed[1:], 64, MARGIN)[0])
    torch.testing.assert_close(maps[0], regions.maps(points[:1], 64, MARGIN)[0])


def test_a_crop_is_centred_on_its_region() -> None:
    pictures, where = torch.zeros(1, 1, 33, 33), torch.zeros(1, 33, 33)
    pictures[0, 0, 9:12, 19:22], where[0, 9:12, 19:22] = 1.0, 1.0
    crop = regions.crops(pictures, where, share=0.25, size=9)
    assert crop.shape == (1, 1, 9, 9)
    assert float(crop[0, 0, 4, 4]) == 1.0
    torch.testing.assert_close(crop, crop.flip(2))
    torch.testing.assert_close(crop, crop.flip(3))


# -- phases ---------------------------------------------------------------------------------------------------------


def test_phases_follow_from_the_images_seen() -> None:
    phases = (Phase(images=100), Phase(images=50, warp=False), Phase(adversarial=1.0))
    assert [current(phases, images) for images in (0, 99, 100, 149, 150, 10**9)] == [0, 0, 1, 1, 2, 2]


def test_phases_that_never_come_are_refused() -> None:
    with pytest.raises(ConfigError, match="phase 0 has images=0, which means until the end"):
        check((Phase(), Phase(warp=False)))
    with pytest.raises(ConfigError, match="phases is empty"):
        check(())
    with pytest.raises(ConfigError, match="lr_scale > 0"):
        Phase(lr_scale=0)
