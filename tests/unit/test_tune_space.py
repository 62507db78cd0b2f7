"""The search space and the arithmetic of the search; no Ray cluster is started."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from counterfake.cluster.space import SearchSpace
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
    from counterfake.cluster.tune import importance

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
