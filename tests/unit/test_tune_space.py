"""The search space and the arithmetic of the search; no Ray cluster is started."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from counterfake.cluster.space import SearchSpace
from counterfake.config import override
from counterfake.errors import ClusterError, ConfigError
from counterfake.evaluation.search import search_plot


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-3
    width: int = 8
    act: str = "relu"

    def __post_init__(self) -> None:
        if self.width > 64:
            raise ValueError("width must be at most 64")


@dataclass(frozen=True, kw_only=True)
class Outer:
    learner: Inner = field(default_factory=Inner)


def space(**settings: Any) -> SearchSpace:
    return SearchSpace(settings={name.replace("__", "."): domain for name, domain in settings.items()})


def test_a_space_is_read_from_yaml_with_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "learner.lr: {log: [1e-5, 1e-2]}\nlearner.width: {int: [4, 32]}\nlearner.act: {choice: [relu, silu]}\n"
    )
    found = SearchSpace.from_file(path)
    assert found.kind("learner.lr") == ("log", [1e-5, 1e-2])
    assert found.kind("learner.width") == ("int", [4, 32])
    assert found.kind("learner.act") == ("choice", ["relu", "silu"])
    assert found.logarithmic == ("learner.lr",)
    found.check(Outer())


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"log": [0, 1]}, "above 0"),
        ({"log": [1e-2, 1e-5]}, "low < high"),
        ({"uniform": [1]}, r"must be \[low, high\]"),
        ({"int": [1.5, 3]}, "whole numbers"),
        ({"choice": []}, "must be"),
        ({"normal": [0, 1]}, "is no domain; use one of log"),
        ([1, 2], "is no domain"),
        ({"log": [1, 2], "int": [1, 2]}, "is no domain"),
    ],
    ids=["zero", "reversed", "one end", "halves", "no choice", "kind", "list", "two"],
)
def test_a_wrong_domain_is_refused_with_what_is_right(domain: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(learner__lr=domain)


def test_an_unknown_path_is_found_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.lrr; did you mean learner\.lr"):
        space(learner__lrr={"log": [1e-5, 1]}).check(Outer())


@pytest.mark.parametrize(
    "settings",
    [{"learner__width": {"int": [4, 128]}}, {"learner__width": {"choice": [4, 128, 8]}}],
    ids=["upper end", "middle choice"],
)
def test_a_value_the_configuration_refuses_is_found_before_the_search(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at most 64"):
        space(**settings).check(Outer())


def test_what_a_population_perturbs_stays_inside_the_space() -> None:
    found = space(
        learner__lr={"log": ["1e-4", 1e-2]},
        learner__width={"int": [4, 32]},
        learner__act={"choice": ["relu", "silu"]},
    )
    beyond = {"learner.lr": 0.012, "learner.width": 38.4, "learner.act": "silu"}
    assert found.within(beyond) == {"learner.lr": 0.01, "learner.width": 32, "learner.act": "silu"}
    below = {"learner.lr": 8e-5, "learner.width": 5.6, "learner.act": "relu"}
    assert found.within(below) == {"learner.lr": 1e-4, "learner.width": 6, "learner.act": "relu"}


@pytest.mark.parametrize(
    ("settings", "changes", "trials", "message"),
    [
        ({"data.batch_size": {"int": [8, 16]}}, {}, 4, r"data\.batch_size does not allow; only learner"),
        ({"learner.net.width_mult": {"choice": [0.35, 0.5]}}, {}, 4, "networks of different shapes"),
        ({"learner.lr": {"log": [1e-4, 1e-2]}}, {"workers": 2}, 4, r"set train\.workers=0"),
        ({"learner.lr": {"log": [1e-4, 1e-2]}}, {}, 1, "at least 2 trials, got 1"),
    ],
    ids=["batch", "width", "workers", "alone"],
)
def test_what_a_population_cannot_exchange_is_refused(
    settings: dict[str, Any], changes: dict[str, Any], trials: int, message: str
) -> None:
    from counterfake.cluster import population
    from jobs.train_detector import mobilenetv2_demo

    job = override(mobilenetv2_demo(), changes)
    with pytest.raises(ConfigError, match=message):
        population.check(job, SearchSpace(settings=settings), trials, 0)


def test_a_population_may_change_what_leaves_the_weights_as_they_are() -> None:
    from counterfake.cluster import population
    from jobs.train_detector import mobilenetv2_demo

    free = {"learner.lr": {"log": [1e-4, 1e-2]}, "learner.net.dropout": {"uniform": [0.0, 0.5]}}
    population.check(mobilenetv2_demo(), SearchSpace(settings=free), 2, 0)


def test_spending_is_trial_seconds_times_what_a_trial_holds_and_outlives_its_process(tmp_path: Path) -> None:
    from counterfake.cluster.budget import Budget, Spending

    budget, uri = Budget(cpu_hours=2.0), f"file://{tmp_path}"
    first = Spending(uri, budget, cpus=4, gpus=0.5)
    assert not first.exhausted
    for _ in range(10):
        first.add(144.0)
    again = Spending(uri, budget, cpus=4, gpus=0.5)
    assert (again.cpu_hours, again.gpu_hours) == (pytest.approx(1.6), pytest.approx(0.2))
    assert not again.exhausted
    again.add(360.0)
    assert again.exhausted
    restored = copy.copy(first)  # as Tune restores what it kept: older than the file
    assert restored.seconds == again.seconds > first.seconds
    assert Spending(uri, Budget(gpu_hours=0.25), cpus=4, gpus=0.5).exhausted
    assert not Spending(uri, Budget(), cpus=4, gpus=0.5).exhausted  # no limit


def test_a_spent_budget_stops_trials_but_leaves_those_at_their_end_their_bundle(tmp_path: Path) -> None:
    from counterfake.cluster.budget import Budget, Spending, stopper

    stop = stopper(Spending(f"file://{tmp_path}", Budget(cpu_hours=1.0), cpus=1, gpus=0))
    assert not stop("a", {"time_this_iter_s": 3000.0})
    assert not stop.stop_all()
    assert not stop("a", {"time_this_iter_s": 900.0, "last": True})  # over the limit, and done
    assert not stop.stop_all()
    assert stop("b", {"time_this_iter_s": 1.0})
    stop._ending -= 61  # a minute later
    assert stop.stop_all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gpu_hours": 1.0}, r"1 GPU-hours limits nothing: a trial has train\.gpus_per_worker=0"), ({"cpu_hours": -1.0}, "negative")],
    ids=["no GPU", "negative"],
)  # fmt: skip
def test_a_budget_that_limits_nothing_is_refused(settings: dict[str, float], message: str) -> None:
    from counterfake.cluster.budget import Budget
    from jobs.train_detector import mobilenetv2_demo

    with pytest.raises(ConfigError, match=message):
        Budget(**settings).check(mobilenetv2_demo())


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        SearchSpace(settings={})


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "expected"),
    [
        ([{"CPU": 2}], 0, 1.0, 2),
        ([{"CPU": 2}], 2, 1.0, 1),
        ([{"CPU": 8}], 2, 1.5, 2),  # five workers fit, two pairs
        ([{"CPU": 3}, {"CPU": 3}], 2, 2.0, 1),  # six CPUs, but only one worker fits on each node
        ([{"CPU": 4}, {"CPU": 2}], 0, 0.5, 12),
    ],
    ids=["in process", "pair", "fractions", "fragments", "small"],
)
def test_concurrency_is_what_really_fits(
    nodes: list[dict[str, float]], workers: int, cpus: float, expected: int
) -> None:
    from counterfake.cluster.tune import concurrency

    assert concurrency(nodes, workers=workers, cpus=cpus, gpus=0) == expected


def test_a_trial_larger_than_the_cluster_is_refused_with_both_numbers() -> None:
    from counterfake.cluster.tune import concurrency

    with pytest.raises(ClusterError, match=r"needs 4 x 1 CPU.*has room for 2"):
        concurrency([{"CPU": 2}], workers=4, cpus=1, gpus=0)
    with pytest.raises(ClusterError, match=r"1 GPU"):
        concurrency([{"CPU": 8}], workers=0, cpus=1, gpus=1)


def test_the_setting_that_decides_is_the_important_one() -> None:
    from counterfake.cluster.findings import importance

    whole = space(learner__lr={"log": [1e-4, 1e-1]}, learner__width={"int": [1, 9]})
    rows = [{"learner.lr": 10 ** (-4 + 3 * i / 19), "learner.width": 1 + (7 * i) % 9} for i in range(20)]
    found = importance(whole, rows, [i / 19 for i in range(20)])
    assert found["learner.lr"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    assert importance(whole, rows[:1], [0.5]) == {}  # one trial explains nothing
    assert importance(whole, rows, [0.5] * 20) == {}  # nor do equal ones


def test_the_picture_of_a_search_is_a_png_also_when_little_is_there() -> None:
    rows = [{"learner.lr": 1e-3, "learner.act": "relu"}, {"learner.lr": 1e-2, "learner.act": "silu"}]
    for settings, values in ((rows, [0.5, None]), (rows, [0.5, 0.7]), ([], [])):
        picture = search_plot(
            settings, values, objective="auc", logarithmic=["learner.lr"], importance={"learner.lr": 1.0}
        )
        assert picture.startswith(b"\x89PNG")
