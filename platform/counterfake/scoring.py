"""Stored pictures through detectors: probabilities beside labels, groups and clusters. What evaluation and calibration read.

Pictures are decoded once however many detectors look at them, by the decoder that serving uses. A picture that a detector
cannot answer stays NaN and is counted by reason; it is never replaced by a number.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection
from counterfake.predictor import Decoded, Predictor, find_faces
from counterfake.records import Dataset
from counterfake.samples import Sample
from counterfake.versions import Version, fits

CHUNK = 64  # pictures decoded and answered at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """N labelled pictures and what each detector said of them."""

    version: Version
    uri: str  # of the dataset, with @version
    ids: list[str]
    fake: NDArray[np.int64]  # (N,) in {0, 1}
    groups: dict[str, list[str]]  # "maker", "source" and every attribute asked for: N names each
    clusters: list[str]  # video, else identity, else id: what is not independent shares a name
    probabilities: dict[str, NDArray[np.float64]]  # by detector, (N,); NaN = could not answer
    refused: dict[str, dict[str, int]]  # by detector, reason -> pictures
    images_per_second: float

    def matrix(self, names: Sequence[str] | None = None) -> NDArray[np.float64]:
        """Probabilities (N, M) of these detectors, or all."""
        return np.stack([self.probabilities[name] for name in names or self.probabilities], axis=1)

    def where(self, keep: NDArray[np.bool_]) -> Scored:
        """Only these rows."""
        index = np.flatnonzero(keep)
        return dataclasses.replace(
            self,
            ids=[self.ids[i] for i in index],
            fake=self.fake[index],
            groups={name: [values[i] for i in index] for name, values in self.groups.items()},
            clusters=[self.clusters[i] for i in index],
            probabilities={name: p[index] for name, p in self.probabilities.items()},
        )

    def answered(self) -> Scored:
        """Only the rows that every detector answered. DataError if a class is then missing."""
        rows = self.where(np.asarray(np.isfinite(self.matrix()).all(axis=1)))
        if len(np.unique(rows.fake)) < 2:
            refused = {name: reasons for name, reasons in self.refused.items() if reasons}
            raise DataError(
                f"{self.uri} needs real and fake pictures to be judged on, but of {len(self.fake)} labelled ones "
                f"{len(rows.fake)} could be answered, {int((rows.fake == 0).sum())} real and "
                f"{int((rows.fake == 1).sum())} fake{f'; refused: {refused}' if refused else ''}; "
                "choose another dataset or split"
            )
        return rows

    def evaluate(
        self, probability: NDArray[np.float64], *, threshold: float, bootstraps: int, seed: int
    ) -> dict[str, Any]:
        """`detection.evaluate` of any probability (N,) over these rows, with the data set's name in it."""
        found = detection.evaluate(
            self.fake, probability, threshold=threshold, groups=self.groups, clusters=self.clusters,
            bootstraps=bootstraps, seed=seed,
        )  # fmt: skip
        dataset = {"uri": self.uri, "version": self.version.number, "digest": self.version.digest}
        return {**found, "dataset": dataset, "refused": self.refused}


def score(
    predictors: Mapping[str, Predictor],
    data: DataConfig,
    *,
    attributes: Sequence[str] = ("difficulty",),
    limit: int = 0,
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """Every labelled row of data.split that data.where allows (at most `limit`, 0 = all) through every predictor.

    data's uri, split, where and threads count; order, batches and preprocessing do not: a predictor brings its own.
    """
    if not data.uri:
        raise ConfigError("data.uri is not set; name a dataset, like --set data.uri=faces@3")
    dataset = Dataset.open(data.uri, cache=cache)
    version, rows = dataset.version(), _Rows(attributes)
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in predictors}
    refused: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in predictors}
    faces = any(getattr(predictor, "finds_faces", False) for predictor in predictors.values())
    started = time.perf_counter()
    with ThreadPoolExecutor(data.threads) as pool:
        for chunk in _chunks(labelled(dataset, version, data), limit):
            pictures = list(pool.map(lambda sample: decoded(sample, faces), chunk))
            rows.add(chunk)
            for name, predictor in predictors.items():
                parts[name].append(predictor.predict(pictures))
                refused[name].update(why for p in pictures if (why := predictor.refusal(p)))
            if progress:
                progress(len(chunk))
    if not rows.ids:
        raise DataError(
            f"{data.uri} split {data.split} has no labelled rows{' that fit data.where' if data.where else ''}"
        )
    seconds = time.perf_counter() - started
    return Scored(
        version=version, uri=f"{data.uri.partition('@')[0]}@{version.number}", ids=rows.ids, fake=np.array(rows.fake),
        groups=rows.groups(), clusters=rows.clusters, probabilities={n: np.concatenate(p) for n, p in parts.items()},
        refused={name: dict(count) for name, count in refused.items()}, images_per_second=len(rows.ids) / seconds,
    )  # fmt: skip


def labelled(dataset: Dataset, version: Version, data: DataConfig) -> Iterator[Sample]:
    """The samples of a split that have a label and fit data.where, in stored order."""
    for sample in dataset.samples(version, data.split):
        if sample.fake is not None and all(
            fits(getattr(sample, key), value) for key, value in data.where.items()
        ):
            yield sample


def decoded(sample: Sample, faces: bool = False) -> Decoded:
    """The sample as a detector reads it. A face is searched only where none was recorded and one is needed."""
    picture = Decoded.of(sample)
    return (
        picture
        if picture.faces or not faces
        else dataclasses.replace(picture, faces=find_faces(picture.pixels))
    )


def latency_ms(predictor: Predictor, pictures: Sequence[bytes], repeats: int = 3) -> float:
    """Median milliseconds from bytes to probability of one picture at a time; the first pass does not count."""
    spent = []
    for data in [*pictures, *list(pictures) * repeats]:
        start = time.perf_counter()
        predictor.predict([predictor.decode(data)])
        spent.append(1e3 * (time.perf_counter() - start))
    return float(np.median(spent[len(pictures) :]))


# -- private --------------------------------------------------------------------------------------------------------


class _Rows:
    """Labels and names of the rows seen so far."""

    def __init__(self, attributes: Sequence[str]) -> None:
        self.ids: list[str] = []
        self.fake: list[int] = []
        self.clusters: list[str] = []
        self._groups: dict[str, list[str]] = {name: [] for name in ("maker", "source", *attributes)}

    def add(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            assert sample.fake is not None
            self.ids.append(sample.id)
            self.fake.append(sample.fake)
            self.clusters.append(sample.video or sample.identity or sample.id)
            for name, values in self._groups.items():
                known = getattr(sample, name) if name in ("maker", "source") else sample.attributes.get(name)
                values.append("unknown" if known is None else str(known))

    def groups(self) -> dict[str, list[str]]:
        """Without the groups that do not divide the rows."""
        return {name: values for name, values in self._groups.items() if len(set(values)) > 1}


def _chunks(samples: Iterable[Sample], limit: int) -> Iterator[list[Sample]]:
    rows = itertools.islice(samples, limit or None)
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk
