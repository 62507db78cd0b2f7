"""How good a picture is, in numbers that rows are chosen by: `attributes.sharpness` and the others. Measured at ingest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from counterfake.faces import Box

NAMES = {
    "sharpness": "variance of the Laplacian of the luma, at the picture's own size; blurred pictures have little",
    "short_side": "shorter side in pixels",
    "face_side": "longer side of the face box in pixels; not there without a face",
    "face_score": "the detector's own score of the face; comparable within one method only",
}


def measured(
    pixels: NDArray[np.uint8], face_box: Box | None = None, face_score: float | None = None
) -> dict[str, Any]:
    """pixels (H, W, 1 or 3) uint8 -> the NAMES that apply."""
    found: dict[str, Any] = {"sharpness": sharpness(pixels), "short_side": min(pixels.shape[:2])}
    if face_box is not None:
        found["face_side"] = round(float(max(face_box[2:])), 1)
    if face_score is not None:
        found["face_score"] = round(float(face_score), 3)
    return found


def sharpness(pixels: NDArray[np.uint8]) -> float:
    """Variance of the 4-neighbour Laplacian of the luma (Pech-Pacheco et al. 2000, https://doi.org/10.1109/ICPR.2000.903548),
    to two decimals; 0 for one colour, about 20 s**2 for independent noise of standard deviation s."""
    single = pixels.shape[2] == 1
    luma = pixels[:, :, 0] if single else cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(np.ascontiguousarray(luma), cv2.CV_16S))
    return round(float(deviation[0, 0]) ** 2, 2)


def without(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes less what is measured here: for a picture that is no longer the same."""
    return {name: value for name, value in attributes.items() if name not in NAMES}
