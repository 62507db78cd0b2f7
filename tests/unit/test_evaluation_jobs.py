"""Evaluation as jobs: locked splits, videos, the grid that goes on, two models compared, one generator left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from counterfake import audit, curation, export, locks, media, predictor, scoring
from counterfake.config import override
from counterfake.data import DataConfig, Loader
from counterfake.errors import ConfigError, DataError
from counterfake.forensics.benford import BenfordConfig
from counterfake.forensics.forest import ForestConfig
from counterfake.records import Dataset, Sample, SplitRule, write_version
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs import __main__ as command
from jobs import compare, evaluate, evaluate_cross, fit_ensemble, train_benford
from jobs.compare import CompareJob
from jobs.evaluate import EvaluateJob
from jobs.evaluate_cross import CrossJob
from jobs.fit_ensemble import EnsembleJob
from jobs.train_benford import BenfordJob
from tests.unit.test_detection_jobs import samples

TERMS = {"made": {"licence": "CC0", "consent": "synthetic"}}
RULE = SplitRule(fractions={"train": 0.5, "validation": 0.1, "test": 0.4})


def frames(n: int = 240) -> Iterator[Sample]:
    """Every picture is a frame of a video of six frames of one class and maker, two videos of each person."""
    for i, sample in enumerate(samples(n)):
        video = f"{i % 2}{i % 4}-{i // 24}"
        yield dataclasses.replace(sample, video=video, frame=i // 4 % 6, identity=f"person{i // 24}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace.at(tmp_path_factory.mktemp("runs"))
    write_version(workspace.dataset("films"), frames(), sources=TERMS, splits=RULE)
    for name, bases in (("strong", (10, 20)), ("weak", (40,))):
        features = BenfordConfig(qualities=(100,), bases=bases)
        train_benford.run(
            BenfordJob(name=name, data=DataConfig(uri="films"), features=features, forest=ForestConfig(trees=10), register_as=name),
            workspace,
        )  # fmt: skip
    return workspace


def films(split: str = "test") -> DataConfig:
    return DataConfig(uri="films", split=split)


def test_videos_are_judged_by_video_and_people_stay_one_cluster(place: Workspace) -> None:
    result = evaluate.run(EvaluateJob(model="strong", data=films(), bootstraps=20), place)
    found = result["evaluation"]
    assert found["video"]["n"] == found["n"] / 6
    assert found["video"]["frames"] == found["n"]
    assert found["n_clusters"] == found["video"]["n_clusters"] == found["n"] / 24
    assert found["unseen_makers"] == []
    tracker = Tracker.at(place)
    logged = tracker.read(result["run_id"])["metrics"]
    assert logged["test_video_auc"] == pytest.approx(found["video"]["auc"]["value"])
    plots = set(tracker.files(result["run_id"], "pictures"))
    assert {f"pictures/{name}.png" for name in ("roc", "reliability", "confusion")} <= plots
    for plot in plots:
        assert media.sniff(tracker.load(result["run_id"], plot)) == "png", plot
    page = Path(result["report"]).read_text()
    assert "By video" in page
    assert "nothing is said of other generators" in page
    json.dumps(evaluate.headline(result))


def test_a_split_without_a_held_out_generator_is_refused_where_one_is_asked_for(place: Workspace) -> None:
    with pytest.raises(DataError, match=r"no held-out generator .*gan.*all trained on"):
        evaluate.run(EvaluateJob(model="strong", data=films(), held_out=True), place)


def test_shards_scored_apart_give_the_figures_of_the_whole_bit_for_bit(place: Workspace) -> None:
    loaded = predictor.load(evaluate.resolve("strong", place))
    data = dataclasses.replace(films(), uri=place.dataset("films"))
    settings = {"threshold": 0.5, "bootstraps": 20, "seed": 0}
    whole = scoring.score({"a": loaded}, data)
    kinds = [dataclasses.replace(data, where={"maker": maker}) for maker in ("swap", "camera", "gan")]
    parts = [scoring.score({"a": loaded}, part) for part in kinds]
    merged = scoring.Scored.merged(parts)
    found = [rows.evaluate(rows.probabilities["a"], **settings) for rows in (whole, merged)]
    assert json.dumps(found[0]) == json.dumps(found[1])
    with pytest.raises(DataError, match="scored twice"):
        scoring.Scored.merged([*parts, parts[0]])


def test_the_grid_goes_on_with_the_cells_that_are_missing(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("jpeg 30", "blur 3", "h264 33", "share")
    job = EvaluateJob(model="strong", data=films(), bootstraps=10, grid=True, cells=names)
    first = evaluate.run(job, place)["evaluation"]["robustness"]
    assert set(first["cells"]) == {"clean", *names}
    assert first["cells"]["clean"]["drop"] == 0
    kept = sorted((place.home / "evaluations" / "cells").glob("*.json"))
    assert len(kept) == 5
    assert all("ids" not in json.loads(path.read_bytes()) for path in kept)
    kept[2].unlink()
    scored = []
    real = scoring.score
    monkeypatch.setattr(scoring, "score", lambda *a, **k: scored.append(k.get("cell")) or real(*a, **k))
    result = evaluate.run(job, place)
    assert result["evaluation"]["robustness"] == first
    assert len(scored) == 2  # the plain scoring, and the one cell that was gone
    assert "Worst damage" in Path(result["report"]).read_text()


def test_a_locked_split_is_judged_and_counted_but_gives_no_row_away(place: Workspace, tmp_path: Path) -> None:
    uri = place.dataset("locked")
    write_version(uri, frames(), sources=TERMS, splits=RULE)
    dataset = Dataset.open(uri)
    home = ["--home", str(place.home)]
    made = CliRunner().invoke(command.app, ["data", "lock", "locked", "--split", "test", "--json", *home])
    assert json.loads(made.stdout)["locked"] == ["test"]
    data = DataConfig(uri="locked", split="test")
    results = [evaluate.run(EvaluateJob(model="strong", data=data, bootstraps=10), place) for _ in range(2)]
    run = Tracker.at(place).read(results[1]["run_id"])
    assert (run["tags"]["locked_looks"], run["metrics"]["locked_looks"]) == ("2", 2)
    assert results[1]["evaluation"]["locked"] == {"looks": 2}
    page = Path(results[1]["report"]).read_text()
    assert "surest mistakes" not in page
    assert "p = 0." not in page
    stored = "".join(path.read_text() for path in Path(results[1]["report"]).parent.glob("*"))
    assert not [row for row in dataset.read(None, "test", ["id"])["id"].to_pylist() if row in stored]
    with pytest.raises(ConfigError, match="judged whole"):
        evaluate.run(EvaluateJob(model="strong", data=data, limit=10), place)
    whole = dataclasses.replace(data, uri=uri)
    for refused in (
        lambda: scoring.score({}, whole),
        lambda: Loader(whole),
        lambda: export.export(dataset, None, tmp_path / "out", "folder"),
        lambda: curation.derive(dataset, None, ["fake=0"], uri=place.dataset("copy")),
        lambda: curation.merge([dataset, Dataset.open(place.dataset("films"))], place.dataset("copy")),
        lambda: train_benford.run(BenfordJob(data=data), place),
    ):
        with pytest.raises(DataError, match=r"split test of .* is locked and cannot be"):
            refused()
    assert export.export(dataset, None, tmp_path / "out", "folder", splits=["train"])[
        "rows"
    ] == dataset.version().rows("train")


def test_a_lock_holds_in_later_versions_and_under_another_name(workspace: Workspace) -> None:
    uri = workspace.dataset("d")
    rows = list(samples(40))
    first = write_version(uri, rows[:20], sources=TERMS, splits=RULE)
    dataset = Dataset.open(uri)
    assert locks.locked(dataset, first) == frozenset()
    assert locks.lock(dataset, first, ["test"]) == locks.lock(dataset, first, ["test"]) == ["test"]
    assert locks.lock(dataset, first, ["validation"]) == ["test", "validation"]
    grown = write_version(uri, rows[20:], sources=TERMS, splits=RULE, parent="append")
    assert locks.locked(Dataset.open(uri), grown) == {"test", "validation"}
    renamed = dataclasses.replace(first, digest="0" * 64, splits={"all": first.splits["test"]})
    assert locks.locked(dataset, renamed) == {"all"}
    with pytest.raises(DataError, match="no split 'tset'"):
        locks.lock(dataset, first, ["tset"])
    with pytest.raises(ConfigError, match="one by one"):
        locks.lock(dataset, first, ["*"])
    assert [locks.look(dataset, first, "test", {}) for _ in range(3)] == [1, 2, 3]


def test_two_models_are_compared_on_the_same_pictures(place: Workspace) -> None:
    found = compare.run(CompareJob(first="strong", second="weak", data=films(), bootstraps=50), place)
    assert found["metrics"]["auc"]["difference"]["value"] > 0
    assert found["video"]["auc"]["first"] >= found["video"]["auc"]["second"]
    home = ["--home", str(place.home)]
    words = ["models", "compare", "strong", "weak", "--data", "films", "--set", "bootstraps=50", *home]
    said = CliRunner().invoke(command.app, [*words, "--json"])
    assert json.loads(said.stdout)["metrics"] == found["metrics"]
    table = CliRunner().invoke(command.app, words)
    assert "by video: AUC" in table.stdout


def test_every_model_meets_every_dataset(place: Workspace) -> None:
    write_version(place.dataset("other"), samples(80), sources=TERMS, splits=RULE)
    job = CrossJob(models=("strong", "weak"), datasets=("films", "other"), bootstraps=10)
    result = evaluate_cross.run(job, place)
    cells = {(c["row"], c["column"].partition("@")[0]): c for c in result["matrix"]["cells"]}
    assert {key: cell["home"] for key, cell in cells.items()} == {
        ("strong", "films"): True, ("weak", "films"): True, ("strong", "other"): False, ("weak", "other"): False,
    }  # fmt: skip
    assert "<img" in Path(result["report"]).read_text()
    logged = Tracker.at(place).read(result["run_id"])["metrics"]
    assert logged["mean_auc_home"] == pytest.approx(result["matrix"]["mean_auc"]["home"])


def test_a_generator_is_left_out_of_the_training_and_judged(place: Workspace) -> None:
    small = {
        "data.preprocess.size": 32, "data.batch_size": 16, "loop.images": 64, "loop.tick_steps": 0, "validation": None,
        "learner.net.width_mult": 0.1,
    }  # fmt: skip
    job = CrossJob(train="mobilenetv2-demo", makers=("gan",), changes=small, data=films(), bootstraps=5)
    result = evaluate_cross.run(job, place)
    cells = {c["column"]: c for c in result["matrix"]["cells"]}
    assert {name: cell["home"] for name, cell in cells.items()} == {"gan": False, "swap": True}
    assert cells["gan"]["n_fake"] == cells["swap"]["n_fake"]
    assert np.isfinite(cells["gan"]["auc"]["value"])


def test_a_forest_is_trained_without_a_generator_too(place: Workspace) -> None:
    small = {"features.qualities": [100], "features.bases": [10], "forest.trees": 10}
    job = CrossJob(train="benford", makers=("gan",), changes=small, data=films(), bootstraps=5)
    result = evaluate_cross.run(job, place)
    assert {c["column"]: c["home"] for c in result["matrix"]["cells"]} == {"gan": False, "swap": True}


def test_forests_and_ensembles_ask_the_audit_for_leaks(place: Workspace) -> None:
    uri = place.dataset("leaky")
    parts = ("train", "validation", "calibration", "test")
    rows = [dataclasses.replace(s, split=parts[i // 2 % 4]) for i, s in enumerate(samples(320))]
    rows = [
        dataclasses.replace(s, identity=f"p{i // 2 % 3}" if i < 24 else f"q{i}") for i, s in enumerate(rows)
    ]
    write_version(uri, rows, sources=TERMS)
    found = audit.audit(Dataset.open(uri))
    assert found.leaks
    forest = BenfordJob(
        name="leaky", data=DataConfig(uri="leaky"), features=BenfordConfig(qualities=(100,), bases=(10,)),
        forest=ForestConfig(trees=10),
    )  # fmt: skip
    ensemble = EnsembleJob(
        members=("strong", "weak"), data=DataConfig(uri="leaky", split="calibration"), alpha=0.2, bootstraps=5, promote="",
        register_as="",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"found a leak \(identity"):
        train_benford.run(forest, place)
    with pytest.raises(DataError, match=r"found a leak \(identity"):
        fit_ensemble.run(ensemble, place)
    allowed = [
        train_benford.run(override(forest, {"data.allow_leaks": True}), place)["run_id"],
        fit_ensemble.run(override(ensemble, {"data.allow_leaks": True}), place)["run_id"],
    ]
    for run_id in allowed:
        assert "identity" in Tracker.at(place).read(run_id)["tags"]["counterfake.allowed_leaks"]


def test_mistakes_of_the_user_are_one_clear_line(place: Workspace) -> None:
    with pytest.raises(ConfigError, match="name models and datasets"):
        evaluate_cross.run(CrossJob(), place)
    with pytest.raises(DataError, match=r"no held-out generator: its fakes come from gan"):
        write_version(
            place.dataset("alone"), (s for s in samples(40) if s.maker != "swap"), sources=TERMS, splits=RULE
        )
        evaluate_cross.run(CrossJob(train="mobilenetv2-demo", data=DataConfig(uri="alone", split="*")), place)
    write_version(place.dataset("real"), (s for s in samples(40) if not s.fake), sources=TERMS, splits=RULE)
    one_class = DataConfig(uri="real", split="*")
    with pytest.raises(DataError, match="needs real and fake pictures"):
        evaluate.run(EvaluateJob(model="strong", data=one_class), place)
    with pytest.raises(ConfigError, match="the grid has no cell"):
        EvaluateJob(cells=("rain",))
