"""Versions of a dataset: the manifest, how it is read and committed, and the rule that splits rows.

`versions/000042.json` is written last and with put-if-absent, so a version is there whole or not at all and of two
writers one wins. Nothing ever changes it and no pointer moves: the newest number is the newest version. The manifest
knows how many rows each record batch has, so that a reader plans an epoch without opening a shard.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from counterfake import rowlists
from counterfake.config import canonical_json
from counterfake.errors import ConfigError, CorruptError, DataError, NotFoundError
from counterfake.fingerprint import BITS, NEAR_BITS
from counterfake.storage import Store

SCHEMA_VERSION = 1  # of manifest and shards; raised when an older reader would misread them
CONSENTS = ("research", "subjects", "synthetic", "none")
EXACT_GROUPS = 200_000  # up to here a split rule meets its quotas exactly; above, chance does it well enough


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One immutable Arrow IPC file. `batches` is run-length coded: (rows, how many record batches of so many rows)."""

    sha256: str
    bytes: int
    rows: int
    batches: tuple[tuple[int, int], ...]

    @property
    def key(self) -> str:
        return f"shards/{self.sha256}.arrow"

    @property
    def rows_per_batch(self) -> list[int]:
        """Rows of each record batch, in order."""
        return [rows for rows, count in self.batches for _ in range(count)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """What `versions/<number>.json` says."""

    number: int
    digest: str  # SHA-256 of what the data is: kind, shape, splits, sources; not of who wrote it when
    schema_version: int = SCHEMA_VERSION
    kind: Literal["image", "pixels"]  # encoded files, or raw pixels of one shape
    shape: tuple[int, int, int] | None  # (H, W, C) of raw pixels
    splits: dict[str, tuple[Shard, ...]]
    parent: int | None  # the version this one adds to
    sources: dict[str, dict[str, Any]]  # name -> {"licence", "consent"}
    counts: tuple[dict[str, Any], ...]  # {"split", "fake", "class_id", "maker", "identity", "rows"}
    report: dict[str, Any]  # of the ingest: seen, rows, duplicates, conflicts, skipped
    writer: dict[str, Any]  # job, commit, …
    created_at: str  # ISO 8601, UTC

    def rows(self, split: str | None = None) -> int:
        """Rows of one split, or of all."""
        names = self.splits if split is None else [split]
        return sum(shard.rows for name in names for shard in self.shards(name))

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split, in order; "*" is every split. Raises DataError naming the splits there are."""
        if split == "*":
            return tuple(shard for shards in self.splits.values() for shard in shards)
        if split not in self.splits:
            raise DataError(f"version {self.number} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def names(
        self, column: Literal["maker", "identity"], where: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Sorted makers or identities of the rows, over all splits, that `where` does not rule out."""
        return sorted({row[column] for row in self.counts_of("*", where) if row[column] is not None})

    def counts_of(self, split: str, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The entries of `counts` of a split, "*" for all, that what `where` says of counted columns does not rule out."""
        rules = {key: value for key, value in (where or {}).items() if key in _COUNTED}
        return [
            row
            for row in self.counts
            if split in ("*", row["split"]) and all(fits(row[key], value) for key, value in rules.items())
        ]

    def describe(self) -> dict[str, Any]:
        """What a person asks first, JSON-able: rows of each split, counts, sources, report, writer."""
        tree = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        splits = {
            name: {"rows": self.rows(name), "shards": len(shards), "bytes": sum(s.bytes for s in shards)}
            for name, shards in self.splits.items()
        }
        return {**tree, "splits": splits, "counts": list(self.counts), "rows": self.rows()}


_COUNTED = ("fake", "class_id", "maker", "identity")


def fits(value: Any, wanted: Any) -> bool:
    """Does a row's value satisfy one entry of `where`: equal, one of several, or on a list of rows ("@URI#part").

    "1" fits 1, as typed on a command line."""
    if rowlists.is_list(wanted):
        return value in rowlists.ids(wanted)
    if isinstance(wanted, list | tuple | set | frozenset):
        return any(fits(value, one) for one in wanted)
    return str(value) == wanted if isinstance(wanted, str) and value is not None else value == wanted


def united(sources: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """{where: its sources} -> all sources. Raises DataError for one name with two meanings: its rows could not be told apart."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, own in sources.items():
        for name, facts in own.items():
            first, known = found.setdefault(name, (where, dict(facts)))
            if known != facts:
                raise DataError(
                    f"source {name!r} is {known} in {first} but {dict(facts)} in {where}; ingest one of them again "
                    "under another source.name"
                )
    return {name: facts for name, (_, facts) in found.items()}


def content_digest(
    kind: str,
    shape: Sequence[int] | None,
    splits: Mapping[str, Sequence[Shard]],
    sources: Mapping[str, Any],
) -> str:
    """The digest of a version: equal for equal data, whoever wrote it, when, and after how many attempts."""
    shards = {name: [shard.sha256 for shard in listed] for name, listed in splits.items()}
    content = {"schema": SCHEMA_VERSION, "kind": kind, "shape": list(shape or []), "splits": shards}
    return hashlib.sha256(canonical_json({**content, "sources": sources})).hexdigest()


# -- manifests on storage -------------------------------------------------------------------------------------------


def numbers(store: Store) -> list[int]:
    """The versions there are, ascending."""
    found = (re.fullmatch(r"versions/(\d{6,})\.json", entry.key) for entry in store.list("versions/"))
    return sorted(int(match[1]) for match in found if match)


def load(store: Store, number: int) -> Version:
    """One version, its own digest verified. Raises NotFoundError, CorruptError, or DataError for a newer schema."""
    name = f"{store.uri}@{number}"
    try:
        data = store.read(_key(number))
    except NotFoundError:
        known = numbers(store)
        there = f"it has {_ranges(known)}" if known else "it has no versions at all; ingest first"
        raise NotFoundError(f"dataset {store.uri} has no version {number}; {there}") from None
    return _parse(name, data, number)


def commit(store: Store, version: Version) -> bool:
    """Write the manifest, last of all. False if another writer has the number.

    Read back, because a store whose put-if-absent is not atomic tells two writers that they have won.
    """
    data = _render(_to_tree(version))
    return store.put_if_absent(_key(version.number), data) and store.read(_key(version.number)) == data


def _key(number: int) -> str:
    return f"versions/{number:06d}.json"


def _to_tree(version: Version) -> dict[str, Any]:
    tree = {field.name: getattr(version, field.name) for field in dataclasses.fields(version)}
    tree["splits"] = {
        name: [[s.sha256, s.bytes, s.rows, [list(run) for run in s.batches]] for s in shards]
        for name, shards in version.splits.items()
    }
    plain: dict[str, Any] = json.loads(json.dumps(tree, allow_nan=False))  # tuples as they will be read
    return plain


def _render(tree: Mapping[str, Any]) -> bytes:
    body = {**tree, "manifest_sha256": hashlib.sha256(canonical_json(tree)).hexdigest()}
    return json.dumps(body, indent=1, allow_nan=False).encode()


def _parse(name: str, data: bytes, number: int) -> Version:
    try:
        tree = json.loads(data)
        schema = int(tree["schema_version"])
        tree.pop("manifest_sha256", None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"the manifest of {name} is not readable; restore it from a copy") from error
    if schema > SCHEMA_VERSION:
        raise DataError(
            f"{name} has schema {schema}, this counterfake reads up to {SCHEMA_VERSION}; update counterfake"
        )
    if _render(tree) != data or tree["number"] != number:  # to the byte
        raise CorruptError(
            f"the manifest of {name} was altered (its SHA-256 does not fit); restore it from a copy"
        )
    tree["shape"] = tuple(tree["shape"]) if tree["shape"] else None
    tree["counts"] = tuple(tree["counts"])
    tree["splits"] = {
        split: tuple(Shard(s[0], s[1], s[2], tuple((run[0], run[1]) for run in s[3])) for s in shards)
        for split, shards in tree["splits"].items()
    }
    return Version(**tree)


def _ranges(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]} ({len(values)} versions)"


# -- splits ---------------------------------------------------------------------------------------------------------


def _default_fractions() -> dict[str, float]:
    return {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Which split a row goes to. Rows linked by identity, video, `also` or a near-copy (grouping.py) stay together.

    Groups are ordered by hash and dealt out by quota within each label (fake, class_id), so the result does not
    depend on the order of reading and small sets get some of each label in each split. Three things come before that,
    in this order: a split that a row's source prescribes; the split of an earlier version's row that the group is linked
    with; the split prescribed to another row of the group. Where these name several, the first in `fractions` is taken.
    """

    fractions: dict[str, float] = dataclasses.field(default_factory=_default_fractions)
    by: Literal["identity", "id"] = "identity"  # id: every picture by itself, for data without people
    near_copies: bool = True  # pictures with near perceptual hashes stay together (of by="identity")
    near_bits: int = (
        NEAR_BITS  # bits of 256 in which near hashes differ at most; beyond 31 rows are compared pairwise
    )
    seed: int = 0

    def __post_init__(self) -> None:
        total = sum(self.fractions.values())
        if not self.fractions or min(self.fractions.values()) < 0 or abs(total - 1) > 1e-6:
            raise ConfigError(f"split fractions must be >= 0 and add up to 1, got {self.fractions}")
        if not 0 <= self.near_bits < BITS:
            raise ConfigError(f"splits.near_bits must lie in 0-{BITS - 1}, got {self.near_bits}")

    @property
    def link_bits(self) -> int:
        """What grouping.py compares hashes by: near_bits, or -1 for not at all."""
        return self.near_bits if self.near_copies else -1

    def first(self, splits: Iterable[str]) -> str:
        """The one of several splits that a group goes to: the first in `fractions`, then by name."""
        order = {name: place for place, name in enumerate(self.fractions)}
        return min(splits, key=lambda name: (order.get(name, len(order)), name))

    def assign(self, groups: Mapping[str, tuple[Any, ...]]) -> dict[str, str]:
        """{group: label} -> {group: split}."""
        names = [name for name, fraction in self.fractions.items() if fraction > 0]
        shares = [self.fractions[name] for name in names]
        hashed = {group: self._hash(group) for group in groups}
        if len(groups) > EXACT_GROUPS:
            return {group: names[_bucket(value / 2**64, shares)] for group, value in hashed.items()}
        strata: dict[str, list[str]] = collections.defaultdict(list)
        for group in sorted(groups, key=hashed.__getitem__):
            strata[str(groups[group])].append(group)
        result: dict[str, str] = {}
        carry = [0.0] * len(names)  # what rounding owed each split so far: many tiny strata still add up
        for label in sorted(strata):
            members = iter(strata[label])
            quotas = _quotas(len(strata[label]), shares, carry, each=len(strata) <= 20)
            for name, quota in zip(names, quotas, strict=True):
                result.update((next(members), name) for _ in range(quota))
        return result

    def _hash(self, group: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed}/{group}".encode(), digest_size=8).digest())


def _bucket(position: float, shares: Sequence[float]) -> int:
    for index, share in enumerate(shares):
        position -= share
        if position < 0:
            return index
    return len(shares) - 1


def _quotas(count: int, shares: Sequence[float], carry: list[float], each: bool) -> list[int]:
    """Whole numbers that add up to `count`, nearest to share * count + carry; at least 1 `each` where they suffice.

    `carry` is updated with what is still owed.
    """
    ideal = [share * count + owed for share, owed in zip(shares, carry, strict=True)]
    least = 1 if each and count >= len(shares) else 0
    quotas = [max(least, int(value)) for value in ideal]
    while sum(quotas) < count:
        quotas[max(range(len(quotas)), key=lambda i: ideal[i] - quotas[i])] += 1
    while sum(quotas) > count:
        spare = [i for i in range(len(quotas)) if quotas[i] > least]
        quotas[min(spare, key=lambda i: ideal[i] - quotas[i])] -= 1
    carry[:] = [value - quota for value, quota in zip(ideal, quotas, strict=True)]
    return quotas
