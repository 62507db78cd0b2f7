"""Folds of one dataset version for cross-validation: linked rows on one side, labels in equal shares, no row copied.

What a split must not tear apart (grouping.py: identity, video, `also`, near-copies) is one component and goes to one fold.
Every fold is cut once more into cells, by component as well, so that an inner validation part can be taken from the folds
that train. The result is a list of rows on storage (rowlists.py) with the parts train-F, validation-F, rest-F (both) and
test-F of every fold F.
Letters: N rows, C components.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from counterfake import locks, rowlists
from counterfake.errors import ConfigError, DataError
from counterfake.fingerprint import BITS, NEAR_BITS
from counterfake.grouping import COLUMNS, Links
from counterfake.records import Dataset
from counterfake.versions import Version, fits

Part = Literal["train", "validation", "rest", "test"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldRule:
    """How rows are dealt. Components come largest first, equal ones by a hash of the seed and their smallest id."""

    folds: int = 5
    validation: float = 0.125  # share of each training fold that is held out inside, for the best epoch
    stratify: tuple[str, ...] = (
        "difficulty",
    )  # attributes whose values every fold has alike, beside the label
    near_bits: int = NEAR_BITS  # bits of 256 in which near-copies differ at most; -1: hashes do not link
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 2 or not 0 < self.validation <= 0.5:
            raise ConfigError(
                f"folds must be at least 2 and validation in (0, 0.5], got {self.folds} and {self.validation}"
            )
        if not -1 <= self.near_bits < BITS:
            raise ConfigError(f"near_bits must lie in -1 to {BITS - 1}, got {self.near_bits}")

    @property
    def cells(self) -> int:
        """Cells of each fold, of which one is validation."""
        return max(2, round(1 / self.validation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folds:
    """The dealt rows: which list to name, and what is told of it."""

    uri: str  # of the list of rows
    component: dict[str, str]  # id -> smallest id of its component
    fold: dict[str, int]  # id -> fold that tests it
    rows: list[dict[str, int]]  # of each fold: {"real", "fake", "components"}

    def where(self, fold: int, part: Part) -> dict[str, Any]:
        """What `DataConfig.where` needs to choose a part of a fold."""
        return {"id": f"{rowlists.MARK}{self.uri}#{part}-{fold}"}


def deal(
    dataset: Dataset, version: Version, split: str, rule: FoldRule, root: str, where: Mapping[str, Any] | None = None
) -> Folds:  # fmt: skip
    """Deal the labelled rows of a split ("*" = all) that `where` allows, and store the list below the URI `root`.

    Raises DataError for a locked split, or where a class has fewer components than cells would need."""
    locks.refuse(dataset, version, [split], "dealt into folds")
    ids, fake, strata, component = _rows(dataset, version, split, rule, where or {})
    fold = dealt(component, strata, rule.folds, [f"{rule.seed}/{name}" for name in _names(ids, component)])
    cell = np.zeros(len(ids), np.int64)
    for number in range(rule.folds):
        inside = np.flatnonzero(fold == number)
        names = [f"{rule.seed}/cell/{ids[row]}" for row in inside]
        cell[inside] = dealt(component[inside], [strata[row] for row in inside], rule.cells, names)
    _both_classes(fake, fold, cell, rule)
    cells: dict[str, list[str]] = collections.defaultdict(list)
    for row, name in sorted(enumerate(ids), key=lambda pair: pair[1]):
        cells[f"{fold[row]}.{cell[row]}"].append(name)
    uri = rowlists.write(root, cells, _parts(cells, rule))
    return Folds(
        uri=uri, component=dict(zip(ids, _names(ids, component), strict=True)),
        fold=dict(zip(ids, fold.tolist(), strict=True)), rows=[_counted(fake, component, fold == f) for f in range(rule.folds)],
    )  # fmt: skip


def dealt(
    component: NDArray[np.int64], strata: Sequence[str], folds: int, names: Sequence[str]
) -> NDArray[np.int64]:
    """(N,) the fold of each row. A component goes where its commonest stratum has fewest rows so far, then all strata.

    component (N,) numbers; strata N labels; names N texts, the smallest of a component decides its place in the order."""
    members: dict[int, list[int]] = collections.defaultdict(list)
    for row, number in enumerate(component.tolist()):
        members[number].append(row)
    kinds = sorted(set(strata))
    counts = {c: np.array([[strata[r] for r in rows].count(k) for k in kinds]) for c, rows in members.items()}
    hashed = {c: _hash(min(names[r] for r in rows)) for c, rows in members.items()}
    filled, fold = np.zeros((folds, len(kinds)), np.int64), np.zeros(len(component), np.int64)
    for c in sorted(members, key=lambda c: (-len(members[c]), hashed[c])):
        kind = int(counts[c].argmax())
        best = min(range(folds), key=lambda f: (filled[f, kind], filled[f].sum(), f))
        filled[best] += counts[c]
        fold[members[c]] = best
    return fold


# -- private --------------------------------------------------------------------------------------------------------


def _rows(
    dataset: Dataset, version: Version, split: str, rule: FoldRule, where: Mapping[str, Any]
) -> tuple[list[str], NDArray[np.int64], list[str], NDArray[np.int64]]:
    """Ids, labels (N,), strata and components (N,) of the rows that are dealt."""
    table = dataset.read(version, split, list(dict.fromkeys(["id", "fake", *COLUMNS, *where])))
    keep = [
        row["fake"] is not None and all(fits(row[key], value) for key, value in where.items())
        for row in table.to_pylist()
    ]
    table = table.filter(pa.array(keep, pa.bool_()))
    if not len(table):
        raise DataError(f"{dataset.store.uri}@{version.number} split {split} has no labelled rows to deal")
    links = Links()
    links.add(table)
    ids = table["id"].to_pylist()
    links.keys = [(*keys, f"id:{name}") for keys, name in zip(links.keys, ids, strict=True)]
    attributes = [json.loads(text) if text else {} for text in table["attributes"].to_pylist()]
    labels = table["fake"].to_pylist()
    strata = [
        "/".join([str(label), *(str(found.get(name)) for name in rule.stratify)])
        for label, found in zip(labels, attributes, strict=True)
    ]
    return ids, np.array(labels, np.int64), strata, links.groups(rule.near_bits)


def _names(ids: Sequence[str], component: NDArray[np.int64]) -> list[str]:
    """N names: of each row the smallest id of its component."""
    first: dict[int, str] = {}
    for name, number in zip(ids, component.tolist(), strict=True):
        first[number] = min(name, first.get(number, name))
    return [first[number] for number in component.tolist()]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _parts(cells: Mapping[str, Sequence[str]], rule: FoldRule) -> dict[str, list[str]]:
    """Names of the cells of every part. Validation takes another cell of the others for every fold."""
    parts: dict[str, list[str]] = {}
    for fold in range(rule.folds):
        others = [name for name in sorted(cells) if not name.startswith(f"{fold}.")]
        inner = [name for name in others if name.endswith(f".{fold % rule.cells}")]
        parts[f"test-{fold}"] = [name for name in sorted(cells) if name not in others]
        parts[f"rest-{fold}"], parts[f"validation-{fold}"] = others, inner
        parts[f"train-{fold}"] = [name for name in others if name not in inner]
    return parts


def _both_classes(
    fake: NDArray[np.int64], fold: NDArray[np.int64], cell: NDArray[np.int64], rule: FoldRule
) -> None:
    """Every test part and every validation part needs both classes. Raises DataError."""
    for number in range(rule.folds):
        inner = (fold != number) & (cell == number % rule.cells)
        for name, rows in (("test", fold == number), ("validation", inner)):
            if len(np.unique(fake[rows])) < 2:
                raise DataError(
                    f"the {name} part of fold {number} of {rule.folds} has no rows of one class ({len(fake)} rows "
                    f"in all); choose fewer folds, or more validation"
                )


def _counted(
    fake: NDArray[np.int64], component: NDArray[np.int64], rows: NDArray[np.bool_]
) -> dict[str, int]:
    return {
        "real": int((fake[rows] == 0).sum()),
        "fake": int((fake[rows] == 1).sum()),
        "components": len(np.unique(component[rows])),
    }
