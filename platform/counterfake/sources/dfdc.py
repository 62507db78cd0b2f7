"""Deepfake Detection Challenge (Dolhansky et al. 2020, https://arxiv.org/abs/2006.07397), the parts of its training set.

dfdc_train_part_N/metadata.json       {"abc.mp4": {"label": "FAKE", "split": "train", "original": "xyz.mp4"}}
dfdc_train_part_N/abc.mp4

Nobody says who is shown: a forgery is tied to its original, and so to the other forgeries of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from counterfake.errors import DataError
from counterfake.sources import Sample, Skipped, SourceConfig
from counterfake.sources.folder import SPLITS
from counterfake.sources.listing import BESIDE, is_litter, listed
from counterfake.sources.video import PART, FaceCut, facts, is_video, read_videos, video_key

LABELS = {"REAL": 0, "FAKE": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DfdcSource(SourceConfig):
    """Folders with a metadata.json each, below one folder; or one of them. Videos named there and missing are skipped."""

    maker: str = "dfdc"  # of the forgeries; the data set does not say which of its eight methods made which
    cut: FaceCut = dataclasses.field(default_factory=FaceCut)

    part_inputs: ClassVar[int] = PART

    def names(self) -> Iterator[str]:
        """Every file that is there, and every video named in a metadata.json, by folder."""
        root = self.located()
        yield from sorted({*listed(root), *_entries(root)})

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        root = self.located()
        entries = _entries(root)
        several = (
            len({entry.get("split") for entry in entries.values()}) > 1
        )  # the public parts say only "train"
        yield from read_videos(
            root, names, self.cut, lambda name: self._facts(root, name, entries.get(name), several)
        )

    def _facts(
        self, root: Path, name: str, entry: Mapping[str, Any] | None, several: bool
    ) -> Sample | Skipped:
        if entry is None:
            return Skipped(name, "is not in metadata.json" if is_video(name) else BESIDE)
        if not (root / name).is_file():
            return Skipped(name, "is in metadata.json but not there")
        fake = LABELS.get(str(entry.get("label")).upper())
        if fake is None:
            return Skipped(name, "has no label REAL or FAKE in metadata.json")
        split = SPLITS.get(str(entry.get("split")).lower()) if several else None
        original = entry.get("original")
        if not fake or not original:
            return facts(self, name, fake=fake, maker=self.maker, split=split)
        key = video_key(self, (Path(name).parent / str(original)).as_posix())
        attributes = {"original_video": key, "also": [f"video:{key}"]}
        return facts(self, name, fake=fake, maker=self.maker, split=split, attributes=attributes)


# -- private --------------------------------------------------------------------------------------------------------


def _entries(root: Path) -> dict[str, dict[str, Any]]:
    """{video name relative to root: its entry} of every metadata.json. DataError if there is none."""
    entries: dict[str, dict[str, Any]] = {}
    files = [
        root / name for name in listed(root) if not is_litter(name) and Path(name).name == "metadata.json"
    ]
    if not files:
        raise DataError(f"{root} holds no metadata.json; set source.path to the folder of dfdc_train_part_*")
    for file in files:
        folder = file.parent.relative_to(root)
        try:
            found = json.loads(file.read_text())
            entries |= {
                (folder / name).as_posix(): dict(entry)
                for name, entry in found.items()
                if Path(name).name == name  # nothing outside its own folder
            }
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{file} is no list of videos with labels: {error}; fetch it again") from error
    return entries
