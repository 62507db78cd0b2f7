"""The plan of the augmentation study: which pictures a cell sees, and what its table says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from counterfake.errors import ConfigError, DataError
from counterfake.learners.classifier import ClassifierConfig
from counterfake.learners.gan import GanConfig
from jobs.study_augment import (
    PRESETS,
    Cell,
    _classifier,
    cells,
    chosen,
    interval,
    table,
)

JOB = PRESETS["augment-gan"]()
CLASSES = np.repeat(np.arange(10), 60)


def test_every_subset_gets_both_augmentations_with_and_without_synthetic_pictures() -> None:
    plan = list(cells(JOB, 25, 3))
    assert [(c.augmentation, c.multiple) for c in plan] == [
        (a, m) for a in ("none", "standard") for m in (0, 1, 5)
    ]
    assert len(JOB.sizes) * len(JOB.seeds) * len(plan) == 120


@pytest.mark.parametrize("size", [1, 25, 60])
def test_a_subset_has_as_many_pictures_of_every_class(size: int) -> None:
    assert np.bincount(CLASSES[chosen(CLASSES, size, 0)]).tolist() == [size] * 10


def test_a_smaller_subset_is_part_of_the_larger_ones_of_its_seed_only() -> None:
    small, large = (set(chosen(CLASSES, size, 7).tolist()) for size in (25, 50))
    assert small < large
    assert not small <= set(chosen(CLASSES, 50, 8).tolist())


def test_a_class_with_too_few_pictures_is_named() -> None:
    with pytest.raises(DataError, match="class 0 has 60 pictures but the study wants 61"):
        chosen(CLASSES, 61, 0)
    with pytest.raises(DataError, match="no picture has a class"):
        chosen(np.full(5, -1), 1, 0)


def test_the_interval_is_students() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - mean == mean - low == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t of 2 degrees, sd 1


def test_gains_are_differences_of_one_seed() -> None:
    accuracy = {
        ("none", 0): (0.5, 0.7),
        ("none", 1): (0.6, 0.8),
        ("standard", 0): (0.7, 0.9),
        ("standard", 1): (0.7, 0.8),
    }
    rows = [
        {"size": 25, "augmentation": a, "multiple": m, "seed": seed, "accuracy": value}
        for (a, m), values in accuracy.items()
        for seed, value in enumerate(values)
    ]
    lines = {(line["augmentation"], line["synthetic per real"]): line for line in table(rows)}
    assert lines["none", 1]["gain"] == pytest.approx(0.1)
    assert lines["none", 1]["gain, low"] == pytest.approx(0.1)  # the same in both seeds: no spread
    assert lines["none", 1]["over standard"] == pytest.approx(-0.1)
    assert lines["standard", 1]["gain"] == pytest.approx(-0.05)
    assert lines["standard", 1]["gain, low"] < -0.05 < lines["standard", 1]["gain, high"]


def test_only_the_augmentation_and_the_data_of_two_cells_differ() -> None:
    one = _classifier(JOB, Cell(25, 1, "none", 0), "file:///a")
    other = _classifier(JOB, Cell(25, 1, "standard", 5), "file:///b")
    assert isinstance(one.learner, ClassifierConfig)
    assert isinstance(other.learner, ClassifierConfig)
    assert (one.learner.shift, other.learner.shift) == (0, 2)
    assert one.loop == other.loop
    assert one.validation == other.validation == JOB.classifier.validation
    assert dataclasses.replace(one.learner, shift=2) == other.learner


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gan": dataclasses.replace(JOB.gan, learner=GanConfig())}, "whose networks know classes"),
        ({"classifier": dataclasses.replace(JOB.classifier, validation=None)}, "with a validation split"),
        (
            {"classifier": dataclasses.replace(JOB.classifier, validation=JOB.gan.data)},
            "must not be a split that the GAN",
        ),
        ({"seeds": (1,)}, "two seeds or more"),
        ({"sizes": (0,)}, "of 1 or more"),
    ],
    ids=["unconditional", "no-validation", "same-split", "one-seed", "no-pictures"],
)
def test_a_study_that_cannot_answer_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(JOB, **changes)
