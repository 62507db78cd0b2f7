"""Find faces, choose one, and say which square of the picture to look at. Keeps networks and file formats away.

Every box is (x, y, width, height) in pixels of the upright picture, floats, top left origin. The margin and the method
that found a box are stored with it, because a detector trained on one crop is not the same detector on another.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from counterfake.errors import ConfigError

logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]
Method = Literal["cascade", "cascade-default"]
CASCADES = {
    "cascade": "haarcascade_frontalface_alt2.xml",
    "cascade-default": "haarcascade_frontalface_default.xml",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Face:
    """One face found in a picture."""

    box: Box  # x, y, width, height in pixels
    score: float  # larger = surer; only comparable within one method
    landmarks: list[tuple[float, float]] | None = None  # eyes, nose, mouth corners: left to right as seen


class FaceDetector:
    """Finds faces with the cascade that ships inside OpenCV's wheel. Not thread-safe: one per thread."""

    def __init__(self, method: Method = "cascade", *, max_side: int = 640, min_face: float = 0.15) -> None:
        """max_side: larger pictures are searched at this size (speed). min_face: smallest face / shorter side."""
        if method not in CASCADES:
            raise ConfigError(f"face detector {method!r} is unknown; known: {', '.join(CASCADES)}")
        self.method: Method = method
        self.max_side = max_side
        self.min_face = min_face
        self._cascade = cv2.CascadeClassifier(_cascade_file(CASCADES[method]))

    def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """pixels (H, W, 3) or (H, W, 1) uint8 RGB -> faces, the largest first; [] when there is none."""
        luma = _luma(pixels)
        scale = min(1.0, self.max_side / max(luma.shape))
        if round(scale * min(luma.shape)) < 20:  # a strip; OpenCV cannot shrink one to no pixels at all
            return []
        if scale < 1:
            luma = np.asarray(
                cv2.resize(luma, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8
            )
        side = max(20, int(self.min_face * min(luma.shape)))
        if min(luma.shape) < side:
            return []
        boxes, _, weights = self._cascade.detectMultiScale3(
            cv2.equalizeHist(luma),
            scaleFactor=1.1,
            minNeighbors=3,
            minSize=(side, side),
            outputRejectLevels=True,
        )
        faces = [
            Face(tuple(float(v) / scale for v in box), float(weight))
            for box, weight in zip(boxes, np.ravel(weights), strict=True)
        ]
        return sorted(faces, key=lambda face: face.box[2] * face.box[3], reverse=True)

    def largest(self, pixels: NDArray[np.uint8]) -> Face | None:
        """The largest face, which is the one a portrait is about; None when there is none."""
        faces = self.detect(pixels)
        return faces[0] if faces else None


def crop_box(box: Box, margin: float, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Square (left, top, right, bottom) around a face, `margin` times its longer side, moved to lie in the picture.

    image_size is (width, height). A square that does not fit is shrunk to the picture's shorter side, so that no
    padding is ever invented.
    """
    width, height = image_size
    x, y, w, h = box
    side = max(1, min(round(max(w, h) * margin), width, height))
    left = min(max(round(x + w / 2 - side / 2), 0), width - side)
    top = min(max(round(y + h / 2 - side / 2), 0), height - side)
    return left, top, left + side, top + side


# -- private --------------------------------------------------------------------------------------------------------


def _luma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 1:
        return np.ascontiguousarray(pixels[:, :, 0])
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)


@functools.cache
def _cascade_file(name: str) -> str:
    path = Path(cv2.__file__).parent / "data" / name
    if not path.is_file():
        raise ConfigError(f"OpenCV {cv2.__version__} has no {name}; install opencv-python-headless>=4.13,<5")
    return str(path)
