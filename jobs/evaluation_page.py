"""The pages that evaluations leave: figures, groups, plots, and the worst mistakes with where the detector looked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from counterfake import media, scoring
from counterfake.data import DataConfig
from counterfake.evaluation import report
from counterfake.evaluation.card import METRICS
from counterfake.evaluation.report import KeyFigures, Pictures, Section, Table, Text
from counterfake.images import Pixels, overlay, resize
from counterfake.predictor import Decoded, EnsemblePredictor, NetPredictor, Predictor
from counterfake.records import Dataset
from counterfake.scoring import Scored

THUMBNAIL = 160  # pixels, of a mistake in the report
TITLES = ("Real, called fake", "Fake, called real")

Mistakes = dict[str, list[tuple[str, bytes]]]  # by title: captions and pictures


def figures_section(evaluation: Mapping[str, Any], plots: Mapping[str, bytes]) -> Section:
    """Table, groups and plots of one evaluation; the ensemble's report has it too."""
    caption = f"{evaluation['n']:,} pictures in {evaluation['n_clusters']:,} clusters, 95 % intervals by bootstrap of clusters"
    groups = [
        Table([name, "n", "AUC", "recall real", "recall fake"], report.group_rows(members))
        for name, members in evaluation["groups"].items()
    ]
    main = Table(["metric", "value", "low", "high"], report.metric_rows(evaluation, METRICS), caption)
    films = [_videos(evaluation["video"])] if evaluation.get("video") else []
    return Section(
        "Held-out figures", [main, *films, *groups, Pictures([("", plot) for plot in plots.values()])]
    )


def key_figures(evaluation: Mapping[str, Any]) -> KeyFigures:
    """AUC, accuracy, recall on real pictures, calibration error, and the worst robustness cell where there is a grid."""
    notes = {
        "auc": ("AUC", _between(evaluation["auc"])),
        "accuracy": ("Accuracy", f"majority class {evaluation['majority']:.3f}"),
        "recall_real": ("Real recall", "real pictures that pass"),
        "ece": ("ECE", "calibration error, 15 bins"),
    }
    figures = [(label, f"{evaluation[key]['value']:.3f}", note) for key, (label, note) in notes.items()]
    if worst := (evaluation.get("robustness") or {}).get("worst"):
        figures.append(("Worst damage", f"{worst['auc']['value']:.3f}", f"AUC at {worst['cell']}"))
    return KeyFigures(figures)


def verdict_shares(found: Mapping[str, Mapping[str, Any]], alpha: float) -> Table:
    """What `detection.verdicts` counted, a row for each class."""
    head = ["truth", "n", "called real", "called fake", "uncertain", "out of domain", "lost"]
    keys = ("n", "real", "fake", "uncertain", "out_of_domain", "lost")
    caption = f"Shares of each class; lost = the true label was excluded, promised at most {alpha:.0%} on data like the calibration's"
    return Table(head, [[name, *(row[key] for key in keys)] for name, row in found.items()], caption)


def mistakes(
    loaded: Predictor, rows: Scored, data: DataConfig, threshold: float, most: int, cache: Path
) -> Mistakes:
    """The real pictures most surely called fake, and the fakes most surely called real, `most` of each: the picture, and
    beside it where the network looked (Grad-CAM of the fake logit), if the model has one."""
    p = rows.probabilities[loaded.name]
    wrong = [(rows.fake == 0) & (p >= threshold), (rows.fake == 1) & (p < threshold)]
    chosen = [np.flatnonzero(w)[np.argsort(-np.abs(p[w] - threshold), kind="stable")][:most] for w in wrong]
    wanted = {rows.ids[i] for rows_of_kind in chosen for i in rows_of_kind}
    dataset = Dataset.open(data.uri, cache=cache)
    samples = scoring.labelled(dataset, rows.version, data) if wanted else ()
    found = {sample.id: sample for sample in samples if sample.id in wanted}
    finders = getattr(loaded, "finders", ())

    def shown(row: int) -> tuple[str, bytes]:
        sample = found[rows.ids[row]]
        return f"{sample.maker}, p = {p[row]:.2f}", _pair(loaded, scoring.decoded(sample, finders))

    return {title: [shown(int(row)) for row in kind] for title, kind in zip(TITLES, chosen, strict=True)}


def mistake_sections(found: Mistakes) -> list[Section]:
    """One section for each kind of mistake."""
    hint = Text(
        "The picture and, where the model has a network, beside it what that network took for signs of a fake (Grad-CAM)."
    )
    return [
        Section(
            f"{title}: the surest mistakes",
            [hint, Pictures(pictures, size="pairs")] if pictures else [Text("None.")],
        )
        for title, pictures in found.items()
    ]


# -- private --------------------------------------------------------------------------------------------------------


def _videos(film: Mapping[str, Any]) -> Table:
    how = "mean logit" if film["strategy"] == "mean_logit" else "confident frames"
    caption = f"By video: {film['n']:,} videos of {film['frames']:,} frames, one score each ({how})"
    return Table(["metric, by video", "value", "low", "high"], report.metric_rows(film, METRICS), caption)


def _between(metric: Mapping[str, Any]) -> str:
    if metric["low"] is None:
        return "no interval"
    return f"{metric['low']:.3f} to {metric['high']:.3f}"


def _pair(loaded: Predictor, picture: Decoded) -> bytes:
    """The picture and, where a network can tell, its heat map beside it, as JPEG."""
    looked = _looked(loaded, picture)
    tiles = [_thumbnail(pixels) for pixels in (picture.pixels, looked) if pixels is not None]
    height = max(tile.shape[0] for tile in tiles)
    padded = [np.pad(t, ((0, height - t.shape[0]), (0, 0), (0, 0)), constant_values=255) for t in tiles]
    return media.encode(np.concatenate(padded, axis=1), "jpeg", 88)


def _looked(loaded: Predictor, picture: Decoded) -> Pixels | None:
    """The prepared picture under the heat map of the first network that has one."""
    members = loaded.members.values() if isinstance(loaded, EnsemblePredictor) else (loaded,)
    nets = [m for m in members if isinstance(m, NetPredictor) and m.refusal(picture) is None]
    heats = ((net, net.heatmap(picture)) for net in nets)
    return next((overlay(net.prepare(picture), heat) for net, heat in heats if heat is not None), None)


def _thumbnail(pixels: Pixels) -> Pixels:
    """(H, W, C) -> RGB with its longer side at THUMBNAIL."""
    scale = THUMBNAIL / max(pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    small = resize(pixels, width, height)
    return small if small.shape[2] == 3 else np.repeat(small, 3, axis=2)
