"""forensics/metadata.py: what the files alone give away is found and named, and nothing else is."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from counterfake import media
from counterfake.errors import DataError
from counterfake.forensics import metadata
from counterfake.forensics.metadata import facts, probe

COUNT = 240  # files, every other one fake
FAKE = np.arange(COUNT) % 2


def picture(seed: int) -> media.Pixels:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC))


def saved(seed: int, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, format, **options)
    return buffer.getvalue()


def judged(make: Callable[[int, bool], bytes]) -> metadata.Probe:
    return probe([facts(make(n, bool(FAKE[n]))) for n in range(COUNT)], FAKE, bootstraps=100)


def some(number: int) -> bool:
    """True of 24 % of the numbers that are fakes."""
    return number // 2 % 25 < 6


# -- the probe ------------------------------------------------------------------------------------------------------


def test_files_alike_give_nothing_away() -> None:
    found = judged(lambda n, fake: saved(n, "JPEG", quality=90))
    assert found.low <= 0.5 <= found.high or found.auc < 0.5
    assert not found.leaks
    assert "--set" not in found.sentence()


def test_another_table_in_a_quarter_of_the_fakes_is_caught_and_named() -> None:
    """The leak of CIPLAB's originals: 240 fakes have another JPEG table."""
    found = judged(lambda n, fake: saved(n, "JPEG", quality=91 if fake and some(n) else 90))
    assert found.leaks
    assert found.family == "quantisation"
    assert "JPEG quantisation tables" in found.sentence()
    assert "--set encode=jpeg:90" in found.sentence()


@pytest.mark.parametrize(
    ("real", "fake", "family"),
    [
        ({"format": "JPEG"}, {"format": "PNG"}, "format"),
        ({"format": "JPEG", "subsampling": 0}, {"format": "JPEG", "subsampling": 2}, "coding"),
        ({"format": "JPEG"}, {"format": "JPEG", "progressive": True}, "coding"),
        ({"format": "JPEG"}, {"format": "JPEG", "optimize": True}, "coding"),
        ({"format": "JPEG", "exif": b"Exif\0\0II*\0" + bytes(30)}, {"format": "JPEG"}, "segments"),
        ({"format": "JPEG", "dpi": (300, 300)}, {"format": "JPEG", "dpi": (72, 72)}, "segments"),
        ({"format": "PNG"}, {"format": "PNG", "compress_level": 1}, "png"),
        ({"format": "WEBP", "lossless": True}, {"format": "WEBP"}, "webp"),
    ],
    ids=["format", "subsampling", "progressive", "huffman", "exif", "density", "png", "webp"],
)
def test_the_cause_is_named(real: dict[str, Any], fake: dict[str, Any], family: str) -> None:
    found = judged(lambda n, is_fake: saved(n, **(fake if is_fake else real)))
    assert (found.leaks, found.family) == (True, family)
    assert found.auc > 0.95


@pytest.mark.parametrize("leak", ["format", "tables"])
def test_one_path_of_encoding_silences_it(leak: str) -> None:
    def original(n: int, fake: bool) -> bytes:
        if leak == "format":
            return saved(n, "PNG") if fake else saved(n, "JPEG", quality=95, subsampling=0)
        return saved(n, "JPEG", quality=91 if fake and some(n) else 95)

    assert judged(original).leaks
    assert not judged(lambda n, fake: media.encode(media.decode(original(n, fake)), "jpeg", 75)).leaks


def test_what_one_path_cannot_undo_is_told_by_the_file_size() -> None:
    def again(n: int, fake: bool) -> bytes:
        original = saved(n, "PNG") if fake else saved(n, "JPEG", quality=40)
        return media.encode(media.decode(original), "jpeg", 90)

    found = judged(again)
    assert (found.leaks, found.family, list(found.alone)) == (True, "bytes", ["bytes"])
    assert "no encoder undoes" in found.sentence()


def test_files_of_one_group_are_never_on_both_sides() -> None:
    """Each group has a size of its own: known from its sisters, it would tell everything."""
    groups = [str(n // 12) for n in range(COUNT)]
    labels = np.array([int(group) % 2 for group in groups])
    files = [{"dimensions.width": float(hash((group, 3)) % 1000)} for group in map(int, groups)]
    assert probe(files, labels, bootstraps=50).auc > 0.9
    assert probe(files, labels, groups, bootstraps=50).auc < 0.75
    folds = metadata._folds(labels, np.array([int(group) for group in groups]), 0)
    for group in set(groups):
        assert len(set(folds[np.array(groups) == group])) == 1


def test_the_answer_is_the_same_every_time() -> None:
    files = [facts(saved(n, "JPEG", quality=90 + n % 3)) for n in range(COUNT)]
    assert probe(files, FAKE, bootstraps=50) == probe(files, FAKE, bootstraps=50)


def test_auc_agrees_with_scikit_learn_also_for_ties() -> None:
    rng = np.random.default_rng(0)
    labels, score = rng.integers(0, 2, 500), rng.integers(0, 9, 500) / 9
    assert metadata._auc(labels, score) == pytest.approx(roc_auc_score(labels, score))


@pytest.mark.parametrize(("labels", "groups"), [([0] * 39 + [1], None), ([0] * 20 + [1] * 20, ["a"] * 40)])
def test_too_few_files_are_refused(labels: list[int], groups: list[str] | None) -> None:
    with pytest.raises(DataError, match="needs 20"):
        probe([{"bytes.bytes": 1.0}] * 40, labels, groups)


# -- headers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [30, 50, 75, 90, 95])
def test_quality_is_read_off_the_tables(quality: int) -> None:
    assert facts(saved(0, "JPEG", quality=quality))["quantisation.quality"] == pytest.approx(quality, abs=2)


def test_a_jpeg_says_how_it_was_coded() -> None:
    found = facts(saved(0, "JPEG", quality=85, subsampling=2, icc_profile=b"x" * 50, comment=b"hello"))
    assert found["format.kind"] == "jpeg"
    assert (found["dimensions.width"], found["dimensions.height"]) == (48, 40)
    assert (found["coding.subsampling"], found["coding.process"], found["coding.optimised"]) == (
        "221111",
        "c0",
        0,
    )
    assert found["coding.precision"] == 8
    assert found["segments.icc"] == 64  # with its 14 bytes of header
    assert found["segments.comment"] == 5
    assert found["segments.jfif"] == "0101"
    assert facts(saved(0, "JPEG", optimize=True))["coding.optimised"] == 1
    assert facts(saved(0, "JPEG", progressive=True))["coding.process"] == "c2"
    assert facts(media.embed_xmp(saved(0, "JPEG"), b"<x/>"))["segments.xmp"] == len(media.XMP_JPEG) + 4


def test_png_and_webp_say_what_they_are() -> None:
    png = facts(saved(0, "PNG"))
    assert (png["png.depth"], png["png.colour"], png["png.chunks"]) == (8, 2, "IHDR IDAT IEND")
    assert facts(saved(0, "WEBP"))["webp.chunks"] == "VP8 "
    assert facts(saved(0, "WEBP", lossless=True))["webp.chunks"] == "VP8L"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_headers_raise_nothing(format: str) -> None:
    data, rng = saved(0, format), np.random.default_rng(0)
    for length in range(0, len(data), 3):
        facts(data[:length])
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(0, min(400, len(data)), 4):
            broken[at] = rng.integers(256)
        facts(bytes(broken))
