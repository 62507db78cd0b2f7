"""Procedural clips: smooth motion, swaps that change the face and nothing else, and a flicker that one frame does not show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from counterfake import media
from counterfake.config import from_dict, to_dict
from counterfake.errors import ConfigError
from counterfake.grouping import Links
from counterfake.records import Dataset, write_version
from counterfake.sources import SourceConfig
from counterfake.sources.portrait import people
from counterfake.sources.portrait.painter import render
from counterfake.sources.synthetic_video import MOTION, SyntheticVideoSource
from counterfake.workspace import Workspace

SMALL = SyntheticVideoSource(identities=4, clips=1, frames=6, size=64)


def pixels(source: SyntheticVideoSource, kind: str, person: int = 0) -> NDArray[np.int64]:
    """(T, H, W, 3) of the first clip."""
    frames = source.clip(person, 0, "real" if kind == "real" else "swap")
    return np.stack([media.decode_trusted(sample.media) for sample in frames]).astype(np.int64)


def mask(source: SyntheticVideoSource, frame: int) -> NDArray[np.bool_]:
    """(H, W) where the face of the first clip is."""
    return render(people.identity(0, 0), source.shots(0, 0)[frame], source.size).face_mask > 0


def test_every_name_is_a_clip_and_every_row_says_where_it_is_from() -> None:
    names = list(SMALL.names())
    assert len(names) == len(set(names)) == 8
    rows = list(SMALL.samples())
    assert len(rows) == 8 * 6
    first, last = rows[0], rows[-1]
    assert (first.fake, first.maker, first.video, first.frame) == (0, "camera", "0/000000/real/000", 0)
    assert (last.fake, last.maker, last.video, last.frame) == (1, "procedural-swap", "0/000003/swap/000", 5)
    assert last.time_s == pytest.approx(5 / 8)
    assert list(SMALL.read(names[3:5])) == rows[18:30]


def test_motion_is_smooth_and_within_the_bounds_of_pictures() -> None:
    shots = replace(SMALL, frames=64).shots(1, 0)
    for name, (way, _, fast, (low, high)) in MOTION.items():
        values = np.array([getattr(shot, name) for shot in shots])
        assert values.min() >= low
        assert values.max() <= high
        assert np.abs(np.diff(values)).max() <= way * 2 * np.pi * fast / SMALL.fps + 1e-9
    assert len({(shot.shirt, shot.background, shot.grain) for shot in shots}) == 1


def test_a_swap_changes_the_face_and_leaves_the_rest() -> None:
    source = replace(SMALL, quality=(100, 100))
    apart = np.abs(pixels(source, "swap") - pixels(source, "real")).mean(axis=-1)
    for frame in range(3):
        inside = mask(source, frame)
        assert apart[frame][inside].mean() > 2 * apart[frame][~inside].mean()


def test_flicker_moves_the_face_from_frame_to_frame_and_not_on_average() -> None:
    still, restless = (replace(SMALL, flicker=value, frames=24) for value in (0.0, 3.0))
    levels = {}
    for source in (still, restless):
        frames = pixels(source, "swap")
        levels[source.flicker] = np.array([frame[mask(source, t)].mean() for t, frame in enumerate(frames)])
    assert np.abs(np.diff(levels[3.0])).mean() > 3 * np.abs(np.diff(levels[0.0])).mean()
    assert (
        abs(levels[3.0].mean() - levels[0.0].mean()) < 9
    )  # 15 levels a channel, over 24 frames and 3 channels


def test_partners_are_one_group_and_pairs_are_not() -> None:
    rows = {sample.identity: sample for sample in SMALL.samples() if sample.frame == 0 and not sample.fake}
    links = Links(
        [(f"identity:{name}", *sample.attributes["also"]) for name, sample in rows.items()], [""] * len(rows)
    )
    groups = dict(zip(rows, links.groups(-1).tolist(), strict=True))
    assert groups["synthetic-0-000000"] == groups["synthetic-0-000001"]
    assert groups["synthetic-0-000000"] != groups["synthetic-0-000002"]


def test_a_stored_version_keeps_video_frame_and_label(workspace: Workspace) -> None:
    uri = workspace.dataset("clips")
    terms = {SMALL.label: {"licence": SMALL.licence, "consent": SMALL.consent}}
    version = write_version(uri, SMALL.samples(), sources=terms)
    table = Dataset.open(uri).read(version, "*", ["video", "fake", "frame"]).to_pylist()
    assert len({row["video"] for row in table}) == 8
    assert all(row["fake"] == int("/swap/" in row["video"]) for row in table)


def test_settings_survive_text_and_wrong_ones_are_refused() -> None:
    assert from_dict(SourceConfig, to_dict(SMALL)) == SMALL  # type: ignore[type-abstract]
    for wrong in ({"identities": 3}, {"frames": 0}, {"flicker": -1.0}, {"quality": (90, 80)}):
        with pytest.raises(ConfigError, match=r"must|need"):
            replace(SMALL, **wrong)
