"""Train a video detector: a GRU over the frames' features of a picture detector, and whether it beats their mean.

    counterfake run ingest video --set source.path=FOLDER --set into=clips     once: frames of videos, real and fake
    counterfake run train-video --set detector=mobilenetv2-faces@champion --set data.uri=clips

One pass of the detector over at most `frames` frames of each video, evenly spread, then three answers per video on the test split:
the GRU, the same head on averaged features, and the mean of the detector's own logits, each difference with its interval. The
epoch is chosen on the validation split. Videos with fewer than `least` frames are left out and counted. Split the data by video or
identity when it is ingested. Without a difference whose interval excludes 0, use the mean.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterfake import bundle, config, images, locks, predictor
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection
from counterfake.evaluation.card import percent
from counterfake.learners.video import Clips, Fitted, VideoHeadConfig, fit, frame_mean
from counterfake.nets import NetConfig
from counterfake.nets.backbone import BackboneConfig, Detector
from counterfake.nets.temporal import TemporalConfig
from counterfake.predictor import NetPredictor
from counterfake.records import Dataset
from counterfake.registry import Registry
from counterfake.scoring import decoded
from counterfake.tracking import Tracker
from counterfake.versions import Version
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.evaluate import resolve
from jobs.training import admitted

Frame = tuple[str, int]  # video, number of the frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoJob:
    """One GRU over one picture detector, from one dataset version whose rows name their video and frame."""

    name: str = "video"
    detector: str = ""  # picture detector: "name@alias", "name/3", or a bundle folder
    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # uri counts
    splits: tuple[str, str, str] = ("train", "validation", "test")
    frames: int = 16  # of each video, evenly spread; shorter videos repeat some
    least: int = 3  # frames a video must have
    hidden: int = 128  # units of the GRU, each direction
    dropout: float = 0.3
    head: VideoHeadConfig = dataclasses.field(default_factory=VideoHeadConfig)
    bootstraps: int = 1000  # resamples of each interval, by person
    register_as: str = ""  # name in the registry; "" = not registered

    def __post_init__(self) -> None:
        if self.frames < 1 or self.least < 1 or len(set(self.splits)) < 3:
            raise ConfigError(
                f"frames and least must be at least 1 and splits three different ones, got {self.frames}, {self.least}, "
                f"{self.splits}"
            )


def run(job: VideoJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Features, heads, comparison, bundle; returns the figures and where everything is."""
    console, started = console or Console(quiet=True), time.perf_counter()
    job = config.override(job, {"data.uri": workspace.dataset(job.data.uri) if job.data.uri else ""})
    detector = _detector(job, workspace)
    dataset = Dataset.open(_uri(job), cache=workspace.cache)
    version = dataset.version()
    locks.refuse(dataset, version, job.splits, "read video by video")
    tags = admitted([job.data], workspace)
    parts = [Reader(job, detector, dataset, version, split).clips(console) for split in job.splits]
    heads = {
        name: fit(parts[0], parts[1], _net(job, detector, recurrent=name == "gru"), job.head)
        for name in ("gru", "features_mean")
    }
    figures = compare(heads, parts[2], job.bootstraps)
    with Tracker.at(workspace).start("detector", job.name, tags=tags, params=config.to_dict(job)) as log:
        log.dataset(job.data.uri, version.number, version.digest, "training")
        log.metrics(_flat(figures), 0)
        folder = _write(job, workspace, detector, heads["gru"], version, log.id)
        reference = _register(job, workspace, folder, log.id)
    _show(console, figures)
    return {
        "run_id": log.id, "bundle": str(folder), "registered": reference, "figures": figures,
        "clips": [len(part) for part in parts], "epochs": heads["gru"].epochs, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def compare(heads: Mapping[str, Fitted], clips: Clips, bootstraps: int) -> dict[str, Any]:
    """AUC of each answer on the test clips, and what the GRU gains over both controls, with 95 % intervals."""
    answers = {name: head.probability(clips).numpy() for name, head in heads.items()}
    answers["frame_mean"] = frame_mean(clips).numpy()
    fake = clips.fake.numpy()
    found: dict[str, Any] = {}
    for name, probability in answers.items():
        judged = detection.evaluate(fake, probability, clusters=clips.people, bootstraps=bootstraps)
        found[name] = {key: judged[key] for key in ("auc", "accuracy", "recall_real")}
    for control in ("features_mean", "frame_mean"):
        found[f"gru_minus_{control}"] = detection.paired_difference(
            fake, answers["gru"], answers[control], clusters=clips.people, bootstraps=bootstraps
        )
    return found


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` positions, evenly spread, in order; some twice where there are too few."""
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]


def video() -> VideoJob:
    """16 frames, 2 × 128 units."""
    return VideoJob(register_as="video")


PRESETS: dict[str, Callable[[], VideoJob]] = {"video": video}


# -- private --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reader:
    """The videos of one split as features of their frames; one pass over the rows, only chosen frames are decoded."""

    job: VideoJob
    detector: NetPredictor
    dataset: Dataset
    version: Version
    split: str

    def clips(self, console: Console) -> Clips:
        """Frames that the detector cannot answer (no face) are left out. Raises DataError if no video is long enough."""
        rows = self._labels()
        chosen = self._chosen(rows)
        features, logits = self._features({frame for frames in chosen.values() for frame in frames}, console)
        usable = {
            video: self._usable([f for f in frames if f in features]) for video, frames in chosen.items()
        }
        frames = {video: found for video, found in usable.items() if found}
        console.event(
            f"{self.split}: {len(frames)} videos, {len({v for v, _ in rows}) - len(frames)} left out"
        )
        if not frames:
            raise DataError(
                f"{_uri(self.job)} split {self.split} has no labelled video with {self.job.least} usable frames or more; "
                "ingest videos (counterfake run ingest video) or set least"
            )
        first = {video: rows[found[0]] for video, found in frames.items()}
        return Clips(
            features=torch.stack([torch.stack([features[f] for f in found]) for found in frames.values()]),
            logits=torch.stack([torch.stack([logits[f] for f in found]) for found in frames.values()]),
            fake=torch.tensor([row["fake"] for row in first.values()]),
            names=tuple(frames),
            people=tuple(row["identity"] or video for video, row in first.items()),
        )

    def _chosen(self, rows: Mapping[Frame, Any]) -> dict[str, list[Frame]]:
        """For each video that is long enough: at most `frames` of its frames, evenly spread."""
        videos: dict[str, list[Frame]] = collections.defaultdict(list)
        for frame in sorted(rows):
            videos[frame[0]].append(frame)
        chosen = {video: self._usable(found) for video, found in videos.items()}
        return {video: sorted(set(found)) for video, found in chosen.items() if found}

    def _usable(self, found: list[Frame]) -> list[Frame]:
        """Exactly `frames` of them, evenly spread, some twice; none where there are fewer than `least`."""
        if len(found) < self.job.least:
            return []
        return [found[i] for i in spread(len(found), self.job.frames)]

    def _labels(self) -> dict[Frame, dict[str, Any]]:
        """Label and identity of every labelled frame of a video."""
        columns = ("video", "frame", "fake", "identity")
        table = self.dataset.read(self.version, self.split, columns).to_pylist()
        return {
            (row["video"], row["frame"]): row
            for row in table
            if row["video"] is not None and row["frame"] is not None and row["fake"] is not None
        }

    def _features(
        self, wanted: set[Frame], console: Console
    ) -> tuple[dict[Frame, Tensor], dict[Frame, Tensor]]:
        """Pooled features (C,) and the detector's own logit () of each wanted frame that it can answer."""
        features: dict[Frame, Tensor] = {}
        logits: dict[Frame, Tensor] = {}
        with console.progress(f"frames of {self.split}", len(wanted)) as advance:
            for keys, pictures in self._chunks(wanted):
                pooled, own = _answer(self.detector, pictures)
                features.update(zip(keys, pooled, strict=True))
                logits.update(zip(keys, own, strict=True))
                advance(len(keys))
        return features, logits

    def _chunks(self, wanted: set[Frame]) -> Iterator[tuple[list[Frame], list[NDArray[np.uint8]]]]:
        answerable = self._pictures(wanted)
        while chunk := list(itertools.islice(answerable, predictor.BATCH)):
            yield [frame for frame, _ in chunk], [pixels for _, pixels in chunk]

    def _pictures(self, wanted: set[Frame]) -> Iterator[tuple[Frame, NDArray[np.uint8]]]:
        for sample in self.dataset.samples(self.version, self.split):
            frame = (sample.video or "", -1 if sample.frame is None else sample.frame)
            if frame in wanted:
                picture = decoded(sample, self.detector.finders)
                if self.detector.refusal(picture) is None:
                    yield frame, self.detector.prepare(picture)


def _answer(detector: NetPredictor, pictures: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    """Features (N, C) and logits (N,) on the CPU."""
    net = detector.net
    assert isinstance(net, Detector), "checked when the detector was opened"
    batch = images.to_float(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(detector.device))
    with torch.inference_mode():
        pooled = net.pooled(batch)
        return pooled.cpu(), net.head(pooled).squeeze(1).cpu()


def _detector(job: VideoJob, workspace: Workspace) -> NetPredictor:
    if not job.detector:
        raise ConfigError(
            "detector is not set; name a picture detector, like --set detector=mobilenetv2-faces@champion"
        )
    loaded = predictor.load(resolve(job.detector, workspace))
    if not isinstance(loaded, NetPredictor) or not isinstance(loaded.net, Detector):
        raise ConfigError(
            f"detector {job.detector} has no features of pictures; choose one that train-detector made"
        )
    return loaded


def _net(job: VideoJob, detector: NetPredictor, recurrent: bool) -> TemporalConfig:
    backbone = config.from_dict(NetConfig, next(iter(detector.bundle.config.values())))  # type: ignore[type-abstract]
    if not isinstance(backbone, BackboneConfig):
        raise ConfigError(
            f"detector {job.detector} is a {type(backbone).__name__}; choose one with a backbone"
        )
    return TemporalConfig(backbone=backbone, recurrent=recurrent, hidden=job.hidden, dropout=job.dropout)


def _write(
    job: VideoJob, workspace: Workspace, detector: NetPredictor, fitted: Fitted, version: Version, run_id: str
) -> Path:
    """The backbone and the GRU as one detector; it reads pictures too, as clips of one frame."""
    frames = next(iter(bundle.load_nets(detector.bundle).values())).features.state_dict()  # type: ignore[union-attr]
    state = {f"features.{name}": value for name, value in frames.items()}
    state |= {f"head.{name}": value for name, value in fitted.head.state_dict().items()}
    dataset = {"uri": _uri(job).partition("@")[0], "version": version.number, "digest": version.digest}
    folder = workspace.home / "models" / f"{job.name}-{config.digest(job)[:8]}-{version.digest[:8]}"
    bundle.write_nets(
        folder,
        kind="detector",
        name=job.name,
        nets={"detector": (_net(job, detector, recurrent=True), state)},
        preprocess=detector.preprocess,
        provenance={
            "dataset": dataset, "sources": version.sources, "run_id": run_id, "commit": bundle.source_commit(),
            "job": config.to_dict(job), "picture_detector": detector.bundle.digest,
        },
    )  # fmt: skip
    return folder


def _register(job: VideoJob, workspace: Workspace, folder: Path, run_id: str) -> str:
    if not job.register_as:
        return ""
    return Registry.at(workspace).register(folder, job.register_as, run_id=run_id).reference


def _uri(job: VideoJob) -> str:
    if not job.data.uri:
        raise ConfigError("data.uri is not set; name a dataset of videos, like --set data.uri=clips")
    return job.data.uri


def _flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """Metrics for MLflow: test_gru_auc, test_gru_minus_frame_mean, …; what could not be measured is left out."""
    flat = config.flatten({f"test_{name}": found for name, found in figures.items()})
    named = {
        key.replace(".", "_").removesuffix("_value"): v for key, v in flat.items() if key.endswith(".value")
    }
    return {name: float(value) for name, value in named.items() if value is not None}


def _show(console: Console, figures: Mapping[str, Any]) -> None:
    for name in ("frame_mean", "features_mean", "gru"):
        console.event(f"{name.replace('_', ' ')}: AUC {percent(figures[name]['auc'])}")
    for control in ("frame_mean", "features_mean"):
        gain = figures[f"gru_minus_{control}"]
        console.event(
            f"gru minus {control.replace('_', ' ')}: AUC {gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        )
