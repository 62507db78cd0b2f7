"""From every detector's opinion to the one answer: numbers and words, no nets. The same answer as `predictor.Judge`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from counterfake.ensemble import MAX_MISSING, Ensemble
from counterfake.errors import DataError
from serving.schemas import DetectorScore, Model, ModelReference, Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One detector's opinion of one picture."""

    probability: float | None  # of fake, before calibration; None if it cannot answer
    reason: str | None = None  # why it cannot
    faces: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def compose(
    model: Model,
    scores: Mapping[str, Score],
    provenance: dict[str, Any],
    request_id: str,
    timings: dict[str, float],
) -> Verdict:
    """scores by member name, all of `model`. Without some members the fit for the others is used; no member, no verdict."""
    everyone = _ensemble(json.dumps(model.ensemble))
    present = {
        name: s.probability for name in everyone.members if (s := scores[name]).probability is not None
    }
    reasons = [score.reason for score in scores.values() if score.reason]
    used = _fit_for(everyone, present)
    word, probability = "no_verdict", None
    if used is not None:
        probability = float(used.probability([[present[name] for name in used.members]])[0])
        word = used.verdict(probability)
        reasons = [word] if word == "out_of_domain" else []
    return Verdict(
        verdict="no_verdict" if word == "out_of_domain" else word,  # type: ignore[arg-type]
        reason=next(iter(reasons), None if used else "no_detector"),
        probability_fake=probability,
        error_rate=everyone.alpha,
        detectors=_detectors(model, scores, used),
        faces=next((score.faces for score in scores.values() if score.faces), []),
        provenance=provenance,
        model=_reference(model),
        request_id=request_id,
        timings={name: round(value, 3) for name, value in timings.items()},
    )


# -- private --------------------------------------------------------------------------------------------------------


def _fit_for(everyone: Ensemble, present: Mapping[str, float]) -> Ensemble | None:
    members = len(everyone.members)
    if members - len(present) > min(MAX_MISSING, members - 1):
        return None
    try:
        return everyone.only(list(present))
    except DataError:  # an ensemble that was fitted without fits for fewer members
        return None


def _detectors(model: Model, scores: Mapping[str, Score], used: Ensemble | None) -> list[DetectorScore]:
    weights = dict(zip(used.members, used.weights, strict=True)) if used else {}
    return [
        DetectorScore(
            name=member.name,
            kind=member.kind,
            version=member.version,
            probability=scores[member.name].probability,
            weight=weights.get(member.name, 0.0),
            reason=scores[member.name].reason,
        )
        for member in model.members
    ]


def _reference(model: Model) -> ModelReference:
    return ModelReference(
        name=model.name,
        version=model.version,
        digest=model.digest,
        calibration_id=model.calibration_id,
        dataset_version=(model.dataset or {}).get("version"),
    )


@functools.lru_cache(maxsize=8)
def _ensemble(tree: str) -> Ensemble:
    return Ensemble.from_dict(json.loads(tree))
