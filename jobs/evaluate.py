"""Judge a detector or an ensemble on a split it has not seen: figures with intervals, plots, a page with the worst mistakes.

    counterfake run evaluate detector --set model=mobilenetv2-faces@champion --set data.uri=faces@4     2 cores: seconds per 1,000
    counterfake run evaluate detector --set model=runs/models/benford-1a2b3c4d --set data.uri=ciplab
    counterfake run evaluate robustness --set model=mobilenetv2-ciplab --set data.uri=ciplab            17 times as long

Leaves `runs/evaluations/<model>-<digest>-on-<dataset>-<version>-<split>/` with evaluation.json and report.html, and the same in
MLflow (experiment "evaluation"). Intervals: 1,000 resamples of what is linked by video or identity. Groups: maker, source,
and attributes such as difficulty. Of an ensemble also what its verdicts did, at its own threshold and error rate: shares per class,
false accusations, misses, true labels that the conformal set lost. Frames of videos are judged by video too, one score each.
`robustness` adds the grid of evaluation/robustness.py; a stopped grid goes on with the cells that are missing. A locked split
(`counterfake data lock`) is judged whole, every look is counted, and no row, picture or score of a single row is shown.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake import bundle, config, locks, media, predictor, scoring
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection, report, robustness
from counterfake.evaluation.card import METRICS, percent
from counterfake.evaluation.report import Json, Section, Text
from counterfake.predictor import Decoded, EnsemblePredictor, Predictor
from counterfake.records import Dataset, Version
from counterfake.registry import Registry
from counterfake.scoring import Scored
from counterfake.storage import write_atomic
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace
from jobs import evaluation_grid
from jobs.console import Console
from jobs.evaluation_page import (
    Mistakes,
    figures_section,
    key_figures,
    mistake_sections,
    mistakes,
    verdict_shares,
)

__all__ = [
    "EvaluateJob",
    "figures_section",
    "headline",
    "key_figures",
    "latency",
    "publish",
    "resolve",
    "run",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """One model on one split."""

    model: str = ""  # "name@alias", "name/3", "name", or a bundle folder
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(split="test")
    )  # uri, split, where count
    threshold: float | None = (
        None  # probability from which a picture counts as called fake; None: the ensemble's own, 0.5 for a single detector
    )
    bootstraps: int = 1000  # resamples of each interval
    seed: int = 0  # of the resamples, and of noise in the grid
    attributes: tuple[str, ...] = ("difficulty",)  # of the samples, as groups beside maker and source
    video: detection.Strategy = "mean_logit"  # how frames of one video become one score: or "confident"
    grid: bool = False  # also every cell of the robustness grid
    cells: tuple[str, ...] = ()  # of the grid, like "jpeg 30"; empty = all
    held_out: bool = False  # refuse a split of which every maker of fakes was trained on
    limit: int = 0  # pictures; 0 = all
    mistakes: int = 12  # pictures of each kind in the report
    register_as: str = ""  # register a copy of the model that carries these figures; "" = do not

    def __post_init__(self) -> None:
        if (
            not 0 < (self.threshold or 0.5) < 1
            or self.threshold == 0
            or self.bootstraps < 0
            or self.limit < 0
        ):
            raise ConfigError("threshold lies between 0 and 1; bootstraps and limit are at least 0")
        robustness.cells(self.cells)


def detector() -> EvaluateJob:
    """Figures, plots, mistakes."""
    return EvaluateJob()


def robust() -> EvaluateJob:
    """The same, and the robustness grid."""
    return EvaluateJob(grid=True)


PRESETS: dict[str, Callable[[], EvaluateJob]] = {"detector": detector, "robustness": robust}
USUAL = "detector"  # without a name


def run(job: EvaluateJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Score, judge, draw, log; returns the evaluation and where everything lies."""
    console = console or Console(quiet=True)
    loaded = predictor.load(resolve(job.model, workspace))
    threshold = _threshold(job, loaded)
    asked = _Served(loaded) if isinstance(loaded, EnsemblePredictor) else loaded
    uri = workspace.dataset(job.data.uri) if job.data.uri else ""
    dataset, version = scoring.opened(dataclasses.replace(job.data, uri=uri), workspace.cache)
    data = dataclasses.replace(job.data, uri=f"{dataset.store.uri}@{version.number}")
    locked = _locked(job, dataset, version, data)
    unseen = _unseen_makers(job, loaded.bundle, version, data)
    with Tracker.at(workspace).start("evaluation", loaded.name, params=config.to_dict(job)) as log:
        looks = _look(log, dataset, version, data, loaded.bundle) if locked else 0
        with console.progress(f"scoring {data.split}", job.limit or None) as advance:
            scored = scoring.score(
                {loaded.name: asked}, data, attributes=job.attributes, limit=job.limit, look=locked,
                cache=workspace.cache, progress=advance,
            )  # fmt: skip
        rows = scored.answered()
        p = rows.probabilities[loaded.name]
        settings: dict[str, Any] = {
            "threshold": threshold,
            "bootstraps": job.bootstraps,
            "seed": job.seed,
        }
        found = rows.evaluate(p, strategy=job.video, **settings)
        evaluation = {**found, "latency_ms": latency(loaded, data, workspace), "split": data.split}
        if isinstance(asked, _Served):
            evaluation |= asked.counted(scored)
        evaluation |= {"unseen_makers": unseen} | ({"locked": {"looks": looks}} if locked else {})
        if locked:
            evaluation["groups"] = _large(evaluation["groups"])
        if job.grid:
            grid = evaluation_grid.Grid(
                predictor=loaded,
                data=data,
                settings=settings,
                limit=job.limit,
                look=locked,
                workspace=workspace,
            )
            evaluation["robustness"] = grid.run(job.cells, console)
        target = workspace.home / "evaluations" / _folder(loaded.bundle, evaluation)
        plots = report.detection_plots(rows.fake, p, evaluation, least=locks.LEAST if locked else 1)
        shown: Mistakes = {}
        if not locked:
            shown = mistakes(loaded, rows, data, threshold, job.mistakes, workspace.cache)
        publish(
            log, target, evaluation, plots, _page(job, loaded.bundle, evaluation, plots, shown), data.split
        )
    reference = _register(job, workspace, loaded.bundle, evaluation, log.id)
    _tell(console, evaluation)
    return {
        "model": job.model, "digest": loaded.bundle.digest, "dataset": scored.uri, "run_id": log.id,
        "report": str(target / "report.html"), "evaluation": evaluation, "registered": reference,
        "images_per_second": scored.images_per_second,
    }  # fmt: skip


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a person reads of a result."""
    found = result["evaluation"]
    short = {
        METRICS[name]: percent(found[name])
        for name in ("auc", "accuracy", "recall_real", "recall_fake", "ece")
    }
    if found["video"]:
        short["AUC by video"] = percent(found["video"]["auc"])
    if worst := (found.get("robustness") or {}).get("worst"):
        short["worst damage"] = f"{worst['cell']}: AUC {percent(worst['auc'])}"
    if "verdicts" in found:
        short |= {"real called fake": found["false_accusations"], "fakes called real": found["misses"]}
    if "locked" in found:
        short["looks at this locked split"] = found["locked"]["looks"]
    kept = {key: result[key] for key in ("dataset", "images_per_second", "report", "registered", "run_id")}
    return {"pictures": found["n"], **short, **kept}


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
    """The values of METRICS that are defined, those by video as video_…, and AUC in every cell of the grid."""
    found = {name: evaluation[name]["value"] for name in METRICS}
    found |= {f"video_{name}": (evaluation.get("video") or {}).get(name, {}).get("value") for name in METRICS}
    grid = (evaluation.get("robustness") or {}).get("cells", {})
    found |= {f"auc/{cell}": row["auc"]["value"] for cell, row in grid.items()}
    return {name: value for name, value in found.items() if value is not None}


def latency(loaded: Predictor, data: DataConfig, workspace: Workspace) -> float | None:
    """Median milliseconds of one picture at a time over eight of the split; None for raw pixels, which have no bytes."""
    dataset, version = scoring.opened(data, workspace.cache)
    samples = scoring.labelled(dataset, version, data)
    pictures = [s.image for s, _ in zip(samples, range(8), strict=False) if s.image is not None]
    return scoring.latency_ms(loaded, pictures) if pictures else None


# -- private --------------------------------------------------------------------------------------------------------


class _Served:
    """An ensemble that remembers the verdict behind every probability it gives: a row's own subset of members decides."""

    def __init__(self, loaded: EnsemblePredictor) -> None:
        self._loaded, self.name, self.bundle = loaded, loaded.name, loaded.bundle
        self.finders, self.finds_eyes = loaded.finders, loaded.finds_eyes
        self.words: list[str] = []  # of every picture asked; "" = no answer

    def decode(self, data: bytes, limits: media.Limits = media.DEFAULT_LIMITS) -> Decoded:
        return self._loaded.decode(data, limits)

    def refusal(self, picture: Decoded) -> str | None:
        return self._loaded.refusal(picture)

    def predict(self, pictures: Sequence[Decoded]) -> NDArray[np.float64]:
        columns = self._loaded.member_probabilities(pictures)
        return np.array(
            [self._one({name: float(p[row]) for name, p in columns.items()}) for row in range(len(pictures))]
        )

    def predict_bytes(self, pictures: Sequence[bytes]) -> list[float]:
        return self._loaded.predict_bytes(pictures)

    def counted(self, scored: Scored) -> dict[str, Any]:
        """Shares of the verdicts per class over the pictures that were answered, and the error rate that was promised."""
        rows = [row for row, word in enumerate(self.words) if word]
        found = detection.verdicts([self.words[row] for row in rows], scored.fake[rows])
        return {
            "verdicts": found, "alpha": self._loaded.ensemble.alpha, "false_accusations": found["real"]["fake"],
            "misses": found["fake"]["real"],
        }  # fmt: skip

    def _one(self, answers: Mapping[str, float]) -> float:
        probability = self._loaded.judge.combine(answers)
        present = [name for name, p in answers.items() if math.isfinite(p)]
        known = math.isfinite(probability)
        self.words.append(self._loaded.ensemble.only(present).verdict(probability) if known else "")
        return probability


def _threshold(job: EvaluateJob, loaded: Predictor) -> float:
    own = loaded.ensemble.threshold if isinstance(loaded, EnsemblePredictor) else 0.5
    return own if job.threshold is None else job.threshold


def _locked(job: EvaluateJob, dataset: Dataset, version: Version, data: DataConfig) -> bool:
    """Whether the split is locked. Raises ConfigError for a job that would single out some of its rows."""
    if data.split not in locks.locked(dataset, version):
        return False
    if job.limit or data.where:
        raise ConfigError(
            f"split {data.split} of {data.uri} is locked and is judged whole; leave limit and data.where out"
        )
    return True


def _look(log: Run, dataset: Dataset, version: Version, data: DataConfig, model: bundle.Bundle) -> int:
    """Count this look at a locked split, in the dataset and in MLflow, before anything is scored."""
    looks = locks.look(dataset, version, data.split, {"run_id": log.id, "model": model.digest})
    log.tags({"locked_split": f"{data.uri}/{data.split}", "locked_looks": looks})
    log.metrics({"locked_looks": looks}, 0)
    return looks


def _unseen_makers(
    job: EvaluateJob, model: bundle.Bundle, version: Version, data: DataConfig
) -> list[str] | None:
    """Makers of fakes in this split that the model was not trained on; None where that is not known.

    Known for a model trained on this version, by the makers of its other splits. Raises DataError where job.held_out asks
    for one and there is none."""
    trained = (model.info.get("dataset") or {}).get("digest")
    fakes = [row for row in version.counts if row["fake"] == 1]
    here = {row["maker"] for row in fakes if data.split in ("*", row["split"])}
    before = {row["maker"] for row in fakes if row["split"] == "train"}
    unseen = sorted(here - before) if trained == version.digest else None
    if job.held_out and not unseen:
        why = (
            "not known: the model was trained on other data"
            if unseen is None
            else f"{sorted(here)}, all trained on"
        )
        raise DataError(
            f"{data.uri} split {data.split} has no held-out generator (makers: {why}); "
            "use a split with another maker, or counterfake run evaluate-cross leave-one-out"
        )
    return unseen


def _large(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without the groups so small that their figures tell of single rows."""
    return {name: {k: r for k, r in rows.items() if r["n"] >= locks.LEAST} for name, rows in groups.items()}


def _folder(model: bundle.Bundle, evaluation: Mapping[str, Any]) -> str:
    dataset = evaluation["dataset"]
    judged = f"{dataset['uri'].rpartition('@')[0].rstrip('/').rpartition('/')[2]}-{dataset['version']}-{evaluation['split']}"
    return f"{model.name}-{model.digest[:8]}-on-{judged.replace('*', 'all')}"


def _tell(console: Console, evaluation: Mapping[str, Any]) -> None:
    console.event(
        f"AUC {percent(evaluation['auc'])}, accuracy {percent(evaluation['accuracy'])} on {evaluation['n']} pictures"
    )
    if film := evaluation["video"]:
        console.event(f"by video: AUC {percent(film['auc'])} on {film['n']} videos")
    if worst := (evaluation.get("robustness") or {}).get("worst"):
        console.event(f"worst damage: {worst['cell']}, AUC {percent(worst['auc'])}")
    if "verdicts" in evaluation:
        console.event(
            f"as served: {evaluation['false_accusations']:.1%} of real pictures called fake, {evaluation['misses']:.1%} of fakes called real "
            f"(promised on data like the calibration's: {evaluation['alpha']:.0%} each)"
        )
    if "locked" in evaluation:
        console.event(f"a locked split; it has been looked at {evaluation['locked']['looks']} times")
    if evaluation["unseen_makers"] == []:
        console.event("every maker of these fakes was trained on: nothing is said of other generators")


def _page(
    job: EvaluateJob, model: bundle.Bundle, evaluation: dict[str, Any], plots: Mapping[str, bytes], shown: Mistakes
) -> str:  # fmt: skip
    what = Section("What was judged", [Text(_what(job, model, evaluation)), key_figures(evaluation)])
    sections = [what, figures_section(evaluation, plots)]
    if "verdicts" in evaluation:
        sections.append(
            Section("Verdicts as served", [verdict_shares(evaluation["verdicts"], evaluation["alpha"])])
        )
    if "robustness" in evaluation:
        sections.append(evaluation_grid.section(evaluation["robustness"]))
    sections += mistake_sections(shown)
    everything = [Json("evaluation.json", evaluation), Json("settings of this job", config.to_dict(job))]
    sections.append(Section("Everything", everything))
    return report.html(
        f"Evaluation of {model.name}", sections, subtitle=f"{evaluation['n']:,} held-out pictures"
    )


def _what(job: EvaluateJob, model: bundle.Bundle, evaluation: Mapping[str, Any]) -> str:
    dataset = evaluation["dataset"]["uri"]
    lines = [
        f"`{job.model}` (digest `{model.digest[:12]}`) on split `{job.data.split}` of `{dataset}`, threshold {evaluation['threshold']:g}."
    ]
    if unanswered := sum(sum(reasons.values()) for reasons in evaluation["refused"].values()):
        lines.append(f"{unanswered} pictures could not be answered and are not in these figures.")
    if "locked" in evaluation:
        lines.append(
            f"The split is locked: no picture and no score of a single row is shown. Look number {evaluation['locked']['looks']}."
        )
    if evaluation["unseen_makers"] == []:
        lines.append("Every maker of these fakes was trained on: nothing is said of other generators.")
    elif evaluation["unseen_makers"]:
        lines.append(f"Never trained on: {', '.join(f'`{maker}`' for maker in evaluation['unseen_makers'])}.")
    return "\n\n".join(lines)


def _register(
    job: EvaluateJob, workspace: Workspace, model: bundle.Bundle, evaluation: Mapping[str, Any], run_id: str
) -> str:
    if not job.register_as:
        return ""
    folder = workspace.home / "models" / f"{model.name}-{model.digest[:8]}-evaluated"
    bundle.with_evaluation(model, folder, evaluation)
    return Registry.at(workspace).register(folder, job.register_as, run_id=run_id).reference
