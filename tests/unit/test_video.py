"""The video head: early stopping on validation only, the controls, and the job from stored frames to a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from counterfake import bundle, images, locks, media, predictor
from counterfake.config import override
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.learners.video import Clips, VideoHeadConfig, fit, frame_mean
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.nets.temporal import TemporalConfig
from counterfake.records import Dataset, write_version
from counterfake.samples import Sample
from counterfake.workspace import Workspace
from jobs import train_video

NET = TemporalConfig(hidden=8, dropout=0.0)
HEAD = VideoHeadConfig(epochs=30, patience=5, lr=0.02)


def test_the_gru_finds_a_flicker_and_the_mean_does_not() -> None:
    train, held_out, test = flickering(120, 0), flickering(60, 1), flickering(200, 2)
    heads = {
        "gru": fit(train, held_out, NET, HEAD),
        "features_mean": fit(train, held_out, replace(NET, recurrent=False), HEAD),
    }
    found = train_video.compare(heads, test, bootstraps=200)
    assert found["gru"]["auc"]["value"] > 0.95
    assert found["features_mean"]["auc"]["value"] < 0.7
    assert found["gru_minus_features_mean"]["low"] > 0.2
    assert found["gru_minus_frame_mean"]["low"] > 0.2


def test_training_stops_when_validation_no_longer_improves_and_keeps_the_best_epoch() -> None:
    train, noise = flickering(60, 0), flickering(60, 1)
    noise = replace(noise, fake=torch.arange(60) % 2)  # labels that nothing can learn
    fitted = fit(train, noise, NET, replace(HEAD, epochs=50, patience=3))
    assert fitted.epochs < 50
    again = fit(train, noise, NET, replace(HEAD, epochs=fitted.epochs - 3, patience=3))
    assert torch.equal(again.probability(noise), fitted.probability(noise))


def test_the_frame_mean_is_the_sigmoid_of_the_mean_logit() -> None:
    clips = replace(flickering(2, 0), logits=torch.tensor([[1.0, 3.0], [-2.0, 0.0]]))
    torch.testing.assert_close(frame_mean(clips), torch.tensor([2.0, -1.0], dtype=torch.float64).sigmoid())


@pytest.mark.parametrize(
    ("count", "wanted", "positions"), [(8, 4, [1, 3, 5, 7]), (3, 5, [0, 0, 1, 2, 2]), (1, 2, [0, 0])]
)
def test_frames_are_spread_evenly(count: int, wanted: int, positions: list[int]) -> None:
    assert train_video.spread(count, wanted) == positions


def test_the_job_reads_stored_frames_and_leaves_a_bundle(workspace: Workspace) -> None:
    detector = tiny_detector(workspace.home / "detector")
    store(workspace)
    changes = {
        "detector": str(detector),
        "data.uri": "clips",
        "frames": 4,
        "hidden": 8,
        "head.epochs": 2,
        "bootstraps": 20,
    }
    done = train_video.run(override(train_video.VideoJob(), changes), workspace)
    assert done["clips"] == [12, 6, 6]  # the clip of two frames is left out of train
    assert set(done["figures"]) >= {"gru", "frame_mean", "gru_minus_frame_mean"}
    net = bundle.load_nets(bundle.read(Path(done["bundle"])))["detector"]
    clip = torch.rand(2, 4, 3, 32, 32)
    with torch.inference_mode():
        assert net(clip).shape == (2,)
        torch.testing.assert_close(net(clip[:, 0]), net(clip[:, :1]))
    pixels = np.zeros((32, 32, 3), np.uint8)
    assert 0 < predictor.load(done["bundle"]).predict_bytes([media.encode(pixels, "png")])[0] < 1


def test_a_locked_split_is_not_read_video_by_video(workspace: Workspace) -> None:
    detector = tiny_detector(workspace.home / "detector")
    store(workspace)
    dataset = Dataset.open(workspace.dataset("clips"))
    locks.lock(dataset, dataset.version(), ["test"])
    with pytest.raises(DataError, match=r"split test of .* is locked and cannot be read video by video"):
        train_video.run(train_video.VideoJob(detector=str(detector), data=DataConfig(uri="clips")), workspace)


def test_what_is_missing_is_said_in_one_line(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="detector is not set"):
        train_video.run(train_video.VideoJob(), workspace)
    detector = tiny_detector(workspace.home / "detector")
    with pytest.raises(ConfigError, match=r"data\.uri is not set"):
        train_video.run(train_video.VideoJob(detector=str(detector)), workspace)
    store(workspace)
    job = override(train_video.VideoJob(), {"detector": str(detector), "data.uri": "clips", "least": 99})
    with pytest.raises(DataError, match="no labelled video with 99 usable frames"):
        train_video.run(job, workspace)
    one = replace(flickering(4, 0), fake=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="training clips hold one class only"):
        fit(one, flickering(8, 0), NET, HEAD)


def flickering(count: int, seed: int) -> Clips:
    """Fakes alternate around the level that real clips keep; means over frames say nothing."""
    generator = torch.Generator().manual_seed(seed)
    fake = torch.arange(count) % 2
    level = torch.randn(count, 1, 4, generator=generator)
    sign = (-1.0) ** torch.arange(8)[None, :, None]
    features = level + fake[:, None, None] * sign
    names = tuple(f"clip{i}" for i in range(count))
    return Clips(features=features, logits=features[:, :, 0], fake=fake, names=names, people=names)


def store(workspace: Workspace) -> None:
    """24 clips of four small frames, and one of two, in three splits."""
    rng = np.random.default_rng(0)
    samples = []
    for clip in range(25):
        split = ("train", "train", "validation", "test")[clip % 4]
        for frame in range(2 if clip == 24 else 4):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            samples.append(
                Sample(
                    image=media.encode(pixels, "png"), fake=(clip // 4) % 2, source="s", video=f"v{clip:02d}",
                    frame=frame, split=split,
                )
            )  # fmt: skip
    write_version(workspace.dataset("clips"), samples, sources={"s": {"licence": "MIT", "consent": "none"}})


def tiny_detector(folder: Path) -> Path:
    torch.manual_seed(0)
    config = MobileNetV2Config.tiny()
    bundle.write_nets(
        folder, kind="detector", name="tiny", nets={"detector": (config, config.build().state_dict())},
        preprocess=images.Preprocess(size=32), provenance={},
    )  # fmt: skip
    return folder
