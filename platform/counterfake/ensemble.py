"""Several detectors to one probability and one verdict with an error rate. Numbers only: no pictures, no nets.

Each member's logit is divided by its temperature (Guo et al. 2017, https://arxiv.org/abs/1706.04599), a logistic regression
stacks them (Wolpert 1992), and class-conditional split conformal prediction (Vovk 2012, https://arxiv.org/abs/1209.2673) turns
the probability into a set of labels: {real}, {fake}, both (uncertain) or none (out of domain). For data exchangeable with the
calibration rows, at most alpha of the real pictures are called fake or nothing, and at most alpha of the fakes real or nothing.
The calibration rows are cut in two halves by cluster: one fits temperatures and weights, the other only the conformal quantiles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterfake import config as settings
from counterfake.errors import ConfigError, DataError

Floats = NDArray[np.float64]
Word = Literal["real", "fake", "uncertain", "out_of_domain"]
CLIP = 1e-4  # a forest says exactly 0 or 1; its logit would be infinite
RIDGE = 1.0  # pull of the stacking weights towards the plain mean of the members, in rows
MAX_MISSING = 2  # members that may be missing at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Everything `probability` and `verdict` need, as plain numbers."""

    members: tuple[str, ...]
    temperatures: tuple[float, ...]  # one per member; > 1 makes it less sure
    weights: tuple[float, ...]  # of the members' tempered logits
    bias: float
    quantiles: dict[str, float]  # conformal, of 1 - probability of the true class: {"real", "fake"}
    alpha: float  # error rate promised per class
    threshold: float = 0.5  # for reports that need a yes or no; the verdict does not use it
    n: dict[str, int]  # conformal calibration rows per class: {"real", "fake"}
    calibration_id: str = ""  # digest of the calibration rows and the settings
    subsets: tuple[Ensemble, ...] = ()  # the same fit for every set of members with up to MAX_MISSING missing

    @classmethod
    def fit(
        cls,
        names: Sequence[str],
        probabilities: ArrayLike,
        fake: ArrayLike,
        *,
        alpha: float = 0.05,
        clusters: Sequence[str] | None = None,
        threshold: float = 0.5,
    ) -> Ensemble:
        """probabilities (N, M) of rows that neither training nor the test used; fake (N,) in {0, 1}; clusters N names.

        Rows of one video are no independent evidence: give one row per video. Raises DataError if there are too few rows.
        """
        p, y = _checked(names, probabilities, fake, alpha)
        first, second = _halves(y, clusters)
        _enough(y[second], alpha, clusters is not None)
        identity = _identity(names, p, y, alpha)
        everyone = tuple(range(len(names)))

        def fitted(chosen: tuple[int, ...], subsets: tuple[Ensemble, ...]) -> Ensemble:
            part = p[:, chosen]
            stack = _stack([names[i] for i in chosen], part[first], y[first])
            quantiles, n = _conformal(_sigmoid(stack.logits(part[second])), y[second], alpha)
            return cls(
                **stack.fields(), quantiles=quantiles, alpha=alpha, threshold=threshold, n=n,
                calibration_id=identity, subsets=subsets,
            )  # fmt: skip

        sizes = range(max(1, len(names) - MAX_MISSING), len(names))
        smaller = [chosen for size in reversed(sizes) for chosen in itertools.combinations(everyone, size)]
        return fitted(everyone, tuple(fitted(chosen, ()) for chosen in smaller))

    def probability(self, probabilities: ArrayLike) -> Floats:
        """Members' probabilities (N, M) -> probability of being fake (N,)."""
        p = np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 2 or p.shape[1] != len(self.members):
            raise DataError(
                f"this ensemble takes (N, {len(self.members)}) probabilities, got shape {p.shape}"
            )
        return _sigmoid(self._stack().logits(p))

    def labels(self, probability: float) -> frozenset[str]:
        """The conformal prediction set: every label whose error quantile allows this probability."""
        allowed = {
            "real": probability <= self.quantiles["real"],
            "fake": 1 - probability <= self.quantiles["fake"],
        }
        return frozenset(label for label, inside in allowed.items() if inside)

    def verdict(self, probability: float) -> Word:
        """One word: "real", "fake", "uncertain" (both fit) or "out_of_domain" (neither does)."""
        labels = self.labels(probability)
        if len(labels) == 1:
            return "fake" if "fake" in labels else "real"
        return "uncertain" if labels else "out_of_domain"

    def only(self, present: Sequence[str]) -> Ensemble:
        """The fit for only these members, for when others do not answer. DataError if there is none."""
        wanted = tuple(name for name in self.members if name in set(present))
        for candidate in (self, *self.subsets):
            if candidate.members == wanted:
                return candidate
        missing = sorted(set(self.members) - set(present))
        raise DataError(
            f"no fit without {', '.join(missing)}: at most {MAX_MISSING} of {len(self.members)} may be missing"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict."""
        return settings.to_dict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Ensemble:
        """The inverse of `to_dict`; ConfigError for anything else."""
        return settings.from_dict(cls, tree)

    def __post_init__(self) -> None:
        if not len(self.members) == len(self.temperatures) == len(self.weights) or not self.members:
            raise ConfigError("an ensemble needs one temperature and one weight per member")

    def _stack(self) -> _Stack:
        return _Stack(self.members, self.temperatures, self.weights, self.bias)


# -- private --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Stack:
    members: tuple[str, ...]
    temperatures: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def logits(self, p: Floats) -> Floats:
        # sums column by column: a matrix product may round differently for another number of rows
        columns = (
            w * _logit(p[:, i]) / t
            for i, (t, w) in enumerate(zip(self.temperatures, self.weights, strict=True))
        )
        return np.asarray(sum(columns, np.full(len(p), self.bias)))

    def fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _stack(names: Sequence[str], p: Floats, y: Floats) -> _Stack:
    logits, targets = _logit(p), _platt(y)
    temperatures = [temperature(logits[:, i], targets) for i in range(p.shape[1])]
    weights, bias = _logistic(logits / np.array(temperatures), targets)
    return _Stack(tuple(names), tuple(temperatures), tuple(weights.tolist()), bias)


def _platt(y: Floats) -> Floats:
    """Labels as n + 1 over n + 2 and 1 over n + 2 (Platt 1999, eq. 2): a detector that separates the calibration rows
    perfectly must not come out certain; 100 rows do not show more than 99 %."""
    n = float(y.sum())
    return np.where(y == 1, (n + 1) / (n + 2), 1 / (len(y) - n + 2))


def temperature(logits: Floats, fake: Floats) -> float:
    """The T that minimises the mean log-loss of sigmoid(logits / T), within [0.05, 20]. Convex in 1 / T: bisection."""
    low, high = 0.05, 20.0  # of 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        slope = np.mean((_sigmoid(middle * logits) - fake) * logits)
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 2 / (low + high)


def _logistic(x: Floats, y: Floats) -> tuple[Floats, float]:
    """Newton for sum log-loss + RIDGE / 2 * |w - 1/M|^2, the bias free; x (N, M)."""
    prior = np.append(np.full(x.shape[1], 1 / x.shape[1]), 0.0)
    pull = np.append(np.full(x.shape[1], RIDGE), 1e-6)
    design, beta = np.column_stack([x, np.ones(len(x))]), prior.copy()
    value = _objective(design, y, beta, prior, pull)
    for _ in range(100):
        q = _sigmoid(design @ beta)
        gradient = design.T @ (q - y) + pull * (beta - prior)
        hessian = (design.T * (q * (1 - q))) @ design + np.diag(pull)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while (new := _objective(design, y, beta - size * step, prior, pull)) > value and size > 1e-8:
            size /= 2
        beta, value = beta - size * step, min(new, value)
        if np.abs(step).max() < 1e-10:
            break
    return beta[:-1], float(beta[-1])


def _objective(design: Floats, y: Floats, beta: Floats, prior: Floats, pull: Floats) -> float:
    z = design @ beta
    return float(np.sum(np.logaddexp(0, z) - y * z) + np.sum(pull * (beta - prior) ** 2) / 2)


def _conformal(probability: Floats, y: Floats, alpha: float) -> tuple[dict[str, float], dict[str, int]]:
    """Per class the ceil((n + 1)(1 - alpha))-th smallest 1 - p(true class)."""
    scores = {"real": probability[y == 0], "fake": 1 - probability[y == 1]}
    rank = {label: math.ceil((len(s) + 1) * (1 - alpha) - 1e-9) for label, s in scores.items()}
    quantiles = {label: float(np.sort(s)[rank[label] - 1]) for label, s in scores.items()}
    return quantiles, {label: len(s) for label, s in scores.items()}


def _halves(y: Floats, clusters: Sequence[str] | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two halves with no cluster in both. Clusters go in the order of a hash of their name, each to the half that then
    has fewer rows of the cluster's larger class, so that both halves see both classes."""
    names = [str(i) for i in range(len(y))] if clusters is None else [str(c) for c in clusters]
    if len(names) != len(y):
        raise DataError(f"{len(y)} rows but {len(names)} cluster names; give one per row")
    unique, index = np.unique(np.asarray(names), return_inverse=True)
    counts = np.stack([np.bincount(index, weights=w, minlength=len(unique)) for w in (1 - y, y)], axis=1)
    order = sorted(range(len(unique)), key=lambda i: hashlib.sha256(str(unique[i]).encode()).digest())
    filled, second = np.zeros((2, 2)), np.zeros(len(unique), dtype=bool)
    for i in order:
        label = int(counts[i].argmax())
        half = int(filled[1, label] < filled[0, label])
        second[i], filled[half] = bool(half), filled[half] + counts[i]
    return ~second[index], second[index]


def _enough(y: Floats, alpha: float, clustered: bool) -> None:
    needed = math.ceil(1 / alpha - 1 - 1e-9)
    counts = {"real": int((y == 0).sum()), "fake": int((y == 1).sum())}
    for label, n in counts.items():
        if n < needed:
            hint = "more clusters" if clustered else "more rows"
            raise DataError(
                f"alpha {alpha} needs at least {needed} {label} rows in the conformal half of the calibration split, there are "
                f"{n}; calibrate on about {2 * needed} {label} rows ({hint}) or set alpha to at least {1 / (n + 1):.3f}"
            )


def _checked(
    names: Sequence[str], probabilities: ArrayLike, fake: ArrayLike, alpha: float
) -> tuple[Floats, Floats]:
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(fake, dtype=np.float64).ravel()
    if not 0 < alpha < 0.5:
        raise ConfigError(f"alpha is {alpha}; an error rate must lie between 0 and 0.5")
    if p.shape != (len(y), len(names)) or not names or len(set(names)) != len(names):
        raise DataError(
            f"{len(y)} labels and {len(names)} distinct members need ({len(y)}, {len(names)}) probabilities, got {p.shape}"
        )
    if not np.isfinite(p).all() or (p < 0).any() or (p > 1).any():
        raise DataError("members' probabilities must be finite and within [0, 1]")
    if not np.isin(y, (0, 1)).all() or len(np.unique(y)) < 2:
        raise DataError("the calibration split needs real and fake rows, labelled 0 and 1")
    return p, y


def _identity(names: Sequence[str], p: Floats, y: Floats, alpha: float) -> str:
    head = settings.canonical_json([list(names), alpha, list(p.shape)])
    return hashlib.sha256(head + p.tobytes() + y.tobytes()).hexdigest()


def _logit(p: Floats) -> Floats:
    p = np.clip(p, CLIP, 1 - CLIP)
    return np.log(p) - np.log1p(-p)


def _sigmoid(z: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * z))
