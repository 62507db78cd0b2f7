"""Benford detector: first digits of quantised DCT coefficients against the generalised Benford law, then trees.

"On the use of Benford's law to detect GAN-generated images", Bonettini et al., ICPR 2020, https://arxiv.org/abs/2004.07682:
JPEG quantisation at several qualities, nine AC coefficients, first digits in several bases, a fit of
k log_b(1 + 1 / (a + d^m)) to each digit histogram, and three symmetric divergences between histogram and fit.
Differences: the DCT and the quantisation are ours (libjpeg's own coefficients within 1, no file is written); the fit searches
a bounded (a, m) with k in closed form, so it cannot fail to converge; Kullback-Leibler uses histograms floored at FLOOR,
where the original drops pictures with infinite values; the share of failed fits per base is a feature of its own.
Legend: P problems (pictures x qualities x coefficients), D digits of a base, N pictures, T trees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from counterfake.errors import ConfigError, DataError

Floats = NDArray[np.float64]
COEFFICIENTS = {  # natural positions (8 * row + column) of the nine AC coefficients
    "true_zigzag": (1, 8, 16, 9, 2, 3, 10, 17, 24),
    "paper_code": (1, 5, 6, 14, 15, 27, 28, 2, 4),  # the authors' code gathers through the inverse table
}
DIVERGENCES = ("kl", "renyi", "tsallis")
ALPHA = 0.3  # order of the Rényi and Tsallis divergences
FLOOR = 1e-6  # probability an empty digit counts as in Kullback-Leibler
MISSING = -999.0  # feature of a histogram with too little in it, as in the authors' code
MIN_COUNT = 10  # non-zero coefficients below which a histogram is no histogram
LARGEST = 1023  # of a quantised AC coefficient in baseline JPEG
LUMA_TABLE = np.array(  # ITU-T T.81, table K.1
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenfordConfig:
    """What is measured of a picture. The defaults give 540 divergences and one failure rate per base."""

    qualities: tuple[int, ...] = (80, 85, 90, 95, 100)  # JPEG quality factors, 1 to 100
    bases: tuple[int, ...] = (10, 20, 40, 60)  # of the digits, from 4 up
    order: Literal["true_zigzag", "paper_code"] = "true_zigzag"  # which nine coefficients
    min_side: int = (
        64  # pixels; smaller pictures have too few blocks. The paper uses 256, below 128 it is weak
    )
    max_side: int = 1024  # pixels; larger pictures are cut to their middle, on the grid of 8

    def __post_init__(self) -> None:
        if (
            not self.qualities
            or not self.bases
            or min(self.bases) < 4
            or not all(1 <= q <= 100 for q in self.qualities)
        ):
            raise ConfigError(
                f"benford needs qualities in 1..100 and bases from 4 up, got {self.qualities} and {self.bases}"
            )

    @property
    def family(self) -> str:
        """The kind of its bundles."""
        return "benford"

    def features_of(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Features (N, F) of pictures of any sizes."""
        return features_of(pictures, self)

    def names(self) -> list[str]:
        """The name of every feature, in the order of `features`."""
        nine = range(1, 10)
        cells = [
            f"q{q}/b{b}/c{c}/{d}"
            for b in self.bases
            for q in self.qualities
            for c in nine
            for d in DIVERGENCES
        ]
        return cells + [f"failed/b{b}" for b in self.bases]


def features(pixels: NDArray[np.uint8], config: BenfordConfig) -> NDArray[np.float32]:
    """pixels (H, W, 3) RGB or (H, W) luma, uint8 -> features (F,). DataError below `min_side`."""
    return features_of([pixels], config)[0]


def features_of(pictures: Sequence[NDArray[np.uint8]], config: BenfordConfig) -> NDArray[np.float32]:
    """Features (N, F) of pictures of any sizes. A picture's row does not depend on the others."""
    counts = np.stack([_magnitudes(picture, config) for picture in pictures])  # (N, Q, 9, LARGEST + 1)
    columns, failures = [], []
    for base in config.bases:
        histograms = counts @ _digit_table(base)  # (N, Q, 9, D)
        divergences, failed = _divergences(histograms.reshape(-1, base - 1), base)
        columns.append(divergences.reshape(len(pictures), -1))
        failures.append(failed.reshape(len(pictures), -1).mean(axis=1))
    return np.concatenate([*columns, np.stack(failures, axis=1)], axis=1).astype(np.float32)


def luma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) RGB -> (H, W), BT.601 in the fixed point that Pillow and libjpeg use."""
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return pixels.reshape(pixels.shape[:2])
    r, g, b = (pixels[:, :, i].astype(np.int32) for i in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).astype(np.uint8)


def middle(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(H, W, …) -> its middle, at most `side` pixels a side, cut on JPEG's grid of 8."""
    top, left = (max(0, (n - side) // 2) // 8 * 8 for n in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def quantisation_table(quality: int) -> NDArray[np.int64]:
    """The standard luma table (8, 8) at a JPEG quality, scaled as libjpeg does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((LUMA_TABLE * scale + 50) // 100, 1, 255)


def quantised(plane: NDArray[np.uint8], quality: int, positions: Sequence[int]) -> NDArray[np.int64]:
    """plane (H, W) -> quantised DCT coefficients (blocks, len(positions)); edges repeated to whole blocks as in libjpeg."""
    steps = quantisation_table(quality).ravel()[list(positions)]
    return _rounded(_coefficients(plane, tuple(positions)) / steps)


def fit(histograms: Floats, base: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Least squares of k log_base(1 + 1 / (a + d^m)) to densities (P, D) over the digits 1 to base - 1.

    Returns parameters (P, 3) = (k, a, m), the fitted curves (P, D), and which fits failed: those that ended on the bounds
    of (a, m). k in closed form, (a, m) from a grid, then Gauss-Newton with Levenberg's damping on the projected problem.
    """
    table, cells = _grid(base)
    u, m = cells[(histograms.astype(np.float32) @ table).argmax(axis=1)].T.copy()  # a = exp(u) - 1
    u, m, k = _refine(histograms, base, u, m)
    failed = np.zeros(len(u), dtype=bool)
    for value, bounds in ((u, U_BOUNDS), (m, M_BOUNDS)):
        failed |= (value <= bounds[0] + 1e-6) | (value >= bounds[1] - 1e-6)
    return np.stack([k, np.expm1(u), m], axis=1), k[:, None] * _shapes(base, u, m)[0], failed


# -- private: coefficients and digits -------------------------------------------------------------------------------


def _magnitudes(picture: NDArray[np.uint8], config: BenfordConfig) -> NDArray[np.float32]:
    """How often each |quantised coefficient| occurs: (Q, 9, LARGEST + 1)."""
    plane = middle(luma(picture), config.max_side)
    if min(plane.shape) < config.min_side:
        size = f"{plane.shape[1]}x{plane.shape[0]}"
        raise DataError(
            f"a picture of {size} pixels has too few blocks for first digits; {config.min_side} pixels are needed"
        )
    positions = COEFFICIENTS[config.order]
    values = np.abs(_coefficients(plane, positions))  # (blocks, 9)
    counts = np.empty((len(config.qualities), len(positions), LARGEST + 1), np.float32)
    lane = np.arange(len(positions)) * (LARGEST + 1)
    for i, quality in enumerate(config.qualities):
        steps = quantisation_table(quality).ravel()[list(positions)]
        levels = np.minimum((values / steps + 0.5).astype(np.int64), LARGEST)
        counts[i] = np.bincount((levels + lane).ravel(), minlength=counts[i].size).reshape(counts[i].shape)
    return counts


def _coefficients(plane: NDArray[np.uint8], positions: tuple[int, ...]) -> NDArray[np.float32]:
    height, width = plane.shape
    plane = np.pad(plane, ((0, -height % 8), (0, -width % 8)), mode="edge")
    rows, columns = plane.shape[0] // 8, plane.shape[1] // 8
    blocks = plane.reshape(rows, 8, columns, 8).transpose(0, 2, 1, 3).reshape(-1, 64)
    return (blocks.astype(np.float32) - 128) @ _dct(positions)


@functools.cache
def _dct(positions: tuple[int, ...]) -> NDArray[np.float32]:
    """(64, len(positions)): the columns of the orthonormal 8 x 8 DCT-II that are wanted."""
    i = np.arange(8)
    one = np.cos((2 * i[None, :] + 1) * i[:, None] * np.pi / 16) / 2
    one[0] /= np.sqrt(2)
    return np.kron(one, one)[list(positions)].T.astype(np.float32)


def _rounded(values: NDArray[np.floating]) -> NDArray[np.int64]:
    """Half away from zero, as libjpeg."""
    return np.trunc(values + np.copysign(0.5, values)).astype(np.int64)


@functools.cache
def _digit_table(base: int) -> NDArray[np.float32]:
    """(LARGEST + 1, base - 1): one where the magnitude has that first digit; the row of 0 is empty."""
    table = np.zeros((LARGEST + 1, base - 1), np.float32)
    for magnitude in range(1, LARGEST + 1):
        digit = magnitude
        while digit >= base:
            digit //= base
        table[magnitude, digit - 1] = 1
    return table


# -- private: the fit -----------------------------------------------------------------------------------------------

U_BOUNDS = (-12.0, 16.0)  # a = exp(u) - 1, from -0.999994 to 8.9 million
M_BOUNDS = (0.02, 20.0)
STEPS = 12  # of the refinement at most; most problems need 5


def _shapes(base: int, u: Floats, m: Floats) -> Floats:
    """log_base(1 + 1 / (a + d^m)) and its derivatives by u and m: (3, P, D)."""
    digits = _log_digits(base)
    power = np.exp(m[:, None] * digits)
    inner = np.expm1(u)[:, None] + power
    outer = inner + 1
    out = np.empty((3, *power.shape))
    np.log(outer / inner, out=out[0])
    out[0] *= 1 / np.log(base)
    common = -1 / np.log(base) / (inner * outer)
    np.multiply(common, np.exp(u)[:, None], out=out[1])
    np.multiply(common, power * digits, out=out[2])
    return out


@functools.cache
def _log_digits(base: int) -> Floats:
    return np.log(np.arange(1, base, dtype=np.float64))[None, :]


@functools.cache
def _grid(base: int) -> tuple[NDArray[np.float32], Floats]:
    """Unit-length shapes (D, G) over a grid of (u, m), and the grid (G, 2). The best k·shape has the largest product."""
    cells = np.stack(
        np.meshgrid(np.linspace(*U_BOUNDS, 57), np.geomspace(*M_BOUNDS, 33), indexing="ij"), axis=-1
    )
    cells = cells.reshape(-1, 2)
    shapes = _shapes(base, cells[:, 0], cells[:, 1])[0]
    return np.ascontiguousarray((shapes / np.linalg.norm(shapes, axis=1, keepdims=True)).T, np.float32), cells


def _products(y: Floats, base: int, u: Floats, m: Floats) -> Floats:
    """Inner products over the digits of (shape, d shape/du, d shape/dm, y): (P, 4, 4). All that a step needs."""
    vectors = np.concatenate([_shapes(base, u, m), y[None]]).transpose(1, 0, 2)
    return vectors @ vectors.transpose(0, 2, 1)


def _refine(y: Floats, base: int, u: Floats, m: Floats) -> tuple[Floats, Floats, Floats]:
    """Damped Gauss-Newton from (u, m), each problem for itself until it stands still; returns u, m, k."""
    u, m, gram = u.copy(), m.copy(), _products(y, base, u, m)
    damping, active = np.full(len(y), 1e-3), np.arange(len(y))
    for _ in range(STEPS):
        g = gram[active]
        step_u, step_m = _step(g, damping[active])
        new_u, new_m = np.clip(u[active] + step_u, *U_BOUNDS), np.clip(m[active] + step_m, *M_BOUNDS)
        new = _products(y[active], base, new_u, new_m)
        better, rows = _cost(new) < _cost(g), active
        moved = np.maximum(np.abs(new_u - u[rows]), np.abs(new_m - m[rows])) > 1e-5
        u[rows[better]], m[rows[better]], gram[rows[better]] = new_u[better], new_m[better], new[better]
        damping[rows] *= np.where(better, 0.2, 8)
        active = rows[moved]
        if not len(active):
            break
    return u, m, gram[:, 0, 3] / gram[:, 0, 0]


def _cost(gram: Floats) -> Floats:
    return gram[:, 3, 3] - gram[:, 0, 3] ** 2 / gram[:, 0, 0]


def _step(gram: Floats, damping: Floats) -> tuple[Floats, Floats]:
    """The step in (u, m) of the problem with k projected out (Kaufman 1975)."""
    ss, k = gram[:, 0, 0], gram[:, 0, 3] / gram[:, 0, 0]
    uu, um, mm = (
        k * k * (gram[:, i, j] - gram[:, 0, i] * gram[:, 0, j] / ss) for i, j in ((1, 1), (1, 2), (2, 2))
    )
    gu, gm = (k * (gram[:, i, 3] - k * gram[:, 0, i]) for i in (1, 2))
    uu, mm = uu * (1 + damping) + 1e-30, mm * (1 + damping) + 1e-30
    determinant = np.maximum(uu * mm - um * um, 1e-60)
    return np.clip((mm * gu - um * gm) / determinant, -4, 4), np.clip(
        (uu * gm - um * gu) / determinant, -4, 4
    )


# -- private: divergences -------------------------------------------------------------------------------------------


def _divergences(histograms: NDArray[np.float32], base: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Counts (P, D) -> symmetric divergences (P, 3) between density and fit, and which fits failed (P,)."""
    counts = histograms.astype(np.float64)
    total = counts.sum(axis=1)
    thin = total < MIN_COUNT
    observed = counts / np.maximum(total, 1)[:, None]
    _, fitted, failed = fit(np.where(thin[:, None], 1 / (base - 1), observed), base)
    fitted = np.maximum(fitted, 1e-12)
    result = np.stack([_kl(observed, fitted), *_power_divergences(observed, fitted)], axis=1)
    return np.where(thin[:, None], MISSING, result), failed | thin


def _kl(p: Floats, q: Floats) -> Floats:
    """Symmetric Kullback-Leibler in bits, both floored and normalised."""
    p, q = (np.maximum(x, FLOOR) for x in (p, q))
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    return ((p - q) * np.log2(p / q)).sum(axis=1)


def _power_divergences(p: Floats, q: Floats) -> tuple[Floats, Floats]:
    """Symmetric Rényi (bits) and Tsallis of order ALPHA; the fit is not normalised, as in the authors' code."""
    ratio = (p / q) ** ALPHA  # p^α q^(1-α) = q · ratio, and the other way round p / ratio, 0 where p is 0
    forward = (q * ratio).sum(axis=1)
    backward = (p / np.where(p > 0, ratio, 1)).sum(axis=1)
    forward, backward = np.maximum(forward, 1e-12), np.maximum(backward, 1e-12)
    renyi = (np.log2(forward) + np.log2(backward)) / (ALPHA - 1)
    return renyi, (forward + backward - 2) / (ALPHA - 1)
