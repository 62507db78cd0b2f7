"""Put a painted face back into its picture: colour matched, through a soft mask. Plain arrays, no network.

The colour match is Reinhard et al. 2001, https://doi.org/10.1109/38.946629: mean and standard deviation of each channel,
here in CIELAB. The mask is an ellipse that fades to nothing inside the painted square, so no edge of it can show.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from counterfake.faces import Box, crop_box

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


def paste(
    picture: Pixels, painted: Pixels, face_box: Box, *, margin: float, coverage: float, side: int
) -> Pixels:
    """picture (H, W, 3) with painted (s, s, 3) over its face -> a new picture (H, W, 3).

    margin: of the face crop; coverage: share of the crop that was painted; side: pixels of the crop the net was given.
    """
    height, width = picture.shape[:2]
    place = placement(face_box, (width, height), len(painted), margin=margin, coverage=coverage, side=side)
    face = cv2.warpAffine(
        painted, place, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    mask = cv2.warpAffine(soft_mask(len(painted)), place, (width, height), flags=cv2.INTER_LINEAR)[:, :, None]
    matched = match_colour(np.asarray(face, np.uint8), picture, mask)
    return np.rint(mask * matched + (1 - mask) * picture).astype(np.uint8)


def placement(
    face_box: Box, image_size: tuple[int, int], painted: int, *, margin: float, coverage: float, side: int
) -> NDArray[np.float64]:
    """Affine matrix (2, 3) from pixels of the painted square to pixels of the picture; inverse of crop and centre."""
    left, top, right, _ = crop_box(face_box, margin, image_size)
    crop = right - left
    scale = coverage * crop / painted
    start = ((1 - coverage) / 2 * side + 0.5) * crop / side - 0.5
    return np.array([[scale, 0, left + start], [0, scale, top + start]])


def soft_mask(side: int) -> Floats:
    """(side, side) in [0, 1]: 1 over the face, 0 at the border."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    middle = (side - 1) / 2
    radius = np.hypot((x - middle) / (0.42 * side), (y - middle) / (0.48 * side))  # 1 on the ellipse
    fade = np.clip((1 - radius) / 0.22, 0, 1)
    return (fade * fade * (3 - 2 * fade)).astype(np.float32)


def match_colour(painted: Pixels, picture: Pixels, mask: Floats) -> Floats:
    """`painted` (H, W, 3) with the colours that `picture` has under the mask (H, W, 1); float32 in [0, 255]."""
    weight = mask / max(float(mask.sum()), 1e-6)
    given, wanted = (cv2.cvtColor(p.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for p in (painted, picture))
    (mean, std), (new_mean, new_std) = (_moments(lab, weight) for lab in (given, wanted))
    gain = np.clip(new_std / np.maximum(std, 1e-3), 0.7, 1.4)  # a flat face must not turn into noise
    lab = ((given - mean) * gain + new_mean).astype(np.float32)
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).clip(0, 1) * 255, np.float32)


def _moments(lab: Floats, weight: Floats) -> tuple[Floats, Floats]:
    mean = (lab * weight).sum(axis=(0, 1))
    return mean, np.sqrt((np.square(lab - mean) * weight).sum(axis=(0, 1)))
