"""The loop with learners of four lines: durations, ticks, averages, non-finite values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from counterfake import loop
from counterfake.config import override, to_dict
from counterfake.data import Batch, DataConfig
from counterfake.errors import ConfigError, NonFiniteError
from counterfake.learners.gan import GanConfig
from counterfake.loop import LoopConfig, Tick, TrainJob


class Rows:
    """A loader of empty pictures that counts what it is asked for."""

    def __init__(self, steps_per_epoch: int = 5, batch_size: int = 4) -> None:
        self.config = DataConfig(uri="memory", batch_size=batch_size)
        self.steps_per_epoch = steps_per_epoch
        self.asked: list[int] = []

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        step = start_step
        while True:
            self.asked.append(step)
            empty = torch.zeros(self.config.batch_size, dtype=torch.int64)
            images = torch.zeros(self.config.batch_size, 1, 2, 2, dtype=torch.uint8)
            names = [""] * len(images)
            yield Batch(
                images=images,
                fake=empty,
                class_id=empty,
                identity=empty,
                maker=empty,
                ids=names,
                step=step,
                epoch=0,
            )
            step += 1


class Counting:
    """A learner whose metric is the number of its step."""

    def __init__(self, start: int = 0, bad_step: int = -1, bad: float = math.nan) -> None:
        self.steps = start
        self.images = 4 * start
        self.bad_step, self.bad = bad_step, bad
        self.noise: list[float] = []

    def step(self, batch: Batch) -> dict[str, Tensor]:
        self.steps += 1
        self.images += len(batch)
        self.noise.append(torch.rand(1).item())
        value = self.bad if self.steps == self.bad_step else float(self.steps)
        return {"loss": torch.tensor(value)}


def run(config: LoopConfig, learner: Any = None, start_step: int = 0) -> list[Tick]:
    ticks: list[Tick] = []
    loop.train(learner or Counting(start_step), Rows(), config, ticks.append, start_step)
    return ticks


def test_a_tick_is_the_mean_of_its_steps_and_the_last_may_be_shorter() -> None:
    ticks = run(LoopConfig(steps=8, tick_steps=3))
    assert [(t.step, t.metrics["loss"], t.last) for t in ticks] == [
        (3, 2.0, False),
        (6, 5.0, False),
        (8, 7.5, True),
    ]
    assert [t.images for t in ticks] == [12, 24, 32]
    assert ticks[0].epoch == pytest.approx(0.6)
    assert all(t.images_per_second > 0 and t.total_steps == 8 for t in ticks)


@pytest.mark.parametrize(
    ("duration", "steps"), [({"steps": 7}, 7), ({"epochs": 2}, 10), ({"epochs": 0.5}, 2), ({"images": 10}, 3)]
)
def test_a_duration_is_in_steps_epochs_or_images(duration: dict[str, float], steps: int) -> None:
    assert run(LoopConfig(tick_steps=100, **duration))[-1].step == steps


@pytest.mark.parametrize("duration", [{}, {"steps": 5, "epochs": 1}, {"steps": -1}])
def test_none_or_two_durations_are_refused(duration: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="exactly one positive duration"):
        LoopConfig(**duration)


def test_no_tick_length_means_a_tick_per_epoch() -> None:
    assert [t.step for t in run(LoopConfig(epochs=2, tick_steps=0))] == [5, 10]


def test_checkpoints_and_previews_come_every_so_many_ticks_and_at_the_end() -> None:
    ticks = run(LoopConfig(steps=10, tick_steps=2, checkpoint_every_ticks=2, preview_every_ticks=0))
    assert [t.due_checkpoint for t in ticks] == [False, True, False, True, True]
    assert [t.due_preview for t in ticks] == [False, False, False, False, True]


def test_resuming_reads_and_draws_what_the_whole_run_did() -> None:
    config = LoopConfig(steps=6, tick_steps=2)
    whole, part, loader = Counting(), Counting(4), Rows()
    run(config, whole)
    ticks: list[Tick] = []
    loop.train(part, loader, config, ticks.append, 4)
    assert part.noise == whole.noise[4:]
    assert loader.asked[0] == 4
    assert [t.step for t in ticks] == [6]


def test_nothing_is_left_to_do_at_the_end() -> None:
    assert run(LoopConfig(steps=4), Counting(4), start_step=4) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_metric_stops_before_its_tick_and_names_the_step(bad: float) -> None:
    ticks: list[Tick] = []
    with pytest.raises(NonFiniteError, match="loss became NaN or infinite at step 5"):
        loop.train(Counting(bad_step=5, bad=bad), Rows(), LoopConfig(steps=9, tick_steps=3), ticks.append)
    assert [t.step for t in ticks] == [3]


def test_a_learner_at_another_step_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="learner is at step 2, the loop starts at 0"):
        run(LoopConfig(steps=4), Counting(2))


def job(**changes: Any) -> TrainJob:
    data = DataConfig(uri="mnist", batch_size=64)
    settings = {"name": "x", "task": "gan", "data": data, "learner": GanConfig(), "loop": LoopConfig(steps=1)}
    return TrainJob(**{**settings, **changes})


def test_a_batch_that_workers_cannot_share_is_refused_with_one_that_they_can() -> None:
    with pytest.raises(
        ConfigError, match=r"batch_size 64 is not divisible by 3 workers; set data\.batch_size=66"
    ):
        job(workers=3)


def test_dotted_overrides_reach_every_level() -> None:
    changed = override(
        job(), {"learner.generator.width": "8", "loop.steps": "0", "loop.epochs": "3", "workers": "2"}
    )
    assert changed.learner.generator.width == 8
    assert (changed.loop.steps, changed.loop.epochs, changed.workers) == (0, 3.0, 2)
    assert to_dict(changed)["learner"]["kind"] == "GanConfig"


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean learner\.g_lr"):
        override(job(), {"learner.g_lrr": 1})
