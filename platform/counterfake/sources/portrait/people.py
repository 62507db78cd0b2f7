"""Who a procedural person is and how one picture shows them: the numbers behind every synthetic face.

`Identity` is what stays the same between pictures of one person (bones, colours, hair), `Shot` what differs (pose,
expression, light, background, camera). Lengths are in head units: 1 = from the middle of the face to the chin; x to the
right and y down as seen, z towards the camera. Angles are radians. Drawing them is painter.py's work; rendering
identity B with the shot of A is the ground truth of a face swap from A to B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]  # RGB

SKIN: tuple[Colour, ...] = (
    (250, 218, 196), (240, 198, 168), (226, 178, 142), (206, 152, 114), (172, 118, 84), (132, 86, 60), (98, 64, 48),
)  # fmt: skip
HAIR: dict[str, Colour] = {
    "black": (34, 28, 28), "dark_brown": (62, 42, 32), "brown": (98, 66, 44), "auburn": (128, 62, 36),
    "red": (172, 84, 42), "blond": (204, 166, 104), "light_blond": (226, 198, 146), "grey": (148, 146, 144),
    "white": (214, 212, 208),
}  # fmt: skip
IRIS: dict[str, Colour] = {
    "dark_brown": (58, 36, 24), "brown": (96, 60, 34), "hazel": (122, 96, 50), "green": (88, 120, 78),
    "blue": (84, 124, 164), "grey": (118, 130, 138),
}  # fmt: skip
STYLES = ("bald", "buzz", "short", "parted", "swept", "bob", "long", "bangs", "curly", "bun")
BACKGROUNDS = ("studio", "bokeh", "room", "outdoor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What makes a person the same person in every picture."""

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    style: str  # one of STYLES
    part: float  # where the hair parts, x in [-0.4, 0.4]
    hairline: float  # lower = higher forehead covered; added to y
    beard: str  # none, stubble, moustache, goatee, full
    glasses: str  # none, round, square
    lashes: float  # strength of the lash line, 0-1
    freckles: int  # how many
    age: float  # 0-1: folds, and grey mixed into the hair
    mark: int  # seed of freckle and strand positions
    width: float  # of the face, factor
    jaw: float  # width of the jaw, factor
    chin: float  # width of the chin, factor
    length: float  # of the lower face, factor
    ears: float  # size, factor
    eye_gap: float  # x of the eyes' middles
    eye_y: float
    eye_size: float  # half width
    eye_round: float  # height / width, factor
    eye_tilt: float  # outer corner up, radians
    brow_y: float  # above the eye
    brow_thick: float
    brow_angle: float
    nose_width: float
    nose_length: float
    mouth_y: float
    mouth_width: float
    lip_full: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """What differs between two pictures of one person."""

    yaw: float  # positive: the face turns to the viewer's right
    pitch: float  # positive: looks down
    roll: float
    shift_x: float  # of the head's middle from the picture's, of its side
    shift_y: float
    scale: float  # head unit / side of the picture
    smile: float  # -0.5 sad to 1 laughing
    mouth_open: float  # 0-1
    brow_raise: float  # -0.5 to 1
    eye_open: float  # 0.25-1.1
    gaze_x: float  # -1 to 1
    gaze_y: float
    light_x: float  # direction to the light, x; positive: from the viewer's right
    light_y: float  # negative: from above
    light: float  # share of directed light, 0-1
    exposure: float
    warmth: float  # -1 cool to 1 warm
    background: str  # one of BACKGROUNDS
    colours: tuple[Colour, Colour]  # of the background
    shirt: Colour
    collar: str  # crew, vee, shirt
    blur: float  # sigma of the lens, of a 128-pixel picture
    noise: float  # standard deviation of the sensor, of 255
    grain: int  # seed of everything random in this picture


def identity(seed: int, index: int) -> Identity:
    """Person number `index` of the population `seed`; the same numbers on every machine."""
    rng = np.random.default_rng([seed, index, 1])
    tone = rng.uniform(0, len(SKIN) - 1)
    skin = _jitter(_mix_scale(SKIN, tone), rng, 5)
    age = float(rng.beta(1.5, 2.5))
    style = str(rng.choice(STYLES, p=(0.05, 0.07, 0.17, 0.14, 0.13, 0.11, 0.13, 0.07, 0.07, 0.06)))
    masculine = style in ("bald", "buzz", "short") or (
        style in ("parted", "swept", "curly") and rng.random() < 0.5
    )
    beard = str(
        rng.choice(("none", "stubble", "moustache", "goatee", "full"), p=(0.5, 0.2, 0.08, 0.08, 0.14))
    )
    dark = tone > 3
    iris = str(rng.choice(list(IRIS)[:2])) if dark else str(rng.choice(list(IRIS)))
    normal = rng.standard_normal(20)

    def near(i: int, middle: float, spread: float) -> float:
        return float(middle + spread * np.clip(normal[i], -2, 2))

    return Identity(
        skin=skin,
        hair=_hair_colour(rng, dark, age),
        iris=_jitter(IRIS[iris], rng, 8),
        lips=_jitter(_mix(skin, (172, 62, 66), 0.30 if masculine else 0.48), rng, 6),
        style=style,
        part=float(rng.uniform(-0.38, 0.38)),
        hairline=near(0, 0, 0.05),
        beard=beard if masculine else "none",
        glasses=str(rng.choice(("none", "round", "square"), p=(0.76, 0.12, 0.12))),
        lashes=float(rng.uniform(0.25, 0.5) if masculine else rng.uniform(0.6, 1.0)),
        freckles=int(rng.integers(12, 40)) if tone < 3 and rng.random() < 0.2 else 0,
        age=age,
        mark=int(rng.integers(2**31)),
        width=near(1, 1.0 if masculine else 0.97, 0.045),
        jaw=near(2, 1.05 if masculine else 0.95, 0.05),
        chin=near(3, 1.08 if masculine else 0.92, 0.09),
        length=near(4, 1.0, 0.04),
        ears=near(5, 1.0, 0.12),
        eye_gap=near(6, 0.315, 0.016),
        eye_y=near(7, -0.10, 0.025),
        eye_size=near(8, 0.150 if masculine else 0.160, 0.011),
        eye_round=near(9, 1.0, 0.12),
        eye_tilt=near(10, 0.06, 0.06),
        brow_y=near(11, 0.185, 0.022),
        brow_thick=near(12, 0.050 if masculine else 0.036, 0.007),
        brow_angle=near(13, 0.06, 0.07),
        nose_width=near(14, 0.150, 0.018),
        nose_length=near(15, 0.37, 0.03),
        mouth_y=near(16, 0.58, 0.02),
        mouth_width=near(17, 0.275, 0.022),
        lip_full=near(18, 0.070 if masculine else 0.088, 0.012),
    )


def shot(seed: int, index: int, picture: int) -> Shot:
    """Picture number `picture` of person `index`."""
    rng = np.random.default_rng([seed, index, picture, 2])
    smile = float(np.clip(rng.normal(0.4, 0.4), -0.35, 1))
    background = str(rng.choice(BACKGROUNDS))
    return Shot(
        yaw=float(np.clip(rng.normal(0, 0.22), -0.5, 0.5)),
        pitch=float(np.clip(rng.normal(0, 0.09), -0.22, 0.22)),
        roll=float(np.clip(rng.normal(0, 0.08), -0.25, 0.25)),
        shift_x=float(np.clip(rng.normal(0, 0.02), -0.05, 0.05)),
        shift_y=float(np.clip(rng.normal(0.025, 0.015), -0.02, 0.06)),
        scale=float(rng.uniform(0.305, 0.36)),
        smile=smile,
        mouth_open=float(np.clip(rng.normal(0.1 + 0.25 * max(smile, 0), 0.2), 0, 1)),
        brow_raise=float(np.clip(rng.normal(0.25, 0.35), -0.5, 1)),
        eye_open=float(np.clip(rng.normal(0.88, 0.14), 0.3, 1.1)),
        gaze_x=float(np.clip(rng.normal(0, 0.35), -0.9, 0.9)),
        gaze_y=float(np.clip(rng.normal(0, 0.2), -0.5, 0.5)),
        light_x=float(rng.uniform(-0.9, 0.9)),
        light_y=float(rng.uniform(-0.8, -0.1)),
        light=float(rng.uniform(0.25, 0.6)),
        exposure=float(rng.uniform(0.88, 1.1)),
        warmth=float(np.clip(rng.normal(0, 0.5), -1, 1)),
        background=background,
        colours=_background_colours(background, rng),
        shirt=_jitter(SHIRTS[int(rng.integers(len(SHIRTS)))], rng, 14),
        collar=str(rng.choice(("crew", "vee", "shirt"))),
        blur=float(rng.uniform(0.25, 0.75)),
        noise=float(rng.uniform(1.0, 4.5)),
        grain=int(rng.integers(2**31)),
    )


def differences(shot: Shot) -> dict[str, float | str]:
    """The numbers of a shot that an evaluation asks for, rounded: pose, expression, light."""
    names = (
        "yaw",
        "pitch",
        "roll",
        "scale",
        "smile",
        "mouth_open",
        "brow_raise",
        "eye_open",
        "gaze_x",
        "gaze_y",
        "light_x",
    )
    return {name: round(getattr(shot, name), 4) for name in names} | {"background": shot.background}


SHIRTS: tuple[Colour, ...] = (
    (236, 236, 232), (42, 46, 56), (70, 92, 128), (132, 46, 50), (74, 100, 76), (190, 168, 132), (120, 120, 126),
    (88, 62, 96), (196, 116, 70), (40, 74, 84),
)  # fmt: skip


# -- private --------------------------------------------------------------------------------------------------------


def _hair_colour(rng: np.random.Generator, dark: bool, age: float) -> Colour:
    names = list(HAIR)[:7]
    shares = np.array(
        (0.62, 0.25, 0.08, 0.02, 0.01, 0.01, 0.01) if dark else (0.14, 0.22, 0.22, 0.1, 0.07, 0.15, 0.1)
    )
    colour = HAIR[str(rng.choice(names, p=shares / shares.sum()))]
    if age > 0.55 and rng.random() < 0.7:
        colour = _mix(colour, HAIR["grey" if age < 0.8 else "white"], min(0.9, (age - 0.45) * 2))
    return _jitter(colour, rng, 7)


def _background_colours(kind: str, rng: np.random.Generator) -> tuple[Colour, Colour]:
    if kind == "outdoor":
        return _jitter((168, 196, 222), rng, 22), _jitter((96, 122, 78), rng, 26)
    if kind == "room":
        return _jitter((206, 196, 180), rng, 26), _jitter((132, 106, 84), rng, 30)
    first = rng.uniform(40, 216, 3)
    grey = np.full(3, first.mean())
    first = first * 0.4 + grey * 0.6  # photographed walls are rarely saturated
    return _colour(first), _colour(first * rng.uniform(0.5, 0.85))


def _mix_scale(colours: Sequence[Colour], at: float) -> Colour:
    low = min(int(at), len(colours) - 2)
    return _mix(colours[low], colours[low + 1], at - low)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return _colour(np.array(a) * (1 - share) + np.array(b) * share)


def _jitter(colour: Colour, rng: np.random.Generator, spread: float) -> Colour:
    return _colour(np.array(colour) + rng.normal(0, spread, 3) * 0.5 + rng.normal(0, spread))


def _colour(values: NDArray[np.floating]) -> Colour:
    red, green, blue = np.clip(np.rint(values), 6, 250).astype(int).tolist()
    return red, green, blue
