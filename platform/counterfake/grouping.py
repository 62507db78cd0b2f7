"""Which rows must not be torn apart by a split: those of one person, one video, one scene, or one picture kept twice.

Rows are linked by keys (`identity:anna`, `video:a/001`, and whatever a source lists in `attributes["also"]`, such as the
donor of a face swap) and by perceptual hashes that are near (`attributes["phash"]`). What is linked, directly or
through others, is one group. Splits (staging.py) and their audit (audit.py) both ask here.
Letters: N rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from counterfake.fingerprint import NEAR_BITS, Words, components, is_hash, near_pairs, words

COLUMNS = ("identity", "video", "attributes")  # that say what a row is linked with


@dataclasses.dataclass
class Links:
    """Of N rows: the keys of each, and its hash ("" = none)."""

    keys: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    hashes: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, table: pa.Table | pa.RecordBatch) -> None:
        """The rows of a table with COLUMNS."""
        for identity, video, text in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True):
            attributes = _attributes(text)
            self.keys.append(_keys(identity, video, attributes))
            self.hashes.append(_hash(attributes))

    def take(self, rows: Sequence[int]) -> Links:
        return Links([self.keys[row] for row in rows], [self.hashes[row] for row in rows])

    def hashed(self) -> tuple[NDArray[np.int64], Words]:
        """(M,) the rows that have a hash, and (M, 4) their hashes."""
        rows = [row for row, text in enumerate(self.hashes) if text]
        return np.array(rows, np.int64), words([self.hashes[row] for row in rows])

    def groups(self, near_bits: int = NEAR_BITS) -> NDArray[np.int64]:
        """(N,) the group of each row: the number of its first row. near_bits -1: hashes do not link."""
        ends = [self._key_edges()]
        if near_bits >= 0:
            rows, table = self.hashed()
            _, first, same = np.unique(table, axis=0, return_index=True, return_inverse=True)
            ends += [
                np.stack([rows, rows[first[same.ravel()]]], axis=1),
                rows[first[near_pairs(table[first], near_bits)]],
            ]
        a, b = np.concatenate(ends).T
        return components(len(self), a, b)

    def _key_edges(self) -> NDArray[np.int64]:
        """(M, 2) each row with the first that has the same key."""
        first: dict[str, int] = {}
        found = [(row, first.setdefault(key, row)) for row, keys in enumerate(self.keys) for key in keys]
        return np.array(found, np.int64).reshape(-1, 2)


# -- private --------------------------------------------------------------------------------------------------------


def _attributes(text: str | None) -> dict[str, Any]:
    if text is None or not ('"phash"' in text or '"also"' in text):  # most rows of a million have neither
        return {}
    found = json.loads(text)
    return found if isinstance(found, dict) else {}


def _keys(identity: str | None, video: str | None, attributes: dict[str, Any]) -> tuple[str, ...]:
    also = attributes.get("also") or []
    own = [f"identity:{identity}"] if identity is not None else []
    own += [f"video:{video}"] if video is not None else []
    return (*own, *(key for key in also if isinstance(key, str))) if isinstance(also, list) else tuple(own)


def _hash(attributes: dict[str, Any]) -> str:
    text = attributes.get("phash")
    return str(text) if is_hash(text) else ""
