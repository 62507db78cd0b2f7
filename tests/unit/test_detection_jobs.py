"""Benford, evaluation and ensemble as jobs: data set to registered champion, on pictures whose answer is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from counterfake import config, media, predictor, scoring
from counterfake.bundle import read
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError, GateError
from counterfake.forensics.benford import BenfordConfig
from counterfake.forensics.forest import ForestConfig
from counterfake.gate import Gate
from counterfake.records import Sample, SplitRule, write_version
from counterfake.registry import Registry
from counterfake.workspace import Workspace
from jobs import evaluate, fit_ensemble, train_benford
from jobs.evaluate import EvaluateJob
from jobs.fit_ensemble import EnsembleJob
from jobs.train_benford import BenfordJob


def samples(n: int = 320) -> Iterator[Sample]:
    """Real: quiet and busy regions. Fake: even contrast, which first digits give away. 64 px PNG."""
    for i in range(n):
        rng, fake = np.random.default_rng(i), i % 2
        noise = rng.normal(size=(66, 66)).cumsum(axis=0).cumsum(axis=1)[2:, 2:]
        busy = 1.0 if fake else np.exp(1.5 * np.sin(np.linspace(0, 7, 64) + rng.uniform(0, 6)))[:, None]
        field = rng.normal(size=(64, 64)) * 12 * busy + (noise - noise.mean()) / noise.std() * 12
        pixels = np.repeat(np.clip(128 + field, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
        yield Sample(
            image=media.encode(pixels, "png"), fake=fake, maker=("gan" if i % 4 == 1 else "swap") if fake else "camera",
            identity=f"person{i % 80}", source="made", attributes={"difficulty": "easy" if i % 3 else "hard"},
        )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a data set, two registered forests, the second one weaker."""
    workspace = Workspace.at(tmp_path_factory.mktemp("runs"))
    write_version(
        workspace.dataset("made"), samples(), sources={"made": {"licence": "CC0", "consent": "synthetic"}},
        splits=SplitRule(fractions={"train": 0.4, "validation": 0.1, "calibration": 0.25, "test": 0.25}),
    )  # fmt: skip
    for name, bases in (("strong", (10, 20)), ("weak", (40,))):
        job = BenfordJob(
            name=name, data=DataConfig(uri="made"), features=BenfordConfig(qualities=(100,), bases=bases),
            forest=ForestConfig(trees=20), register_as=name,
        )  # fmt: skip
        result = train_benford.run(job, workspace)
        assert result["registered"] == f"{name}/1"
        assert result["metrics"]["val_auc"] > 0.6
        json.dumps(result)
    return workspace


@pytest.fixture(scope="module")
def fitted(place: Workspace) -> dict:
    return fit_ensemble.run(
        EnsembleJob(
            members=("strong", "weak"),
            data=DataConfig(uri="made", split="calibration"),
            alpha=0.15,
            bootstraps=100,
        ),
        place,
    )


def test_a_pool_of_processes_extracts_the_same_features(place: Workspace) -> None:
    job = BenfordJob(
        data=DataConfig(uri="made"), features=BenfordConfig(qualities=(90,), bases=(10,)), forest=ForestConfig(trees=3),
        limit=40, validation="",
    )  # fmt: skip
    results = [train_benford.run(dataclasses.replace(job, processes=n), place) for n in (1, 2)]
    digests = [read(Path(r["bundle"])).info["files"]["weights.safetensors"] for r in results]
    assert digests[0] == digests[1]


def test_an_evaluation_leaves_figures_plots_and_a_page(place: Workspace) -> None:
    result = evaluate.run(
        EvaluateJob(model="strong", data=DataConfig(uri="made", split="test"), bootstraps=50), place
    )
    found = result["evaluation"]
    assert found["auc"]["value"] > 0.7
    assert set(found["groups"]) == {"maker", "difficulty"}
    assert found["n_clusters"] < found["n"]  # pictures of one person are one cluster
    assert found["latency_ms"] > 0
    page = Path(result["report"]).read_text()
    assert "called real" in page
    assert page.count("<img") >= 4
    assert json.loads((Path(result["report"]).parent / "evaluation.json").read_text()) == found


def test_a_model_can_be_registered_again_with_its_figures(place: Workspace) -> None:
    job = EvaluateJob(
        model="strong/1", data=DataConfig(uri="made", split="test"), bootstraps=10, register_as="strong"
    )
    result = evaluate.run(job, place)
    assert result["registered"] == "strong/2"
    assert read(Registry.at(place).fetch("strong/2", place.cache)).evaluation == result["evaluation"]
    assert read(Registry.at(place).fetch("strong/1", place.cache)).evaluation is None


def test_the_ensemble_becomes_champion_through_the_gate(place: Workspace, fitted: dict) -> None:
    assert fitted["registered"] == "ensemble/1"
    assert fitted["promoted"] == "ensemble@champion"
    assert Registry.at(place).get("ensemble@champion").version == 1
    json.dumps(fitted)
    loaded = predictor.load(Registry.at(place).fetch("ensemble@champion", place.cache))
    assert isinstance(loaded, predictor.EnsemblePredictor)
    assert set(loaded.members) == {"strong", "weak"}
    assert loaded.bundle.evaluation == fitted["evaluation"]
    verdict = loaded.verdict(next(iter(samples(1))).media)
    assert verdict["verdict"] in ("real", "fake", "uncertain", "no_verdict")


def test_the_ensemble_is_judged_beside_its_members(fitted: dict) -> None:
    found = fitted["evaluation"]
    assert set(found["members"]) == {"strong", "weak"}
    assert found["best_member"]["name"] in found["members"]
    assert {"value", "low", "high"} == set(found["best_member"]["ensemble_minus_best_auc"])
    for row in found["verdicts"].values():
        assert row["real"] + row["fake"] + row["uncertain"] + row["out_of_domain"] == pytest.approx(1)


def test_served_and_scored_probabilities_are_the_same(place: Workspace, fitted: dict) -> None:
    loaded = predictor.load(Path(fitted["bundle"]))
    data = DataConfig(uri=place.dataset("made"), split="test")
    scored = scoring.score({"ensemble": loaded}, data, limit=10)
    pictures = [s.media for s in scoring.labelled(scoring.Dataset.open(data.uri), scored.version, data)][:10]
    np.testing.assert_allclose(loaded.predict_bytes(pictures), scored.probabilities["ensemble"], atol=1e-12)


def test_one_detector_alone_is_calibrated_and_gets_a_verdict(place: Workspace) -> None:
    job = EnsembleJob(
        name="alone", members=("strong",), data=DataConfig(uri="made", split="calibration"), alpha=0.15, bootstraps=20,
        register_as="", promote="",
    )  # fmt: skip
    result = fit_ensemble.run(job, place)
    found, loaded = result["evaluation"], predictor.load(Path(result["bundle"]))
    assert isinstance(loaded, predictor.EnsemblePredictor)
    assert list(loaded.members) == ["strong"]
    assert found["auc"]["value"] == pytest.approx(found["members"]["strong"]["auc"]["value"])  # monotone
    assert found["ece"]["value"] < found["members"]["strong"]["ece"]["value"] + 0.05
    assert found["latency_ms"] > 0
    assert set(found["verdicts"]) == {"real", "fake"}


def test_an_ensemble_carries_the_licences_of_its_members_and_its_calibration(
    place: Workspace, fitted: dict
) -> None:
    assert read(Path(fitted["bundle"])).info["sources"] == {
        "made": {"licence": "CC0", "consent": "synthetic"}
    }
    assert Gate(licence="commercial").check(None, sources=read(Path(fitted["bundle"])).info["sources"]) == []


def test_an_ensemble_is_evaluated_at_what_it_serves(place: Workspace, fitted: dict) -> None:
    job = EvaluateJob(model=fitted["bundle"], data=DataConfig(uri="made", split="test"), bootstraps=10)
    result = evaluate.run(job, place)
    found = result["evaluation"]
    loaded = predictor.load(Path(fitted["bundle"]))
    assert isinstance(loaded, predictor.EnsemblePredictor)
    assert found["threshold"] == loaded.ensemble.threshold
    assert found["verdicts"] == fitted["evaluation"]["verdicts"]  # the same split, picture by picture
    data = DataConfig(uri=place.dataset("made"), split="test")
    pictures = list(scoring.labelled(scoring.Dataset.open(data.uri), scoring.opened(data, None)[1], data))
    accused = [loaded.verdict(s.media)["verdict"] == "fake" for s in pictures if s.fake == 0]
    assert found["false_accusations"] == pytest.approx(np.mean(accused))
    assert "Verdicts as served" in Path(result["report"]).read_text()


def test_a_failed_gate_leaves_the_champion_where_it_was(place: Workspace, fitted: dict) -> None:
    job = EnsembleJob(
        name="worse", members=("weak", "strong"), data=DataConfig(uri="made", split="calibration"), alpha=0.2, bootstraps=10,
        gate=Gate(min_auc=1.1),
    )  # fmt: skip
    with pytest.raises(GateError, match="auc"):
        fit_ensemble.run(job, place)
    assert Registry.at(place).get("ensemble@champion").version == 1


def test_mistakes_of_the_user_are_one_clear_line(place: Workspace) -> None:
    calibration = DataConfig(uri="made", split="calibration")
    with pytest.raises(DataError, match=r"alpha 0\.001 needs at least 999"):
        fit_ensemble.run(EnsembleJob(members=("strong", "weak"), data=calibration, alpha=0.001), place)
    with pytest.raises(ConfigError, match="name one member to calibrate or several"):
        fit_ensemble.run(EnsembleJob(data=calibration), place)
    with pytest.raises(ConfigError, match="different splits"):
        EnsembleJob(data=DataConfig(split="test"))
    with pytest.raises(ConfigError, match="model is not set"):
        evaluate.run(EvaluateJob(data=DataConfig(uri="made")), place)
    with pytest.raises(ConfigError, match=r"data\.uri is not set"):
        train_benford.run(BenfordJob(), place)


@pytest.mark.parametrize("module", [evaluate, fit_ensemble, train_benford], ids=lambda m: m.__name__)
def test_presets_survive_text_and_back(module: object) -> None:
    for make in module.PRESETS.values():  # type: ignore[attr-defined]
        job = make()
        assert config.from_dict(type(job), json.loads(json.dumps(config.to_dict(job)))) == job
