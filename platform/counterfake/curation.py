"""What is done with versions that exist: choose rows of one, merge several, compare two, delete what none reaches.

Every result is a new version or a report; no version is ever changed. Reading, writing and the manifest are records.py
and versions.py.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import operator
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from counterfake import locks
from counterfake.errors import ConfigError, DataError
from counterfake.records import GRACE_SECONDS, Dataset, Report, write_version
from counterfake.samples import LABELS, Sample, Skipped
from counterfake.storage import Entry
from counterfake.versions import Shard, SplitRule, Version, fits, united

Progress = Callable[[int], None]
Change = Callable[[Sample], Sample | Skipped | None]

# -- choosing rows --------------------------------------------------------------------------------------------------

_ORDERED: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*(attributes\.[^=!<>\s]+|\w+)\s*(!=|>=|<=|=|>|<)\s*(.*?)\s*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a row must satisfy: a column, or `attributes.NAME`, compared with one of several values.

    A row without a value satisfies `= null` and `!=` anything else, and no order.
    """

    column: str
    operation: str  # = != >= <= > <
    wanted: tuple[Any, ...]

    def __post_init__(self) -> None:
        if self.column.partition(".")[0] not in LABELS:
            raise ConfigError(
                f"rows cannot be chosen by {self.column!r}; choose by {', '.join(LABELS)} or attributes.NAME"
            )
        if self.operation in _ORDERED and not (len(self.wanted) == 1 and _is_number(self.wanted[0])):
            raise ConfigError(
                f"{self.column}{self.operation}{','.join(map(str, self.wanted))} needs one number to compare with"
            )

    @classmethod
    def parse(cls, text: str) -> Condition:
        """`fake=0`, `maker=a,b`, `identity!=null`, `attributes.quality>=0.5`."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{text!r} is no condition; write one like fake=0, maker=a,b or attributes.quality>=0.5"
            )
        column, operation, values = match.groups()
        words = tuple(word.strip() for word in values.split(","))
        return cls(column, operation, tuple(None if word == "null" else word for word in words))

    def holds(self, value: Any) -> bool:
        """Does a value of the column satisfy it?"""
        if self.operation in _ORDERED:
            return _is_number(value) and _ORDERED[self.operation](float(value), float(self.wanted[0]))
        same = any(_same(value, wanted) for wanted in self.wanted)
        return same if self.operation == "=" else not same

    def mask(self, batch: pa.RecordBatch) -> NDArray[np.bool_]:
        """(N,) which rows of a record batch satisfy it."""
        column, _, name = self.column.partition(".")
        values = batch.column(column).to_pylist()
        if name:
            values = [json.loads(text).get(name) if text else None for text in values]
        return np.fromiter(map(self.holds, values), bool, len(values))

    def __str__(self) -> str:
        return (
            f"{self.column}{self.operation}{','.join('null' if w is None else str(w) for w in self.wanted)}"
        )


Where = Mapping[str, Any] | Sequence[Condition | str]


def conditions(where: Where) -> list[Condition]:
    """{"maker": "camera", "identity": ["a", "b"]}, or conditions as objects or text. All must hold."""
    if isinstance(where, Mapping):
        several = (list, tuple, set, frozenset)
        return [Condition(k, "=", tuple(v) if isinstance(v, several) else (v,)) for k, v in where.items()]
    return [Condition.parse(item) if isinstance(item, str) else item for item in where]


def derive(
    dataset: Dataset,
    version: Version | int | None,
    where: Where = (),
    *,
    uri: str | None = None,
    change: Change | None = None,
    writer: Mapping[str, Any] | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> Version:
    """The rows that satisfy `where`, splits kept, as a version at `uri` (default: a new version of this dataset).

    change: what each chosen sample becomes, Skipped with the reason (counted in `report`) or None to leave it out; new
    media get a new id. progress(rows seen so far). scratch: folder for temporary files, as large as the media.
    Raises ConfigError for a condition that cannot be, DataError if no row satisfies it.
    """
    source = version if isinstance(version, Version) else dataset.version(version)
    rules = conditions(where)
    locks.refuse(dataset, source, "*", "copied")
    origin = {"derived_from": f"{dataset.store.uri}@{source.number}", "where": [str(rule) for rule in rules]}
    if change is not None:
        named = getattr(change, "__qualname__", "")
        origin["change"] = f"{change.__module__}.{named}" if named else str(change)
    used = set(source.sources) if change is not None else _sources_used(dataset, source, rules)
    return write_version(
        uri or dataset.store.uri,
        _chosen(dataset, source, rules, change),
        sources={name: facts for name, facts in source.sources.items() if name in used},
        splits=_splits_of([source]),
        report=report,
        writer=origin | dict(writer or {}),
        progress=progress,
        scratch=scratch,
        cache=dataset.cache,
    )


def merge(
    parts: Sequence[Dataset],
    uri: str,
    *,
    writer: Mapping[str, Any] | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
    scratch: Path | None = None,
    cache: Path | None = None,
) -> Version:
    """All rows of several datasets (each at its pinned or newest version) as one version at `uri`, splits kept.

    Of rows with the same id the first stays; one with the opposite label is counted as a conflict in `report`.
    Sources are united. Raises DataError where a source of one name has different terms, or kinds do not fit.
    """
    found = [(dataset, dataset.version()) for dataset in parts]
    for dataset, version in found:
        locks.refuse(dataset, version, "*", "copied")
    names = [f"{dataset.store.uri}@{version.number}" for dataset, version in found]
    rows = (sample for dataset, version in found for sample in _chosen(dataset, version, [], None))
    return write_version(
        uri,
        rows,
        sources=united(dict(zip(names, (version.sources for _, version in found), strict=True))),
        splits=_splits_of([version for _, version in found]),
        report=report,
        writer={"merged_from": names, **(writer or {})},
        progress=progress,
        scratch=scratch,
        cache=cache,
    )


def _chosen(
    dataset: Dataset,
    version: Version,
    rules: Sequence[Condition],
    change: Change | None,
) -> Iterator[Sample | Skipped]:
    for split in version.splits:
        for sample in dataset.samples(version, split, keep=lambda batch: _fitting(batch, rules)):
            changed = change(sample) if change is not None else sample
            if isinstance(changed, Skipped):
                yield changed
            elif changed is not None:
                yield changed if change is None else dataclasses.replace(changed, id="")


def _fitting(batch: pa.RecordBatch, rules: Sequence[Condition]) -> NDArray[np.bool_]:
    keep = np.ones(batch.num_rows, bool)
    for rule in rules:
        keep &= rule.mask(batch)
    return keep


def _sources_used(dataset: Dataset, version: Version, rules: Sequence[Condition]) -> set[str]:
    """Names of the sources of the rows that fit, from labels alone."""
    columns = sorted({"source", *(rule.column.partition(".")[0] for rule in rules)})
    used: set[str] = set()
    for shard in version.shards("*"):
        for batch in dataset.reader(shard, columns).read_all().to_batches():
            used |= set(batch.column("source").filter(pa.array(_fitting(batch, rules))).to_pylist())
    if not used:
        chosen = " and ".join(str(rule) for rule in rules)
        raise DataError(
            f"{dataset.store.uri}@{version.number} has no row with {chosen}; `counterfake data show` lists what it has"
        )
    return used


def _splits_of(sources: Sequence[Version]) -> SplitRule:
    """A rule that knows their splits; it never decides, since every row brings its own."""
    names = list(dict.fromkeys(name for version in sources for name in version.splits))
    return SplitRule(fractions={name: 1 / len(names) for name in names}, by="id")


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and float(value) == float(value)
    except (TypeError, ValueError):
        return False


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) and isinstance(wanted, str):
        return str(value).lower() == wanted.lower()
    return fits(value, wanted)


# -- comparing ------------------------------------------------------------------------------------------------------

_COMPARED = ("fake", "maker", "class_id", "identity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """How one version differs from another. Rows in shards that both have in the same split were not read."""

    before: str  # dataset@version
    after: str
    shards: dict[str, int]  # shared, only before, only after
    changes: list[
        dict[str, Any]
    ]  # {"change": added | removed | relabelled | moved, "maker", "split", "label", "rows"}
    sources: dict[str, list[str]]  # added, removed, changed: names

    @property
    def same(self) -> bool:
        return not self.changes and not any(self.sources.values())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def diff(
    before: tuple[Dataset, Version], after: tuple[Dataset, Version], *, progress: Progress | None = None
) -> Diff:
    """Rows added, removed, relabelled and moved between splits, counted by maker. progress(1) after each shard read."""
    ours, theirs = _shards_of(before[1]), _shards_of(after[1])
    shared = ours.keys() & theirs.keys()
    old = _labels_of(before[0], [ours[key] for key in ours if key not in shared], progress)
    new = _labels_of(after[0], [theirs[key] for key in theirs if key not in shared], progress)
    counted = collections.Counter(_changes(old, new))
    return Diff(
        before=f"{before[0].store.uri}@{before[1].number}",
        after=f"{after[0].store.uri}@{after[1].number}",
        shards={
            "shared": len(shared),
            "only before": len(ours) - len(shared),
            "only after": len(theirs) - len(shared),
        },
        changes=[
            dict(zip(("change", "maker", "split", "label"), key, strict=True)) | {"rows": rows}
            for key, rows in sorted(counted.items())
        ],
        sources=_sources_changed(before[1].sources, after[1].sources),
    )


def _shards_of(version: Version) -> dict[tuple[str, str], tuple[str, Shard]]:
    """(split, digest) -> (split, shard)."""
    return {(name, shard.sha256): (name, shard) for name in version.splits for shard in version.shards(name)}


_Labels = dict[str, tuple[str, tuple[Any, ...]]]  # id -> (split, values of _COMPARED)


def _labels_of(dataset: Dataset, shards: Sequence[tuple[str, Shard]], progress: Progress | None) -> _Labels:
    found: _Labels = {}
    for split, shard in shards:
        table = dataset.reader(shard, ["id", *_COMPARED]).read_all()
        identifiers, *columns = (table[name].to_pylist() for name in ("id", *_COMPARED))
        found.update(zip(identifiers, ((split, row) for row in zip(*columns, strict=True)), strict=True))
        if progress is not None:
            progress(1)
    return found


def _changes(old: _Labels, new: _Labels) -> Iterator[tuple[str, str, str, str]]:
    """(change, maker, split, label) of every row that is not the same in both."""
    for identifier, (split, row) in old.items():
        if identifier not in new:
            yield "removed", row[1], split, _label(row)
            continue
        now, changed = new[identifier]
        if changed != row:
            yield "relabelled", _arrow(row[1], changed[1]), now, _arrow(_label(row), _label(changed))
        if now != split:
            yield "moved", changed[1], _arrow(split, now), _label(changed)
    for identifier in new.keys() - old.keys():
        split, row = new[identifier]
        yield "added", row[1], split, _label(row)


def _label(row: tuple[Any, ...]) -> str:
    return {0: "real", 1: "fake"}.get(row[0], "unknown")


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def _sources_changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
    }


# -- deleting -------------------------------------------------------------------------------------------------------


AT_ONCE = 64  # objects deleted before storage is listed again


@dataclasses.dataclass(frozen=True, kw_only=True)
class GcPlan:
    """What garbage collection may delete: objects that were last written before `before` and that nothing needs."""

    before: float  # seconds since 1970
    shards: list[Entry]  # that no version reaches
    staging: list[Entry]  # of ingests in which nothing has happened since

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in (*self.shards, *self.staging))


def gc_plan(dataset: Dataset, *, older_than_s: float = GRACE_SECONDS) -> GcPlan:
    """What may go: unreachable shards and abandoned staging too old to belong to a writer still at work."""
    before = time.time() - older_than_s
    shards = [entry for entry in dataset.store.list("shards/") if entry.modified < before]
    reachable = _reachable(dataset)  # after the listing: a version committed in between counts
    unreachable = [entry for entry in shards if entry.key not in reachable]
    return GcPlan(before=before, shards=unreachable, staging=_abandoned(dataset, before))


def collect(dataset: Dataset, plan: GcPlan, *, progress: Progress | None = None) -> dict[str, int]:
    """Delete what the plan names and still nothing needs -> {"shards", "staging", "bytes", "kept"}.

    Everything is looked at once more: a writer that came upon a shard has written it again, and then it is young.
    progress(1) after each object.
    """
    gone = {"shards": 0, "staging": 0, "bytes": 0, "kept": 0}
    for kind, entries in (("shards", plan.shards), ("staging", plan.staging)):
        for start in range(0, len(entries), AT_ONCE):
            few = entries[start : start + AT_ONCE]
            good = _still_old(dataset, kind, plan.before) - _reachable(dataset)
            for entry in few:
                if entry.key in good:
                    dataset.store.delete(entry.key)
                    gone[kind] += 1
                    gone["bytes"] += entry.size
                gone["kept"] += entry.key not in good
                if progress is not None:
                    progress(1)
    return gone


def _still_old(dataset: Dataset, kind: str, before: float) -> set[str]:
    return {entry.key for entry in dataset.store.list(f"{kind}/") if entry.modified < before}


def _reachable(dataset: Dataset) -> set[str]:
    return {s.key for version in dataset.history() for split in version.splits for s in version.shards(split)}


def _abandoned(dataset: Dataset, before: float) -> list[Entry]:
    """Everything under staging/NAME/ where even the newest object is old."""
    folders: dict[str, list[Entry]] = collections.defaultdict(list)
    for entry in dataset.store.list("staging/"):
        folders[entry.key.split("/")[1]].append(entry)
    old = (entries for entries in folders.values() if max(e.modified for e in entries) < before)
    return [entry for entries in old for entry in entries]
