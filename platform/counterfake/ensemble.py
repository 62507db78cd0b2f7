"""Several detectors to one probability and one verdict with an error rate. Numbers only: no pictures, no nets.

Each member's logit is divided by its temperature (Guo et al. 2017, https://arxiv.org/abs/1706.04599), a logistic regression
or small boosted trees stack them (Wolpert 1992), a line calibrates what the stack says of rows it was not fitted on (Platt 1999),
and class-conditional split conformal prediction (Vovk 2012, https://arxiv.org/abs/1209.2673) turns
the probability into a set of labels: {real}, {fake}, both (uncertain) or none (out of domain). For data exchangeable with the
calibration rows, at most alpha of the real pictures are called fake or nothing, and at most alpha of the fakes real or nothing.
The calibration rows are cut in two halves by cluster: one fits everything before the conformal quantiles, the other only those.
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
from counterfake.forensics.forest import BenfordForest, ForestConfig

Floats = NDArray[np.float64]
Stacking = Literal["logistic", "boosted"]
Word = Literal["real", "fake", "uncertain", "out_of_domain"]
CLIP = 1e-4  # a forest says exactly 0 or 1; its logit would be infinite
RIDGE = 1.0  # pull of the stacking weights towards the plain mean of the members, in rows
MAX_MISSING = 2  # members that may be missing at once
FOLDS = 5  # of the first half: the line after the stack is fitted on what the stack says of the fold it did not see
SLOPES = (0.05, 20.0)  # of that line: never zero nor turned around, as no temperature is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Everything `probability` and `verdict` need, as plain numbers."""

    members: tuple[str, ...]
    temperatures: tuple[float, ...]  # one per member; > 1 makes it less sure
    weights: tuple[float, ...]  # of the members' tempered logits
    bias: float
    trees: dict[str, tuple[float, ...]] = dataclasses.field(
        default_factory=dict
    )  # boosted; empty = logistic only
    slope: float = 1.0  # of the line from the stack's logit to the calibrated one
    shift: float = 0.0
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
        stacking: Stacking = "logistic",
        smaller: bool = True,
    ) -> Ensemble:
        """probabilities (N, M) of rows that neither training nor the test used; fake (N,) in {0, 1}; clusters N names.

        Rows of one video are no independent evidence: give one row per video. smaller: fit also for every set of members
        with up to MAX_MISSING missing. Raises DataError if there are too few rows for alpha."""
        p, y = _checked(names, probabilities, fake, alpha)
        parts = _parts(y, clusters, 2)
        first, second = parts == 0, parts == 1
        _enough(y[second], alpha, clusters is not None)
        folds = _parts(y[first], None if clusters is None else np.asarray(clusters)[first].tolist(), FOLDS)
        identity = _identity(names, p, y, alpha, stacking)
        everyone = tuple(range(len(names)))

        def fitted(chosen: tuple[int, ...], subsets: tuple[Ensemble, ...]) -> Ensemble:
            part = p[:, chosen]
            stack = _calibrated([names[i] for i in chosen], part[first], y[first], folds, stacking)
            quantiles, n = _conformal(_sigmoid(stack.logits(part[second])), y[second], alpha)
            return cls(
                **stack.fields(), quantiles=quantiles, alpha=alpha, threshold=threshold, n=n,
                calibration_id=identity, subsets=subsets,
            )  # fmt: skip

        sizes = range(max(1, len(names) - MAX_MISSING), len(names)) if smaller else ()
        fewer = [chosen for size in reversed(sizes) for chosen in itertools.combinations(everyone, size)]
        return fitted(everyone, tuple(fitted(chosen, ()) for chosen in fewer))

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
        names = [field.name for field in dataclasses.fields(_Stack)]
        return _Stack(**{name: getattr(self, name) for name in names})


def coverage(
    names: Sequence[str],
    probabilities: ArrayLike,
    fake: ArrayLike,
    *,
    alpha: float = 0.05,
    clusters: Sequence[str] | None = None,
    stacking: Stacking = "logistic",
    splits: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """What alpha promises against what happens: fitted on one half of the rows and counted on the other, over random halves.

    false_accusation: share of the reals whose label set has lost "real" (called fake, or out of domain); miss: of the fakes
    that have lost "fake"; uncertain: of all rows. Each {mean, sd over the splits, within: mean <= alpha + 2 sd}.
    Rows and errors as `Ensemble.fit`; no cluster is in both halves."""
    p, y = _checked(names, probabilities, fake, alpha)
    known = [str(i) for i in range(len(y))] if clusters is None else list(clusters)
    rates: dict[str, list[float]] = {"false_accusation": [], "miss": [], "uncertain": []}
    for split in range(splits):
        half = _parts(y, known, 2, salt=f"{seed}/{split}/")
        own = [known[i] for i in np.flatnonzero(half == 0)]
        fit = Ensemble.fit(
            names, p[half == 0], y[half == 0], alpha=alpha, clusters=own, stacking=stacking, smaller=False
        )
        labels, truth = [fit.labels(float(q)) for q in fit.probability(p[half == 1])], y[half == 1]
        real, fakes = (np.array([label in found for found in labels]) for label in ("real", "fake"))
        rates["false_accusation"].append(float(1 - real[truth == 0].mean()))
        rates["miss"].append(float(1 - fakes[truth == 1].mean()))
        rates["uncertain"].append(float((real & fakes).mean()))
    return {
        "alpha": alpha, "splits": splits, "n": {"real": int((y == 0).sum()), "fake": int((y == 1).sum())},
        **{name: _spread(values, None if name == "uncertain" else alpha) for name, values in rates.items()},
    }  # fmt: skip


def platt(probability: ArrayLike, fake: ArrayLike) -> tuple[float, float]:
    """(slope, shift) of the line through one detector's logits that fits these held-out rows (N,) best: Platt 1999.

    (1, 0) where the rows are of one class only. Probabilities of other rows become those of `scaled`."""
    p, y = np.asarray(probability, np.float64), np.asarray(fake, np.float64)
    if len(np.unique(y)) < 2:
        return 1.0, 0.0
    return _line(_logit(p), y)


def scaled(probability: ArrayLike, slope: float, shift: float) -> Floats:
    """sigmoid(slope · logit(p) + shift) of each probability."""
    return _sigmoid(slope * _logit(np.asarray(probability, np.float64)) + shift)


# -- private --------------------------------------------------------------------------------------------------------


def _spread(values: Sequence[float], alpha: float | None) -> dict[str, Any]:
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": mean, "sd": sd, **({} if alpha is None else {"within": bool(mean <= alpha + 2 * sd)})}


@dataclasses.dataclass(frozen=True)
class _Stack:
    members: tuple[str, ...]
    temperatures: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    trees: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    slope: float = 1.0
    shift: float = 0.0

    def logits(self, p: Floats) -> Floats:
        """Members' probabilities (N, M) -> calibrated logits (N,)."""
        return self.slope * self.raw(p) + self.shift

    def raw(self, p: Floats) -> Floats:
        """(N, M) -> what the stack says before the line, (N,)."""
        linear = self._linear(p)
        if not self.trees:
            return linear
        arrays = {name: np.array(values) for name, values in self.trees.items()}
        return _logit(BenfordForest.from_tensors(arrays).predict(np.column_stack([_logit(p), linear])))

    def _linear(self, p: Floats) -> Floats:
        # sums column by column: a matrix product may round differently for another number of rows
        columns = (
            w * _logit(p[:, i]) / t
            for i, (t, w) in enumerate(zip(self.temperatures, self.weights, strict=True))
        )
        return np.asarray(sum(columns, np.full(len(p), self.bias)))

    def fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _calibrated(
    names: Sequence[str], p: Floats, y: Floats, folds: NDArray[np.int64], stacking: Stacking
) -> _Stack:
    """The stack of all rows, behind a line fitted on what stacks of the other folds say of each fold."""
    stack, unseen = _stack(names, p, y, stacking), np.empty(len(y))
    for fold in np.unique(folds):
        rest = folds != fold
        if len(np.unique(y[rest])) < 2:
            return stack  # too few rows to see anything: as it is
        unseen[~rest] = _stack(names, p[rest], y[rest], stacking).raw(p[~rest])
    slope, shift = _line(unseen, y)
    return dataclasses.replace(stack, slope=slope, shift=shift)


def _stack(names: Sequence[str], p: Floats, y: Floats, stacking: Stacking = "logistic") -> _Stack:
    logits, targets = _logit(p), _platt(y)
    temperatures = [temperature(logits[:, i], targets) for i in range(p.shape[1])]
    weights, bias = _logistic(logits / np.array(temperatures), targets)
    stack = _Stack(tuple(names), tuple(temperatures), tuple(weights.tolist()), bias)
    return stack if stacking == "logistic" else dataclasses.replace(stack, trees=_boosted(stack, p, y))


def _boosted(stack: _Stack, p: Floats, y: Floats) -> dict[str, tuple[float, ...]]:
    """Small trees over the members' logits and their logistic stack; leaves of at least a fiftieth of the rows."""
    config = ForestConfig(
        kind="boosting", trees=50, max_depth=2, min_leaf=max(5, len(y) // 50), learning_rate=0.1, balanced=False
    )  # fmt: skip
    forest = BenfordForest.fit(np.column_stack([_logit(p), stack.raw(p)]), y, config)
    return {name: tuple(np.ravel(array).tolist()) for name, array in forest.tensors().items()}


def _line(logits: Floats, y: Floats) -> tuple[float, float]:
    slope, shift = _logistic(logits[:, None], _platt(y))
    return float(np.clip(slope[0], *SLOPES)), shift


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


def _parts(y: Floats, clusters: Sequence[str] | None, parts: int, salt: str = "") -> NDArray[np.int64]:
    """The part (N,) of each row, no cluster in two. Clusters go in the order of a hash of their name (after `salt`), each to
    the part that then has fewest rows of the cluster's larger class, so that every part sees both classes."""
    names = [str(i) for i in range(len(y))] if clusters is None else [str(c) for c in clusters]
    if len(names) != len(y):
        raise DataError(f"{len(y)} rows but {len(names)} cluster names; give one per row")
    unique, index = np.unique(np.asarray(names), return_inverse=True)
    counts = np.stack([np.bincount(index, weights=w, minlength=len(unique)) for w in (1 - y, y)], axis=1)
    order = sorted(range(len(unique)), key=lambda i: hashlib.sha256(f"{salt}{unique[i]}".encode()).digest())
    filled, part = np.zeros((parts, 2)), np.zeros(len(unique), dtype=np.int64)
    for i in order:
        part[i] = filled[:, int(counts[i].argmax())].argmin()
        filled[part[i]] += counts[i]
    return part[index]


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


def _identity(names: Sequence[str], p: Floats, y: Floats, alpha: float, stacking: Stacking) -> str:
    head = settings.canonical_json([list(names), alpha, list(p.shape), stacking])
    return hashlib.sha256(head + p.tobytes() + y.tobytes()).hexdigest()


def _logit(p: Floats) -> Floats:
    p = np.clip(p, CLIP, 1 - CLIP)
    return np.log(p) - np.log1p(-p)


def _sigmoid(z: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * z))
