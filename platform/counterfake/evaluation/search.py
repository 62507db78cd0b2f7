"""What a hyper-parameter search found, as one picture: a line per trial across its settings, and how much each setting mattered."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def search_plot(
    settings: Sequence[Mapping[str, Any]],
    values: Sequence[float | None],
    *,
    objective: str,
    maximise: bool = True,
    logarithmic: Sequence[str] = (),
    importance: Mapping[str, float] | None = None,
) -> bytes:
    """PNG: parallel coordinates of the trials, the best one thick, and bars of importance where given.

    settings: {dotted path: value} per trial; values: the objective, None for a trial without one (not drawn)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [
        (dict(row), float(v))
        for row, v in zip(settings, values, strict=True)
        if v is not None and math.isfinite(v)
    ]
    figure = Figure(figsize=(9, 4.5 if not importance else 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        2 if importance else 1, squeeze=False, height_ratios=[3, 1.5][: 2 if importance else 1]
    )
    _coordinates(panels[0, 0], done, objective, maximise, set(logarithmic))
    if importance:
        _bars(panels[1, 0], importance)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


# -- private --------------------------------------------------------------------------------------------------------


def _coordinates(
    axes: Any, done: list[tuple[dict[str, Any], float]], objective: str, maximise: bool, logarithmic: set[str]
) -> None:
    from matplotlib import colormaps

    names = list(done[0][0]) if done else []
    scores = np.array([score for _, score in done])
    columns = [_axis([row[name] for row, _ in done], name in logarithmic) for name in names]
    height = (
        np.stack([*(c for c, _ in columns), _axis(list(scores), False)[0]], axis=1)
        if done
        else np.zeros((0, 1))
    )
    order = np.argsort(scores if maximise else -scores)
    for rank, i in enumerate(order):
        best = rank == len(order) - 1
        color = colormaps["viridis"](rank / max(1, len(order) - 1))
        axes.plot(height[i], color=color, linewidth=3 if best else 1, alpha=1 if best else 0.6)
    for x, (_, ends) in enumerate([*columns, _axis(list(scores), False)] if done else []):
        axes.axvline(x, color="0.7", linewidth=0.8)
        for y, text in zip((-0.04, 1.04), ends, strict=True):
            axes.text(x, y, text, ha="center", va="top" if y < 0 else "bottom", fontsize=8)
    axes.set_xticks(range(len(names) + 1), [*(_short(name) for name in names), objective])
    axes.tick_params(axis="x", length=0, pad=14)
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(f"{len(done)} trials; the best {objective} is the thick line", fontsize=10, pad=18)


def _axis(values: list[Any], logarithmic: bool) -> tuple[NDArray[np.float64], tuple[str, str]]:
    """Heights in [0, 1] and the words at both ends; words are spread in their sorted order."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        scale = np.log if logarithmic else np.asarray
        numbers = np.asarray(scale(np.asarray(values, dtype=np.float64)), dtype=np.float64)
        ends = (f"{min(values):.3g}", f"{max(values):.3g}")
    else:
        words = sorted({str(v) for v in values})
        numbers = np.array([words.index(str(v)) for v in values], dtype=np.float64)
        ends = (words[0], words[-1])
    span = numbers.max() - numbers.min()
    return (numbers - numbers.min()) / span if span > 0 else np.full(len(values), 0.5), ends


def _bars(axes: Any, importance: Mapping[str, float]) -> None:
    names = sorted(importance, key=lambda name: importance[name])
    axes.barh([_short(name) for name in names], [importance[name] for name in names], color="#31688e")
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the objective's variance explained", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _short(path: str) -> str:
    return ".".join(path.split(".")[-2:])
