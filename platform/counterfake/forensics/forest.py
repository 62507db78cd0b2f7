"""Tree ensembles as plain arrays: grown by scikit-learn, stored as safetensors, answered by our own traversal.

Neither scikit-learn nor a pickle is needed to answer. All trees of a forest lie in one set of arrays: node i has a feature,
a threshold, two children and a value; a leaf is its own child.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterfake.errors import CheckpointError, ConfigError, DataError

Floats = NDArray[np.float64]
Trees = Literal["forest", "boosting"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForestConfig:
    """How trees are grown. The defaults are the paper's forest."""

    kind: Trees = "forest"  # random forest, or gradient boosting with logistic loss
    trees: int = 100
    max_depth: int | None = None  # None: until leaves are pure (forest) or 3 (boosting)
    min_leaf: int = 1  # rows in a leaf
    learning_rate: float = 0.1  # of boosting
    balanced: bool = True  # both classes weigh the same
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trees < 1 or self.min_leaf < 1 or self.learning_rate <= 0:
            raise ConfigError(f"a forest needs trees, min_leaf >= 1 and learning_rate > 0, got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenfordForest:
    """A fitted ensemble. Arrays over the M nodes of all trees, and the T roots."""

    kind: Trees
    inputs: int  # features it was fitted on
    depth: int  # of the deepest tree
    offset: float  # boosting: log-odds before the first tree; forest: 0
    feature: NDArray[np.int32]  # (M,)
    threshold: Floats  # (M,) x <= threshold goes left
    left: NDArray[np.int32]  # (M,) node index; a leaf's is its own
    right: NDArray[np.int32]
    value: Floats  # (M,) probability of fake (forest) or scaled log-odds (boosting)
    roots: NDArray[np.int32]  # (T,)

    @classmethod
    def fit(cls, x: ArrayLike, fake: ArrayLike, config: ForestConfig | None = None) -> Self:
        """x (N, F) finite; fake (N,) in {0, 1}. One thread; the seed decides the result."""
        config = config or ForestConfig()
        rows, labels = np.asarray(x, dtype=np.float32), np.asarray(fake).astype(np.int64)
        if len(np.unique(labels)) < 2 or not np.isin(labels, (0, 1)).all():
            raise DataError("a forest needs real and fake rows, labelled 0 and 1")
        if rows.ndim != 2 or len(rows) != len(labels) or not np.isfinite(rows).all():
            raise DataError(
                f"a forest needs finite features, one row per label; got {rows.shape} and {len(labels)} labels"
            )
        share = np.bincount(labels) / len(labels)
        weight = (0.5 / share)[labels] if config.balanced else None
        grown = _grow(config).fit(rows, labels, sample_weight=weight)
        return cls(kind=config.kind, **_arrays(grown, rows))

    def predict(self, x: ArrayLike) -> Floats:
        """x (N, F) -> probability of fake (N,). A row's answer does not depend on the others."""
        rows = np.asarray(x, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.inputs:
            raise DataError(f"the forest was fitted on {self.inputs} features, got shape {rows.shape}")
        node = np.tile(self.roots, (len(rows), 1))  # (N, T)
        row = np.arange(len(rows))[:, None]
        for _ in range(self.depth):
            node = np.where(
                rows[row, self.feature[node]] <= self.threshold[node], self.left[node], self.right[node]
            )
        votes = self.value[node]
        if self.kind == "forest":
            return votes.mean(axis=1)
        return 0.5 * (1 + np.tanh(0.5 * (self.offset + votes.sum(axis=1))))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Everything as named arrays, for safetensors."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _SCALARS}
        scalars = {"boosting": int(self.kind == "boosting"), "inputs": self.inputs, "depth": self.depth}
        return {
            **plain,
            "offset": np.array([self.offset]),
            "shape": np.array(list(scalars.values()), np.int64),
        }

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The inverse of `tensors`. CheckpointError if the arrays are no forest: a child or a feature out of range."""
        try:
            boosting, inputs, depth = (int(v) for v in arrays["shape"])
            plain = {name: np.asarray(arrays[name], dtype) for name, dtype in _DTYPES.items()}
            offset = float(arrays["offset"][0])
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(f"these tensors are no forest: {error}") from error
        nodes = len(plain["feature"])
        same = (
            all(plain[name].shape == (nodes,) for name in _DTYPES if name != "roots")
            and plain["roots"].ndim == 1
        )
        limits = {"left": nodes, "right": nodes, "roots": nodes, "feature": inputs}
        if not same or any(((plain[n] < 0) | (plain[n] >= limit)).any() for n, limit in limits.items()):
            raise CheckpointError(
                "these tensors are no forest: array sizes differ or an index is out of range"
            )
        if not (0 <= depth <= nodes and len(plain["roots"])):
            raise CheckpointError(f"these tensors are no forest: depth {depth} with {nodes} nodes")
        return cls(
            kind="boosting" if boosting else "forest", inputs=inputs, depth=depth, offset=offset, **plain
        )


# -- private --------------------------------------------------------------------------------------------------------

_SCALARS = ("kind", "inputs", "depth", "offset")
_DTYPES: dict[str, Any] = {
    "feature": np.int32, "threshold": np.float64, "left": np.int32, "right": np.int32, "value": np.float64, "roots": np.int32,
}  # fmt: skip


def _grow(config: ForestConfig) -> Any:
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier  # only growing needs it

    shared = {"n_estimators": config.trees, "min_samples_leaf": config.min_leaf, "random_state": config.seed}
    if config.kind == "forest":
        return RandomForestClassifier(max_depth=config.max_depth, max_features="sqrt", **shared)
    return GradientBoostingClassifier(
        max_depth=config.max_depth or 3,
        max_features="sqrt",
        subsample=0.8,
        learning_rate=config.learning_rate,
        **shared,
    )


def _arrays(grown: Any, rows: NDArray[np.float32]) -> dict[str, Any]:
    boosting = not hasattr(grown, "estimator_") or hasattr(grown, "learning_rate")
    trees = [tree.tree_ for tree in np.ravel(grown.estimators_)]
    roots = np.cumsum([0, *(tree.node_count for tree in trees[:-1])])
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in _DTYPES if name != "roots"}
    for tree, root in zip(trees, roots, strict=True):
        leaf, own = tree.children_left < 0, np.arange(tree.node_count)
        parts["left"].append(np.where(leaf, own, tree.children_left) + root)
        parts["right"].append(np.where(leaf, own, tree.children_right) + root)
        parts["feature"].append(np.maximum(tree.feature, 0))
        parts["threshold"].append(tree.threshold)
        parts["value"].append(_values(tree, boosting, grown))
    joined = {name: np.concatenate(values).astype(_DTYPES[name]) for name, values in parts.items()}
    offset = float(grown._raw_predict_init(rows[:1]).ravel()[0]) if boosting else 0.0
    depth = max(tree.max_depth for tree in trees)
    return {
        **joined,
        "roots": roots.astype(np.int32),
        "inputs": rows.shape[1],
        "depth": int(depth),
        "offset": offset,
    }


def _values(tree: Any, boosting: bool, grown: Any) -> Floats:
    if boosting:
        return np.asarray(grown.learning_rate * tree.value[:, 0, 0])
    counts = tree.value[:, 0, :]
    return np.asarray(counts[:, 1] / counts.sum(axis=1))
