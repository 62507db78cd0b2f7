"""The growth benchmark: what it makes is a dataset, and every figure is there for every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from counterfake.data import DataConfig, Loader
from counterfake.images import Preprocess
from counterfake.records import Dataset
from counterfake.versions import commit
from counterfake.workspace import Workspace
from jobs import benchmark
from jobs.benchmarks import growth, harness

STEPS = (
    "first_batch",
    "balanced_first_time",
    "balanced",
    "append",
    "commit",
    "parse",
    "open",
    "plan",
    "any_step",
    "gc_plan",
    "gc_collect",
)


@pytest.mark.parametrize("rows", [100, 5000, 41_000])
def test_a_simulated_version_survives_its_manifest(tmp_path: Path, rows: int) -> None:
    dataset = Dataset.open((tmp_path / "simulated").as_uri())
    made = growth.simulated(rows)
    assert made.rows() == rows
    assert all(sum(s.rows_per_batch) == s.rows for split in made.splits for s in made.shards(split))
    assert commit(dataset.store, made)
    assert dataset.version() == made


def test_real_shards_are_verified_and_read(tmp_path: Path) -> None:
    uri = growth._real(tmp_path, 2500)
    assert Dataset.open(uri).verify()["problems"] == []
    shape = Preprocess(size=growth.SIDE, channels=1)
    loader = Loader(
        DataConfig(uri=uri, batch_size=100, preprocess=shape, balance="maker"), cache=tmp_path / "cache"
    )
    ids = [i for batch in loader.batches(epochs=1) for i in batch.ids]
    assert len(set(ids)) == loader.rows == 2500
    assert growth._real(tmp_path, 2500) == uri
    assert Dataset.open(uri).versions() == [1]


def test_every_size_gets_a_row_of_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "SIZES", (1000, 2500))
    monkeypatch.setattr(growth, "MOST_REAL_ROWS", 2000)
    monkeypatch.setattr(growth, "REPEATED", 2)
    monkeypatch.setattr(growth, "GARBAGE", 70)

    def measure(spec: harness.Spec) -> dict[str, Any]:
        return {
            "facts": growth.figures(Path(spec.folder), spec.inputs["rows"], spec.batch_size, spec.threads)
        }

    monkeypatch.setattr(harness, "measure", measure)
    job = benchmark.BenchmarkJob(name="growth", pictures=2500, size=4, batch_size=64, repeats=2)
    result = benchmark.run(job, Workspace.at(tmp_path))
    found = result["table"]
    assert [row["rows"] for row in found] == [1000, 2500]
    for row in found:
        assert row.keys() == {"rows", "manifest_mb", *(f"{s}_{unit}" for s in STEPS for unit in ("s", "mb"))}
        assert all(value >= 0 for value in row.values())
    assert result["ours"] > 0
    assert result["ratio_to_limit"] == harness.ratio(result["ours"], result["limit"])
    assert (result["peers"], result["ratio_to_best_peer"], result["unit"]) == ({}, None, "rows/s")


def test_beyond_the_files_of_its_own_a_dataset_repeats_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "MOST_REAL_ROWS", 2000)
    monkeypatch.setattr(growth, "REPEATED", 2)
    uri = growth._real(tmp_path, 5000)
    assert len(list((tmp_path / "tiny-5000" / "shards").iterdir())) == 2
    config = DataConfig(uri=uri, batch_size=100, preprocess=Preprocess(size=growth.SIDE, channels=1))
    loader = Loader(config, cache=tmp_path / "cache")
    assert loader.rows == 5000
    assert sum(len(batch) for batch in loader.batches(epochs=1)) == 5000
