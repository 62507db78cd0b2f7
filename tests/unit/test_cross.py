"""The matrix keeps home and away apart; leaving a generator out trains without it and says what it cannot do."""

from __future__ import annotations

import json

import pytest

from counterfake.errors import DataError
from counterfake.evaluation import cross
from counterfake.evaluation.cross import Cell


def found(auc: float) -> dict:
    return {name: {"value": auc, "low": auc - 0.1, "high": auc + 0.1} for name in cross.FIGURES} | {
        "n": 9,
        "n_fake": 4,
    }


def cells() -> list[Cell]:
    return [
        Cell(row="a", column="x", home=True, found=found(0.9)),
        Cell(row="a", column="y", home=False, found=found(0.6)),
        Cell(row="b", column="x", home=False, found=found(0.7)),
        Cell(row="b", column="y", home=True, found=None, why="refused: {'no_face': 9}"),
    ]


def test_home_and_away_are_averaged_apart() -> None:
    made = cross.matrix(cells())
    assert (made["rows"], made["columns"]) == (["a", "b"], ["x", "y"])
    assert made["mean_auc"] == {"home": pytest.approx(0.9), "away": pytest.approx(0.65)}
    assert (made["worst_away"]["row"], made["worst_away"]["column"]) == ("a", "y")
    json.dumps(made, allow_nan=False)
    assert cross.plot(made).startswith(b"\x89PNG")
    assert "no_face" in cross.table(made).html()


def test_a_matrix_of_nothing_is_refused_with_the_reason() -> None:
    with pytest.raises(DataError, match="could be judged: refused"):
        cross.matrix(cells()[3:])
