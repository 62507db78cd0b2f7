"""Train a face swap: one encoder for everyone, a decoder per person.

    counterfake run train-swap swap-demo                                    2 cores: about 90 s; features and colours swap
    counterfake run train-swap swap-shared-small --set data.uri=faces       20,000 updates at 64 px
    counterfake run train-swap swap-shared --set data.uri=faces --set workers=4 --set gpus_per_worker=1
                                                                            the code of 2017; one GPU: about a day

The faces need `face_box` and `identity`. Without data.where.identity the `learner.people` best pictured people of the
split are taken. Expected: the preview `swaps` shows each face (first column) as every person, in the same pose.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.images import Preprocess
from counterfake.learners.faceswap import MIN_PICTURES, FaceSwapConfig
from counterfake.learners.warp import WarpConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.swap import SwapConfig
from counterfake.records import Dataset
from counterfake.versions import fits
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.training import train


def run(job: TrainJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Choose the people, train, and return where model, checkpoint and run are."""
    job = with_people(job, workspace)
    return {**train(job, workspace, console), "people": job.data.where["identity"]}


def with_people(job: TrainJob, workspace: Workspace) -> TrainJob:
    """The job with its people named. Raises DataError for fewer than two, or for people with too few pictures."""
    if not isinstance(job.learner, FaceSwapConfig):
        raise ConfigError(f"train_swap trains a FaceSwapConfig, the job has a {type(job.learner).__name__}")
    if not job.data.uri:
        raise ConfigError("data.uri is not set; name a dataset, like --set data.uri=faces@3")
    counts = pictures_per_person(job.data, workspace)
    named = job.data.where.get("identity")
    if named is not None:
        people = [named] if isinstance(named, str) else list(named)
        few = [f"{name} ({counts[name]})" for name in people if counts[name] < MIN_PICTURES]
        if few:
            raise DataError(
                f"each person needs {MIN_PICTURES} pictures; too few of {', '.join(few)} in {job.data.uri}"
            )
    else:
        ranked = sorted(counts, key=lambda name: (-counts[name], name))
        people = sorted(
            [name for name in ranked if counts[name] >= MIN_PICTURES][: job.learner.people or None]
        )
    if len(people) < 2:
        raise DataError(
            f"face swapping needs two people with {MIN_PICTURES} pictures each; {job.data.uri} split {job.data.split} has"
            f" {len(counts)} people with {max(counts.values(), default=0)} pictures at most; ingest one folder per person, or more of each"
        )
    where = {**job.data.where, "identity": people}
    return dataclasses.replace(job, data=dataclasses.replace(job.data, where=where))


def pictures_per_person(data: DataConfig, workspace: Workspace) -> Counter[str]:
    """Rows of each identity in the split, of those that the other filters let through; from the manifest alone."""
    dataset = Dataset.open(workspace.dataset(data.uri))
    rules = {name: value for name, value in data.where.items() if name in ("fake", "maker", "class_id")}
    counts: Counter[str] = Counter()
    for row in dataset.version(dataset.pinned).counts:
        if (
            data.split in ("*", row["split"])
            and row["identity"] is not None
            and all(fits(row[k], v) for k, v in rules.items())
        ):
            counts[row["identity"]] += row["rows"]
    return counts


# -- presets --------------------------------------------------------------------------------------------------------


def swap_shared() -> TrainJob:
    """December 2017 in full: 64 px, 69.7 M parameters in the encoder, 6.2 M per person, 200,000 updates."""
    return TrainJob(
        name="swap-shared",
        task="faceswap",
        data=_faces("faces", side=160, margin=1.75, batch_size=128),
        learner=FaceSwapConfig(people=2),
        loop=LoopConfig(steps=200_000, tick_steps=100, checkpoint_every_ticks=5, preview_every_ticks=10),
        register_as="swap-shared",
    )


def swap_shared_small() -> TrainJob:
    """The same design at 64 px with 2 M parameters in the encoder and 0.4 M per person."""
    net = SwapConfig(
        size=64, coverage=0.8, encoder=(24, 48, 96, 128), code=256, upscaled=128, decoder=(64, 32, 16)
    )
    return TrainJob(
        name="swap-shared-small",
        task="faceswap",
        data=_faces("faces", side=80, margin=1.4, batch_size=32),
        learner=dataclasses.replace(_fast(net), people=8, straight_images=100_000),
        loop=LoopConfig(steps=20_000, tick_steps=250, preview_every_ticks=8),
        register_as="swap-faces",
    )


def swap_demo() -> TrainJob:
    """48 px, four people of the demo faces, about 75 s on two cores."""
    net = SwapConfig(
        size=48, coverage=0.8, encoder=(24, 48, 96, 128), code=256, upscaled=128, decoder=(64, 32, 16)
    )
    return TrainJob(
        name="swap-demo",
        task="faceswap",
        data=_faces("faces-demo", side=60, margin=1.4, batch_size=16),
        learner=dataclasses.replace(_fast(net), people=4, straight_images=8_000),
        loop=LoopConfig(images=24_000, tick_steps=250, checkpoint_every_ticks=2, precision="bf16"),
        register_as="swap-faces",
    )


PRESETS: dict[str, Callable[[], TrainJob]] = {
    "swap-demo": swap_demo,
    "swap-shared-small": swap_shared_small,
    "swap-shared": swap_shared,
}


def _faces(uri: str, *, side: int, margin: float, batch_size: int) -> DataConfig:
    """Face crops, real pictures only."""
    preprocess = Preprocess(size=side, crop="face", margin=margin)
    return DataConfig(uri=uri, preprocess=preprocess, batch_size=batch_size, where={"fake": 0})


def _fast(net: SwapConfig) -> FaceSwapConfig:
    """For minutes instead of a day: a higher rate that decays, and straight faces at the end."""
    return FaceSwapConfig(
        net=net,
        lr=2e-3,
        beta1=0.9,
        final_lr_factor=0.1,
        match_colour=False,
        warp=WarpConfig(rotation=4.0, zoom=0.03, shift=0.02),
    )
