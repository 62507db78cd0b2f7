"""changes.py: what a row becomes by --map; boxes move with their pixels, and what cannot be changed says why."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from counterfake import face_masks, faces, media, quality
from counterfake.changes import Change
from counterfake.errors import ConfigError
from counterfake.fingerprint import perceptual_hash
from counterfake.samples import Sample, Skipped
from counterfake.sources.synthetic import SyntheticSource


@pytest.fixture
def row() -> Sample:
    """A drawn face as PNG, 96 pixels, with box and landmarks, larger than wide."""
    drawn = SyntheticSource(size=96, png_share=1.0).sample(3, 1)
    tall = np.pad(media.decode(drawn.media), ((30, 0), (0, 0), (0, 0)), mode="edge")
    x, y, w, h = drawn.face_box or (0, 0, 0, 0)
    points = [value + 30 * (i % 2) for i, value in enumerate(drawn.landmarks or [])]
    return dataclasses.replace(
        drawn, id="", image=media.encode(tall, "png"), face_box=(x, y + 30, w, h), landmarks=points
    )


def changed(text: str, row: Sample) -> Sample:
    found = Change.parse(text)(row)
    assert isinstance(found, Sample), found
    return found


def test_a_face_is_cut_out_with_its_margin_and_its_box_moves_along(row: Sample) -> None:
    found = changed("crop-faces:1.5", row)
    assert row.face_box is not None
    assert found.face_box is not None
    pixels = media.decode(row.media)
    left, top, _, _ = faces.crop_box(row.face_box, 1.5, (96, 126))
    assert (media.decode(found.media) == faces.crop(pixels, row.face_box, 1.5)).all()
    assert np.allclose(np.add(found.face_box, (left, top, 0, 0)), row.face_box)
    moved = np.reshape(found.landmarks, (-1, 2)) + np.array([left, top])
    assert np.allclose(moved, np.reshape(row.landmarks, (-1, 2)))
    assert (found.face_margin, found.attributes["original"]) == (1.5, row.id)
    assert found.id not in ("", row.id)
    assert (found.fake, found.identity, found.split) == (row.fake, row.identity, row.split)


def test_the_face_mask_is_cut_with_the_picture(row: Sample) -> None:
    assert row.face_box is not None
    mask = face_masks.unpacked(row.attributes[face_masks.NAME], 96, 126)
    found = changed("crop-faces:1.2", row)
    height, width = media.decode(found.media).shape[:2]
    left, top, right, bottom = faces.crop_box(row.face_box, 1.2, (96, 126))
    moved = face_masks.unpacked(found.attributes[face_masks.NAME], width, height)
    assert ((moved > 127) == (mask[top:bottom, left:right] > 127)).mean() > 0.97
    assert changed("resize:64", row).attributes[face_masks.NAME] == row.attributes[face_masks.NAME]


def test_the_longer_side_is_brought_to_the_size_asked_for(row: Sample) -> None:
    for side in (63, 252):
        found = changed(f"resize:{side}", row)
        assert media.decode(found.media).shape == (side, round(96 * side / 126), 3)
        assert np.allclose(found.face_box, np.multiply(row.face_box or (), side / 126), rtol=0.02)
    narrow = dataclasses.replace(row, id="", image=media.encode(np.zeros((20, 200, 3), np.uint8), "png"))
    assert Change.parse("resize:100")(narrow) == Skipped(row.path, "too_small")


def test_a_changed_picture_is_measured_and_hashed_anew(row: Sample) -> None:
    before = dataclasses.replace(
        row, attributes={"phash": "0" * 64, "sharpness": -1, "face_score": 5.0, "yaw": 0.5}
    )
    for text in ("crop-faces", "resize:64", "jpeg:20"):
        found = changed(text, before)
        pixels = media.decode(row.media if text == "jpeg:20" else found.media)
        assert found.attributes["sharpness"] == quality.sharpness(pixels)
        assert found.attributes["phash"] == perceptual_hash(pixels)
        assert (found.attributes["face_score"], found.attributes["yaw"]) == (5.0, 0.5)


def test_an_encoder_changes_the_file_and_a_jpeg_stays_one(row: Sample) -> None:
    plain = changed("jpeg:80", row)
    assert media.sniff(plain.media) == "jpeg"
    assert plain.attributes["encoded"] == "jpeg:80"
    assert plain.face_box == row.face_box
    assert media.sniff(changed("resize:64", plain).media) == "jpeg"
    assert media.sniff(changed("resize:64", row).media) == "png"


def test_raw_pixels_stay_raw_and_have_no_face() -> None:
    raw = Sample(pixels=np.arange(28 * 28, dtype=np.uint8).reshape(28, 28, 1), source="mine", path="train/1")
    found = changed("resize:56", raw)
    assert found.image is None
    assert found.pixels is not None
    assert found.pixels.shape == (56, 56, 1)
    assert "phash" not in found.attributes
    assert media.sniff(changed("png", raw).media) == "png"
    assert Change.parse("crop-faces")(raw) == Skipped("train/1", "no_face")


def test_what_does_not_decode_is_skipped_with_its_reason() -> None:
    broken = Sample(image=b"\xff\xd8\xff nothing", source="mine", path="a.jpg")
    assert Change.parse("png")(broken) == Skipped("a.jpg", "undecodable")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "crop",
        "crop-faces:x",
        "crop-faces:0",
        "resize",
        "resize:2",
        "resize:-1",
        "jpeg:0",
        "gif",
        "resize:9e3",
    ],
)
def test_an_unknown_change_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no change|encode is"):
        Change.parse(text)
