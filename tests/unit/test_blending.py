"""Self-blended images: what changes, what stays, where the traces lie, and that only real rows are touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from counterfake.errors import ConfigError
from counterfake.learners.blending import (
    RATIOS,
    BlendingConfig,
    blend_real_rows,
    disturb,
    move,
    self_blend,
    soft_mask,
)

CONFIG = BlendingConfig(share=1.0)
STILL = replace(CONFIG, colour=0.0, contrast=0.0, shrink=(1.0, 1.0), scale=0.0, shift=0.0)


def test_only_real_rows_become_fakes_and_the_rest_is_untouched() -> None:
    images, fake = faces(9), torch.tensor([0.0, 1, -1] * 3)
    blended, label = blend_real_rows(images, fake, CONFIG)
    assert label.tolist() == [1.0, 1, -1] * 3
    assert torch.equal(blended[fake != 0], images[fake != 0])
    assert all(not torch.equal(blended[row], images[row]) for row in (0, 3, 6))


def test_about_the_stated_share_is_blended_and_none_at_zero() -> None:
    images, fake = faces(400, side=16), torch.zeros(400)
    torch.manual_seed(0)
    _, label = blend_real_rows(images, fake, BlendingConfig(share=0.25))
    assert float(label.mean()) == pytest.approx(0.25, abs=0.06)
    same, label = blend_real_rows(images, fake, BlendingConfig())
    assert same is images
    assert label is fake


def test_outside_the_mask_a_blend_is_its_target() -> None:
    """With nothing to disturb and nothing to move, source and target are one picture, and so is the blend."""
    torch.testing.assert_close(self_blend(faces(8), STILL), faces(8), atol=1e-5, rtol=0)


def test_the_corners_of_a_face_crop_keep_the_target_and_the_middle_changes() -> None:
    images = faces(64)
    torch.manual_seed(3)
    change = (self_blend(images, replace(STILL, shift=0.03, scale=0.05)) - images).abs().mean(dim=(0, 1))
    assert change[:4, :4].max() < 1e-5
    assert change[28:40, 28:40].mean() > 0.01


def test_masks_lie_in_0_to_1_and_take_the_papers_ratios() -> None:
    torch.manual_seed(0)
    masks = soft_mask(200, 64, 64, CONFIG)
    assert masks.shape == (200, 1, 64, 64)
    assert float(masks.min()) >= 0
    tops = masks.amax(dim=(1, 2, 3))
    near = (tops[:, None] - torch.tensor(sorted(set(RATIOS)))).abs().amin(dim=1)
    assert float((near < 0.02).float().mean()) > 0.8  # a small, strongly blurred piece stays below its ratio
    soft = ((masks > 0.01) & (masks < 0.99 * tops[:, None, None, None])).float().mean()
    assert float(soft) > 0.02  # the edge is a slope


def test_no_mask_vanishes() -> None:
    """A pseudo-fake without a mask would be a real picture with the wrong label."""
    torch.manual_seed(0)
    area = soft_mask(500, 96, 96, CONFIG).mean(dim=(1, 2, 3))
    assert float((area < 0.01).float().mean()) < 0.01
    assert float(area.max()) < 0.8


def test_the_same_seed_gives_the_same_blend_and_another_gives_another() -> None:
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(self_blend(faces(4), CONFIG))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_disturbing_and_moving_at_strength_zero_change_nothing() -> None:
    torch.testing.assert_close(disturb(faces(4), STILL), faces(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(move(faces(4), STILL), faces(4), atol=1e-5, rtol=0)


def test_shares_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"blending\.share"):
        BlendingConfig(share=1.5)
    with pytest.raises(ConfigError, match=r"blending\.shrink"):
        BlendingConfig(shrink=(0.9, 0.5))


def faces(count: int, side: int = 64) -> torch.Tensor:
    """(count, 3, side, side) in [-0.6, 0.6]: slopes and a grid, different in each."""
    generator = torch.Generator().manual_seed(0)
    phase = torch.rand(count, 3, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(0, 6, side), torch.linspace(0, 9, side), indexing="ij")
    return 0.6 * torch.sin(x + y.square() / 4 + 6 * phase)
