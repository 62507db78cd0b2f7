"""Pixels to network input and back: preprocessing, tensors, grids, seeded degradations. Knows no files and no faces' detector.

`Preprocess` is stored with every model and hashed, and training and serving call the same `apply`. Arrays are
(H, W, C) uint8 RGB; tensors are (N, C, H, W).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterfake import config, faces
from counterfake.errors import ConfigError, DataError
from counterfake.faces import MARGIN, Box, Face, Point

Pixels = NDArray[np.uint8]
Finder = Literal[
    "cascade", "cascade-default"
]  # face finders that need no model file: every process can search by them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From a decoded picture to the square a network reads."""

    size: int = 96  # side of the square, pixels
    channels: int = 3  # 3 = RGB, 1 = luma
    # none: the whole picture, its aspect ratio given up; face: a square around the face; aligned: the same with the eyes
    # level and at fixed places, where they are known
    crop: Literal["none", "center", "face", "aligned"] = "none"
    margin: float = MARGIN  # side of the face crop / longer side of the face box
    finder: Finder = "cascade"  # looks for the face where a picture comes without a box
    boxes: str = (
        ""  # what found the boxes of the training rows, like cascade or synthetic; recorded after training
    )
    box_margin: float = (
        0.0  # with which the training rows were cut around them, 1 = not cut; recorded after training
    )

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3) or self.margin <= 0:
            raise ConfigError(
                f"preprocess needs size >= 1, channels 1 or 3, margin > 0; got {self.size}, {self.channels}, {self.margin}"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of the settings: a bundle refuses pixels made with others."""
        return config.digest(self)

    @property
    def needs_face(self) -> bool:
        """Whether `apply` asks for a face box."""
        return self.crop in ("face", "aligned")

    def apply(
        self, pixels: Pixels, face_box: Box | None = None, landmarks: Sequence[Point] | None = None
    ) -> Pixels:
        """pixels (H, W, C) uint8 -> (size, size, channels) uint8. landmarks: the eyes first, used by crop="aligned".

        Raises DataError if the crop needs a face and there is no box."""
        return resize(
            _channels(self._cropped(pixels, face_box, landmarks), self.channels), self.size, self.size
        )

    def place(
        self, landmarks: Sequence[Point], image_size: tuple[int, int], face_box: Box | None = None
    ) -> list[Point]:
        """Where `apply` moves points of a picture of image_size (width, height): pixels of the square."""
        if self.crop == "aligned" and face_box is not None:
            move = faces.alignment(Face(face_box, 1.0, list(landmarks)), self.size, self.margin)
            if move is not None:
                return [(float(x), float(y)) for x, y in np.array(landmarks) @ move[:, :2].T + move[:, 2]]
        width, height = image_size
        left, top, right, bottom = 0, 0, width, height
        if self.crop == "center":
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            right, bottom = left + side, top + side
        elif self.needs_face and face_box is not None:
            left, top, right, bottom = faces.crop_box(face_box, self.margin, image_size)
        across, down = self.size / (right - left), self.size / (bottom - top)
        return [((x - left) * across, (y - top) * down) for x, y in landmarks]

    def _cropped(self, pixels: Pixels, face_box: Box | None, landmarks: Sequence[Point] | None) -> Pixels:
        if self.crop == "none":
            return pixels
        if self.crop == "center":
            side = min(pixels.shape[:2])
            top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
            return pixels[top : top + side, left : left + side]
        if face_box is None:
            raise DataError(
                f"preprocess.crop is {self.crop} but this sample has no face_box; ingest with faces or set crop=center"
            )
        if self.crop == "aligned" and landmarks:
            return faces.align(pixels, Face(face_box, 1.0, list(landmarks)), self.size, self.margin)
        return faces.crop(pixels, face_box, self.margin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Degradation:
    """What pictures go through before they are shared. Each step happens with `probability`, at a uniform strength.

    The strengths reach from nothing to the worst still cell of the robustness grid; off unless a probability is given."""

    probability: float = 0.0  # of each step below, independently
    jpeg: tuple[int, int] | None = (30, 100)  # quality
    blur: tuple[float, float] | None = (0.1, 3.0)  # sigma of the Gaussian, pixels
    resize: tuple[float, float] | None = (0.25, 1.0)  # shrink by this factor, then back to the old size
    noise: tuple[float, float] | None = (0.0, 20.0)  # standard deviation, of 255
    share: float = 0.0  # share of pictures that go through `share_chain` last of all

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 0 <= self.share <= 1):
            raise ConfigError(
                f"degradation.probability and share must lie in [0, 1], got {self.probability:g} and {self.share:g}"
            )
        limits = {"jpeg": (1, 100), "blur": (0, 50), "resize": (0.01, 1), "noise": (0, 255)}
        for name, (least, most) in limits.items():
            bounds = getattr(self, name)
            if bounds is not None and not least <= bounds[0] <= bounds[1] <= most:
                raise ConfigError(
                    f"degradation.{name} must be [low, high] in [{least:g}, {most:g}], got {list(bounds)}"
                )

    @property
    def active(self) -> bool:
        """Whether any picture is changed."""
        return self.probability > 0 or self.share > 0


def degrade(pixels: Pixels, degradation: Degradation, rng: np.random.Generator) -> Pixels:
    """A worse copy of pixels (H, W, C) uint8: resize, blur, noise, then JPEG. The same rng state gives the same bytes.

    Of the same size, except where the share chain made it smaller."""
    out = pixels
    chosen = rng.random(4) < degradation.probability
    strength = rng.random(4)
    if degradation.resize and chosen[0]:
        out = rescale(out, _between(degradation.resize, strength[0]))
    if degradation.blur and chosen[1]:
        out = blur(out, _between(degradation.blur, strength[1]))
    if degradation.noise and chosen[2]:
        out = noise(out, _between(degradation.noise, strength[2]), rng)
    if degradation.jpeg and chosen[3]:
        out = recompress(out, round(_between(degradation.jpeg, strength[3])))
    if degradation.share and rng.random() < degradation.share:
        out = share_chain(out)
    return out


def generator(*parts: object) -> np.random.Generator:
    """Random numbers that these parts decide alone, like (seed, epoch, id of a row): the same in any process and order."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def rescale(pixels: Pixels, factor: float) -> Pixels:
    """Shrunk by `factor` (each side to 8 pixels at least), then back to the old size (H, W, C)."""
    height, width = pixels.shape[:2]
    small = resize(pixels, max(8, round(width * factor)), max(8, round(height * factor)))
    return resize(small, width, height)


def share_chain(pixels: Pixels) -> Pixels:
    """What two platforms in a row do: longer side to 1280 at most, JPEG 75, longer side to 720 at most, JPEG 60.

    A picture of at most 720 pixels keeps its size; nothing is enlarged."""
    for side, quality in ((1280, 75), (720, 60)):
        pixels = recompress(_at_most(pixels, side), quality)
    return pixels


def resize(pixels: Pixels, width: int, height: int) -> Pixels:
    """(H, W, C) -> (height, width, C): area average when shrinking (antialiased), linear when growing."""
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    out = np.asarray(
        cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=method), np.uint8
    )
    return out.reshape(height, width, pixels.shape[2])  # cv2 drops a channel axis of one


def recompress(pixels: Pixels, quality: int) -> Pixels:
    """One JPEG round trip, 4:2:0, at this quality."""
    space = "GRAY" if pixels.shape[2] == 1 else "RGB"
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace=space, colorsubsampling="420"
    )
    return np.asarray(simplejpeg.decode_jpeg(data, colorspace=space), np.uint8)


def blur(pixels: Pixels, sigma: float) -> Pixels:
    """Gaussian blur; sigma in pixels, 0 = unchanged."""
    if sigma <= 0:
        return pixels
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma), np.uint8).reshape(pixels.shape)


def noise(pixels: Pixels, std: float, rng: np.random.Generator) -> Pixels:
    """Independent Gaussian noise of standard deviation `std` (of 255) on every value."""
    noisy = pixels + rng.standard_normal(pixels.shape, np.float32) * std
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32 in [-1, 1]: 0 -> -1, 255 -> 1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """float (N, C, H, W) in [-1, 1] -> uint8, rounded and clipped; the inverse of `to_float`."""
    return ((images.detach().float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def overlay(pixels: Pixels, heat: NDArray[np.float32]) -> Pixels:
    """The picture (H, W, C) in grey, with orange where the heat (h, w) in [0, 1] is: (H, W, 3)."""
    height, width = pixels.shape[:2]
    share = resize((255 * heat).astype(np.uint8)[:, :, None], width, height) / 255.0
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    return np.asarray(grey * (1 - 0.65 * share) + 0.65 * share * np.array([240, 110, 40]), np.uint8)


def grid(images: Pixels | Tensor | Sequence[Pixels], columns: int = 8, gap: int = 2) -> Pixels:
    """Tile (N, H, W, C) uint8, or a tensor (N, C, H, W) uint8 or float in [-1, 1], into one (H', W', 3) picture."""
    tiles = _tiles(images)
    n, height, width, _ = tiles.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


# -- private --------------------------------------------------------------------------------------------------------


def _tiles(images: Pixels | Tensor | Sequence[Pixels]) -> Pixels:
    if not len(images):
        raise DataError("a grid needs at least one picture")
    if isinstance(images, Tensor):
        images = to_uint8(images) if images.is_floating_point() else images
        array = images.detach().cpu().permute(0, 2, 3, 1).numpy()
    else:
        array = np.stack([image if image.ndim == 3 else image[:, :, None] for image in images])
    if array.ndim != 4 or array.shape[3] not in (1, 3):
        raise DataError(f"a grid needs pictures with 1 or 3 channels, got shape {array.shape}")
    return np.broadcast_to(array, (*array.shape[:3], 3))


def _channels(pixels: Pixels, channels: int) -> Pixels:
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY), np.uint8)[:, :, None]


def _at_most(pixels: Pixels, side: int) -> Pixels:
    """The longer side brought down to `side`."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    return (
        resize(pixels, max(1, round(width * scale)), max(1, round(height * scale))) if scale < 1 else pixels
    )


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(share)
