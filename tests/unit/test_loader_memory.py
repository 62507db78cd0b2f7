"""Memory of the loader does not grow over epochs."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterfake.data import DataConfig, Loader
from counterfake.images import Preprocess
from jobs.benchmarks.loader import resident_mib
from tests.chaos import pictures

MOST_MIB = 4.0  # of growth; one batch that is kept would be 0.4 MiB, so 20 epochs of them 32


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_flat_over_twenty_epochs(tmp_path: Path) -> None:
    uri = (tmp_path / "faces").as_uri()
    pictures.store(uri, 0, 128, side=64, rows_per_shard=32)
    loader = Loader(DataConfig(uri=uri, batch_size=32, preprocess=Preprocess(size=64)))
    steps = (batch.step for batch in loader.batches(epochs=25))
    seen = [resident_mib() for step in steps if (step + 1) % loader.steps_per_epoch == 0]
    assert seen[-1] - seen[4] <= MOST_MIB, seen
