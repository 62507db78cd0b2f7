"""Whose face boxes a model learned on, and who will find faces in pictures that come without a box.

A detector trained on the boxes of one face finder sees other crops from another one. Both names go into the model's
preprocessing, so that its hash tells models apart, and into serving, bulk scoring and MLflow, which all search by the
recorded finder.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import get_args

import pyarrow.compute as pc

from counterfake.images import Finder, Preprocess
from counterfake.records import Dataset
from counterfake.versions import Version

logger = logging.getLogger(__name__)

FINDERS: tuple[str, ...] = get_args(Finder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes:
    """What is recorded with the boxes of a split."""

    methods: tuple[
        str, ...
    ] = ()  # that found them, sorted: cascade, yunet, …; synthetic and generator drew them
    margin: float = (
        0.0  # least margin with which pictures were cut around their face; 1 = whole pictures; 0 = no box
    )


def of(dataset: Dataset, version: Version, split: str) -> Boxes:
    """Read from the labels of the split; no picture is read."""
    methods: set[str] = set()
    margin = math.inf
    for shard in version.shards(split):
        table = dataset.reader(shard, ["face_box", "face_method", "face_margin"], version=version).read_all()
        found = table.filter(pc.is_valid(table["face_box"]))
        methods |= {method or "unknown" for method in found["face_method"].unique().to_pylist()}
        if (least := pc.min(found["face_margin"]).as_py()) is not None:
            margin = min(margin, round(least, 4))
    return Boxes(methods=tuple(sorted(methods)), margin=margin if methods and margin < math.inf else 0.0)


def recorded(preprocess: Preprocess, boxes: Boxes) -> tuple[Preprocess, str]:
    """The preprocessing of a model trained on these boxes, and a warning ("" for none) where it will not get such again.

    One of FINDERS finds faces as it did for training. Boxes of anything else (a network whose file no bundle carries, the
    truth of drawn faces) cannot be had for an upload: there `preprocess.finder` searches, and the warning says so."""
    if not (preprocess.needs_face and boxes.methods):
        return preprocess, ""
    names = "+".join(boxes.methods)
    finder = names if names in FINDERS else preprocess.finder
    kept = dataclasses.replace(preprocess, boxes=names, box_margin=boxes.margin, finder=finder)  # type: ignore[arg-type]
    told = []
    if names not in FINDERS:
        told.append(
            f"trained on face boxes of {names}; in pictures without a box {finder} looks for the face"
        )
    if 1 < boxes.margin < preprocess.margin:
        told.append(
            f"trained on pictures cut with margin {boxes.margin:g}, less than preprocess.margin={preprocess.margin:g}: "
            "crops of whole pictures show more around the face"
        )
    for text in told:
        logger.warning("%s", text)
    return kept, "; ".join(told)
