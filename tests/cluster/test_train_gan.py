"""A GAN run from the job's side: what it leaves in MLflow. Slow for a unit test: it makes a tracking database."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from counterfake import provenance
from counterfake.data import DataConfig
from counterfake.images import Preprocess
from counterfake.learners.gan import GanConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.records import Sample, write_version
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs.train_gan import gif_frames, run


def test_a_run_leaves_a_gif_and_says_that_nothing_was_wrong(workspace: Workspace) -> None:
    result = run(tiny_job(workspace), workspace)
    tracker = Tracker.at(workspace)
    assert result["notes"] == []
    assert tracker.read(result["run_id"])["tags"]["collapse"] == "none seen"
    assert tracker.read(result["run_id"])["status"] == "FINISHED"
    previews = tracker.files(result["run_id"], "previews/samples")
    assert len(previews) == 3
    film = tracker.load(result["run_id"], "dcgan.gif")
    epochs = [f"epochs/image_at_epoch_{epoch:04d}.png" for epoch in (1, 2, 3)]
    assert tracker.files(result["run_id"], "epochs") == epochs
    for data in (film, *(tracker.load(result["run_id"], path) for path in (*previews, *epochs))):
        assert provenance.read(data).digital_source_type == "trainedAlgorithmicMedia"
    with Image.open(io.BytesIO(film)) as gif:
        assert gif.n_frames == len(set(gif_frames(previews)))  # the last, given twice, is shown longer


def tiny_job(workspace: Workspace) -> TrainJob:
    """Three epochs of 24 noise pictures."""
    uri, rng = workspace.dataset("noise"), np.random.default_rng(0)
    rows = [
        Sample(
            pixels=rng.integers(0, 256, (28, 28, 1), dtype=np.uint8),
            source="noise",
            path=f"{i}",
            split="train",
        )
        for i in range(24)
    ]
    write_version(uri, rows, sources={"noise": {"licence": "CC0-1.0", "consent": "none"}})
    return TrainJob(
        name="dcgan-tiny",
        task="gan",
        data=DataConfig(uri="noise", batch_size=8, preprocess=Preprocess(size=28, channels=1)),
        learner=GanConfig(generator=DcganGenerator.tiny(), discriminator=DcganDiscriminator.tiny()),
        loop=LoopConfig(epochs=3, tick_steps=0),
    )
