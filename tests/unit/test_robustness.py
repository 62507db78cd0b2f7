"""The robustness grid: each damage is what it says, seeded, and what it costs is told by cell."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import robustness
from counterfake.evaluation.robustness import CLEAN, GRID, Cell
from counterfake.gate import Gate
from counterfake.images import blur, recompress, rescale, resize, share_chain


def picture(height: int = 64, width: int = 96, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth shapes with some texture, as photographs have."""
    rng = np.random.default_rng(seed)
    rough = cv2.resize(
        rng.integers(0, 256, (8, 8, channels), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    return np.clip(
        rough.reshape(height, width, channels) + rng.normal(0, 6, (height, width, channels)), 0, 255
    ).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_the_grid_is_the_one_that_is_promised() -> None:
    assert [cell.name for cell in GRID] == [
        "jpeg 95", "jpeg 75", "jpeg 50", "jpeg 30", "resize 0.75", "resize 0.5", "resize 0.25", "blur 1", "blur 2", "blur 3",
        "noise 5", "noise 10", "noise 20", "h264 23", "h264 33", "h264 40", "share",
    ]  # fmt: skip
    assert robustness.cells(["share", "jpeg 30"]) == (Cell(kind="share"), Cell(kind="jpeg", strength=30))
    with pytest.raises(ConfigError, match=r"no cell 'jpeg 31'; it has jpeg 95"):
        robustness.cells(["jpeg 31"])


@pytest.mark.parametrize("cell", GRID, ids=lambda cell: cell.name)
@pytest.mark.parametrize("shape", [(64, 96, 3), (33, 47, 1)], ids=["rgb", "odd-grey"])
def test_the_same_picture_and_seed_give_the_same_bytes(cell: Cell, shape: tuple[int, int, int]) -> None:
    pixels = picture(*shape)
    kept = pixels.copy()
    first, again = (cell.apply(pixels, (0, "a")) for _ in range(2))
    assert first.shape == shape
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != pixels).any()
    assert (pixels == kept).all()


@pytest.mark.parametrize("kind", ["jpeg", "resize", "blur", "noise", "h264"])
def test_each_row_of_the_grid_grows_worse(kind: str) -> None:
    pixels = picture(128, 128)
    found = [psnr(cell.apply(pixels, (0, "a")), pixels) for cell in GRID if cell.kind == kind]
    assert found == sorted(found, reverse=True)
    assert found[-1] > 12


def test_cells_are_the_functions_of_images_py() -> None:
    pixels = picture()
    assert (Cell(kind="jpeg", strength=50).apply(pixels, (0, "")) == recompress(pixels, 50)).all()
    assert (Cell(kind="blur", strength=2).apply(pixels, (0, "")) == blur(pixels, 2)).all()
    assert (Cell(kind="resize", strength=0.5).apply(pixels, (0, "")) == rescale(pixels, 0.5)).all()
    assert (Cell(kind="share").apply(pixels, (0, "")) == share_chain(pixels)).all()
    assert (CLEAN.apply(pixels, (0, "")) == pixels).all()


def test_noise_has_its_deviation_and_another_one_for_each_picture() -> None:
    grey = np.full((128, 128, 3), 128, np.uint8)
    a, b = (Cell(kind="noise", strength=10).apply(grey, (0, name)) for name in "ab")
    assert np.std(a.astype(float)) == pytest.approx(10, rel=0.02)
    assert (a != b).any()


def test_the_share_chain_is_its_four_steps() -> None:
    large = picture(1000, 2000)
    by_hand = recompress(resize(recompress(resize(large, 1280, 640), 75), 720, 360), 60)
    assert (share_chain(large) == by_hand).all()
    small = picture(64, 96)
    assert (share_chain(small) == recompress(recompress(small, 75), 60)).all()


def test_h264_keeps_a_flat_picture_and_its_colour() -> None:
    flat = np.full((64, 64, 3), (200, 60, 120), np.uint8)
    assert np.abs(robustness.through_h264(flat, 23).astype(int) - flat).max() <= 4


def figures(auc: float | None) -> dict:
    return {name: {"value": auc, "low": auc, "high": auc} for name in ("auc", "accuracy")} | {
        "n": 4,
        "refused": 0,
    }


def test_the_worst_cell_is_told_and_a_gate_can_ask_for_it() -> None:
    found = robustness.summary(
        {"clean": figures(0.9), "jpeg 30": figures(0.7), "share": figures(None), "blur 1": figures(0.8)}
    )
    assert found["worst"]["cell"] == "jpeg 30"
    assert found["cells"]["blur 1"]["drop"] == pytest.approx(0.1)
    assert found["cells"]["share"]["drop"] is None
    json.dumps(found)
    evaluation = {"robustness": found}
    assert Gate(min_robustness_auc=0.7).check(evaluation) == []
    assert (
        "robustness_auc is 0.7, must be at least 0.75" in Gate(min_robustness_auc=0.75).check(evaluation)[0]
    )
    assert "not measured" in Gate(min_robustness_auc=0.5).check({})[0]
    with pytest.raises(DataError, match="no cell"):
        robustness.summary({"clean": figures(0.9), "share": figures(None)})
