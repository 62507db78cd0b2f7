"""Composites: similarity and parts in closed form, what changes and where, who gives, and that a batch without faces stays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterfake.errors import ConfigError
from counterfake.learners import composites
from counterfake.learners.composites import (
    CompositesConfig,
    centres,
    completed,
    composed,
    similarity,
    with_composites,
)

SIDE = 64
FACE = torch.tensor([[22.0, 26.0], [42.0, 26.0], [32.0, 38.0], [23.6, 47.0], [40.4, 47.0]])  # of 64 pixels
CONFIG = CompositesConfig(share=0.5)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# every composite alike: all four parts in one piece, not mirrored, not resized, not moved, not blended in
PLAIN = replace(
    CONFIG,
    whole=1.0,
    joined=1.0,
    melted=0.0,
    mirror=0.0,
    scale=0.0,
    shift=0.0,
    grow=(0.8, 0.8),
    opaque=(1.0, 1.0),
)


def test_a_similarity_is_the_factor_that_made_the_points() -> None:
    of = as_complex(FACE[None].expand(3, 5, 2))
    factor = torch.tensor([1 + 0j, 0.5 + 0.5j, 2j])
    to = of * factor[:, None] + (3 - 4j)
    torch.testing.assert_close(similarity(of, to), factor)


def test_a_frontal_face_that_knows_its_eyes_gets_nose_and_mouth() -> None:
    eyes = FACE.clone()
    eyes[2:] = math.nan
    full = completed(torch.stack([eyes, FACE]))
    torch.testing.assert_close(full[0], FACE, atol=1e-4, rtol=0)
    assert torch.equal(full[1], FACE)  # what is known stays
    assert completed(torch.full((1, 5, 2), math.nan)).isnan().all()


def test_a_turned_face_has_turned_parts() -> None:
    upright = as_complex(FACE[None])
    turned = (upright - 32 - 32j) * 1j + 32 + 32j
    torch.testing.assert_close(centres(turned), (centres(upright) - 32 - 32j) * 1j + 32 + 32j)


def test_composites_take_the_place_of_fakes_and_the_real_rows_stay() -> None:
    images, fake = pictures(16), torch.tensor([0.0, 0.0, 1.0, -1.0] * 4)
    made, labels = with_composites(images, fake, FACE.expand(16, 5, 2), replace(CONFIG, share=0.25))
    changed = (made != images).flatten(1).any(1)
    assert torch.equal(changed, fake == 1)
    assert torch.equal(labels, fake)


def test_where_fakes_are_short_real_rows_become_composites_and_unknown_ones_never() -> None:
    images, fake = pictures(12), torch.tensor([0.0, 0.0, 1.0, -1.0] * 3)
    made, labels = with_composites(images, fake, FACE.expand(12, 5, 2), replace(CONFIG, share=0.5))
    changed = (made != images).flatten(1).any(1)
    assert int(changed.sum()) == 6
    assert changed[fake == 1].all()
    assert not changed[fake == -1].any()
    assert torch.equal(labels, torch.where(changed, torch.ones(12), fake))


def test_real_rows_without_eyes_neither_change_nor_give() -> None:
    images, points = torch.full((6, 3, SIDE, SIDE), 0.5), FACE.expand(6, 5, 2).clone()
    images[:2], points[:2] = -0.5, math.nan  # dark ones that do not know their eyes
    made, labels = with_composites(images, torch.zeros(6), points, replace(CONFIG, share=1.0))
    assert int(labels.sum()) == 4  # as many as have a pair
    assert made.min() >= -0.5
    assert (made[labels == 1] > 0.4).all()  # light ones of light ones


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (0.25, 4), (0.5, 8), (1.0, 16)])
def test_the_stated_share_of_a_batch_is_composed(share: float, wanted: int) -> None:
    images, labels = pictures(16), torch.zeros(16)
    _, after = with_composites(images, labels, FACE.expand(16, 5, 2), replace(CONFIG, share=share))
    assert int(after.sum()) == wanted


def test_a_batch_with_one_face_or_none_stays_as_it_is() -> None:
    images, points = pictures(6), torch.full((6, 5, 2), math.nan)
    for known in (0, 1):
        points[:known] = FACE
        made, labels = with_composites(images, torch.zeros(6), points, CONFIG)
        assert torch.equal(made, images)
        assert not labels.any()


def test_a_part_shows_the_donor_and_far_from_the_face_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(composites, "_matched", lambda donor, target, mask: donor)  # its own colours
    target, donor = torch.zeros(2, 3, SIDE, SIDE), torch.full((2, 3, SIDE, SIDE), 0.5)
    points = as_complex(FACE.expand(2, 5, 2))
    made = composed(target, donor, points, points, PLAIN)
    for place in centres(points)[0, :4]:
        x, y = int(place.real), int(place.imag)
        torch.testing.assert_close(made[:, :, y, x], torch.full((2, 3), 0.5))
    assert not made[:, :, :6].any()
    assert not made[:, :, :, :8].any()


def test_a_donor_elsewhere_turned_and_larger_is_brought_into_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The donor is the target itself under a similarity: brought back, the composite is the target."""
    monkeypatch.setattr(composites, "_matched", lambda donor, target, mask: donor)
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    here = torch.complex(x, y)
    factor = torch.tensor(0.9 + 0.3j)
    back = (here - 32 - 32j) / factor + 32 + 32j  # where a pixel of the donor lies in the target
    target, donor = (torch.stack([smooth(p)] * 3)[None] for p in (here, back))
    to = as_complex(FACE[None])
    of = (to - 32 - 32j) * factor + 32 + 32j
    made = composed(target, donor, to, of, PLAIN)
    assert float((donor - target).abs().max()) > 0.3
    torch.testing.assert_close(made, target, atol=0.01, rtol=0)


def test_a_mirrored_donor_with_mirrored_points_gives_its_own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composites, "_matched", lambda donor, target, mask: donor)
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    target = torch.stack([smooth(torch.complex(x, y))] * 3)[None]
    points = as_complex(FACE[None])
    donor = target.flip(3)  # mirrored once more it is the target, with the same points: FACE is symmetric
    made = composed(target, donor, points, points, replace(PLAIN, mirror=1.0))
    torch.testing.assert_close(made, target, atol=0.01, rtol=0)


def test_colours_are_matched_under_the_mask() -> None:
    torch.manual_seed(0)
    donor, target = 0.2 * torch.randn(2, 3, 16, 16) - 0.3, 0.25 * torch.randn(2, 3, 16, 16) + 0.4
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:12, 4:12] = 1
    out = composites._matched(donor, target, mask)[:, :, 4:12, 4:12]
    wanted = target[:, :, 4:12, 4:12]
    torch.testing.assert_close(out.mean((2, 3)), wanted.mean((2, 3)))
    torch.testing.assert_close(out.std((2, 3)), wanted.std((2, 3)), atol=1e-4, rtol=0)


def test_melting_takes_over_the_brightness_around_and_keeps_the_details() -> None:
    torch.manual_seed(0)
    details = 0.1 * torch.randn(1, 3, SIDE, SIDE)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[:, :, 20:44, 20:44] = 1
    out = composites._melted(details - 0.5, details * 0 + 0.3, mask)
    torch.testing.assert_close(out, details + 0.3, atol=0.05, rtol=0)


def test_the_donor_is_the_row_that_looks_alike() -> None:
    """Two dark and two light faces: each gets the other of its kind, whatever the dice say."""
    images = torch.tensor([-0.8, 0.8, -0.78, 0.82]).view(4, 1, 1, 1).expand(4, 3, SIDE, SIDE).contiguous()
    points = as_complex(FACE.expand(4, 5, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composites, "ALIKE", 1)
        target, donor, found = composites._pairs(images, points, torch.ones(4, dtype=torch.bool), 4)
    assert found.all()
    assert dict(zip(target.tolist(), donor.tolist(), strict=True)) == {0: 2, 2: 0, 1: 3, 3: 1}


def test_the_same_seed_gives_the_same_composites_in_range() -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(with_composites(pictures(8), torch.zeros(8), FACE.expand(8, 5, 2), CONFIG)[0])
    assert torch.equal(*made)
    assert float(made[0].abs().max()) <= 1
    assert made[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"share": 1.5}, "share"), ({"grow": (0.0, 1.0)}, "grow"), ({"feather": (0.2, 0.1)}, "feather")],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompositesConfig(**change)  # type: ignore[arg-type]


# -- helpers --------------------------------------------------------------------------------------------------------


def as_complex(points: Tensor) -> Tensor:
    return torch.view_as_complex(points.contiguous())


def smooth(places: Tensor) -> Tensor:
    """A picture without fine detail, so that sampling it twice loses little."""
    return 0.6 * torch.sin(places.real / 9) * torch.cos(places.imag / 7)


def pictures(n: int) -> Tensor:
    """Random but smooth pictures (n, 3, 64, 64) in [-1, 1]."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) * 1.6 - 0.8
    return torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
