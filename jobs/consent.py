"""Whose pictures may become face swaps: those of people who agreed to it, of nobody, or research data for one purpose.

A face swap shows a person doing what they did not do. So a job that trains or makes swaps refuses sources without the
consent of the people shown. Research data may be used to train detectors; what is made of it says so and may not be exported.
What a model makes carries the terms of what the model learned from, which its bundle names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from counterfake.data import DataConfig, used_sources
from counterfake.errors import DataError
from counterfake.records import Dataset
from counterfake.workspace import Workspace

FREE = ("subjects", "synthetic")  # consents that need no purpose
LEAST_FIRST = ("none", "research", *FREE)
PURPOSE = "detector-training"  # what research data may be used for
TERMS = "made from research data to train detectors; not for export"  # written into files made of it


def require(sources: Mapping[str, Mapping[str, Any]], purpose: str) -> None:
    """Raises DataError naming each source whose people have not agreed; sources: {name: {"consent", …}}."""
    refused = {
        name: str(facts.get("consent") or "none")
        for name, facts in sources.items()
        if not _allowed(facts, purpose)
    }
    if not refused:
        return
    named = ", ".join(f"{name} (consent {consent})" for name, consent in sorted(refused.items()))
    remedy = (
        f"with --set purpose={PURPOSE} research data may be used, what is made of it may not be exported"
        if set(refused.values()) == {"research"}
        else "choose others with data.where, or ingest them with --set source.consent=subjects if the people agreed"
    )
    raise DataError(f"face swaps need sources of consent {' or '.join(FREE)}; refused: {named}; {remedy}")


def require_for(data: DataConfig, purpose: str, workspace: Workspace) -> None:
    """`require` for the sources that have rows in what a training job reads."""
    dataset = Dataset.open(workspace.dataset(data.uri))
    version = dataset.version(dataset.pinned)
    if all(_allowed(facts, purpose) for facts in version.sources.values()):
        return  # whatever is chosen: no labels need to be read
    require(used_sources(dataset, version, data), purpose)


def named(sources: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """The facts of these sources."""
    return {name: sources[name] for name in names}


def learned(model: Mapping[str, Any]) -> dict[str, Any]:
    """Terms of what a model makes from noise: all licences it learned from, and the least consent among them.

    model: the facts of its bundle. One that does not name its sources has consent none."""
    licences = _licences(model)
    told = f"trained on {', '.join(licences)}" if licences else "what it was trained on is not recorded"
    facts = {"licence": f"model output; {told}", "consent": _least(_consents(model) or ["none"])}
    return {**facts, "export": False} if model.get("export") is False else facts


def marked(facts: Mapping[str, Any], *, model: Mapping[str, Any]) -> dict[str, Any]:
    """Terms of swaps in pictures with these facts: the licences of both pictures and model, the least consent."""
    other = [licence for licence in _licences(model) if licence != facts["licence"]]
    licence = "; ".join(
        [facts["licence"], *([f"faces by a model trained on {', '.join(other)}"] if other else [])]
    )
    consent = _least([str(facts.get("consent") or "none"), *_consents(model)])
    both = {**facts, "licence": licence, "consent": consent}
    return {**both, "export": False} if bound(facts, model=model) else both


def bound(facts: Mapping[str, Any], *, model: Mapping[str, Any]) -> bool:
    """Swaps are not for export: the pictures, or what the model learned from, are research data."""
    research = "research" in (facts.get("consent"), *_consents(model))
    return research or facts.get("export") is False or model.get("export") is False


def _licences(model: Mapping[str, Any]) -> list[str]:
    return sorted({str(facts["licence"]) for facts in (model.get("sources") or {}).values()})


def _consents(model: Mapping[str, Any]) -> list[str]:
    return [str(facts.get("consent") or "none") for facts in (model.get("sources") or {}).values()]


def _least(consents: Iterable[str]) -> str:
    return min(consents, key=LEAST_FIRST.index)


def _allowed(facts: Mapping[str, Any], purpose: str) -> bool:
    consent = facts.get("consent")
    return consent in FREE or (consent == "research" and purpose == PURPOSE)
