"""The drawing board of a portrait: smooth curves in head units, turned and projected like a head before a camera.

Three canvases are drawn in step: colour and material at twice the size, soft light at the size of the picture.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from counterfake.sources.portrait.people import Colour, Shot

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Points = Sequence[tuple[float, float]] | Floats

FINE = 2  # the canvas has this many pixels per pixel of the picture
SHIFT = 4  # bits of sub-pixel position that cv2 takes


class Sketch:
    """The three canvases and the projection of head units onto them."""

    def __init__(self, shot: Shot, size: int) -> None:
        self.size = size
        side = size * FINE
        self.colour: Pixels = _background(shot, side)
        self.material: Pixels = np.zeros((side, side, 3), np.uint8)
        self.soft: Pixels = np.full((size, size, 3), (128, 0, 0), np.uint8)  # light (128 = none), red, beard
        self.unit = shot.scale * size  # pixels per head unit
        turn = (_rotation(shot) * self.unit).astype(np.float32)
        self.across, self.along = np.ascontiguousarray(turn[:, :2].T), turn[:, 2]
        self.middle = np.array((0.5 + shot.shift_x, 0.5 + shot.shift_y), np.float32) * np.float32(size)

    def project(self, points: Points, z: float | None = None) -> Floats:
        """(N, 2) head units -> (N, 2) pixels of the picture; z None = on the curved face."""
        flat = np.asarray(points, np.float32)
        depth = _surface(flat)[:, None] if z is None else np.float32(z)
        turned = flat @ self.across + depth * self.along  # (N, 3)
        near = turned[:, 2:] * np.float32(0.09 / self.unit) + np.float32(1)  # perspective
        return turned[:, :2] * near + self.middle

    def fill(
        self,
        points: Points,
        colour: Colour,
        *,
        z: float | None = None,
        material: Colour | None = None,
        curve: bool = True,
    ) -> None:
        """A closed curve in one colour; `material` also says what it is made of."""
        where = _fixed(self.project(smooth(points) if curve else points, z), FINE)
        cv2.fillPoly(self.colour, [where], colour, cv2.LINE_AA, SHIFT)
        if material is not None:
            cv2.fillPoly(self.material, [where], material, cv2.LINE_AA, SHIFT)

    def line(self, points: Points, colour: Colour, width: float, *, z: float | None = None) -> None:
        """An open curve; width in head units."""
        where = _fixed(self.project(smooth_open(points), z), FINE)
        cv2.polylines(
            self.colour, [where], False, colour, self.pen(width) * FINE // 2 or 1, cv2.LINE_AA, SHIFT
        )

    def pen(self, width: float) -> int:
        return max(1, round(width * self.unit * 2))

    def shade(self, points: Points, values: Colour, *, z: float | None = None, curve: bool = True) -> None:
        """A closed curve on the soft canvas."""
        where = _fixed(self.project(smooth(points) if curve else points, z), 1)
        cv2.fillPoly(self.soft, [where], values, cv2.LINE_AA, SHIFT)

    def shade_line(self, points: Points, values: Colour, width: float) -> None:
        where = _fixed(self.project(smooth_open(points)), 1)
        cv2.polylines(self.soft, [where], False, values, max(1, round(width * self.unit)), cv2.LINE_AA, SHIFT)


def _rotation(shot: Shot) -> NDArray[np.float64]:
    (sy, cy), (sp, cp), (sr, cr) = ((np.sin(a), np.cos(a)) for a in (shot.yaw, shot.pitch, shot.roll))
    yaw = np.array(((cy, 0, sy), (0, 1, 0), (-sy, 0, cy)))
    pitch = np.array(((1, 0, 0), (0, cp, sp), (0, -sp, cp)))
    roll = np.array(((cr, -sr, 0), (sr, cr, 0), (0, 0, 1)))
    return roll @ pitch @ yaw


def _surface(points: Floats) -> Floats:
    """How far a point of the face stands out: half an ellipsoid."""
    inside = np.float32(1) - points * points @ _CURVE
    return np.float32(0.78) * np.sqrt(np.maximum(inside, np.float32(0))) - np.float32(0.28)


_CURVE = np.array((1.0, 1 / 1.45**2), np.float32)


def _fixed(points: Floats, factor: int) -> NDArray[np.int32]:
    scale = np.float32(factor << SHIFT)
    return np.rint(points * scale - np.float32(1 << SHIFT >> 1)).astype(np.int32)


def smooth(points: Points, per: int = 6) -> Floats:
    """A closed Catmull-Rom curve through the points."""
    control = np.asarray(points, np.float32)
    return _basis(len(control), per, True) @ control


def smooth_open(points: Points, per: int = 6) -> Floats:
    control = np.asarray(points, np.float32)
    return _basis(len(control), per, False) @ control


@functools.cache
def _basis(count: int, per: int, closed: bool) -> Floats:
    """The matrix that turns control points into points of the curve."""
    spans = count if closed else count - 1
    rows = np.zeros((spans * per + (not closed), count), np.float32)
    for row in range(len(rows)):
        span, step = divmod(row, per)
        t = step / per
        weights = (
            (-t + 2 * t**2 - t**3) / 2, (2 - 5 * t**2 + 3 * t**3) / 2, (t + 4 * t**2 - 3 * t**3) / 2, (t**3 - t**2) / 2
        )  # fmt: skip
        for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
            at = (span + offset) % count if closed else min(max(span + offset, 0), count - 1)
            rows[row, at] += weight
    return rows


def both(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The right half of a symmetric closed curve, top to bottom -> all of it."""
    mirrored = [(-x, y) for x, y in reversed(points) if abs(x) > 1e-6]
    return [*points, *mirrored]


def ellipse(x: float, y: float, width: float, height: float, tilt: float = 0.0) -> Floats:
    turn = np.array(((np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))), np.float32)
    return np.asarray((_circle() * (width, height)) @ turn + (x, y), np.float32)


@functools.cache
def _circle() -> Floats:
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack((np.cos(angle), np.sin(angle)), 1).astype(np.float32)


def tone(colour: Colour, factor: float, towards: Colour | None = None, share: float = 0.0) -> Colour:
    values = [c * factor for c in colour]
    if towards is not None:
        values = [v * (1 - share) + t * share for v, t in zip(values, towards, strict=True)]
    red, green, blue = (int(min(max(v, 0), 255)) for v in values)
    return red, green, blue


# -- what lies behind the head --------------------------------------------------------------------------------------


def _background(shot: Shot, side: int) -> Pixels:
    """Painted on 24 x 24 and enlarged: out of focus as in a portrait."""
    rng = np.random.default_rng([shot.grain, 4])
    first, second = np.array(shot.colours[0], np.float32), np.array(shot.colours[1], np.float32)
    along = rng.uniform(-1, 1, 2) if shot.background == "studio" else (0.0, 1.0)
    ramp = np.linspace(-0.5, 0.5, 24, dtype=np.float32)
    share = np.clip(ramp[None, :] * along[0] + ramp[:, None] * along[1] + 0.5, 0, 1)[:, :, None]
    wall = first * (1 - share) + second * share
    if shot.background == "studio":
        wall *= 1.12 - 0.5 * (ramp[None, :, None] ** 2 + ramp[:, None, None] ** 2)
    small: Pixels = np.ascontiguousarray(np.clip(wall, 0, 255).astype(np.uint8))
    for _ in range({"studio": 0, "bokeh": 16, "room": 4, "outdoor": 14}[shot.background]):
        _background_thing(small, shot.background, second, rng)
    if shot.background in ("bokeh", "outdoor"):
        small = np.asarray(cv2.GaussianBlur(small, (0, 0), 1.0), np.uint8)
    return np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC), np.uint8)


def _background_thing(small: Pixels, kind: str, base: Floats, rng: np.random.Generator) -> None:
    x, y = (int(v) for v in rng.integers(0, 24, 2))
    colour = [float(v) for v in np.clip(base * rng.uniform(0.6, 1.45) + rng.normal(0, 8, 3), 0, 255)]
    if kind == "room":  # frames, shelves, a door
        wide, high = (int(v) for v in rng.integers(4, 11, 2))
        cv2.rectangle(small, (x, y), (x + wide, y + high), colour, -1)
    elif kind == "outdoor":  # trees below the sky
        cv2.circle(small, (x, 10 + y // 2), int(rng.integers(2, 5)), colour, -1)
    else:
        cv2.circle(small, (x, y), int(rng.integers(1, 4)), colour, -1)
