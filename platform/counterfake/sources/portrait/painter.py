"""Paints one procedural portrait: every part of a head as a few smooth curves, back to front.

Lengths are head units (people.py); canvas.py projects them, camera.py lights and photographs the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from counterfake.sources.portrait.camera import photograph
from counterfake.sources.portrait.canvas import (
    Floats,
    Pixels,
    Sketch,
    both,
    ellipse,
    smooth,
    smooth_open,
    tone,
)
from counterfake.sources.portrait.people import Colour, Identity, Shot

BEHIND, SKULL, COAT, FACE = (
    (255, 255, 0),
    (0, 255, 0),
    (0, 160, 0),
    (0, 255, 255),
)  # material: hair, lit, face


@dataclasses.dataclass(frozen=True, slots=True)
class Portrait:
    """A rendered picture and its exact ground truth."""

    pixels: Pixels  # (size, size, 3) RGB
    face_mask: Pixels  # (size, size), 255 = face, without hair
    face_box: tuple[float, float, float, float]  # x, y, width, height: hairline to chin
    landmarks: list[tuple[float, float]]  # left eye, right eye, nose tip, mouth corners; left as seen


def render(identity: Identity, shot: Shot, size: int = 128) -> Portrait:
    """The person of `identity` as photographed in `shot`. The same bytes for the same arguments."""
    sketch = Sketch(shot, size)
    rng = np.random.default_rng([identity.mark, 3])
    outline = _outline(identity, shot)
    _behind(sketch, identity, shot)
    _head(sketch, identity, outline)
    _eyes(sketch, identity, shot)
    _nose(sketch, identity, shot)
    _mouth(sketch, identity, shot)
    _beard(sketch, identity, shot)
    _marks(sketch, identity, rng)
    _hair_front(sketch, identity, outline)
    if identity.glasses != "none":
        _glasses(sketch, identity)
    pixels, mask = photograph(sketch, identity, shot)
    return Portrait(pixels, mask, _face_box(sketch, outline), _landmarks(sketch, identity, shot))


# -- parts, back to front -------------------------------------------------------------------------------------------


def _behind(sketch: Sketch, who: Identity, shot: Shot) -> None:
    """Hair behind the head, neck, shirt."""
    back = _HAIR_BACK.get(who.style)
    if back:
        w = who.width
        sketch.fill([(x * w, y) for x, y in both(back)], tone(who.hair, 0.72), z=-0.35, material=BEHIND)
    if who.style == "bun":
        sketch.fill(ellipse(0, -1.38, 0.34, 0.3), tone(who.hair, 0.85), z=-0.4, material=BEHIND, curve=False)
    neck = both([(0, 0.4), (0.36 * who.jaw, 0.5), (0.36 * who.jaw, 1.12), (0.56, 1.36), (0.6, 1.9), (0, 1.9)])
    sketch.fill(neck, tone(who.skin, 0.93), z=-0.2, material=SKULL)
    sketch.shade(both([(0, 0.5), (0.5, 0.6), (0.52, 1.05), (0.25, 1.22), (0, 1.26)]), (72, 0, 0), z=-0.2)
    _shirt(sketch, shot)


def _shirt(sketch: Sketch, shot: Shot) -> None:
    dip = {"crew": 1.32, "vee": 1.62, "shirt": 1.5}[shot.collar]
    edge = [(-1.5, 2.6), (-1.42, 1.75), (-1.05, 1.46), (-0.5, 1.22), (-0.28, dip * 0.45 + 0.72), (0, dip)]
    shape = [*edge, *[(-x, y) for x, y in reversed(edge[:-1])]]
    sketch.fill(shape, shot.shirt, z=-0.22, material=COAT)
    dark, pale = tone(shot.shirt, 0.72), tone(shot.shirt, 1.0, (255, 255, 255), 0.35)
    if shot.collar == "shirt":
        for side in (-1, 1):
            flap = [(side * 0.46, 1.16), (side * 0.1, 1.62), (side * 0.36, 1.78), (side * 0.66, 1.3)]
            sketch.fill(flap, pale, z=-0.18, curve=False)
            sketch.line(flap[1:], dark, 0.012, z=-0.18)
    else:
        sketch.line(edge[2:] + [(-x, y) for x, y in reversed(edge[2:-1])], dark, 0.03, z=-0.2)
    for side in (-1, 1):  # folds of the cloth
        sketch.shade(
            [(side * 0.75, 1.5), (side * 0.9, 1.7), (side * 0.85, 2.4), (side * 0.7, 2.4)],
            (104, 0, 0),
            z=-0.22,
        )


def _outline(who: Identity, shot: Shot) -> list[tuple[float, float]]:
    """The edge of face and skull, from the top clockwise."""
    w, jaw, chin = who.width, who.width * who.jaw, who.chin
    low = who.length
    drop = 0.07 * shot.mouth_open
    cheek = 0.02 * max(shot.smile, 0)
    return both(
        [
            (0, -1.13), (0.40 * w, -1.06), (0.66 * w, -0.76), (0.75 * w, -0.30), (0.735 * w + cheek, 0.06),
            (0.69 * jaw + cheek, 0.36 * low), (0.575 * jaw, 0.64 * low + drop), (0.37 * chin, 0.89 * low + drop),
            (0.17 * chin, 0.985 * low + drop), (0, low + drop),
        ]
    )  # fmt: skip


def _head(sketch: Sketch, who: Identity, outline: list[tuple[float, float]]) -> None:
    for side in (-1, 1):
        size, x = who.ears, side * 0.77 * who.width
        ear = [
            (x, -0.22),
            (x + side * 0.12 * size, -0.25 * size),
            (x + side * 0.14 * size, -0.02),
            (x + side * 0.07, 0.2),
            (x, 0.2),
        ]
        sketch.fill(ear, tone(who.skin, 0.9, (190, 80, 70), 0.1), z=-0.12, material=SKULL)
        inner = [
            (x + side * 0.02, -0.14),
            (x + side * 0.09 * size, -0.15),
            (x + side * 0.08 * size, 0.0),
            (x + side * 0.03, 0.1),
        ]
        sketch.fill(inner, tone(who.skin, 0.7, (150, 60, 50), 0.1), z=-0.12)
    sketch.fill(outline, who.skin, z=-0.12, material=FACE)
    sketch.shade(outline, (128, 0, 0), z=-0.12)
    for side in (-1, 1):
        sketch.shade(
            ellipse(side * 0.43, 0.24, 0.17, 0.13), (133, 130, 0), curve=False
        )  # cheeks, a little red
        hollow = [
            (side * 0.7, 0.05),
            (side * 0.56, 0.3),
            (side * 0.42, 0.66),
            (side * 0.52, 0.72),
            (side * 0.72, 0.4),
        ]
        sketch.shade(hollow, (112, 20, 0))
    sketch.shade(ellipse(0, -0.55, 0.34, 0.16), (138, 10, 0), curve=False)  # forehead
    sketch.shade(ellipse(0, 0.86 * who.length, 0.12, 0.07), (138, 40, 0), curve=False)  # chin
    if who.age > 0.35:
        fold = int(128 - 42 * who.age)
        for side in (-1, 1):
            sketch.shade_line(
                [(side * 0.17, 0.3), (side * 0.27, 0.42), (side * 0.31, 0.58)], (fold, 20, 0), 0.03
            )
            sketch.shade_line(
                [(side * 0.2, 0.03), (side * 0.32, 0.07), (side * 0.42, 0.02)], (fold, 20, 0), 0.035
            )


def _eyes(sketch: Sketch, who: Identity, shot: Shot) -> None:
    for side in (-1, 1):
        _socket(sketch, who, side)
        _eye(sketch, who, shot, side)
        _brow(sketch, who, shot, side)


def _socket(sketch: Sketch, who: Identity, side: int) -> None:
    x, y = side * who.eye_gap, who.eye_y
    sketch.shade(ellipse(x - side * 0.02, y - 0.06, 0.20, 0.12), (104, 40, 0), curve=False)
    sketch.shade(ellipse(x - side * 0.12, y - 0.03, 0.06, 0.09), (92, 50, 0), curve=False)
    sketch.shade(ellipse(x, y + 0.02, 0.15, 0.07), (122, 30, 0), curve=False)


def _eye(sketch: Sketch, who: Identity, shot: Shot, side: int) -> None:
    """White, iris, pupil, then lids in skin colour over them, then lashes and the light in the eye."""
    half = who.eye_size
    squint = 1 - 0.22 * max(shot.smile, 0)
    up = half * 0.52 * who.eye_round * min(shot.eye_open, 1.1) * squint
    down = half * 0.36 * who.eye_round * (0.45 + 0.55 * shot.eye_open)

    def at(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        tilt = who.eye_tilt
        return [(side * (who.eye_gap + u * half), who.eye_y + v - tilt * u * half) for u, v in points]

    upper = [
        (-1.0, 0.025),
        (-0.62, -0.72 * up),
        (-0.1, -up),
        (0.45, -0.86 * up),
        (0.85, -0.3 * up),
        (1.02, 0.0),
    ]
    lower = [(1.02, 0.0), (0.62, 0.72 * down), (0.1, down), (-0.45, 0.8 * down), (-1.0, 0.025)]
    opening = np.concatenate((smooth_open(at(upper)), smooth_open(at(lower))[1:]))
    sketch.fill(opening, (226, 220, 214), curve=False)
    _iris(sketch, who, shot, at([(0.0, 0.0)])[0])
    top = smooth_open(at(upper))
    lid = np.concatenate((top, at([(1.15, -0.2), (0.6, -half * 1.05), (-0.4, -half * 1.05), (-1.15, -0.15)])))
    sketch.fill(lid, tone(who.skin, 0.95), curve=False)
    bottom = smooth_open(at(lower))
    sketch.fill(
        np.concatenate((bottom, at([(-1.1, half), (0, half * 1.25), (1.1, half)]))), who.skin, curve=False
    )
    lash = tone(who.hair, 0.35, (24, 18, 18), 0.5)
    shadow = at([(u, v + 0.012) for u, v in upper[1:5]])
    sketch.line(shadow, tone((226, 220, 214), 0.62), 0.012)
    sketch.line(at(upper), tone(who.skin, 0.4, lash, 0.45 + 0.55 * who.lashes), 0.014 + 0.012 * who.lashes)
    sketch.line(at([(u * 1.03, v - 0.036) for u, v in upper[1:]]), tone(who.skin, 0.72), 0.010)  # crease
    sketch.line(at(lower[:-1]), tone(who.skin, 0.74, (120, 50, 46), 0.15), 0.008)
    sketch.fill(
        ellipse(*at([(-0.93, 0.02)])[0], 0.016, 0.013),
        tone(who.skin, 0.9, (205, 110, 105), 0.6),
        curve=False,
    )


def _iris(sketch: Sketch, who: Identity, shot: Shot, middle: tuple[float, float]) -> None:
    radius = 0.074 * (0.6 + 0.4 * who.eye_size / 0.155)
    x, y = middle[0] + shot.gaze_x * 0.052, middle[1] + shot.gaze_y * 0.035 - 0.012
    sketch.fill(ellipse(x, y, radius, radius), tone(who.iris, 0.48), curve=False)
    sketch.fill(ellipse(x, y, radius * 0.84, radius * 0.84), who.iris, curve=False)
    sketch.fill(ellipse(x, y + radius * 0.3, radius * 0.62, radius * 0.45), tone(who.iris, 1.35), curve=False)
    sketch.fill(ellipse(x, y, radius * 0.42, radius * 0.42), (14, 12, 12), curve=False)
    glint = x + 0.028 * (1 if shot.light_x > 0 else -1)
    sketch.fill(ellipse(glint, y - 0.026, 0.017, 0.017), (250, 250, 250), curve=False)


def _brow(sketch: Sketch, who: Identity, shot: Shot, side: int) -> None:
    x, y = who.eye_gap, who.eye_y - who.brow_y - 0.05 * shot.brow_raise
    inner = 0.025 * (-shot.brow_raise if shot.brow_raise < 0 else 0)  # a frown pulls the inner ends down
    thick, angle = who.brow_thick, who.brow_angle
    middle = [
        (-0.19, 0.012 + inner),
        (-0.07, -0.018),
        (0.07, -0.03 - angle * 0.15),
        (0.2, 0.035 - angle * 0.1),
    ]
    sizes = (0.42, 0.5, 0.42, 0.1)
    top = [(side * (x + u), y + v - thick * s) for (u, v), s in zip(middle, sizes, strict=True)]
    low = [(side * (x + u), y + v + thick * s) for (u, v), s in zip(middle, sizes, strict=True)]
    colour = tone(who.skin, 0.9, tone(who.hair, 0.8), 0.78)
    sketch.fill(np.concatenate((smooth_open(top), smooth_open(low)[::-1])), colour, curve=False)
    sketch.shade(ellipse(side * (x - 0.02), y + 0.01, 0.17, 0.03), (112, 0, 0), curve=False)


def _nose(sketch: Sketch, who: Identity, shot: Shot) -> None:
    half, tip = who.nose_width, who.eye_y + who.nose_length
    dark = -1 if shot.light_x > 0 else 1  # the side away from the light
    sketch.shade(
        [
            (dark * 0.05, -0.15),
            (dark * 0.12, tip - 0.12),
            (dark * half * 1.15, tip + 0.02),
            (dark * 0.05, tip + 0.05),
            (dark * 0.03, -0.1),
        ],
        (94, 30, 0),
    )
    sketch.shade_line([(-dark * 0.01, -0.12), (-dark * 0.015, tip - 0.1)], (150, 10, 0), 0.05)
    sketch.shade(ellipse(0, tip + 0.075, half * 0.95, 0.032), (84, 40, 0), curve=False)  # under the nose
    sketch.shade(ellipse(-dark * 0.012, tip - 0.015, 0.06, 0.05), (158, 60, 0), curve=False)
    for side in (-1, 1):
        wing = [
            (side * half * 0.86, tip - 0.07),
            (side * half * 1.06, tip + 0.0),
            (side * half * 0.9, tip + 0.06),
            (side * half * 0.55, tip + 0.062),
        ]
        sketch.line(wing, tone(who.skin, 0.68, (120, 50, 40), 0.1), 0.011)
        sketch.fill(
            ellipse(side * half * 0.48, tip + 0.052, half * 0.27, 0.021, -side * 0.3),
            tone(who.skin, 0.36, (70, 20, 16), 0.25),
            curve=False,
        )


def _mouth(sketch: Sketch, who: Identity, shot: Shot) -> None:
    half = who.mouth_width * (1 + 0.18 * shot.smile - 0.08 * shot.mouth_open)
    y, lift, full = who.mouth_y, 0.075 * shot.smile, who.lip_full
    gap = 0.2 * shot.mouth_open
    corner_l, corner_r = (-half, y - lift), (half, y - lift)
    top = [
        corner_l,
        (-half * 0.45, y - full * 0.8 - lift * 0.1),
        (-0.05, y - full),
        (0, y - full * 0.82),
        (0.05, y - full),
        (half * 0.45, y - full * 0.8 - lift * 0.1),
        corner_r,
    ]
    mid_up = [corner_r, (half * 0.5, y - 0.012), (0, y + 0.008), (-half * 0.5, y - 0.012), corner_l]
    mid_low = [(x, v + gap * (1 - (x / half) ** 2) * 0.95) for x, v in mid_up]
    low = [
        corner_l,
        (-half * 0.55, y + gap * 0.68 + full * 0.66),
        (0, y + gap + full * 1.12),
        (half * 0.55, y + gap * 0.68 + full * 0.66),
        corner_r,
    ]
    sketch.shade(
        ellipse(0, y + gap + full * 1.9, half * 0.5, 0.032), (100, 20, 0), curve=False
    )  # under the lip
    for side in (-1, 1):
        sketch.shade(ellipse(side * half * 1.1, y - lift, 0.03, 0.035), (102, 20, 0), curve=False)
        if shot.smile > 0.25:
            deep = int(128 - 24 * shot.smile)
            sketch.shade_line(
                [(side * 0.18, 0.32), (side * 0.3, 0.42), (side * (half + 0.09), 0.56)], (deep, 30, 0), 0.03
            )
    if gap > 0.012:
        inside = np.concatenate((smooth_open(mid_up), smooth_open(mid_low)[::-1]))
        sketch.fill(inside, (58, 20, 22), curve=False)
        _teeth(sketch, half, y, gap, lift)
    upper_lip = np.concatenate((smooth_open(top), smooth_open(mid_up)))
    lower_lip = np.concatenate((smooth_open(low), smooth_open(mid_low)))
    sketch.fill(upper_lip, tone(who.lips, 0.86), curve=False)
    sketch.fill(lower_lip, who.lips, curve=False)
    sketch.fill(
        ellipse(0, y + gap + full * 0.5, half * 0.3, full * 0.16),
        tone(who.lips, 1.0, (255, 235, 230), 0.3),
        curve=False,
    )
    if gap <= 0.012:
        sketch.line(mid_up, tone(who.lips, 0.48), 0.014)


def _teeth(sketch: Sketch, half: float, y: float, gap: float, lift: float) -> None:
    deep = min(0.055, gap * 0.62)
    upper = [
        (-half * 0.74, y - lift * 0.45),
        (0, y + 0.004),
        (half * 0.74, y - lift * 0.45),
        (half * 0.6, y + deep * 0.62),
        (0, y + deep),
        (-half * 0.6, y + deep * 0.62),
    ]
    sketch.fill(upper, (226, 220, 208))
    if gap > 0.1:
        sketch.fill(ellipse(0, y + gap * 0.82, half * 0.42, gap * 0.2), (160, 76, 76), curve=False)  # tongue


def _beard(sketch: Sketch, who: Identity, shot: Shot) -> None:
    if who.beard == "none":
        return
    y, w, low = who.mouth_y, who.width * who.jaw, who.length + 0.07 * shot.mouth_open
    strength = 80 if who.beard == "stubble" else 235
    value = (122, 0, strength)
    if who.beard in ("full", "stubble"):
        cheek = [(0.71 * w, 0.12), (0.60 * w, 0.36), (0.36, 0.44), (0.16, 0.41), (0, 0.43)]
        jaw = [
            (0, low + 0.04),
            (0.2, low + 0.02),
            (0.42 * who.chin, 0.93 * low),
            (0.62 * w, 0.68 * low),
            (0.735 * w, 0.35),
        ]
        sketch.shade(
            [
                *[(-x, v) for x, v in cheek],
                *reversed(cheek[:-1]),
                *reversed(jaw),
                *[(-x, v) for x, v in jaw[1:]],
            ],
            value,
            curve=False,
        )
    if who.beard in ("moustache", "goatee"):
        wide = who.mouth_width * 1.12
        sketch.shade(
            [
                (0, y - 0.135),
                (wide * 0.6, y - 0.12),
                (wide * 1.05, y + 0.02),
                (wide * 0.7, y - 0.03),
                (0, y - 0.05),
                (-wide * 0.7, y - 0.03),
                (-wide * 1.05, y + 0.02),
                (-wide * 0.6, y - 0.12),
            ],
            value,
        )
    if who.beard == "goatee":
        sketch.shade(
            [
                (-0.2, y + 0.16),
                (0, y + 0.13),
                (0.2, y + 0.16),
                (0.23, 0.9 * low),
                (0, low + 0.03),
                (-0.23, 0.9 * low),
            ],
            value,
        )
    gap = 0.2 * shot.mouth_open  # lips stay free
    sketch.shade(ellipse(0, y + gap * 0.5, who.mouth_width * 0.9, 0.06 + gap * 0.5), (128, 0, 0), curve=False)


def _marks(sketch: Sketch, who: Identity, rng: np.random.Generator) -> None:
    brown = tone(who.skin, 0.84, (150, 84, 50), 0.2)
    for x, y in np.clip(rng.normal((0, 0.16), (0.26, 0.11), (who.freckles, 2)), -0.5, 0.5):
        sketch.fill(ellipse(float(x), float(y), 0.011, 0.011), brown, curve=False)


def _hair_front(sketch: Sketch, who: Identity, outline: list[tuple[float, float]]) -> None:
    front = _front(who)
    if front is not None:
        sketch.fill(front, who.hair, z=-0.05, material=BEHIND)
        sketch.shade_line([(x, y + 0.05) for x, y in _hairline(who)], (104, 0, 0), 0.06)
    if who.style in ("long", "bob"):
        low = 1.5 if who.style == "long" else 0.72
        for side in (-1, 1):
            lock = [
                (side * 0.5, -0.95),
                (side * 0.8, -0.6),
                (side * 0.93, 0.1),
                (side * 0.98, low),
                (side * 0.74, low + 0.05),
                (side * 0.72, 0.5),
                (side * 0.69, -0.1),
                (side * 0.62, -0.55),
            ]
            sketch.fill(lock, tone(who.hair, 0.95), z=-0.06, material=BEHIND)


def _hairline(who: Identity) -> list[tuple[float, float]]:
    """From the left temple to the right one, along the forehead."""
    h, part = who.hairline, who.part
    temple = 0.70 * who.width
    lines = {
        "short": [(-0.6, -0.62), (-0.42, -0.76), (0, -0.8), (0.42, -0.76), (0.6, -0.62)],
        "buzz": [(-0.6, -0.66), (-0.46, -0.80), (0, -0.82), (0.46, -0.80), (0.6, -0.66)],
        "curly": [(-0.62, -0.55), (-0.4, -0.66), (0, -0.70), (0.4, -0.66), (0.62, -0.55)],
        "bun": [(-0.6, -0.62), (-0.35, -0.82), (0, -0.88), (0.35, -0.82), (0.6, -0.62)],
        "bangs": [(-0.62, -0.42), (-0.4, -0.40), (0, -0.385), (0.4, -0.40), (0.62, -0.42)],
        "swept": [(-0.62, -0.5), (-0.3, -0.52), (0.1, -0.64), (0.4, -0.82), (0.62, -0.62)],
    }
    parted = [
        (-0.62, -0.52),
        ((part - 0.62) / 2, -0.66),
        (part, -0.93),
        ((part + 0.62) / 2, -0.66),
        (0.62, -0.52),
    ]
    middle = [(x * who.width, y + h) for x, y in lines.get(who.style, parted)]
    if who.style == "swept" and who.part < 0:
        middle = [(-x, y) for x, y in reversed(middle)]
    side = -0.3 if who.style in ("short", "buzz", "swept", "parted") else -0.22
    return [(-temple, side), *middle, (temple, side)]


def _front(who: Identity) -> Floats | None:
    """Hair over the top of the head, down to the hairline."""
    if who.style == "bald":
        return None
    w, puff = who.width, _PUFF[who.style]
    top = [
        (0.76 * w, -0.1),
        (0.775 * w + puff * 0.6, -0.5),
        (0.62 * w + puff * 0.5, -0.92),
        (0.33, -1.13 - puff),
        (0, -1.18 - puff),
    ]
    crown = [*top, *[(-x, y) for x, y in reversed(top[:-1])]]
    curve = smooth_open(crown)
    if who.style == "curly":
        angle = np.linspace(0, 46, len(curve))[:, None] + who.mark % 7
        bumps = np.concatenate((np.cos(angle), np.sin(angle * 1.3)), 1)
        curve = curve + bumps.astype(np.float32) * np.float32(0.035)
    return np.concatenate((curve, smooth_open(_hairline(who))))


_PUFF = {
    "buzz": -0.02,
    "short": 0.05,
    "parted": 0.08,
    "swept": 0.12,
    "bob": 0.1,
    "long": 0.09,
    "bangs": 0.09,
    "curly": 0.2,
    "bun": 0.04,
}
_HAIR_BACK: dict[str, list[tuple[float, float]]] = {
    "bob": [(0, -1.28), (0.5, -1.16), (0.86, -0.7), (0.98, 0.0), (1.0, 0.7), (0.72, 0.85), (0, 0.8)],
    "long": [
        (0, -1.27),
        (0.5, -1.16),
        (0.85, -0.7),
        (0.96, 0.1),
        (1.03, 1.0),
        (1.0, 1.9),
        (0.4, 2.0),
        (0, 2.0),
    ],
    "bangs": [(0, -1.27), (0.5, -1.16), (0.85, -0.7), (0.94, 0.1), (0.96, 0.9), (0.8, 1.35), (0, 1.3)],
    "curly": [(0, -1.4), (0.55, -1.28), (0.98, -0.8), (1.08, -0.2), (0.98, 0.3), (0.6, 0.4), (0, 0.4)],
}


def _glasses(sketch: Sketch, who: Identity) -> None:
    frame: Colour = (36, 30, 30) if who.mark % 3 else (120, 84, 48)
    half = 0.215 if who.glasses == "round" else 0.225
    for side in (-1, 1):
        x, y = side * who.eye_gap * 1.02, who.eye_y + 0.02
        if who.glasses == "round":
            rim = ellipse(x, y, half, half * 0.92)
        else:
            rim = smooth(
                [
                    (x - half, y - 0.15),
                    (x, y - 0.165),
                    (x + half, y - 0.15),
                    (x + half * 0.95, y + 0.13),
                    (x, y + 0.16),
                    (x - half * 0.95, y + 0.13),
                ]
            )
        sketch.line(np.concatenate((rim, rim[:1])), frame, 0.018, z=0.6)
        sketch.line([(x + side * half, y - 0.03), (side * 0.78 * who.width, who.eye_y - 0.05)], frame, 0.018)
    bridge = who.eye_gap * 1.02 - half
    sketch.line([(-bridge, who.eye_y), (0, who.eye_y - 0.035), (bridge, who.eye_y)], frame, 0.018, z=0.6)


# -- ground truth ---------------------------------------------------------------------------------------------------


def _face_box(sketch: Sketch, outline: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    face = np.array([(x, max(y, -0.72)) for x, y in outline], np.float32)
    points = np.clip(sketch.project(face, -0.12), 0, sketch.size)
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    return round(left, 2), round(top, 2), round(right - left, 2), round(bottom - top, 2)


def _landmarks(sketch: Sketch, who: Identity, shot: Shot) -> list[tuple[float, float]]:
    half = who.mouth_width * (1 + 0.18 * shot.smile - 0.08 * shot.mouth_open)
    corner = who.mouth_y - 0.075 * shot.smile
    tip = (0.0, who.eye_y + who.nose_length)
    points = [(-who.eye_gap, who.eye_y), (who.eye_gap, who.eye_y), tip, (-half, corner), (half, corner)]
    return [(round(x, 2), round(y, 2)) for x, y in sketch.project(points).tolist()]
