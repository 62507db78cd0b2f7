"""Bulk scoring on Ray: the bits of one process, and only missing parts are done again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from counterfake import verdicts
from counterfake.data import DataConfig
from counterfake.forensics.benford import BenfordConfig
from counterfake.forensics.forest import ForestConfig
from counterfake.records import SplitRule, write_version
from counterfake.workspace import Workspace
from jobs import fit_ensemble, score, train_benford
from jobs.fit_ensemble import EnsembleJob
from jobs.score import ScoreJob
from jobs.train_benford import BenfordJob
from tests.unit.test_detection_jobs import samples

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace.at(tmp_path_factory.mktemp("runs"))
    splits = SplitRule(fractions={"train": 0.4, "calibration": 0.3, "test": 0.3})
    terms = {"made": {"licence": "CC0", "consent": "synthetic"}}
    write_version(workspace.dataset("made"), samples(240), sources=terms, splits=splits, rows_per_batch=8)
    for name, bases in (("a", (10,)), ("b", (40,))):
        features, forest = BenfordConfig(qualities=(100,), bases=bases), ForestConfig(trees=10)
        train_benford.run(
            BenfordJob(name=name, data=DataConfig(uri="made"), features=features, forest=forest, register_as=name, validation=""),
            workspace,
        )  # fmt: skip
    held = DataConfig(uri="made", split="calibration")
    fit_ensemble.run(
        EnsembleJob(members=("a", "b"), data=held, alpha=0.15, bootstraps=5, promote=""), workspace
    )
    return workspace


def table(result: dict) -> dict:
    return verdicts.read(result["verdicts"], result["digest"]).to_pydict()


def test_two_workers_give_the_bits_of_one_process(ray_local: object, place: Workspace) -> None:
    job = ScoreJob(model="ensemble/1", data=DataConfig(uri="made", split="test"), part_rows=8)
    here = score.run(dataclasses.replace(job, into=(place.home / "here").as_uri()), place)
    shared = score.run(
        dataclasses.replace(job, into=(place.home / "shared").as_uri(), workers=2, threads=1), place
    )
    assert shared["parts"]["all"] == here["parts"]["all"] > 4
    assert table(shared) == table(here)
    assert shared["counts"] == here["counts"]


def test_workers_go_on_with_what_is_missing(ray_local: object, place: Workspace) -> None:
    into = place.home / "again"
    job = ScoreJob(
        model="ensemble/1",
        data=DataConfig(uri="made", split="*"),
        part_rows=16,
        workers=2,
        into=into.as_uri(),
    )
    first = score.run(job, place)
    whole, parts = table(first), sorted(into.glob("part-*.parquet"))
    for part in parts[1:4]:
        Path(part).unlink()
    again = score.run(job, place)
    assert again["parts"] == {"all": len(parts), "reused": len(parts) - 3}
    assert table(again) == whole
    assert sum(pq.read_metadata(part).num_rows for part in parts) == 240
