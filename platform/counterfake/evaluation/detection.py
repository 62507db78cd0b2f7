"""Figures of a detector: labels and probabilities in, a JSON-able dict of values with 95 % intervals out.

Everything is computed from a matrix of row weights (B, N): one row of ones gives the values, B rows of cluster counts give
the bootstrap, so value and interval come from the same lines. Rows of one identity or one video are not independent:
clusters, not rows, are drawn (https://doi.org/10.1214/aos/1176344552; for clusters Field and Welsh 2007).
Rows are put into one order first, so that the same rows give the same bits however they were shared out and merged.
Legend: B resamples, N rows, U distinct scores in descending order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterfake.errors import DataError

Floats = NDArray[np.float64]
CURVE = ("auc", "average_precision", "eer", "tpr_at_fpr_1pct", "tpr_at_fpr_0_1pct")
METRICS = (*CURVE, "accuracy", "recall_real", "recall_fake", "ece", "brier")
WORDS = ("real", "fake", "uncertain", "out_of_domain")  # verdicts
Strategy = Literal["mean_logit", "confident"]
CLIP = 1e-4  # a forest says exactly 0 or 1; one such frame must not outvote a whole video
BINS = 15  # of the expected calibration error
MIN_GROUP = 10  # rows; smaller groups are shown but do not count as the worst group
_KEPT = 1 << 24  # cluster counts kept for the next group; more are drawn again
_CELLS = 1 << 18  # weights handled at once: a chunk of resamples that stays in the cache


def evaluate(
    fake: ArrayLike,
    probability: ArrayLike,
    *,
    threshold: float = 0.5,
    groups: Mapping[str, Sequence[str]] | None = None,
    clusters: Sequence[str] | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every figure of METRICS as {"value", "low", "high"}, counts, the majority class's accuracy, and tables per group.

    fake (N,) in {0, 1}; probability (N,) of being fake; groups {"maker": N names}; clusters N names (identity or video).
    A group with one class only is compared with all rows of the other class and has only its own class's recall.
    Raises DataError if a class is missing, or a probability is not finite or outside [0, 1].
    """
    y, p = _checked(fake, probability)
    order = _one_order(y, (p,), clusters, groups)
    y, p, clusters = y[order], p[order], _taken(clusters, order)
    drawn = _Resamples(clusters, len(y), bootstraps, seed)
    result = _figures(y, p, np.arange(len(y)), METRICS, threshold, drawn)
    result |= {
        "n": len(y), "n_real": int((y == 0).sum()), "n_fake": int(y.sum()), "n_clusters": drawn.clusters,
        "majority": float(max(y.mean(), 1 - y.mean())), "threshold": threshold, "bootstraps": bootstraps,
        "groups": {}, "worst_group": None,
    }  # fmt: skip
    for name, values in (groups or {}).items():
        result["groups"][name] = _group_table(y, p, [values[i] for i in order], threshold, drawn)
    result["worst_group"] = _worst(result["groups"])
    return result


def paired(
    fake: ArrayLike, first: ArrayLike, second: ArrayLike, *, metrics: Sequence[str] = METRICS, threshold: float = 0.5,
    clusters: Sequence[str] | None = None, bootstraps: int = 1000, seed: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Two scores of the same N rows -> per metric {"first", "second", "difference": {value, low, high}, "p"}.

    difference = first - second over the same resamples of clusters; an interval without 0 is a difference that holds.
    p: two-sided, (1 + the rarer sign among the B differences) * 2 / (B + 1), zeros counted on both sides (Davison and
    Hinkley 1997, section 4.4); None without resamples.
    """
    (y, a), (_, b) = _checked(fake, first), _checked(fake, second)
    order = _one_order(y, (a, b), clusters, None)
    y, a, b = y[order], a[order], b[order]
    drawn = _Resamples(_taken(clusters, order), len(y), bootstraps, seed)
    found = [_all(y, p, np.arange(len(y)), metrics, threshold, drawn) for p in (a, b)]
    return {name: _compared(found[0][name], found[1][name]) for name in metrics}


def paired_difference(
    fake: ArrayLike, first: ArrayLike, second: ArrayLike, *, metric: str = "auc", threshold: float = 0.5,
    clusters: Sequence[str] | None = None, bootstraps: int = 1000, seed: int = 0,
) -> dict[str, float | None]:  # fmt: skip
    """metric(first) - metric(second) with its interval: one line of `paired`."""
    found = paired(
        fake, first, second, metrics=(metric,), threshold=threshold, clusters=clusters, bootstraps=bootstraps, seed=seed
    )  # fmt: skip
    difference: dict[str, float | None] = found[metric]["difference"]
    return difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Videos:
    """One row per video, by name. `empty`: videos of which no frame has a probability; they have no row."""

    names: list[str]
    fake: NDArray[np.int64]  # (V,)
    probability: Floats  # (V,)
    frames: NDArray[np.int64]  # (V,) that have a probability
    empty: list[str]


def by_video(
    videos: Sequence[str], fake: ArrayLike, probability: ArrayLike, strategy: Strategy = "mean_logit"
) -> Videos:
    """Frames of videos (N names, labels, probabilities; NaN = no answer) -> one probability for each video.

    mean_logit: sigmoid of the mean logit, probabilities clipped to [CLIP, 1 - CLIP]; confident: see `confident`.
    Raises DataError for a video with frames of both labels, or if no frame of any video has a probability.
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(fake)
    names, index = np.unique(np.asarray(videos, dtype=str), return_inverse=True)
    rows = [np.flatnonzero(index == i) for i in range(len(names))]
    if mixed := [str(n) for n, inside in zip(names, rows, strict=True) if len(np.unique(y[inside])) > 1]:
        raise DataError(f"video {mixed[0]} has real and fake frames; key videos by dataset, method and video")
    seen = [inside[np.isfinite(p[inside])] for inside in rows]
    kept = [i for i, inside in enumerate(seen) if len(inside)]
    if not kept:
        raise DataError(
            f"none of {len(names)} videos has a frame that could be judged; look at the reasons in `refused`"
        )
    join = _mean_logit if strategy == "mean_logit" else confident
    return Videos(
        names=[str(names[i]) for i in kept],
        fake=np.array([y[seen[i][0]] for i in kept], np.int64),
        probability=np.array([join(np.sort(p[seen[i]])) for i in kept]),
        frames=np.array([len(seen[i]) for i in kept], np.int64),
        empty=[str(names[i]) for i, inside in enumerate(seen) if not len(inside)],
    )


def confident(p: Floats) -> float:
    """Probabilities of the frames of one video (T,) -> one, after the winner of the DFDC challenge (kernel_utils.py of
    https://github.com/selimsef/dfdc_deepfake_challenge): where more than 11 frames and more than T // 2.5 are above 0.8, the mean
    of those; where more than 90 % are below 0.2, the mean of those; else the mean."""
    fakes, reals = p[p > 0.8], p[p < 0.2]
    if len(fakes) > len(p) // 2.5 and len(fakes) > 11:
        return float(fakes.mean())
    return float(reals.mean() if len(reals) > 0.9 * len(p) else p.mean())


def roc(fake: ArrayLike, score: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """(fpr, tpr, thresholds), from (0, 0) at +inf to (1, 1); one point per distinct score."""
    y, s = _checked(fake, score, probability=False)
    order, ends = _ties(s)
    tps, fps = np.cumsum(y[order])[ends], np.cumsum(1 - y[order])[ends]
    start = np.zeros(1)
    return (
        np.concatenate([start, fps / fps[-1]]),
        np.concatenate([start, tps / tps[-1]]),
        np.concatenate([start + np.inf, s[order][ends]]),
    )


def det(fake: ArrayLike, score: ArrayLike) -> tuple[Floats, Floats]:
    """(false positive rate, miss rate): the points of `roc` as error against error (Martin et al. 1997)."""
    fpr, tpr, _ = roc(fake, score)
    return fpr, 1 - tpr


def histogram(
    fake: ArrayLike, probability: ArrayLike, bins: int = 30, least: int = 1
) -> dict[str, NDArray[np.int64]]:
    """{"real", "fake"}: rows in each of `bins` equal parts of [0, 1]; a bin of a class with fewer than `least` shows 0."""
    y, p = _checked(fake, probability)
    index = _bins(p, bins)
    counts = {
        name: np.bincount(index[y == label], minlength=bins) for label, name in ((0, "real"), (1, "fake"))
    }
    return {name: np.where(count < least, 0, count) for name, count in counts.items()}


def reliability(
    fake: ArrayLike, probability: ArrayLike, bins: int = BINS, least: int = 1
) -> dict[str, list[float]]:
    """Per bin of at least `least` rows: mean probability, share of fakes, number of rows. What the reliability plot shows."""
    y, p = _checked(fake, probability)
    index = _bins(p, bins)
    count = np.bincount(index, minlength=bins)
    full = count >= max(1, least)
    mean, share = (np.bincount(index, weights=v, minlength=bins)[full] / count[full] for v in (p, y))
    return {"probability": mean.tolist(), "share": share.tolist(), "count": count[full].tolist()}


def confusion(fake: ArrayLike, probability: ArrayLike, threshold: float = 0.5) -> list[list[int]]:
    """[[real called real, real called fake], [fake called real, fake called fake]]."""
    y, p = _checked(fake, probability)
    return np.bincount(2 * y.astype(int) + (p >= threshold), minlength=4).reshape(2, 2).tolist()


def verdicts(words: Sequence[str], fake: ArrayLike) -> dict[str, dict[str, Any]]:
    """{"real", "fake"}: of each class the share of every verdict, its rows `n`, and `lost`: the share whose true label the
    conformal set excluded. words (N,) in WORDS. Row real: `fake` = falsely accused; row fake: `real` = missed."""
    found, y = np.asarray(words, dtype=str), np.asarray(fake)
    if len(found) != len(y) or not set(found.tolist()) <= set(WORDS):
        raise DataError(f"{len(y)} labels need as many verdicts of {', '.join(WORDS)}, got {len(found)}")
    table: dict[str, dict[str, Any]] = {}
    for label, name in ((0, "real"), (1, "fake")):
        inside = found[y == label]
        shares = {word: float(np.mean(inside == word)) if len(inside) else 0.0 for word in WORDS}
        lost = 1 - shares[name] - shares["uncertain"] if len(inside) else 0.0
        table[name] = {**shares, "n": len(inside), "lost": lost}
    return table


# -- private --------------------------------------------------------------------------------------------------------


def _checked(fake: ArrayLike, score: ArrayLike, *, probability: bool = True) -> tuple[Floats, Floats]:
    y, p = np.asarray(fake, dtype=np.float64).ravel(), np.asarray(score, dtype=np.float64).ravel()
    if len(y) != len(p):
        raise DataError(f"{len(y)} labels but {len(p)} scores; give one score per row")
    if not np.isin(y, (0, 1)).all():
        raise DataError("labels must be 0 (real) or 1 (fake); leave rows of unknown label out")
    n_fake = int(y.sum())
    if n_fake in (0, len(y)):
        missing = "real" if n_fake else "fake"
        raise DataError(f"no {missing} row among {len(y)}; a detector is judged on both classes")
    if not np.isfinite(p).all() or (probability and ((p < 0) | (p > 1)).any()):
        raise DataError("scores must be finite, and probabilities within [0, 1]")
    return y, p


def _one_order(
    y: Floats, scores: Sequence[Floats], clusters: Sequence[str] | None, groups: Mapping[str, Sequence[str]] | None
) -> NDArray[np.int64]:  # fmt: skip
    """(N,) an order of the rows that depends on what they are and not on how they came."""
    names = [*(groups or {}).values(), *([clusters] if clusters is not None else [])]
    if wrong := [len(values) for values in names if len(values) != len(y)]:
        raise DataError(f"{len(y)} rows but {wrong[0]} group or cluster names; give one per row")
    codes = [np.unique(np.asarray(values, dtype=str), return_inverse=True)[1] for values in names]
    return np.asarray(np.lexsort((*codes, y, *(-score for score in reversed(scores)))))


def _taken(names: Sequence[str] | None, order: NDArray[np.int64]) -> Sequence[str] | None:
    return None if names is None else [names[i] for i in order]


def _compared(first: Floats, second: Floats) -> dict[str, Any]:
    apart = first - second
    drawn = apart[1:][np.isfinite(apart[1:])]
    rarer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    values = [float(v[0]) if np.isfinite(v[0]) else None for v in (first, second)]
    p = min(1.0, 2 * (1 + rarer) / (len(drawn) + 1)) if len(drawn) else None
    return {"first": values[0], "second": values[1], "difference": _interval(apart), "p": p}


def _mean_logit(p: Floats) -> float:
    clipped = np.clip(p, CLIP, 1 - CLIP)
    mean = float(np.mean(np.log(clipped) - np.log1p(-clipped)))
    return float(0.5 * (1 + np.tanh(0.5 * mean)))


class _Resamples:
    """Row weights of the bootstrap: first one row of ones, then how often each row's cluster was drawn."""

    def __init__(self, clusters: Sequence[str] | None, rows: int, bootstraps: int, seed: int) -> None:
        if clusters is not None and len(clusters) != rows:
            raise DataError(f"{rows} rows but {len(clusters)} cluster names; give one per row")
        names = (
            np.arange(rows) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
        )
        self.index, self.clusters, self.seed = names, int(names.max()) + 1, seed
        self.bootstraps = (
            bootstraps if self.clusters > 1 else 0
        )  # resamples of one cluster are all alike, which would look certain
        bootstraps = self.bootstraps
        self._kept = self._draw(0, bootstraps) if bootstraps * self.clusters <= _KEPT else None

    def counts(self, start: int, stop: int) -> NDArray[np.uint16]:
        """How often each cluster is in resamples start to stop: (stop - start, clusters). The same at every call."""
        return self._draw(start, stop) if self._kept is None else self._kept[start:stop]

    def chunks(self, rows: NDArray[np.int64]) -> Iterator[Floats]:
        """Weights (b, len(rows)), as many resamples at a time as stay in the cache."""
        size, index = max(1, _CELLS // max(1, len(rows))), self.index[rows]
        yield np.ones((1, len(rows)))
        for start in range(0, self.bootstraps, size):
            yield self.counts(start, min(start + size, self.bootstraps))[:, index].astype(np.float64)

    def _draw(self, start: int, stop: int) -> NDArray[np.uint16]:
        counts = np.empty((stop - start, self.clusters), np.uint16)
        for row, number in enumerate(range(start, stop)):
            drawn = np.random.default_rng((self.seed, number)).integers(self.clusters, size=self.clusters)
            counts[row] = np.bincount(drawn, minlength=self.clusters)
        return counts


def _figures(
    y: Floats, p: Floats, rows: NDArray[np.int64], metrics: Sequence[str], threshold: float, drawn: _Resamples
) -> dict[str, Any]:
    return {name: _interval(values) for name, values in _all(y, p, rows, metrics, threshold, drawn).items()}


def _all(
    y: Floats, p: Floats, rows: NDArray[np.int64], metrics: Sequence[str], threshold: float, drawn: _Resamples
) -> dict[str, Floats]:
    """Each metric (1 + B,): the value, then its resamples. rows are sorted by descending score once."""
    order, ends = _ties(p[rows])
    rows = rows[order]
    plan = _Plan(y[rows], p[rows], ends, metrics, threshold)
    parts = [plan.metrics(weights) for weights in drawn.chunks(rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in metrics}


class _Plan:
    """What does not depend on the weights: sorted labels and scores, tie ends, and one column per weighted sum."""

    def __init__(
        self, y: Floats, p: Floats, ends: NDArray[np.int64], metrics: Sequence[str], threshold: float
    ) -> None:
        self.y, self.ends, self.names = y, ends, tuple(metrics)
        self.starts = np.concatenate([[0], ends[:-1] + 1])
        called = p >= threshold
        columns = [y, 1 - y, y * called, (1 - y) * ~called, np.square(p - y)]
        gap = np.zeros((len(y), BINS))
        gap[np.arange(len(y)), _bins(p, BINS)] = y - p
        self.columns = np.concatenate([np.stack(columns, axis=1), gap], axis=1)

    def metrics(self, weights: Floats) -> dict[str, Floats]:
        """weights (b, N) in the order of the scores -> each metric (b,); NaN where a resample lacks a class."""
        with np.errstate(divide="ignore", invalid="ignore"):
            n_fake, n_real, hits, passes, squares, *gaps = (weights @ self.columns).T
            total = n_fake + n_real
            found = {
                "recall_fake": hits / n_fake, "recall_real": passes / n_real, "accuracy": (hits + passes) / total,
                "brier": squares / total, "ece": np.abs(gaps).sum(axis=0) / total,
            }  # fmt: skip
            if set(CURVE) & set(self.names):
                found |= self._curve(weights, n_fake[:, None], n_real[:, None])
        return {name: found[name] for name in self.names}

    def _curve(self, weights: Floats, n_fake: Floats, n_real: Floats) -> dict[str, Floats]:
        fakes = np.add.reduceat(weights * self.y, self.starts, axis=1)  # (b, U)
        reals = np.add.reduceat(weights, self.starts, axis=1) - fakes
        tps, fps = np.cumsum(fakes, axis=1), np.cumsum(reals, axis=1)
        empty = ((n_fake == 0) | (n_real == 0))[:, 0]
        tpr, fpr = tps / n_fake, fps / n_real
        seen = np.maximum(tps + fps, 1e-300)  # leading scores of weight 0 add 0 recall
        curve = {
            # fakes above each real, half for ties: Mann-Whitney
            "auc": (reals * (tps - fakes / 2)).sum(axis=1) / (n_fake * n_real)[:, 0],
            "average_precision": (fakes * tps / seen).sum(axis=1) / n_fake[:, 0],
            "eer": _equal_error(fpr, 1 - tpr),
            "tpr_at_fpr_1pct": np.where(fpr <= 0.01, tpr, 0).max(axis=1),
            "tpr_at_fpr_0_1pct": np.where(fpr <= 0.001, tpr, 0).max(axis=1),
        }
        return {name: np.where(empty, np.nan, values) for name, values in curve.items()}


def _equal_error(fpr: Floats, fnr: Floats) -> Floats:
    """Where FPR = FNR, by linear interpolation between the two ROC points around it. Curves (b, U)."""
    start = np.zeros((len(fpr), 1))
    fpr, fnr = np.concatenate([start, fpr], axis=1), np.concatenate([start + 1, fnr], axis=1)
    after = np.argmax(fpr >= fnr, axis=1)[
        :, None
    ]  # the last point is (1, 0), so there is one; the first is (0, 1)
    before = np.maximum(after - 1, 0)
    (f0, f1), (m0, m1) = (
        [np.take_along_axis(c, i, axis=1)[:, 0] for i in (before, after)] for c in (fpr, fnr)
    )
    share = (m0 - f0) / ((m0 - f0) + (f1 - m1))
    return f0 + share * (f1 - f0)


def _ties(score: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order of descending score, and the last position of every run of equal scores in it."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    return order, last


def _bins(p: Floats, bins: int) -> NDArray[np.int64]:
    return np.minimum((p * bins).astype(np.int64), bins - 1)


def _interval(values: Floats) -> dict[str, float | None]:
    value, drawn = values[0], values[1:][np.isfinite(values[1:])]
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if not len(drawn):  # no resamples: no interval, rather than one of no width
        return {"value": float(value), "low": None, "high": None}
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def _group_table(
    y: Floats, p: Floats, names: Sequence[str], threshold: float, drawn: _Resamples
) -> dict[str, dict[str, Any]]:
    labels = np.asarray([str(name) for name in names])
    if len(labels) != len(y):
        raise DataError(f"{len(y)} rows but {len(labels)} group names; give one per row")
    return {name: _group(y, p, labels == name, threshold, drawn) for name in np.unique(labels).tolist()}


def _group(
    y: Floats, p: Floats, inside: NDArray[np.bool_], threshold: float, drawn: _Resamples
) -> dict[str, Any]:
    n, n_fake = int(inside.sum()), int(y[inside].sum())
    if 0 < n_fake < n:
        rows, metrics = inside, ["auc", "accuracy", "recall_real", "recall_fake"]
    else:
        rows, metrics = inside | (y == (n_fake == 0)), ["auc", "recall_fake" if n_fake else "recall_real"]
    figures = _figures(y, p, np.flatnonzero(rows), metrics, threshold, drawn)
    against = None if 0 < n_fake < n else ("all real" if n_fake else "all fake")
    return {"n": n, "n_fake": n_fake, "against": against, **figures}


def _worst(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    rows = [
        {"group": group, "name": name, "n": row["n"], "auc": row["auc"]}
        for group, members in groups.items()
        for name, row in members.items()
        if row["n"] >= MIN_GROUP and row["auc"]["value"] is not None
    ]
    return min(rows, key=lambda row: row["auc"]["value"], default=None)
