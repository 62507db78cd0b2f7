"""face_masks.py: the text of a mask gives the mask back at any size, and follows what is cut out."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from counterfake import face_masks
from counterfake.errors import DataError
from counterfake.sources.synthetic import SyntheticSource, portrait


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a > 127) & (b > 127)).sum() / ((a > 127) | (b > 127)).sum())


@pytest.mark.parametrize("size", [(96, 96), (200, 150)], ids=str)
def test_a_mask_comes_back_at_the_size_of_the_picture(size: tuple[int, int]) -> None:
    drawn = [portrait(0, person, 0, 128).face_mask for person in range(12)]
    stretched = [cv2.resize(mask, size, interpolation=cv2.INTER_AREA) for mask in drawn]
    back = [face_masks.unpacked(face_masks.packed(mask), *size) for mask in drawn]
    assert back[0].shape == size[::-1]
    assert np.mean([iou(a, b) for a, b in zip(back, stretched, strict=True)]) > 0.96


def test_the_text_is_short() -> None:
    assert max(len(face_masks.packed(portrait(0, person, 0).face_mask)) for person in range(12)) < 200


def test_procedural_rows_carry_their_exact_mask() -> None:
    sample = SyntheticSource(size=96).sample(3, 1)
    true = portrait(0, 3, 1, 96).face_mask
    assert iou(face_masks.unpacked(sample.attributes[face_masks.NAME], 96, 96), true) > 0.96


def test_a_part_of_the_picture_has_its_part_of_the_mask() -> None:
    true = portrait(0, 1, 0, 96).face_mask
    found = face_masks.cut({face_masks.NAME: face_masks.packed(true), "yaw": 0.5}, (96, 96), (20, 10, 80, 90))
    assert found["yaw"] == 0.5
    assert iou(face_masks.unpacked(found[face_masks.NAME], 60, 80), true[10:90, 20:80]) > 0.95
    assert face_masks.cut({"yaw": 0.5}, (96, 96), (0, 0, 9, 9)) == {"yaw": 0.5}


def test_texts_are_read_from_stored_attributes() -> None:
    rows = [None, "", '{"yaw": 1}', json.dumps({face_masks.NAME: "1:eA=="})]
    assert face_masks.texts(rows) == [None, None, None, "1:eA=="]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x:abcd",
        "0:abcd",
        "2000:abcd",
        "64:!!!",
        "64:YWJj",
        face_masks.packed(np.ones((9, 9), np.uint8))[:-9],
    ],
)
def test_a_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="face_mask"):
        face_masks.unpacked(text, 8, 8)
