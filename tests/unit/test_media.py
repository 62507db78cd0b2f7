"""media.py: untrusted bytes become upright sRGB pixels, or a MediaError with a reason; the two decode paths agree bit for bit."""

from __future__ import annotations

import io
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from counterfake import media
from counterfake.errors import MediaError
from counterfake.media import Limits, decode, decode_trusted, embed_xmp, encode, read_xmp, sniff, without_xmp

XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>hello</x:xmpmeta>"


def picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """A smooth colourful picture: JPEG keeps it nearly."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = np.stack([np.sin(5 * x + p) * np.cos(4 * y + p) for p in phase], 2)
    return ((waves + 1) * 127).astype(np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reason(data: bytes, limits: Limits = media.DEFAULT_LIMITS) -> str:
    with pytest.raises(MediaError) as caught:
        decode(data, limits)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_bomb(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))
        + png_chunk(b"IEND", b"")
    )


# -- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_each_format_is_known_by_its_content_and_decodes_to_rgb(format: str) -> None:
    data = encode(picture(), format, 95)
    assert sniff(data) == format
    pixels = decode(data)
    assert pixels.shape == (40, 56, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - picture()).mean() < 4


@pytest.mark.parametrize("format", ["png", "webp"])
def test_lossless_formats_give_back_the_exact_pixels(format: str) -> None:
    assert (decode(encode(picture(), format, 100)) == picture()).all()


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypisom", "mp4"),
        (b"\0\0\0\x18ftypavif", "unknown"),
        (b"\x1a\x45\xdf\xa3", "webm"),
        (b"GIF89a", "unknown"),
        (b"<svg>", "unknown"),
        (b"", "unknown"),
    ],
)
def test_sniff_reads_first_bytes_only(head: bytes, kind: str) -> None:
    assert sniff(head + bytes(20 if head else 0)) == kind


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_jpeg_path_equals_pillow_bit_for_bit(mode: str, progressive: bool, subsampling: int) -> None:
    image = Image.fromarray(picture(61, 47)).convert(mode)
    options = {"subsampling": subsampling} if mode == "RGB" else {}
    data = saved(image, "JPEG", quality=83, progressive=progressive, **options)
    assert (decode(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_trusted_decoding_gives_the_same_pixels(format: str) -> None:
    data = encode(picture(33, 90, 4), format, 80)
    assert (decode_trusted(data) == decode(data)).all()


def test_encoding_is_deterministic() -> None:
    for format in ("jpeg", "png", "webp"):
        assert encode(picture(), format) == encode(picture(), format)


# -- colour and orientation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_decodes_to_the_same_upright_picture(orientation: int, format: str) -> None:
    turn = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    upright = Image.fromarray(picture(48, 48 + 16))
    stored = upright.transpose(turn) if turn is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[format]
    pixels = decode(saved(stored, format, exif=exif, **options))
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels.astype(int) - np.asarray(upright)).max() <= (0 if format != "JPEG" else 12)


def test_transparency_lies_over_white() -> None:
    rgba = np.dstack((picture(20, 20), np.zeros((20, 20), np.uint8)))
    rgba[:, 10:, 3] = 255
    pixels = decode(saved(Image.fromarray(rgba, "RGBA"), "PNG"))
    assert (pixels[:, :10] == 255).all()
    assert (pixels[:, 10:] == picture(20, 20)[:, 10:]).all()


def test_palette_and_palette_with_transparency() -> None:
    palette = Image.fromarray(picture(20, 20)).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert (decode(saved(palette, "PNG")) == expected).all()
    pixels = decode(saved(palette, "PNG", transparency=0))
    clear = np.asarray(palette) == 0
    assert (pixels[clear] == 255).all()
    assert (pixels[~clear] == expected[~clear]).all()


def test_one_bit_and_grey_alpha() -> None:
    bits = Image.fromarray(picture(20, 20)[:, :, 0]).convert("1")
    assert set(np.unique(decode(saved(bits, "PNG")))) <= {0, 255}
    grey = Image.fromarray(picture(20, 20)).convert("LA")
    assert decode(saved(grey, "PNG")).shape == (20, 20, 3)


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    values = (np.arange(400, dtype=np.uint16) * 160).reshape(20, 20)
    pixels = decode(saved(Image.fromarray(values), "PNG"))
    assert (pixels[:, :, 0] == values >> 8).all()


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = Image.fromarray(picture(32, 32)).convert("CMYK")
    pixels = decode(saved(image, "JPEG", quality=95, subsampling=0))
    assert np.abs(pixels.astype(int) - picture(32, 32)).mean() < 6


def test_a_profile_is_applied_and_an_srgb_profile_changes_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encode(picture(), "png")
    plain = Image.open(io.BytesIO(data))
    assert (decode(saved(plain, "PNG", icc_profile=srgb)) == decode(data)).all()
    swapped = _swap_red_and_green(srgb)
    pixels = decode(saved(plain, "PNG", icc_profile=swapped))
    assert np.abs(pixels.astype(int) - picture()).mean() > 20


def _swap_red_and_green(profile: bytes) -> bytes:
    """An sRGB profile whose red primary is green and the other way round, and that does not call itself sRGB."""
    return profile.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ").replace(
        "sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be")
    ).replace(b"sRGB", b"xRGB")  # fmt: skip


def test_a_broken_profile_is_ignored() -> None:
    plain = Image.fromarray(picture())
    assert (decode(saved(plain, "PNG", icc_profile=b"no profile at all" * 20)) == picture()).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.fromarray(picture(24, 24, seed)) for seed in range(3)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert (decode(data) == picture(24, 24, 0)).all()


# -- refusals -------------------------------------------------------------------------------------------------------


def test_refusals_name_their_reason() -> None:
    assert reason(b"") == "empty"
    assert reason(b"x" * 101, Limits(image_bytes=100)) == "too_large"
    assert reason(b"GIF89a" + bytes(50)) == "unsupported"
    assert reason(b"\0\0\0\x18ftypisom" + bytes(50)) == "unsupported"
    assert reason(encode(picture(15, 80), "png")) == "too_small"
    assert reason(b"\xff\xd8\xff" + bytes(100)) == "undecodable"
    assert reason(b"\x89PNG\r\n\x1a\n" + bytes(100)) == "undecodable"
    assert reason(b"RIFF\0\0\0\0WEBP" + bytes(100)) == "undecodable"


def test_media_errors_survive_a_process_boundary() -> None:
    error = MediaError("bomb", "too many pixels")
    copy = error.__reduce__()[0](*error.__reduce__()[1])
    assert (copy.reason, str(copy)) == ("bomb", "too many pixels")


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_file_is_undecodable(format: str, share: float) -> None:
    data = encode(picture(120, 120), format, 100)
    assert reason(data[: int(len(data) * share)]) == "undecodable"


@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (5001, 5001)])
def test_a_png_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    started = time.process_time()
    assert reason(png_bomb(*size)) == "bomb"
    assert time.process_time() - started < 0.5


def test_a_webp_canvas_and_a_jpeg_header_count_too() -> None:
    webp = encode(picture(), "webp", 100)
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16000).to_bytes(3, "little") * 2
    assert reason(webp[:12] + canvas + webp[12:]) == "bomb"
    jpeg = bytearray(encode(picture(), "jpeg"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    assert reason(bytes(jpeg)) == "bomb"


def test_a_header_that_promises_more_than_its_bytes_hold_is_refused_before_memory_is_taken() -> None:
    assert reason(png_bomb(4999, 4999)[:3000]) == "undecodable"
    jpeg = bytearray(encode(picture(), "jpeg"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 4999, 4999)
    with pytest.raises(MediaError, match="cannot hold"):
        decode(bytes(jpeg))


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_a_uniform_picture_is_no_bomb(format: str) -> None:
    assert decode(encode(np.full((1500, 2000, 3), 200, np.uint8), format, 50)).shape == (1500, 2000, 3)


def test_a_picture_at_the_pixel_limit_passes_and_one_above_it_does_not() -> None:
    limits = Limits(pixels=40 * 56)
    assert decode(encode(picture(), "png"), limits).shape == (40, 56, 3)
    assert reason(encode(picture(41, 56), "png"), limits) == "bomb"


def test_a_jpeg_of_very_many_scans_is_refused_before_it_costs_time() -> None:
    data = encode(picture(), "jpeg")
    scan = data[data.index(b"\xff\xda") : -2]
    assert reason(data[:-2] + scan * 80 + b"\xff\xd9") == "too_slow"


def test_millions_of_fill_bytes_are_refused_quickly() -> None:
    started = time.process_time()
    assert reason(b"\xff\xd8" + b"\xff" * 5_000_000) == "undecodable"
    assert reason(b"\xff\xd8\xff" + b"\xfe\x00\x02" * 3_000_000) == "undecodable"
    assert time.process_time() - started < 1.0


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_decode_or_are_refused_and_nothing_else(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["jpeg", "png", "webp"]))
    body = bytearray(encode(picture(24, 24), format, 90))
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(body)))
    for variant in (bytes(body), bytes(body[:cut])):
        try:
            pixels = decode(variant, Limits(pixels=100_000))
        except MediaError:
            continue
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert (pixels == decode_trusted(variant)).all()


def test_hostile_files_never_crash_hang_or_swell(shared_data: Path) -> None:
    import resource

    before, seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    with tarfile.open(shared_data / "hostile" / "hostile.tar.gz") as archive:
        for member in archive:
            if not member.isreg():
                continue
            content = archive.extractfile(member)
            assert content is not None
            data, started = content.read(), time.process_time()
            seen += 1
            try:
                pixels = decode(data)
                assert (pixels == decode_trusted(data)).all()
            except MediaError:
                pass
            assert time.process_time() - started < 2, member.name
    assert seen > 150
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


# -- XMP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("grey", [False, True])
def test_xmp_goes_in_and_out_without_touching_a_pixel(format: str, grey: bool) -> None:
    data = encode(picture()[:, :, :1] if grey else picture(), format, 88)
    marked = embed_xmp(data, XMP)
    assert read_xmp(data) is None
    assert read_xmp(marked) == XMP
    assert (decode(marked) == decode(data)).all()
    assert Image.open(io.BytesIO(marked)).info["xmp"] == XMP


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("quality", [88, 100])
def test_a_file_whose_xmp_is_taken_out_is_the_one_it_was(format: str, quality: int) -> None:
    data = encode(picture(), format, quality)
    assert without_xmp(embed_xmp(data, XMP)) == without_xmp(data) == data
    assert without_xmp(embed_xmp(data, XMP)[:40]) is not None  # damaged


def test_what_is_no_picture_has_no_xmp_to_take_out() -> None:
    assert without_xmp(b"GIF89a and more") == b"GIF89a and more"
    assert without_xmp(b"RIFF\0\0\0\0WEBP") == b"RIFF\0\0\0\0WEBP"


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_new_xmp_replaces_old(format: str) -> None:
    once = encode(picture(), format, 90, xmp=XMP)
    assert embed_xmp(once, XMP) == once
    assert read_xmp(embed_xmp(once, b"other")) == b"other"
    assert embed_xmp(embed_xmp(once, b"other"), XMP) == once


def test_xmp_follows_exif_and_fits_a_segment() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = saved(Image.fromarray(picture()), "JPEG", exif=exif)
    marked = embed_xmp(data, XMP)
    opened = Image.open(io.BytesIO(marked))
    assert opened.getexif()[0x010E] == "a description"
    assert opened.info["xmp"] == XMP
    with pytest.raises(MediaError, match="does not fit"):
        embed_xmp(data, bytes(70_000))
    with pytest.raises(MediaError, match="XMP can be written"):
        embed_xmp(b"GIF89a", XMP)


def test_simplejpeg_header_agrees_with_ours() -> None:
    data = encode(picture(31, 77), "jpeg")
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    assert media.header_size(data, "jpeg") == (width, height) == (77, 31)


@pytest.mark.parametrize(
    "kind", ["420", "422", "444", "GRAY", "progressive", "rgb", "cmyk", "exif", "png", "smaller", "larger"]
)
def test_decoding_into_a_buffer_gives_the_same_pixels_or_declines(kind: str) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if kind in ("420", "422", "444"):
        image.save(buffer, "JPEG", subsampling={"444": 0, "422": 1, "420": 2}[kind])
    elif kind in ("GRAY", "cmyk"):
        image.convert("L" if kind == "GRAY" else "CMYK").save(buffer, "JPEG")
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # rotated
        image.save(buffer, "JPEG", exif=exif)
    elif kind in ("smaller", "larger"):
        image.resize((24, 32) if kind == "smaller" else (40, 32)).save(buffer, "JPEG")
    else:
        image.save(
            buffer, "PNG" if kind == "png" else "JPEG", **{kind: True} if kind == "progressive" else {}
        )
        if kind == "rgb":
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", keep_rgb=True)
    out = np.zeros((32, 32, 3), np.uint8)
    done = media.decode_into(buffer.getvalue(), out)
    assert done == (kind not in ("rgb", "cmyk", "exif", "png", "smaller", "larger"))
    if done:
        np.testing.assert_array_equal(out, media.decode_trusted(buffer.getvalue()))
        np.testing.assert_array_equal(out, media.decode(buffer.getvalue()))
