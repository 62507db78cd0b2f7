"""order.py: groups of rows in equal shares, with the guarantees of the plain order (which test_data.py keeps)."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterfake.order import Balanced, Order

# members[shard][record batch] = the group of each row
MEMBERS = st.lists(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)
OPTIONS = st.fixed_dictionaries(
    {
        "lanes": st.sampled_from([1, 2, 3, 4, 6]),
        "share": st.integers(1, 6),
        "window": st.integers(1, 4),
        "mix_shards": st.integers(1, 3),
        "seed": st.integers(0, 5),
        "drop_last": st.booleans(),
    }
)
Row = tuple[int, ...]


def rows_of(members: list[list[list[int]]]) -> dict[int, set[Row]]:
    """group -> its rows as (shard, record batch, row)."""
    found: dict[int, set[Row]] = {}
    for shard, blocks in enumerate(members):
        for block, groups in enumerate(blocks):
            for row, group in enumerate(groups):
                found.setdefault(group, set()).add((shard, block, row))
    return dict(sorted(found.items()))


def balanced(members: list[list[list[int]]], options: dict[str, Any]) -> Balanced:
    options = dict(options)
    batch = options.pop("share") * options["lanes"]
    groups = [
        [[np.flatnonzero(np.array(block) == group) for block in blocks] for blocks in members]
        for group in rows_of(members)
    ]
    return Balanced(groups, batch_size=batch, **options)


def batches(found: Balanced, steps: int) -> list[list[Row]]:
    """Global batches of the first steps of a run, over its epochs."""
    return [
        [
            tuple(row)
            for lane in range(found.lanes)
            for row in found.slice(*divmod(step, found.steps), lane).tolist()
        ]
        for step in range(steps)
    ]


@settings(max_examples=100, deadline=None)
@given(members=MEMBERS, options=OPTIONS)
def test_every_batch_holds_each_group_within_one_of_its_share(
    members: list[list[list[int]]], options: dict[str, Any]
) -> None:
    found, groups = balanced(members, options), rows_of(members)
    size = options["share"] * options["lanes"]
    if not found.steps:
        assert options["drop_last"]
        assert found.rows < size
        return
    for batch in batches(found, 2 * found.steps):
        assert len(batch) == size
        counts = [sum(row in rows for row in batch) for rows in groups.values()]
        assert sum(counts) == size
        assert max(counts) - min(counts) <= 1


@settings(max_examples=100, deadline=None)
@given(members=MEMBERS, options=OPTIONS)
def test_rows_of_a_group_come_equally_often(members: list[list[list[int]]], options: dict[str, Any]) -> None:
    """At every moment of a run two rows of a group differ by one at most; after its n places each came once."""
    found, groups = balanced(members, options), rows_of(members)
    if not found.steps:
        return
    line = [row for batch in batches(found, 3 * found.steps) for row in batch]
    for rows in groups.values():
        own = [row for row in line if row in rows]
        for start in range(0, len(own) - len(rows) + 1, len(rows)):
            assert set(own[start : start + len(rows)]) == rows
        seen = Counter(own)
        assert max(seen.values()) - min(seen[row] for row in rows) <= 1


@settings(max_examples=60, deadline=None)
@given(members=MEMBERS, options=OPTIONS, at=st.floats(0, 1))
def test_a_balanced_step_does_not_depend_on_the_steps_before_it(
    members: list[list[list[int]]], options: dict[str, Any], at: float
) -> None:
    walked = balanced(members, options)
    if not walked.steps:
        return
    every = batches(walked, 2 * walked.steps)
    step = min(int(at * len(every)), len(every) - 1)
    fresh = balanced(members, options)
    lanes = [fresh.slice(*divmod(step, fresh.steps), lane) for lane in reversed(range(fresh.lanes))]
    assert [tuple(row) for part in reversed(lanes) for row in part.tolist()] == every[step]


@settings(max_examples=60, deadline=None)
@given(members=MEMBERS, options=OPTIONS, cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_span_is_a_part_of_the_epoch(
    members: list[list[list[int]]], options: dict[str, Any], cut: tuple[float, float]
) -> None:
    options = {**options, "drop_last": False}
    batch = options.pop("share") * options["lanes"]
    found = Order([[len(block) for block in blocks] for blocks in members], batch_size=batch, **options)
    parts = [found.slice(1, step, lane) for step in range(found.steps) for lane in range(found.lanes)]
    line = np.concatenate(parts)
    start, stop = sorted(int(place * found.rows) for place in cut)
    np.testing.assert_array_equal(found.span(1, start, stop), line[start:stop])
    if start < found.rows:
        step, lane = found.lane_at(start)
        assert line[start].tolist() in found.slice(1, step, lane).tolist()


def test_the_shards_needed_next_are_named() -> None:
    rng = np.random.default_rng(0)
    members = [[rng.integers(0, 2, 8).tolist() for _ in range(4)] for _ in range(12)]
    options = {"lanes": 2, "share": 4, "window": 2, "mix_shards": 2, "seed": 0, "drop_last": True}
    found = balanced(members, options)
    for step in range(2 * found.steps):
        for lane in range(2):
            epoch, local = divmod(step, found.steps)
            needed = set(found.slice(epoch, local, lane)[:, 0].tolist())
            ahead = set(found.shards_ahead(epoch, local, lane))
            assert len(needed & ahead) >= len(needed) - 1  # a place beyond the lane's end may be another's


def test_a_group_of_one_row_fills_its_share_with_it() -> None:
    members = [[[0] * 7 + [1]]]
    options = {"lanes": 2, "share": 2, "window": 1, "mix_shards": 1, "seed": 0, "drop_last": True}
    for batch in batches(balanced(members, options), 6):
        assert batch.count((0, 0, 7)) == 2


def test_a_rank_reads_few_lanes_of_each_group() -> None:
    """16 shards in 4 lanes: in one turn of the larger group a lane touches about a quarter of the shards for it."""
    members = [[[0] * 6 + [1] * 2] * 4 for _ in range(16)]
    options = {"lanes": 4, "share": 4, "window": 2, "mix_shards": 2, "seed": 3, "drop_last": True}
    found = balanced(members, options)
    turn = 16 * 4 * 6 // 8  # steps in which the larger group is seen once
    touched = {
        r[0] for step in range(turn) for r in found.slice(*divmod(step, found.steps), 1).tolist() if r[2] < 6
    }
    assert len(touched) <= 6


def test_the_balanced_order_is_pinned() -> None:
    """Resuming an old run with a newer version must see the same rows: this list may never change."""
    members = [[[0, 0, 0, 1], [0, 1]], [[0, 0]]]
    options = {"lanes": 2, "share": 1, "window": 2, "mix_shards": 2, "seed": 7, "drop_last": True}
    assert batches(balanced(members, options), 6) == PINNED


PINNED = [
    [(0, 1, 0), (0, 1, 1)],
    [(1, 0, 1), (0, 0, 3)],
    [(0, 0, 1), (0, 1, 1)],
    [(1, 0, 0), (0, 0, 3)],
    [(0, 0, 0), (0, 1, 1)],
    [(0, 0, 2), (0, 0, 3)],
]


@pytest.mark.parametrize("groups", [2, 50])
def test_any_step_of_many_groups_is_found_at_once(groups: int) -> None:
    member = np.random.default_rng(0).integers(0, groups, (100, 16, 64))
    blocks = [[[np.flatnonzero(b == g) for b in shard] for shard in member] for g in range(groups)]
    start = time.perf_counter()
    found = Balanced(blocks, batch_size=256, lanes=4, drop_last=True, window=16, mix_shards=4, seed=0)
    rows = [found.slice(1, found.steps // 2, lane) for lane in range(4)]
    assert time.perf_counter() - start < 10  # half a second: no walk over the places before the step
    assert sum(map(len, rows)) == 256
