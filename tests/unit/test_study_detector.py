"""The study over seeds: one job per seed that differs in nothing else, and the figures' mean and spread."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from counterfake.config import override, to_dict
from counterfake.errors import ConfigError
from counterfake.records import write_version
from counterfake.samples import Sample
from counterfake.workspace import Workspace
from jobs import study_detector, train_detector
from jobs.studies import spread
from jobs.study_detector import FIGURES, SeedStudyJob, seeded


def test_a_seed_changes_weights_and_order_and_nothing_else() -> None:
    base = train_detector.mobilenetv2_demo()
    first, second = to_dict(seeded(base, 1)), to_dict(seeded(base, 2))
    assert (first["loop"]["seed"], first["data"]["seed"], second["data"]["seed"]) == (1, 1, 2)
    for tree in (first, second):
        tree["loop"].pop("seed")
        tree["data"].pop("seed")
        assert tree.pop("name").startswith("mobilenetv2-demo-seed")
    assert first == second


def test_the_table_has_mean_and_standard_deviation() -> None:
    runs = [dict.fromkeys(FIGURES, value) for value in (0.7, 0.8, 0.9)]
    line = spread(runs, FIGURES, "seeds")[0]
    assert (line["mean"], line["sd"], line["min"], line["max"], line["seeds"]) == (0.8, 0.1, 0.7, 0.9, 3)


def test_one_seed_or_a_split_that_was_seen_is_refused() -> None:
    base = train_detector.mobilenetv2_demo()
    with pytest.raises(ConfigError, match="at least two different seeds"):
        SeedStudyJob(base=base, seeds=(1, 1))
    with pytest.raises(ConfigError, match="split validation was seen"):
        SeedStudyJob(base=base, split="validation")


def test_every_preset_of_training_is_a_study() -> None:
    assert list(study_detector.PRESETS) == list(train_detector.PRESETS)
    assert study_detector.PRESETS["ciplab"]().base == train_detector.ciplab()


def test_a_study_trains_and_judges_every_seed(workspace: Workspace) -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            pixels=(rng.integers(0, 200, (32, 32, 3)) + 50 * (row % 2)).astype(np.uint8), fake=row % 2, source="s",
            split=("train", "train", "validation", "test")[row // 2 % 4],
        )
        for row in range(64)
    ]  # fmt: skip
    write_version(workspace.dataset("tiny"), samples, sources={"s": {"licence": "MIT", "consent": "none"}})
    changes = {
        "data.uri": "tiny",
        "data.batch_size": 8,
        "data.preprocess.size": 32,
        "loop.images": 0,
        "loop.steps": 2,
    }
    base = override(train_detector.mobilenetv2_demo(), {**changes, "learner.net.width_mult": 0.25})
    base = replace(base, validation=None)
    done = study_detector.run(SeedStudyJob(base=base, seeds=(0, 1)), workspace)
    assert [run["seed"] for run in done["runs"]] == [0, 1]
    assert done["runs"][0]["bundle"] != done["runs"][1]["bundle"]
    assert {line["figure"] for line in done["table"]} == set(FIGURES)
