"""How good face swaps are: pure functions of pictures, embeddings, parameters, masks and scores, each citing its definition.

A swap shows the target person with the pose and expression of the source. So it is right in three ways: it is taken for
the target (`retrieval`), it moves like the source (`agreement`), and it stays still where the source does (`Flicker`).
Who looks at the pictures for these figures is evaluation/reading.py. Letters: N pictures, I people, D features,
K parameters, P points, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from counterfake.errors import DataError
from counterfake.learners.swap_losses import ssim

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

WINDOW = 11  # pixels of the SSIM window, less in smaller pictures
GREY, SPREAD = 128, 40  # of what a reader of the face alone is shown
AT_ONCE = 64  # pictures whose SSIM is taken at a time


def reconstruction(made: Pixels, wanted: Pixels) -> dict[str, float]:
    """{"ssim", "mae"} of made against wanted (N, H, W, 3) uint8; the error is a share of the full range.

    SSIM: Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, Gaussian window, over RGB channels."""
    if made.shape != wanted.shape or made.ndim != 4 or not len(made):
        raise DataError(
            f"pictures of shapes {made.shape} and {wanted.shape} cannot be compared; give (N, H, W, 3) alike"
        )
    side = min(made.shape[1:3])
    window = min(WINDOW, side - 1 + side % 2)
    likeness = [
        ssim(_unit(made[i : i + AT_ONCE]), _unit(wanted[i : i + AT_ONCE]), window).double().numpy()
        for i in range(0, len(made), AT_ONCE)
    ]
    error = np.abs(made.astype(np.float64) - wanted).mean() / 255
    return {"ssim": float(np.concatenate(likeness).mean()), "mae": float(error)}


# -- identity -------------------------------------------------------------------------------------------------------


def face_only(faces: Pixels, mask: ArrayLike) -> Pixels:
    """faces (N, H, W, 3) with everything outside mask (H, W) in [0, 1] grey, and each channel of mean 128 and deviation
    40 under it.

    What a swap leaves to its source by design, hair, ears, background and the colour of the skin, cannot name it."""
    weight = np.asarray(mask, np.float64)[:, :, None]
    share = weight / weight.sum().clip(min=1e-9)
    rows = []
    for face in np.asarray(faces, np.float64):
        apart = face - (face * share).sum(axis=(0, 1))
        deviation = np.sqrt((np.square(apart) * share).sum(axis=(0, 1))).clip(min=1.0)
        rows.append(np.rint(GREY + SPREAD * weight * apart / deviation).clip(0, 255).astype(np.uint8))
    return np.stack(rows)


def centroids(embeddings: ArrayLike, identity: ArrayLike, people: int) -> Floats:
    """(I, D) mean direction of each person's embeddings (N, D). Raises DataError for a person without pictures."""
    rows, who = _directions(np.asarray(embeddings, np.float64)), np.asarray(identity)
    missing = sorted(set(range(people)) - set(who.tolist()))
    if missing:
        raise DataError(f"person {missing[0]} has no picture to be recognised by; give at least one of each")
    return _directions(np.stack([rows[who == person].mean(axis=0) for person in range(people)]))


def nearest(embeddings: ArrayLike, gallery: Floats) -> NDArray[np.int64]:
    """(N,) the person of the gallery (I, D) whose direction is nearest to each embedding (N, D)."""
    found = _directions(np.asarray(embeddings, np.float64)) @ gallery.T
    return np.asarray(found.argmax(axis=1), np.int64)


def retrieval(named: ArrayLike, target: ArrayLike, source: ArrayLike, people: int) -> dict[str, float]:
    """Top-1 identity retrieval: shares of swaps (N,) named as the target, as the source, as somebody else.

    A source that is not in the gallery has number -1 and is never named."""
    who, wanted, own = (np.asarray(values) for values in (named, target, source))
    if not len(who):
        raise DataError("there is no swap to recognise")
    right, left = float((who == wanted).mean()), float((who == own).mean())
    return {"target": right, "source": left, "other": 1 - right - left, "chance": 1 / people, "n": len(who)}


# -- pose and expression --------------------------------------------------------------------------------------------


def agreement(read: ArrayLike, truth: ArrayLike, names: Sequence[str]) -> dict[str, float]:
    """Pearson's r of each parameter read from pictures (N, K) with its truth (N, K), and their mean as "mean".

    A parameter that never changes says nothing and is left out."""
    seen, known = (np.asarray(values, np.float64) for values in (read, truth))
    if seen.shape != known.shape or len(seen) < 3:
        raise DataError(f"agreement needs at least 3 rows alike, got shapes {seen.shape} and {known.shape}")
    found = {
        name: _pearson(seen[:, k], known[:, k]) for k, name in enumerate(names) if np.ptp(known[:, k]) > 0
    }
    return {**found, "mean": float(np.mean(list(found.values()))) if found else math.nan}


def landmark_error(made: ArrayLike, source: ArrayLike) -> float:
    """Mean distance of points made from points of the source, both (N, P, 2), the two eyes first, over the source's
    distance of the eyes: the normalised mean error of face alignment."""
    ours, theirs = np.asarray(made, np.float64), np.asarray(source, np.float64)
    if ours.shape != theirs.shape or not len(ours):
        raise DataError(f"points of shapes {ours.shape} and {theirs.shape} cannot be compared")
    apart = np.linalg.norm(theirs[:, 1] - theirs[:, 0], axis=1).clip(min=1e-9)
    return float((np.linalg.norm(ours - theirs, axis=2).mean(axis=1) / apart).mean())


def mask_iou(masks: ArrayLike, truth: ArrayLike, threshold: float = 0.5) -> float:
    """Mean over pictures of intersection over union of masks (N, H, W) above the threshold with the truth; two empty
    ones agree."""
    ours, theirs = (np.asarray(values) > threshold for values in (masks, truth))
    both, either = ((f(ours, theirs)).sum(axis=(1, 2)) for f in (np.logical_and, np.logical_or))
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())


# -- time -----------------------------------------------------------------------------------------------------------


class Flicker:
    """Mean absolute difference of a face from one frame to the next, in the swap and in the original.

    Both are cut out by the same stabilised window, so that what moves the face through the picture does not count. The
    ratio is 1 for a swap that changes as much as its original, more for one that trembles. Memory: one pair of frames."""

    def __init__(self) -> None:
        self.steps, self._sums = 0, np.zeros(2)
        self._last: tuple[Pixels, Pixels] | None = None

    def add(self, original: Pixels, made: Pixels) -> None:
        """The face (h, w, 3) uint8 in the next frame of both."""
        if self._last is not None:
            pairs = zip(self._last, (original, made), strict=True)
            self._sums += [np.abs(new.astype(np.int16) - old).mean() for old, new in pairs]
            self.steps += 1
        self._last = (original, made)

    def cut(self) -> None:
        """The face was not seen: the next frame has no neighbour."""
        self._last = None

    def figures(self) -> dict[str, float | None]:
        """{"original", "made"} in shares of the full range, and "ratio"; None where nothing moved or nothing was seen."""
        if not self.steps:
            return {"original": None, "made": None, "ratio": None}
        original, made = (float(value) for value in self._sums / self.steps / 255)
        return {"original": original, "made": made, "ratio": made / original if original > 0 else None}


# -- detectors ------------------------------------------------------------------------------------------------------


def evasion(probabilities: ArrayLike, threshold: float) -> dict[str, float]:
    """Share of swaps that a detector does not call fake at its threshold, with a 95 % interval (Wilson 1927); NaN scores
    are no answers and not counted."""
    scores = np.asarray(probabilities, np.float64)
    answered = scores[np.isfinite(scores)]
    if not len(answered):
        raise DataError("the detector answered for none of the swaps; choose one that reads such pictures")
    n, share = len(answered), float((answered < threshold).mean())
    low, high = _wilson(share, n)
    return {
        "value": share,
        "low": low,
        "high": high,
        "n": n,
        "unanswered": len(scores) - n,
        "threshold": threshold,
    }


def served_evasion(words: Sequence[str]) -> dict[str, float]:
    """Share of swaps (N,) that a served ensemble does not call fake: its verdict is real, uncertain or no_verdict.

    With a 95 % interval and how often each word was said."""
    if not words:
        raise DataError("there is no swap to judge")
    n, share = len(words), 1 - list(words).count("fake") / len(words)
    low, high = _wilson(share, n)
    said = {word: list(words).count(word) for word in ("fake", "real", "uncertain", "no_verdict")}
    return {"value": share, "low": low, "high": high, "n": n, **said}


# -- private --------------------------------------------------------------------------------------------------------


def _unit(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255


def _directions(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12), np.float64)


def _pearson(a: Floats, b: Floats) -> float:
    """r; 0 where `a` never changes."""
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b / spread) if spread > 1e-12 else 0.0


def _wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - reach), min(1.0, middle + reach)
