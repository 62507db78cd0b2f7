"""Folds: linked rows stay together, labels are shared evenly, no row is tested by a model that saw it; and the study over them."""

from __future__ import annotations

import collections
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterfake import folds, locks, rowlists
from counterfake.config import override, to_dict
from counterfake.data import DataConfig, Loader
from counterfake.errors import ConfigError, CorruptError, DataError
from counterfake.fingerprint import perceptual_hash
from counterfake.folds import FoldRule
from counterfake.forensics.benford import BenfordConfig
from counterfake.forensics.forest import ForestConfig
from counterfake.images import Preprocess
from counterfake.loop import TrainJob
from counterfake.records import Dataset, write_version
from counterfake.samples import Sample
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs import study_folds, train_benford, train_detector
from jobs.study_folds import FoldStudyJob, of_fold

SOURCES = {"s": {"licence": "MIT", "consent": "none"}}


def samples(rows: int = 96, side: int = 8) -> list[Sample]:
    """Half fakes, which are brighter; two pictures per person, every third fake is hard; stored in two splits."""
    rng = np.random.default_rng(0)
    return [
        Sample(
            pixels=(rng.integers(0, 160, (side, side, 3)) + 70 * (row % 2)).astype(np.uint8), fake=row % 2, source="s",
            identity=f"p{row // 4}-{row % 2}", attributes={"difficulty": "hard" if row % 3 else "easy"} if row % 2 else {},
            split=("train", "test")[row // 4 % 2],
        )
        for row in range(rows)
    ]  # fmt: skip


def stored(workspace: Workspace, rows: list[Sample] | None = None) -> tuple[Dataset, Any]:
    write_version(workspace.dataset("tiny"), rows or samples(), sources=SOURCES)
    dataset = Dataset.open(workspace.dataset("tiny"), cache=workspace.cache)
    return dataset, dataset.version()


def dealt(workspace: Workspace, rule: FoldRule, **settings: Any) -> tuple[Dataset, Any, folds.Folds]:
    dataset, version = stored(workspace)
    return (
        dataset,
        version,
        folds.deal(dataset, version, "*", rule, f"{workspace.storage}/rowlists", **settings),
    )


def ids(found: folds.Folds, fold: int, part: folds.Part) -> frozenset[str]:
    return rowlists.ids(found.where(fold, part)["id"])


def test_every_row_is_tested_once_and_never_by_a_fold_that_trained_on_it(workspace: Workspace) -> None:
    _, version, found = dealt(workspace, FoldRule(folds=3))
    tests = [ids(found, fold, "test") for fold in range(3)]
    assert sum(len(part) for part in tests) == len(frozenset().union(*tests)) == version.rows()
    for fold, test in enumerate(tests):
        train, inner, rest = (ids(found, fold, part) for part in ("train", "validation", "rest"))
        assert not (train & inner)
        assert not (rest & test)
        assert train | inner == rest == frozenset().union(*tests) - test


def test_a_person_is_on_one_side_of_every_cut(workspace: Workspace) -> None:
    dataset, version, found = dealt(workspace, FoldRule(folds=4))
    people = {sample.id: sample.identity for sample in dataset.samples(version, "*")}
    for fold in range(4):
        sides = [{people[name] for name in ids(found, fold, p)} for p in ("train", "validation", "test")]
        assert not (sides[0] & sides[1])
        assert not (sides[0] & sides[2])
        assert not (sides[1] & sides[2])


def test_near_copies_are_one_component(workspace: Workspace) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for scene in range(24):
        coarse = rng.integers(40, 200, (8, 8, 3)).repeat(8, axis=0).repeat(8, axis=1)
        for label in (0, 1):  # the fake is the real picture with a corner changed
            pixels = coarse.copy()
            pixels[:4, :4] += 20 * label
            pixels = pixels.astype(np.uint8)
            rows.append(
                Sample(
                    pixels=pixels, fake=label, source="s", split="train",
                    attributes={"phash": perceptual_hash(pixels), "scene": scene},
                )
            )  # fmt: skip
    dataset, version = stored(workspace, rows)
    root = f"{workspace.storage}/rowlists"
    found = folds.deal(dataset, version, "*", FoldRule(folds=3, validation=0.5, near_bits=40), root)
    at = collections.defaultdict(set)
    for sample in dataset.samples(version, "*"):
        at[sample.attributes["scene"]].add(found.fold[sample.id])
    assert all(len(places) == 1 for places in at.values())
    assert sum(fold["components"] for fold in found.rows) <= 24


def test_label_and_difficulty_have_equal_shares_in_every_fold(workspace: Workspace) -> None:
    dataset, version, found = dealt(workspace, FoldRule(folds=4))
    counts: dict[tuple[int, str], list[int]] = collections.defaultdict(lambda: [0] * 4)
    for sample in dataset.samples(version, "*"):
        assert sample.fake is not None
        counts[sample.fake, str(sample.attributes.get("difficulty"))][found.fold[sample.id]] += 1
    assert len(counts) == 3
    for shares in counts.values():
        assert max(shares) - min(shares) <= 4  # two components of two pictures


def test_dealing_is_decided_by_rows_and_rule_alone(workspace: Workspace) -> None:
    dataset, version, found = dealt(workspace, FoldRule(folds=3))
    root = f"{workspace.storage}/rowlists"
    assert folds.deal(dataset, version, "*", FoldRule(folds=3), root) == found
    assert folds.deal(dataset, version, "*", FoldRule(folds=3, seed=1), root).fold != found.fold


def test_where_deals_only_the_rows_that_it_allows(workspace: Workspace) -> None:
    _, version, found = dealt(
        workspace, FoldRule(folds=2), where={"identity": [f"p{i}-{i % 2}" for i in range(24)]}
    )
    assert 0 < len(found.fold) < version.rows()


def test_a_loader_reads_exactly_the_rows_of_its_list(workspace: Workspace) -> None:
    dataset, version, found = dealt(workspace, FoldRule(folds=3))
    data = DataConfig(
        uri=f"{dataset.store.uri}@{version.number}", split="*", batch_size=4, drop_last=False, where=found.where(1, "test"),
        preprocess=Preprocess(size=8),
    )  # fmt: skip
    seen = [name for batch in Loader(data, cache=workspace.cache).batches(epochs=1) for name in batch.ids]
    assert sorted(seen) == sorted(ids(found, 1, "test"))


def test_an_altered_list_and_an_unknown_part_are_refused(workspace: Workspace) -> None:
    uri = rowlists.write(f"{workspace.storage}/rowlists", {"a": ["x"]}, {"one": ["a"]})
    assert rowlists.ids(f"@{uri}#one") == {"x"}
    with pytest.raises(ConfigError, match="no part 'two'; it has one"):
        rowlists.ids(f"@{uri}#two")
    path = Path(uri.removeprefix("file://"))
    path.write_bytes(path.read_bytes().replace(b"x", b"y"))
    with pytest.raises(CorruptError, match="was altered"):
        rowlists.ids(f"@{uri}#one#")  # another key than the one in the cache


def test_locked_rows_and_too_few_rows_are_not_dealt(workspace: Workspace) -> None:
    dataset, version = stored(workspace)
    root = f"{workspace.storage}/rowlists"
    with pytest.raises(DataError, match="choose fewer folds"):
        folds.deal(dataset, version, "*", FoldRule(folds=60), root)
    locks.lock(dataset, version, ["test"])
    with pytest.raises(DataError, match="is locked and cannot be dealt into folds"):
        folds.deal(dataset, version, "*", FoldRule(), root)


# -- the study ------------------------------------------------------------------------------------------------------


def tiny() -> TrainJob:
    changes = {
        "data.uri": "tiny", "data.batch_size": 8, "data.preprocess.size": 32, "loop.images": 0, "loop.steps": 2,
        "validation.uri": "tiny", "validation.batch_size": 8, "validation.preprocess.size": 32,
        "learner.net.width_mult": 0.25,
    }  # fmt: skip
    return override(train_detector.mobilenetv2_demo(), changes)


def test_every_preset_of_training_is_a_study() -> None:
    assert list(study_folds.PRESETS) == [*train_detector.PRESETS, *train_benford.PRESETS]
    assert study_folds.PRESETS["ciplab"]() == FoldStudyJob(base=train_detector.ciplab(), near_bits=68)
    assert study_folds.PRESETS["benford"]().base == train_benford.benford()


def test_a_setting_below_base_reaches_either_kind_of_detector() -> None:
    net = override(study_folds.PRESETS["ciplab"](), {"base.learner.lr": "1e-4", "folds": "3"})
    forest = override(study_folds.PRESETS["benford"](), {"base.forest.trees": "7"})
    assert (net.base.learner.lr, net.folds, forest.base.forest.trees) == (1e-4, 3, 7)


def test_the_jobs_of_a_fold_differ_in_rows_only(workspace: Workspace) -> None:
    dataset, version, found = dealt(workspace, FoldRule(folds=3))
    data = replace(tiny().data, uri=f"{dataset.store.uri}@{version.number}", split="*")
    first, second = (of_fold(FoldStudyJob(base=tiny(), folds=3), data, found, fold) for fold in (0, 1))
    assert isinstance(first, TrainJob)
    assert first.validation is not None
    assert first.data.where == found.where(0, "train")
    assert first.validation.where == found.where(0, "validation")
    trees = [to_dict(one) for one in (first, second)]
    for tree in trees:
        tree.pop("name")
        for part in ("data", "validation"):
            tree[part].pop("where")
    assert trees[0] == trees[1]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, FoldStudyJob, dict[str, Any]]:
    """A finished study of a forest over 64 px pictures, whose fakes have no low frequencies."""
    workspace, rng = Workspace.at(tmp_path_factory.mktemp("runs")), np.random.default_rng(0)

    def picture(label: int) -> np.ndarray:
        slope = (
            rng.normal(size=(64, 64, 3)).cumsum(axis=0) * 3 if not label else rng.normal(0, 30, (64, 64, 3))
        )
        return np.clip(128 + slope, 0, 255).astype(np.uint8)

    rows = [
        Sample(pixels=picture(i % 2), fake=i % 2, source="s", identity=f"p{i // 2}", split="train",
               attributes={"difficulty": "hard"} if i % 2 else {})
        for i in range(48)
    ]  # fmt: skip
    stored(workspace, rows)
    base = train_benford.BenfordJob(
        name="forest", data=DataConfig(uri="tiny"), features=BenfordConfig(qualities=(90,), bases=(10,)),
        forest=ForestConfig(trees=10),
    )  # fmt: skip
    job = FoldStudyJob(base=base, folds=2, validation=0.5, bootstraps=50)
    return workspace, job, study_folds.run(job, workspace)


def test_a_study_judges_every_picture_by_a_model_that_never_saw_it(
    done: tuple[Workspace, FoldStudyJob, dict[str, Any]],
) -> None:
    workspace, _, result = done
    found = result["evaluation"]
    assert found["n"] == 48
    assert found["n_clusters"] == 24  # a person is one component
    assert found["majority"] == 0.5
    assert found["auc"]["low"] <= found["auc"]["value"] <= found["auc"]["high"]
    assert "hard" in found["groups"]["difficulty"]
    assert [fold["n"] for fold in found["folds"]] == [24, 24]
    assert found["auc"]["value"] > 0.9  # the two kinds differ wildly
    page = (Path(result["folder"]) / "report.html").read_text()
    assert "Fold by fold" in page
    assert "majority class" in page.lower()
    tracker = Tracker.at(workspace)
    trained = [tracker.read(fold["trained_run"]) for fold in found["folds"]]
    assert {run["tags"]["mlflow.parentRunId"] for run in trained} == {result["run_id"]}
    assert tracker.read(result["run_id"])["metrics"]["test_auc"] == pytest.approx(found["auc"]["value"])


def test_a_study_that_ran_before_trains_nothing_and_says_the_same(
    done: tuple[Workspace, FoldStudyJob, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, job, first = done

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished fold was trained again")

    monkeypatch.setattr(train_benford, "run", never)
    again = study_folds.run(job, workspace)
    assert again["evaluation"] == first["evaluation"]
    assert again["run_id"] == first["run_id"]


def test_the_mean_logit_with_itself_is_itself_and_other_folds_are_refused(
    done: tuple[Workspace, FoldStudyJob, dict[str, Any]],
) -> None:
    workspace, job, first = done
    both = study_folds.run(replace(job, others=(first["folder"],)), workspace)
    assert both["evaluation"]["auc"]["value"] == pytest.approx(first["evaluation"]["auc"]["value"], abs=1e-9)
    scores = json.loads((Path(first["folder"]) / "scores.json").read_bytes())
    assert len(scores["scores"]) == 48
    with pytest.raises(ConfigError, match="has other folds"):
        study_folds.run(replace(job, deal_seed=1, others=(first["folder"],)), workspace)


def test_a_network_is_trained_on_its_fold_and_scored_on_the_rest(workspace: Workspace) -> None:
    stored(workspace, samples(48, side=32))
    result = study_folds.run(
        FoldStudyJob(base=tiny(), folds=2, validation=0.5, near_bits=-1, bootstraps=0), workspace
    )
    assert result["evaluation"]["n"] == 48
    assert result["evaluation"]["auc"]["low"] is None
    assert {line["figure"] for line in result["table"]} == set(study_folds.FIGURES)
    lines = [(fold["slope"], fold["shift"]) for fold in result["folds"]]
    assert all(slope > 0 for slope, _ in lines)
    assert (1.0, 0.0) not in lines
    raw = FoldStudyJob(base=tiny(), folds=2, validation=0.5, near_bits=-1, bootstraps=0, calibrated=False)
    before = study_folds.run(raw, workspace)
    for own, other in zip(before["folds"], result["folds"], strict=True):
        assert (own["slope"], own["shift"]) == (1.0, 0.0)
        assert own["auc"] == pytest.approx(other["auc"])  # a line changes no order
