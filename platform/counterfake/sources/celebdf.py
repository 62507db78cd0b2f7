"""Celeb-DF v1 and v2 (Li et al., CVPR 2020, https://arxiv.org/abs/1909.12962) as they are unpacked.

Celeb-real/id0_0000.mp4               celebrities
YouTube-real/00000.mp4                other people, nobody knows who
Celeb-synthesis/id0_id1_0000.mp4      the face of id1 in a video of id0
List_of_testing_videos.txt            "1 Celeb-real/id1_0005.mp4": the official test videos; optional
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from counterfake.sources import Sample, Skipped, SourceConfig
from counterfake.sources.listing import BESIDE
from counterfake.sources.video import PART, FaceCut, facts, in_order, is_video, read_videos, tree

FOLDERS = ("Celeb-real", "YouTube-real", "Celeb-synthesis")
TEST_LIST = "List_of_testing_videos.txt"
NAMES = {
    "Celeb-real": re.compile(r"(?P<target>id\d+)_\d+"),
    "YouTube-real": re.compile(r"\d+"),
    "Celeb-synthesis": re.compile(r"(?P<target>id\d+)_(?P<donor>id\d+)_\d+"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CelebdfSource(SourceConfig):
    """A Celeb-DF tree. Videos of the official test list are prescribed to `test`; the others are for the split rule.

    The list was not drawn by person: with it, `counterfake data audit` reports people on both sides.
    """

    official_split: bool = True  # use the test list where it is
    cut: FaceCut = dataclasses.field(default_factory=FaceCut)

    part_inputs: ClassVar[int] = PART

    def names(self) -> Iterator[str]:
        """Originals first, then the forgeries, then what is neither."""
        yield from in_order(tree(self, *FOLDERS), *FOLDERS)

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        root = self.located()
        tested = _tested(root) if self.official_split else set()
        yield from read_videos(
            root, names, self.cut, lambda name: self._facts(name, "test" if name in tested else None)
        )

    def _facts(self, name: str, split: str | None) -> Sample | Skipped:
        if not is_video(name):
            return Skipped(name, BESIDE)
        pattern = NAMES.get(name.split("/")[0])
        match = pattern.fullmatch(Path(name).stem) if pattern else None
        if match is None:
            return Skipped(name, "is not named as Celeb-DF names videos")
        people = {role: f"celebdf/{person}" for role, person in match.groupdict().items()}
        identity, donor = people.get("target"), people.get("donor")
        if donor is None:
            return facts(self, name, fake=0, maker="camera", identity=identity, split=split)
        attributes = {"donor": donor, "also": [f"identity:{donor}"]}
        return facts(
            self, name, fake=1, maker="Celeb-synthesis", identity=identity, split=split, attributes=attributes
        )


# -- private --------------------------------------------------------------------------------------------------------


def _tested(root: Path) -> set[str]:
    """The videos of the test list; none where there is no list."""
    file = root / TEST_LIST
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return {line.split(maxsplit=1)[1].strip() for line in lines if len(line.split(maxsplit=1)) == 2}
