"""Plots as PNG bytes and one self-contained HTML page: no script, no font, no picture from elsewhere.

A page is a list of sections, a section a list of blocks (Text, KeyFigures, Table, Pictures, Json). Everything that is not
Text's own markup is escaped. Colours: one for real, one for fake, in every plot and table.
"""

from __future__ import annotations

import base64
import dataclasses
import html as escaping
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterfake.evaluation import detection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REAL, FAKE, INK, FAINT = "#2a7f9e", "#d1603d", "#2b2f36", "#c9ced6"
SERIES = (REAL, FAKE, "#6b5ca5", "#3b8f5a", "#b58a1b", "#8a8f98")
DPI = 144


# -- plots ----------------------------------------------------------------------------------------------------------


def roc_plot(
    fake: ArrayLike,
    probability: ArrayLike,
    *,
    auc: Mapping[str, Any] | None = None,
    title: str = "ROC",
    least: int = 1,
) -> bytes:
    """Recall on fakes over false accusations, with the equal-error point. auc: the metric with its interval.

    least above 1: no corner of the curve shows a single row; it is drawn through 41 fixed rates.
    """
    fpr, tpr, _ = detection.roc(fake, probability)
    area = auc or {"value": float(np.trapezoid(tpr, fpr))}
    fpr, tpr = _coarse(fpr, tpr) if least > 1 else (fpr, tpr)
    figure, axes = _axes(title, "real pictures called fake", "fakes found")
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    axes.plot([0, 1], [1, 0], color=FAINT, linewidth=0.6, linestyle=(0, (2, 3)))
    axes.plot(fpr, tpr, color=FAKE, linewidth=2, clip_on=False)
    axes.fill_between(fpr, tpr, color=FAKE, alpha=0.07, linewidth=0)
    text = f"AUC {area['value']:.3f}"
    if area.get("low") is not None:
        text += f"\n95 % interval {area['low']:.3f} to {area['high']:.3f}"
    axes.text(0.97, 0.05, text, ha="right", va="bottom", transform=axes.transAxes, color=INK)
    _unit(axes)
    return _png(figure)


def det_plot(
    fake: ArrayLike,
    probability: ArrayLike,
    *,
    eer: Mapping[str, Any] | None = None,
    title: str = "DET",
    least: int = 1,
) -> bytes:
    """Misses over false accusations on normal-deviate axes, where two normal classes give a straight line.

    Martin et al. 1997, "The DET curve in assessment of detection task performance". Ends at 0.1 % and 99.9 %."""
    fpr, miss = detection.det(fake, probability)
    fpr, miss = _coarse(fpr, miss) if least > 1 else (fpr, miss)
    figure, axes = _axes(title, "real pictures called fake, %", "fakes missed, %")
    low, high = _deviate(0.001), _deviate(0.999)
    axes.plot([low, high], [low, high], color=FAINT, linewidth=0.6, linestyle=(0, (2, 3)))
    axes.plot(_deviate(fpr), _deviate(miss), color=FAKE, linewidth=2)
    if eer and eer.get("value") is not None:
        axes.text(0.97, 0.95, f"EER {100 * eer['value']:.1f} %", ha="right", va="top", transform=axes.transAxes, color=INK)  # fmt: skip
    ticks = [0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99]
    names = [f"{100 * tick:g}" for tick in ticks]
    axes.set(
        xlim=(low, high), ylim=(low, high), aspect="equal", xticks=_deviate(ticks), yticks=_deviate(ticks)
    )
    axes.set_xticklabels(names)
    axes.set_yticklabels(names)
    return _png(figure)


def reliability_plot(
    fake: ArrayLike, probability: ArrayLike, *, title: str = "Reliability", least: int = 1
) -> bytes:
    """Share of fakes over stated probability; dot area follows the number of pictures in the bin, of `least` at least."""
    bins = detection.reliability(fake, probability, least=least)
    figure, axes = _axes(title, "stated probability of fake", "share that is fake")
    count = np.array(bins["count"])
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    axes.vlines(bins["probability"], bins["probability"], bins["share"], color=FAINT, linewidth=1)
    axes.scatter(
        bins["probability"],
        bins["share"],
        s=16 + 220 * count / count.max(initial=1),
        color=FAKE,
        alpha=0.85,
        linewidth=0,
        clip_on=False,
    )
    _unit(axes)
    return _png(figure)


def score_histogram(
    fake: ArrayLike,
    probability: ArrayLike,
    *,
    threshold: float | None = None,
    title: str = "Scores",
    least: int = 1,
) -> bytes:
    """How many real pictures and fakes get which probability; bars of fewer than `least` pictures are left out."""
    counts = detection.histogram(fake, probability, least=least)
    figure, axes = _axes(title, "probability of fake", "pictures")
    for name, colour in (("real", REAL), ("fake", FAKE)):
        edges = np.linspace(0, 1, len(counts[name]) + 1)
        axes.stairs(counts[name], edges, color=colour, alpha=0.6, label=name, fill=True)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1)
    axes.set_box_aspect(1)
    _legend(axes)
    return _png(figure)


def heatmap_plot(
    rows: Sequence[tuple[str, Sequence[tuple[str, float | None]]]],
    *,
    title: str,
    low: float = 0.5,
    columns: Sequence[str] = (),
) -> bytes:
    """Rows of cells (small print, value), coloured from `low` (orange) to 1 (blue); None is grey. columns: names above."""
    most = max(len(cells) for _, cells in rows)
    figure, axes = _axes(title, "", "", square=False)
    wide = max(len(name) for name, _ in rows)
    figure.set_size_inches(1.2 + 0.09 * wide + 1.25 * most, 0.9 + 0.55 * len(rows))
    for y, (_, cells) in enumerate(rows):
        for x, (name, value) in enumerate(cells):
            _heat_cell(axes, x, y, name, value, low)
    axes.set(xlim=(0, most), ylim=(len(rows), 0), yticks=[y + 0.5 for y in range(len(rows))], xticks=[])
    axes.set_yticklabels([name for name, _ in rows])
    if columns:
        axes.set_xticks([x + 0.5 for x in range(most)], columns)
        axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return _png(figure)


def confusion_plot(
    fake: ArrayLike, probability: ArrayLike, *, threshold: float = 0.5, title: str = "Confusion"
) -> bytes:
    """Counts and shares of truth against answer at the threshold."""
    counts = np.array(detection.confusion(fake, probability, threshold))
    shares = counts / counts.sum(axis=1, keepdims=True)
    figure, axes = _axes(title, "answer", "truth")
    for row, colour in enumerate((REAL, FAKE)):
        for column in range(2):
            patch = {
                "color": colour if row == column else INK,
                "alpha": 0.1 + 0.75 * shares[row, column],
                "linewidth": 0,
            }
            axes.fill_between([column + 0.02, column + 0.98], 1.02 - row, 1.98 - row, **patch)
            ink = "white" if shares[row, column] > 0.8 else INK
            text = f"{counts[row, column]:,}\n{100 * shares[row, column]:.1f} %"
            axes.text(column + 0.5, 1.5 - row, text, ha="center", va="center", fontsize=13, color=ink)
    axes.set(aspect="equal", xlim=(0, 2), ylim=(0, 2), xticks=[0.5, 1.5], yticks=[1.5, 0.5])
    axes.set_xticklabels(["real", "fake"])
    axes.set_yticklabels(["real", "fake"])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return _png(figure)


def curves_plot(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str = "step",
    y: str = "",
    title: str = "",
    log: bool = False,
) -> bytes:
    """One line per name through its (x, y) points; a legend where there are several."""
    figure, axes = _axes(title, x, y, square=False)
    for i, (name, points) in enumerate(curves.items()):
        line = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        axes.plot(
            line[:, 0],
            line[:, 1],
            color=SERIES[i % len(SERIES)],
            linewidth=1.6,
            label=name,
            marker=_marker(line),
        )
    if log:
        axes.set_yscale("log")
    if len(curves) > 1:
        _legend(axes)
    return _png(figure)


def detection_plots(
    fake: ArrayLike, probability: ArrayLike, evaluation: Mapping[str, Any], *, least: int = 1
) -> dict[str, bytes]:
    """The five plots of one evaluation, by file name without ending. least: rows below which nothing of a bin is shown."""
    threshold = float(evaluation["threshold"])
    return {
        "roc": roc_plot(fake, probability, auc=evaluation["auc"], least=least),
        "det": det_plot(fake, probability, eer=evaluation["eer"], least=least),
        "scores": score_histogram(fake, probability, threshold=threshold, least=least),
        "reliability": reliability_plot(fake, probability, least=least),
        "confusion": confusion_plot(fake, probability, threshold=threshold),
    }


# -- blocks of a page -----------------------------------------------------------------------------------------------


class Block(Protocol):
    """Anything that writes itself as HTML."""

    def html(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Text:
    """Paragraphs, cut at empty lines. `code` and **strong** are the only markup."""

    text: str

    def html(self) -> str:
        parts = (escaping.escape(part) for part in re.split(r"\n\s*\n", self.text.strip()))
        return "".join(f"<p>{_inline(part)}</p>" for part in parts)


@dataclasses.dataclass(frozen=True)
class KeyFigures:
    """Large numbers side by side: (label, value, small print)."""

    figures: Sequence[tuple[str, str, str]]

    def html(self) -> str:
        cells = (
            f"<div><dt>{_e(label)}</dt><dd>{_e(value)}</dd><small>{_e(note)}</small></div>"
            for label, value, note in self.figures
        )
        return f'<dl class="figures">{"".join(cells)}</dl>'


@dataclasses.dataclass(frozen=True)
class Table:
    """Head and rows. Numbers are set right-aligned in tabular figures; floats show three decimals."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def html(self) -> str:
        right = [
            bool(self.rows) and all(_numeric(row[i]) for row in self.rows) for i in range(len(self.head))
        ]
        head = "".join(f"<th{_align(r)}>{_e(cell)}</th>" for cell, r in zip(self.head, right, strict=True))
        rows = (
            "<tr>"
            + "".join(f"<td{_align(r)}>{_e(_cell(cell))}</td>" for cell, r in zip(row, right, strict=True))
            + "</tr>"
            for row in self.rows
        )
        caption = f"<caption>{_e(self.caption)}</caption>" if self.caption else ""
        return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


@dataclasses.dataclass(frozen=True)
class Pictures:
    """(caption, PNG, JPEG or WEBP bytes) in a grid. size: small for samples, pairs for two side by side,
    wide for plots, full for one big picture."""

    pictures: Sequence[tuple[str, bytes]]
    size: str = "wide"
    pixelated: bool = False  # enlarge small pictures without smoothing

    def html(self) -> str:
        sharp = ' class="sharp"' if self.pixelated else ""
        items = (
            f'<figure><img{sharp} alt="{_e(caption)}" src="{data_uri(data)}">{_caption(caption)}</figure>'
            for caption, data in self.pictures
        )
        return f'<div class="pictures {_e(self.size)}">{"".join(items)}</div>'


@dataclasses.dataclass(frozen=True)
class Json:
    """A value as indented JSON, folded away."""

    title: str
    value: Any
    open: bool = False

    def html(self) -> str:
        text = json.dumps(self.value, indent=2, ensure_ascii=False, default=str)
        unfolded = " open" if self.open else ""
        return f"<details{unfolded}><summary>{_e(self.title)}</summary><pre><code>{_e(text)}</code></pre></details>"


@dataclasses.dataclass(frozen=True)
class Code:
    """Text as it is typed: commands, logs."""

    text: str

    def html(self) -> str:
        return f"<pre><code>{_e(self.text)}</code></pre>"


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]


def html(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """The whole page. It opens from a file, an e-mail or MLflow's artefact view alike."""
    names = [f"s{i}" for i in range(len(sections))]
    links = "".join(f'<a href="#{n}">{_e(s.title)}</a>' for n, s in zip(names, sections, strict=True))
    nav = f"<nav>{links}</nav>" if len(sections) > 2 else ""
    body = "".join(
        f'<section id="{n}"><h2>{_e(s.title)}</h2>{"".join(block.html() for block in s.blocks)}</section>'
        for n, s in zip(names, sections, strict=True)
    )
    lead = f'<p class="lead">{_inline(_e(subtitle))}</p>' if subtitle else ""
    return _PAGE.format(title=_e(title), style=_STYLE, lead=lead, nav=nav, body=body)


def metric_rows(evaluation: Mapping[str, Any], names: Mapping[str, str]) -> list[list[str]]:
    """[title, value, low, high] for each metric that the evaluation has; for Table."""
    found = [
        (title, evaluation[key]) for key, title in names.items() if isinstance(evaluation.get(key), Mapping)
    ]
    return [[title, *(_cell(metric.get(end)) for end in ("value", "low", "high"))] for title, metric in found]


def group_rows(members: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """[name, n, AUC, recall real, recall fake] of one table of `groups`, each figure with its 95 % interval; a dash where it is
    not defined."""
    keys = ("auc", "recall_real", "recall_fake")
    return [[name, str(row["n"]), *(_ranged(row.get(key)) for key in keys)] for name, row in members.items()]


def data_uri(data: bytes) -> str:
    """Picture bytes as a data: URI."""
    kind = "png" if data[:4] == b"\x89PNG" else "webp" if data[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# -- private --------------------------------------------------------------------------------------------------------


def _axes(title: str, x: str, y: str, *, square: bool = True) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # no pyplot: no global state, so plots can be drawn in threads

    figure = Figure(figsize=(4.2, 4.2) if square else (5.6, 3.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=10)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, color=FAINT)
    axes.grid(color=FAINT, alpha=0.35, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _coarse(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A rising curve through 41 evenly spread places."""
    places = np.linspace(0, 1, 41)
    return places, np.interp(places, x, y)


def _deviate(share: ArrayLike) -> Any:
    """Normal deviate of a share, held within 0.1 % and 99.9 %."""
    inverse = np.vectorize(statistics.NormalDist().inv_cdf, otypes=[np.float64])
    return inverse(np.clip(share, 0.001, 0.999))


def _heat_cell(axes: Axes, x: int, y: int, name: str, value: float | None, low: float) -> None:
    share = 0.0 if value is None else float(np.clip((value - low) / (1 - low), 0, 1))
    colour = [(1 - share) * a + share * b for a, b in zip(_rgb(FAKE), _rgb(REAL), strict=True)]
    place = ([x + 0.03, x + 0.97], y + 0.05, y + 0.95)
    if value is None:
        axes.fill_between(*place, linewidth=0, color=FAINT, alpha=0.25)
    else:
        axes.fill_between(*place, linewidth=0, color=colour, alpha=0.85)
    text = "–" if value is None else f"{value:.3f}"
    ink = INK if value is None else "white"
    axes.text(
        x + 0.5, y + (0.5 if not name else 0.62), text, ha="center", va="center", color=ink, fontsize=10
    )
    if name:
        axes.text(x + 0.5, y + 0.28, name, ha="center", va="center", color=ink, fontsize=7.5)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _unit(axes: Axes) -> None:
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xticks=ticks, yticks=ticks, aspect="equal")
    axes.set_xticklabels(["0", "¼", "½", "¾", "1"])
    axes.set_yticklabels(["0", "¼", "½", "¾", "1"])


def _legend(axes: Axes) -> None:
    axes.legend(
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.2,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
    )


def _marker(line: Any) -> str | None:
    return "o" if len(line) < 3 else None


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _caption(text: str) -> str:
    return f"<figcaption>{_e(text)}</figcaption>" if text else ""


def _e(value: Any) -> str:
    return escaping.escape(str(value), quote=True)


def _inline(escaped: str) -> str:
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)


def _numeric(value: Any) -> bool:
    return (
        value is None or re.fullmatch(r"[-+]?[\d,  ]*\.?\d*(e[-+]?\d+)?\s?[%×]?|–", _cell(value)) is not None
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _ranged(metric: Mapping[str, Any] | None) -> str:
    """ "0.912 (0.880 to 0.940)", the value alone without resamples, or a dash."""
    if not metric or metric.get("value") is None:
        return _cell(None)
    low, high = metric.get("low"), metric.get("high")
    return _cell(metric["value"]) + (
        "" if low is None or high is None else f" ({_cell(low)} to {_cell(high)})"
    )


def _align(right: bool) -> str:
    return ' class="n"' if right else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>
<body><main><header><h1>{title}</h1>{lead}{nav}</header>{body}</main></body></html>
"""
_STYLE = """
:root{--paper:#fbfaf8;--card:#fff;--ink:#23262c;--soft:#666d78;--line:#e3e1dc;--accent:#b8492a;--code:#f2f0ec}
@media(prefers-color-scheme:dark){:root{--paper:#16181c;--card:#1e2126;--ink:#e4e6ea;--soft:#9aa1ad;--line:#30343b;--accent:#ef8a68;--code:#22262c}
.wide img,.full img{filter:invert(.9) hue-rotate(180deg)}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
main{max-width:62rem;margin:0 auto;padding:3.5rem 1.5rem 6rem}
h1{font-size:clamp(1.7rem,4vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .5rem;text-wrap:balance}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 .8rem}
.lead{color:var(--soft);font-size:1.08rem;max-width:44rem;margin:.2rem 0 1.2rem}
p{max-width:44rem;margin:.6rem 0}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;padding:.8rem 0;border-block:1px solid var(--line);font-size:.92rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
section{padding-top:2.4rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.8rem;margin:1rem 0}
.figures>div{background:var(--card);border:1px solid var(--line);border-radius:.7rem;padding:.8rem 1rem}
dt{color:var(--soft);font-size:.85rem}dd{margin:.1rem 0 0;font-size:1.65rem;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
small{color:var(--soft);font-size:.8rem;line-height:1.3;display:block}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.94rem;font-variant-numeric:tabular-nums;min-width:min(100%,26rem)}
caption{text-align:left;color:var(--soft);font-size:.88rem;padding-bottom:.4rem}
th,td{text-align:left;padding:.38rem 1.4rem .38rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:.85rem;border-bottom-color:var(--soft)}.n{text-align:right}
.pictures{display:grid;gap:1.1rem;margin:1.2rem 0;align-items:start}
.pairs{grid-template-columns:repeat(auto-fill,minmax(min(100%,13rem),1fr))}
.small{grid-template-columns:repeat(auto-fill,minmax(7.5rem,1fr))}.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr))}
.samples{grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr))}
figure{margin:0}img{display:block;max-width:100%;width:100%;height:auto;border-radius:.5rem}
.wide img,.full img{background:#fff}.full img{max-width:46rem}.sharp{image-rendering:pixelated}
figcaption{color:var(--soft);font-size:.84rem;line-height:1.35;padding-top:.35rem;overflow-wrap:anywhere}
code{font:.88em ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;background:var(--code);border-radius:.25rem;padding:.1em .3em}
pre{background:var(--code);border-radius:.6rem;padding:1rem;overflow-x:auto;line-height:1.45}pre code{padding:0;background:none}
details{border:1px solid var(--line);border-radius:.6rem;margin:.8rem 0;background:var(--card)}
summary{cursor:pointer;padding:.6rem 1rem;font-weight:500}details pre{margin:0;border-radius:0 0 .6rem .6rem;max-height:34rem}
@media print{main{padding:0}nav{display:none}details{break-inside:avoid}}
"""
