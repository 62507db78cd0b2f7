"""quality.py: sharpness by its closed forms, and what is measured of a row at ingest."""

from __future__ import annotations

import numpy as np
import pytest

from counterfake import media, quality
from counterfake.images import blur
from counterfake.prepare import Preparer, Recipe
from counterfake.samples import Sample
from counterfake.sources.synthetic import SyntheticSource, portrait


@pytest.mark.parametrize("channels", [1, 3])
def test_the_sharpness_of_one_bright_pixel_is_twenty_times_its_square_over_the_area(channels: int) -> None:
    """The Laplacian of a point v is -4 v there and v at its four neighbours: sum 0, sum of squares 20 v**2."""
    pixels = np.zeros((20, 25, channels), np.uint8)
    pixels[10, 10] = 200
    assert quality.sharpness(pixels) == pytest.approx(20 * 200**2 / 500, abs=0.01)


def test_one_colour_has_no_sharpness_and_blur_takes_it_away() -> None:
    assert quality.sharpness(np.full((30, 30, 3), 77, np.uint8)) == 0
    pixels = portrait(0, 1, 0, 96).pixels
    values = [quality.sharpness(blur(pixels, sigma)) for sigma in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.1 * values[0]


def test_a_row_is_measured_at_ingest_and_its_face_where_there_is_one() -> None:
    recipe = Recipe(source=SyntheticSource(), faces="cascade")
    drawn = SyntheticSource(size=96).sample(2, 0)
    row = Preparer(recipe)(drawn)
    assert isinstance(row, Sample)
    assert row.face_box is not None
    pixels = media.decode(drawn.media)
    measured = {name: row.attributes[name] for name in quality.NAMES if name in row.attributes}
    assert measured == {
        "sharpness": quality.sharpness(pixels), "short_side": 96, "face_side": round(max(row.face_box[2:]), 1),
    }  # fmt: skip
    unknown = Sample(image=media.encode(portrait(5, 2, 0, 128).pixels, "png"), source="mine")
    found = Preparer(recipe)(unknown)
    assert isinstance(found, Sample)
    assert found.face_method == "cascade"
    assert found.attributes["face_score"] > 0
    assert found.attributes["face_side"] > 40
    assert "face_side" not in quality.measured(np.zeros((8, 8, 1), np.uint8))
