"""The loop with learners of four lines: durations, ticks, averages, non-finite values."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from counterfake import checkpoint, dist, loop, media
from counterfake.cluster.worker import Order, _Reporter
from counterfake.config import override, to_dict
from counterfake.data import Batch, DataConfig, Loader
from counterfake.errors import ConfigError, NonFiniteError
from counterfake.images import Preprocess
from counterfake.learners import LearnerContext
from counterfake.learners.autoencoder import AutoencoderConfig
from counterfake.learners.classifier import ClassifierConfig
from counterfake.learners.gan import GanConfig
from counterfake.loop import EarlyStopping, LoopConfig, Tick, TrainJob
from counterfake.nets.classifier import SmallClassifier
from counterfake.records import Sample, SplitRule, write_version
from counterfake.workspace import Workspace


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


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 600 pictures of one pixel."""
    uri = (tmp_path_factory.mktemp("flat") / "flat").as_uri()
    image = media.encode(np.zeros((1, 1, 3), np.uint8), "png")
    rows = [Sample(image=image + bytes([n // 256, n % 256]), source="made", fake=0) for n in range(600)]
    made = {"made": {"licence": "CC0-1.0", "consent": "synthetic"}}
    write_version(uri, rows, sources=made, splits=SplitRule(fractions={"train": 1.0}))
    return uri


@pytest.mark.parametrize(("batch", "workers"), [(64, 3), (256, 3), (64, 8), (250, 6), (9, 2)])
def test_the_advice_for_a_batch_that_workers_cannot_share_works(flat: str, batch: int, workers: int) -> None:
    data = DataConfig(uri=flat, batch_size=batch, preprocess=Preprocess(size=1))
    with pytest.raises(ConfigError, match=f"cannot be shared by {workers} workers") as refused:
        job(data=data, workers=workers)
    advice = re.findall(r"data\.(batch_size|lanes)=(\d+)", str(refused.value).partition("; set ")[2])
    made = job(
        data=dataclasses.replace(data, **{name: int(value) for name, value in advice}), workers=workers
    )
    assert made.data.batch_size >= batch
    for rank in range(workers):
        assert Loader(made.data, rank=rank, world=workers).steps_per_epoch == 600 // made.data.batch_size


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


# -- early stopping -------------------------------------------------------------------------------------------------

AUC = (0.5, 0.7, 0.6, 0.8, 0.8, 0.75, 0.7, 0.9)  # at the ticks of steps 2, 4, 6, …
PATIENT = LoopConfig(steps=16, tick_steps=2, patience_ticks=3)


def tick(step: int, value: float, last: bool = False) -> Tick:
    return Tick(
        step=step,
        total_steps=16,
        images=4 * step,
        epoch=0.0,
        metrics={"val_auc": value},
        images_per_second=1.0,
        due_checkpoint=True,
        due_preview=False,
        last=last,
    )


def ends_at(config: LoopConfig, values: Iterable[float]) -> int:
    """The step of the tick that ends the run, 0 if none does."""
    stopping = EarlyStopping(config)
    steps = (2 * i for i, value in enumerate(values, start=1) if stopping.reason(tick(2 * i, value), 2))
    return next(steps, 0)


@pytest.mark.parametrize(
    ("patience", "mode", "end"), [(1, "max", 6), (3, "max", 14), (4, "max", 0), (2, "min", 6)]
)
def test_a_metric_that_stands_still_for_its_patience_ends_the_run(patience: int, mode: str, end: int) -> None:
    config = override(PATIENT, {"patience_ticks": patience, "stop_mode": mode})
    assert ends_at(config, AUC) == end


def test_checkpoints_far_apart_are_counted_in_ticks_not_in_looks() -> None:
    stopping = EarlyStopping(PATIENT)
    assert stopping.reason(tick(4, 0.7), 2) == ""
    assert stopping.reason(tick(8, 0.6), 2) == ""
    assert stopping.reason(tick(12, 0.6), 2) == "val_auc has not passed 0.7 of step 4 for 4 ticks"


def test_the_last_tick_needs_no_reason_to_end() -> None:
    assert EarlyStopping(PATIENT, best=0.9, best_step=2).reason(tick(16, 0.5, last=True), 2) == ""


def test_a_state_that_is_not_finite_is_refused_by_name_and_whole_numbers_are_no_floats() -> None:
    good = {"net": {"w": torch.ones(2)}, "seen": torch.tensor([3]), "steps": 7, "parts": [torch.zeros(1)]}
    loop.check_finite(good, 7)
    bad = good | {"optimizer": {"state": {0: {"exp_avg": torch.tensor([0.0, math.inf])}}}}
    with pytest.raises(
        NonFiniteError, match=r"optimizer\.state\.0\.exp_avg became NaN or infinite in the update of step 7"
    ):
        loop.check_finite(bad, 7)


def test_a_metric_that_nobody_measures_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'val_acc' is not measured; this run has val_auc"):
        EarlyStopping(override(PATIENT, {"stop_metric": "val_acc"})).reason(tick(2, 0.5), 2)


class Scripted(Counting):
    """Counts; its AUC on held-out rows follows a script."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": super().step(batch)["loss"] + dist.rank()}

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        assert dist.is_main()
        return {"auc": AUC[self.steps // 2 - 1]}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "images": self.images, "weight": torch.zeros(1)}


class Recorder:
    """A host that keeps the newest checkpoint in a folder; ranks agree by an all-reduce of JSON bytes."""

    def __init__(self, folder: Path, cut_after: int = 0) -> None:
        self.folder, self.cut_after = folder, cut_after
        self.ticks: list[Tick] = []

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        yield self.folder if self.folder.exists() else None

    def report(self, tick: Tick, folder: Path | None) -> None:
        self.ticks.append(tick)
        if folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.copytree(folder, self.folder)
        if tick.step == self.cut_after:
            raise InterruptedError

    def agree(self, answer: dict[str, str]) -> dict[str, str]:
        text = json.dumps(answer).encode() if dist.is_main() else b""
        shared = dist.sum_over_ranks(torch.tensor(list(text.ljust(256, b"\0"))))
        return json.loads(bytes(shared.tolist()).rstrip(b"\0"))


def reporter(folder: Path, cut_after: int = 0, **changes: Any) -> _Reporter:
    """A worker of a run of PATIENT, from the checkpoint in `folder` if there is one."""
    host, start, summary = Recorder(folder / "last", cut_after), 0, {}
    with host.last_checkpoint() as found:
        if found:
            state, meta = checkpoint.load(found)
            start, summary = state["steps"], meta["summary"]
    held_out = DataConfig(uri="held-out", batch_size=4)
    settings = job(data=held_out, validation=held_out, loop=dataclasses.replace(PATIENT, **changes))
    order = Order(job=settings, workspace=Workspace.at(folder), name="x", run_id="", dataset={}, commit="")
    return _Reporter(order, host, Scripted(start), Rows(), torch.device("cpu"), None, summary)  # type: ignore[arg-type]


def test_an_early_end_is_the_last_tick_with_its_checkpoint_and_its_reason(tmp_path: Path) -> None:
    worker = reporter(tmp_path)
    assert worker.trained()
    end = worker.host.ticks[-1]
    assert (end.step, end.total_steps, end.last, end.due_preview) == (14, 14, True, True)
    assert [t.last for t in worker.host.ticks[:-1]] == [False] * 6
    assert worker.summary["stopped"] == "val_auc has not passed 0.8 of step 8 for 3 ticks"
    assert checkpoint.read_meta(tmp_path / "last")["summary"]["steps"] == 14


@pytest.mark.parametrize("cut_after", [2, 8, 12])
def test_a_killed_run_ends_early_where_the_whole_one_does(tmp_path: Path, cut_after: int) -> None:
    with pytest.raises(InterruptedError):
        reporter(tmp_path, cut_after).trained()
    again = reporter(tmp_path)
    assert again.trained()
    assert again.learner.steps == 14
    assert again.summary["stopped"] == "val_auc has not passed 0.8 of step 8 for 3 ticks"


def test_a_run_killed_after_its_early_end_does_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        reporter(tmp_path, cut_after=14).trained()
    again = reporter(tmp_path)
    assert again.trained()
    assert (again.learner.steps, again.host.ticks) == (14, [])


def _rank(rank: int, folder: Path, stop_metric: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    worker = reporter(folder / str(rank), stop_metric=stop_metric)
    try:
        worker.trained()
        results.put((worker.learner.steps, worker.summary["stopped"], worker.summary["metrics"]["loss"]))
    except ConfigError as error:
        results.put(str(error))
    torch.distributed.destroy_process_group()


def on_two_ranks(folder: Path, stop_metric: str) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, folder, stop_metric, results)) for r in (0, 1)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join(30)
    return found


def test_two_ranks_end_at_the_same_tick_though_only_one_validates(tmp_path: Path) -> None:
    reason = "val_auc has not passed 0.8 of step 8 for 3 ticks"
    assert on_two_ranks(tmp_path, "val_auc") == [(14, reason, 14.0)] * 2  # mean of 13, 14 and 14, 15


def test_two_ranks_refuse_a_metric_that_nobody_measures_together(tmp_path: Path) -> None:
    assert (
        on_two_ranks(tmp_path, "val_f1")
        == ["loop.stop_metric 'val_f1' is not measured; this run has loss, val_auc"] * 2
    )


def test_patience_without_held_out_rows_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"val_auc is measured on held-out rows but the job has no validation"
    ):
        job(loop=PATIENT)
    assert job(loop=override(PATIENT, {"stop_metric": "g_loss"})).loop.patience_ticks == 3


# -- compiled networks ----------------------------------------------------------------------------------------------


def context(**changes: Any) -> LearnerContext:
    return LearnerContext(
        **{"batch_size": 4, "images_per_epoch": 8, "total_images": 8, "channels": 1, "size": 28, **changes}
    )


def test_only_a_run_that_asks_for_it_compiles_its_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(net))
    config = ClassifierConfig(net=SmallClassifier.tiny())
    learner = config.build(device=torch.device("cpu"), context=context())
    assert not compiled
    learner = config.build(device=torch.device("cpu"), context=context(compile=True))
    assert compiled == [learner.net]


def test_a_learner_without_a_compiled_form_says_so() -> None:
    with pytest.raises(ConfigError, match="AutoencoderConfig has no compiled form"):
        job(task="autoencoder", learner=AutoencoderConfig(), loop=LoopConfig(steps=1, compile=True))


def test_penalties_with_second_derivatives_are_not_compiled() -> None:
    config = GanConfig(r1_gamma=1.0)
    with pytest.raises(ConfigError, match=r"which torch\.compile lacks"):
        config.build(device=torch.device("cpu"), context=context(compile=True))


@pytest.mark.full
def test_a_compiled_net_trains_like_the_plain_one() -> None:
    losses = []
    for compile_ in (False, True):
        dist.seed_build(0)
        config = ClassifierConfig(net=dataclasses.replace(SmallClassifier.tiny(), dropout=0.0), shift=0)
        learner = config.build(device=torch.device("cpu"), context=context(compile=compile_))
        batch = next(Rows().batches())
        batch = dataclasses.replace(
            batch, images=torch.arange(4 * 28 * 28).view(4, 1, 28, 28).remainder(256).byte()
        )
        losses.append([float(learner.step(batch)["loss"]) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
