"""Untrusted bytes to pixels, safely, and pixels to bytes. Ingest and serving both decode here, so they see the same pixels.

The size is read from the header by our own few lines before any decoder allocates; only JPEG, PNG and WEBP reach a
decoder, chosen by content and never by name. What comes out is upright, sRGB, opaque, 8-bit RGB. Anything else is a
MediaError with a reason and one line for a person. No network, no file access: bytes in, array out.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import struct
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from counterfake.errors import MediaError

Pixels = NDArray[np.uint8]
Kind = Literal["jpeg", "png", "webp", "mp4", "webm", "unknown"]
PICTURES = ("jpeg", "png", "webp")
XMP_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
XMP_PNG = b"XML:com.adobe.xmp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a single picture may cost. The defaults are those of the public endpoint."""

    image_bytes: int = 20_000_000  # of the file as sent
    pixels: int = 25_000_000  # width x height, checked before anything is decoded
    min_side: int = 16  # pixels; smaller pictures carry no face and no trace
    jpeg_scans: int = 64  # a progressive JPEG costs one pass over all pixels per scan


DEFAULT_LIMITS = Limits()


def sniff(data: bytes) -> Kind:
    """What the bytes are by their first bytes; file names and content types are never believed."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"):
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    return "unknown"


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """Bytes of a JPEG, PNG or WEBP from anyone -> (H, W, 3) uint8 sRGB, upright. Animations give their first frame.

    Raises MediaError; its reason is empty, too_large, too_small, unsupported, undecodable, bomb or too_slow.
    """
    kind = _check_bytes(data, limits)
    width, height = header_size(data, kind)
    _check_size(width, height, limits)
    _check_density(data, kind, width * height)
    if kind == "jpeg" and data.count(b"\xff\xda") > limits.jpeg_scans:
        raise MediaError(
            "too_slow", f"this JPEG has more than {limits.jpeg_scans} scans; save it again and send that"
        )
    return decode_trusted(data, limits)


def decode_trusted(data: bytes, limits: Limits | None = None) -> Pixels:
    """The same pixels as `decode`, without its checks: for bytes that ingest has already let in."""
    kind = sniff(data)
    try:
        pixels = _decode_plain_jpeg(data, limits) if kind == "jpeg" else None
        return pixels if pixels is not None else _decode_pillow(data, limits)
    except MediaError:
        raise
    except Exception as error:  # decoders answer hostile bytes with any exception there is; none may pass
        text = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise MediaError("undecodable", f"the {kind} data is damaged or cut short: {text}") from error


def decode_into(data: bytes, out: Pixels) -> bool:
    """Writes `decode_trusted`'s pixels into out (H, W, 3), without an array in between, if `data` is a plain JPEG of that
    very size. False: it is not, and `out` may hold anything."""
    if not data.startswith(b"\xff\xd8") or b"Exif\0\0" in data or b"ICC_PROFILE\0" in data:
        return False
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray") or (height, width, 3) != out.shape:
            return False
        simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out)
    except (ValueError, KeyError):  # not to the letter: the slower way decides
        return False
    return True


def header_size(data: bytes, kind: Kind) -> tuple[int, int]:
    """(width, height) as the header claims, read without a decoder. Raises MediaError if there is no such header."""
    try:
        size = {"jpeg": _jpeg_size, "png": _png_size, "webp": _webp_size}[kind](data)
    except (ValueError, IndexError, struct.error) as error:
        raise MediaError("undecodable", f"this {kind} has no readable header: {str(error)[:100]}") from error
    if min(size) < 1:
        raise MediaError("undecodable", f"this {kind} claims a size of {size[0]} x {size[1]} pixels")
    return size


def encode(
    pixels: Pixels,
    format: Literal["jpeg", "png", "webp"] = "jpeg",
    quality: int = 90,
    xmp: bytes | None = None,
) -> bytes:
    """(H, W, 3) or (H, W, 1) uint8 -> file bytes. JPEG is 4:2:0; WEBP is lossless at quality 100. Deterministic."""
    pixels = np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[:, :, None])
    grey = pixels.shape[2] == 1
    if format == "jpeg":
        space = "GRAY" if grey else "RGB"
        data = bytes(
            simplejpeg.encode_jpeg(pixels, quality=quality, colorspace=space, colorsubsampling="420")
        )
    else:
        buffer = io.BytesIO()
        image = Image.fromarray(pixels[:, :, 0] if grey else pixels)
        if format == "png":
            image.save(buffer, "PNG", compress_level=2)
        else:
            image.save(buffer, "WEBP", quality=quality, lossless=quality >= 100)
        data = buffer.getvalue()
    return embed_xmp(data, xmp) if xmp else data


def encode_gif(frames: Sequence[Pixels], milliseconds: int = 200) -> bytes:
    """Frames (H, W, 3) uint8 of one size -> an endless GIF, each shown for `milliseconds`."""
    first, *others = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    return buffer.getvalue()


def embed_xmp(data: bytes, xmp: bytes) -> bytes:
    """The same picture with this XMP packet in it, replacing an older one; no pixel is encoded again."""
    kind = sniff(data)
    if kind == "jpeg":
        return _jpeg_with_xmp(data, xmp)
    if kind == "png":
        return _png_with_xmp(data, xmp)
    if kind == "webp":
        return _webp_with_xmp(data, xmp)
    raise MediaError("unsupported", f"XMP can be written into JPEG, PNG and WEBP, not into {kind}")


def read_xmp(data: bytes) -> bytes | None:
    """The XMP packet of a JPEG, PNG (uncompressed iTXt) or WEBP; None when there is none or the file is damaged."""
    try:
        return {"jpeg": _jpeg_xmp, "png": _png_xmp, "webp": _webp_xmp}[sniff(data)](data)
    except (KeyError, ValueError, IndexError, struct.error):
        return None


def without_xmp(data: bytes) -> bytes:
    """The file as it was before `embed_xmp`; one that is damaged or of another kind as it came."""
    try:
        return {"jpeg": _jpeg_without_xmp, "png": _png_without_xmp, "webp": _webp_without_xmp}[sniff(data)](
            data
        )
    except (KeyError, ValueError, IndexError, struct.error):
        return data


# -- private: limits ------------------------------------------------------------------------------------------------


def _check_bytes(data: bytes, limits: Limits) -> Kind:
    if not data:
        raise MediaError("empty", "the file is empty")
    if len(data) > limits.image_bytes:
        raise MediaError(
            "too_large", f"the file has {len(data):,} bytes; the limit is {limits.image_bytes:,}"
        )
    kind = sniff(data)
    if kind not in PICTURES:
        what = "of an unknown kind" if kind == "unknown" else f"a video ({kind})"
        raise MediaError("unsupported", f"the file is {what}; pictures may be JPEG, PNG or WEBP")
    return kind


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise MediaError(
            "bomb", f"the picture claims {width} x {height} pixels; the limit is {limits.pixels:,} in all"
        )
    if min(width, height) < limits.min_side:
        raise MediaError(
            "too_small", f"the picture is {width} x {height}; each side needs {limits.min_side} pixels"
        )


def _check_density(data: bytes, kind: Kind, pixels: int) -> None:
    """Refuse a header that promises more than its bytes can hold, before memory is set aside for it."""
    if kind == "png" and len(data) > 25:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(data[25], 1)
        most = len(data) * 8 * 1032 // max(1, data[24] * channels)  # deflate gives at most 1032 bytes for one
    elif kind == "jpeg":
        most = (
            len(data) * 1024
        )  # one bit for each block of 4:1:0, the sparsest there is, makes 455 pixels of a byte
    else:
        return  # a uniform WEBP of any size takes a few bytes
    if pixels > most:
        raise MediaError(
            "undecodable", f"{len(data):,} bytes of {kind} cannot hold the {pixels:,} pixels they claim"
        )


# -- private: decoding ----------------------------------------------------------------------------------------------


def _decode_plain_jpeg(data: bytes, limits: Limits | None) -> Pixels | None:
    """The fast path, bit for bit what Pillow gives; None for a JPEG that needs rotation, a profile, CMYK or leniency."""
    if b"Exif\0\0" in data or b"ICC_PROFILE\0" in data:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray"):
            return None
        if limits is not None:
            _check_size(width, height, limits)  # once more: the header libjpeg read may be another one
        return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"), np.uint8)
    except (
        ValueError,
        KeyError,
    ):  # strict: stops at warnings; KeyError: a subsampling it does not know, such as 4:4:1
        return None  # Pillow decides which of them are harmless


def _decode_pillow(data: bytes, limits: Limits | None) -> Pixels:
    with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
        if limits is not None:
            _check_size(*image.size, limits)  # once more: the header Pillow read may be another one
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return np.ascontiguousarray(np.asarray(_to_srgb(_eight_bits(image)), np.uint8))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Any mode Pillow gives for the three formats -> L, RGB or CMYK without transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        scaled = (
            values >> 8 if values.dtype.kind in "ui" else values
        )  # 16-bit PNG: the high byte, as Pillow does for RGB
        return _keep_profile(Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8)), image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _over_white(image)
    return image if image.mode in ("L", "RGB", "CMYK") else _keep_profile(image.convert("RGB"), image)


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return _keep_profile(Image.alpha_composite(white, rgba).convert("RGB"), image)


def _keep_profile(image: Image.Image, source: Image.Image) -> Image.Image:
    image.info["icc_profile"] = source.info.get("icc_profile")
    return image


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            transform = _transform(profile, image.mode)
            converted = ImageCms.applyTransform(image, transform) if transform else image
            return converted if converted is not None and converted.mode == "RGB" else image.convert("RGB")
        except (ImageCms.PyCMSError, ValueError, OSError):
            pass  # a broken profile or one for another colour space: the numbers are taken as sRGB, as browsers do
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform into sRGB; None when the profile is sRGB already."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


# -- private: headers -----------------------------------------------------------------------------------------------


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """From the first frame header (SOF)."""
    for marker, start, end in jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if end - start < 6:
                break
            height, width = struct.unpack(">HH", data[start + 1 : start + 5])
            return width, height
    raise ValueError("no frame header before the picture data")


def jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end of payload) of each segment up to the first scan."""
    segments: list[tuple[int, int, int]] = []
    at = 2
    for _ in range(10_000):  # hostile files hold millions of fill bytes; a camera writes a few dozen segments
        at = data.find(b"\xff", at)  # libjpeg skips stray bytes too
        if at < 0 or at + 4 > len(data) or data[at + 1] in (0xDA, 0xD9):
            return segments
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in (0, 1) or 0xD0 <= marker <= 0xD8:  # no payload
            at += 2
        else:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            if length < 2:
                raise ValueError("a segment of impossible length")
            segments.append((marker, at + 4, min(at + 2 + length, len(data))))
            at += 2 + length
    raise ValueError("more than 10,000 segments before the picture")


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise ValueError("the first chunk is not IHDR")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    """The largest of what VP8X and the first bitstream claim, so that neither can hide the other."""
    sizes = [
        size for name, start, end in webp_chunks(data) if (size := _webp_chunk_size(name, data[start:end]))
    ]
    if not sizes:
        raise ValueError("no picture chunk")
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def _webp_chunk_size(name: bytes, chunk: bytes) -> tuple[int, int] | None:
    if name == b"VP8X" and len(chunk) >= 10:
        return int.from_bytes(chunk[4:7], "little") + 1, int.from_bytes(chunk[7:10], "little") + 1
    if name == b"VP8 " and len(chunk) >= 10:
        width, height = struct.unpack("<HH", chunk[6:10])
        return width & 0x3FFF, height & 0x3FFF
    if name == b"VP8L" and len(chunk) >= 5:
        bits = int.from_bytes(chunk[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def webp_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """(name, start, end of content) of each RIFF chunk."""
    chunks: list[tuple[bytes, int, int]] = []
    at = 12
    while at + 8 <= len(data) and len(chunks) < 4096:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append((data[at : at + 4], at + 8, min(at + 8 + length, len(data))))
        at += 8 + length + (length & 1)
    return chunks


# -- private: XMP ---------------------------------------------------------------------------------------------------


def _jpeg_with_xmp(data: bytes, xmp: bytes) -> bytes:
    """APP1 after SOI, JFIF and Exif. XMP specification part 3, 1.1.3."""
    if len(XMP_JPEG) + len(xmp) + 2 > 0xFFFF:
        raise MediaError(
            "too_large", f"an XMP packet of {len(xmp):,} bytes does not fit into one JPEG segment (65,502)"
        )
    data = _jpeg_without_xmp(data)
    lead = [s for s in jpeg_segments(data)[:2] if s[0] == 0xE0 or data[s[1] : s[2]].startswith(b"Exif\0")]
    at = lead[-1][2] if lead else 2
    payload = XMP_JPEG + xmp
    return data[:at] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[at:]


def _jpeg_without_xmp(data: bytes) -> bytes:
    for marker, start, end in reversed(jpeg_segments(data)):
        if marker == 0xE1 and data[start:end].startswith(XMP_JPEG):
            data = data[: start - 4] + data[end:]
    return data


def _jpeg_xmp(data: bytes) -> bytes | None:
    for marker, start, end in jpeg_segments(data):
        if marker == 0xE1 and data[start:end].startswith(XMP_JPEG):
            return data[start + len(XMP_JPEG) : end]
    return None


def png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """(name, start, end of content) of each chunk."""
    chunks: list[tuple[bytes, int, int]] = []
    at = 8
    while at + 12 <= len(data) and len(chunks) < 65536:
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], at + 8, min(at + 8 + length, len(data))))
        at += 12 + length
    return chunks


def _png_with_xmp(data: bytes, xmp: bytes) -> bytes:
    """iTXt right after IHDR. XMP specification part 3, 1.1.5."""
    data = _png_without_xmp(data)
    body = b"iTXt" + XMP_PNG + b"\0\0\0\0\0" + xmp
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]  # 8 signature + 25 IHDR


def _png_without_xmp(data: bytes) -> bytes:
    for name, start, end in reversed(png_chunks(data)):
        if name == b"iTXt" and data[start:end].startswith(XMP_PNG + b"\0"):
            data = data[: start - 8] + data[end + 4 :]
    return data


def _png_xmp(data: bytes) -> bytes | None:
    head = XMP_PNG + b"\0\0\0\0\0"  # uncompressed, no language, no translated keyword
    for name, start, end in png_chunks(data):
        if name == b"iTXt" and data[start:end].startswith(head):
            return data[start + len(head) : end]
    return None


def _webp_with_xmp(data: bytes, xmp: bytes) -> bytes:
    """VP8X with its XMP flag, and an `XMP ` chunk at the end. WebP container specification."""
    width, height = _webp_size(data)
    chunks = [(name, data[start:end]) for name, start, end in webp_chunks(data) if name != b"XMP "]
    flags = chunks[0][1][0] if chunks[0][0] == b"VP8X" else _webp_alpha_flag(chunks[0])
    rest = chunks[1:] if chunks[0][0] == b"VP8X" else chunks
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return _riff([(b"VP8X", bytes([flags | 0x04, 0, 0, 0]) + sides), *rest, (b"XMP ", xmp)])


def _webp_without_xmp(data: bytes) -> bytes:
    """Also without the VP8X that a plain file needed for it."""
    (first, head), *rest = [
        (name, data[start:end]) for name, start, end in webp_chunks(data) if name != b"XMP "
    ]
    if first != b"VP8X":
        return data
    flags = head[0] & ~0x04
    plain = len(rest) == 1 and flags == _webp_alpha_flag(rest[0])
    return _riff(rest if plain else [(first, bytes([flags]) + head[1:]), *rest])


def _riff(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(n + struct.pack("<I", len(c)) + c + b"\0" * (len(c) & 1) for n, c in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _webp_alpha_flag(chunk: tuple[bytes, bytes]) -> int:
    return 0x10 if chunk[0] == b"VP8L" and chunk[1][4] >> 4 & 1 else 0


def _webp_xmp(data: bytes) -> bytes | None:
    return next((data[start:end] for name, start, end in webp_chunks(data) if name == b"XMP "), None)
