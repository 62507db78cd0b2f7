"""images.py: one preprocessing for training and serving, exact tensor conversions, seeded degradations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from counterfake import config
from counterfake.errors import ConfigError, DataError
from counterfake.images import Degradation, Preprocess, degrade, grid, recompress, resize, to_float, to_uint8


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["none", "center", "face"])
def test_preprocess_gives_a_square_of_the_right_channels(crop: str, channels: int) -> None:
    settings = Preprocess(size=48, channels=channels, crop=crop)
    for given in (noise(90, 60), noise(40, 100, 1)):
        out = settings.apply(given, (10.0, 10.0, 20.0, 24.0))
        assert out.shape == (48, 48, channels)
        assert out.dtype == np.uint8


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    pixels = noise(32, 32)
    assert (Preprocess(size=32).apply(pixels) == pixels).all()


def test_shrinking_is_the_exact_area_mean() -> None:
    pixels = noise(64, 64)
    means = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(resize(pixels, 32, 32) - means).max() <= 0.5


def test_grey_and_colour_convert_both_ways() -> None:
    grey = noise(32, 32, 1)
    assert (Preprocess(size=32).apply(grey) == np.repeat(grey, 3, 2)).all()
    assert (Preprocess(size=32, channels=1).apply(np.repeat(grey, 3, 2)) == grey).all()


def test_center_crop_ignores_the_sides() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    assert (Preprocess(size=20, crop="center").apply(wide) == 200).all()


def test_face_crop_shows_the_face_at_its_margin() -> None:
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[40:60, 30:50] = 255
    out = Preprocess(size=40, crop="face", margin=2.0).apply(pixels, (30.0, 40.0, 20.0, 20.0))
    assert (out[10:30, 10:30] == 255).all()
    assert out.mean() == pytest.approx(255 / 4, abs=1)


def test_face_crop_without_a_box_says_what_to_do() -> None:
    with pytest.raises(DataError, match="no face_box"):
        Preprocess(crop="face").apply(noise(40, 40))


def test_the_digest_changes_with_every_setting() -> None:
    base = Preprocess()
    others = [Preprocess(size=64), Preprocess(channels=1), Preprocess(crop="face"), Preprocess(margin=1.5)]
    assert base.digest == Preprocess().digest == config.digest(base)
    assert len({base.digest, *(other.digest for other in others)}) == 5


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="channels"):
        Preprocess(channels=2)


def test_uint8_survives_the_float_range_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = to_float(values)
    assert floats.min() == -1
    assert floats.max() == 1
    assert torch.equal(to_uint8(floats), values)
    assert to_uint8(torch.tensor([[[[-3.0, 3.0]]]])).tolist() == [[[[0, 255]]]]


def test_a_grid_places_every_tile() -> None:
    tiles = np.stack([np.full((4, 5, 1), value, np.uint8) for value in (10, 20, 30)])
    sheet = grid(tiles, columns=2, gap=1)
    assert sheet.shape == (9, 11, 3)
    assert (sheet[5:9, 0:5] == 30).all()
    assert (sheet[5:9, 6:11] == 255).all()


def test_a_grid_takes_tensors_of_both_kinds() -> None:
    images = torch.zeros(3, 3, 8, 8)
    assert (grid(images, columns=3)[:8, :8] == 128).all()
    assert grid(images.to(torch.uint8), columns=8).shape == (8, 28, 3)
    with pytest.raises(DataError, match="at least one"):
        grid(np.zeros((0, 4, 4, 3), np.uint8))


def test_degradation_is_decided_by_the_seed() -> None:
    pixels = noise(64, 48)
    always = Degradation(probability=1.0)
    first, again, other = (degrade(pixels, always, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert first.shape == pixels.shape


def test_degradation_with_probability_zero_changes_nothing() -> None:
    pixels = noise(32, 32)
    assert (degrade(pixels, Degradation(probability=0.0), np.random.default_rng(0)) == pixels).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_each_degradation_alone_keeps_the_shape_and_changes_pixels(channels: int) -> None:
    nothing = {"probability": 1.0, "jpeg": None, "blur": None, "resize": None, "noise": None}
    strengths = {"jpeg": (30, 30), "blur": (1.0, 1.0), "resize": (0.5, 0.5), "noise": (5.0, 5.0)}
    pixels = noise(40, 30, channels)
    for name, bounds in strengths.items():
        out = degrade(pixels, Degradation(**{**nothing, name: bounds}), np.random.default_rng(0))
        assert out.shape == pixels.shape, name
        assert (out != pixels).any(), name


def test_lower_jpeg_quality_is_further_from_the_picture() -> None:
    pixels = resize(noise(8, 8), 64, 64)
    errors = [np.abs(recompress(pixels, q).astype(int) - pixels).mean() for q in (95, 60, 20)]
    assert errors == sorted(errors)
