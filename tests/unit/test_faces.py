"""faces.py: the cascade finds procedural faces, the largest first, and crops stay inside the picture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterfake.errors import ConfigError
from counterfake.faces import FaceDetector, crop_box
from counterfake.sources.synthetic import portrait


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (x, y, w, h)."""
    wide = max(0.0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return wide * high / (a[2] * a[3] + b[2] * b[3] - wide * high)


def test_the_cascade_finds_most_procedural_faces_where_they_are() -> None:
    detector, overlaps = FaceDetector(), []
    for person in range(40):
        made = portrait(5, person, 0)
        face = detector.largest(made.pixels)
        overlaps.append(overlap(face.box, made.face_box) if face else 0.0)
    assert np.mean(np.array(overlaps) > 0.4) >= 0.85  # 95 % of 200 when measured


def test_an_empty_picture_has_no_face() -> None:
    assert FaceDetector().detect(np.full((96, 96, 3), 128, np.uint8)) == []
    assert FaceDetector().detect(np.zeros((16, 16, 1), np.uint8)) == []


def test_a_strip_has_no_face() -> None:
    assert FaceDetector().detect(np.full((16, 40_000, 3), 128, np.uint8)) == []
    assert FaceDetector().detect(np.full((40_000, 30, 3), 128, np.uint8)) == []


def test_the_largest_face_comes_first_also_in_large_pictures() -> None:
    scene = np.full((800, 1200, 3), 120, np.uint8)
    small, large = portrait(5, 6, 0, 256).pixels, portrait(5, 2, 0, 512).pixels
    scene[100:356, 50:306] = small
    scene[150:662, 500:1012] = large
    faces = FaceDetector(max_side=640).detect(scene)
    assert len(faces) >= 2
    assert faces[0].box[0] > 500
    assert faces[0].box[2] > 150  # in pixels of the large picture, not of the searched one


def test_grey_pictures_give_the_same_boxes_as_their_colour_copies() -> None:
    grey = portrait(5, 3, 0).pixels.mean(2).astype(np.uint8)
    detector = FaceDetector()
    colour = np.repeat(grey[:, :, None], 3, 2)
    assert detector.detect(grey[:, :, None]) == detector.detect(colour)


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="cascade-default"):
        FaceDetector("yunet")  # type: ignore[arg-type]


@given(
    x=st.floats(-50, 300), y=st.floats(-50, 300), w=st.floats(1, 400), h=st.floats(1, 400),
    margin=st.floats(0.5, 4), width=st.integers(16, 300), height=st.integers(16, 300),
)  # fmt: skip
def test_a_crop_is_a_square_inside_the_picture(
    x: float, y: float, w: float, h: float, margin: float, width: int, height: int
) -> None:
    left, top, right, bottom = crop_box((x, y, w, h), margin, (width, height))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left == bottom - top


def test_a_crop_is_centred_where_there_is_room() -> None:
    assert crop_box((40.0, 40.0, 20.0, 20.0), 2.0, (100, 100)) == (30, 30, 70, 70)
    assert crop_box((0.0, 0.0, 20.0, 20.0), 2.0, (100, 100)) == (0, 0, 40, 40)
