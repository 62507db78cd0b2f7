"""provenance.py: what we generate says so, and what a file claims is read without trusting or fetching anything."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from counterfake import media, provenance
from counterfake.errors import ConfigError, MediaError

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
        provenance.mark(b"BM6\0\0\0", maker="x")
    with pytest.raises(MediaError, match="only a whole GIF"):
        provenance.mark(b"GIF89a", maker="x")


def test_a_marked_gif_shows_its_frames_to_readers_that_know_no_xmp() -> None:
    frames = [np.full((8, 12, 3), value, np.uint8) for value in (0, 128, 255)]
    plain = media.encode_gif(frames)
    marked = provenance.mark(plain, maker="dcgan@3")
    found = provenance.read(marked)
    assert (found.digital_source_type, found.maker) == ("trainedAlgorithmicMedia", "dcgan@3")
    assert provenance.read(plain) == provenance.Provenance()
    with Image.open(io.BytesIO(marked)) as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (3, 200, 0)
        for index, frame in enumerate(frames):
            gif.seek(index)
            assert (np.asarray(gif.convert("RGB")) == frame).all()


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


# -- signing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("algorithm", ["es256", "ed25519"])
def test_a_signed_picture_is_read_back_valid_with_its_source_type_and_pixels(
    credentials: Callable[..., Any], format: str, algorithm: str
) -> None:
    files = credentials(algorithm)
    signer = provenance.Signing(certificate=files.certificate, key=files.key).load()
    assert signer is not None
    assert signer.algorithm == algorithm
    assert "PRIVATE" not in repr(signer)
    data = media.encode(PIXELS, format)
    signed = provenance.mark(data, maker="dcgan-faces@7", signer=signer)
    found = provenance.read(signed)
    assert (found.c2pa_state, found.c2pa_generator) == ("Valid", "counterfake")
    assert (found.digital_source_type, found.maker) == ("trainedAlgorithmicMedia", "dcgan-faces@7")
    assert found.c2pa_problems == ("signingCredential.untrusted",)  # nobody knows its root
    assert (media.decode(signed) == media.decode(data)).all()


def test_the_manifest_itself_says_what_made_the_picture(credentials: Callable[..., Any]) -> None:
    """Where the XMP is stripped and the picture signed for a composite, the signature speaks alone."""
    files = credentials()
    signer = provenance.Signing(certificate=files.certificate, key=files.key).load()
    assert signer is not None
    out = io.BytesIO()
    kind: provenance.SourceType = "compositeWithTrainedAlgorithmicMedia"
    signer.sign(io.BytesIO(media.encode(PIXELS, "png")), out, "png", maker="swap@2", source_type=kind)
    found = provenance.read(out.getvalue())
    assert (found.digital_source_type, found.maker, found.c2pa_state) == (kind, "", "Valid")
    assert b"swap@2" in out.getvalue()


def test_a_changed_pixel_breaks_the_signature(credentials: Callable[..., Any]) -> None:
    files = credentials()
    signer = provenance.Signing(certificate=files.certificate, key=files.key).load()
    signed = bytearray(provenance.mark(media.encode(PIXELS), maker="m", signer=signer))
    signed[-40] ^= 1
    assert provenance.read(bytes(signed)).c2pa_state == "Invalid"


def test_a_signed_video_keeps_its_frames(credentials: Callable[..., Any], clip: Path) -> None:
    from counterfake import video

    files = credentials("ed25519")
    before = [frame.pixels for frame in video.frames(clip, every=1)]
    signer = provenance.Signing(certificate=files.certificate, key=files.key).load()
    provenance.mark_video(clip, maker="swap@1", signer=signer)
    found = provenance.read(clip.read_bytes())
    assert (found.c2pa_state, found.digital_source_type) == ("Valid", "compositeWithTrainedAlgorithmicMedia")
    assert all((a == b.pixels).all() for a, b in zip(before, video.frames(clip, every=1), strict=True))
    assert [path.name for path in clip.parent.iterdir()] == [clip.name]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("missing", r"sign\.key .* cannot be read: No such file"),
        ("no pem", r"sign\.key .* is no PEM file"),
        ("no key", r"sign\.key .* holds no private key"),
        ("another's", r"sign\.certificate .* and sign\.key .* do not sign: .*does not match"),
        ("expired", r"do not sign: .*not valid at time of signing"),
        ("half", r"sign\.certificate is set but sign\.key is not"),
    ],
)
def test_a_key_that_does_not_sign_is_one_line(
    credentials: Callable[..., Any], tmp_path: Path, wrong: str, says: str
) -> None:
    files = credentials(days=-1 if wrong == "expired" else 30)
    (tmp_path / "text").write_text("hello")
    key = {"missing": str(tmp_path / "none"), "no pem": str(tmp_path / "text"), "no key": files.certificate,
           "another's": credentials().key, "half": ""}.get(wrong, files.key)  # fmt: skip
    with pytest.raises(ConfigError, match=says) as caught:
        provenance.Signing(certificate=files.certificate, key=key).load()
    assert "\n" not in str(caught.value), wrong


def test_without_a_key_nothing_is_signed_and_without_the_package_that_is_said(
    credentials: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provenance.Signing().load() is None
    files = credentials()
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(ConfigError, match="pip install c2pa-python"):
        provenance.Signing(certificate=files.certificate, key=files.key).load()


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
