"""Benford features of decoded pictures: counterfake.forensics.benford against the same measures in a loop, fitted by SciPy.

The reference goes over quality, base and coefficient as the description of the method does: quantised coefficients, first
digits, a histogram, `scipy.optimize.curve_fit` of k log_b(1 + 1 / (a + d^m)), three divergences. A round is one call of
`batch_size` pictures for ours, one picture for the reference. Both run in as many threads as numpy is given.
The two searches differ, so features differ where the law does not fit: `agreement` says in how many they are close.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.harness import Contestant, Spec

UNIT = "pictures/s"
LIMIT = ""
NEEDS: dict[str, tuple[str, ...]] = {}
CLOSE = 0.02  # of a divergence: absolute, or relative to the reference
COMPARED = 2  # pictures whose features are compared


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """Procedural faces that went through JPEG once."""
    from counterfake import media
    from counterfake.sources.synthetic import portrait

    path = folder / f"pictures-{job.size}-{job.pictures}.npy"
    if not path.exists():
        faces = (media.encode(portrait(0, i, 0, job.size).pixels, "jpeg", 92) for i in range(job.pictures))
        np.save(path, np.stack([media.decode_trusted(data) for data in faces]))
    return {"pictures": str(path)}


def conclusions(facts: dict[str, Any]) -> dict[str, Any]:
    found = {name: np.array(runs[0]["features"]) for name, runs in facts.items()}
    if len(found) < 2:
        return {}
    ours, reference = found["counterfake"][:, : -len(_config().bases)], found["curve-fit-loop"]
    close = np.abs(ours - reference) <= CLOSE * np.maximum(1, np.abs(reference))
    return {
        "agreement": {"close": round(float(close.mean()), 4), "within": CLOSE, "features": int(ours.shape[1])}
    }


def _counterfake(spec: Spec) -> Contestant:
    from counterfake.forensics.benford import features_of

    pictures, config = list(_pictures(spec)), _config()
    position = 0

    def batch() -> int:
        nonlocal position
        chosen = [pictures[(position + i) % len(pictures)] for i in range(spec.batch_size)]
        position += spec.batch_size
        return len(features_of(chosen, config))

    return Contestant(batch, facts=lambda: {"features": features_of(pictures[:COMPARED], config).tolist()})


def _curve_fit_loop(spec: Spec) -> Contestant:
    pictures = list(_pictures(spec))
    done: list[Any] = []

    def one() -> int:
        done.append(reference_features(pictures[len(done) % len(pictures)]))
        return 1

    def facts() -> dict[str, Any]:
        while len(done) < COMPARED:
            one()
        return {"features": np.stack(done[:COMPARED]).tolist()}

    return Contestant(one, warmup=0, facts=facts)


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "counterfake": _counterfake,
    "curve-fit-loop": _curve_fit_loop,
}


def reference_features(pixels: Any) -> Any:
    """(H, W, 3) uint8 -> the 540 divergences, in the order of BenfordConfig.names(), one fit after the other."""
    from counterfake.forensics.benford import COEFFICIENTS, luma, quantised

    config, plane = _config(), luma(pixels)
    values = []
    for base in config.bases:
        for quality in config.qualities:
            coefficients = quantised(plane, quality, COEFFICIENTS[config.order])
            for column in coefficients.T:
                values += _divergences(first_digits(np.abs(column), base), base)
    return np.array(values)


def first_digits(magnitudes: Any, base: int) -> Any:
    """The leading digit in this base of every magnitude that is not 0."""
    found = []
    for magnitude in magnitudes.tolist():
        while magnitude >= base:
            magnitude //= base
        if magnitude:
            found.append(magnitude)
    return np.array(found, dtype=np.int64)


def _divergences(digits: Any, base: int) -> list[float]:
    from scipy.optimize import curve_fit

    from counterfake.forensics.benford import ALPHA, FLOOR, MIN_COUNT, MISSING

    if len(digits) < MIN_COUNT:
        return [MISSING] * 3
    places = np.arange(1, base, dtype=np.float64)
    observed = np.bincount(digits, minlength=base)[1:] / len(digits)

    def law(d: Any, k: float, a: float, m: float) -> Any:
        return k * np.log1p(1 / (a + d**m)) / np.log(base)

    bounds = ([0, -0.998, 0.02], [np.inf, 1e7, 20])
    try:
        parameters, _ = curve_fit(law, places, observed, p0=(1.0, 0.0, 1.0), bounds=bounds, maxfev=500)
    except RuntimeError:  # it did not converge
        return [MISSING] * 3
    fitted = np.maximum(law(places, *parameters), 1e-12)
    p, q = (np.maximum(x, FLOOR) / np.maximum(x, FLOOR).sum() for x in (observed, fitted))
    kl = ((p - q) * np.log2(p / q)).sum()
    forward = max((observed**ALPHA * fitted ** (1 - ALPHA)).sum(), 1e-12)
    backward = max((fitted**ALPHA * observed ** (1 - ALPHA)).sum(), 1e-12)
    renyi = (np.log2(forward) + np.log2(backward)) / (ALPHA - 1)
    return [kl, renyi, (forward + backward - 2) / (ALPHA - 1)]


def _config() -> Any:
    from counterfake.forensics.benford import BenfordConfig

    return BenfordConfig()


def _pictures(spec: Spec) -> Any:
    return np.load(spec.inputs["pictures"], allow_pickle=False)
