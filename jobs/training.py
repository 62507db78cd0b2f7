"""What every training job shows and returns; the jobs themselves are `train_gan`, `train_swap`, `train_detector`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from counterfake import audit
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.loop import Tick, TrainJob
from counterfake.records import Dataset
from counterfake.versions import fits
from counterfake.workspace import Workspace
from jobs.console import Console


def train(
    job: TrainJob, workspace: Workspace, console: Console | None = None, *, parent_run: str | None = None
) -> dict[str, Any]:
    """Run a training job to its end with a progress bar -> its figures, for people and `--json`.

    parent_run: the MLflow run that it is nested below."""
    from counterfake.cluster.train import fit  # not at import: a preset must not load MLflow

    console = console or Console(quiet=True)
    where = f"on {job.workers} Ray workers" if job.workers else "in this process"
    console.stage(f"train {job.name} on {job.data.uri or '(no dataset)'} {where}")
    with contextlib.ExitStack() as stack:
        result = fit(job, workspace, on_progress=_Bar(console, job, stack), parent_run=parent_run)
    if result.reused:
        console.event(
            f"{result.name} was finished before; this is its result. Change a setting, or the name, to train anew"
        )
    if result.stopped:
        console.event(f"stopped early at step {result.steps}: {result.stopped}")
    for back in result.rollbacks:
        console.event(
            f"note: went back from step {back['step']} to {back['to_step']}, learning rate × {back['lr_factor']:g}: {back['reason']}"
        )
    console.event(
        f"{result.steps} steps, {result.images} pictures, {result.images_per_second:.0f} pictures/s; MLflow run {result.run_id}"
    )
    return {
        "name": result.name,
        "run_id": result.run_id,
        "steps": result.steps,
        "images": result.images,
        "images_per_second": round(result.images_per_second, 1),
        "seconds": round(result.seconds, 2),
        "metrics": result.metrics,
        "weights_digest": result.weights_digest,
        "checkpoint": result.checkpoint,
        "bundle": str(result.bundle),
        "registered": result.registered,
        "stopped": result.stopped,
        "rollbacks": list(result.rollbacks),
        "reused": result.reused,
    }


def both_classes(parts: Iterable[DataConfig | None], workspace: Workspace) -> str:
    """How many real and fake pictures each split has, as a sentence. Raises DataError where a class is missing."""
    found = []
    for data in parts:
        if data is None:
            continue
        if not data.uri:
            raise ConfigError("data.uri is not set; name a dataset, like --set data.uri=faces@3")
        real, fake, unlabelled = (_rows(data, label, workspace) for label in (0, 1, None))
        if not real or not fake:
            raise DataError(
                f"a detector needs both classes, but {data.uri} split {data.split} has {real} real and {fake} fake "
                f"pictures{f' and {unlabelled} without a label' if unlabelled else ''}; "
                + _remedy(data, unlabelled)
            )
        found.append(f"{data.split} {real} real, {fake} fake")
    return "; ".join(found)


def admitted(parts: Iterable[DataConfig], workspace: Workspace) -> dict[str, str]:
    """Ask the audits of these datasets for leaks -> tags for the run: the leaks that data.allow_leaks let through.

    Raises DataError for a leak that none of the parts allows."""
    parts = list(parts)
    allow, leaks = any(data.allow_leaks for data in parts), set[str]()
    for uri in dict.fromkeys(workspace.dataset(data.uri) for data in parts):
        dataset = Dataset.open(uri, cache=workspace.cache)
        leaks.update(audit.admit(dataset, dataset.version(dataset.pinned), allow_leaks=allow))
    return {"counterfake.allowed_leaks": ", ".join(sorted(leaks))} if leaks else {}


def _remedy(data: DataConfig, unlabelled: int) -> str:
    if unlabelled:
        return "ingest them again with --set append=false and --set source.fake=0 (real) or 1 (fake)"
    where = f", look at data.where={data.where}" if data.where else ""
    return f"add the missing ones (counterfake run generate makes fakes){where} or choose another dataset"


def _rows(data: DataConfig, label: int | None, workspace: Workspace) -> int:
    dataset = Dataset.open(workspace.dataset(data.uri))
    version = dataset.version(dataset.pinned)
    version.shards(data.split)  # a split that does not exist is refused here
    rules = {k: v for k, v in data.where.items() if k in ("fake", "maker", "identity", "class_id")}
    return sum(
        row["rows"]
        for row in version.counts
        if data.split in ("*", row["split"])
        and row["fake"] == label
        and all(fits(row[k], v) for k, v in rules.items())
    )


class _Bar:
    """A bar that starts with the first tick, which knows how long the run is."""

    def __init__(self, console: Console, job: TrainJob, stack: contextlib.ExitStack) -> None:
        self._console, self._job, self._stack = console, job, stack
        self._advance: Any = None
        self._done = 0

    def __call__(self, tick: Tick) -> None:
        if self._advance is None:
            self._advance = self._stack.enter_context(
                self._console.progress(self._job.name, tick.total_steps)
            )
        self._advance(tick.step - self._done)
        self._done = tick.step
        figures = "  ".join(f"{name} {value:.4g}" for name, value in sorted(tick.metrics.items()))
        self._console.event(
            f"step {tick.step}/{tick.total_steps}  {tick.images_per_second:.0f} pictures/s  {figures}"
        )
