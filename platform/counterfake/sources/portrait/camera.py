"""The camera of a portrait: light on the head, hair strands, skin, lens and sensor turn the canvases into a picture."""

from __future__ import annotations

import functools

import cv2
import numpy as np

from counterfake.sources.portrait.canvas import Floats, Pixels, Sketch, tone
from counterfake.sources.portrait.people import Identity, Shot


def photograph(sketch: Sketch, who: Identity, shot: Shot) -> tuple[Pixels, Pixels]:
    """Canvases -> (picture, face mask): beard, blush, light, hair strands, skin, lens, sensor."""
    size = sketch.size
    colour = _shrink(sketch.colour, size)
    material = _shrink(sketch.material, size) * np.float32(1 / 255)
    hair, lit, face = material[:, :, 0:1], material[:, :, 1:2], material[:, :, 2:3]
    sigma = 0.038 * sketch.unit
    soft = cv2.GaussianBlur(sketch.soft, (0, 0), sigma).astype(np.float32)
    rng = np.random.default_rng([shot.grain, 5])
    rough = _tile("rough", size, rng)
    if who.beard != "none":
        cover = np.clip(soft[:, :, 2:3] / 255 * (0.9 + 0.45 * _tile("hair", size, rng)), 0, 1) * face
        colour += cover * (np.array(tone(who.hair, 0.85), np.float32) - colour)
    blush = soft[:, :, 1:2] * (face * np.float32(1 / 255))
    colour *= 1 + blush * np.array((0.06, -0.06, -0.05), np.float32)
    u, v = _head_grid(sketch, shot)
    normal_light, gloss = _lambert(u, v, shot)
    light = 1 + lit * (normal_light - 1)
    light *= 1 + lit * (soft[:, :, 0:1] - 128) * np.float32(0.9 / 128)
    light *= 1 + hair * (0.25 * _strands(u, v, who) + 0.07 * _tile("hair", size, rng) - 0.05)
    light *= 1 + face * (0.018 + 0.02 * who.age) * rough
    colour *= light * np.float32(shot.exposure)
    colour += gloss * (face * 26 + hair * 20) * np.float32(shot.light)
    colour *= 1 + np.float32(shot.warmth) * np.array((0.035, 0.0, -0.045), np.float32)
    colour = cv2.GaussianBlur(colour, (0, 0), max(0.2, shot.blur * size / 128))
    colour += _tile("sensor", size, rng) * np.float32(shot.noise)
    mask = np.clip(np.rint(material[:, :, 2] * 255), 0, 255).astype(np.uint8)
    return np.clip(np.rint(colour), 0, 255).astype(np.uint8), mask


def _shrink(canvas: Pixels, size: int) -> Floats:
    return np.asarray(cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA), np.float32)


def _head_grid(sketch: Sketch, shot: Shot) -> tuple[Floats, Floats]:
    """Upright head coordinates of every pixel, (size, size) each."""
    line = np.arange(sketch.size, dtype=np.float32) + 0.5
    x, y = (line - sketch.middle[0]) / sketch.unit, (line - sketch.middle[1]) / sketch.unit
    cos, sin = np.float32(np.cos(shot.roll)), np.float32(np.sin(shot.roll))
    return x[None, :] * cos + y[:, None] * sin, y[:, None] * cos - x[None, :] * sin


def _lambert(u: Floats, v: Floats, shot: Shot) -> tuple[Floats, Floats]:
    """Diffuse light on an ellipsoid (around 1) and its highlight, (size, size, 1) each."""
    nx, ny = (u + 0.15 * np.float32(shot.yaw)) * np.float32(0.98), v * np.float32(0.66)
    nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0.02))
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    direction = np.array((shot.light_x, shot.light_y, 0.9), np.float32)
    direction /= np.linalg.norm(direction)
    facing = (nx * direction[0] + ny * direction[1] + nz * direction[2]) / length
    diffuse = np.maximum(facing, 0)
    half = direction + np.array((0, 0, 1), np.float32)
    half /= np.linalg.norm(half)
    gloss = np.maximum((nx * half[0] + ny * half[1] + nz * half[2]) / length, 0)
    gloss = gloss * gloss
    gloss = gloss * gloss
    gloss = gloss * gloss  # to the power 8
    light = (1.03 - shot.light) + shot.light * 1.22 * diffuse
    return light[:, :, None], gloss[:, :, None]


def _strands(u: Floats, v: Floats, who: Identity) -> Floats:
    """Light and dark streaks that run from the parting, (size, size, 1)."""
    angle = np.arctan2(
        u - np.float32(who.part if who.style in ("parted", "swept", "long", "bob") else 0), v + 1.7
    )
    radius = np.abs(u) + np.abs(v)
    at = angle * np.float32(420) + radius * np.float32(24) + np.float32(4096)
    return _streaks(who.mark % 16)[at.astype(np.int32) & 1023][:, :, None]


@functools.cache
def _streaks(which: int) -> Floats:
    line = np.random.default_rng([which, 6]).standard_normal(1024)
    fine, coarse = (
        np.fft.irfft(np.fft.rfft(line) * np.exp(-((np.arange(513) * s / 512) ** 2))) for s in (12, 40)
    )
    return np.asarray(0.45 * fine / fine.std() + 0.45 * coarse / coarse.std(), np.float32)


@functools.cache
def _noise(kind: str) -> Floats:
    """A fixed field of noise to cut tiles from: made once per process, the same everywhere."""
    rng = np.random.default_rng([len(kind), 7])
    side = 1024
    if kind == "sensor":
        grey, chroma = rng.standard_normal((side, side, 1)), rng.standard_normal((side, side, 3))
        field = 0.8 * grey + 0.6 * chroma
    elif kind == "hair":  # short vertical strokes
        field = cv2.GaussianBlur(rng.standard_normal((side, side)), (0, 0), 0.5, sigmaY=1.6)[:, :, None]
    else:  # skin: pores over patches
        white = rng.standard_normal((side, side))
        field = (cv2.GaussianBlur(white, (0, 0), 0.8) / 0.35 + cv2.GaussianBlur(white, (0, 0), 4) / 0.07)[
            :, :, None
        ] / 1.6
    return np.ascontiguousarray(field / field.std(), np.float32)


def _tile(kind: str, size: int, rng: np.random.Generator) -> Floats:
    field = _noise(kind)
    if size > field.shape[0]:
        repeat = -(-size // field.shape[0])
        field = np.tile(field, (repeat, repeat, 1))
    top, left = (int(v) for v in rng.integers(0, field.shape[0] - size + 1, 2))
    return field[top : top + size, left : left + size]
