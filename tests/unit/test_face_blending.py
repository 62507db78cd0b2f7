"""blending.py: colours, masks and gradients of a pasted face, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from counterfake.blending import Blending, compose, match_colour, poisson, shaped, soft_mask
from counterfake.errors import ConfigError

RNG = np.random.default_rng(1)
SHIFT = np.array([[1.0, 0, 10], [0, 1, 20]])  # a painted square at (10, 20), not scaled


def noise(mean: tuple[int, int, int], spread: float, side: int = 40) -> np.ndarray:
    return RNG.normal(mean, spread, (side, side, 3)).clip(0, 255).astype(np.uint8)


def full(side: int) -> np.ndarray:
    return np.ones((side, side, 1), np.float32)


# -- where it goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", ["alpha", "poisson"])
@pytest.mark.parametrize("scale", [0.2, 1.0, 2.5], ids=["folded", "as-it-is", "enlarged"])
def test_nothing_further_than_a_pixel_from_the_square_changes(blend: str, scale: float) -> None:
    picture, painted = noise((120, 110, 90), 30, 160), noise((60, 80, 200), 30, 48)
    place = np.array([[scale, 0, 20], [0, scale, 25]])
    made = compose(picture, painted, place, soft_mask(48), Blending(blend=blend))
    rows, columns, _ = np.nonzero(made != picture)
    assert len(rows)
    assert columns.min() >= 20 - 1
    assert columns.max() <= 20 + 48 * scale + 1
    assert rows.min() >= 25 - 1
    assert rows.max() <= 25 + 48 * scale + 1


def test_a_square_half_outside_is_cut_and_one_far_outside_changes_nothing() -> None:
    picture, painted = noise((120, 110, 90), 30), noise((60, 80, 200), 30, 24)
    for blend in ("alpha", "poisson"):
        half = compose(
            picture, painted, SHIFT - [[0, 0, 22], [0, 0, 10]], soft_mask(24), Blending(blend=blend)
        )
        assert (half[:, :12] != picture[:, :12]).any()
        assert (half[:, 13:] == picture[:, 13:]).all()
    away = compose(picture, painted, np.add(SHIFT, [[0, 0, 500], [0, 0, 0]]), soft_mask(24), Blending())
    assert (away == picture).all()


def test_a_much_smaller_face_is_averaged_and_not_picked_from() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    place = np.array([[0.25, 0, 8], [0, 0.25, 8]])
    made = compose(np.zeros((40, 40, 3), np.uint8), stripes, place, soft_mask(64), Blending(colour="none"))
    assert made[16, 13:19].mean() == pytest.approx(127.5, abs=4)


# -- masks ----------------------------------------------------------------------------------------------------------


def test_the_mask_fades_to_nothing_before_the_border() -> None:
    mask = soft_mask(48)
    assert mask[24, 24] == 1
    assert not mask[0].any()
    assert not mask[:, 0].any()
    assert np.abs(np.diff(mask, axis=0)).max() < 0.4


def test_eroding_takes_off_a_ring_and_blurring_keeps_the_border_at_nothing() -> None:
    y, x = np.mgrid[0:100, 0:100]
    disc = (np.hypot(x - 49.5, y - 49.5) < 30).astype(np.float32)
    smaller = shaped(disc, Blending(erode=0.1))
    assert smaller.sum() == pytest.approx(np.pi * 20**2, rel=0.05)
    everywhere = shaped(np.ones((100, 100), np.float32), Blending(blur=0.05))
    assert everywhere[50, 50] == pytest.approx(1)
    assert not np.concatenate([everywhere[0], everywhere[-1], everywhere[:, 0], everywhere[:, -1]]).any()
    soft = shaped(disc, Blending(blur=0.05))
    assert soft.sum() == pytest.approx(disc.sum(), rel=0.01)
    assert 0.4 < soft[50, 80] < 0.6


def test_shares_of_more_than_half_a_face_are_refused() -> None:
    with pytest.raises(ConfigError, match="erode and blur"):
        Blending(erode=0.5)


# -- colours --------------------------------------------------------------------------------------------------------


def test_reinhard_gives_the_pictures_mean_and_spread() -> None:
    picture, painted = noise((150, 100, 80), 12), noise((90, 110, 140), 14)
    matched = match_colour(painted, picture, full(40))
    assert matched.mean(axis=(0, 1)) == pytest.approx(picture.mean(axis=(0, 1)), abs=1.5)
    assert matched.std() == pytest.approx(picture.std(), rel=0.1)


def test_histogram_matching_gives_the_pictures_distribution_and_undoes_a_monotone_change() -> None:
    picture, painted = noise((150, 100, 80), 25), noise((90, 110, 140), 14)
    matched = match_colour(painted, picture, full(40), "histogram")
    for share in (0.1, 0.5, 0.9):
        found, wanted = (np.quantile(p, share, axis=(0, 1)) for p in (matched, picture))
        assert found == pytest.approx(wanted, abs=1.5)
    darker = (picture * 0.5).astype(np.uint8)
    assert np.abs(match_colour(darker, picture, full(40), "histogram") - picture).mean() < 1.2


def test_without_a_transfer_colours_stay_and_an_empty_mask_asks_for_none() -> None:
    picture, painted = noise((150, 100, 80), 12), noise((90, 110, 140), 20)
    assert (match_colour(painted, picture, full(40), "none") == painted).all()
    for method in ("reinhard", "histogram"):
        assert (match_colour(painted, picture, 0 * full(40), method) == painted).all()


# -- gradients ------------------------------------------------------------------------------------------------------


def test_a_constant_has_no_gradient_so_poisson_blending_ignores_it() -> None:
    picture = noise((120, 110, 90), 20)
    lighter = picture.astype(np.float32) + 40
    assert poisson(lighter, picture, full(40)) == pytest.approx(picture.astype(float), abs=1e-3)


def test_under_a_full_mask_the_laplacian_is_the_painted_faces() -> None:
    picture, painted = noise((120, 110, 90), 20, 17), noise((60, 80, 200), 20, 17)
    made = poisson(painted.astype(np.float32), picture, full(17)).astype(np.float64)
    inner = laplacian(made) - laplacian(painted.astype(np.float64))
    assert np.abs(inner).max() < 1e-2
    assert (made[0] == picture[0]).all()
    assert (made[:, -1] == picture[:, -1]).all()


def test_without_a_mask_poisson_blending_changes_nothing() -> None:
    picture, painted = noise((120, 110, 90), 20), noise((60, 80, 200), 20)
    assert poisson(painted.astype(np.float32), picture, 0 * full(40)) == pytest.approx(
        picture.astype(float), abs=1e-3
    )


def laplacian(u: np.ndarray) -> np.ndarray:
    return u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1]
