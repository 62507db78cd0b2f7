"""A tiny augmentation study from end to end, without Ray. Slow for a unit test: it is ten training runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from counterfake.data import DataConfig
from counterfake.images import Preprocess
from counterfake.learners.classifier import ClassifierConfig
from counterfake.learners.gan import GanConfig
from counterfake.loop import LoopConfig
from counterfake.nets.classifier import SmallClassifier
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.records import Dataset, Sample, write_version
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs.study_augment import PRESETS, AugmentStudyJob, run

JOB = PRESETS["augment-gan"]()


def tiny(workspace: Workspace) -> AugmentStudyJob:
    """Two classes, bright and dark; one size, two seeds, one multiple."""
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            pixels=(rng.integers(0, 100, (28, 28, 1)) + 150 * (i % 2)).astype(np.uint8),
            class_id=i % 2, source="made", split="test" if i < 20 else "train", path=str(i), fake=0,
        )
        for i in range(60)
    ]  # fmt: skip
    write_version(
        workspace.dataset("two"), samples, sources={"made": {"licence": "CC0-1.0", "consent": "none"}}
    )
    data = DataConfig(uri="two", batch_size=8, preprocess=Preprocess(size=28, channels=1), threads=1)
    gan = GanConfig(
        generator=DcganGenerator(classes=2, noise_size=8, width=2),
        discriminator=DcganDiscriminator(classes=2, width=2),
    )
    loop = LoopConfig(steps=4, tick_steps=4, preview_every_ticks=0)
    classifier = ClassifierConfig(net=SmallClassifier(classes=2, width=4, features=8))
    held_out = dataclasses.replace(data, split="test")
    return AugmentStudyJob(
        gan=dataclasses.replace(JOB.gan, name="tiny", data=data, learner=gan, loop=loop),
        classifier=dataclasses.replace(
            JOB.classifier, name="tiny-c", data=data, validation=held_out, learner=classifier, loop=loop
        ),
        sizes=(8,),
        multiples=(2,),
        seeds=(0, 1),
    )


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_and_leaves_table_and_plot(workspace: Workspace) -> None:
    job = tiny(workspace)
    found = run(job, workspace)
    assert [(line["augmentation"], line["synthetic per real"]) for line in found["table"]] == [
        ("none", 0), ("none", 2), ("standard", 0), ("standard", 2)
    ]  # fmt: skip
    assert len(found["runs"]) == 8
    mixed = Dataset.open(next((workspace.home / "datasets").glob("tiny-*-x2")).as_uri())
    table_ = mixed.read(mixed.version(), "train", ["fake", "class_id", "source"])
    assert sorted(table_["fake"].to_pylist()) == [0] * 16 + [1] * 32
    assert np.bincount(table_["class_id"].to_numpy()).tolist() == [24, 24]
    files = Tracker.at(workspace).files(found["run_id"])
    assert {"study.json", "pictures/augment.png"} <= set(files)
    again = run(job, workspace)
    assert again == found
    assert json.loads(Path(again["file"]).read_text())["table"] == found["table"]
