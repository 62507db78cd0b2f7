"""Bulk scoring: the numbers of serving, part by part, and never those of another ensemble."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from counterfake import locks, media, runtime, verdicts
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.forensics.benford import BenfordConfig
from counterfake.forensics.forest import ForestConfig
from counterfake.records import Dataset, SplitRule, write_version
from counterfake.registry import Registry
from counterfake.workspace import Workspace
from jobs import fit_ensemble, score, train_benford
from jobs.fit_ensemble import EnsembleJob
from jobs.score import ScoreJob
from jobs.train_benford import BenfordJob
from serving.schemas import Verdict
from tests.unit.test_detection_jobs import samples


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a data set and two ensembles of the same two forests, calibrated differently."""
    workspace = Workspace.at(tmp_path_factory.mktemp("runs"))
    write_version(
        workspace.dataset("made"), samples(240), sources={"made": {"licence": "CC0", "consent": "synthetic"}},
        splits=SplitRule(fractions={"train": 0.4, "calibration": 0.3, "test": 0.3}), rows_per_batch=8,
    )  # fmt: skip
    for name, bases in (("a", (10, 20)), ("b", (40,))):
        features = BenfordConfig(qualities=(100,), bases=bases)
        forest = ForestConfig(trees=10)
        train_benford.run(
            BenfordJob(name=name, data=DataConfig(uri="made"), features=features, forest=forest, register_as=name, validation=""),
            workspace,
        )  # fmt: skip
    for alpha in (0.15, 0.2):
        fit_ensemble.run(
            EnsembleJob(members=("a", "b"), data=DataConfig(uri="made", split="calibration"), alpha=alpha, bootstraps=5, promote=""),
            workspace,
        )  # fmt: skip
    return workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, one of them too small for every detector, and one that is none."""
    path = tmp_path_factory.mktemp("pictures")
    for number, sample in enumerate(samples(9)):
        (path / f"{number}.png").write_bytes(sample.media)
    (path / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (path / "tiny.png").write_bytes(media.encode(np.zeros((17, 17, 3), np.uint8), "png"))
    return path


def rows(result: dict) -> list[dict]:
    parts = sorted(Path(result["verdicts"].removeprefix("file://")).glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_verdicts_are_those_of_serving_bit_for_bit(place: Workspace, folder: Path) -> None:
    result = score.run(ScoreJob(model="ensemble/1", path=str(folder), part_rows=4), place)
    loaded = verdicts.load(place.cache / "bundles" / result["digest"])
    found = {row["path"]: row for row in rows(result)}
    assert len(found) == result["pictures"] == 11
    for name, row in found.items():
        served = loaded.verdict((folder / name).read_bytes())
        for key in ("verdict", "reason", "probability_fake"):
            assert row[key] == served[key], (name, key)
        own = {d["name"]: d["probability"] for d in served["detectors"]}
        assert {n: row[f"probability_{n}"] for n in own} == own
    assert found["broken.jpg"]["reason"] == "undecodable"
    assert found["tiny.png"]["verdict"] == "no_verdict"
    assert sum(result["counts"].values()) == 11
    json.dumps(result)


def test_columns_have_the_names_and_values_of_the_http_answer(place: Workspace) -> None:
    loaded = verdicts.load(Registry.at(place).fetch("ensemble/1", place.cache))
    pictures = [verdicts.Picture(id="", path="", data=sample.media) for sample in samples(3)]
    with ThreadPoolExecutor(1) as pool:
        found = verdicts.judge(loaded, pictures, pool)
    for answer, row in zip(found, verdicts.table(loaded, pictures, found).to_pylist(), strict=True):
        wire = Verdict.model_validate(
            {**answer, "request_id": "r", "model": {**answer["model"], "version": 1}}
        )
        assert (row["verdict"], row["reason"]) == (wire.verdict, wire.reason)
        assert row["probability_fake"] == wire.probability_fake
        assert [row[f"probability_{d.name}"] for d in wire.detectors] == [
            d.probability for d in wire.detectors
        ]


def test_a_probability_does_not_depend_on_its_place_in_a_batch() -> None:
    """torch's sigmoid of 48 numbers differs in the last bit from that of one of them; bulk scoring takes many at once."""
    images = np.zeros((48, 1, 1, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(48)

    def engine(chunk: np.ndarray) -> np.ndarray:
        return np.sin(chunk[:, 0, 0, 0].astype(np.float32)) * 30

    together = runtime.probabilities(engine, images)
    alone = [runtime.probabilities(engine, images[i : i + 1])[0] for i in range(48)]
    assert together.tolist() == alone
    np.testing.assert_allclose(together, 1 / (1 + np.exp(-30 * np.sin(np.arange(48)))), rtol=1e-5)


def test_a_stopped_scoring_goes_on_with_the_missing_parts(place: Workspace) -> None:
    job = ScoreJob(model="ensemble/1", data=DataConfig(uri="made", split="test"), part_rows=16)
    first = score.run(job, place)
    whole = rows(first)
    parts = sorted(Path(first["verdicts"].removeprefix("file://")).glob("part-*.parquet"))
    parts[1].unlink()
    again = score.run(job, place)
    assert again["parts"] == {"all": len(parts), "reused": len(parts) - 1}
    assert rows(again) == whole
    assert score.run(job, place)["images_per_second"] is None
    table = verdicts.read(first["verdicts"], first["digest"])
    stored = Dataset.open(place.dataset("made")).read(None, "test", ["id", "fake"])
    assert table["id"].to_pylist() == stored["id"].to_pylist()
    assert table["fake"].to_pylist() == stored["fake"].to_pylist()


def test_probabilities_of_another_ensemble_version_are_refused(place: Workspace, folder: Path) -> None:
    into = (place.home / "kept").as_uri()
    score.run(ScoreJob(model="ensemble/1", path=str(folder), into=into), place)
    with pytest.raises(ConfigError, match="holds verdicts of model"):
        score.run(ScoreJob(model="ensemble/2", path=str(folder), into=into), place)
    with pytest.raises(ConfigError, match=r"holds probabilities of ensemble .* score again"):
        verdicts.read(into, "0" * 64)


def test_mistakes_of_the_user_are_one_clear_line(place: Workspace, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only an ensemble gives verdicts"):
        score.run(ScoreJob(model="a", path=str(folder)), place)
    with pytest.raises(ConfigError, match="name either pictures"):
        score.run(ScoreJob(model="ensemble/1"), place)
    with pytest.raises(DataError, match="holds no files"):
        score.run(ScoreJob(model="ensemble/1", path=str(tmp_path)), place)
    dataset = Dataset.open(place.dataset("made"))
    locks.lock(dataset, dataset.version(), ["test"])
    for split in ("test", "*"):
        with pytest.raises(DataError, match="is locked and cannot be scored row by row"):
            score.run(ScoreJob(model="ensemble/1", data=DataConfig(uri="made", split=split)), place)
