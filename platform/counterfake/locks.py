"""Locked splits: judged as often as one likes, every look counted; rows, thumbnails and scores of single rows stay inside.

`locks/<digest of the version>/000001.json` names the locked splits and their shards. A shard once locked stays locked in every
version that holds it, so that neither an append nor another split's name opens it. `locks/looks/` has one numbered record
of every evaluation, written before anything is scored. This keeps honest people honest: who can read the storage can read
the rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from counterfake.config import canonical_json
from counterfake.errors import ConfigError, CorruptError, DataError
from counterfake.records import Dataset
from counterfake.storage import Store
from counterfake.versions import Version

LEAST = 10  # rows below which a bin, or a group, of a locked split is not shown


def lock(dataset: Dataset, version: Version, splits: Sequence[str]) -> list[str]:
    """Lock these splits of a version for good -> every locked split of it. Raises DataError for one it does not have."""
    if not splits:
        raise ConfigError(f"name the splits to lock, of {', '.join(version.splits)}")
    wanted = {name: [shard.sha256 for shard in version.shards(name)] for name in splits if name != "*"}
    if len(wanted) < len(set(splits)):
        raise ConfigError(f"name the splits to lock one by one, of {', '.join(version.splits)}")
    fresh = {name: shards for name, shards in wanted.items() if name not in locked(dataset, version)}
    if fresh:
        stored = {
            "version": version.number,
            "splits": fresh,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _numbered(dataset.store, f"locks/{version.digest}", stored)
    return sorted(locked(dataset, version))


def locked(dataset: Dataset, version: Version) -> frozenset[str]:
    """Splits of this version that hold a locked shard."""
    shards: set[str] = set()
    for entry in dataset.store.list("locks/"):
        if not entry.key.startswith("locks/looks/"):
            shards.update(*_read(dataset.store, entry.key)["splits"].values())
    return frozenset(n for n, held in version.splits.items() if shards & {shard.sha256 for shard in held})


def refuse(dataset: Dataset, version: Version, splits: Iterable[str], doing: str) -> None:
    """Raises DataError if one of the splits ("*" = all) is locked. doing: "exported", "trained on"."""
    asked = {name for split in splits for name in (version.splits if split == "*" else [split])}
    if found := sorted(asked & locked(dataset, version)):
        raise DataError(
            f"split {found[0]} of {dataset.store.uri}@{version.number} is locked and cannot be {doing}; "
            f"`counterfake run evaluate detector` judges on it, for anything else choose another split"
        )


def look(dataset: Dataset, version: Version, split: str, facts: Mapping[str, Any]) -> int:
    """Record that somebody judges on a locked split -> how many have, this time included. Raises StorageError."""
    stored = {**facts, "version": version.number, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    return _numbered(dataset.store, f"locks/looks/{version.digest}-{split}", stored)


# -- private --------------------------------------------------------------------------------------------------------


def _numbered(store: Store, prefix: str, value: Mapping[str, Any]) -> int:
    """Put under the next free number below `prefix` -> the number, from 1. Of two writers at once each gets its own."""
    number = len(store.list(f"{prefix}/")) + 1
    while not store.put_if_absent(f"{prefix}/{number:06d}.json", canonical_json(value)):
        number += 1
    return number


def _read(store: Store, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(store.read(key))
        assert isinstance(found["splits"], dict)
    except (ValueError, KeyError, AssertionError) as error:
        raise CorruptError(f"the lock {store.uri}/{key} is not readable; restore it from a copy") from error
    return found
