"""Data sets: content-addressed Arrow shards, reading and writing versions.

A data set is a folder on storage: `shards/<sha256>.arrow` are immutable Arrow IPC files that pyarrow, pandas, polars,
DuckDB and Hugging Face `datasets` open as they are; `versions/` says which of them make a version (versions.py).
`image` data sets hold encoded pictures as they came; `pixels` data sets hold raw uint8 of one shape.
Rows of a split are stored in order of their id, a hash, so shards are well mixed whatever order a source had, and the
same samples give the same shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from counterfake import versions
from counterfake.errors import ConfigError, CorruptError, DataError, NotFoundError, StorageError
from counterfake.samples import Report, Sample, Skipped, schema, to_sample
from counterfake.staging import Known, Plan, Spool
from counterfake.storage import Store, file_sha256, open_store, probe
from counterfake.temporary import temporary_folder
from counterfake.versions import Shard, SplitRule, Version

__all__ = [
    "Dataset",
    "Report",
    "Sample",
    "Shard",
    "Skipped",
    "SplitRule",
    "Version",
    "schema",
    "write_version",
]

SHARD_BYTES = 128 << 20  # a shard of large pictures has fewer rows than asked
GRACE_SECONDS = 86_400  # a shard so young may belong to a writer at work: garbage collection leaves it


# -- reading --------------------------------------------------------------------------------------------------------


class Dataset:
    """A data set on storage. Knows its versions; opens shards by memory map."""

    def __init__(self, store: Store, pinned: int | None, cache: Path) -> None:
        self.store, self.pinned, self.cache = store, pinned, cache
        self._loaded: dict[int, Version] = {}  # a version never changes

    @classmethod
    def open(cls, uri: str, *, cache: Path | None = None) -> Dataset:
        """The data set at `uri`, which may end in @N to pin a version. Reads nothing yet.

        cache: local folder for shards from S3 (default: a folder of this user under the system's temporary one).
        """
        root, at, number = uri.rstrip("/").rpartition("@")
        if not at or "/" in number:
            root, number = uri.rstrip("/"), ""
        if number and not number.isdigit():
            raise ConfigError(f"dataset {uri!r}: after @ comes a version number, like faces@3")
        default = Path(tempfile.gettempdir()) / f"counterfake-{os.getuid()}"
        return cls(open_store(root), int(number) if number else None, Path(cache or default))

    @property
    def name(self) -> str:
        return self.store.uri.rsplit("/", 1)[-1]

    def versions(self) -> list[int]:
        """The versions there are, ascending."""
        return versions.numbers(self.store)

    def version(self, number: int | None = None) -> Version:
        """Version `number`, else the pinned one, else the newest. Raises NotFoundError naming what there is."""
        number = number if number is not None else self.pinned
        if number is None:
            known = self.versions()
            if not known:
                raise NotFoundError(
                    f"there is no dataset at {self.store.uri}; check the name, or ingest it first"
                )
            number = known[-1]
        if number not in self._loaded:
            self._loaded[number] = versions.load(self.store, number)
        return self._loaded[number]

    def history(self) -> list[Version]:
        """Every version, oldest first."""
        return [self.version(number) for number in self.versions()]

    def local(self, shard: Shard) -> Path:
        """The shard as a local file, its SHA-256 verified. Raises NotFoundError, CorruptError."""
        return self.store.fetch(shard.key, sha256=shard.sha256, cache=self.cache)

    def reader(
        self, shard: Shard, columns: Sequence[str] | None = None, *, version: Version | None = None
    ) -> pa.ipc.RecordBatchFileReader:
        """An open shard. Columns that are not asked for are not read. Raises DataError for a foreign file.

        version: the one it is read for, which an error names (default: the newest loaded one that holds the shard).
        """
        with self._naming(shard, version):
            return self._reader(shard, columns)

    def _reader(self, shard: Shard, columns: Sequence[str] | None) -> pa.ipc.RecordBatchFileReader:
        source = pa.memory_map(str(self.local(shard)))
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.store.uri}/{shard.key} is not an Arrow IPC file: {error}") from error
        _check_ours(f"{self.store.uri}/{shard.key}", reader.schema)
        if columns is None:
            return reader
        indices = [reader.schema.get_field_index(name) for name in columns]
        if -1 in indices:
            missing = columns[indices.index(-1)]
            raise DataError(
                f"{self.store.uri} has no column {missing!r}; it has {', '.join(reader.schema.names)}"
            )
        return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=indices))

    def read(
        self, version: Version | int | None, split: str, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """A whole split as a table: for labels, and for data sets that fit in memory."""
        version = self._resolve(version)
        shards = version.shards(split)
        if not shards:
            table = schema(version.kind, version.shape).empty_table()
            return table.select(list(columns)) if columns is not None else table
        table = pa.concat_tables(
            [self.reader(shard, columns, version=version).read_all() for shard in shards]
        )
        return table.select(list(columns)) if columns is not None else table

    def samples(
        self,
        version: Version | int | None,
        split: str,
        keep: Callable[[pa.RecordBatch], NDArray[np.bool_]] | None = None,
    ) -> Iterator[Sample]:
        """The samples of a split in stored order; those of a record batch (N rows) for which `keep` gives (N,) True."""
        version = self._resolve(version)
        for shard in version.shards(split):
            reader = self.reader(shard, version=version)
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                chosen = batch if keep is None else batch.take(pa.array(np.flatnonzero(keep(batch))))
                for row in chosen.to_pylist():
                    yield to_sample(row, version.shape, split)

    def verify(
        self, version: Version | int | None = None, *, progress: Callable[[int], None] | None = None
    ) -> dict[str, Any]:
        """Read every shard again from storage: {"shards", "rows", "bytes", "problems"}, one line for each problem.

        progress(1) is called after each shard.
        """
        version = self._resolve(version)
        shards = list({s.sha256: s for split in version.splits for s in version.shards(split)}.values())
        problems = []
        for shard in shards:
            problems += [f"version {version.number}: {problem}" for problem in self._problems(shard)]
            if progress is not None:
                progress(1)
        facts = {"dataset": self.store.uri, "version": version.number, "shards": len(shards)}
        return {**facts, "rows": version.rows(), "bytes": sum(s.bytes for s in shards), "problems": problems}

    def _problems(self, shard: Shard) -> Iterator[str]:
        try:
            data = self.store.read(shard.key, sha256=shard.sha256)
            reader = pa.ipc.open_file(pa.BufferReader(data))
            found = [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)]
            if found != shard.rows_per_batch:
                yield f"{shard.key} has other rows than the manifest says"
        except (NotFoundError, CorruptError, pa.ArrowInvalid) as error:
            yield str(error)

    def _resolve(self, version: Version | int | None) -> Version:
        return version if isinstance(version, Version) else self.version(version)

    @contextlib.contextmanager
    def _naming(self, shard: Shard, version: Version | None) -> Iterator[None]:
        """Errors about a shard also say for which version and split it was read: it may be in many."""
        try:
            yield
        except (StorageError, DataError) as error:
            raise type(error)(f"{self._needs(shard, version)}: {error}") from error

    def _needs(self, shard: Shard, version: Version | None) -> str:
        newest_first = [self._loaded[number] for number in sorted(self._loaded, reverse=True)]
        for one in [version] if version is not None else newest_first:
            for split, shards in one.splits.items():
                if shard in shards:
                    return f"{self.store.uri}@{one.number} split {split}"
        return self.store.uri


def _check_ours(name: str, schema: pa.Schema) -> None:
    """Raises DataError for an Arrow file of somebody else's, or of a newer counterfake."""
    ours = (schema.metadata or {}).get(b"counterfake")
    if ours is None:
        raise DataError(f"{name} is an Arrow file that counterfake did not write")
    try:
        found = int(json.loads(ours)["schema_version"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{name} is an Arrow file that counterfake did not write: its metadata 'counterfake' names no schema"
        ) from error
    if found > versions.SCHEMA_VERSION:
        raise DataError(
            f"{name} has schema {found}, this counterfake reads up to {versions.SCHEMA_VERSION}; update counterfake"
        )


# -- writing --------------------------------------------------------------------------------------------------------


def write_version(
    uri: str,
    samples: Iterable[Sample | Skipped],
    *,
    sources: Mapping[str, Mapping[str, Any]],
    splits: SplitRule | None = None,
    parent: Version | Literal["append"] | None = None,
    report: Report | None = None,
    writer: Mapping[str, Any] | None = None,
    rows_per_shard: int = 4096,
    rows_per_batch: int = 64,
    progress: Callable[[int], None] | None = None,
    scratch: Path | None = None,
    cache: Path | None = None,
) -> Version:
    """Store samples as the next version of the data set at `uri` and return it.

    parent: the version to add to (its shards are kept), "append" for the newest one if there is any, None to start
    afresh. An append always goes onto the newest descendant of its parent, so concurrent writers lose nothing. Bytes
    that are there already are counted as duplicates in `report`; when nothing new is left, or the newest version
    holds exactly this data, that version is returned and none is written. A source keeps its terms: the same name with
    others is refused.
    sources: {name: {"licence": text, "consent": research | subjects | synthetic | none}} for every source of a row.
    scratch: folder for temporary files, as large as the media. progress(inputs seen so far) is called now and then.
    Raises DataError for no samples, mixed kinds or sizes, a source without licence and consent or with other terms than
    the parent's of that name.
    """
    dataset = Dataset.open(uri, cache=cache)
    if dataset.pinned is not None:
        raise ConfigError(f"{uri} names a version, which never changes; write to the dataset, without @N")
    _check_sources(sources)
    if not dataset.store.is_local:
        probe(dataset.store).require(dataset.store.uri)
    with temporary_folder(scratch) as folder:
        spool = Spool(folder, report if report is not None else Report(), sources)
        spool.collect(samples, progress)
        draft = _Draft(
            dataset, spool, splits or SplitRule(), rows_per_shard, rows_per_batch, dict(writer or {})
        )
        return draft.commit(parent)


def _check_sources(sources: Mapping[str, Mapping[str, Any]]) -> None:
    for name, facts in sources.items():
        if not facts.get("licence") or facts.get("consent") not in versions.CONSENTS:
            raise DataError(
                f"source {name!r} needs licence and consent (one of {', '.join(versions.CONSENTS)}), got {dict(facts)}"
            )


@dataclasses.dataclass
class _Draft:
    """A version on its way: shards are uploaded first, the manifest last, and again on top of whoever was faster."""

    dataset: Dataset
    spool: Spool
    rule: SplitRule
    rows_per_shard: int
    rows_per_batch: int
    writer: dict[str, Any]

    def commit(self, parent: Version | Literal["append"] | None) -> Version:
        known = Known()
        plan: Plan | None = None
        added: dict[str, tuple[Shard, ...]] = {}
        duplicates, conflicts, rows = (
            self.spool.report.duplicates,
            self.spool.report.conflicts,
            self.spool.report.rows,
        )
        while True:
            numbers = self.dataset.versions()
            newest = self.dataset.version(numbers[-1]) if numbers else None
            base = self._base(newest, parent)
            if base is not None:
                self._check_base(base)
                known.add(base, self._read_labels)
            fresh = self.spool.plan(known, self.rule)
            report = self.spool.report
            report.duplicates, report.conflicts = duplicates + fresh.duplicates, conflicts + fresh.conflicts
            report.rows = rows - fresh.duplicates - fresh.conflicts
            if report.rows == 0 and base is not None:
                return base
            if plan is None or not fresh.same(plan):
                plan, added = fresh, self._upload(fresh)
            if not self._all_there(added):  # a garbage collection was faster
                added = self._upload(plan)
            version = self._version(numbers[-1] + 1 if numbers else 1, base, plan, added)
            if newest is not None and newest.digest == version.digest:
                return newest
            if versions.commit(self.dataset.store, version):
                if not self._all_there(added):
                    self._upload(plan)
                return version

    def _base(self, newest: Version | None, parent: Version | Literal["append"] | None) -> Version | None:
        if parent is None or newest is None:
            return parent if isinstance(parent, Version) else None
        if parent == "append":
            return newest
        ancestor: Version = newest
        while ancestor.number > parent.number and ancestor.parent is not None:
            ancestor = self.dataset.version(ancestor.parent)
        return newest if ancestor.number == parent.number else parent

    def _check_base(self, base: Version) -> None:
        ours, theirs = (self.spool.kind, self.spool.shape), (base.kind, base.shape)
        if ours != theirs:
            raise DataError(
                f"{self.dataset.store.uri}@{base.number} holds {theirs[0]} {theirs[1] or ''} but the new samples are "
                f"{ours[0]} {ours[1] or ''}; write them to a dataset of their own"
            )
        self._sources(base)

    def _sources(self, base: Version | None) -> dict[str, dict[str, Any]]:
        """Old and new. Raises DataError where new samples would change the terms of old ones, or take theirs over."""
        old = {f"{self.dataset.store.uri}@{base.number}": base.sources} if base is not None else {}
        return versions.united({**old, "the new samples": self.spool.sources})

    def _read_labels(self, shard: Shard) -> pa.Table:
        return self.dataset.reader(shard, Known.COLUMNS).read_all()

    def _upload(self, plan: Plan) -> dict[str, tuple[Shard, ...]]:
        """Every shard of the plan on storage. One that is there but old is written again, so that it is young: with no
        version reaching it, a garbage collection may be about to delete it."""
        before = time.time() - GRACE_SECONDS / 2
        young = {entry.key for entry in self.dataset.store.list("shards/") if entry.modified > before}
        return {name: tuple(self._upload_split(rows, young)) for name, rows in plan.rows.items()}

    def _all_there(self, added: Mapping[str, tuple[Shard, ...]]) -> bool:
        there = {entry.key for entry in self.dataset.store.list("shards/")}
        return all(shard.key in there for shards in added.values() for shard in shards)

    def _upload_split(self, rows: NDArray[np.int64], young: set[str]) -> Iterator[Shard]:
        pending: list[pa.RecordBatch] = []
        for batch in self.spool.batches(rows, self.rows_per_batch):
            full = sum(b.num_rows for b in pending) + batch.num_rows > self.rows_per_shard
            if pending and (full or sum(b.nbytes for b in pending) + batch.nbytes > SHARD_BYTES):
                yield self._upload_shard(pending, young)
                pending = []
            pending.append(batch)
        if pending:
            yield self._upload_shard(pending, young)

    def _upload_shard(self, batches: list[pa.RecordBatch], young: set[str]) -> Shard:
        path = self.spool.folder / "shard.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        runs: list[tuple[int, int]] = []
        for batch in batches:
            same = runs and runs[-1][0] == batch.num_rows
            runs[-1:] = [(batch.num_rows, runs[-1][1] + 1)] if same else [*runs[-1:], (batch.num_rows, 1)]
        shard = Shard(file_sha256(path), path.stat().st_size, sum(b.num_rows for b in batches), tuple(runs))
        if shard.key not in young:
            self.dataset.store.put_file(shard.key, path)
        return shard

    def _version(
        self, number: int, base: Version | None, plan: Plan, added: Mapping[str, tuple[Shard, ...]]
    ) -> Version:
        spool = self.spool
        assert spool.kind is not None
        old = base.splits if base is not None else {}
        splits = {name: (*old.get(name, ()), *added.get(name, ())) for name in dict.fromkeys([*old, *added])}
        sources = self._sources(base)
        return Version(
            number=number,
            digest=versions.content_digest(spool.kind, spool.shape, splits, sources),
            kind=spool.kind,
            shape=spool.shape,
            splits=splits,
            parent=base.number if base is not None else None,
            sources=sources,
            counts=_counts(base.counts if base is not None else (), spool.table, plan),
            report=spool.report.to_dict(),
            writer=self.writer,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _counts(old: Iterable[Mapping[str, Any]], table: pa.Table, plan: Plan) -> tuple[dict[str, Any], ...]:
    keys = ["fake", "class_id", "maker", "identity"]
    counted = {tuple(row[key] for key in ["split", *keys]): row["rows"] for row in old}
    for split, rows in plan.rows.items():
        groups = table.select([*keys, "id"]).take(pa.array(rows)).group_by(keys).aggregate([("id", "count")])
        for row in groups.to_pylist():
            key = (split, *(row[name] for name in keys))
            counted[key] = counted.get(key, 0) + row["id_count"]
    ordered = sorted(counted.items(), key=lambda item: str(item[0]))
    return tuple(dict(zip(["split", *keys], key, strict=True)) | {"rows": n} for key, n in ordered)
