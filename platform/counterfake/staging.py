"""Samples on their way into a version: spooled to disk without duplicates, dealt out to splits, cut into record batches.

The spool stays until the version is committed, so that a writer who was overtaken can deal its rows out again.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from counterfake import grouping
from counterfake.errors import DataError
from counterfake.fingerprint import near_pairs
from counterfake.grouping import Links
from counterfake.samples import IMAGE, LABEL_TYPES, LABELS, Report, Sample, Skipped, schema
from counterfake.versions import Shard, SplitRule, Version

BATCH_BYTES = 32 << 20  # a record batch of large pictures has fewer rows than asked


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which spooled rows go where: split -> row numbers in id order."""

    rows: dict[str, NDArray[np.int64]]
    duplicates: int
    conflicts: int

    def same(self, other: Plan) -> bool:
        return list(self.rows) == list(other.rows) and all(
            np.array_equal(rows, other.rows[name]) for name, rows in self.rows.items()
        )


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Which rows stay together. A group is known by the number of its first row."""

    of: list[int]  # the group of each row
    names: dict[int, str]  # group -> what its hash is made of, the same in every order of reading
    settled: dict[int, str]  # group -> split, where something other than the quotas decides


class Known:
    """Ids, labels and links of versions already committed; shards are read once."""

    COLUMNS = ("id", "fake", *grouping.COLUMNS)

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.labels: dict[bytes, int | None] = {}  # id -> fake
        self.keys: dict[str, str] = {}  # key of grouping.py -> split of the first row that has it
        self.hashes: dict[str, str] = {}  # perceptual hash -> split of the first row that has it
        self._seen: set[str] = set()

    def add(self, version: Version, read: Callable[[Shard], pa.Table]) -> None:
        """read(shard) -> its COLUMNS. What a version of another line held is forgotten."""
        if self._seen - {shard.sha256 for split in version.splits for shard in version.shards(split)}:
            self._forget()
        for split in version.splits:
            for shard in version.shards(split):
                if shard.sha256 not in self._seen:
                    self._seen.add(shard.sha256)
                    self._add_shard(read(shard), split)

    def _add_shard(self, table: pa.Table, split: str) -> None:
        for identifier, fake in zip(table["id"].to_pylist(), table["fake"].to_pylist(), strict=True):
            self.labels[bytes.fromhex(identifier)] = fake
        links = Links()
        links.add(table)
        for keys, picture in zip(links.keys, links.hashes, strict=True):
            for key in keys:
                self.keys.setdefault(key, split)
            if picture:
                self.hashes.setdefault(picture, split)

    def touched(self, links: Links, near_bits: int) -> list[set[str]]:
        """For each row the splits that hold a row it is linked with."""
        found = [{self.keys[key] for key in keys if key in self.keys} for keys in links.keys]
        if self.hashes and near_bits >= 0:
            near = self._near(set(links.hashes) - {""}, near_bits)
            for splits, picture in zip(found, links.hashes, strict=True):
                splits |= near.get(picture, set())
        return found

    def _near(self, pictures: set[str], near_bits: int) -> dict[str, set[str]]:
        """For each hash the splits of the known ones that are near."""
        new, old = sorted(pictures), list(self.hashes)
        splits: dict[str, set[str]] = collections.defaultdict(set)
        for i, j in near_pairs([*new, *old], near_bits).tolist():
            if i < len(new) <= j:
                splits[new[i]].add(self.hashes[old[j - len(new)]])
        return splits


class Spool:
    """Samples as they came, on disk: media in one file, labels as record batches, duplicates left out."""

    def __init__(self, folder: Path, report: Report, sources: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder, self.report = folder, report
        self.sources = {name: dict(facts) for name, facts in sources.items()}
        self.kind: Literal["image", "pixels"] | None = None
        self.shape: tuple[int, int, int] | None = None
        self._labels: dict[bytes, int | None] = {}
        self._ends: list[int] = []
        self._rows: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []

    def collect(self, samples: Iterable[Sample | Skipped], progress: Callable[[int], None] | None) -> None:
        count = 0
        with open(self.folder / "media", "wb", buffering=1 << 20) as media:
            for count, sample in enumerate(samples, start=1):
                if isinstance(sample, Sample):
                    self._add(sample, media)
                else:
                    self.report.skip(sample.path, sample.reason, whole=sample.whole)
                if progress is not None and count % 64 == 0:
                    progress(count)
        self._flush()
        if not self._ends:
            raise DataError(f"no samples to store ({self._story()}); check the path of the source")
        self.table = pa.concat_tables(self._tables).combine_chunks()
        self.links = Links()
        self.links.add(self.table)
        self.starts = np.array([0, *self._ends[:-1]])
        self.ends = np.array(self._ends)
        if progress is not None:
            progress(count)

    def _add(self, sample: Sample, media: Any) -> None:
        key = bytes.fromhex(sample.id)
        if key in self._labels:
            if _contradict(self._labels[key], sample.fake):
                self.report.conflicts += 1
                self.report.example(sample.path, "label contradicts an earlier one for the same bytes")
            else:
                self.report.duplicates += 1
            return
        self._check(sample)
        self._labels[key] = sample.fake
        self._ends.append((self._ends[-1] if self._ends else 0) + media.write(sample.media))
        row: dict[str, Any] = {name: _text(getattr(sample, name)) for name in (*LABELS, "path", "split")}
        row["attributes"] = json.dumps(sample.attributes, sort_keys=True) if sample.attributes else None
        self._rows.append(row)
        self.report.rows += 1
        if len(self._rows) == 1024:
            self._flush()

    def _check(self, sample: Sample) -> None:
        kind: Literal["image", "pixels"] = "image" if sample.image is not None else "pixels"
        shape = sample.pixels.shape if sample.pixels is not None else None
        if self.kind is None:
            self.kind, self.shape = kind, shape
        if (kind, shape) != (self.kind, self.shape):
            raise DataError(
                f"{sample.path or sample.id} is {kind} {shape or ''} but the samples before it are {self.kind} "
                f"{self.shape or ''}; a dataset holds one kind and one size of raw pixels"
            )
        if sample.source not in self.sources:
            raise DataError(
                f"{sample.path or sample.id} comes from source {sample.source!r}, for which no licence and consent "
                f"are given; sources has {', '.join(self.sources) or 'none'}"
            )

    def _flush(self) -> None:
        columns = [pa.field(n, t) for n, t in LABEL_TYPES] + [
            pa.field(n, pa.string()) for n in ("path", "split")
        ]
        self._tables.append(pa.Table.from_pylist(self._rows, schema=pa.schema(columns)))
        self._rows = []

    def _story(self) -> str:
        skipped = ", ".join(f"{count} {reason}" for reason, count in self.report.skipped.most_common(3))
        return f"{self.report.seen} inputs seen; skipped: {skipped}" if skipped else "nothing was read"

    def plan(self, known: Known, rule: SplitRule) -> Plan:
        """Deal the rows that are not yet `known` out to the splits, in id order."""
        fresh, duplicates, conflicts = self._fresh(known)
        ids, given = (self._column(name, fresh) for name in ("id", "split"))
        groups = self._grouped(fresh, ids, given, known, rule)
        labels: dict[str, tuple[Any, ...]] = {}  # group -> label, for the rule to balance
        facts = (self._column(name, fresh) for name in ("fake", "class_id"))
        for group, label in zip(groups.of, zip(*facts, strict=True), strict=True):
            if group not in groups.settled:
                name = groups.names[group]
                labels[name] = min(labels.get(name, label), label, key=str)
        dealt = rule.assign(labels)
        rows: dict[str, list[int]] = {name: [] for name in rule.fractions}
        for row, group, split in zip(fresh, groups.of, given, strict=True):
            where = split or groups.settled.get(group) or dealt[groups.names[group]]
            rows.setdefault(where, []).append(row)
        return Plan({name: np.array(r, np.int64) for name, r in rows.items()}, duplicates, conflicts)

    def _fresh(self, known: Known) -> tuple[list[int], int, int]:
        """Rows that are not there yet, in id order; how many are, and how many of those with another label."""
        fresh, clashes = [], []
        for row, (identifier, fake) in enumerate(
            zip(*(self.table[n].to_pylist() for n in ("id", "fake")), strict=True)
        ):
            key = bytes.fromhex(identifier)
            if key in known.labels:
                clashes.append(_contradict(known.labels[key], fake))
            else:
                fresh.append((identifier, row))
        return [row for _, row in sorted(fresh)], len(clashes) - sum(clashes), sum(clashes)

    def _column(self, name: str, rows: list[int]) -> list[Any]:
        found: list[Any] = self.table[name].take(pa.array(rows, pa.int64())).to_pylist()
        return found

    def _grouped(
        self, rows: list[int], ids: list[str], given: list[str | None], known: Known, rule: SplitRule
    ) -> _Groups:
        """Groups of these rows (in id order), given their ids and the splits that their sources prescribe."""
        if rule.by == "id":
            return _Groups(list(range(len(rows))), {row: f"id:{found}" for row, found in enumerate(ids)}, {})
        links = self.links.take(rows)
        of = links.groups(rule.link_bits).tolist()
        return _Groups(
            of, _named(of, ids, links), _settled(of, given, known.touched(links, rule.link_bits), rule)
        )

    def batches(self, rows: NDArray[np.int64], rows_per_batch: int) -> Iterator[pa.RecordBatch]:
        """Record batches of these rows, media included."""
        assert self.kind is not None
        target = schema(self.kind, self.shape)
        with (
            open(self.folder / "media", "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as media,
        ):
            for chosen in self._cut(rows, rows_per_batch):
                labels = self.table.take(pa.array(chosen)).combine_chunks()
                blobs = [media[self.starts[i] : self.ends[i]] for i in chosen]
                paths = labels["path"].combine_chunks()
                named = {name: labels[name].combine_chunks() for name in LABELS} | _media(
                    blobs, paths, target
                )
                yield pa.record_batch([named[name] for name in target.names], schema=target)

    def _cut(self, rows: NDArray[np.int64], rows_per_batch: int) -> Iterator[NDArray[np.int64]]:
        start, size = 0, 0
        lengths = self.ends[rows] - self.starts[rows]
        for position, length in enumerate(lengths):
            if position > start and (position - start == rows_per_batch or size + length > BATCH_BYTES):
                yield rows[start:position]
                start, size = position, 0
            size += int(length)
        if start < len(rows):
            yield rows[start:]


def _named(of: Sequence[int], ids: Sequence[str], links: Links) -> dict[int, str]:
    """Group -> its smallest key, or the smallest id where no row has a key; rows are in id order."""
    keys: dict[int, str] = {}
    for group, own in zip(of, links.keys, strict=True):
        if own:
            keys[group] = min(keys.get(group, own[0]), *own)
    return {group: keys.get(group, f"id:{ids[group]}") for group in set(of)}


def _settled(
    of: Sequence[int], given: Sequence[str | None], touched: Sequence[set[str]], rule: SplitRule
) -> dict[int, str]:
    """Group -> the split of what it is linked with in earlier versions, else the one prescribed to one of its rows."""
    earlier: dict[int, set[str]] = {}
    prescribed: dict[int, set[str]] = {}
    for group, split, splits in zip(of, given, touched, strict=True):
        if splits:
            earlier.setdefault(group, set()).update(splits)
        if split:
            prescribed.setdefault(group, set()).add(split)
    return {group: rule.first(splits) for group, splits in (prescribed | earlier).items()}


def _text(value: Any) -> Any:
    """File names need not be UTF-8; Arrow's strings are."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _contradict(first: int | None, second: int | None) -> bool:
    return first is not None and second is not None and first != second


def _media(blobs: list[bytes], paths: pa.Array, target: pa.Schema) -> dict[str, pa.Array]:
    if "image" in target.names:
        return {
            "image": pa.StructArray.from_arrays([pa.array(blobs, pa.binary()), paths], fields=list(IMAGE))
        }
    flat = pa.array(np.frombuffer(b"".join(blobs), np.uint8))
    return {
        "pixels": pa.FixedSizeListArray.from_arrays(flat, type=target.field("pixels").type),
        "path": paths,
    }
