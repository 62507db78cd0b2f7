"""Put a painted face into a picture: match its colours, shape its mask, blend the two. Plain arrays, no network, no files.

Colours: Reinhard et al. 2001, https://doi.org/10.1109/38.946629, mean and deviation of each channel, here in CIELAB; or
histogram specification, channel by channel. Blending: alpha, or Pérez et al. 2003, https://doi.org/10.1145/882262.882269,
eq. 3 and 4, here with a soft mask between the two gradient fields and the border of the region as the boundary. The
usual mask is an ellipse that fades to nothing inside the painted square, so that no edge of the square can show.
Places are affine matrices (2, 3) between pixels as OpenCV counts them: (0, 0) is the middle of the first one.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.fft import dstn, idstn

from counterfake.errors import ConfigError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Place = NDArray[np.float64]

GAIN = (0.7, 1.4)  # limits of Reinhard's factor on the deviation: a flat face must not turn into noise
RIM = 0.06  # share of the side over which every mask falls to 0 at the border of the painted square
ROOM = 2  # pixels around the painted square in the region that is blended


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blending:
    """How a painted face gets into its picture."""

    colour: Literal["reinhard", "histogram", "none"] = (
        "reinhard"  # whose colours it takes: the old face's, or its own
    )
    erode: float = 0.0  # taken off the mask all around, share of the painted square's side
    blur: float = 0.0  # sigma of the Gaussian that softens the mask, share of that side
    blend: Literal["alpha", "poisson"] = (
        "alpha"  # poisson: the painted gradients, the picture's brightness around them
    )

    def __post_init__(self) -> None:
        if not (0 <= self.erode < 0.5 and 0 <= self.blur < 0.5):
            raise ConfigError(
                f"erode and blur must lie in [0, 0.5) of the face, got {self.erode:g} and {self.blur:g}"
            )


def compose(picture: Pixels, painted: Pixels, place: Place, mask: Floats, blending: Blending) -> Pixels:
    """picture (H, W, 3) with painted (s, s, 3) at `place` through mask (s, s) in [0, 1] -> a new picture (H, W, 3).

    Only pixels under the mask change; a square that lies outside the picture altogether changes none."""
    region = _region(place, len(painted), picture.shape)
    if region is None:
        return picture.copy()
    part = picture[region]
    face, soft = _warped(painted, shaped(mask, blending), place, region)
    matched = match_colour(face, part, soft, blending.colour)
    mixed = (
        poisson(matched, part, soft) if blending.blend == "poisson" else soft * matched + (1 - soft) * part
    )
    out = picture.copy()
    out[region] = np.where(soft > 0, np.rint(np.clip(mixed, 0, 255)), part).astype(np.uint8)
    return out


def soft_mask(side: int) -> Floats:
    """(side, side) in [0, 1]: 1 over the face, 0 at the border."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    middle = (side - 1) / 2
    radius = np.hypot((x - middle) / (0.42 * side), (y - middle) / (0.48 * side))  # 1 on the ellipse
    return _smooth((1 - radius) / 0.22)


def shaped(mask: Floats, blending: Blending) -> Floats:
    """The mask (s, s) eroded and softened; always 0 on the border of the square."""
    side = len(mask)
    radius = round(blending.erode * side)
    if radius:
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        mask = np.asarray(cv2.erode(mask, disc), np.float32)
    if blending.blur:
        mask = np.asarray(cv2.GaussianBlur(mask, (0, 0), blending.blur * side), np.float32)
    return np.minimum(mask, _rim(side))


def match_colour(
    painted: Pixels,
    picture: Pixels,
    mask: Floats,
    method: Literal["reinhard", "histogram", "none"] = "reinhard",
) -> Floats:
    """`painted` (H, W, 3) with the colours that `picture` has under the mask (H, W, 1); float32 in [0, 255]."""
    if method == "none" or not mask.any():
        return painted.astype(np.float32)
    return _reinhard(painted, picture, mask) if method == "reinhard" else _histogram(painted, picture, mask)


def poisson(face: Floats, picture: Pixels, mask: Floats) -> Floats:
    """The picture (H, W, 3) whose gradients under the mask (H, W, 1) are those of `face` and elsewhere its own.

    Solves Δu = div(m ∇face + (1 - m) ∇picture) with u = picture on the border, exactly, by sine transforms: the discrete
    Laplacian is diagonal in them. What it adds to the picture is u - picture, which vanishes on the border."""
    new, old = face.astype(np.float64), picture.astype(np.float64)
    weight = mask.astype(np.float64)
    divergence = np.zeros_like(old)
    for axis in (0, 1):
        share = (
            weight.take(range(1, old.shape[axis]), axis) + weight.take(range(old.shape[axis] - 1), axis)
        ) / 2
        step = share * np.diff(new - old, axis=axis)  # gradient to be added, between neighbours
        divergence += np.diff(np.pad(step, [(1, 1) if a == axis else (0, 0) for a in range(3)]), axis=axis)
    inner = divergence[1:-1, 1:-1]
    waves = [2 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1)) - 2 for n in inner.shape[:2]]
    spectrum = dstn(inner, type=1, axes=(0, 1)) / (waves[0][:, None, None] + waves[1][None, :, None])
    added = np.zeros_like(old)
    added[1:-1, 1:-1] = idstn(spectrum, type=1, axes=(0, 1))
    return (old + added).astype(np.float32)


# -- private --------------------------------------------------------------------------------------------------------


def _reinhard(painted: Pixels, picture: Pixels, mask: Floats) -> Floats:
    weight = mask / max(float(mask.sum()), 1e-6)
    given, wanted = (cv2.cvtColor(p.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for p in (painted, picture))
    (mean, std), (new_mean, new_std) = (_moments(lab, weight) for lab in (given, wanted))
    gain = np.clip(new_std / np.maximum(std, 1e-3), *GAIN)
    lab = ((given - mean) * gain + new_mean).astype(np.float32)
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).clip(0, 1) * 255, np.float32)


def _moments(lab: Floats, weight: Floats) -> tuple[Floats, Floats]:
    mean = (lab * weight).sum(axis=(0, 1))
    return mean, np.sqrt((np.square(lab - mean) * weight).sum(axis=(0, 1)))


def _histogram(painted: Pixels, picture: Pixels, mask: Floats) -> Floats:
    """Each value goes to the one that the picture has at the same rank; ranks count pixels by the mask."""
    channels = []
    for channel in range(3):
        given, wanted = (_ranks(p[:, :, channel], mask[:, :, 0]) for p in (painted, picture))
        table = np.interp(given, wanted, np.arange(256))
        channels.append(table[painted[:, :, channel]])
    return np.stack(channels, axis=-1).astype(np.float32)


def _ranks(values: Pixels, mask: Floats) -> NDArray[np.float64]:
    """(256,) share of the mask whose value is below each one, half of the equal ones included."""
    counts = np.bincount(values.ravel(), weights=mask.ravel().astype(np.float64), minlength=256)
    share = counts / counts.sum()
    return np.cumsum(share) - share / 2


def _rim(side: int) -> Floats:
    line = np.minimum(np.arange(side), np.arange(side)[::-1]) / max(1.0, RIM * side)
    edge = _smooth(line.astype(np.float32))
    return np.minimum(edge[:, None], edge[None, :])


def _smooth(share: Floats) -> Floats:
    """0 to 1 without corners, for shares from 0 to 1."""
    fade = np.clip(share, 0, 1)
    return (fade * fade * (3 - 2 * fade)).astype(np.float32)


def _region(place: Place, side: int, shape: tuple[int, ...]) -> tuple[slice, slice] | None:
    """Rows and columns of the picture that the square touches; None for none."""
    corners = (
        np.array([[0, 0, 1], [side - 1, 0, 1], [0, side - 1, 1], [side - 1, side - 1, 1]]) @ place.T
    )  # (4, 2)
    low, high = np.floor(corners.min(axis=0)) - ROOM, np.ceil(corners.max(axis=0)) + ROOM + 1
    left, top = np.maximum(low, 0).astype(int)
    right, bottom = np.minimum(high, (shape[1], shape[0])).astype(int)
    return (slice(top, bottom), slice(left, right)) if right - left > 2 and bottom - top > 2 else None


def _warped(
    painted: Pixels, mask: Floats, place: Place, region: tuple[slice, slice]
) -> tuple[Pixels, Floats]:
    """The painted square and its mask in pixels of the region: (h, w, 3) uint8 and (h, w, 1)."""
    painted, mask, place = _folded(painted, mask, place)
    rows, columns = region
    here = place - [[0, 0, columns.start], [0, 0, rows.start]]
    size = (columns.stop - columns.start, rows.stop - rows.start)
    face = cv2.warpAffine(painted, here, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    soft = cv2.warpAffine(mask, here, size, flags=cv2.INTER_LINEAR)
    return np.asarray(face, np.uint8), np.asarray(soft, np.float32)[:, :, None]


def _folded(painted: Pixels, mask: Floats, place: Place) -> tuple[Pixels, Floats, Place]:
    """Averaged first if it is to be halved or more: warpAffine only looks at a few pixels."""
    fold = int(1 / np.hypot(place[0, 0], place[1, 0]))
    small = len(painted) // max(1, fold)
    if fold < 2 or small < 2:
        return painted, mask, place
    ratio = len(painted) / small
    smaller = (cv2.resize(p, (small, small), interpolation=cv2.INTER_AREA) for p in (painted, mask))
    move = np.array([[ratio, 0, (ratio - 1) / 2], [0, ratio, (ratio - 1) / 2], [0, 0, 1]])
    face, soft = smaller
    return np.asarray(face, np.uint8), np.asarray(soft, np.float32), place @ move
