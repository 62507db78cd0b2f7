"""Stored pictures through detectors: probabilities beside labels, groups and clusters. What evaluation and calibration read.

Pictures are decoded once however many detectors look at them, by the decoder that serving uses. A picture that a detector
cannot answer stays NaN and is counted by reason; it is never replaced by a number. Shards scored apart are `merged` and
give the same figures, bit for bit.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from counterfake import locks
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection
from counterfake.evaluation.robustness import CLEAN, Cell
from counterfake.faces import Face
from counterfake.grouping import Links
from counterfake.images import Finder
from counterfake.predictor import Decoded, Predictor
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
    keys: list[tuple[str, ...]]  # identity and video of each row: rows with a common key are not independent
    videos: list[str]  # source/maker/video; "" = a picture that is no frame
    probabilities: dict[str, NDArray[np.float64]]  # by detector, (N,); NaN = could not answer
    refused: dict[str, dict[str, int]]  # by detector, reason -> pictures
    images_per_second: float

    @property
    def clusters(self) -> list[str]:
        """N names; rows linked by identity or video, directly or through others, share one."""
        names = [min(keys, default=key) for keys, key in zip(self.keys, self.ids, strict=True)]
        group = Links(self.keys, [""] * len(self.keys)).groups(near_bits=-1)
        first: dict[int, str] = {}
        for name, number in zip(names, group.tolist(), strict=True):  # whatever the order of the rows
            first[number] = min(name, first.get(number, name))
        return [first[number] for number in group.tolist()]

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """What several workers scored as if one had. DataError if a row comes twice, or versions or detectors differ."""
        first = parts[0]
        if len({(part.uri, part.version.digest, *part.probabilities) for part in parts}) > 1:
            raise DataError(
                "scores of other versions or other detectors cannot be merged; score all parts alike"
            )
        ids = [key for part in parts for key in part.ids]
        if len(set(ids)) < len(ids):
            raise DataError(
                f"{len(ids) - len(set(ids))} rows were scored twice; give each part rows of its own"
            )
        return dataclasses.replace(
            first,
            ids=ids,
            fake=np.concatenate([part.fake for part in parts]),
            groups={name: [v for part in parts for v in part.groups[name]] for name in first.groups},
            keys=[keys for part in parts for keys in part.keys],
            videos=[video for part in parts for video in part.videos],
            probabilities={n: np.concatenate([p.probabilities[n] for p in parts]) for n in first.probabilities},
            refused={n: dict(sum((collections.Counter(p.refused[n]) for p in parts), collections.Counter()))
                     for n in first.refused},
            images_per_second=sum(part.images_per_second for part in parts),
        )  # fmt: skip

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
            keys=[self.keys[i] for i in index],
            videos=[self.videos[i] for i in index],
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
        self,
        probability: NDArray[np.float64],
        *,
        threshold: float,
        bootstraps: int,
        seed: int,
        strategy: detection.Strategy = "mean_logit",
    ) -> dict[str, Any]:
        """`detection.evaluate` of any probability (N,) over these rows, with the data set's name in it.

        "video": the same with one probability per video (`strategy`); None where rows are no frames of videos of both classes.
        """
        settings: dict[str, Any] = {"threshold": threshold, "bootstraps": bootstraps, "seed": seed}
        found = detection.evaluate(
            self.fake, probability, groups=self._dividing(), clusters=self.clusters, **settings
        )
        dataset = {"uri": self.uri, "version": self.version.number, "digest": self.version.digest}
        film = self._by_video(probability, strategy, settings)
        return {**found, "video": film, "dataset": dataset, "refused": self.refused}

    def _dividing(self) -> dict[str, list[str]]:
        """Without the groups that do not divide the rows."""
        return {name: values for name, values in self.groups.items() if len(set(values)) > 1}

    def _by_video(
        self, probability: NDArray[np.float64], strategy: detection.Strategy, settings: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        frames = np.flatnonzero([bool(video) for video in self.videos])
        if len(np.unique(self.fake[frames])) < 2:
            return None
        names = [self.videos[i] for i in frames]
        films = detection.by_video(names, self.fake[frames], probability[frames], strategy)
        clusters = self.clusters
        cluster = dict(zip(names, (clusters[i] for i in frames), strict=True))
        found = detection.evaluate(
            films.fake, films.probability, clusters=[cluster[name] for name in films.names], **settings
        )
        return {**found, "strategy": strategy, "frames": int(films.frames.sum())}


def score(
    predictors: Mapping[str, Predictor],
    data: DataConfig,
    *,
    attributes: Sequence[str] = ("difficulty",),
    limit: int = 0,
    cell: Cell = CLEAN,
    seed: int = 0,
    look: bool = False,
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """Every labelled row of data.split that data.where allows (at most `limit`, 0 = all) through every predictor.

    data's uri, split, where and threads count; order, batches and preprocessing do not: a predictor brings its own.
    cell: what is done to every picture first, with `seed`. look: the caller has recorded a look at a locked split and keeps
    its rows to itself; without it a locked split is refused. Raises DataError, ConfigError.
    """
    dataset, version = opened(data, cache)
    if not look:
        locks.refuse(dataset, version, [data.split], "scored row by row")
    rows = _Rows(attributes, predictors)
    finders = tuple(dict.fromkeys(f for p in predictors.values() for f in getattr(p, "finders", ())))
    eyes = any(getattr(predictor, "finds_eyes", False) for predictor in predictors.values())
    started = time.perf_counter()
    with ThreadPoolExecutor(data.threads) as pool:
        for chunk in _chunks(labelled(dataset, version, data), limit):
            rows.add(chunk, list(pool.map(lambda sample: decoded(sample, finders, cell, seed, eyes), chunk)))
            if progress:
                progress(len(chunk))
    if not rows.ids:
        raise DataError(
            f"{data.uri} split {data.split} has no labelled rows{' that fit data.where' if data.where else ''}"
        )
    seconds = time.perf_counter() - started
    return rows.scored(version, f"{data.uri.partition('@')[0]}@{version.number}", seconds)


def opened(data: DataConfig, cache: Path | None) -> tuple[Dataset, Version]:
    """The dataset and version that data.uri names. Raises ConfigError if it names none, NotFoundError."""
    if not data.uri:
        raise ConfigError("data.uri is not set; name a dataset, like --set data.uri=faces@3")
    dataset = Dataset.open(data.uri, cache=cache)
    return dataset, dataset.version()


def labelled(dataset: Dataset, version: Version, data: DataConfig) -> Iterator[Sample]:
    """The samples of a split that have a label and fit data.where, in stored order."""
    for sample in dataset.samples(version, data.split):
        if sample.fake is not None and all(
            fits(getattr(sample, key), value) for key, value in data.where.items()
        ):
            yield sample


def decoded(
    sample: Sample, finders: Sequence[Finder] = (), cell: Cell = CLEAN, seed: int = 0, eyes: bool = False
) -> Decoded:
    """The sample as a detector reads it, damaged by `cell`. A face (and its eyes) is searched only where none was recorded and
    one is needed."""
    picture = Decoded.of(sample)
    if cell != CLEAN:
        picture = _damaged(picture, cell, (seed, sample.id))
    return picture if picture.faces else picture.searched(finders, eyes)


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
    """What is known of the rows seen so far, and what each predictor said of them."""

    def __init__(self, attributes: Sequence[str], predictors: Mapping[str, Predictor]) -> None:
        self.predictors = predictors
        self.ids: list[str] = []
        self._fake: list[int] = []
        self._keys: list[tuple[str, ...]] = []
        self._videos: list[str] = []
        self._groups: dict[str, list[str]] = {name: [] for name in ("maker", "source", *attributes)}
        self._parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in predictors}
        self._refused: dict[str, collections.Counter[str]] = {n: collections.Counter() for n in predictors}

    def add(self, samples: Sequence[Sample], pictures: Sequence[Decoded]) -> None:
        """Some more rows and their pictures, through every predictor."""
        for sample in samples:
            assert sample.fake is not None
            self.ids.append(sample.id)
            self._fake.append(sample.fake)
            self._videos.append(f"{sample.source}/{sample.maker}/{sample.video}" if sample.video else "")
            known = {"identity": sample.identity, "video": sample.video}
            self._keys.append(tuple(f"{name}:{value}" for name, value in known.items() if value is not None))
            for name, values in self._groups.items():
                found = getattr(sample, name) if name in ("maker", "source") else sample.attributes.get(name)
                values.append("unknown" if found is None else str(found))
        for name, predictor in self.predictors.items():
            self._parts[name].append(predictor.predict(pictures))
            self._refused[name].update(why for p in pictures if (why := predictor.refusal(p)))

    def scored(self, version: Version, uri: str, seconds: float) -> Scored:
        return Scored(
            version=version,
            uri=uri,
            ids=self.ids,
            fake=np.array(self._fake),
            groups=self._groups,
            keys=self._keys,
            videos=self._videos,
            probabilities={name: np.concatenate(parts) for name, parts in self._parts.items()},
            refused={name: dict(count) for name, count in self._refused.items()},
            images_per_second=len(self.ids) / seconds,
        )


def _damaged(picture: Decoded, cell: Cell, seed: tuple[int, str]) -> Decoded:
    """The picture through the cell; boxes of faces follow where its size changes."""
    pixels = cell.apply(picture.pixels, seed)
    down, across = pixels.shape[0] / picture.pixels.shape[0], pixels.shape[1] / picture.pixels.shape[1]
    faces = picture.faces
    if faces and (down, across) != (1.0, 1.0):
        faces = tuple(_scaled(face, across, down) for face in faces)
    return dataclasses.replace(picture, pixels=pixels, faces=faces)


def _scaled(face: Face, across: float, down: float) -> Face:
    x, y, width, height = face.box
    points = [(px * across, py * down) for px, py in face.landmarks] if face.landmarks else face.landmarks
    return dataclasses.replace(
        face, box=(x * across, y * down, width * across, height * down), landmarks=points
    )


def _chunks(samples: Iterable[Sample], limit: int) -> Iterator[list[Sample]]:
    rows = itertools.islice(samples, limit or None)
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk
