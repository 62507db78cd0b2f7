"""What every training process does: load the data, resume the learner, run the loop, report. Knows no Ray: a `Host`
gives it the last checkpoint and takes its reports, on a cluster as in one process.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from counterfake import boxes, checkpoint, dist, loop, memory, precision
from counterfake.bundle import Kind, write_nets
from counterfake.config import from_dict, to_dict
from counterfake.data import Batch, DataConfig, Loader, used_sources
from counterfake.errors import CheckpointError, CollapseError, ConfigError, NonFiniteError, TrackingError
from counterfake.learners import Learner, LearnerContext, Recoverable
from counterfake.storage import open_store
from counterfake.temporary import temporary_folder
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[loop.Tick], None]

BUNDLE_KINDS: dict[str, Kind] = {
    "gan": "generator",
    "faceswap": "faceswap",
    "detector": "detector",
    "autoencoder": "autoencoder",
    "classifier": "classifier",
    "next_frame": "next_frame",
}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the driver asks of every worker: the job with its dataset pinned, and where things go."""

    job: loop.TrainJob
    workspace: Workspace
    name: str  # of the run: job name and digest
    run_id: str  # of MLflow
    dataset: dict[str, Any]  # uri, version, digest, sources
    commit: str

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "job": to_dict(self.job), "workspace": to_dict(self.workspace)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Order:
        job = from_dict(loop.TrainJob, tree["job"])
        return cls(**{**tree, "job": job, "workspace": from_dict(Workspace, tree["workspace"])})


class Host(Protocol):
    """Whoever runs the worker."""

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """A local copy of the newest complete checkpoint of this run."""

    def report(self, tick: loop.Tick, folder: Path | None) -> None:
        """Take the metrics and, from rank 0, a checkpoint folder, which may be deleted afterwards."""

    def agree(self, answer: dict[str, str]) -> dict[str, str]:
        """Rank 0's `answer`, on every rank. All ranks call it; they may wait as long as for a report."""


def work(order: Order, host: Host) -> dict[str, Any]:
    """Train to the end of the job, from the newest checkpoint if there is one -> the figures of the whole run."""
    job = order.job
    _set_process(job)
    device = dist.device()
    loader = Loader(job.data, rank=dist.rank(), world=dist.world_size(), cache=order.workspace.cache)
    learner, summary = _begin(order, host, loader, device)
    if dist.is_main():
        _check_shared(order)
    run = Tracker.at(order.workspace).resume(order.run_id) if dist.is_main() else None
    logger.info(
        "%s: rank %d of %d on %s from step %d",
        order.name,
        dist.rank(),
        dist.world_size(),
        device,
        learner.steps,
    )
    with _closing(run):
        reporter = _Reporter(order, host, learner, loader, device, run, summary)
        while not reporter.trained():
            reporter = _rolled_back(reporter)
        if dist.is_main():
            _publish_bundle(order, reporter.learner, loader)
    return {**reporter.summary, "weights_digest": checkpoint.weights_digest(reporter.learner.state_dict())}


# -- private --------------------------------------------------------------------------------------------------------


@dataclass
class _Reporter:
    """From ticks to checkpoints, validation, MLflow and the host."""

    order: Order
    host: Host
    learner: Learner
    loader: Loader
    device: torch.device
    run: Run | None  # of rank 0
    summary: dict[str, Any]  # kept in each checkpoint, so that it survives a restart
    failure: CollapseError | NonFiniteError | None = None  # why `trained` was False
    _fixed: Batch | None = None

    def trained(self) -> bool:
        """Train to the end of the job -> whether that went well; `failure` says why not."""
        if self.summary.get("stopped"):  # the last checkpoint is that of an early end
            return True
        settings, start = self.order.job.loop, self.learner.steps
        try:
            loop.train(
                self.learner, self.loader, settings, self.on_tick, start_step=start, device=self.device
            )
        except (CollapseError, NonFiniteError) as error:
            self.failure = error
        return self.failure is None

    def on_tick(self, tick: loop.Tick) -> str | None:
        """Measure, decide whether to stop, log, store -> why the run ends here, the same on every rank."""
        if isinstance(self.learner, Recoverable):
            self.learner.check()
        if tick.due_checkpoint:
            loop.check_finite(self.learner.state_dict(), tick.step)
        if tick.due_checkpoint and self.order.job.validation and dist.is_main():
            found = self.learner.validate(self._held_out(self.order.job.validation))
            tick = dataclasses.replace(
                tick, metrics={**tick.metrics, **{f"val_{k}": v for k, v in found.items()}}
            )
        stopped = self._stopped(tick)
        if stopped:
            tick = dataclasses.replace(tick, last=True, due_preview=True, total_steps=tick.step)
            self.summary["stopped"] = stopped
        self._add(tick)
        if self.run:
            self._log(self.run, tick)
        self._report(tick)
        return stopped

    def _stopped(self, tick: loop.Tick) -> str | None:
        """Why every rank ends with this tick. Rank 0 decides: it alone has seen the held-out rows."""
        settings = self.order.job.loop
        if not (settings.patience_ticks and tick.due_checkpoint):
            return None
        answer = self.host.agree(self._judged(tick) if dist.is_main() else {})
        if "error" in answer:  # on every rank, or the others would wait for a report that never comes
            raise ConfigError(answer["error"])
        return answer["stop"] or None

    def _judged(self, tick: loop.Tick) -> dict[str, str]:
        settings = self.order.job.loop
        stopping = loop.EarlyStopping(settings, **self.summary.get("stopping", {}))
        try:
            reason = stopping.reason(tick, settings.tick_steps or self.loader.steps_per_epoch)
        except ConfigError as error:
            return {"error": str(error)[:500]}  # Ray shares less than 1 kB
        self.summary["stopping"] = {"best": stopping.best, "best_step": stopping.best_step}
        return {"stop": reason}

    def _report(self, tick: loop.Tick) -> None:
        """To the host; from rank 0 with a checkpoint where one is due."""
        if not (tick.due_checkpoint and dist.is_main()):
            self.host.report(tick, None)
            return
        with temporary_folder() as temporary:
            folder = temporary / f"step-{tick.step:08d}"
            checkpoint.save(folder, self.learner.state_dict(), self._meta(tick))
            self.host.report(tick, folder)

    def _add(self, tick: loop.Tick) -> None:
        images = tick.images - self.summary.get("images", 0)
        seconds = self.summary.get("train_seconds", 0.0) + images / max(tick.images_per_second, 1e-9)
        self.summary.update(
            metrics=tick.metrics,
            steps=tick.step,
            images=tick.images,
            train_seconds=seconds,
            images_per_second=tick.images / seconds,
        )

    def _log(self, run: Run, tick: loop.Tick) -> None:
        speed = {"images_per_second": tick.images_per_second, "images": tick.images, "epoch": tick.epoch}
        run.metrics({**tick.metrics, **speed}, step=tick.step)
        if "stopped" in self.summary:
            run.tags({"stopped": self.summary["stopped"]})
        if tick.due_preview:
            paints = self.order.job.learner.paints
            mark: dict[str, Any] = {"maker": self.order.name, "source_type": paints} if paints else {}
            for name, picture in self.learner.preview(self._fixed_batch()).items():
                run.picture(name, picture, step=tick.step, **mark)

    def _meta(self, tick: loop.Tick) -> dict[str, Any]:
        order = self.order
        return {
            "step": tick.step,
            "epoch": tick.epoch,
            "job": to_dict(order.job),
            "dataset": order.dataset,
            "run_id": order.run_id,
            "commit": order.commit,
            "world_size": dist.world_size(),
            "summary": self.summary,
        }

    def _fixed_batch(self) -> Batch:
        if self._fixed is None:
            self._fixed = next(self.loader.batches(start_step=0)).to(self.device)
        return self._fixed

    def _held_out(self, config: DataConfig) -> Iterator[Batch]:
        config = dataclasses.replace(config, drop_last=False)  # every row counts once
        for batch in Loader(config, cache=self.order.workspace.cache).batches(epochs=1):
            yield batch.to(self.device)


@contextmanager
def _closing(run: Run | None) -> Iterator[None]:
    """Afterwards everything given to `run` has arrived. An error of the block comes out before one of MLflow."""
    try:
        yield
    except BaseException:
        if run:
            with suppress(TrackingError):
                run.close(seconds=10)
        raise
    if run:
        run.close()


def _check_shared(order: Order) -> None:
    """Refuse at once a worker whose files are not the driver's: its metrics and checkpoints would be lost at the end."""
    here = socket.gethostname()
    store = open_store(f"{order.workspace.training}/{order.name}")
    if not store.exists("run.json"):
        raise ConfigError(
            f"the worker on {here} does not see {store.uri}/run.json, which the driver wrote; on several machines "
            "use s3:// storage, or a folder that all of them mount"
        )
    if not order.workspace.tracking_uri.startswith("http"):
        try:
            Tracker.at(order.workspace).read(order.run_id)
        except TrackingError as error:
            raise TrackingError(
                f"the worker on {here} does not find run {order.run_id} in {order.workspace.tracking_uri}; on several "
                "machines use an MLflow server (http://…)"
            ) from error


def _set_process(job: loop.TrainJob) -> None:
    threads = job.loop.threads or (max(1, int(job.cpus_per_worker)) if job.workers else os.cpu_count() or 1)
    torch.set_num_threads(threads)
    precision.set_matmul(job.loop.matmul, dist.device())
    memory.keep()


def _context(job: loop.TrainJob, loader: Loader) -> LearnerContext:
    batch_size = job.data.batch_size
    return LearnerContext(
        batch_size=batch_size // dist.world_size(),
        images_per_epoch=loader.rows,
        total_images=job.loop.total_steps(loader.steps_per_epoch, batch_size) * batch_size,
        channels=job.data.preprocess.channels,
        size=job.data.preprocess.size,
        identities=tuple(loader.identities),
        makers=tuple(loader.makers),
        precision=job.loop.precision,
        compile=job.loop.compile,
    )


def _resume(learner: Learner, order: Order, host: Host) -> dict[str, Any]:
    """Load the newest checkpoint into `learner` -> the figures so far."""
    with host.last_checkpoint() as folder:
        if folder is None:
            return {}
        state, meta = checkpoint.load(folder)
    if meta["dataset"]["digest"] != order.dataset["digest"]:
        raise CheckpointError(
            f"the checkpoint of {order.name} was trained on dataset digest {meta['dataset']['digest'][:12]}, this run "
            f"reads {order.dataset['digest'][:12]}; give the job another name"
        )
    learner.load_state_dict(state)
    return dict(meta["summary"])


def _begin(order: Order, host: Host, loader: Loader, device: torch.device) -> tuple[Learner, dict[str, Any]]:
    """A learner as the newest checkpoint has it, or as new, and the figures so far."""
    dist.seed_build(order.job.loop.seed)
    learner = order.job.learner.build(device=device, context=_context(order.job, loader))
    return learner, _resume(learner, order, host)


def _rolled_back(reporter: _Reporter) -> _Reporter:
    """The run at its last good checkpoint again, slower. Raises what went wrong if the learner cannot or may not.

    Every rank failed at the same tick: what `loop` and `Recoverable.check` judge is alike on all of them."""
    failed, error = reporter.learner, reporter.failure
    assert error is not None, "nothing went wrong"
    before = list(reporter.summary.get("rollbacks", []))
    if not isinstance(failed, Recoverable) or len(before) >= failed.max_rollbacks:
        raise error
    learner, summary = _begin(reporter.order, reporter.host, reporter.loader, reporter.device)
    assert isinstance(learner, Recoverable), "the same learner as before"
    factor = learner.slow_down(len(before) + 1)
    event = {"step": failed.steps, "to_step": learner.steps, "lr_factor": factor, "reason": str(error)}
    logger.warning(
        "went back from step %(step)d to %(to_step)d, learning rate × %(lr_factor)g: %(reason)s", event
    )
    summary["rollbacks"] = [*before, event]
    if reporter.run:
        reporter.run.tags({"rollbacks": json.dumps(summary["rollbacks"])})
    return dataclasses.replace(reporter, learner=learner, summary=summary, failure=None)


def _publish_bundle(order: Order, learner: Learner, loader: Loader) -> None:
    """The exported networks as a bundle under the run's folder on storage; `bundle.json` is written last."""
    job = order.job
    provenance: dict[str, Any] = {
        "dataset": {name: order.dataset[name] for name in ("uri", "version", "digest")},
        "sources": used_sources(loader.dataset, loader.version, job.data),
        "run_id": order.run_id,
        "commit": order.commit,
        "identities": list(loader.identities),
        "job": to_dict(job),
    }
    if job.purpose:  # research data went in: neither the model nor its pictures may leave
        provenance |= {"purpose": job.purpose, "export": False}
    preprocess, warning = job.data.preprocess, ""
    if preprocess.needs_face:
        found = boxes.of(loader.dataset, loader.version, job.data.split)
        preprocess, warning = boxes.recorded(preprocess, found)
    if warning:
        provenance["warnings"] = [warning]
    with temporary_folder() as temporary:
        folder = temporary / "bundle"
        write_nets(
            folder,
            kind=BUNDLE_KINDS[job.task],
            name=job.name,
            nets=learner.export(),
            preprocess=preprocess,
            provenance=provenance,
        )
        open_store(f"{order.workspace.training}/{order.name}").publish(folder, "bundle", last="bundle.json")
