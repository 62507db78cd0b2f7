"""The robustness grid: what is left of a detector's figures after what sharing, storing and filming do to pictures.

A cell is one kind of damage at one strength, done to the whole decoded picture before anything is cut out of it: by the
functions of images.py that `data.degradation` makes training pictures worse with (the faster ones that
learners/augmentation.py has for a batch on a GPU are not these), and for video by libx264 itself. The same picture with the
same seed gives the same bytes, in any order. Who scores the damaged pictures is scoring.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from counterfake import video
from counterfake.errors import ConfigError, DataError
from counterfake.images import Pixels, blur, generator, noise, recompress, rescale, share_chain
from counterfake.temporary import temporary_folder

Kind = Literal["clean", "jpeg", "resize", "blur", "noise", "h264", "share"]
FORMAT = 1  # of kept cells; raised when a cell does something else to pictures
CLIP_FRAMES = 3  # of the still clip that stands for a video
CLIP_LIMITS = video.VideoLimits(min_side=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One kind of damage at one strength."""

    kind: Kind = "clean"
    strength: float = (
        0.0  # jpeg: quality; resize: factor; blur: sigma, pixels; noise: deviation of 255; h264: CRF
    )

    @property
    def name(self) -> str:
        """ "jpeg 30"; without a strength the kind alone."""
        return self.kind if self.kind in ("clean", "share") else f"{self.kind} {self.strength:g}"

    def apply(self, pixels: Pixels, seed: tuple[int, str]) -> Pixels:
        """pixels (H, W, C) uint8 -> a worse copy; only `share` changes the size. seed: a number and the picture's id."""
        if self.kind == "jpeg":
            return recompress(pixels, round(self.strength))
        if self.kind == "resize":
            return rescale(pixels, self.strength)
        if self.kind == "blur":
            return blur(pixels, self.strength)
        if self.kind == "noise":
            return noise(pixels, self.strength, generator(*seed))
        if self.kind == "h264":
            return through_h264(pixels, round(self.strength))
        return share_chain(pixels) if self.kind == "share" else pixels


CLEAN = Cell()
GRID = (
    *(Cell(kind="jpeg", strength=quality) for quality in (95, 75, 50, 30)),
    *(Cell(kind="resize", strength=factor) for factor in (0.75, 0.5, 0.25)),
    *(Cell(kind="blur", strength=sigma) for sigma in (1, 2, 3)),
    *(Cell(kind="noise", strength=deviation) for deviation in (5, 10, 20)),
    *(Cell(kind="h264", strength=crf) for crf in (23, 33, 40)),
    Cell(kind="share"),
)


def cells(names: Sequence[str]) -> tuple[Cell, ...]:
    """The cells of GRID with these names; without names all. Raises ConfigError naming what there is."""
    known = {cell.name: cell for cell in GRID}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"the grid has no cell {unknown[0]!r}; it has {', '.join(known)}")
    return tuple(known[name] for name in names or known)


def through_h264(pixels: Pixels, crf: int) -> Pixels:
    """pixels (H, W, C) through H.264 (4:2:0) at this CRF: the last frame of a still clip of CLIP_FRAMES.

    A picture standing still: what quantisation does to it is there, what motion would cost is not. Needs libx264."""
    height, width, channels = pixels.shape
    picture = pixels if channels == 3 else np.repeat(pixels, 3, axis=2)
    with temporary_folder() as folder:
        path = folder / "clip.mp4"
        made = video.write(path, [picture] * CLIP_FRAMES, crf=crf)
        if made.codec != "libx264":
            raise ConfigError(
                f"the H.264 cells need libx264, this PyAV only has {made.codec}; leave them out"
            )
        frames = [frame.pixels for frame in video.frames(path, every=1, limits=CLIP_LIMITS)]
    out = frames[-1][:height, :width]  # odd sides grew by a line
    return out if channels == 3 else out.mean(axis=2, keepdims=True).round().astype(np.uint8)


def summary(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures by cell name, "clean" among them or not -> {"cells", "worst": the damaged cell of the lowest AUC}.

    Each cell has "drop": AUC of the clean pictures minus its own. Raises DataError where no damaged cell has an AUC."""
    clean = figures.get(CLEAN.name, {}).get("auc", {}).get("value")
    table = {name: {**row, "drop": _drop(clean, row["auc"]["value"])} for name, row in figures.items()}
    damaged = {n: r for n, r in table.items() if n != CLEAN.name and r["auc"]["value"] is not None}
    if not damaged:
        raise DataError("no cell of the robustness grid gave an AUC; look at what was refused in each")
    worst = min(damaged, key=lambda name: float(damaged[name]["auc"]["value"]))
    return {
        "cells": table,
        "worst": {"cell": worst, "auc": damaged[worst]["auc"], "drop": damaged[worst]["drop"]},
    }


# -- private --------------------------------------------------------------------------------------------------------


def _drop(clean: float | None, value: float | None) -> float | None:
    return None if clean is None or value is None else clean - value
