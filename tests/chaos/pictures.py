"""Small pictures without meaning, as samples and as versions, for tests of what happens to their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from counterfake.data import Batch
from counterfake.media import encode
from counterfake.records import Sample, SplitRule, write_version
from counterfake.versions import Version

RIGHTS = {"test": {"licence": "CC0-1.0", "consent": "synthetic"}}


def samples(first: int, last: int, side: int = 16) -> Iterator[Sample]:
    """Noise, each number always the same: its JPEG is about as large as its pixels."""
    for number in range(first, last):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        yield Sample(image=encode(pixels, "jpeg", 90), path=f"{number}.jpg", source="test", fake=number % 2)


def store(
    uri: str, first: int, last: int, *, side: int = 16, rows_per_shard: int = 4, **options: Any
) -> Version:
    """samples(first, last) appended to the dataset, all in the split train."""
    return write_version(
        uri,
        samples(first, last, side),
        sources=RIGHTS,
        splits=SplitRule(fractions={"train": 1.0}, by="id"),
        parent="append",
        rows_per_shard=rows_per_shard,
        rows_per_batch=min(rows_per_shard, 64),
        **options,
    )


class Heard:
    """The ids of an epoch in order, and all that was decoded, as two digests."""

    def __init__(self) -> None:
        self.ids, self.pixels, self.count = hashlib.sha256(), hashlib.sha256(), 0

    def add(self, batch: Batch) -> None:
        self.ids.update("".join(batch.ids).encode())
        self.pixels.update(np.ascontiguousarray(batch.images.numpy()))
        self.count += len(batch)

    def digests(self) -> tuple[int, str, str]:
        return self.count, self.ids.hexdigest(), self.pixels.hexdigest()
