"""Follow faces through a video: who is the same from frame to frame, and where, steadied over time.

Positions only, never pixels; any detector of faces.py will do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from counterfake.faces import Box, Detector, Face, Pixels, Point, overlap

STEADY_ROWS = 512  # frames whose positions are smoothed at a time


class Seen(Protocol):
    """What `track` reads of a frame; video.Frame is one."""

    @property
    def pixels(self) -> Pixels: ...

    @property
    def index(self) -> int: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Sight:
    """A face at one frame of its track."""

    index: int  # of the frame in its video
    face: Face  # box and landmarks smoothed over time
    found: bool  # False: between two frames where it was found, and interpolated


@dataclasses.dataclass(frozen=True, slots=True)
class Track:
    """One face through a video, in order of time."""

    id: int  # 0 = the most prominent
    sights: tuple[Sight, ...]

    @property
    def found(self) -> int:
        """Frames in which the detector saw it."""
        return sum(sight.found for sight in self.sights)

    def at(self, index: int) -> Sight | None:
        return next((sight for sight in self.sights if sight.index == index), None)


def track(
    frames: Iterable[Seen],
    detector: Detector,
    *,
    max_gap: int = 5,
    min_found: int = 3,
    smoothing: float = 5.0,
) -> list[Track]:
    """The faces of a video, the most prominent (seen longest and largest) first. Keeps positions, never pixels.

    A face continues the track whose last box it overlaps (IoU), or lies beside, at half to twice its size; best match
    first. max_gap: frames given without the face before its track ends; shorter gaps are filled by interpolation.
    min_found: tracks seen in fewer frames are dropped as mistakes (in a video of fewer frames: than half of them).
    smoothing: sigma of the Gaussian over the video's frame numbers that steadies boxes and landmarks.
    """
    open_tracks: list[_Trail] = []
    trails: list[_Trail] = []
    indices: list[int] = []
    for number, frame in enumerate(frames):
        indices.append(frame.index)
        open_tracks = [trail for trail in open_tracks if number - trail.last <= max_gap]
        for face, trail in _matched(detector.detect(frame.pixels), open_tracks):
            if trail is None:
                trail = _Trail([], [])
                open_tracks.append(trail)
                trails.append(trail)
            trail.numbers.append(number)
            trail.faces.append(face)
    enough = min(min_found, (len(indices) + 1) // 2)
    kept = sorted((t for t in trails if len(t.faces) >= enough), key=lambda t: -t.prominence)
    return [Track(i, _sights(trail, indices, smoothing)) for i, trail in enumerate(kept)]


# -- private --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Trail:
    """A track being made: the numbers of the frames given (0, 1, ...) and the face found in each."""

    numbers: list[int]
    faces: list[Face]

    @property
    def last(self) -> int:
        return self.numbers[-1]

    @property
    def prominence(self) -> float:
        """By sides and not areas, or a close-up of a second would beat the person on screen all the time."""
        return sum(face.box[2] + face.box[3] for face in self.faces)


def _matched(faces: Sequence[Face], trails: Sequence[_Trail]) -> list[tuple[Face, _Trail | None]]:
    """Each face with the track it continues, best matches first, no track twice; None = a new one."""
    pairs = [
        (_likeness(f.box, t.faces[-1].box), i, j) for i, f in enumerate(faces) for j, t in enumerate(trails)
    ]
    given: dict[int, int] = {}
    for likeness, i, j in sorted(pairs, reverse=True):
        if likeness > 0 and i not in given and j not in given.values():
            given[i] = j
    return [(face, trails[given[i]] if i in given else None) for i, face in enumerate(faces)]


def _likeness(a: Box, b: Box) -> float:
    """IoU, or up to 0.1 for boxes that are less than one side apart; 0 if one is over twice as large or further off."""
    ratio = max(a[2], a[3]) / max(b[2], b[3])
    if not 0.5 <= ratio <= 2:
        return 0.0
    away = np.hypot(a[0] + a[2] / 2 - b[0] - b[2] / 2, a[1] + a[3] / 2 - b[1] - b[3] / 2)
    return max(overlap(a, b), 0.1 * float(1 - away / max(*a[2:], *b[2:])))


def _sights(trail: _Trail, indices: Sequence[int], smoothing: float) -> tuple[Sight, ...]:
    at = np.array([indices[number] for number in trail.numbers], float)
    numbers = range(trail.numbers[0], trail.last + 1)
    wanted = np.array([indices[number] for number in numbers], float)
    boxes = _steady(at, np.array([face.box for face in trail.faces]), wanted, smoothing)
    points = _steady_points(at, trail.faces, wanted, smoothing)
    scores = dict(zip(trail.numbers, (face.score for face in trail.faces), strict=True))
    return tuple(
        Sight(indices[n], Face(_box(boxes[i]), scores.get(n, 0.0), points[i]), n in scores)
        for i, n in enumerate(numbers)
    )


def _steady(
    at: NDArray[np.float64], values: NDArray[np.float64], wanted: NDArray[np.float64], sigma: float
) -> NDArray[np.float64]:
    """values (M, K) seen at frames `at` (M,) -> (N, K) at frames `wanted`: interpolated, then a Gaussian mean over time.

    The mean is that of a straight line through the neighbours (local linear regression), so that a face in steady motion
    is not held back at the ends of its track.
    """
    filled = np.stack([np.interp(wanted, at, column) for column in values.T], axis=1)
    if sigma <= 0 or len(wanted) < 2:
        return filled
    out = np.empty_like(filled)
    for start in range(0, len(wanted), STEADY_ROWS):  # a matrix over a whole film would not fit into memory
        rows = slice(start, min(start + STEADY_ROWS, len(wanted)))
        reach = np.array(
            [wanted[rows][0] - 9 * sigma, wanted[rows][-1] + 9 * sigma]
        )  # beyond: weights below 1e-17
        near = slice(*np.searchsorted(wanted, reach))
        lines = _lines(wanted[near][None, :] - wanted[rows][:, None], sigma)  # (rows, near)
        out[rows] = lines @ filled[near]
    return out


def _lines(steps: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Weights (R, N) of neighbours `steps` frames away in the value at 0 of the line through them; 1 for a lone one."""
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    s0, s1, s2 = (np.sum(weights * steps**k, axis=1, keepdims=True) for k in range(3))
    lines = weights * (s2 - steps * s1) / np.maximum(s0 * s2 - s1**2, 1e-9)
    alone = (s0 * s2 - s1**2)[:, 0] < 1e-6  # no neighbour near enough to say anything
    lines[alone] = steps[alone] == 0
    return np.asarray(lines, np.float64)


def _steady_points(
    at: NDArray[np.float64], faces: Sequence[Face], wanted: NDArray[np.float64], sigma: float
) -> list[list[Point] | None]:
    """Landmarks over time: only between frames that have them, and as many as all of those have."""
    having = [i for i, face in enumerate(faces) if face.landmarks]
    if not having:
        return [None] * len(wanted)
    least = min(len(faces[i].landmarks or ()) for i in having)
    values = np.array([np.ravel((faces[i].landmarks or [])[:least]) for i in having])
    steady = _steady(at[having], values, wanted, sigma)
    inside = (wanted >= at[having[0]]) & (wanted <= at[having[-1]])
    return [
        [(float(x), float(y)) for x, y in row.reshape(-1, 2)] if ok else None
        for row, ok in zip(steady, inside, strict=True)
    ]


def _box(row: NDArray[np.float64]) -> Box:
    x, y, w, h = (float(value) for value in row)
    return x, y, w, h
