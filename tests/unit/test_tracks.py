"""tracks.py: who moves is one track, gaps are filled, cuts end tracks, positions are steady and do not lag."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from counterfake import faces
from counterfake.faces import Box, Face
from counterfake.tracks import Track, track


@dataclasses.dataclass(frozen=True)
class Still:
    index: int
    pixels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((1, 1, 3), np.uint8))


class Script:
    """A detector that knows what it is going to find."""

    method: faces.Method = "cascade"

    def __init__(self, found: Sequence[Sequence[Box | Face]]) -> None:
        self.found = iter(found)

    def detect(self, pixels: np.ndarray) -> list[Face]:
        return [face if isinstance(face, Face) else Face(face, 1.0) for face in next(self.found)]


def tracked(found: Sequence[Sequence[Box | Face]], step: int = 1, **settings: float) -> list[Track]:
    stills = [Still(i * step) for i in range(len(found))]
    return track(stills, Script(found), **settings)  # type: ignore[arg-type]


def test_two_faces_that_move_are_two_tracks() -> None:
    found = [[(10 + 3 * i, 10, 40, 40), (300 - 3 * i, 20, 60, 60)] for i in range(20)]
    found = [boxes if i % 2 else boxes[::-1] for i, boxes in enumerate(found)]
    large, small = tracked(found, smoothing=0)
    assert (large.id, small.id) == (0, 1)
    assert [sight.face.box[0] for sight in large.sights] == [300 - 3 * i for i in range(20)]
    assert [sight.face.box[0] for sight in small.sights] == [10 + 3 * i for i in range(20)]


def test_long_on_screen_beats_a_short_close_up() -> None:
    person, close_up = (10.0, 10.0, 100.0, 100.0), (200.0, 20.0, 250.0, 250.0)
    first, second = tracked([[person]] * 20 + [[close_up]] * 6)
    assert (first.found, second.found) == (20, 6)


def test_a_short_gap_is_filled_and_a_long_one_ends_the_track() -> None:
    a, b = [(10.0, 10.0, 40.0, 40.0)], [(22.0, 10.0, 40.0, 40.0)]
    (one,) = tracked([a, a, a, [], [], b, b, b], smoothing=0)
    assert [sight.found for sight in one.sights] == [True] * 3 + [False] * 2 + [True] * 3
    assert [sight.face.box[0] for sight in one.sights][2:6] == pytest.approx([10, 14, 18, 22])
    assert len(tracked([a] * 3 + [[]] * 9 + [a] * 3)) == 2


def test_a_detection_or_two_is_a_mistake_unless_the_video_is_that_short() -> None:
    face, ghost = (10.0, 10.0, 40.0, 40.0), (200.0, 200.0, 90.0, 90.0)
    assert len(tracked([[face]] * 4 + [[face, ghost]] * 2 + [[face]] * 4)) == 1
    assert len(tracked([[face]])) == 1
    assert len(tracked([[face], []])) == 1


def test_a_cut_to_another_place_or_size_is_another_track() -> None:
    a, b, c = (10.0, 10.0, 40.0, 40.0), (300.0, 10.0, 40.0, 40.0), (290.0, 0.0, 120.0, 120.0)
    assert len(tracked([[a]] * 4 + [[b]] * 4 + [[c]] * 4)) == 3


def test_a_crop_does_not_jitter_and_does_not_lag() -> None:
    """A face in steady motion, seen with an error of 3 pixels: the error shrinks, the ends are not held back."""
    rng = np.random.default_rng(0)
    truth = np.array([[50 + 2.0 * i, 80 + 1.0 * i, 100, 100] for i in range(60)])
    noisy = truth + rng.normal(0, 3, truth.shape)
    (one,) = tracked([[tuple(row)] for row in noisy.tolist()])
    steady = np.array([sight.face.box for sight in one.sights])
    assert (steady - truth).std() < 1.5
    assert (
        np.abs(np.diff(steady - truth, axis=0)).mean() < 0.15 * np.abs(np.diff(noisy - truth, axis=0)).mean()
    )
    assert np.abs((steady - truth)[[0, -1]]).max() < 5


def test_frames_far_apart_are_not_smoothed_together() -> None:
    boxes = [(10.0 + 15 * (i % 2), 10.0, 40.0, 40.0) for i in range(8)]
    (one,) = tracked([[box] for box in boxes], step=30)
    assert [sight.face.box[0] for sight in one.sights] == pytest.approx([box[0] for box in boxes], abs=0.01)


def test_landmarks_follow_between_the_frames_that_have_them() -> None:
    def seen(i: int, points: bool) -> list[Face]:
        return [Face((10.0 + i, 10, 40, 40), 1.0, [(20.0 + i, 25), (40.0 + i, 25)] if points else None)]

    (one,) = tracked([seen(i, i in (1, 2, 4)) for i in range(6)], smoothing=0)
    points = [sight.face.landmarks for sight in one.sights]
    assert (points[0], points[5]) == (None, None)
    assert points[3] == [(23, 25), (43, 25)]


def test_a_video_without_faces_has_no_track() -> None:
    assert tracked([[], [], []]) == []
    assert track([], Script([])) == []
