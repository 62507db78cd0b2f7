"""How close made pictures are to real ones, from their features: pure functions in float64, and the protocol they hold for.

Features (N, D) come from `counterfake.extractor`. Every figure depends on the extractor, the resizing, the reference rows
and the number of samples: `Protocol` names them all, a report carries its protocol, and `compare` refuses two that differ.
Letters: N rows, D features, K classes, k neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterfake import config
from counterfake.errors import ConfigError, DataError

Floats = NDArray[np.float64]

CHUNK = 1024  # rows whose distances to all others are held at a time
FLOOR_QUANTILE = (
    0.01  # of held-out pictures' distances to the training set: nearer than that is called memorised
)
RESIZE = "bicubic, antialiased, rounded to uint8"  # Parmar et al. 2022, https://arxiv.org/abs/2104.11222


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything a figure depends on besides the generator. Two figures may be compared if these are equal."""

    extractor: str  # name
    extractor_sha256: str  # of its weights
    features: int  # D
    size: int  # side of the pictures the extractor reads, pixels
    resize: str = RESIZE
    dataset_digest: str  # of the reference dataset version
    split: str  # of the reference
    rows_sha256: str  # of the sorted ids of the reference rows
    rows: int  # of the reference
    samples: int  # made pictures
    neighbours: int  # pictures of each side that precision, recall, density, coverage look at
    seed: int  # of noise and subsets

    @property
    def digest(self) -> str:
        return config.digest(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """Figures of one generator with the protocol they were taken under. `context` is for people: names, places."""

    protocol: Protocol
    figures: dict[str, Any]
    context: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"protocol": {**config.to_dict(self.protocol), "digest": self.protocol.digest},
                "figures": self.figures, "context": self.context}  # fmt: skip

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> GenerationReport:
        """The inverse of `to_dict`. Raises ConfigError for something else."""
        try:
            facts = {key: value for key, value in tree["protocol"].items() if key != "digest"}
            return cls(
                protocol=config.from_dict(Protocol, facts),
                figures=dict(tree["figures"]),
                context=dict(tree.get("context", {})),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"this is no report of a generator: {error} is missing") from error


def compare(ours: GenerationReport, theirs: GenerationReport) -> dict[str, dict[str, float]]:
    """{metric: {"ours", "theirs", "ratio"}} of what both have; no ratio to a figure that is not above 0.

    Raises ConfigError where the protocols differ."""
    a, b = config.to_dict(ours.protocol), config.to_dict(theirs.protocol)
    if different := [name for name in a if a[name] != b[name]]:
        said = ", ".join(f"{name} ({a[name]} against {b[name]})" for name in different)
        raise ConfigError(
            f"the reports cannot be compared, they differ in {said}; judge both generators alike"
        )
    values = {
        name: (scalar(ours.figures.get(name)), scalar(theirs.figures.get(name))) for name in ours.figures
    }
    return {
        name: {"ours": x, "theirs": y, "ratio": x / y if y > 0 else float("nan")}
        for name, (x, y) in values.items()
        if x is not None and y is not None
    }


def scalar(figure: Any) -> float | None:
    """The number of a figure, which may carry its spread: {"value": 1.0, "std": 0.1}."""
    value = figure.get("value") if isinstance(figure, Mapping) else figure
    return float(value) if isinstance(value, int | float) else None


# -- Fréchet distance -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of n rows."""

    n: int
    mean: Floats
    covariance: Floats


def moments(features: ArrayLike) -> Moments:
    """Of features (N, D), N >= 2; computed around the mean, so that a large offset costs no digits."""
    rows = _rows(features, least=2)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Moments(len(rows), mean, centred.T @ centred / (len(rows) - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """FID: |m_a - m_b|² + tr(A + B - 2 (A B)^½). Heusel et al. 2017, https://arxiv.org/abs/1706.08500, eq. 6.

    tr (A B)^½ is the sum of the square roots of the eigenvalues of A^½ B A^½, which is symmetric and has no negative ones:
    nothing becomes complex where a covariance is singular, as with fewer rows than features."""
    if a.mean.shape != b.mean.shape:
        raise DataError(f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared")
    root = _square_root(a.covariance)
    eigenvalues = np.linalg.eigvalsh(_symmetric(root @ b.covariance @ root))
    shared = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return float(max(0.0, np.square(a.mean - b.mean).sum() + spread))


# -- kernel distance, inception score -------------------------------------------------------------------------------


def kernel_distance(
    real: ArrayLike, fake: ArrayLike, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> dict[str, float]:
    """KID: unbiased MMD² under (x·y / D + 1)³, mean and standard deviation over random subsets of `size` rows.

    Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401, eq. 4. May be slightly negative for equal distributions."""
    x, y = _rows(real, least=2), _rows(fake, least=2)
    _same_width(x, y)
    size, rng = min(size, len(x), len(y)), np.random.default_rng(seed)
    found = [
        squared_mmd(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
        for _ in range(subsets)
    ]
    return {"value": float(np.mean(found)), "std": float(np.std(found))}


def squared_mmd(x: Floats, y: Floats) -> float:
    """Unbiased MMD² of x (N, D) and y (M, D) under the cubic kernel: pairs of a row with itself are left out."""
    n, m = len(x), len(y)
    xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def inception_score(probabilities: ArrayLike, *, splits: int = 10) -> dict[str, float]:
    """IS: exp(mean KL(p(y|x) ‖ p(y))), mean and standard deviation over `splits` parts in order; 1 to K.

    probabilities (N, K), rows sum to 1. Salimans et al. 2016, https://arxiv.org/abs/1606.03498, section 4."""
    rows = _rows(probabilities, least=splits)
    found = []
    for part in np.array_split(rows, splits):
        ratio = np.log(np.clip(part, 1e-300, None)) - np.log(np.clip(part.mean(axis=0), 1e-300, None))
        found.append(np.exp((part * ratio).sum(axis=1).mean()))
    return {"value": float(np.mean(found)), "std": float(np.std(found))}


def label_figures(probabilities: ArrayLike, *, present: float = 0.01) -> dict[str, float]:
    """How a classifier sees samples (N, K): its mean confidence, and classes with at least `present` of the samples."""
    rows = _rows(probabilities, least=1)
    shares = np.bincount(rows.argmax(axis=1), minlength=rows.shape[1]) / len(rows)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    return {
        "mean_confidence": float(rows.max(axis=1).mean()),
        "classes_found": int((shares >= present).sum()),
        "classes": int(rows.shape[1]),
        "label_entropy": float(entropy / np.log(rows.shape[1])),  # 1 = every class equally often
    }


def asked_accuracy(probabilities: ArrayLike, asked: ArrayLike) -> dict[str, Any]:
    """Share of conditional samples that the classifier takes for the class asked for (N,), over all and per class."""
    guess, wanted = _rows(probabilities, least=1).argmax(axis=1), np.asarray(asked)
    right = guess == wanted
    by_class = {str(c): float(right[wanted == c].mean()) for c in np.unique(wanted)}
    return {"value": float(right.mean()), "by_class": by_class}


# -- neighbours -----------------------------------------------------------------------------------------------------


def precision_recall(real: ArrayLike, fake: ArrayLike, *, k: int = 3) -> dict[str, float]:
    """Share of fakes inside the real manifold, and of real rows inside the fakes'; a manifold is the balls around its rows
    that reach to their k-th neighbour. Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991, eq. 2."""
    x, y = _pair(real, fake, k)
    return {"precision": _covered(y, x, radii(x, k)), "recall": _covered(x, y, radii(y, k))}


def density_coverage(real: ArrayLike, fake: ArrayLike, *, k: int = 5) -> dict[str, float]:
    """density: real balls around a fake / k, on average; coverage: share of real balls with a fake inside.

    Naeem et al. 2020, https://arxiv.org/abs/2002.09797, eq. 3 and 4; here a ball holds its border."""
    x, y = _pair(real, fake, k)
    reach, inside, covered = radii(x, k), 0, np.zeros(len(x), bool)
    for _, distances in squared_distances(y, x):
        hits = distances <= reach  # (rows of the chunk, N)
        inside += int(hits.sum())
        covered |= hits.any(axis=0)
    return {"density": inside / (k * len(y)), "coverage": float(covered.mean())}


def memorisation(
    fake: ArrayLike, training: ArrayLike, held_out: ArrayLike, *, quantile: float = FLOOR_QUANTILE
) -> dict[str, float]:
    """Share of fakes nearer to a training picture than all but `quantile` of held-out real pictures are.

    A generator that memorises nothing comes to about `quantile`; one that copies, to 1. `median_ratio`: median distance of
    the fakes to the training set over that of the held-out pictures, near 1 where the fakes are as new as those."""
    train = _rows(training, least=1)
    ours = np.sqrt(nearest(_rows(fake, least=1), train)[0])
    theirs = np.sqrt(nearest(_rows(held_out, least=1), train)[0])
    threshold = float(np.quantile(theirs, quantile))
    return {
        "value": float((ours < threshold).mean()),
        "expected": quantile,
        "threshold": threshold,
        "median_ratio": float(np.median(ours) / max(float(np.median(theirs)), 1e-300)),
    }


def nearest(queries: Floats, rows: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Squared distance (Q,) to the nearest of `rows`, and its index (Q,)."""
    distance, index = np.empty(len(queries)), np.empty(len(queries), np.int64)
    for start, block in squared_distances(queries, rows):
        best = block.argmin(axis=1)
        index[start : start + len(best)] = best
        distance[start : start + len(best)] = block[np.arange(len(best)), best]
    return distance, index


def radii(rows: Floats, k: int) -> Floats:
    """Squared distance (N,) of each row to its k-th nearest other row."""
    found = np.empty(len(rows))
    for start, block in squared_distances(rows, rows):
        block[np.arange(len(block)), start + np.arange(len(block))] = np.inf  # itself is no neighbour
        found[start : start + len(block)] = np.partition(block, k - 1, axis=1)[:, k - 1]
    return found


def squared_distances(a: Floats, b: Floats) -> Iterator[tuple[int, Floats]]:
    """(first row, squared distances (rows, M)) of a (N, D) to b (M, D), CHUNK rows of `a` at a time."""
    centre = b.mean(axis=0)  # the expansion of |a - b|² loses digits where both are far from 0
    a, b = a - centre, b - centre
    norms = np.square(b).sum(axis=1)
    for start in range(0, len(a), CHUNK):
        part = a[start : start + CHUNK]
        found = part @ (-2 * b.T)
        found += np.square(part).sum(axis=1)[:, None]
        found += norms
        yield start, np.clip(found, 0, None, out=found)


# -- private --------------------------------------------------------------------------------------------------------


def _covered(queries: Floats, rows: Floats, reach: Floats) -> float:
    """Share of queries inside the ball of at least one row."""
    return sum(
        int((block <= reach).any(axis=1).sum()) for _, block in squared_distances(queries, rows)
    ) / len(queries)


def _cubic(x: Floats, y: Floats) -> Floats:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _square_root(matrix: Floats) -> Floats:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(_symmetric(matrix))
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def _symmetric(matrix: Floats) -> Floats:
    return np.asarray((matrix + matrix.T) / 2)


def _pair(real: ArrayLike, fake: ArrayLike, k: int) -> tuple[Floats, Floats]:
    x, y = _rows(real, least=k + 1), _rows(fake, least=k + 1)
    _same_width(x, y)
    return x, y


def _same_width(x: Floats, y: Floats) -> None:
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features of {x.shape[1]} and {y.shape[1]} numbers cannot be compared")


def _rows(features: ArrayLike, *, least: int) -> Floats:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < least:
        raise DataError(f"at least {least} rows of features (N, D) are needed, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise DataError("features hold NaN or infinity; the extractor does not fit these pictures")
    return rows
