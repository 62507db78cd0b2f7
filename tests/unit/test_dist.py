"""Ranks: no-ops alone; two real processes over gloo average gradients and metrics."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from counterfake import dist


def test_alone_there_is_one_rank() -> None:
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    dist.barrier()


def test_alone_a_module_stays_itself() -> None:
    module = nn.Linear(2, 1)
    assert dist.data_parallel(module) is module
    assert dist.unwrap(module) is module


def test_mean_of_one_rank_is_the_value() -> None:
    assert dist.mean({"b": torch.tensor(2.0), "a": torch.tensor([0.25])}) == {"a": 0.25, "b": 2.0}
    assert dist.mean({}) == {}


def test_seeding_a_step_repeats_every_generator() -> None:
    def draw() -> tuple[Any, ...]:
        dist.seed_step(3, 17)
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    assert draw() == draw()


@pytest.mark.parametrize("other", [(3, 18), (4, 17)])
def test_other_steps_and_seeds_draw_otherwise(other: tuple[int, int]) -> None:
    assert dist.seed_step(3, 17) != dist.seed_step(*other)
    assert dist.seed_build(3) != dist.seed_step(3, 17)


def _rank(rank: int, port_file: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    wrapped = dist.data_parallel(module)
    frozen = nn.Linear(3, 1).requires_grad_(False)
    wrapped(torch.full((4, 3), float(rank))).sum().backward()
    results.put(
        {
            "rank": dist.rank(),
            "mean": dist.mean({"x": torch.tensor(float(rank))}),
            "gradient": module.weight.grad.flatten().tolist(),
            "unwrapped": dist.unwrap(wrapped) is module and wrapped is not module,
            "frozen": dist.data_parallel(frozen) is frozen,
            "seed": dist.seed_step(0, 0),
            "build": dist.seed_build(0),
        }
    )
    torch.distributed.destroy_process_group()


def test_two_ranks_average_gradients_and_metrics(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path / "meet"), results)) for r in (0, 1)]
    for process in ranks:
        process.start()
    a, b = sorted((results.get(timeout=240) for _ in ranks), key=lambda found: found["rank"])
    for process in ranks:
        process.join(30)
    assert a["mean"] == b["mean"] == {"x": 0.5}
    assert a["gradient"] == b["gradient"] == [2.0, 2.0, 2.0]  # mean of 0 and 4
    assert a["unwrapped"]
    assert a["frozen"]
    assert a["seed"] != b["seed"]
    assert a["build"] == b["build"]


def _restarted(rank: int, port_file: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=4)

    def steps(module: nn.Module, first: int, last: int) -> dict[str, torch.Tensor]:
        wrapped = dist.data_parallel(module)
        for step in range(first, last):
            dist.seed_step(0, step)
            wrapped.zero_grad()
            wrapped(torch.randn(8, 16)).square().mean().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
        return {name: value.clone() for name, value in module.state_dict().items()}

    def made() -> nn.Module:
        dist.seed_build(0)
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    whole, resumed = steps(made(), 0, 6), made()
    resumed.load_state_dict(steps(made(), 0, 3))
    again = steps(resumed, 3, 6)
    results.put(all(torch.equal(whole[name], again[name]) for name in whole))
    torch.distributed.destroy_process_group()


def test_four_ranks_that_restart_sum_gradients_in_the_same_order(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_restarted, args=(r, str(tmp_path / "meet"), results)) for r in range(4)]
    for process in ranks:
        process.start()
    assert all(results.get(timeout=240) for _ in ranks)
    for process in ranks:
        process.join(30)
