"""The robustness grid of one model on one split, cell by cell: what is done is kept, so that a stopped grid goes on.

A kept cell holds figures, never scores of single rows, under a digest of everything they depend on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from counterfake import config, scoring
from counterfake.data import DataConfig
from counterfake.errors import DataError
from counterfake.evaluation import detection, report, robustness
from counterfake.evaluation.card import percent
from counterfake.evaluation.report import Pictures, Section, Table, Text
from counterfake.evaluation.robustness import CLEAN, Cell
from counterfake.predictor import Predictor
from counterfake.storage import write_atomic
from counterfake.workspace import Workspace
from jobs.console import Console

FIGURES = ("auc", "accuracy", "recall_real", "recall_fake")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """One model, one pinned split, and how its figures are taken."""

    predictor: Predictor
    data: DataConfig  # uri with @version
    settings: dict[str, Any]  # threshold, bootstraps, seed
    limit: int
    look: bool  # a look at a locked split is recorded
    workspace: Workspace

    def run(self, names: Sequence[str], console: Console) -> dict[str, Any]:
        """Clean and damaged figures -> `robustness.summary`. names: cells of the grid, empty = all."""
        cells, found = (CLEAN, *robustness.cells(names)), {}
        with console.progress("robustness cells", len(cells)) as advance:
            for cell in cells:
                found[cell.name] = self._kept(cell, console)
                advance(1)
        return {**robustness.summary(found), "format": robustness.FORMAT}

    def _kept(self, cell: Cell, console: Console) -> dict[str, Any]:
        path = self._path(cell)
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_bytes())
            return kept
        figures = self._measured(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, config.canonical_json(figures))
        console.event(f"{cell.name}: AUC {percent(figures['auc'])}, {figures['refused']} refused")
        return figures

    def _measured(self, cell: Cell) -> dict[str, Any]:
        name = self.predictor.name
        scored = scoring.score(
            {name: self.predictor}, self.data, attributes=(), limit=self.limit, cell=cell, seed=self.settings["seed"],
            look=self.look, cache=self.workspace.cache,
        )  # fmt: skip
        refused = sum(scored.refused[name].values())
        try:
            rows = scored.answered()
        except DataError:  # nothing left of a class: a finding, not a mistake
            missing = {key: {"value": None, "low": None, "high": None} for key in FIGURES}
            return {**missing, "n": 0, "refused": refused}
        found = detection.evaluate(
            rows.fake, rows.probabilities[name], clusters=rows.clusters, **self.settings
        )
        return {**{key: found[key] for key in FIGURES}, "n": found["n"], "refused": refused}

    def _path(self, cell: Cell) -> Path:
        dataset, version = scoring.opened(self.data, self.workspace.cache)
        said = [
            robustness.FORMAT,
            self.predictor.bundle.digest,
            version.digest,
            self.data.split,
            self.data.where,
        ]
        key = config.digest([*said, self.limit, self.settings, config.to_dict(cell)])
        return self.workspace.home / "evaluations" / "cells" / f"{dataset.name}-{key[:32]}.json"


def section(found: Mapping[str, Any]) -> Section:
    """Heat map and table of a grid."""
    rows = [
        [
            name,
            row["n"],
            row["refused"],
            *(row["auc"][end] for end in ("value", "low", "high")),
            row["drop"],
            *(row[key]["value"] for key in FIGURES[1:]),
        ]
        for name, row in found["cells"].items()
    ]
    head = ["damage", "n", "refused", "AUC", "low", "high", "lost", "accuracy", "recall real", "recall fake"]
    worst = found["worst"]
    text = (
        f"Every picture damaged before the detector sees it. Worst cell: **{worst['cell']}**, AUC {percent(worst['auc'])}. "
        "JPEG by quality, resize by factor and back, blur by sigma in pixels, noise by deviation of 255, H.264 by CRF as a "
        "still clip of three frames, share = longer side 1280, JPEG 75, longer side 720, JPEG 60."
    )
    return Section("Robustness", [Text(text), Pictures([("", plot(found))], size="full"), Table(head, rows)])


def plot(found: Mapping[str, Any]) -> bytes:
    """AUC of every cell, one row of cells for each kind of damage."""
    kinds: dict[str, list[tuple[str, float | None]]] = {}
    for name, row in found["cells"].items():
        kinds.setdefault(name.split()[0], []).append((name, row["auc"]["value"]))
    return report.heatmap_plot(list(kinds.items()), title="AUC under damage")
