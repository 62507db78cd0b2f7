"""The deterministic, resumable, elastic order of rows: arithmetic on row counts, no files, no threads.

An epoch puts the shards in a seeded order and, inside each, its record batches; that line of rows is cut
into `lanes` equal pieces. A lane mixes the record batches of a few neighbouring shards, then shuffles the rows of
`window` record batches at a time. Global batch number s of an epoch is rows [s b, (s + 1) b) of lane 0, then of lane
1, …, with b = batch_size / lanes; rank r of W reads lanes [r L / W, (r + 1) L / W), its own slice of that batch. So
the global batch does not depend on the world size, every row comes once an epoch, and any step is found from counts
in the manifest alone: no index of rows, nothing read before it.

`Balanced` gives groups of rows (classes, makers) equal shares of every batch. Each group has an order of its own, which
starts again whenever it ends; place i of the run belongs to group i mod G and takes that group's next row. So a batch
holds each group within one of its share, a row of a group of n comes once in every n places of the group, whatever its
size, and any step is found by division.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class Order:
    """Which row comes when: pure arithmetic on the row counts of record batches.

    blocks[shard][record batch] is its number of rows, or the rows of it that take part.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Rows | int]],
        *,
        batch_size: int,
        lanes: int,
        window: int,
        mix_shards: int,
        seed: int,
        drop_last: bool,
    ) -> None:
        assert batch_size % lanes == 0, f"batch_size {batch_size} is not divisible by lanes {lanes}"
        self._blocks = blocks
        self._sizes = [np.array([b if isinstance(b, int) else len(b) for b in s], np.int64) for s in blocks]
        self._totals = np.array([sizes.sum() for sizes in self._sizes], np.int64)
        self._seed, self._window, self._mix = seed, window, mix_shards
        self.lanes, self.groups = lanes, 1
        self.rows = int(self._totals.sum())
        self._batch, self._share = (
            batch_size,
            batch_size // lanes,
        )  # rows of a global batch, and a lane's part of it
        full, rest = divmod(self.rows, batch_size)
        self.steps = full if drop_last else full + (rest > 0)
        self._lane = functools.lru_cache(maxsize=4 * self.lanes)(self._lane_parts)
        self._group = functools.lru_cache(maxsize=4 * self.lanes)(self._group_pieces)
        self._rows = functools.lru_cache(maxsize=8 * self.lanes)(self._window_rows)

    def slice(self, epoch: int, step: int, lane: int) -> Rows:
        """(n, 3) shard, record batch, row: what a lane gives to one step of an epoch."""
        start = step * self._share
        stop = min(start + self._share, self._lane_length(lane))
        found = [np.empty((0, 3), np.int64)]
        for group, window, first, length in self._windows(epoch, lane, start):
            if first >= stop:
                break
            rows = self._rows(epoch, lane, group, window)
            found.append(rows[max(start - first, 0) : min(stop - first, length)])
        return np.concatenate(found)

    def span(self, epoch: int, start: int, stop: int) -> Rows:
        """(n, 3): rows [start, stop) of an epoch, counted along its global batches. 0 <= start <= stop <= rows."""
        found = [np.empty((0, 3), np.int64)]
        for step in range(start // self._batch, -(-stop // self._batch)):
            first = step * self._batch
            for lane in range(self.lanes):
                length = self._given(step, lane)
                if start < first + length and first < stop:
                    rows = self.slice(epoch, step, lane)
                    found.append(rows[max(start - first, 0) : stop - first])
                first += length
        return np.concatenate(found)

    def lane_at(self, position: int) -> tuple[int, int]:
        """(step, lane) that give the row at this position of an epoch."""
        step, rest = divmod(position, self._batch)
        for lane in range(self.lanes):
            rest -= self._given(step, lane)
            if rest < 0:
                return step, lane
        raise IndexError(f"position {position} is not in an epoch of {self.rows} rows")

    def shards_ahead(self, epoch: int, step: int, lane: int) -> list[int]:
        """Shards of the lane's current group and the next, in order."""
        start = step * self._share
        parts, ends = self._lane(epoch, lane)
        first = int(np.searchsorted(ends, start, side="right")) // self._mix * self._mix
        return [shard for shard, _, _ in parts[first : first + 2 * self._mix]]

    def _given(self, step: int, lane: int) -> int:
        """Rows that a lane gives to a step."""
        return max(0, min(self._share, self._lane_length(lane) - step * self._share))

    def _lane_length(self, lane: int) -> int:
        return self.rows // self.lanes + (lane < self.rows % self.lanes)

    def _windows(self, epoch: int, lane: int, start: int) -> Iterator[tuple[int, int, int, int]]:
        """(group, window, first row in the lane, rows) of the windows from the one that holds `start` on."""
        parts, ends = self._lane(epoch, lane)
        groups = math.ceil(len(parts) / self._mix)
        group_ends = [int(ends[min((g + 1) * self._mix, len(parts)) - 1]) for g in range(groups)]
        for group in range(groups):
            first = group_ends[group - 1] if group else 0
            if group_ends[group] <= start:
                continue
            lengths = self._group(epoch, lane, group)[1]
            for window, length in enumerate(lengths):
                if first + length > start:
                    yield group, window, first, length
                first += length

    def _lane_parts(self, epoch: int, lane: int) -> tuple[list[tuple[int, int, int]], Rows]:
        """((shard, from, to) in rows of the shard's own seeded line), and where each part ends in the lane."""
        order = _permutation(len(self._totals), self._seed, "shards", epoch)
        ends = np.cumsum(self._totals[order])
        low = sum(self._lane_length(before) for before in range(lane))
        high = low + self._lane_length(lane)
        parts = []
        for position in range(int(np.searchsorted(ends, low, side="right")), len(order)):
            shard, end = int(order[position]), int(ends[position])
            begin = end - int(self._totals[shard])
            if begin >= high:
                break
            if end > begin:
                parts.append((shard, max(low, begin) - begin, min(high, end) - begin))
        return parts, np.cumsum([to - start for _, start, to in parts], dtype=np.int64)

    def _group_pieces(
        self, epoch: int, lane: int, group: int
    ) -> tuple[list[list[tuple[int, int, int, int]]], list[int]]:
        """The windows of a group of shard parts: lists of (shard, record batch, from, to), and the rows of each."""
        parts = self._lane(epoch, lane)[0][group * self._mix : (group + 1) * self._mix]
        pieces = [piece for part in parts for piece in self._pieces(epoch, *part)]
        order = _permutation(len(pieces), self._seed, "group", epoch, lane, group)
        mixed = [pieces[i] for i in order]
        windows = [mixed[i : i + self._window] for i in range(0, len(mixed), self._window)]
        return windows, [sum(to - start for _, _, start, to in window) for window in windows]

    def _pieces(self, epoch: int, shard: int, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
        """The record batches, or ends of them, that make rows [low, high) of the shard's seeded line."""
        sizes = self._sizes[shard]
        order = _permutation(len(sizes), self._seed, "blocks", epoch, shard)
        ends = np.cumsum(sizes[order])
        for position in range(int(np.searchsorted(ends, low, side="right")), len(order)):
            block, end = int(order[position]), int(ends[position])
            begin = end - int(sizes[block])
            if begin >= high:
                return
            if end > begin:
                yield shard, block, max(low, begin) - begin, min(high, end) - begin

    def _window_rows(self, epoch: int, lane: int, group: int, window: int) -> Rows:
        """(n, 3) shuffled rows of a window."""
        chunks = []
        for shard, block, start, stop in self._group(epoch, lane, group)[0][window]:
            rows = self._block_rows(epoch, shard, block, start, stop)
            chunks.append(np.stack([np.full_like(rows, shard), np.full_like(rows, block), rows], axis=1))
        joined = np.concatenate(chunks)
        return joined[_permutation(len(joined), self._seed, "rows", epoch, lane, group, window)]

    def _block_rows(self, epoch: int, shard: int, block: int, start: int, stop: int) -> Rows:
        chosen = self._blocks[shard][block]
        rows = np.arange(chosen) if isinstance(chosen, int) else chosen
        if stop - start < len(rows):  # two lanes share it: each gets another part of it every epoch
            rows = rows[_permutation(len(rows), self._seed, "block", epoch, shard, block)]
        return rows[start:stop]


class Balanced:
    """Batches with equal shares of several groups of rows: place i of the run takes the next row of group i mod G.

    groups[g][shard] = the rows of group g in each record batch. The epoch is as long as that of all rows together;
    a group larger than its share is not seen whole in one, a smaller one comes several times, each row equally often
    within one. Every batch is full.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Sequence[Rows | int]]],
        *,
        batch_size: int,
        lanes: int,
        drop_last: bool,
        **options: int,
    ) -> None:
        """options: window, mix_shards and seed of each group's Order. Groups must not be empty."""
        self._mix = options["mix_shards"]
        share = max(1, batch_size // (len(groups) * lanes))  # a lane then mostly reads one lane of each group
        self._orders = [
            Order(blocks, batch_size=share * lanes, lanes=lanes, drop_last=False, **options)
            for blocks in groups
        ]
        self.lanes, self.groups, self._batch = lanes, len(groups), batch_size
        self.rows = sum(order.rows for order in self._orders)
        self.steps = self.rows // batch_size if drop_last else -(-self.rows // batch_size)

    def slice(self, epoch: int, step: int, lane: int) -> Rows:
        """(n, 3) shard, record batch, row: what a lane gives to one step of an epoch."""
        start, stop = self._places(epoch, step, lane)
        found = np.empty((stop - start, 3), np.int64)
        for group in range(len(self._orders)):
            found[(group - start) % len(self._orders) :: len(self._orders)] = self._next(
                group, self._before(start, group), self._before(stop, group)
            )
        return found

    def shards_ahead(self, epoch: int, step: int, lane: int) -> list[int]:
        """Shards that the lane's groups need now and next, in order."""
        start, _ = self._places(epoch, step, lane)
        found: dict[int, None] = {}
        for group, order in enumerate(self._orders):
            turn, position = divmod(self._before(start, group), order.rows)
            needed = order.shards_ahead(turn, *order.lane_at(position))
            if len(needed) <= self._mix:  # the group soon starts again
                needed += order.shards_ahead(turn + 1, 0, lane)
            found |= dict.fromkeys(needed)
        return list(found)

    def _places(self, epoch: int, step: int, lane: int) -> tuple[int, int]:
        """The places of the run that a lane fills at one step: [start, stop)."""
        each = self._batch // self.lanes
        start = (epoch * self.steps + step) * self._batch + lane * each
        return start, start + each

    def _before(self, place: int, group: int) -> int:
        """How many places before this one belong to the group."""
        return (place - group + len(self._orders) - 1) // len(self._orders)

    def _next(self, group: int, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the group's endless line."""
        order, found = self._orders[group], [np.empty((0, 3), np.int64)]
        while start < stop:
            turn, position = divmod(start, order.rows)
            length = min(stop - start, order.rows - position)
            found.append(order.span(turn, position, position + length))
            start += length
        return np.concatenate(found)


def _permutation(size: int, *key: int | str) -> Rows:
    """A seeded permutation of range(size). Sorted raw bits, because NumPy keeps those the same in all versions."""
    seed = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(seed)).random_raw(size)
    return np.argsort(bits, kind="stable")
