"""Plots are PNGs; the page is self-contained, escaped and complete."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from counterfake.evaluation import detection, report
from counterfake.evaluation.card import METRICS, model_card
from counterfake.evaluation.report import Code, Json, KeyFigures, Pictures, Section, Table, Text

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Raises on a tag that is closed in the wrong order; keeps what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.fixture
def judged() -> tuple[np.ndarray, np.ndarray, dict]:
    rng = np.random.default_rng(0)
    fake = rng.integers(0, 2, 200)
    p = np.clip(0.5 + 0.5 * (fake - 0.5) + rng.normal(0, 0.2, 200), 0, 1)
    makers = np.where(fake, rng.choice(["gan", "swap"], 200), "camera")
    return fake, p, detection.evaluate(fake, p, groups={"maker": makers.tolist()}, bootstraps=50)


def test_plots_are_pictures(judged: tuple[np.ndarray, np.ndarray, dict]) -> None:
    plots = report.detection_plots(*judged)
    curves = report.curves_plot(
        {"loss": [(0, 2.0), (1, 1.0), (2, 0.5)], "one": [(1, 1.0)]}, y="loss", log=True
    )
    assert set(plots) == {"roc", "det", "scores", "reliability", "confusion"}
    heat = report.heatmap_plot([("a", [("home", 0.9), ("", None)])], title="Heat", columns=["x", "y"])
    for data in [*plots.values(), curves, heat]:
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert plots == report.detection_plots(*judged)  # same numbers, same bytes


def page(png: bytes) -> str:
    blocks = [
        Text("One `code` and **strong**.\n\nTwo <b>not bold</b>."),
        KeyFigures([("AUC", "0.93", "0.90 to 0.95")]),
        Table(["name", "n", "auc"], [["<gan>", 1234, 0.98765], ["swap", 7, None]], caption="By maker"),
        Pictures([('a "quoted" caption', png)]),
        Json("verdict", {"verdict": "</script><script>alert(1)</script>"}),
        Code("make demo"),
    ]
    return report.html(
        "A <title>", [Section(f"Part {i}", blocks) for i in range(3)], subtitle="made by `make`"
    )


def test_the_page_is_well_formed_and_loads_nothing_from_elsewhere(
    judged: tuple[np.ndarray, np.ndarray, dict],
) -> None:
    text = page(report.detection_plots(*judged)["roc"])
    checker = Checker()
    checker.feed(text)
    assert not checker.stack
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in checker.links)
    for foreign in ("http://", "https://", "url(", "@import", "<script"):
        assert foreign not in text


def test_the_page_escapes_what_it_is_given() -> None:
    text = page(b"\x89PNG")
    assert "<b>" not in text
    assert "&lt;gan&gt;" in text
    assert "<code>code</code> and <strong>strong</strong>" in text


def test_number_columns_are_right_aligned_and_readable() -> None:
    table = Table(["name", "n", "auc", "share"], [["a", 1234, 0.98765, "12.5 %"], ["b", 7, None, "–"]]).html()
    assert table.count('class="n"') == 3 * 3
    assert "1,234" in table
    assert "0.988" in table
    assert "<td>a</td>" in table


def test_rows_of_an_evaluation(judged: tuple[np.ndarray, np.ndarray, dict]) -> None:
    rows = report.metric_rows(judged[2], METRICS)
    assert rows[0][0] == "AUC"
    assert len(rows) == len(METRICS)
    groups = {row[0]: row for row in report.group_rows(judged[2]["groups"]["maker"])}
    assert groups["camera"][4] == "–"
    assert groups["gan"][3] == "–"
    auc = judged[2]["groups"]["maker"]["gan"]["auc"]
    assert groups["gan"][2] == f"{auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})"
    bare = report.group_rows({"gan": {"n": 3, "auc": {"value": 0.5, "low": None, "high": None}}})
    assert bare == [["gan", "3", "0.500", "–", "–"]]


def test_the_card_says_what_was_not_measured_and_shows_groups(
    judged: tuple[np.ndarray, np.ndarray, dict],
) -> None:
    info = {"name": "m", "kind": "detector", "sources": {"own": {"licence": "CC0", "consent": "synthetic"}}}
    assert "no figure of this model may be quoted" in model_card(info, None)
    card = model_card(info, judged[2])
    assert "| gan |" in card
    assert "| own | CC0 | synthetic |" in card
