"""What the job adds to the learner: the choice of frames, the GIF, the refusal of too little data."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterfake import media
from counterfake.data import DataConfig
from counterfake.errors import DataError
from counterfake.images import Preprocess
from counterfake.learners.gan import GanConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.records import Dataset, Sample, write_version
from counterfake.workspace import Workspace
from jobs.__main__ import main
from jobs.train_gan import gif_frames, run


def test_fifty_epochs_give_the_articles_fifteen_frames() -> None:
    frames = gif_frames([str(epoch) for epoch in range(1, 51)])
    assert frames == ["1", "2", "3", "5", "7", "9", "12", "16", "20", "24", "29", "35", "41", "47", "50"]


def test_a_gif_holds_its_frames() -> None:
    frames = [np.full((8, 12, 3), value, np.uint8) for value in (0, 128, 255)]
    with Image.open(io.BytesIO(media.encode_gif(frames, milliseconds=150))) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (3, (12, 8), 150)


def test_a_dataset_smaller_than_a_batch_is_refused(workspace: Workspace) -> None:
    job = tiny_job(workspace)
    with pytest.raises(DataError, match=r"has 24 rows, fewer than data.batch_size=64; lower it"):
        run(dataclasses.replace(job, data=dataclasses.replace(job.data, batch_size=64)), workspace)


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ([None] * 24, "24 of 24 pictures of noise@1 split train have no class"),
        ([0, 1] * 11 + [0, None], "1 of 24 pictures of noise@1 split train have no class"),
        (
            [0, 4] * 12,
            r"noise@1 split train has class 4 but the networks know 0 to 2; set learner\.generator\.classes=5",
        ),
    ],
    ids=["none", "one missing", "too many"],
)
def test_a_conditional_preset_on_data_without_its_classes_is_one_line_before_anything_starts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    classes: list[int | None],
    says: str,
) -> None:
    workspace = Workspace.at(tmp_path / "runs")
    tiny_job(workspace, classes)
    sets = [
        "data.uri=noise",
        "data.batch_size=8",
        "learner.generator.classes=3",
        "learner.discriminator.classes=3",
    ]
    command = ["counterfake", "run", "train-gan", "gan-conditional", "--home", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", [*command, *(word for one in sets for word in ("--set", one))])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # after the word that training begins
    assert re.search(says, line)
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_rows_left_out_by_where_need_no_class(workspace: Workspace) -> None:
    tiny_job(workspace, [0, 1] * 11 + [0, None])
    told = GanConfig(
        generator=dataclasses.replace(DcganGenerator.tiny(), classes=3),
        discriminator=dataclasses.replace(DcganDiscriminator.tiny(), classes=3),
    )
    version = Dataset.open(workspace.dataset("noise")).version()
    with pytest.raises(DataError, match="1 of 24 pictures of noise have no class"):
        told.admit(version.counts_of("train", {}), "noise")
    told.admit(version.counts_of("train", {"class_id": [0, 1]}), "noise")
    assert version.counts_of("test", {}) == []


def tiny_job(workspace: Workspace, classes: list[int | None] | None = None) -> TrainJob:
    """Three epochs of 24 noise pictures."""
    uri, rng = workspace.dataset("noise"), np.random.default_rng(0)
    rows = [
        Sample(
            pixels=rng.integers(0, 256, (28, 28, 1), dtype=np.uint8),
            source="noise",
            class_id=classes[i] if classes else None,
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
