"""Detectors against data they were not made for: the cross-dataset matrix, and leaving one generator out.

Rows are detectors, columns what they are judged on. A cell at home shares its data or its maker with the training; every other
one says how far the detector carries. The averages keep the two apart, because one number over both would hide it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from counterfake.errors import DataError
from counterfake.evaluation import report
from counterfake.evaluation.card import percent

FIGURES = ("auc", "average_precision", "accuracy", "recall_real", "recall_fake", "ece")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One detector on one kind of data."""

    row: str  # detector
    column: str  # data set, or maker of the fakes
    home: bool  # the training saw this data set, or this maker
    found: Mapping[str, Any] | None  # of detection.evaluate; None: it could not be judged
    why: str = ""  # it could not

    def figures(self) -> dict[str, Any]:
        """JSON-able; the figures of FIGURES with their intervals, n and n_fake."""
        found = self.found or {}
        values = {name: found.get(name, {"value": None, "low": None, "high": None}) for name in FIGURES}
        counts = {"n": found.get("n", 0), "n_fake": found.get("n_fake", 0)}
        return {
            "row": self.row,
            "column": self.column,
            "home": self.home,
            **counts,
            **values,
            "why": self.why,
        }


def matrix(cells: Sequence[Cell]) -> dict[str, Any]:
    """{"rows", "columns", "cells", "mean_auc": {"home", "away"}, "worst_away"}. Raises DataError if no cell has an AUC."""
    listed = [cell.figures() for cell in cells]
    known = [cell for cell in listed if cell["auc"]["value"] is not None]
    if not known:
        raise DataError(
            f"no cell of the matrix could be judged: {listed[0]['why'] if listed else 'there is none'}"
        )
    away = [cell for cell in known if not cell["home"]]
    worst = min(away, key=lambda cell: float(cell["auc"]["value"]), default=None)
    return {
        "rows": list(dict.fromkeys(cell.row for cell in cells)),
        "columns": list(dict.fromkeys(cell.column for cell in cells)),
        "cells": listed,
        "mean_auc": {"home": _mean([c for c in known if c["home"]]), "away": _mean(away)},
        "worst_away": {key: worst[key] for key in ("row", "column", "auc")} if worst else None,
    }


def plot(found: Mapping[str, Any], metric: str = "auc", *, home: str = "home") -> bytes:
    """The matrix as a heat map; cells at home carry the word `home`."""
    at = {(cell["row"], cell["column"]): cell for cell in found["cells"]}
    rows = [
        (row, [_labelled(at.get((row, column)), metric, home) for column in found["columns"]])
        for row in found["rows"]
    ]
    return report.heatmap_plot(rows, title=f"{metric.upper()} by detector and data", columns=found["columns"])


def table(found: Mapping[str, Any], head: tuple[str, str] = ("detector", "judged on")) -> report.Table:
    """Every cell with its intervals."""
    rows = [
        [
            cell["row"], cell["column"], "yes" if cell["home"] else "no", cell["n"], percent(cell["auc"]),
            percent(cell["accuracy"]), percent(cell["recall_real"]), percent(cell["recall_fake"]), cell["why"],
        ]
        for cell in found["cells"]
    ]  # fmt: skip
    names = [*head, "seen in training", "n", "AUC", "accuracy", "recall real", "recall fake", ""]
    return report.Table(names, rows)


# -- private --------------------------------------------------------------------------------------------------------


def _labelled(cell: Mapping[str, Any] | None, metric: str, home: str) -> tuple[str, float | None]:
    return ("", None) if cell is None else (home if cell["home"] else "", cell[metric]["value"])


def _mean(cells: Sequence[Mapping[str, Any]]) -> float | None:
    return float(np.mean([cell["auc"]["value"] for cell in cells])) if cells else None
