"""What `data derive --map` makes of each row: its face cut out, its picture encoded anew, or brought to a size.

A changed picture is measured and hashed anew, its box, landmarks and face mask move with it, and `attributes.original` names the
row it was made of. Pictures are decoded as ingest decodes them.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from counterfake import face_masks, faces, media, prepare, quality
from counterfake.errors import ConfigError, MediaError
from counterfake.faces import MARGIN
from counterfake.prepare import encoder
from counterfake.samples import Sample, Skipped

LARGEST = 8192  # pixels; of a side asked for
QUALITY = 95  # of the JPEG that crop-faces and resize write in place of a JPEG; anything else becomes a PNG


@dataclasses.dataclass(frozen=True)
class Change:
    """`text` as it was asked for; one of the three below is what it does."""

    text: str
    margin: float | None = None  # cut the face out, a square of margin times the longer side of its box
    side: int | None = None  # bring the longer side to this many pixels
    encode: str = ""  # as at ingest: jpeg:90, png, webp:100

    @classmethod
    def parse(cls, text: str) -> Change:
        """`crop-faces`, `crop-faces:1.5`, `resize:256`, `jpeg:90`, `png`, `webp:80`. Raises ConfigError for anything else."""
        name, _, value = text.partition(":")
        if name == "crop-faces" and (margin := _number(value or str(MARGIN))) and 0.1 <= margin <= 10:
            return cls(text, margin=margin)
        if name == "resize" and value.isdigit() and media.DEFAULT_LIMITS.min_side <= int(value) <= LARGEST:
            return cls(text, side=int(value))
        if name in ("jpeg", "png", "webp"):
            encoder(text)
            return cls(text, encode=text)
        raise ConfigError(
            f"{text!r} is no change; one is crop-faces[:MARGIN], resize:SIDE ({media.DEFAULT_LIMITS.min_side}-{LARGEST}), "
            "jpeg:QUALITY, webp:QUALITY or png"
        )

    def __call__(self, sample: Sample) -> Sample | Skipped:
        """The changed sample, or why there is none: no_face, too_small, or what decoding it says."""
        try:
            pixels = sample.pixels if sample.pixels is not None else media.decode(sample.media)
        except MediaError as error:
            return Skipped(sample.path, error.reason)
        if self.encode:
            return prepare.encoded(_renewed(sample, pixels), pixels, self.encode)
        if self.margin is not None:
            return _cropped(sample, pixels, self.margin)
        assert self.side is not None
        return _resized(sample, pixels, self.side)

    def __str__(self) -> str:
        return self.text


# -- private --------------------------------------------------------------------------------------------------------


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _cropped(sample: Sample, pixels: media.Pixels, margin: float) -> Sample | Skipped:
    if sample.face_box is None:
        return Skipped(sample.path, "no_face")
    height, width = pixels.shape[:2]
    left, top, right, bottom = faces.crop_box(sample.face_box, margin, (width, height))
    if min(right - left, bottom - top) < media.DEFAULT_LIMITS.min_side:
        return Skipped(sample.path, "too_small")
    moved = _moved(sample, (left, top), (1.0, 1.0))
    attributes = face_masks.cut(sample.attributes, (width, height), (left, top, right, bottom))
    cut = dataclasses.replace(moved, face_margin=margin, attributes=attributes)
    return _stored(sample, cut, pixels[top:bottom, left:right])


def _resized(sample: Sample, pixels: media.Pixels, side: int) -> Sample | Skipped:
    height, width, channels = pixels.shape
    scale = side / max(width, height)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    if min(wide, high) < media.DEFAULT_LIMITS.min_side:
        return Skipped(sample.path, "too_small")
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = np.asarray(cv2.resize(np.ascontiguousarray(pixels), (wide, high), interpolation=method), np.uint8)
    moved = _moved(sample, (0, 0), (wide / width, high / height))
    return _stored(sample, moved, small.reshape(high, wide, channels))


def _moved(sample: Sample, origin: tuple[float, float], scale: tuple[float, float]) -> Sample:
    """Box and landmarks in the pixels of a picture that begins at `origin` and is `scale` times as large."""
    (left, top), (across, down) = origin, scale
    box, points = sample.face_box, sample.landmarks
    if box is not None:
        x, y, w, h = box
        box = ((x - left) * across, (y - top) * down, w * across, h * down)
    if points is not None:
        pairs = zip(points[::2], points[1::2], strict=True)
        points = [value for x, y in pairs for value in ((x - left) * across, (y - top) * down)]
    return dataclasses.replace(sample, face_box=box, landmarks=points)


def _stored(original: Sample, moved: Sample, pixels: media.Pixels) -> Sample:
    """The moved sample with these pixels, kept as raw pixels, as a JPEG or as a PNG, whatever the original was nearest to."""
    renewed = _renewed(moved, pixels)
    if original.image is None:
        attributes = {**renewed.attributes, "original": original.id}
        return dataclasses.replace(renewed, id="", pixels=np.ascontiguousarray(pixels), attributes=attributes)
    encode = f"jpeg:{QUALITY}" if media.sniff(original.image) == "jpeg" else "png"
    return prepare.encoded(renewed, pixels, encode)


def _renewed(sample: Sample, pixels: media.Pixels) -> Sample:
    """Measured and hashed anew; the score is that of a face which was found in the original."""
    kept = quality.without(sample.attributes)
    kept.pop("phash", None)
    if "face_score" in sample.attributes and sample.face_box is not None:
        kept["face_score"] = sample.attributes["face_score"]
    hashed = sample.image is not None  # raw pixels are not, at ingest either
    return prepare.described(dataclasses.replace(sample, attributes=kept), pixels, fingerprint=hashed)
