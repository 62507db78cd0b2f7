"""A split in memory: pictures as one array, in an order that depends on their content only. For judging, not for training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from counterfake.data import DataConfig, Loader
from counterfake.errors import ConfigError, DataError
from counterfake.records import Dataset
from counterfake.versions import Version, fits


@dataclasses.dataclass(frozen=True)
class Pictures:
    """N rows of a split, sorted by id."""

    pixels: NDArray[np.uint8]  # (N, size, size, C)
    class_id: NDArray[np.int64]  # (N,); -1 unknown
    rows: Rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of which version, without their pictures."""

    uri: str  # of the dataset, without @version
    version: Version
    split: str
    ids: tuple[str, ...]  # sorted

    @property
    def sha256(self) -> str:
        """Digest of the ids, which are digests of the media: names this set of pictures wherever it is stored."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()


def choose(data: DataConfig, *, limit: int = 0, cache: Path | None = None) -> Rows:
    """The rows of data.split that data.where allows; with `limit` > 0 the first so many by id, which is a random sample
    because ids are digests. Reads labels only. Raises DataError where there are none."""
    if not data.uri:
        raise ConfigError("data.uri is not set; name a dataset, like --set data.uri=mnist")
    dataset = Dataset.open(data.uri, cache=cache)
    version = dataset.version(dataset.pinned)
    table = dataset.read(version, data.split, sorted({"id", *data.where}))
    keep = np.ones(len(table), bool)
    for column, wanted in data.where.items():
        keep &= [fits(value, wanted) for value in table[column].to_pylist()]
    ids = sorted(key for key, kept in zip(table["id"].to_pylist(), keep, strict=True) if kept)
    if not ids:
        filtered = f" where {data.where}" if data.where else ""
        raise DataError(
            f"{data.uri} split {data.split} has no rows{filtered}; choose another split or filter"
        )
    return Rows(dataset.store.uri, version, data.split, tuple(ids[: limit or None]))


def load(
    data: DataConfig,
    *,
    limit: int = 0,
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pictures:
    """The chosen rows decoded by data.preprocess. progress(rows) is called after each batch that was read."""
    rows = choose(data, limit=limit, cache=cache)
    pinned = f"{rows.uri}@{rows.version.number}"
    loader = Loader(dataclasses.replace(data, uri=pinned, drop_last=False, balance=""), cache=cache)
    place = {identifier: index for index, identifier in enumerate(rows.ids)}
    side, channels = data.preprocess.size, data.preprocess.channels
    pixels = np.empty((len(rows.ids), side, side, channels), np.uint8)
    class_id = np.full(len(rows.ids), -1, np.int64)
    for batch in loader.batches(epochs=1):
        found = [(i, place[key]) for i, key in enumerate(batch.ids) if key in place]
        if found:
            source, target = (list(column) for column in zip(*found, strict=True))
            pixels[target] = batch.images.permute(0, 2, 3, 1).numpy()[source]
            class_id[target] = batch.class_id.numpy()[source]
        if progress:
            progress(len(batch))
    return Pictures(pixels, class_id, rows)
