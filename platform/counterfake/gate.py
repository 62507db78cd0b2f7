"""The gate before an alias: bounds on the figures of a bundle's evaluation.json. Pure; knows no MLflow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """Conditions on a bundle's evaluation.json before an alias may point to it. None = not asked."""

    min_auc: float | None = None
    min_accuracy: float | None = None
    min_recall_real: float | None = None  # share of real pictures that pass as real
    min_recall_fake: float | None = None
    min_worst_group_auc: float | None = None  # of the weakest maker, source, …
    min_robustness_auc: float | None = None  # of the worst cell of the robustness grid
    max_ece: float | None = None  # expected calibration error
    max_brier: float | None = None
    max_eer: float | None = None
    max_latency_ms: float | None = None  # one picture, `latency_ms` of the evaluation
    min_rows: int | None = None  # held-out rows of the smaller class
    max_auc_drop: float | None = None  # below the version the alias points to now
    interval: bool = False  # hold the pessimistic end of the 95 % interval against the bound, not the value

    def check(
        self, evaluation: Mapping[str, Any] | None, current: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Every failed condition with both numbers; empty when the gate is passed. `current`: the alias's evaluation."""
        asked = {n: b for n, b in dataclasses.asdict(self).items() if n != "interval" and b is not None}
        if asked and evaluation is None:
            return ["the bundle has no evaluation.json; evaluate it first"]
        failed = [self._one(name, bound, evaluation or {}, current) for name, bound in asked.items()]
        return [line for line in failed if line]

    def _one(
        self, name: str, bound: float, found: Mapping[str, Any], current: Mapping[str, Any] | None
    ) -> str | None:
        if name == "max_auc_drop":
            if current is None or (before := figure(current, "auc", "value")) is None:
                return None  # nothing to fall below
            if (judged := _judged_on(found)) != (held := _judged_on(current)):
                return f"a drop of auc cannot be told: judged on {judged}, the current one on {held}; evaluate both alike"
            name, bound = "min_auc", before - bound
        kind, metric = name.split("_", 1)
        end = ("low" if kind == "min" else "high") if self.interval else "value"
        value = figure(found, metric, end)
        if value is None:
            return f"{metric} was not measured ({'at least' if kind == 'min' else 'at most'} {bound:g} is required)"
        if value >= bound if kind == "min" else value <= bound:
            return None
        which = "" if end == "value" else f" ({end} end of its interval)"
        return f"{metric} is {value:.4g}{which}, must be {'at least' if kind == 'min' else 'at most'} {bound:.4g}"


def _judged_on(evaluation: Mapping[str, Any]) -> str:
    dataset = evaluation.get("dataset") or {}
    digest = str(dataset.get("digest", "an unknown digest"))[:12]
    return f"{dataset.get('uri', 'an unknown dataset')} ({digest}) split {evaluation.get('split', 'unknown')}"


CHAMPION = Gate(
    min_auc=0.75, min_recall_real=0.7
)  # before @champion, unless a job or a person says otherwise


def figure(evaluation: Mapping[str, Any], metric: str, end: str) -> float | None:
    """A number of evaluation.json; `end` is value, low or high."""
    if metric == "rows":
        return min(evaluation.get("n_real", 0), evaluation.get("n_fake", 0))
    if metric == "worst_group_auc":
        evaluation, metric = evaluation.get("worst_group") or {}, "auc"
    if metric == "robustness_auc":
        evaluation, metric = (evaluation.get("robustness") or {}).get("worst") or {}, "auc"
    found = evaluation.get(metric)
    if isinstance(found, Mapping):
        found = found.get(end, found.get("value"))
    return None if found is None else float(found)
