"""Judge a detector or an ensemble on a split it has not seen: figures with intervals, plots, a page with the worst mistakes.

    counterfake run evaluate --set model=mobilenetv2-faces@champion --set data.uri=faces@4       2 cores: seconds per 1,000
    counterfake run evaluate --set model=runs/models/benford-1a2b3c4d --set data.uri=ciplab

Leaves `runs/evaluations/<model>-<digest>-on-<dataset>-<version>-<split>/` with evaluation.json and report.html, and the same in MLflow (experiment
"evaluation"). Intervals: 1,000 resamples of videos or identities. Groups: maker, source, and attributes such as difficulty.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from counterfake import bundle, config, media, predictor, scoring
from counterfake.data import DataConfig
from counterfake.errors import ConfigError
from counterfake.evaluation import report
from counterfake.evaluation.card import METRICS, percent
from counterfake.evaluation.report import Json, KeyFigures, Pictures, Section, Table, Text
from counterfake.images import resize
from counterfake.records import Dataset
from counterfake.registry import Registry
from counterfake.scoring import Scored
from counterfake.storage import write_atomic
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace
from jobs.console import Console

THUMBNAIL = 128  # pixels, of a mistake in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """One model on one split."""

    model: str = ""  # "name@alias", "name/3", "name", or a bundle folder
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(split="test")
    )  # uri, split, where count
    threshold: float = 0.5  # probability from which a picture counts as called fake
    bootstraps: int = 1000  # resamples of each interval
    seed: int = 0  # of the resamples
    attributes: tuple[str, ...] = ("difficulty",)  # of the samples, as groups beside maker and source
    limit: int = 0  # pictures; 0 = all
    mistakes: int = 12  # pictures of each kind in the report
    register_as: str = ""  # register a copy of the model that carries these figures; "" = do not

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or self.bootstraps < 0 or self.limit < 0:
            raise ConfigError("threshold lies between 0 and 1; bootstraps and limit are at least 0")


PRESETS: dict[str, Callable[[], EvaluateJob]] = {"detector": EvaluateJob}


def run(job: EvaluateJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Score, judge, draw, log; returns the evaluation and where everything lies."""
    console = console or Console(quiet=True)
    folder = resolve(job.model, workspace)
    data = dataclasses.replace(job.data, uri=workspace.dataset(job.data.uri) if job.data.uri else "")
    loaded = predictor.load(folder)
    with console.progress(f"scoring {data.split}", job.limit or None) as advance:
        scored = scoring.score(
            {loaded.name: loaded}, data, attributes=job.attributes, limit=job.limit, cache=workspace.cache, progress=advance
        )  # fmt: skip
    rows = scored.answered()
    found = rows.evaluate(
        rows.probabilities[loaded.name], threshold=job.threshold, bootstraps=job.bootstraps, seed=job.seed
    )
    evaluation = {**found, "latency_ms": _latency(loaded, data, workspace), "split": data.split}
    target = workspace.home / "evaluations" / _folder(loaded.bundle, evaluation)
    with Tracker.at(workspace).start("evaluation", loaded.name, params=config.to_dict(job)) as log:
        plots = report.detection_plots(rows.fake, rows.probabilities[loaded.name], evaluation)
        page = _page(
            job, loaded.bundle, evaluation, plots, _mistakes(job, rows, loaded.name, data, workspace)
        )
        publish(log, target, evaluation, plots, page, data.split)
    reference = _register(job, workspace, loaded.bundle, evaluation, log.id)
    console.event(
        f"AUC {percent(evaluation['auc'])}, accuracy {percent(evaluation['accuracy'])} on {len(rows.ids)} pictures"
    )
    return {
        "model": job.model, "digest": loaded.bundle.digest, "dataset": scored.uri, "run_id": log.id,
        "report": str(target / "report.html"), "evaluation": evaluation, "registered": reference,
        "images_per_second": scored.images_per_second,
    }  # fmt: skip


def resolve(model: str, workspace: Workspace) -> Path:
    """A bundle folder from a folder or a registry reference."""
    if not model:
        raise ConfigError("model is not set; name one, like --set model=mobilenetv2-faces@champion")
    folder = Path(model).expanduser()
    if (folder / bundle.MANIFEST).is_file():
        return folder
    return Registry.at(workspace).fetch(model, workspace.cache)


def publish(
    log: Run, target: Path, evaluation: Mapping[str, Any], plots: Mapping[str, bytes], page: str, split: str
) -> None:
    """evaluation.json, report.html and plots into the folder and the run; every scalar figure as a metric."""
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "evaluation.json", json.dumps(evaluation, indent=2).encode())
    write_atomic(target / "report.html", page.encode())
    for name, data in plots.items():
        log.picture(name, data)
    log.json("evaluation.json", evaluation)
    log.text("report.html", page)
    log.metrics({f"test_{name}": value for name, value in scalars(evaluation).items()}, 0)
    dataset = evaluation["dataset"]
    log.dataset(dataset["uri"], dataset["version"], dataset["digest"], split)


def scalars(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The values of METRICS that are defined."""
    return {name: evaluation[name]["value"] for name in METRICS if evaluation[name]["value"] is not None}


def figures_section(evaluation: Mapping[str, Any], plots: Mapping[str, bytes]) -> Section:
    """Table, groups and plots of one evaluation; the ensemble's report has it too."""
    caption = f"{evaluation['n']:,} pictures in {evaluation['n_clusters']:,} clusters, 95 % intervals by bootstrap of clusters"
    tables = [
        Table([name, "n", "AUC", "recall real", "recall fake"], report.group_rows(members))
        for name, members in evaluation["groups"].items()
    ]
    rows = report.metric_rows(evaluation, METRICS)
    main, pictures = (
        Table(["metric", "value", "low", "high"], rows, caption),
        Pictures([("", p) for p in plots.values()]),
    )
    return Section("Held-out figures", [main, *tables, pictures])


def headline(evaluation: Mapping[str, Any]) -> KeyFigures:
    """AUC, accuracy, recall on real pictures, calibration error."""
    share = f"majority class {evaluation['majority']:.3f}"
    notes = {
        "auc": "",
        "accuracy": share,
        "recall_real": "real pictures that pass",
        "ece": "calibration error, 15 bins",
    }
    names = {"auc": "AUC", "accuracy": "Accuracy", "recall_real": "Real recall", "ece": "ECE"}
    return KeyFigures([
        (names[key], f"{evaluation[key]['value']:.3f}", note or _between(evaluation[key])) for key, note in notes.items()
    ])  # fmt: skip


# -- private --------------------------------------------------------------------------------------------------------


def _folder(model: bundle.Bundle, evaluation: Mapping[str, Any]) -> str:
    dataset = evaluation["dataset"]
    judged = f"{dataset['uri'].rstrip('/').rpartition('/')[2]}-{dataset['version']}-{evaluation['split']}"
    return f"{model.name}-{model.digest[:8]}-on-{judged.replace('*', 'all')}"


def _between(metric: Mapping[str, Any]) -> str:
    if metric["low"] is None:
        return "no interval: bootstraps=0"
    return f"{metric['low']:.3f} to {metric['high']:.3f}"


def _latency(loaded: predictor.Predictor, data: DataConfig, workspace: Workspace) -> float | None:
    dataset = Dataset.open(data.uri, cache=workspace.cache)
    samples = scoring.labelled(dataset, dataset.version(), data)
    pictures = [s.image for s, _ in zip(samples, range(8), strict=False) if s.image is not None]
    return scoring.latency_ms(loaded, pictures) if pictures else None


def _mistakes(
    job: EvaluateJob, rows: Scored, name: str, data: DataConfig, workspace: Workspace
) -> dict[str, list[tuple[str, bytes]]]:
    """The real pictures most surely called fake, and the fakes most surely called real: captions and thumbnails."""
    p, kinds = rows.probabilities[name], {}
    for title, wrong in (("Real, called fake", (rows.fake == 0) & (p >= job.threshold)),
                         ("Fake, called real", (rows.fake == 1) & (p < job.threshold))):  # fmt: skip
        worst = np.flatnonzero(wrong)[np.argsort(-np.abs(p[wrong] - job.threshold))][: job.mistakes]
        kinds[title] = {rows.ids[i]: float(p[i]) for i in worst}
    wanted = {key for ids in kinds.values() for key in ids}
    dataset = Dataset.open(data.uri, cache=workspace.cache)
    found = (
        {s.id: s for s in scoring.labelled(dataset, rows.version, data) if s.id in wanted} if wanted else {}
    )
    return {
        title: [
            (f"{found[key].maker}, p = {p:.2f}", _thumbnail(scoring.decoded(found[key]).pixels))
            for key, p in ids.items()
        ]
        for title, ids in kinds.items()
    }


def _thumbnail(pixels: Any) -> bytes:
    scale = THUMBNAIL / max(pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return media.encode(resize(pixels, width, height) if scale < 1 else pixels, "jpeg", 85)


def _page(
    job: EvaluateJob, model: bundle.Bundle, evaluation: dict[str, Any], plots: Mapping[str, bytes],
    mistakes: Mapping[str, list[tuple[str, bytes]]],
) -> str:  # fmt: skip
    dataset = evaluation["dataset"]
    what = f"`{job.model}` (digest `{model.digest[:12]}`) on split `{job.data.split}` of `{dataset['uri']}`, threshold {job.threshold}."
    unanswered = sum(sum(reasons.values()) for reasons in evaluation["refused"].values())
    note = (
        f"\n\n{unanswered} pictures could not be answered and are not in these figures." if unanswered else ""
    )
    sections = [
        Section("What was judged", [Text(what + note), headline(evaluation)]),
        figures_section(evaluation, plots),
    ]
    for title, pictures in mistakes.items():
        blocks = [Pictures(pictures, size="small")] if pictures else [Text("None.")]
        sections.append(Section(f"{title}: the surest mistakes", blocks))
    sections.append(
        Section(
            "Everything",
            [Json("evaluation.json", evaluation), Json("settings of this job", config.to_dict(job))],
        )
    )
    return report.html(
        f"Evaluation of {model.name}", sections, subtitle=f"{evaluation['n']:,} held-out pictures"
    )


def _register(
    job: EvaluateJob, workspace: Workspace, model: bundle.Bundle, evaluation: Mapping[str, Any], run_id: str
) -> str:
    if not job.register_as:
        return ""
    folder = workspace.home / "models" / f"{model.name}-{model.digest[:8]}-evaluated"
    bundle.with_evaluation(model, folder, evaluation)
    return Registry.at(workspace).register(folder, job.register_as, run_id=run_id).reference
