"""Stack and calibrate detectors into one model with an error rate, judge it, and make it champion if it passes the gate.

    counterfake run fit_ensemble ensemble --set members=[mobilenetv2-ciplab,benford] --set data.uri=ciplab
    counterfake run fit_ensemble ensemble --set stacking=boosted --set coverage_splits=100
    counterfake run fit_ensemble calibrated --set members=[cifake-32] --set data.uri=cifake   one detector, calibrated
    counterfake run fit_ensemble demo                                                       2 cores: seconds

Temperatures, stacking weights and conformal quantiles come from data.split=calibration, which neither training nor the
test used (its two halves do not share an identity or a video). A video is one row there, the mean logit of its frames. The
figures come from `test`, the single members' and the gain over the best of them beside them. coverage_splits counts false
accusations and misses over random halves of all held-out rows. One member is enough: temperature, line and conformal verdict
calibrate it alone. latency_ms is that of the members one after another. Leaves `runs/evaluations/<name>-<digest>/report.html`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake import bundle, config, predictor, scoring
from counterfake.data import DataConfig
from counterfake.ensemble import Ensemble, Stacking, coverage
from counterfake.errors import ConfigError
from counterfake.evaluation import detection, report
from counterfake.evaluation.card import percent
from counterfake.evaluation.report import Json, Section, Table, Text
from counterfake.gate import CHAMPION, Gate
from counterfake.predictor import Predictor
from counterfake.registry import Registry
from counterfake.scoring import Scored
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.evaluate import figures_section, key_figures, latency, publish, resolve
from jobs.evaluation_page import verdict_shares
from jobs.training import admitted


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleJob:
    """Members, the split that calibrates them, the split that judges them, and the gate."""

    name: str = "ensemble"
    members: tuple[str, ...] = ()  # "name@alias", "name/3", "name", or bundle folders
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(split="calibration")
    )  # uri, split, where count
    test: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(split="test")
    )  # that the figures come from; its uri "" = that of data
    alpha: float = 0.05  # error rate of each of the two accusations; needs 1/alpha - 1 rows per class in half of data.split
    stacking: Stacking = "logistic"  # or small boosted trees over it, which need some hundred rows
    by_video: bool = (
        True  # one row per video, the mean logit of its frames; false: every frame counts as a picture
    )
    coverage_splits: int = 0  # random halves over which coverage is counted; 0 = not
    threshold: float = 0.5  # for figures that need a yes or no
    bootstraps: int = 1000  # resamples of each interval
    seed: int = 0  # of the resamples
    attributes: tuple[str, ...] = ("difficulty",)  # of the samples, as groups beside maker and source
    limit: int = 0  # pictures of each split; 0 = all
    register_as: str = "ensemble"  # name in the registry; "" = not registered, not promoted
    promote: str = "champion"  # alias to move to it when the gate passes; "" = none
    gate: Gate = dataclasses.field(default_factory=lambda: CHAMPION)

    def __post_init__(self) -> None:
        same = self.test.uri in ("", self.data.uri) and self.test.split == self.data.split
        if same and self.test.where == self.data.where:
            raise ConfigError(
                f"data and test are both split {self.data.split!r}; calibrate and judge on different splits"
            )
        if self.coverage_splits < 0 or self.coverage_splits == 1:
            raise ConfigError(
                f"coverage_splits is {self.coverage_splits}; 0 counts nothing, 2 or more give a spread"
            )


def run(job: EnsembleJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Score both splits, fit, judge, write, register, promote. GateError leaves the model registered, not promoted."""
    console = console or Console(quiet=True)
    members = _members(job, workspace)
    tags = admitted([job.data, dataclasses.replace(job.test, uri=job.test.uri or job.data.uri)], workspace)
    with Tracker.at(workspace).start("ensemble", job.name, tags=tags, params=config.to_dict(job)) as log:
        held = _score(job, members, job.data, workspace, console)
        names, known = list(members), _units(job, held, list(members))
        fitted = Ensemble.fit(
            names, known.matrix, known.fake, alpha=job.alpha, clusters=known.clusters, threshold=job.threshold,
            stacking=job.stacking,
        )  # fmt: skip
        rows = _score(job, members, job.test, workspace, console)
        evaluation = {**_judge(job, fitted, rows), "latency_ms": _latency(job, members, workspace)}
        if job.coverage_splits:
            evaluation["coverage"] = _coverage(job, names, held, rows, console)
        folder = _write(job, workspace, fitted, members, held, evaluation, log.id)
        made = bundle.read(folder)
        plots = report.detection_plots(rows.fake, fitted.probability(rows.matrix(names)), evaluation)
        target = workspace.home / "evaluations" / f"{job.name}-{made.digest[:8]}"
        publish(log, target, evaluation, plots, _page(job, fitted, evaluation, plots), "test")
        log.dataset(held.uri.partition("@")[0], held.version.number, held.version.digest, "calibration")
        log.json("ensemble.json", fitted.to_dict())
        registered = _register(job, workspace, folder, log.id)
    console.event(_gain(evaluation))
    promoted = _promote(job, workspace, registered, console)
    return {
        "run_id": log.id, "bundle": str(folder), "digest": made.digest, "registered": registered, "promoted": promoted,
        "report": str(target / "report.html"), "dataset": held.uri, "members": {n: m.bundle.digest for n, m in members.items()},
        "ensemble": {k: v for k, v in fitted.to_dict().items() if k != "subsets"}, "evaluation": evaluation,
    }  # fmt: skip


def ensemble() -> EnsembleJob:
    """The served model: MobileNetV2 and Benford, alpha 5 %."""
    return EnsembleJob(
        members=("mobilenetv2-ciplab", "benford"), data=DataConfig(uri="ciplab", split="calibration")
    )


def calibrated() -> EnsembleJob:
    """One detector with a probability that means what it says and a verdict with an error rate; not promoted."""
    return EnsembleJob(name="calibrated", register_as="calibrated", promote="")


def demo() -> EnsembleJob:
    """The demo's two detectors on the demo's faces; alpha 10 %, because the split is small."""
    return EnsembleJob(
        members=("mobilenetv2-faces", "benford-faces"), data=DataConfig(uri="faces-demo", split="calibration"), alpha=0.1,
        bootstraps=400,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], EnsembleJob]] = {
    "ensemble": ensemble,
    "calibrated": calibrated,
    "demo": demo,
}


# -- private --------------------------------------------------------------------------------------------------------


def _members(job: EnsembleJob, workspace: Workspace) -> dict[str, Predictor]:
    """Loaded members by the name they will have in the ensemble: that of their bundle, numbered where two are alike."""
    if not job.members:
        raise ConfigError(
            "name one member to calibrate or several to stack, like --set members=[mobilenetv2-faces,benford-faces]"
        )
    if not job.data.uri:
        raise ConfigError("data.uri is not set; name a dataset, like --set data.uri=faces@3")
    loaded: dict[str, Predictor] = {}
    for reference in job.members:
        member = predictor.load(resolve(reference, workspace))
        if member.bundle.kind == "ensemble":
            raise ConfigError(f"{reference} is an ensemble itself; name its members instead")
        alike = sum(other.name == member.name for other in loaded.values())
        loaded[f"{member.name}.{alike + 1}" if alike else member.name] = member
    return loaded


def _score(
    job: EnsembleJob,
    members: Mapping[str, Predictor],
    data: DataConfig,
    workspace: Workspace,
    console: Console,
) -> Scored:
    uri = data.uri or job.data.uri
    data = dataclasses.replace(data, uri=workspace.dataset(uri) if uri else "")
    with console.progress(f"scoring {data.split}", job.limit or None) as advance:
        scored = scoring.score(
            members, data, attributes=job.attributes, limit=job.limit, cache=workspace.cache, progress=advance
        )
    console.event(f"{data.split}: {len(scored.ids)} pictures, {scored.images_per_second:.0f} a second")
    return scored.answered()


def _latency(job: EnsembleJob, members: Mapping[str, Predictor], workspace: Workspace) -> float | None:
    data = dataclasses.replace(job.test, uri=workspace.dataset(job.test.uri or job.data.uri))
    found = [latency(member, data, workspace) for member in members.values()]
    return None if None in found else float(sum(one for one in found if one is not None))


@dataclasses.dataclass(frozen=True)
class _Units:
    """What a verdict is about: U pictures and videos."""

    matrix: NDArray[np.float64]  # (U, M)
    fake: NDArray[np.int64]  # (U,)
    clusters: list[str]

    def and_(self, other: _Units) -> _Units:
        matrix = np.concatenate([self.matrix, other.matrix])
        return _Units(matrix, np.concatenate([self.fake, other.fake]), [*self.clusters, *other.clusters])


def _units(job: EnsembleJob, rows: Scored, names: list[str]) -> _Units:
    """Frames of one video are no independent evidence: with job.by_video they are one row, and other pictures one each."""
    matrix, clusters = rows.matrix(names), rows.clusters
    film = np.array([bool(video) and job.by_video for video in rows.videos], dtype=bool)
    stills, frames = np.flatnonzero(~film), np.flatnonzero(film)
    units = _Units(matrix[stills], rows.fake[stills], [clusters[i] for i in stills])
    if not len(frames):
        return units
    videos = [rows.videos[i] for i in frames]
    found = [detection.by_video(videos, rows.fake[frames], matrix[frames, i]) for i in range(len(names))]
    cluster = dict(zip(videos, (clusters[i] for i in frames), strict=True))
    columns = np.stack([column.probability for column in found], axis=1)
    return units.and_(_Units(columns, found[0].fake, [cluster[name] for name in found[0].names]))


def _coverage(
    job: EnsembleJob, names: list[str], held: Scored, rows: Scored, console: Console
) -> dict[str, Any]:
    """Over the calibration rows, and the test rows where they are of the same dataset: others promise nothing of them."""
    units = _units(job, held, names)
    if same := held.version.digest == rows.version.digest:
        units = units.and_(_units(job, rows, names))
    found = coverage(
        names, units.matrix, units.fake, alpha=job.alpha, clusters=units.clusters, stacking=job.stacking,
        splits=job.coverage_splits, seed=job.seed,
    )  # fmt: skip
    accused, missed = (
        f"{found[k]['mean']:.3f} (sd {found[k]['sd']:.3f})" for k in ("false_accusation", "miss")
    )
    console.event(
        f"alpha {job.alpha} over {job.coverage_splits} halves: false accusations {accused}, misses {missed}"
    )
    return {**found, "splits_of": [job.data.split, *([job.test.split] if same else [])]}


def _gain(evaluation: Mapping[str, Any]) -> str:
    best = evaluation["best_member"]
    gain = best["ensemble_minus_best_auc"]
    sure = gain["low"] is not None and gain["low"] > 0
    return (
        f"AUC {percent(evaluation['auc'])}; best member {best['name']} {percent(best['auc'])}; difference {percent(gain)}"
        f"{'' if sure else ', which does not exclude 0'}"
    )


def _judge(job: EnsembleJob, fitted: Ensemble, rows: Scored) -> dict[str, Any]:
    """The ensemble's figures, every member's, the gain over the best member, and what the verdicts did."""
    settings: dict[str, Any] = {"threshold": job.threshold, "bootstraps": job.bootstraps, "seed": job.seed}
    probability = fitted.probability(rows.matrix(list(fitted.members)))
    plain = {k: settings[k] for k in ("bootstraps", "seed")}
    members = {
        name: detection.evaluate(rows.fake, rows.probabilities[name], clusters=rows.clusters, **settings)
        for name in fitted.members
    }
    best = max(members, key=lambda name: float(members[name]["auc"]["value"]))
    gain = detection.paired_difference(
        rows.fake, probability, rows.probabilities[best], clusters=rows.clusters, **plain
    )
    return {
        **rows.evaluate(probability, **settings),
        "split": job.test.split,
        "members": {
            name: {k: v for k, v in found.items() if k not in ("groups", "worst_group")}
            for name, found in members.items()
        },
        "best_member": {"name": best, "auc": members[best]["auc"], "ensemble_minus_best_auc": gain},
        "verdicts": _verdicts(job, fitted, rows),
        "alpha": job.alpha,
    }


def _verdicts(job: EnsembleJob, fitted: Ensemble, rows: Scored) -> dict[str, Any]:
    units = _units(job, rows, list(fitted.members))
    words = [fitted.verdict(float(p)) for p in fitted.probability(units.matrix)]
    return detection.verdicts(words, units.fake)


def _write(
    job: EnsembleJob, workspace: Workspace, fitted: Ensemble, members: Mapping[str, Predictor], held: Scored,
    evaluation: Mapping[str, Any], run_id: str,
) -> Path:  # fmt: skip
    dataset = {
        "uri": held.uri.partition("@")[0],
        "version": held.version.number,
        "digest": held.version.digest,
    }
    folder = workspace.home / "models" / f"{job.name}-{fitted.calibration_id[:8]}"
    bundle.write(
        folder, kind="ensemble", name=job.name, config={"ensemble": fitted.to_dict()}, tensors={}, preprocess=None,
        provenance={
            "dataset": dataset, "sources": _sources(members, held), "run_id": run_id, "commit": bundle.source_commit(),
            "job": config.to_dict(job),
        },
        evaluation=evaluation, members={name: member.bundle.folder for name, member in members.items()},
    )  # fmt: skip
    return folder


def _sources(members: Mapping[str, Predictor], held: Scored) -> dict[str, Any]:
    """Of the members' training data and of the calibration data; a name that means two things is told apart by its member."""
    found = dict(held.version.sources)
    for name, member in members.items():
        for source, facts in (member.bundle.info.get("sources") or {}).items():
            found[source if found.get(source, facts) == facts else f"{source} ({name})"] = facts
    return found


def _register(job: EnsembleJob, workspace: Workspace, folder: Path, run_id: str) -> str:
    if not job.register_as:
        return ""
    return Registry.at(workspace).register(folder, job.register_as, run_id=run_id).reference


def _promote(job: EnsembleJob, workspace: Workspace, registered: str, console: Console) -> str:
    if not registered or not job.promote:
        return ""
    name, _, number = registered.rpartition("/")
    Registry.at(workspace).promote(name, int(number), job.promote, gate=job.gate)
    console.event(f"{registered} passed the gate and is {name}@{job.promote}")
    return f"{name}@{job.promote}"


def _page(job: EnsembleJob, fitted: Ensemble, evaluation: dict[str, Any], plots: Mapping[str, bytes]) -> str:
    rows: list[list[Any]] = [
        [name, t, w, evaluation["members"][name]["auc"]["value"], evaluation["members"][name]["ece"]["value"]]
        for name, t, w in zip(fitted.members, fitted.temperatures, fitted.weights, strict=True)
    ]
    rows.append(["ensemble", None, None, evaluation["auc"]["value"], evaluation["ece"]["value"]])
    gain = evaluation["best_member"]["ensemble_minus_best_auc"]
    text = (
        f"{len(fitted.members)} member{'s' if len(fitted.members) > 1 else ''}, {job.stacking} stack, calibrated on {fitted.n['real']} real and {fitted.n['fake']} fake "
        f"{'pictures and videos' if job.by_video else 'pictures'}.\n\n"
        f"AUC of the ensemble minus that of `{evaluation['best_member']['name']}`: {percent(gain)}."
    )
    sections = [
        Section(
            "What was fitted",
            [
                Text(text),
                key_figures(evaluation),
                Table(["member", "temperature", "weight", "AUC", "ECE"], rows),
            ],
        ),
        Section(
            "Verdicts",
            [verdict_shares(evaluation["verdicts"], job.alpha), *_coverage_table(evaluation.get("coverage"))],
        ),
        figures_section(evaluation, plots),
        Section("Everything", [Json("evaluation.json", evaluation), Json("ensemble", fitted.to_dict())]),
    ]
    return report.html(f"Ensemble {job.name}", sections, subtitle=f"{evaluation['n']:,} held-out pictures")


def _coverage_table(found: Mapping[str, Any] | None) -> list[Table]:
    if found is None:
        return []
    caption = (
        f"Counted over {found['splits']} random halves of {', '.join(found['splits_of'])}: {found['n']['real']:,} real, "
        f"{found['n']['fake']:,} fake; alpha {found['alpha']:g}"
    )
    rows = [
        [name.replace("_", " "), found[name]["mean"], found[name]["sd"]]
        for name in ("false_accusation", "miss", "uncertain")
    ]
    return [Table(["share", "mean", "sd"], rows, caption)]
