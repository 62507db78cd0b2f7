"""The search of a detector before any trial runs: who is held out, by what it is judged, what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from counterfake import config, media
from counterfake.cluster.space import SearchSpace
from counterfake.data import Loader
from counterfake.errors import ConfigError, DataError
from counterfake.learners.detector import DetectorConfig
from counterfake.loop import TrainJob
from counterfake.records import Sample, SplitRule, write_version
from counterfake.workspace import Workspace
from jobs import train_detector, tune_detector


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """120 pictures of a camera, two generators and somebody unknown, in three splits."""
    space = Workspace.at(tmp_path_factory.mktemp("held-out") / "runs")
    rng = np.random.default_rng(0)
    makers = ("camera", "gan", "camera", "swap", None)

    def samples():
        for i in range(120):
            maker = makers[i % 5]
            picture = media.encode(rng.integers(0, 256, (32, 32, 3), np.uint8), "png")
            fake = int(maker in ("gan", "swap"))
            yield Sample(image=picture, fake=fake, maker=maker, source="made", path=str(i))

    facts = {"made": {"licence": "CC0-1.0", "consent": "synthetic"}}
    rule = SplitRule(fractions={"train": 0.6, "validation": 0.4})
    write_version(space.dataset("made"), samples(), sources=facts, splits=rule)
    return space


def base(**changes: object) -> TrainJob:
    names = {"data.uri": "made", "validation.uri": "made", "data.batch_size": 8, "validation.batch_size": 8}
    return config.override(train_detector.mobilenetv2_demo(), {**names, **changes})


def test_no_trial_trains_on_the_held_out_maker_and_all_are_judged_on_it(place: Workspace) -> None:
    job = tune_detector.held_out(base(), ("swap",), place)
    assert job.learner.kept_metric == "val_best_worst_auc"
    uri = place.dataset("made")
    trained = Loader(dataclasses.replace(job.data, uri=uri, drop_last=False))
    judged = Loader(dataclasses.replace(job.validation, uri=uri, drop_last=False))
    names = {part: counted(loader) for part, loader in (("trained", trained), ("judged", judged))}
    assert set(names["trained"]) == {"camera", "gan", None}
    assert set(names["judged"]) == {"camera", "gan", "swap", None}
    everything = Loader(dataclasses.replace(base().data, uri=uri, drop_last=False))
    assert trained.rows == everything.rows - counted(everything)["swap"]


def counted(loader: Loader) -> dict:
    codes = [code for batch in loader.batches(epochs=1) for code in batch.maker.tolist()]
    names = [loader.makers[code] if code >= 0 else None for code in codes]
    return {name: names.count(name) for name in names}


def test_a_batch_names_its_makers(place: Workspace) -> None:
    loader = Loader(dataclasses.replace(base().data, uri=place.dataset("made")))
    batch = next(loader.batches())
    assert batch.to("cpu").makers == ("camera", "gan", "swap")


def test_a_maker_that_validation_lacks_is_refused_in_one_line(place: Workspace) -> None:
    with pytest.raises(
        DataError, match="split validation has no fakes of the held-out 'stylegan', only of gan, swap"
    ) as caught:
        tune_detector.held_out(base(), ("stylegan",), place)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="has no fakes of the held-out 'camera'"):
        tune_detector.held_out(base(), ("camera",), place)
    with pytest.raises(ConfigError, match="needs a detector and a validation split"):
        tune_detector.held_out(dataclasses.replace(base(), validation=None), ("swap",), place)


def test_an_objective_that_is_not_what_the_weights_are_kept_by_is_refused(place: Workspace) -> None:
    from counterfake.cluster.tune import search

    space = SearchSpace(settings={"learner.lr": {"log": [1e-4, 1e-2]}})
    for metric in ("val_auc", "val_best_worst_auc"):
        with pytest.raises(
            ConfigError, match=f"the objective {metric} is not what a trial keeps .* use val_best_auc"
        ):
            search(base(), space, place, metric=metric)
    assert DetectorConfig(select="worst_auc").kept_metric == "val_best_worst_auc"


@pytest.mark.parametrize("preset", tune_detector.PRESETS)
def test_presets_survive_text_and_back(preset: str) -> None:
    job = tune_detector.PRESETS[preset]()
    assert config.from_dict(type(job), json.loads(json.dumps(config.to_dict(job)))) == job
