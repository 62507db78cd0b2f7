"""The exact face region of a row, where it is known, as a short text in `attributes.face_mask`.

"SIDE:BASE64" holds SIDE × SIDE bits, 1 = face, row by row, deflated: of the whole picture stretched to a square, so that it
stays right when the picture is resized or encoded anew. About 130 characters; the mask that comes back agrees with the
exact one of procedural faces to an IoU of .97. To read it elsewhere: zlib.decompress(b64decode(text)), numpy.unpackbits.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from counterfake.errors import DataError

Mask = NDArray[np.uint8]

NAME = "face_mask"  # of the attribute
SIDE = 64  # bits per side that `packed` writes
MOST = 1024  # that `unpacked` reads


def packed(mask: Mask) -> str:
    """mask (H, W) uint8, more than half of 255 = face -> the text."""
    small = cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return f"{SIDE}:{base64.b64encode(zlib.compress(np.packbits(small > 127).tobytes(), 9)).decode()}"


def unpacked(text: str, width: int, height: int) -> Mask:
    """The text -> (height, width) uint8, 255 = face, soft over about a bit's width. Raises DataError for another text."""
    digits, _, data = text.partition(":")
    side = int(digits) if digits.isdecimal() and len(digits) < 5 else 0
    if not 0 < side <= MOST:
        raise DataError(f"{NAME} {text[:20]!r} names no side of 1 to {MOST} bits")
    size = (side * side + 7) // 8
    try:
        packed_bits = zlib.decompressobj().decompress(base64.b64decode(data, validate=True), size)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise DataError(f"{NAME} {text[:20]!r} does not decode: {error}") from error
    if len(packed_bits) < size:
        raise DataError(f"{NAME} has {8 * len(packed_bits)} bits, expected {side} × {side}")
    bits = np.unpackbits(np.frombuffer(packed_bits, np.uint8), count=side * side).reshape(side, side)
    return np.asarray(cv2.resize(255 * bits, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def texts(attributes: Iterable[str | None]) -> list[str | None]:
    """Of each row's attributes (JSON) the mask's text; None where there is none."""
    return [json.loads(row).get(NAME) if row and f'"{NAME}"' in row else None for row in attributes]


def cut(
    attributes: Mapping[str, Any], size: tuple[int, int], box: tuple[int, int, int, int]
) -> dict[str, Any]:
    """The attributes of a picture of size (width, height), for its part box (left, top, right, bottom)."""
    text = attributes.get(NAME)
    if text is None:
        return dict(attributes)
    left, top, right, bottom = box
    return {**attributes, NAME: packed(unpacked(text, *size)[top:bottom, left:right])}
