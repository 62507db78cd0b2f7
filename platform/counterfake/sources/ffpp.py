"""FaceForensics++ (Rössler et al., ICCV 2019, https://arxiv.org/abs/1901.08971) as its download script lays it out.

original_sequences/{youtube,actors}/{raw,c23,c40}/videos/NNN.mp4
manipulated_sequences/METHOD/{raw,c23,c40}/videos/TTT_SSS.mp4      person SSS driven into, or swapped into, video TTT
splits/{train,val,test}.json                                       lists of pairs [TTT, SSS]; optional

A forged video belongs to two people: `identity` is the one whose video it is, attributes["donor"] the other one, and
attributes["also"] keeps it on the donor's side of a split as well.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from counterfake.errors import DataError
from counterfake.sources import Sample, Skipped, SourceConfig
from counterfake.sources.folder import SPLITS
from counterfake.sources.listing import BESIDE, UNWANTED
from counterfake.sources.video import PART, FaceCut, facts, in_order, is_video, read_videos, tree

FOLDERS = ("original_sequences", "manipulated_sequences")
# 004.mp4, 519_515.mp4; of the actors: 01__scene.mp4, 01_02__scene__8CHARS.mp4
NAME = re.compile(r"(?P<target>\d+)(_(?P<donor>\d+))?(__.*)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfppSource(SourceConfig):
    """A FaceForensics++ tree, or any part of it."""

    compression: Literal["", "raw", "c0", "c23", "c40"] = "c23"  # "" = all that are there
    methods: tuple[
        str, ...
    ] = ()  # e.g. Deepfakes, Face2Face, FaceSwap, NeuralTextures, FaceShifter; () = all
    official_split: bool = True  # use splits/*.json where they are
    cut: FaceCut = dataclasses.field(default_factory=FaceCut)

    part_inputs: ClassVar[int] = PART

    def names(self) -> Iterator[str]:
        """Originals first, then the forgeries of each method, then what is neither."""
        yield from in_order(tree(self, *FOLDERS), *FOLDERS)

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        root = self.located()
        splits = _splits(root) if self.official_split else {}
        yield from read_videos(root, names, self.cut, lambda name: self._facts(name, splits))

    def _facts(self, name: str, splits: dict[str, str]) -> Sample | Skipped:
        parts = name.split("/")
        top, method = parts[0], parts[1] if len(parts) > 1 else ""
        if not is_video(name) or (top in FOLDERS and "masks" in parts[2:3]):
            return Skipped(name, BESIDE)
        if top not in FOLDERS or len(parts) != 5 or parts[3] != "videos":
            return Skipped(name, "does not lie where FaceForensics++ keeps videos")
        forged = top == "manipulated_sequences"
        if self.compression not in ("", parts[2]) or (forged and self.methods and method not in self.methods):
            return Skipped(name, UNWANTED)
        match = NAME.fullmatch(Path(name).stem)
        if match is None or (match["donor"] is not None) != forged:
            return Skipped(name, "is not named as FaceForensics++ names videos")
        people = "ffpp/actor-" if method in ("actors", "DeepFakeDetection") else "ffpp/"
        split = splits.get(match["target"]) if people == "ffpp/" else None
        identity = people + match["target"]
        if match["donor"] is None:
            return facts(self, name, fake=0, maker="camera", identity=identity, split=split)
        donor = people + match["donor"]
        attributes = {"donor": donor, "also": [f"identity:{donor}"]}
        return facts(self, name, fake=1, maker=method, identity=identity, split=split, attributes=attributes)


# -- private --------------------------------------------------------------------------------------------------------


def _splits(root: Path) -> dict[str, str]:
    """{video number: split} of splits/*.json; {} where there are none."""
    found: dict[str, str] = {}
    for file in sorted((root / "splits").glob("*.json")):
        if file.stem not in SPLITS:
            continue
        try:
            pairs = json.loads(file.read_text())
            found |= {str(number): SPLITS[file.stem] for pair in pairs for number in pair}
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{file} is no list of pairs of video numbers: {error}; fetch it again"
            ) from error
    return found
