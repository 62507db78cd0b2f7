"""Two studies from end to end on tiny data: one MLflow run over their training jobs, tables on disk, resumed when run again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterfake import bundle
from counterfake.data import DataConfig
from counterfake.errors import ConfigError
from counterfake.extractor import BundleExtractor, InceptionExtractor
from counterfake.images import Preprocess
from counterfake.learners.gan import GanConfig
from counterfake.learners.next_frame import NextFrameConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.classifier import SmallClassifier
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.nets.unet import UNetConfig
from counterfake.records import Sample, write_version
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs import study_blur, study_gan

DATA = DataConfig(uri="digits", batch_size=8, preprocess=Preprocess(size=28, channels=1))
LOOP = LoopConfig(steps=2, tick_steps=2, preview_every_ticks=0, threads=1)


@pytest.fixture
def digits(workspace: Workspace) -> Workspace:
    rng = np.random.default_rng(0)
    rows = [
        Sample(
            pixels=rng.integers(0, 256, (28, 28, 1), dtype=np.uint8),
            source="noise",
            path=f"{split}/{i}",
            split=split,
        )
        for split, count in (("train", 16), ("test", 12))
        for i in range(count)
    ]
    write_version(
        workspace.dataset("digits"), rows, sources={"noise": {"licence": "CC0-1.0", "consent": "none"}}
    )
    return workspace


@pytest.fixture
def judge(tmp_path: Path) -> BundleExtractor:
    net = SmallClassifier(width=4, features=8)
    folder = bundle.write_nets(
        tmp_path / "judge", kind="classifier", name="judge", nets={"classifier": (net, net.build().state_dict())},
        preprocess=Preprocess(size=28, channels=1), provenance={},
    ).folder  # fmt: skip
    return BundleExtractor(model=str(folder))


def test_a_gan_study_nests_its_runs_and_goes_on_in_its_own(digits: Workspace, judge: BundleExtractor) -> None:
    learner = GanConfig(generator=DcganGenerator.tiny(), discriminator=DcganDiscriminator.tiny())
    job = study_gan.GanStudyJob(
        base=TrainJob(name="tiny-study", task="gan", data=DATA, learner=learner, loop=LOOP),
        losses=("non_saturating",), d_steps=(1, 2), seeds=(0,), generator_updates=2, samples=20, extractor=judge,
    )  # fmt: skip
    found = study_gan.run(job, digits)
    lines = found["tables"]["equal generator updates"]
    assert [line["k"] for line in lines] == [1, 2]
    assert all(line["FID"] > 0 and 1 <= line["classes"] <= 10 for line in lines)
    _is_kept(found, digits, {row["run_id"] for row in found["runs"]}, "pictures/fid-equal-work.png")
    again = study_gan.run(job, digits)
    assert again == {**found, "runs": again["runs"]}
    assert [row["fid"] for row in again["runs"]] == [row["fid"] for row in found["runs"]]


def test_a_blur_study_says_error_sharpness_and_fid(digits: Workspace, judge: BundleExtractor) -> None:
    learner = NextFrameConfig(
        net=UNetConfig(size=32, inputs=2, width=4, depth=2),
        adversary=DcganDiscriminator(size=32, channels=3, width=4, dropout=0.0, spectral_norm=True),
    )
    base = TrainJob(
        name="tiny-blur", task="next_frame", data=DATA, learner=learner, loop=LOOP,
        validation=dataclasses.replace(DATA, split="test"),
    )  # fmt: skip
    job = study_blur.BlurStudyJob(base=base, extractor=judge, frames=12)
    found = study_blur.run(job, digits)
    assert [row["adversary weight"] for row in found["rows"]] == [0.0, 0.01]
    assert all(row["squared error"] > 0 and row["sharpness"] > 0 and row["FID"] > 0 for row in found["rows"])
    _is_kept(found, digits, {row["run"] for row in found["rows"]}, "pictures/blur.png")


@pytest.mark.parametrize("module", [study_gan, study_blur])
def test_a_judge_that_is_not_there_is_told_before_anything_is_trained(
    workspace: Workspace, module: Any
) -> None:
    job = dataclasses.replace(
        next(iter(module.PRESETS.values()))(), extractor=InceptionExtractor(weights="/nowhere")
    )
    with pytest.raises(ConfigError, match=r"extractor\.weights /nowhere is not there"):
        module.run(job, workspace)
    assert not (workspace.home / "mlflow.db").exists()


def _is_kept(found: dict[str, Any], workspace: Workspace, runs: set[str], picture: str) -> None:
    tracker = Tracker.at(workspace)
    assert json.loads(Path(found["file"]).read_text()) == found
    assert json.loads(tracker.load(found["run_id"], "study.json")) == found
    assert picture in tracker.files(found["run_id"], "pictures")
    assert tracker.read(found["run_id"])["status"] == "FINISHED"
    assert {tracker.read(run)["tags"]["mlflow.parentRunId"] for run in runs} == {found["run_id"]}
