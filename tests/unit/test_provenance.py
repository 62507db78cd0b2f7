"""provenance.py: what we generate says so, and what a file claims is read without trusting or fetching anything."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterfake import media, provenance
from counterfake.errors import MediaError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_a_marked_picture_claims_to_be_synthetic_and_keeps_its_pixels(format: str) -> None:
    data = media.encode(PIXELS, format)
    marked = provenance.mark(data, maker="dcgan-faces@7")
    found = provenance.read(marked)
    assert (found.digital_source_type, found.maker) == ("trainedAlgorithmicMedia", "dcgan-faces@7")
    assert found.claims_synthetic
    assert not found.has_c2pa
    assert (media.decode(marked) == media.decode(data)).all()
    assert provenance.mark(marked, maker="dcgan-faces@7") == marked


def test_a_swap_is_marked_as_a_composite() -> None:
    marked = provenance.mark(
        media.encode(PIXELS), maker="swap@1", source_type="compositeWithTrainedAlgorithmicMedia"
    )
    assert provenance.read(marked).digital_source_type == "compositeWithTrainedAlgorithmicMedia"


def test_an_unmarked_picture_claims_nothing() -> None:
    found = provenance.read(media.encode(PIXELS))
    assert found == provenance.Provenance()
    assert not found.claims_synthetic


@given(maker=st.text(max_size=60))
@settings(deadline=None, max_examples=40)
def test_any_maker_survives_escaping(maker: str) -> None:
    clean = "".join(c for c in maker if c.isprintable()).strip()
    assert provenance.read(provenance.mark(media.encode(PIXELS), maker=maker)).maker == clean


@pytest.mark.parametrize(
    "body",
    [
        "<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture</Iptc4xmpExt:DigitalSourceType>",
        '<rdf:Description Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"/>',
        '<Iptc4xmpExt:DigitalSourceType rdf:resource="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"/>',
    ],
    ids=["element", "attribute", "resource"],
)
def test_every_way_of_writing_the_property_is_read(body: str) -> None:
    found = provenance.read(media.embed_xmp(media.encode(PIXELS), body.encode()))
    assert found.digital_source_type == "digitalCapture"
    assert not found.claims_synthetic


@given(junk=st.binary(max_size=300))
@settings(deadline=None, max_examples=60)
def test_hostile_metadata_is_the_same_as_none(junk: bytes) -> None:
    provenance.read(junk)
    provenance.read(media.embed_xmp(media.encode(PIXELS), junk + b"<a:DigitalSourceType>" + junk))


def test_other_files_cannot_be_marked() -> None:
    with pytest.raises(MediaError, match="not into unknown"):
        provenance.mark(b"GIF89a", maker="x")


def test_the_answer_is_json() -> None:
    tree = provenance.read(provenance.mark(media.encode(PIXELS), maker="x")).to_dict()
    assert tree["claims_synthetic"] is True
    assert tree["c2pa_problems"] == []


def test_content_credentials_are_read_as_the_reference_reader_does(shared_data: Path) -> None:
    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    with open(shared_data / "c2pa" / "files.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        found = provenance.read((shared_data / "c2pa" / row["file"]).read_bytes())
        if row["validation_state"] == "error":
            assert not found.has_c2pa, row["file"]
        else:
            assert found.c2pa_state == row["validation_state"], row["file"]
            assert set(row["status_codes"].split(";")) <= set(found.c2pa_problems), row["file"]
    assert len(rows) >= 15


def test_marking_a_signed_picture_breaks_its_signature_and_says_so(shared_data: Path) -> None:
    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    signed = (shared_data / "c2pa" / "C_with_CAWG_data.jpg").read_bytes()
    assert provenance.read(signed).digital_source_type == "digitalCapture"
    marked = provenance.read(provenance.mark(signed, maker="swap@1"))
    assert marked.c2pa_state == "Invalid"
    assert marked.claims_synthetic


def test_no_manifest_makes_us_call_a_url(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture names a remote manifest; junk that looks like a manifest must not lead the reader there."""
    c2pa = pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    seen: list[str] = []
    reader = c2pa.Reader

    def spy(*args: object, **options: object) -> object:
        try:
            return reader(*args, **options)
        except Exception as error:
            seen.append(str(error))
            raise

    monkeypatch.setattr(c2pa, "Reader", spy)
    data = (shared_data / "c2pa" / "libpng-test_with_url.png").read_bytes() + b"jumb c2pa"
    assert provenance.read(data).c2pa_state in ("", "unreadable")
    assert seen
    assert all("could not fetch" not in text for text in seen)


def test_without_the_reader_a_manifest_is_still_noticed(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    found = provenance.read((shared_data / "c2pa" / "C.jpg").read_bytes())
    assert (found.has_c2pa, found.c2pa_state) == (True, "unreadable")


# -- videos and labels ----------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    from counterfake import video

    path = tmp_path / "clip.mp4"
    video.write(path, [np.full((48, 64, 3), 20 * i, np.uint8) for i in range(5)])
    return path


def test_a_marked_video_says_so_and_keeps_its_frames(clip: Path) -> None:
    from counterfake import video

    before, plain = clip.read_bytes(), [f.pixels for f in video.frames(clip, every=1)]
    assert provenance.read_video(clip) == provenance.Provenance()
    provenance.mark_video(clip, maker="swap@3", terms="detector training only")
    for found in (provenance.read_video(clip), provenance.read(clip.read_bytes())):
        assert (found.digital_source_type, found.maker) == ("compositeWithTrainedAlgorithmicMedia", "swap@3")
        assert found.claims_synthetic
    assert b"detector training only" in clip.read_bytes()
    assert clip.read_bytes().startswith(before)
    assert all((a.pixels == b).all() for a, b in zip(video.frames(clip, every=1), plain, strict=True))


def test_marking_a_video_again_leaves_one_mark(clip: Path) -> None:
    provenance.mark_video(clip, maker="first@1")
    provenance.mark_video(clip, maker="second@2", source_type="trainedAlgorithmicMedia")
    found = provenance.read_video(clip)
    assert (found.maker, found.digital_source_type) == ("second@2", "trainedAlgorithmicMedia")
    assert provenance.read(provenance.mark(clip.read_bytes(), maker="third@3")).maker == "third@3"


def test_a_video_that_was_cut_short_is_not_marked_and_its_reader_does_not_stumble(clip: Path) -> None:
    cut = clip.read_bytes()[:-7]
    with pytest.raises(MediaError, match="whole MP4"):
        provenance.mark(cut, maker="m")
    assert not provenance.read(cut).claims_synthetic


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=64))
def test_boxes_of_nonsense_are_read_as_nothing(junk: bytes) -> None:
    assert not provenance.read(b"\0\0\0\x10ftypisom\0\0\0\0" + junk).claims_synthetic


@pytest.mark.parametrize("size", [(640, 480), (96, 128), (40, 30)], ids=str)
def test_a_label_is_seen_in_its_corner_and_nowhere_else(size: tuple[int, int]) -> None:
    picture = np.full((size[1], size[0], 3), 90, np.uint8)
    labelled = provenance.label(picture)
    left, top, right, bottom = provenance.label_box(size)
    assert (labelled[top:bottom, left:right] > 200).any(axis=2).mean() > 0.03
    rest = labelled.copy()
    rest[top:bottom, left:right] = 90
    assert (rest == 90).all()
    assert (bottom - top) * (right - left) < 0.5 * size[0] * size[1]
