"""config: overrides, plain dicts and digests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterfake import config
from counterfake.errors import ConfigError


class Net(config.Family):
    pass


@dataclass(frozen=True, kw_only=True)
class Small(Net):
    width: int = 8


@dataclass(frozen=True, kw_only=True)
class Wide(Net):
    width: int = 64
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Window:
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be under high {self.high}")


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str
    lr: float = 1e-3
    loss: Literal["hinge", "minimax"] = "hinge"
    sizes: tuple[int, ...] = (64, 32)
    where: dict[str, Any] = field(default_factory=dict)
    window: Window = field(default_factory=Window)
    net: Net = field(default_factory=Small)
    seed: int | None = None
    weights: Path | None = None


JOB = Job(name="job")


def test_text_from_a_command_line_takes_the_type_of_the_field() -> None:
    changed = config.override(
        JOB, {"lr": "1e-4", "sizes": "128,64", "seed": "7", "where.fake": "0", "weights": "/w.pth"}
    )
    assert (changed.lr, changed.sizes, changed.seed, changed.weights) == (1e-4, (128, 64), 7, Path("/w.pth"))
    assert config.override(changed, {"seed": "none"}).seed is None


def test_dependent_fields_change_together() -> None:
    changed = config.override(JOB, {"window.low": 5, "window.high": 9})
    assert changed.window == Window(low=5.0, high=9.0)


def test_a_member_of_a_family_is_chosen_by_kind_with_its_own_defaults() -> None:
    changed = config.override(JOB, {"net.kind": "Wide", "net.dropout": 0.3})
    assert changed.net == Wide(width=64, dropout=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_": 1}, "Job has no setting lr_; did you mean lr?"),
        ({"window.hig": 1}, "did you mean window.high?"),
        ({"net.kind": "Smal"}, "did you mean Small?"),
        ({"net.dropout": 0.1}, "Small has no setting net.dropout"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"seed": "1.5"}, "seed must be a whole number"),
        ({"loss": "hing"}, "did you mean hinge?"),
        ({"window.low": 3}, "low 3.0 must be under high 1.0"),
        ({"window": 3}, "window must be settings of Window"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_mistake_names_the_field_and_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        config.override(JOB, changes)


def test_a_missing_required_field_says_how_to_set_it() -> None:
    with pytest.raises(ConfigError, match="--set name=VALUE"):
        config.from_dict(Job, {})


@given(
    st.floats(1e-9, 1),
    st.lists(st.integers(1, 999), max_size=4),
    st.sampled_from([Small(), Wide(dropout=0.5)]),
)
def test_dict_and_back_is_the_same_job(lr: float, sizes: list[int], net: Net) -> None:
    job = Job(name="x", lr=lr, sizes=tuple(sizes), net=net, where={"fake": 0})
    assert config.from_dict(Job, config.to_dict(job)) == job


def test_digest_depends_on_values_and_not_on_order() -> None:
    assert config.digest({"a": 1, "b": 2}) == config.digest({"b": 2, "a": 1})
    assert config.digest(JOB) != config.digest(config.override(JOB, {"lr": 0.1}))


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", "lr: 0.5\nwindow:\n  low: 0.1\n"), ("a.toml", "lr = 0.5\n[window]\nlow = 0.1\n")],
)
def test_settings_file_gives_dotted_overrides(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert config.load_file(tmp_path / name) == {"lr": 0.5, "window.low": 0.1}


def test_bad_settings_files_and_assignments_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load_file(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="does not parse"):
        config.load_file(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="path=value"):
        config.parse_assignments(["lr"])
