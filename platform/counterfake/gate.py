"""The gate before an alias: bounds on the figures of a bundle's evaluation.json, and a licence. Pure; knows no MLflow.

Serving follows one alias, `champion` unless told otherwise. `challenger` and `shadow` are names and no more: they are promoted,
fetched, compared (`counterfake models compare`) and rolled back like any alias, but no traffic goes to them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from counterfake.errors import ConfigError

Sources = Mapping[str, Mapping[str, Any]]  # of bundle.json: name -> {"licence", "consent"}
RESTRICTED = re.compile(
    r"\bnc\b|non-?\s?commercial|research|academic|education|evaluation[ -]only|personal use", re.IGNORECASE
)  # in a licence that rules out commercial use
UNSTATED = ("", "none", "unknown", "unstated", "not stated", "?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """Conditions on a bundle before an alias may point to it. None = not asked."""

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
    if_measured: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # bounds named as above that hold where the figure is there; one set above wins, and then it must be there
    licence: Literal["", "commercial"] = (
        ""  # commercial: no source of the training data may be unstated or for research only
    )
    interval: bool = False  # hold the pessimistic end of the 95 % interval against the bound, not the value

    def __post_init__(self) -> None:
        known = _BOUNDS - {"max_auc_drop"}
        if unknown := sorted(set(self.if_measured) - known):
            raise ConfigError(
                f"gate.if_measured has no bound {unknown[0]!r}; it may name {', '.join(sorted(known))}"
            )

    def check(
        self,
        evaluation: Mapping[str, Any] | None,
        current: Mapping[str, Any] | None = None,
        sources: Sources | None = None,
    ) -> list[str]:
        """Every failed condition with both numbers; empty when the gate is passed. `current`: the alias's evaluation;
        `sources`: the bundle's, which only `licence` needs."""
        asked = {name: bound for name in sorted(_BOUNDS) if (bound := getattr(self, name)) is not None}
        licence = restricted(sources or {}) if self.licence == "commercial" else []
        if asked and evaluation is None:
            return ["the bundle has no evaluation.json; evaluate it first", *licence]
        found = evaluation or {}
        for name, bound in self.if_measured.items():
            if figure(found, name.split("_", 1)[1], "value") is not None:
                asked.setdefault(name, bound)
        failed = [self._one(name, bound, found, current) for name, bound in asked.items()]
        return [*(line for line in failed if line), *licence]

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


_BOUNDS = frozenset(
    field.name for field in dataclasses.fields(Gate) if field.name.startswith(("min_", "max_"))
)
CHAMPION = Gate(
    min_auc=0.75,
    min_recall_real=0.7,
    if_measured={
        "min_worst_group_auc": 0.6,
        "min_robustness_auc": 0.55,  # above chance where the picture is damaged most
        "max_ece": 0.2,
        "max_latency_ms": 5_000.0,
    },
)  # before @champion, unless a job or a person says otherwise


def usual(alias: str) -> Gate:
    """The gate of an alias where none is named: CHAMPION before @champion, nothing before the others."""
    return CHAMPION if alias == "champion" else Gate()


def restricted(sources: Sources) -> list[str]:
    """Why these sources rule out commercial use, one line each; empty if they do not."""
    if not sources:
        return [
            "licence: the bundle does not record the sources of its training data (commercial use is required)"
        ]
    lines = []
    for name, facts in sources.items():
        licence, consent = (str(facts.get(key) or "").strip() for key in ("licence", "consent"))
        if licence.lower() in UNSTATED:
            lines.append(f"licence of source {name!r} is not stated (commercial use is required)")
        elif found := RESTRICTED.search(licence):
            lines.append(
                f"licence of source {name!r} is {licence!r}, which says {found[0]!r} (commercial use is required)"
            )
        elif consent == "research":
            lines.append(f"consent of source {name!r} is 'research' (commercial use is required)")
    return lines


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
