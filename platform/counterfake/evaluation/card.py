"""The model card: Markdown made from a bundle's own facts, never written by hand.

Sections after "Model Cards for Model Reporting", https://arxiv.org/abs/1810.03993: details, intended use, data, metrics,
groups, caveats. A figure that was not measured is said to be missing, not left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

METRICS = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy at the threshold",
    "eer": "equal error rate",
    "recall_real": "recall on real pictures",
    "recall_fake": "recall on fakes",
    "tpr_at_fpr_1pct": "recall on fakes at 1 % false accusations",
    "tpr_at_fpr_0_1pct": "recall on fakes at 0.1 % false accusations",
    "ece": "calibration error (ECE, 15 bins)",
    "brier": "Brier score",
}
USES = {
    "detector": "Estimates how likely a picture was generated or manipulated. Input to an ensemble and to human review.",
    "benford": "Estimates from DCT first digits how likely a picture was generated. Input to an ensemble and to human review.",
    "error_level": "Estimates from what JPEG takes block by block how likely a picture was edited. Input to an ensemble and to human review.",
    "ensemble": "Answers real, fake or uncertain with a stated error rate for each of the two accusations.",
    "generator": "Makes synthetic pictures to train and test detectors. Everything it makes is marked as synthetic.",
    "faceswap": "Makes face swaps to train and test detectors. Everything it makes is marked as synthetic.",
    "autoencoder": "Codes small pictures in a few numbers: to denoise, compress or compare pictures like its training data.",
    "classifier": "Names the class of a small picture. Its features judge generators of such pictures.",
    "next_frame": "Paints the next frame of moving digits: shows what squared error does to pictures, and an adversary.",
}
LIMITS = {
    "generator": "Not for making pictures of people without their consent, and not for unmarked publication.",
    "faceswap": "Not for swapping faces of people who have not agreed, and not for unmarked publication.",
    "autoencoder": "Not for pictures unlike its training data, which it reconstructs badly.",
    "classifier": "Not for pictures unlike its training data, and not as a detector of fakes.",
    "next_frame": "Not for films other than those of its training data.",
}
DETECTOR_LIMITS = (
    "Not the only ground for a decision about a person. The figures hold for pictures like those of the test split; "
    "other generators, stronger compression and recaptured screens lower them."
)


def model_card(info: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """info: bundle.json; evaluation: what `detection.evaluate` returned, or None."""
    kind = str(info["kind"])
    parts = [
        f"# {info['name']}",
        f"**Kind:** {kind}  \n**Made:** {info.get('created_at')}  \n**Run:** {info.get('run_id') or 'none'}  \n"
        f"**Commit:** {info.get('commit') or 'unknown'}",
        f"## Intended use\n\n{USES[kind]}\n\n{LIMITS.get(kind, DETECTOR_LIMITS)}",
        f"## Data\n\n{_data(info)}",
        f"## Evaluation\n\n{_evaluation(evaluation)}",
    ]
    if info.get("members"):
        parts.append("## Members\n\n" + "\n".join(f"- `{name}`" for name in info["members"]))
    if info.get("notes"):
        parts.append(f"## Notes\n\n{info['notes']}")
    return "\n\n".join(parts) + "\n"


def percent(metric: Mapping[str, Any] | None) -> str:
    """{"value": .9123, "low": .88, "high": .94} -> "0.912 (0.880 to 0.940)"; a missing value is "not defined"."""
    if metric is None or metric.get("value") is None:
        return "not defined"
    if metric.get("low") is None or metric.get("high") is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"


def _data(info: Mapping[str, Any]) -> str:
    dataset = info.get("dataset") or {}
    lines = [f"Trained on `{dataset.get('uri', 'unknown')}` version {dataset.get('version', 'unknown')}."]
    if dataset.get("digest"):
        lines.append(f"Version digest `{dataset['digest']}`.")
    sources: Mapping[str, Mapping[str, Any]] = info.get("sources") or {}
    if not sources:
        return " ".join(lines) + "\n\nLicences of the sources were not recorded."
    rows = (
        [name, str(s.get("licence") or "not stated"), str(s.get("consent") or "not stated")]
        for name, s in sources.items()
    )
    return " ".join(lines) + "\n\n" + _table(["source", "licence", "consent"], rows)


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return "Not evaluated: no figure of this model may be quoted."
    counts = (
        f"{evaluation.get('n')} pictures ({evaluation.get('n_real')} real, {evaluation.get('n_fake')} fake) in "
        f"{evaluation.get('n_clusters', evaluation.get('n'))} clusters; always answering the larger class is right in "
        f"{float(evaluation.get('majority', 0)):.3f}. Threshold {evaluation.get('threshold')}; intervals 95 %, bootstrap by cluster."
    )
    rows = ([title, percent(evaluation[key])] for key, title in METRICS.items() if key in evaluation)
    text = counts + "\n\n" + _table(["metric", "value (95 % interval)"], rows)
    for group, members in (evaluation.get("groups") or {}).items():
        table = ([name, str(m["n"]), percent(m.get("auc")), percent(m.get("recall_real")), percent(m.get("recall_fake"))]
                 for name, m in members.items())  # fmt: skip
        text += f"\n\n### By {group}\n\n" + _table([group, "n", "AUC", "recall real", "recall fake"], table)
    return text


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
