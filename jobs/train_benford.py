"""Grow a forensic detector: first digits of DCT coefficients or JPEG error levels, then a random forest or boosted trees.

No GPU, no Ray.

    counterfake run train_benford benford --set data.uri=stylegan-ffhq      1 core: about 200 pictures/s at 256 px
    counterfake run train_benford benford-demo                              2 cores: under 25 s for 1,500 pictures
    counterfake run train_benford error-level --set data.uri=ciplab          1 core: about 70 pictures/s at 256 px

The pictures are read at their own size, at least 64 pixels a side; below 128 expect little. `val_auc` is measured on
data.split=validation. Expected: far from a trained network on faces that were saved with the same JPEG tables, and a
different opinion, which is what an ensemble needs.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake import bundle, config, locks, media
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection
from counterfake.forensics.benford import BenfordConfig
from counterfake.forensics.error_level import ErrorLevelConfig
from counterfake.forensics.forest import BenfordForest, ForestConfig
from counterfake.records import Dataset
from counterfake.registry import Registry
from counterfake.samples import Sample
from counterfake.scoring import labelled
from counterfake.tracking import Tracker
from counterfake.versions import Version
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.training import admitted, both_classes

CHUNK = 64  # pictures a process is given at a time
PENDING = 4  # chunks ahead of each process


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenfordJob:
    """One forest from one dataset version."""

    name: str = "benford"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # uri, split and where count
    validation: str = "validation"  # split that the validation figures come from; "" = none
    features: BenfordConfig | ErrorLevelConfig = dataclasses.field(default_factory=BenfordConfig)
    forest: ForestConfig = dataclasses.field(default_factory=ForestConfig)
    processes: int = 1  # that extract features; more than 1 pay from about 2,000 pictures on
    limit: int = 0  # pictures of each split; 0 = all
    register_as: str = ""  # name in the registry; "" = not registered

    def __post_init__(self) -> None:
        if self.processes < 1 or self.limit < 0:
            raise ConfigError(
                f"processes must be at least 1 and limit at least 0, got {self.processes} and {self.limit}"
            )


def run(job: BenfordJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Features, trees, validation, bundle; returns where model and run are and the figures."""
    return grow(job, workspace, console)


def grow(
    job: BenfordJob, workspace: Workspace, console: Console | None = None, *, parent_run: str | None = None
) -> dict[str, Any]:
    """What `run` does, also as a part of a study.

    parent_run: the MLflow run that it is nested below. Raises DataError for a locked split, or a leak that the audit found."""
    console, started = console or Console(quiet=True), time.perf_counter()
    both_classes([job.data], workspace)
    job = config.override(job, {"data.uri": workspace.dataset(job.data.uri)})
    dataset = Dataset.open(job.data.uri, cache=workspace.cache)
    version = dataset.version()
    locks.refuse(dataset, version, [job.data.split, *filter(None, [job.validation])], "trained on")
    tags = admitted([job.data], workspace)
    tracked = Tracker.at(workspace).start(
        "detector", job.name, parent=parent_run, tags=tags, params=config.to_dict(job)
    )
    with tracked as log, _pool(job) as pool:
        log.dataset(job.data.uri, version.number, version.digest, "training")
        table, fake = _table(job, dataset, version, job.data.split, pool, console)
        seconds = time.perf_counter() - started
        forest = BenfordForest.fit(table, fake, job.forest)
        console.event(f"{len(fake)} pictures, {len(fake) / seconds:.0f} a second; {len(forest.roots)} trees")
        figures = _validate(job, forest, dataset, version, pool, console)
        figures |= {"rows": float(len(fake)), "images_per_second": len(fake) / seconds}
        log.metrics(figures, 0)
        folder = _write(job, workspace, forest, version, log.id)
        reference = _register(job, workspace, folder, log.id)
    return {
        "run_id": log.id, "bundle": str(folder), "registered": reference, "metrics": figures,
        "dataset": f"{job.data.uri.partition('@')[0]}@{version.number}", "seconds": time.perf_counter() - started,
    }  # fmt: skip


def benford() -> BenfordJob:
    """The paper's 540 features and forest."""
    return BenfordJob(data=DataConfig(uri="stylegan-ffhq"), processes=2, register_as="benford")


def benford_boosting() -> BenfordJob:
    """The same features under gradient boosting."""
    forest = ForestConfig(kind="boosting", trees=300, learning_rate=0.05)
    return dataclasses.replace(
        benford(), name="benford-boosting", forest=forest, register_as="benford-boosting"
    )


def benford_demo() -> BenfordJob:
    """Two qualities and two bases on the demo's faces: seconds instead of minutes."""
    return BenfordJob(
        name="benford-demo", data=DataConfig(uri="faces-demo"), features=BenfordConfig(qualities=(90, 100), bases=(10, 20)),
        register_as="benford-faces",
    )  # fmt: skip


def error_level() -> BenfordJob:
    """Blocks of two recompressions: finds what was pasted into a JPEG, where both classes were not re-encoded since."""
    return BenfordJob(
        name="error-level", data=DataConfig(uri="ciplab"), features=ErrorLevelConfig(), forest=ForestConfig(trees=300),
        register_as="error-level",
    )  # fmt: skip


PRESETS: dict[str, Callable[[], BenfordJob]] = {
    "benford": benford,
    "benford-boosting": benford_boosting,
    "benford-demo": benford_demo,
    "error-level": error_level,
}


# -- private --------------------------------------------------------------------------------------------------------


def extract(
    pictures: list[bytes | NDArray[np.uint8]], features: BenfordConfig | ErrorLevelConfig
) -> NDArray[np.float32]:
    """Encoded or raw pictures -> features; what a process of the pool runs."""
    return features.features_of(
        [p if isinstance(p, np.ndarray) else media.decode_trusted(p) for p in pictures]
    )


class _Here(Executor):
    """One process: this one."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _pool(job: BenfordJob) -> Executor:
    if job.processes == 1:
        return _Here()
    return ProcessPoolExecutor(job.processes, mp_context=multiprocessing.get_context("spawn"))


def _table(
    job: BenfordJob, dataset: Dataset, version: Version, split: str, pool: Executor, console: Console
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features (N, F) and labels (N,) of a split, in stored order."""
    data = dataclasses.replace(job.data, split=split)
    samples, labels = itertools.islice(labelled(dataset, version, data), job.limit or None), []
    parts: list[NDArray[np.float32]] = []
    waiting: list[Future[NDArray[np.float32]]] = []
    with console.progress(
        f"features of {split}", min(job.limit or version.rows(split), version.rows(split))
    ) as advance:
        for chunk in _chunks(samples):
            labels += [int(sample.fake or 0) for sample in chunk]
            waiting.append(pool.submit(extract, [_media(sample) for sample in chunk], job.features))
            while len(waiting) > PENDING * job.processes:
                parts.append(waiting.pop(0).result())
            advance(len(chunk))
        parts += [future.result() for future in waiting]
    if not parts:
        raise DataError(f"{job.data.uri} split {split} has no labelled rows")
    return np.concatenate(parts), np.array(labels)


def _media(sample: Sample) -> bytes | NDArray[np.uint8]:
    return sample.media if sample.pixels is None else sample.pixels


def _chunks(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    while chunk := list(itertools.islice(samples, CHUNK)):
        yield chunk


def _validate(
    job: BenfordJob,
    forest: BenfordForest,
    dataset: Dataset,
    version: Version,
    pool: Executor,
    console: Console,
) -> dict[str, float]:
    if not job.validation or not version.splits.get(job.validation):
        return {}
    table, fake = _table(job, dataset, version, job.validation, pool, console)
    if len(np.unique(fake)) < 2:
        console.event(f"split {job.validation} has one class only: no validation figures")
        return {}
    found = detection.evaluate(fake, forest.predict(table), bootstraps=0)
    console.event(f"validation AUC {found['auc']['value']:.3f}, accuracy {found['accuracy']['value']:.3f}")
    return {
        f"val_{name}": float(found[name]["value"]) for name in ("auc", "accuracy", "recall_real", "brier")
    }


def _write(
    job: BenfordJob, workspace: Workspace, forest: BenfordForest, version: Version, run_id: str
) -> Path:
    dataset = {"uri": job.data.uri.partition("@")[0], "version": version.number, "digest": version.digest}
    provenance = {
        "dataset": dataset, "sources": version.sources, "run_id": run_id, "commit": bundle.source_commit(),
        "job": config.to_dict(job),
    }  # fmt: skip
    folder = workspace.home / "models" / f"{job.name}-{config.digest(job)[:8]}-{version.digest[:8]}"
    trees = {job.features.family: job.features, "forest": job.forest}
    bundle.write(
        folder,
        kind="benford" if isinstance(job.features, BenfordConfig) else "error_level",
        name=job.name,
        config=trees,
        tensors=forest.tensors(),
        preprocess=None,
        provenance=provenance,
    )
    return folder


def _register(job: BenfordJob, workspace: Workspace, folder: Path, run_id: str) -> str:
    if not job.register_as:
        return ""
    return Registry.at(workspace).register(folder, job.register_as, run_id=run_id).reference
