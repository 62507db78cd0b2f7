"""The audit of a version: what would make figures measured on it mean nothing. Kept with the dataset, asked before training.

Leaks: people, videos or near-copies on both sides of a split, or one picture twice. Warnings: labels that the file format
gives away, splits without one of the classes, faces found in one class only. Rows are read once, a record batch at a time;
of each, its id and hash stay in memory, and no picture.
Letters: N rows.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from counterfake import media
from counterfake.config import canonical_json
from counterfake.errors import CorruptError, DataError, NotFoundError
from counterfake.fingerprint import NEAR_BITS, distances, near_pairs
from counterfake.forensics import metadata
from counterfake.grouping import COLUMNS, Links
from counterfake.records import Dataset
from counterfake.versions import Version

logger = logging.getLogger(__name__)

Level = Literal["leak", "warning", "note"]
SCHEMA_VERSION = 1  # of the stored audit
EXAMPLES = 5  # of each finding
PROBED = 10_000  # files whose headers the metadata probe reads; rows lie in order of their hash, so any are a sample
APART = 0.2  # shares of fakes, or face rates, that differ by more are a warning
MARK = b"DigitalSourceType"  # of IPTC, in the XMP packet of a file that says how it was made
FEW = 50  # rows; shares of fewer say nothing

_READ = ("id", "fake", "class_id", "maker", "face_box", "face_method", *COLUMNS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact about a version. `kind` is short and stable: identity, near-copy, metadata, …"""

    level: Level
    kind: str
    text: str  # one line: what, how many, and where there is one the way out
    examples: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found in one version."""

    dataset: str  # URI
    version: int
    digest: str  # of the version
    rows: int
    findings: tuple[Finding, ...]
    balance: dict[str, dict[str, dict[str, int]]]  # split -> maker -> {"real", "fake", "unknown"}: rows
    probe: dict[str, Any] | None  # figures of the metadata probe; None where it does not apply
    created_at: str  # ISO 8601, UTC
    schema_version: int = SCHEMA_VERSION

    @property
    def leaks(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "leak"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "warning"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return tree

    def lines(self) -> list[str]:
        """For a terminal: a heading, each finding with its examples below, worst first."""
        order = {"leak": 0, "warning": 1, "note": 2}
        verdict = f"{len(self.leaks)} leaks, {len(self.warnings)} warnings"
        found = [f"{self.dataset}@{self.version}: {self.rows:,} rows, {verdict}"]
        for finding in sorted(self.findings, key=lambda finding: order[finding.level]):
            found.append(f"{finding.level:8} {finding.kind}: {finding.text}")
            found += [f"{'':8} e.g. {example}" for example in finding.examples]
        return found


def audit(
    dataset: Dataset,
    version: Version | int | None = None,
    *,
    headers: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Read a version through and store what was found as `audits/<digest>.json` in the dataset.

    headers=False: labels, people, videos and hashes alone; no picture is read, and the metadata probe says so.
    progress(rows read since the last call) comes after each record batch. Raises what opening a shard raises.
    """
    chosen = version if isinstance(version, Version) else dataset.version(version)
    rows = _Rows(dataset, chosen)
    for split, batch in _batches(dataset, chosen):
        rows.add(split, batch)
        if progress is not None:
            progress(batch.num_rows)
    probe, told = _probe(dataset, chosen) if headers else (None, _unprobed(dataset, chosen))
    found = Audit(
        dataset=dataset.store.uri,
        version=chosen.number,
        digest=chosen.digest,
        rows=chosen.rows(),
        findings=(*rows.findings(), told),
        balance=rows.balance(),
        probe=dataclasses.asdict(probe) if probe else None,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    dataset.store.put(_key(chosen), canonical_json(found.to_dict()))
    return found


def stored(dataset: Dataset, version: Version | int | None = None) -> Audit | None:
    """The audit of a version that was made before, None if there is none. Raises CorruptError, or DataError for a newer one."""
    chosen = version if isinstance(version, Version) else dataset.version(version)
    name = f"{dataset.store.uri}/{_key(chosen)}"
    try:
        tree = json.loads(dataset.store.read(_key(chosen)))
        if tree["schema_version"] > SCHEMA_VERSION:
            raise DataError(
                f"{name} was written by a newer counterfake; update, or audit again with this one"
            )
        findings = tuple(
            Finding(**{**found, "examples": tuple(found["examples"])}) for found in tree["findings"]
        )
        return Audit(**{**tree, "findings": findings})
    except NotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{name} is not readable; run counterfake data audit {dataset.store.uri} again"
        ) from error


def admit(dataset: Dataset, version: Version, *, allow_leaks: bool) -> list[str]:
    """Kinds of the leaks that the stored audit found, if they are allowed; [] if it found none or there is none.

    Raises DataError for a leak that is not allowed. A version without audit is let through with a warning in the log.
    """
    name = f"{dataset.store.uri}@{version.number}"
    found = stored(dataset, version)
    if found is None:
        logger.warning("%s was never audited for leaks; run: counterfake data audit %s", name, name)
        return []
    if found.leaks and not allow_leaks:
        first = found.leaks[0]
        more = f" and {len(found.leaks) - 1} more" if len(found.leaks) > 1 else ""
        raise DataError(
            f"the audit of {name} found a leak ({first.kind}: {first.text}){more}; ingest it again with splits that keep "
            f"those rows together, or train all the same, on the record, with --set data.allow_leaks=true"
        )
    return [finding.kind for finding in found.leaks]


# -- private: reading -----------------------------------------------------------------------------------------------


def _key(version: Version) -> str:
    return f"audits/{version.digest}.json"


def _batches(dataset: Dataset, version: Version) -> Iterator[tuple[str, pa.RecordBatch]]:
    """(split, labels of a record batch)."""
    for split in version.splits:
        for shard in version.shards(split):
            reader = dataset.reader(shard, _READ, version=version)
            for index in range(reader.num_record_batches):
                yield split, reader.get_batch(index)


class _Rows:
    """What is kept of N rows, in the order of `_batches`."""

    def __init__(self, dataset: Dataset, version: Version) -> None:
        self.dataset, self.version = dataset, version
        self.splits = list(version.splits)
        self.split = np.repeat(range(len(self.splits)), [version.rows(name) for name in self.splits])  # (N,)
        self._ids = bytearray()  # 32 bytes of each row
        self._keys: dict[str, int] = {}  # key of grouping.py -> bits of the splits that have it
        self._hashed: list[int] = []  # rows that have a perceptual hash
        self._hashes = bytearray()  # 32 bytes of each of them
        self._unhashed = self._unlabelled = 0
        self._counts: collections.Counter[tuple[str, str, str]] = collections.Counter()  # split, maker, label
        self._faces: collections.Counter[tuple[str, bool]] = collections.Counter()  # label, found
        self._methods: set[str] = set()

    def add(self, split: str, batch: pa.RecordBatch) -> None:
        start, bit = len(self._ids) // 32, 1 << self.splits.index(split)
        columns = {name: batch[name].to_pylist() for name in _READ}
        self._ids += bytes.fromhex("".join(columns["id"]))
        links = Links()
        links.add(batch)
        for key in (key for keys in links.keys for key in keys):
            self._keys[key] = self._keys.get(key, 0) | bit
        self._hashed += [start + row for row, text in enumerate(links.hashes) if text]
        self._hashes += bytes.fromhex("".join(links.hashes))
        self._unhashed += sum('"phash"' not in (text or "") for text in columns["attributes"])
        self._count(split, columns)

    def _count(self, split: str, columns: Mapping[str, list[Any]]) -> None:
        labels = [{0: "real", 1: "fake"}.get(value, "unknown") for value in columns["fake"]]
        self._counts.update(
            (split, str(maker), label) for maker, label in zip(columns["maker"], labels, strict=True)
        )
        classes = zip(labels, columns["class_id"], strict=True)
        self._unlabelled += sum(label == "unknown" and number is None for label, number in classes)
        faces = zip(columns["face_method"], labels, columns["face_box"], strict=True)
        self._faces.update((label, box is not None) for method, label, box in faces if method is not None)
        self._methods |= {method for method in columns["face_method"] if method is not None}

    def balance(self) -> dict[str, dict[str, dict[str, int]]]:
        """Rows by split, maker and label."""
        result: dict[str, dict[str, dict[str, int]]] = {split: {} for split in self.splits}
        for (split, maker, label), count in sorted(self._counts.items()):
            result[split].setdefault(maker, {"real": 0, "fake": 0, "unknown": 0})[label] = count
        return result

    def findings(self) -> Iterator[Finding]:
        yield from self._shared_keys()
        yield from self._near_copies()
        yield from self._twice()
        yield from self._labels()
        yield from self._face_rates()

    def _shared_keys(self) -> Iterator[Finding]:
        torn: dict[str, list[str]] = collections.defaultdict(list)
        for key, bits in self._keys.items():
            if bits & (bits - 1):
                kind, _, name = key.partition(":")
                where = [split for place, split in enumerate(self.splits) if bits >> place & 1]
                torn[kind].append(f"{name} in {' and '.join(where)}")
        for kind, found in sorted(torn.items()):
            text = f"{len(found):,} times rows of one {kind} lie in several splits"
            yield Finding(level="leak", kind=kind, text=text, examples=tuple(sorted(found)[:EXAMPLES]))
        if self._keys and not torn:
            yield Finding(level="note", kind="groups", text="no identity and no video lies in two splits")

    def _near_copies(self) -> Iterator[Finding]:
        if self._unhashed:
            why = (
                "these are raw pixels"
                if self.version.kind == "pixels"
                else "generated, of one colour, or ingested without"
            )
            text = f"not looked for in {self._unhashed:,} rows without a perceptual hash ({why})"
            yield Finding(level="note", kind="near-copy", text=text)
        table = np.frombuffer(self._hashes, ">u8").astype(np.uint64).reshape(-1, 4)
        kinds = np.column_stack([table, self.split[self._hashed].astype(np.uint64)])
        first = np.unique(kinds, axis=0, return_index=True)[1]  # one of each hash in each split
        pairs = first[near_pairs(table[first], NEAR_BITS)]  # (M, 2)
        rows = np.array(self._hashed, np.int64)[pairs]
        torn = self.split[rows[:, 0]] != self.split[rows[:, 1]]
        if torn.any():
            some, bits = rows[torn][:EXAMPLES], distances(table, pairs[torn][:EXAMPLES])
            examples = [
                f"{self._place(a)} and {self._place(b)}: {n} bits"
                for (a, b), n in zip(some, bits, strict=True)
            ]
            text = f"{torn.sum():,} pairs of pictures in two splits differ in at most {NEAR_BITS} of 256 bits"
            yield Finding(level="leak", kind="near-copy", text=text, examples=tuple(examples))
        elif self._hashed:
            text = f"none across splits; {len(pairs):,} pairs within one"
            yield Finding(level="note", kind="near-copy", text=text)

    def _twice(self) -> Iterator[Finding]:
        ids = np.frombuffer(self._ids, ">u8").reshape(-1, 4)
        order = np.lexsort(ids.T)
        same = np.flatnonzero((ids[order][1:] == ids[order][:-1]).all(1))
        pairs = np.stack([order[same], order[same + 1]], axis=1)
        across = self.split[pairs[:, 0]] != self.split[pairs[:, 1]]
        levels: list[tuple[Level, NDArray[np.int64], str]] = [
            ("leak", pairs[across], "in two splits"),
            ("warning", pairs[~across], "in one split"),
        ]
        for level, chosen, where in levels:
            if len(chosen):
                examples = tuple(f"{self._place(a)} and {self._place(b)}" for a, b in chosen[:EXAMPLES])
                text = f"{len(chosen):,} pictures are there twice, to the byte, {where}"
                yield Finding(level=level, kind="duplicate", text=text, examples=examples)

    def _place(self, row: np.int64) -> str:
        """ "train/real/12.jpg": split and path of a row, or its id where it has no path."""
        left = int(row)
        for shard in (shard for split in self.version.splits for shard in self.version.shards(split)):
            if left < shard.rows:
                break
            left -= shard.rows
        raw = self.version.kind == "pixels"
        reader = self.dataset.reader(shard, ["path" if raw else "image"], version=self.version)
        column = reader.read_all().column(0)
        path = (column if raw else pc.struct_field(column, "path"))[left].as_py()
        identifier = self._ids[32 * int(row) : 32 * int(row) + 32].hex()
        return f"{self.splits[self.split[row]]}/{path or identifier[:12]}"

    def _labels(self) -> Iterator[Finding]:
        total: collections.Counter[str] = collections.Counter()
        shares: dict[str, float] = {}
        for split, makers in self.balance().items():
            counts = collections.Counter(
                {n: sum(m[n] for m in makers.values()) for n in ("real", "fake", "unknown")}
            )
            total += counts
            labelled, rarer = counts["real"] + counts["fake"], min(counts["real"], counts["fake"])
            if labelled >= FEW or (
                labelled and not rarer
            ):  # a split of one class measures nothing, however small
                shares[split] = counts["fake"] / labelled
        if self._unlabelled:
            text = f"{self._unlabelled:,} rows have neither label nor class; detectors cannot learn from them"
            yield Finding(level="warning", kind="unlabelled", text=text)
        if not (total["real"] and total["fake"]):
            return
        told = ", ".join(f"{split} {share:.0%}" for split, share in shares.items())
        apart = max(shares.values(), default=0) - min(shares.values(), default=0) > APART
        text = f"share of fakes differs between splits: {told}" if apart else f"share of fakes: {told}"
        yield Finding(level="warning" if apart else "note", kind="balance", text=text)

    def _face_rates(self) -> Iterator[Finding]:
        seen = {n: self._faces[n, True] + self._faces[n, False] for n in ("real", "fake", "unknown")}
        if not (ran := sum(seen.values())):
            return
        rates = {name: self._faces[name, True] / count for name, count in seen.items() if count >= FEW}
        rate = sum(self._faces[name, True] for name in seen) / ran
        apart = abs(rates["real"] - rates["fake"]) > APART if {"real", "fake"} <= set(rates) else False
        told = "".join(f", {name} {value:.0%}" for name, value in rates.items())
        text = f"found in {rate:.0%} of {ran:,} rows ({', '.join(sorted(self._methods))}){told}"
        yield Finding(level="warning" if apart or rate < 0.5 else "note", kind="faces", text=text)


# -- private: the metadata probe ------------------------------------------------------------------------------------


def _probe(dataset: Dataset, version: Version) -> tuple[metadata.Probe | None, Finding]:
    """Its figures, None where it does not apply, and what to tell of it."""
    if version.kind == "pixels":
        return None, Finding(level="note", kind="metadata", text="not probed: raw pixels have no file format")
    files, labels, links = _headers(dataset, version)
    try:
        found = metadata.probe(files, labels, [str(group) for group in links.groups()])
    except DataError as error:
        return None, Finding(level="note", kind="metadata", text=f"not probed: {error}")
    return found, Finding(level="warning" if found.leaks else "note", kind="metadata", text=found.sentence())


def _unprobed(dataset: Dataset, version: Version) -> Finding:
    text = f"not probed yet: counterfake data audit {dataset.store.uri}@{version.number} reads the files' headers too"
    return Finding(level="note", kind="metadata", text=text)


def _headers(dataset: Dataset, version: Version) -> tuple[list[metadata.Facts], list[int], Links]:
    """Of about PROBED labelled rows, the first of each shard: what their files' headers say, labels, links."""
    files: list[metadata.Facts] = []
    labels: list[int] = []
    links = Links()
    share = PROBED / version.rows()
    for shard in (shard for split in version.splits for shard in version.shards(split)):
        reader = dataset.reader(shard, ["image", "fake", *COLUMNS], version=version)
        left = math.ceil(shard.rows * share)
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)[:left]
            left -= batch.num_rows
            known = batch.filter(pc.is_valid(batch["fake"]))
            files += [metadata.facts(_unmarked(row["bytes"])) for row in known["image"].to_pylist()]
            labels += known["fake"].to_pylist()
            links.add(known)
            if not left:
                break
    return files, labels, links


def _unmarked(data: bytes) -> bytes:
    """The file without the packet that says how it was made: all that is generated here has one, and no detector sees it."""
    return media.without_xmp(data) if MARK in (media.read_xmp(data) or b"") else data
