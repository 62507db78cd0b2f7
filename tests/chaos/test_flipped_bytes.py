"""OS-4: one altered byte anywhere in a shard, a manifest or a checkpoint is found before use; the error names file and version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from counterfake import checkpoint
from counterfake.data import DataConfig, Loader
from counterfake.errors import CheckpointError, CorruptError, CounterfakeError, DataError
from counterfake.images import Preprocess
from counterfake.records import Dataset
from tests.chaos import pictures

TIMES = 1000
Errors = type[CounterfakeError] | tuple[type[CounterfakeError], ...]


def flips(path: Path) -> list[tuple[int, int]]:
    """(position, bits to change) of TIMES alterations, spread over the file, its first and last bytes among them."""
    rng = np.random.default_rng(0)
    positions = np.linspace(0, path.stat().st_size - 1, TIMES).astype(int)
    return list(zip(positions.tolist(), rng.integers(1, 256, TIMES).tolist(), strict=True))


def detected(path: Path, use: Callable[[], object], errors: Errors, *named: str) -> int:
    """How many alterations of `path` make `use` raise one of `errors` that has all of `named` in its message."""
    found = 0
    with open(path, "r+b", buffering=0) as file:
        data = file.read()
        for position, bits in flips(path):
            file.seek(position)
            file.write(bytes([data[position] ^ bits]))
            found += _names(use, errors, named)
            file.seek(position)
            file.write(data[position : position + 1])
    return found


def _names(use: Callable[[], object], errors: Errors, named: tuple[str, ...]) -> bool:
    try:
        use()
    except errors as error:
        return all(name in str(error) for name in named)
    return False


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    pictures.store((tmp_path / "faces").as_uri(), 0, 8, rows_per_shard=8)
    return Dataset.open((tmp_path / "faces").as_uri())


def test_a_shard(dataset: Dataset, tmp_path: Path) -> None:
    shard = dataset.version(1).shards("train")[0]
    path = tmp_path / "faces" / shard.key
    assert detected(path, lambda: dataset.reader(shard), CorruptError, "faces@1", shard.key) == TIMES


def test_a_batch_is_not_made_of_an_altered_shard_and_the_version_is_named(
    dataset: Dataset, tmp_path: Path
) -> None:
    shard = dataset.version(1).shards("train")[0]
    (tmp_path / "faces" / shard.key).write_bytes(bytes(shard.bytes))
    config = DataConfig(uri=dataset.store.uri, batch_size=8, preprocess=Preprocess(size=16))
    with pytest.raises(CorruptError, match=rf"faces@1 split train: .*{shard.key}"):
        next(Loader(config).batches())


def test_a_manifest(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "faces" / "versions" / "000001.json"

    def use() -> object:
        return Dataset.open(dataset.store.uri).version(1)

    # a digit of the schema's number is either damage or the future; both are refused
    assert detected(path, use, (CorruptError, DataError), "faces@1") == TIMES


@pytest.mark.parametrize("name", ["generator.safetensors", "state.json"])
def test_a_checkpoint(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "step-000042"
    checkpoint.save(folder, {"generator": {"weight": torch.arange(200.0)}, "step": 42}, {"step": 42})
    assert (
        detected(folder / name, lambda: checkpoint.load(folder), CheckpointError, f"step-000042/{name}")
        == TIMES
    )
