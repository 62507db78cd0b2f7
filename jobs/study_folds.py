"""Cross-validate one detector: k folds with near-copies on one side, and the figures of every picture by a model that never saw it.

    counterfake run study-folds ciplab --set base.learner.net.weights=FILE      5 trainings of four fifths of CIPLAB
    counterfake run study-folds benford --set base.data.uri=ciplab --set near_bits=68
    counterfake run study-folds ciplab --set folds=10 --set others=[runs/studies/benford-folds-1a2b3c4d]
    counterfake run study-folds mobilenetv2-demo --set base.data.uri=faces@4

A preset of train-detector or train-benford is a preset here, with its settings under `base.`. The rows of `split` ("*", every
split) are dealt by component (folds.py): what is linked by identity, video or a near hash is tested together. A network trains on
the other folds less an inner part, which is again whole components: the best epoch is chosen there, never on the tested fold;
a forest, which has nothing to choose, trains on both. The inner part also calibrates the network (Platt scaling), because two
folds' networks lean to different sides. The out-of-fold scores are pooled: figures with intervals over resampled
components, per fold mean ± sd, groups such as difficulty, the majority class beside them. With `others`, finished studies over
the same folds, the pooled score is the mean logit of all. Every fold is an ordinary training job nested below the study's
run, and `runs/studies/<name>-folds-<digest>/` keeps what is done: a study that was killed goes on with the fold it was at.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake import bundle, config, ensemble, folds, predictor, scoring
from counterfake.config import canonical_json, digest, to_dict
from counterfake.data import DataConfig
from counterfake.errors import CheckpointError, ConfigError
from counterfake.evaluation import detection, report
from counterfake.evaluation.card import percent
from counterfake.evaluation.report import Json, Section, Table, Text
from counterfake.fingerprint import NEAR_BITS
from counterfake.folds import FoldRule, Folds
from counterfake.loop import TrainJob
from counterfake.scoring import Scored
from counterfake.storage import write_atomic
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace
from jobs import train_benford, train_detector
from jobs.console import Console
from jobs.evaluate import figures_section, key_figures, publish
from jobs.studies import spread
from jobs.train_benford import BenfordJob
from jobs.training import both_classes, train

FIGURES = ("auc", "average_precision", "eer", "accuracy", "recall_real", "recall_fake", "ece", "brier")
CIPLAB_BITS = 68  # of the ingest preset ciplab: 43 pairs of 1,631 pictures are that near


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldStudyJob:
    """One detector, trained once for every fold of one dataset version."""

    base: (
        TrainJob | BenfordJob
    )  # data.uri and data.where count; splits, name and registration are set by the study
    folds: int = 5
    validation: float = 0.125  # share of the training folds that picks the best epoch
    stratify: tuple[str, ...] = (
        "difficulty",
    )  # attributes that every fold has alike; groups of the figures too
    near_bits: int = (
        NEAR_BITS  # bits of 256 in which near-copies differ at most, as splits.near_bits of ingest
    )
    split: str = "*"  # whose rows are dealt; "*" = every split
    deal_seed: int = 0  # of the dealing
    calibrated: bool = (
        True  # a line through each network's logits, fitted on its inner part, before the folds are pooled
    )
    threshold: float = 0.5  # probability from which a picture counts as called fake
    bootstraps: int = 1000  # resamples of each interval
    others: tuple[
        str, ...
    ] = ()  # folders of finished studies over the same folds, for a mean logit with theirs

    @property
    def rule(self) -> FoldRule:
        return FoldRule(
            folds=self.folds, validation=self.validation, stratify=self.stratify, near_bits=self.near_bits,
            seed=self.deal_seed,
        )  # fmt: skip

    def __post_init__(self) -> None:
        if "id" in self.base.data.where:
            raise ConfigError("base.data.where names ids, which the folds do; choose rows by another column")
        if not 0 < self.threshold < 1 or self.bootstraps < 0:
            raise ConfigError("threshold lies between 0 and 1; bootstraps is at least 0")
        _ = self.rule


def run(job: FoldStudyJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Deal, train and score every fold, judge the pooled scores; returns them with the figures of each fold."""
    console = console or Console(quiet=True)
    data = dataclasses.replace(job.base.data, uri=workspace.dataset(job.base.data.uri), split=job.split)
    console.event(both_classes([data], workspace))
    dataset, version = scoring.opened(data, workspace.cache)
    data = dataclasses.replace(data, uri=f"{dataset.store.uri}@{version.number}")
    dealt = folds.deal(dataset, version, job.split, job.rule, f"{workspace.storage}/rowlists", data.where)
    study = _Study(job, workspace, console, data, dealt)
    with study.log as log:
        parts = [study.fold(number) for number in range(job.folds)]
        rows = _pooled([scored for scored, _ in parts], dealt)
        figures = [facts for _, facts in parts]
        evaluation = _judge(job, rows, figures, dealt, study)
        plots = report.detection_plots(rows.fake, study.mixed(rows), evaluation)
        publish(log, study.folder, evaluation, plots, _page(job, evaluation, plots), "cross-validation")
        _keep_scores(study, rows)
    lines = spread(figures, FIGURES, "folds")
    if not console.as_json:
        console.table(
            f"{job.base.name}, {job.folds} folds", list(lines[0]), [list(line.values()) for line in lines]
        )
    return {
        "table": lines, "folds": figures, "evaluation": evaluation, "dataset": data.uri, "rows": dealt.uri,
        "run_id": log.id, "folder": str(study.folder), "report": str(study.folder / "report.html"),
    }  # fmt: skip


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is printed below the table."""
    found = result["evaluation"]
    pooled = {f"pooled {name}": percent(found[name]) for name in ("auc", "accuracy", "recall_real", "ece")}
    kept = {key: result[key] for key in ("dataset", "report", "folder", "run_id")}
    return {"pictures": found["n"], **pooled, "majority class": round(found["majority"], 4), **kept}


def of_fold(job: FoldStudyJob, data: DataConfig, dealt: Folds, fold: int) -> TrainJob | BenfordJob:
    """The training job of one fold; data: the whole pinned version."""

    def part(of: DataConfig, name: folds.Part) -> DataConfig:
        where = {**data.where, **dealt.where(fold, name)}
        return dataclasses.replace(of, uri=data.uri, split=data.split, where=where)

    base, name = job.base, f"{job.base.name}-fold{fold}"
    if isinstance(base, BenfordJob):
        rest = part(base.data, "rest")
        return dataclasses.replace(base, name=name, data=rest, validation="", register_as="")
    inner = part(base.validation or base.data, "validation")
    trained = part(base.data, "train")
    return dataclasses.replace(base, name=name, data=trained, validation=inner, register_as="")


def _preset(make: Callable[[], TrainJob | BenfordJob]) -> FoldStudyJob:
    base = make()
    bits = CIPLAB_BITS if base.data.uri == "ciplab" else NEAR_BITS
    return FoldStudyJob(base=base, near_bits=bits)


_BASES: dict[str, Callable[[], TrainJob | BenfordJob]] = {**train_detector.PRESETS, **train_benford.PRESETS}
PRESETS: dict[str, Callable[[], FoldStudyJob]] = {
    name: functools.partial(_preset, make) for name, make in _BASES.items()
}


# -- private: one fold ----------------------------------------------------------------------------------------------


class _Study:
    """A study's folder and MLflow run: what is finished is there and is not done again."""

    def __init__(
        self, job: FoldStudyJob, workspace: Workspace, console: Console, data: DataConfig, dealt: Folds
    ) -> None:
        self.job, self.workspace, self.console, self.data, self.dealt = job, workspace, console, data, dealt
        self.name = job.base.name
        key = digest([to_dict(job), data.uri, dealt.uri])[:12]
        self.folder = workspace.home / "studies" / f"{self.name}-folds-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.others = [_scores(Path(folder), dealt) for folder in job.others]
        self.log = self._run(key)

    def fold(self, number: int) -> tuple[Scored, dict[str, Any]]:
        """Train where it is not done yet, score the tested rows -> (scores, figures of this fold alone)."""
        self.console.stage(f"fold {number + 1} of {self.job.folds}")
        made = self._trained(number)
        loaded = predictor.load(Path(made["bundle"]))
        where = {**self.data.where, **self.dealt.where(number, "test")}
        data = dataclasses.replace(self.data, where=where)
        with self.console.progress(
            f"scoring fold {number}", len(self.dealt.fold) // self.job.folds
        ) as advance:
            scored = scoring.score(
                {self.name: loaded}, data, attributes=self.job.stratify, cache=self.workspace.cache,
                progress=advance,
            ).answered()  # fmt: skip
        line = self._line(loaded, number)
        scored = dataclasses.replace(
            scored, probabilities={self.name: ensemble.scaled(scored.probabilities[self.name], *line)}
        )
        found = scored.evaluate(self.mixed(scored), threshold=self.job.threshold, bootstraps=0, seed=0)
        facts = {name: float(found[name]["value"]) for name in FIGURES}
        self.log.metrics({f"fold_{name}": value for name, value in facts.items()}, number)
        self.console.event(f"fold {number}: AUC {facts['auc']:.3f}, accuracy {facts['accuracy']:.3f}")
        calibration = {"slope": line[0], "shift": line[1]}
        return scored, {
            "fold": number, "n": found["n"], "majority": found["majority"], **calibration, **facts, **made,
        }  # fmt: skip

    def mixed(self, rows: Scored) -> NDArray[np.float64]:
        """(N,) the mean logit of this study's scores and those of `others`."""
        own = rows.probabilities[self.name]
        if not self.others:
            return own
        columns = [own, *(np.array([found.get(name, np.nan) for name in rows.ids]) for found in self.others)]
        clipped = np.clip(np.stack(columns), detection.CLIP, 1 - detection.CLIP)
        mean = np.mean(np.log(clipped) - np.log1p(-clipped), axis=0)
        return np.asarray(0.5 * (1 + np.tanh(0.5 * mean)))

    def _line(self, detector: predictor.Predictor, number: int) -> tuple[float, float]:
        """Slope and shift for a fold's logits. Networks of two folds may lean to either side by as much as they tell
        apart; a forest has no inner part that it did not learn from, and stays as it is."""
        if not self.job.calibrated or isinstance(self.job.base, BenfordJob):
            return 1.0, 0.0
        where = {**self.data.where, **self.dealt.where(number, "validation")}
        data = dataclasses.replace(self.data, where=where)
        held = scoring.score({self.name: detector}, data, cache=self.workspace.cache).answered()
        return ensemble.platt(held.probabilities[self.name], held.fake)

    def _trained(self, number: int) -> dict[str, Any]:
        """{"bundle", "trained_run"} of a fold, from this study's folder where it is finished."""
        kept = self.folder / f"fold-{number}.json"
        if kept.is_file():
            made: dict[str, Any] = json.loads(kept.read_bytes())
            try:
                bundle.read(Path(made["bundle"]))
                return made
            except CheckpointError as error:
                self.console.event(f"fold {number} is trained again: {error}")
        one = of_fold(self.job, self.data, self.dealt, number)
        if isinstance(one, BenfordJob):
            done = train_benford.grow(one, self.workspace, self.console, parent_run=self.log.id)
        else:
            done = train(one, self.workspace, self.console, parent_run=self.log.id)
        made = {"bundle": done["bundle"], "trained_run": done["run_id"]}
        write_atomic(kept, canonical_json(made))
        return made

    def _run(self, key: str) -> Run:
        tracker, tags = Tracker.at(self.workspace), {"counterfake.study": key}
        known = tracker.find("study", tags)
        if known:
            return tracker.resume(known[0])
        return tracker.start("study", f"{self.name}-folds", tags=tags, params=config.to_dict(self.job))


# -- private: all folds ---------------------------------------------------------------------------------------------


def _pooled(parts: Sequence[Scored], dealt: Folds) -> Scored:
    """Every fold's rows in one; resamples draw whole components, near-copies with them."""
    rows = Scored.merged(parts)
    return dataclasses.replace(rows, keys=[(f"component:{dealt.component[name]}",) for name in rows.ids])


def _judge(
    job: FoldStudyJob, rows: Scored, figures: Sequence[Mapping[str, Any]], dealt: Folds, study: _Study
) -> dict[str, Any]:
    found = rows.evaluate(
        study.mixed(rows), threshold=job.threshold, bootstraps=job.bootstraps, seed=job.deal_seed
    )
    per_fold = {
        line["figure"]: {"mean": line["mean"], "sd": line["sd"]} for line in spread(figures, FIGURES, "folds")
    }
    return {
        **found, "split": "out of fold", "folds": list(figures), "per_fold": per_fold, "dealt": dealt.rows,
        "rows": dealt.uri, "others": list(job.others),
    }  # fmt: skip


def _keep_scores(study: _Study, rows: Scored) -> None:
    """Out-of-fold scores by id: what another study over the same folds can be averaged with."""
    scores = dict(zip(rows.ids, rows.probabilities[study.name].tolist(), strict=True))
    write_atomic(study.folder / "scores.json", canonical_json({"rows": study.dealt.uri, "scores": scores}))


def _scores(folder: Path, dealt: Folds) -> dict[str, float]:
    """Scores of a finished study. Raises ConfigError where it is not finished or dealt its rows otherwise."""
    path = folder.expanduser() / "scores.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no scores.json; name the folder of a finished study-folds")
    tree = json.loads(path.read_bytes())
    if tree["rows"] != dealt.uri:
        raise ConfigError(
            f"{folder} has other folds; a mean needs the same dataset version, folds, near_bits, stratify, "
            f"validation and deal_seed"
        )
    return {str(name): float(value) for name, value in tree["scores"].items()}


def _page(job: FoldStudyJob, evaluation: dict[str, Any], plots: Mapping[str, bytes]) -> str:
    components = sum(fold["components"] for fold in evaluation["dealt"])
    text = (
        f"{evaluation['n']:,} pictures in {components:,} components dealt into {job.folds} folds (near hashes: at most "
        f"{job.near_bits} of 256 bits); each is judged by a model that saw neither it nor anything linked with it. The majority class "
        f"is {evaluation['majority']:.3f}. Pooled scores come from {job.folds} models, whose scales may differ; the means per "
        f"fold do not mix them."
    )
    rows: list[list[Any]] = [
        [fold["fold"], counts["real"], counts["fake"], *(fold[name] for name in ("auc", "accuracy", "recall_real", "recall_fake"))]
        for fold, counts in zip(evaluation["folds"], evaluation["dealt"], strict=True)
    ]  # fmt: skip
    spread = [[name, line["mean"], line["sd"]] for name, line in evaluation["per_fold"].items()]
    sections = [
        Section("What was judged", [Text(text), key_figures(evaluation)]),
        Section(
            "Fold by fold",
            [
                Table(["fold", "real", "fake", "AUC", "accuracy", "recall real", "recall fake"], rows),
                Table(["figure", "mean over folds", "sd"], spread),
            ],
        ),
        figures_section(evaluation, plots),
        Section("Everything", [Json("evaluation.json", evaluation), Json("settings", to_dict(job))]),
    ]
    return report.html(
        f"Cross-validation of {job.base.name}", sections, subtitle=f"{job.folds} folds of {job.base.data.uri}"
    )
