"""Samples on their way into a version: spooled to disk without duplicates, dealt out to splits, cut into record batches.

The spool stays until the version is committed, so that a writer who was overtaken can deal its rows out again.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from counterfake.errors import DataError
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


class Known:
    """Ids, labels and groups of versions already committed; shards are read once."""

    def __init__(self) -> None:
        self.labels: dict[bytes, int | None] = {}  # id -> fake
        self.groups: dict[str, str] = {}  # group -> split
        self._seen: set[str] = set()

    def add(self, version: Version, rule: SplitRule, read: Callable[[Shard], pa.Table]) -> None:
        """read(shard) -> its columns id, fake, identity, video. What a version of another line held is forgotten."""
        if self._seen - {shard.sha256 for split in version.splits for shard in version.shards(split)}:
            self.labels, self.groups, self._seen = {}, {}, set()
        for split in version.splits:
            for shard in version.shards(split):
                if shard.sha256 not in self._seen:
                    self._seen.add(shard.sha256)
                    self._add_shard(read(shard), split, rule)

    def _add_shard(self, table: pa.Table, split: str, rule: SplitRule) -> None:
        columns = (table[name].to_pylist() for name in ("id", "fake", "identity", "video"))
        for identifier, fake, identity, video in zip(*columns, strict=True):
            self.labels[bytes.fromhex(identifier)] = fake
            if group := rule.group(identity, video):
                self.groups.setdefault(group, split)


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
                    self.report.skip(sample.path, sample.reason)
                if progress is not None and count % 64 == 0:
                    progress(count)
        self._flush()
        if not self._ends:
            raise DataError(f"no samples to store ({self._story()}); check the path of the source")
        self.table = pa.concat_tables(self._tables).combine_chunks()
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
        names = ("id", "fake", "class_id", "identity", "video", "split")
        keep: list[tuple[str, int, str, str | None]] = []
        labels: dict[str, tuple[Any, ...]] = {}  # group -> label, for the rule to balance
        duplicates = conflicts = 0
        columns = (self.table[name].to_pylist() for name in names)
        for index, (identifier, fake, class_id, identity, video, split) in enumerate(
            zip(*columns, strict=True)
        ):
            key = bytes.fromhex(identifier)
            if key in known.labels:
                clash = _contradict(known.labels[key], fake)
                conflicts, duplicates = conflicts + clash, duplicates + (not clash)
                continue
            group = rule.group(identity, video) or f"id:{identifier}"
            keep.append((identifier, index, group, split))
            if split is None and group not in known.groups:
                label = (fake, class_id)
                labels[group] = min(labels.get(group, label), label, key=str)
        dealt = rule.assign(labels)
        rows: dict[str, list[int]] = {name: [] for name in rule.fractions}
        for _, index, group, split in sorted(keep):
            name = split or known.groups.get(group) or dealt[group]
            rows.setdefault(name, []).append(index)
        return Plan({name: np.array(r, np.int64) for name, r in rows.items()}, duplicates, conflicts)

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
