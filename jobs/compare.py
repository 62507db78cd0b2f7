"""Two models on the same pictures: the difference of every figure, with its interval and a paired bootstrap test.

    counterfake models compare mobilenetv2-faces@champion mobilenetv2-faces/4 --data faces@4
    counterfake run compare --set first=ensemble@champion --set second=ensemble@challenger --set data.uri=faces@4

Only pictures that both can answer count. Resamples draw what is linked by video or identity. Nothing is registered or logged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from counterfake import predictor, scoring
from counterfake.data import DataConfig
from counterfake.errors import ConfigError
from counterfake.evaluation import detection
from counterfake.evaluation.card import METRICS, percent
from counterfake.scoring import Scored
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.evaluate import resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareJob:
    """Two models on one split."""

    first: str = ""  # "name@alias", "name/3", "name", or a bundle folder
    second: str = ""
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(split="test")
    )  # uri, split, where count
    threshold: float = 0.5  # probability from which a picture counts as called fake
    bootstraps: int = 1000  # resamples
    seed: int = 0  # of the resamples
    limit: int = 0  # pictures; 0 = all

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or self.bootstraps < 0 or self.limit < 0:
            raise ConfigError("threshold lies between 0 and 1; bootstraps and limit are at least 0")


PRESETS: dict[str, Callable[[], CompareJob]] = {"models": CompareJob}


def run(job: CompareJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """{"first", "second", "dataset", "n", "metrics": {name: {"first", "second", "difference", "p"}}, "video": the same or None}."""
    console = console or Console(quiet=True)
    loaded = {name: predictor.load(resolve(getattr(job, name), workspace)) for name in ("first", "second")}
    uri = workspace.dataset(job.data.uri) if job.data.uri else ""
    with console.progress("scoring", job.limit or None) as advance:
        scored = scoring.score(
            loaded, dataclasses.replace(job.data, uri=uri), attributes=(), limit=job.limit, cache=workspace.cache,
            progress=advance,
        )  # fmt: skip
    rows = scored.answered()
    settings: dict[str, Any] = {"threshold": job.threshold, "bootstraps": job.bootstraps, "seed": job.seed}
    pair = (rows.probabilities["first"], rows.probabilities["second"])
    models = {n: {"model": getattr(job, n), "digest": p.bundle.digest} for n, p in loaded.items()}
    return {
        **models, "dataset": rows.uri, "split": job.data.split, "n": len(rows.ids), "refused": rows.refused,
        "metrics": detection.paired(rows.fake, *pair, clusters=rows.clusters, **settings),
        "video": _by_video(rows, settings),
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table: metric, first, second, difference with its interval, p."""
    films = found["video"] or {}
    listed = [(title, found["metrics"][name]) for name, title in METRICS.items()]
    listed += [(f"by video: {title}", films[name]) for name, title in METRICS.items() if name in films]
    return [
        (
            title,
            *(_figure(row[side]) for side in ("first", "second")),
            percent(row["difference"]),
            _figure(row["p"]),
        )
        for title, row in listed
    ]


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """What a person reads of it."""
    return {"dataset": found["dataset"], "n": found["n"]} | {
        title: f"{first} - {second} = {difference}, p {p}"
        for title, first, second, difference, p in lines(found)
    }


# -- private --------------------------------------------------------------------------------------------------------


def _by_video(rows: Scored, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The same with one score per video; None where rows are no frames of videos of both classes."""
    frames = np.flatnonzero([bool(video) for video in rows.videos])
    if len(np.unique(rows.fake[frames])) < 2:
        return None
    names, clusters = [rows.videos[i] for i in frames], rows.clusters
    films = [
        detection.by_video(names, rows.fake[frames], rows.probabilities[side][frames])
        for side in ("first", "second")
    ]
    of = dict(zip(names, (clusters[i] for i in frames), strict=True))
    return detection.paired(
        films[0].fake,
        films[0].probability,
        films[1].probability,
        clusters=[of[n] for n in films[0].names],
        **settings,
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
