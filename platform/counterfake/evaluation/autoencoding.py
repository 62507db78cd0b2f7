"""How good a code is: against principal components of the same size, by its neighbours, and by the bits it takes.

Pure functions on arrays in float64. Letters: N pictures, P values of a picture in [0, 1], K units of a code.
"""

from __future__ import annotations

import dataclasses
import gzip

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterfake.evaluation.generation import Floats, squared_distances


@dataclasses.dataclass(frozen=True)
class Principal:
    """The best linear code of K numbers: mean (P,) and orthonormal basis (K, P)."""

    mean: Floats
    basis: Floats

    @classmethod
    def fit(cls, rows: ArrayLike, size: int) -> Principal:
        """Of rows (N, P): the eigenvectors of the covariance with the `size` largest eigenvalues."""
        data = np.asarray(rows, np.float64)
        mean = data.mean(axis=0)
        centred = data - mean
        _, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
        return cls(mean, np.ascontiguousarray(vectors[:, ::-1][:, :size].T))

    def encode(self, rows: ArrayLike) -> Floats:
        """(N, P) -> (N, K)."""
        return np.asarray((np.asarray(rows, np.float64) - self.mean) @ self.basis.T)

    def decode(self, codes: ArrayLike) -> Floats:
        """(N, K) -> (N, P), clipped to [0, 1]."""
        return np.clip(np.asarray(codes, np.float64) @ self.basis + self.mean, 0, 1)


def squared_error(found: ArrayLike, wanted: ArrayLike) -> float:
    """Mean over pictures and pixels."""
    return float(np.square(np.asarray(found, np.float64) - np.asarray(wanted, np.float64)).mean())


def cross_entropy(found: ArrayLike, wanted: ArrayLike) -> float:
    """Binary cross-entropy, mean over pictures and pixels; `found` is clipped to [1e-7, 1 - 1e-7], as in Keras."""
    p, y = np.clip(np.asarray(found, np.float64), 1e-7, 1 - 1e-7), np.asarray(wanted, np.float64)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


def neighbour_accuracy(
    codes: ArrayLike, classes: ArrayLike, queries: ArrayLike, truth: ArrayLike, *, k: int = 5
) -> float:
    """Share of queries (Q, K) whose class most of their k nearest codes (N, K) have; the smaller class wins a tie."""
    rows, known = np.asarray(codes, np.float64), np.asarray(classes)
    right = 0
    for start, block in squared_distances(np.asarray(queries, np.float64), rows):
        near = known[np.argpartition(block, k - 1, axis=1)[:, :k]]
        votes = np.stack([(near == c).sum(axis=1) for c in np.unique(known)], axis=1)
        guess = np.unique(known)[votes.argmax(axis=1)]
        right += int((guess == np.asarray(truth)[start : start + len(guess)]).sum())
    return right / len(np.asarray(truth))


@dataclasses.dataclass(frozen=True)
class Quantiser:
    """Codes as whole numbers of `bits` bits: each unit's range in the training set, cut evenly."""

    low: Floats  # (K,)
    step: Floats  # (K,), > 0
    bits: int

    @classmethod
    def fit(cls, codes: ArrayLike, bits: int) -> Quantiser:
        """The range of each unit of codes (N, K); bits from 1 to 16."""
        rows = np.asarray(codes, np.float64)
        low, high = rows.min(axis=0), rows.max(axis=0)
        return cls(low, np.maximum(high - low, 1e-12) / (2**bits - 1), bits)

    def pack(self, codes: ArrayLike) -> NDArray[np.uint16]:
        """(N, K) -> whole numbers below 2 ** bits; what lies outside the range is clipped."""
        steps = np.rint((np.asarray(codes, np.float64) - self.low) / self.step)
        return np.clip(steps, 0, 2**self.bits - 1).astype(np.uint16)

    def unpack(self, packed: NDArray[np.uint16]) -> Floats:
        """The inverse of `pack`, to half a step."""
        return np.asarray(packed * self.step + self.low)


def entropy_bits(packed: NDArray[np.uint16]) -> float:
    """Bits per picture that an ideal coder needs who knows how often each unit has each value: (N, K) -> bits."""
    total = 0.0
    for unit in packed.T:
        shares = np.unique(unit, return_counts=True)[1] / len(unit)
        total -= float((shares * np.log2(shares)).sum())
    return total


def gzip_bits(pictures: NDArray[np.uint8]) -> dict[str, float]:
    """Bits per picture under gzip -9, which loses nothing: each picture alone, and all of them in one file."""
    alone = sum(len(gzip.compress(picture.tobytes(), 9, mtime=0)) for picture in pictures)
    together = len(gzip.compress(pictures.tobytes(), 9, mtime=0))
    return {"alone": 8 * alone / len(pictures), "together": 8 * together / len(pictures)}
