"""The training job and its loop: count, average over the tick and the ranks, stop on non-finite, report. Knows no Ray.

A tick is a fixed number of steps, so that every rank reports equally often; what happens on one (progress bar,
checkpoint, MLflow) is the caller's `on_tick`, which may also end the run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from counterfake import dist
from counterfake.data import Batch, DataConfig, check_world
from counterfake.errors import ConfigError, NonFiniteError
from counterfake.learners import Learner, LearnerConfig
from counterfake.precision import Matmul

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train and how often to report. Exactly one of steps, epochs, images is the duration.

    Fused optimizers and channels_last convolutions are no options: every learner has both, no measurement spoke against them.
    An early end changes no schedule: learning rates are planned for the whole duration."""

    steps: int = 0  # optimizer steps
    epochs: float = 0.0  # passes over the split
    images: int = 0  # pictures over all ranks
    tick_steps: int = 50  # steps per report; 0 = one tick per epoch
    checkpoint_every_ticks: int = 1  # the last tick always makes one
    preview_every_ticks: int = 1  # pictures to MLflow; 0 = only at the end
    keep_checkpoints: int = 2  # older ones are deleted
    seed: int = 0  # of weights, noise, dropout and augmentation; the data order has its own
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 = autocast of forward passes
    matmul: Matmul = "auto"  # torch.set_float32_matmul_precision; auto = the lowest whose products stay fp32
    threads: int = 0  # torch threads per process; 0 = as many as its CPUs
    compile: bool = False  # torch.compile of the nets; off: DCGAN 721 -> 444 images/s with it, on 2 CPU cores
    patience_ticks: int = 0  # ticks without a better stop_metric after which the run ends; 0 = never
    stop_metric: str = "val_auc"  # looked at whenever a checkpoint is due; val_… needs a validation split
    stop_mode: Literal["max", "min"] = "max"  # whether more or less of it is better

    def __post_init__(self) -> None:
        given = {k: v for k in ("steps", "epochs", "images") if (v := getattr(self, k))}
        if len(given) != 1 or min(given.values()) < 0:
            raise ConfigError(
                f"loop needs exactly one positive duration of steps, epochs, images; got {given or 'none'}; set the others to 0"
            )
        if self.tick_steps < 0 or self.checkpoint_every_ticks < 1 or self.keep_checkpoints < 1:
            raise ConfigError(
                "loop.tick_steps must be >= 0, checkpoint_every_ticks and keep_checkpoints >= 1"
            )
        if self.patience_ticks < 0:
            raise ConfigError(f"loop.patience_ticks must be >= 0 (0 = never), got {self.patience_ticks}")

    def total_steps(self, steps_per_epoch: int, batch_size: int) -> int:
        """The duration in optimizer steps; `batch_size` is the global one."""
        if self.steps:
            return self.steps
        if self.images:
            return math.ceil(self.images / batch_size)
        return max(1, round(self.epochs * steps_per_epoch))


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that decides what a training run does; its digest names the run."""

    name: str
    task: Literal["gan", "faceswap", "detector", "autoencoder", "classifier", "next_frame"]
    data: DataConfig
    learner: LearnerConfig
    loop: LoopConfig
    workers: int = 0  # Ray Train workers; 0 = in this process, without Ray
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    validation: DataConfig | None = None  # held-out rows, measured at checkpoints
    register_as: str = ""  # name in the registry; "" = not registered
    purpose: Literal["", "detector-training"] = ""  # face swaps: sources of consent "research", no export
    notes: str = ""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise ConfigError("workers, cpus_per_worker and gpus_per_worker must not be negative")
        if self.loop.compile and not self.learner.compiles:
            raise ConfigError(f"{type(self.learner).__name__} has no compiled form; set loop.compile=false")
        if self.loop.patience_ticks and self.loop.stop_metric.startswith("val_") and self.validation is None:
            raise ConfigError(
                f"loop.stop_metric {self.loop.stop_metric} is measured on held-out rows but the job has no validation; "
                "set validation.uri, name a metric of training, or set loop.patience_ticks=0"
            )
        if self.task == "detector":
            _check_held_out(self)
        check_world(self.data, max(self.workers, 1))


@dataclass(frozen=True, kw_only=True)
class Tick:
    """What `on_tick` gets: the state of the run after `step` steps."""

    step: int
    total_steps: int  # at which the run ends
    images: int  # pictures seen by all ranks since the start of the run
    epoch: float  # passes over the split since the start of the run
    metrics: dict[str, float]  # mean over the steps of this tick and over ranks
    images_per_second: float  # all ranks; without the time spent in on_tick
    due_checkpoint: bool
    due_preview: bool
    last: bool

    @property
    def figures(self) -> dict[str, Any]:
        """What a scheduler of trials compares: the metrics, and where in the run they were taken."""
        return {
            **self.metrics,
            "step": self.step,
            "images": self.images,
            "epoch": self.epoch,
            "last": self.last,
        }


@dataclass
class EarlyStopping:
    """Whether a metric has stood still for too long. Its two numbers are all a restart needs to go on alike."""

    config: LoopConfig
    best: float | None = None  # of stop_metric so far
    best_step: int = 0

    def reason(self, tick: Tick, tick_steps: int) -> str:
        """Why the run should end with this tick; "" to go on. Raises ConfigError where the tick has no such metric."""
        name = self.config.stop_metric
        if name not in tick.metrics:
            raise ConfigError(
                f"loop.stop_metric {name!r} is not measured; this run has {', '.join(sorted(tick.metrics))}"
            )
        value = tick.metrics[name]
        if self.best is None or (value > self.best if self.config.stop_mode == "max" else value < self.best):
            self.best, self.best_step = value, tick.step
        quiet = (tick.step - self.best_step) // tick_steps
        if tick.last or quiet < self.config.patience_ticks:
            return ""
        return f"{name} has not passed {self.best:.4g} of step {self.best_step} for {quiet} ticks"


class Batches(Protocol):
    """What the loop needs of a data.Loader."""

    @property
    def config(self) -> DataConfig: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def batches(self, start_step: int = 0) -> Iterator[Batch]: ...


def train(
    learner: Learner,
    loader: Batches,
    config: LoopConfig,
    on_tick: Callable[[Tick], str | None],
    start_step: int = 0,
    *,
    device: torch.device | None = None,
) -> None:
    """Step `learner` from `start_step` to the end of `config`'s duration, calling `on_tick` after each tick and at the end.

    A reason from `on_tick` ends the run there; every rank must give one at the same tick. Raises NonFiniteError, naming step and metric, before a tick with a NaN or infinite metric is reported."""
    assert learner.steps == start_step, f"learner is at step {learner.steps}, the loop starts at {start_step}"
    device = device or dist.device()
    total_steps = config.total_steps(loader.steps_per_epoch, loader.config.batch_size)
    tick_steps = config.tick_steps or loader.steps_per_epoch
    history = _History()
    batches = loader.batches(start_step=start_step)
    for step in range(start_step, total_steps):
        batch = next(batches).to(device)
        dist.seed_step(config.seed, step)
        history.add(step + 1, learner.step(batch), len(batch))
        assert learner.steps == step + 1, f"{type(learner).__name__}.step must add 1 to steps"
        if (step + 1) % tick_steps == 0 or step + 1 == total_steps:
            tick = history.tick(config, tick_steps, total_steps, loader.steps_per_epoch, learner.images)
            if on_tick(tick):
                return
            history = _History()


def check_finite(state: Mapping[str, Any], step: int) -> None:
    """Before a checkpoint: the update of a tick's last step has been in no metric yet.

    state: of the learner, on every rank. Raises NonFiniteError on every rank, if a tensor of any is NaN or infinite."""
    bad = [
        name for name, value in _tensors(state) if value.is_floating_point() and not value.isfinite().all()
    ]
    count = torch.tensor(float(len(bad)), device=dist.device())
    if dist.mean({"bad": count})["bad"]:
        raise NonFiniteError(
            f"{bad[0] if bad else 'a weight on another rank'} became NaN or infinite in the update of step {step}; the last "
            "checkpoint is good: resume it with a lower learning rate, or with loop.precision=fp32"
        )


def _check_held_out(job: TrainJob) -> None:
    """Raises ConfigError where a detector would be stopped, or its weights chosen, by rows that it trained on or is judged on."""
    metric, validation = job.loop.stop_metric, job.validation
    if job.loop.patience_ticks and not metric.startswith("val_"):
        raise ConfigError(
            f"loop.stop_metric {metric} is measured on training rows; name one of held-out rows, like val_auc, "
            "or set loop.patience_ticks=0"
        )
    if validation is None:
        return
    if validation.split == "test":
        raise ConfigError(
            "validation.split=test would choose weights on the rows that the detector is judged on; set another split"
        )
    if (validation.uri, validation.where) != (job.data.uri, job.data.where) or not validation.uri:
        return
    if validation.split == job.data.split or "*" in (validation.split, job.data.split):
        raise ConfigError(
            f"validation.split={validation.split} holds rows that data.split={job.data.split} trains on; "
            "set another split, or a validation.where of other rows"
        )


# -- private --------------------------------------------------------------------------------------------------------


def _tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dictionaries and lists, with its path."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, Mapping | list | tuple):
        items = state.items() if isinstance(state, Mapping) else enumerate(state)
        for name, value in items:
            yield from _tensors(value, f"{path}.{name}" if path else str(name))


@dataclass
class _History:
    """The metrics of one tick, kept on the device until it ends."""

    started: float = field(default_factory=time.perf_counter)
    images: int = 0
    steps: list[int] = field(default_factory=list)
    metrics: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def add(self, step: int, metrics: dict[str, Tensor], images: int) -> None:
        self.steps.append(step)
        self.images += images
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append((step, value.detach()))

    def tick(self, config: LoopConfig, tick_steps: int, total: int, per_epoch: int, images: int) -> Tick:
        series = {name: torch.stack([v.float() for _, v in points]) for name, points in self.metrics.items()}
        means = dist.mean({name: values.mean() for name, values in series.items()})
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(self._explain(bad[0], series[bad[0]]))
        seconds = time.perf_counter() - self.started
        step = self.steps[-1]
        number = math.ceil(step / tick_steps)
        every = config.preview_every_ticks
        return Tick(
            step=step,
            total_steps=total,
            images=images,
            epoch=step / per_epoch,
            metrics=means,
            images_per_second=self.images * dist.world_size() / max(seconds, 1e-9),
            due_checkpoint=number % config.checkpoint_every_ticks == 0 or step == total,
            due_preview=step == total or (every > 0 and number % every == 0),
            last=step == total,
        )

    def _explain(self, name: str, values: Tensor) -> str:
        wrong = (~torch.isfinite(values)).nonzero().flatten().tolist()
        where = (
            f"at step {self.metrics[name][wrong[0]][0]}"
            if wrong
            else f"by step {self.steps[-1]} on another rank"
        )
        return (
            f"{name} became {'NaN or infinite'} {where}; the last checkpoint is good: "
            "resume it with a lower learning rate, or with loop.precision=fp32"
        )
