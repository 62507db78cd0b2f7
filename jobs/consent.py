"""Whose pictures may become face swaps: those of people who agreed to it, of nobody, or research data for one purpose.

A face swap shows a person doing what they did not do. So a job that trains or makes swaps refuses sources without the
consent of the people shown. Research data may be used to train detectors; what is made of it says so and may not be exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from counterfake import labels
from counterfake.data import DataConfig
from counterfake.errors import DataError
from counterfake.records import Dataset
from counterfake.versions import fits
from counterfake.workspace import Workspace

FREE = ("subjects", "synthetic")  # consents that need no purpose
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
    found = labels.read(dataset, version, data.split, "source")
    keep = np.ones(len(found.codes), bool)
    for column, wanted in data.where.items():
        other = labels.read(dataset, version, data.split, column)
        keep &= np.array([fits(value, wanted) for value in (*other.values, None)])[other.codes]
    require(
        named(version.sources, (found.values[code] for code in np.unique(found.codes[keep]) if code >= 0)),
        purpose,
    )


def named(sources: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """The facts of these sources."""
    return {name: sources[name] for name in names}


def marked(facts: Mapping[str, Any], *, model: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a source of swaps: not for export if the pictures, or what the model learned from, are research data."""
    bound = facts.get("consent") == "research" or facts.get("export") is False or model.get("export") is False
    return {**facts, "export": False} if bound else dict(facts)


def _allowed(facts: Mapping[str, Any], purpose: str) -> bool:
    consent = facts.get("consent")
    return consent in FREE or (consent == "research" and purpose == PURPOSE)
