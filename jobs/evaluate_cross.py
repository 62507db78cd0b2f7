"""Detectors on data they were not trained for: several models on several datasets, or trained anew without one generator.

    counterfake run evaluate-cross matrix --set models=[ciplab,stylegan-ffhq] --set datasets=[ciplab,stylegan-ffhq,faces@4]
    counterfake run evaluate-cross leave-one-out --set data.uri=faces@4 --set train=mobilenetv2-demo
    counterfake run evaluate-cross leave-one-out --set data.uri=faces@4 --set train=benford

`matrix` scores every model on every dataset. `leave-one-out` trains the preset `train` of train-detector or train-benford once for each maker of
fakes, on everything but that maker, and judges each detector on every maker against all real pictures of the split; a
training that was finished before is not done again. Leaves `runs/evaluations/cross-<digest>/` with matrix.json and
report.html, and the same in MLflow (experiment "evaluation").
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import jobs
from counterfake import config, predictor, scoring
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import cross, report
from counterfake.evaluation.cross import Cell
from counterfake.evaluation.report import Json, KeyFigures, Pictures, Section, Text
from counterfake.predictor import Predictor
from counterfake.records import Dataset, Version
from counterfake.scoring import Scored
from counterfake.storage import write_atomic
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.evaluate import resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossJob:
    """Models by datasets; or, with `train`, detectors that each missed one maker by makers."""

    models: tuple[str, ...] = ()  # "name@alias", "name/3", "name", or bundle folders
    datasets: tuple[str, ...] = ()  # names, perhaps with @version, or URIs
    train: str = ""  # preset of train-detector or train-benford to train without each maker in turn; "" = judge `models`
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # to that preset, by dotted path
    makers: tuple[str, ...] = ()  # to leave out in turn; empty = every maker of fakes in data.split
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(split="test")
    )  # split counts; for leave-one-out also uri
    threshold: float = 0.5  # probability from which a picture counts as called fake
    bootstraps: int = 1000  # resamples of each interval
    seed: int = 0  # of the resamples
    limit: int = 0  # pictures of each dataset; 0 = all

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or self.bootstraps < 0 or self.limit < 0:
            raise ConfigError("threshold lies between 0 and 1; bootstraps and limit are at least 0")
        if self.train and (self.models or self.datasets):
            raise ConfigError(
                "leave-one-out trains its own models on data.uri; leave models and datasets out"
            )


def matrix() -> CrossJob:
    """Models by datasets."""
    return CrossJob()


def leave_one_out() -> CrossJob:
    """The demo's detector, trained without one maker of fakes in turn."""
    return CrossJob(train="mobilenetv2-demo")


PRESETS: dict[str, Callable[[], CrossJob]] = {"matrix": matrix, "leave-one-out": leave_one_out}


def run(job: CrossJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Score, judge, draw, log; returns the matrix and where everything lies."""
    console = console or Console(quiet=True)
    cells = list(_without_each(job, workspace, console) if job.train else _crossed(job, workspace, console))
    found = cross.matrix(cells)
    name = "leave-one-out" if job.train else "cross"
    with Tracker.at(workspace).start("evaluation", name, params=config.to_dict(job)) as log:
        target = workspace.home / "evaluations" / f"{name}-{config.digest([config.to_dict(job), found])[:12]}"
        _publish(job, found, target, log)
    for row in found["cells"]:
        _tell(console, row)
    return {"report": str(target / "report.html"), "run_id": log.id, "matrix": found}


# -- private: models by datasets ------------------------------------------------------------------------------------


def _crossed(job: CrossJob, workspace: Workspace, console: Console) -> Iterator[Cell]:
    if not job.models or not job.datasets:
        raise ConfigError("name models and datasets, like --set models=[a,b] --set datasets=[ciplab,faces@4]")
    models = _named([predictor.load(resolve(model, workspace)) for model in job.models])
    for reference in job.datasets:
        data = dataclasses.replace(job.data, uri=workspace.dataset(reference))
        scored = _scored(job, models, data, workspace, console)
        for name, loaded in models.items():
            trained = str((loaded.bundle.info.get("dataset") or {}).get("uri", "")).partition("@")[0]
            home = trained.rstrip("/") == scored.uri.rpartition("@")[0].rstrip("/")
            yield _cell(job, name, scored.uri.rpartition("/")[2], home, scored, name)


def _named(loaded: list[Predictor]) -> dict[str, Predictor]:
    """By the name of each bundle; of two alike, each with its digest."""
    twice = collections.Counter(one.name for one in loaded)
    return {f"{p.name}-{p.bundle.digest[:8]}" if twice[p.name] > 1 else p.name: p for p in loaded}


# -- private: without one generator ---------------------------------------------------------------------------------


def _without_each(job: CrossJob, workspace: Workspace, console: Console) -> Iterator[Cell]:
    uri = workspace.dataset(job.data.uri) if job.data.uri else ""
    dataset, version = scoring.opened(dataclasses.replace(job.data, uri=uri), workspace.cache)
    data = dataclasses.replace(job.data, uri=f"{dataset.store.uri}@{version.number}")
    makers = _makers(version, data.split)
    for left_out in job.makers or makers:
        if left_out not in makers:
            raise DataError(
                f"{data.uri} split {data.split} has no fakes by {left_out!r}; it has {', '.join(makers)}"
            )
        console.stage(f"train without {left_out}")
        loaded = predictor.load(_train_without(job, dataset, version, left_out, workspace, console))
        scored = _scored(job, {loaded.name: loaded}, data, workspace, console)
        for maker in makers:
            fake = np.array(scored.groups["maker"]) == maker
            part = scored.where((scored.fake == 0) | fake)
            yield _cell(job, f"without {left_out}", maker, maker != left_out, part, loaded.name)


def _makers(version: Version, split: str) -> list[str]:
    """Makers of fakes in a split, sorted. DataError for fewer than two: leaving one out leaves none."""
    rows = [row for row in version.counts if row["fake"] == 1 and split in ("*", row["split"])]
    found = sorted({str(row["maker"]) for row in rows})
    if len(found) < 2:
        raise DataError(
            f"split {split} has no held-out generator: its fakes come from {', '.join(found) or 'nobody'}; "
            "leaving one out needs two makers or more"
        )
    return found


def _train_without(
    job: CrossJob, dataset: Dataset, version: Version, left_out: str, workspace: Workspace, console: Console
) -> Path:
    """Train the preset on every maker but one -> the bundle's folder."""
    from jobs import train_benford, train_detector

    kept = sorted({str(row["maker"]) for row in version.counts} - {left_out})
    uri = f"{dataset.store.uri}@{version.number}"
    changes: dict[str, Any] = {"data.uri": uri, "data.where": {"maker": kept}, "register_as": ""}
    forest = job.train.replace("_", "-") in train_benford.PRESETS
    preset = config.override(jobs.preset(train_benford if forest else train_detector, job.train), job.changes)
    if isinstance(preset, train_benford.BenfordJob):  # its validation reads the same rows of `where`
        return Path(train_benford.run(config.override(preset, changes), workspace, console=console)["bundle"])
    if preset.validation is not None:
        changes |= {"validation.uri": uri, "validation.where": {"maker": kept}}
    return Path(train_detector.run(config.override(preset, changes), workspace, console=console)["bundle"])


# -- private: both --------------------------------------------------------------------------------------------------


def _scored(
    job: CrossJob, models: dict[str, Predictor], data: DataConfig, workspace: Workspace, console: Console
) -> Scored:
    with console.progress(f"scoring {data.uri.rpartition('/')[2]}", job.limit or None) as advance:
        return scoring.score(
            models, data, attributes=(), limit=job.limit, cache=workspace.cache, progress=advance
        )


def _cell(job: CrossJob, row: str, column: str, home: bool, scored: Scored, name: str) -> Cell:
    """The figures of one detector over the rows that it answered."""
    alone = dataclasses.replace(
        scored, probabilities={name: scored.probabilities[name]}, refused={name: scored.refused[name]}
    )
    try:
        rows = alone.answered()
    except DataError:
        if len(np.unique(scored.fake)) < 2:  # not the detector's doing
            raise
        return Cell(row=row, column=column, home=home, found=None, why=f"refused: {scored.refused[name]}")
    found = rows.evaluate(
        rows.probabilities[name], threshold=job.threshold, bootstraps=job.bootstraps, seed=job.seed
    )
    return Cell(row=row, column=column, home=home, found=found)


def _publish(job: CrossJob, found: dict[str, Any], target: Path, log: Run) -> None:
    """matrix.json, report.html and the plot into the folder and the run; every AUC as a metric."""
    picture = cross.plot(found, home="trained on" if job.train else "home")
    page = _page(job, found, picture)
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "matrix.json", json.dumps(found, indent=2).encode())
    write_atomic(target / "report.html", page.encode())
    log.picture("matrix", picture)
    log.json("matrix.json", found)
    log.text("report.html", page)
    known = [cell for cell in found["cells"] if cell["auc"]["value"] is not None]
    log.metrics({f"auc/{cell['row']}/{cell['column']}": cell["auc"]["value"] for cell in known}, 0)
    means = {f"mean_auc_{kind}": value for kind, value in found["mean_auc"].items() if value is not None}
    log.metrics(means, 0)


def _page(job: CrossJob, found: dict[str, Any], picture: bytes) -> str:
    what = "a maker that was left out" if job.train else "a dataset that was not trained on"
    means, worst = found["mean_auc"], found["worst_away"]
    figures = [
        (f"Mean AUC, {label}", "–" if value is None else f"{value:.3f}", note)
        for label, value, note in (
            ("seen", means["home"], "seen in training"),
            ("unseen", means["away"], what),
        )
    ]
    if worst:
        figures.append(
            ("Worst, unseen", f"{worst['auc']['value']:.3f}", f"{worst['row']} on {worst['column']}")
        )
    text = f"Each row is one detector, each column {'one maker against all real pictures' if job.train else 'one dataset'}."
    head = ("detector", "fakes by") if job.train else ("detector", "judged on")
    sections = [
        Section("Matrix", [Text(text), KeyFigures(figures), Pictures([("", picture)], size="full")]),
        Section("Every cell", [cross.table(found, head)]),
        Section(
            "Everything", [Json("matrix.json", found), Json("settings of this job", config.to_dict(job))]
        ),
    ]
    title = "Without one generator" if job.train else "Across datasets"
    return report.html(title, sections, subtitle=f"{len(found['rows'])} detectors, split {job.data.split}")


def _tell(console: Console, row: dict[str, Any]) -> None:
    value = row["auc"]["value"]
    judged = row["why"] if value is None else f"AUC {value:.3f}"
    console.event(f"{row['row']} on {row['column']}{' (seen in training)' if row['home'] else ''}: {judged}")
