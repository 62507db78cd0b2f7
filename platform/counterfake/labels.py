"""One label of every row of a split, as codes: what choosing and balancing rows need without touching a picture.

Read from the shards once and kept in the local cache under the version's digest, so that the next opening reads one
small file. What the labels mean is samples.py; who is chosen is data.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from counterfake.records import Dataset
from counterfake.samples import LABEL_TYPES
from counterfake.storage import write_atomic
from counterfake.versions import Version

logger = logging.getLogger(__name__)

COLUMNS = tuple(name for name, kind in LABEL_TYPES if not pa.types.is_nested(kind))  # that have codes


@dataclasses.dataclass(frozen=True)
class Labels:
    """A label of N rows in stored order: codes (N,) int32 into `values`; -1 = the row has none."""

    codes: NDArray[np.int32]
    values: list[Any]


def read(dataset: Dataset, version: Version, split: str, column: str) -> Labels:
    """The labels of a split ("*" = all), from the cache or from the shards. Raises what opening a shard raises.

    Of a nested column, like face_box, only whether a row has one: its value is True."""
    path = _path(dataset, version, split, column)
    found = _cached(path, version.rows(split) if split != "*" else version.rows())
    if found is None:
        found = _encoded(dataset, version, split, column)
        _keep(path, found)
    codes = found.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return Labels(codes.astype(np.int32, copy=False), found.dictionary.to_pylist())


# -- private --------------------------------------------------------------------------------------------------------


def _path(dataset: Dataset, version: Version, split: str, column: str) -> Path:
    name = hashlib.sha256(f"{version.digest}/{split}/{column}".encode()).hexdigest()
    return dataset.cache / "labels" / f"{name}.arrow"


def _encoded(dataset: Dataset, version: Version, split: str, column: str) -> pa.DictionaryArray:
    """Shard by shard, so that no more than one is mapped at a time."""
    shards = version.shards(split)
    parts = [_codes(dataset.reader(shard, [column], version=version).read_all()[column]) for shard in shards]
    nothing = _codes(pa.chunked_array([], dict(LABEL_TYPES)[column]))
    found = pa.chunked_array([part for part in parts if len(part)] or [nothing])
    joined = found.unify_dictionaries().combine_chunks()
    return joined.chunk(0) if isinstance(joined, pa.ChunkedArray) else joined


def _codes(rows: pa.ChunkedArray) -> pa.DictionaryArray:
    if pa.types.is_nested(rows.type):
        rows = pc.if_else(rows.is_valid(), True, pa.scalar(None, pa.bool_()))
    return pa.concat_arrays(rows.chunks or [pa.array([], rows.type)]).dictionary_encode()


def _cached(path: Path, rows: int) -> pa.DictionaryArray | None:
    """What an earlier opening kept; None if there is nothing usable."""
    try:
        with pa.memory_map(str(path)) as source:
            found = pa.ipc.open_file(source).read_all()["label"].combine_chunks()
    except (OSError, pa.ArrowInvalid, KeyError):
        return None
    found = found.chunk(0) if isinstance(found, pa.ChunkedArray) else found
    return found if len(found) == rows else None


def _keep(path: Path, found: pa.DictionaryArray) -> None:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"label": found})
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, sink.getvalue().to_pybytes())
