"""Real and Fake Face Detection (CIPLAB, Yonsei University): expert Photoshop composites of faces, and real faces.

https://www.kaggle.com/datasets/ciplab/real-and-fake-face-detection. File names of fakes say how hard they are to spot
and which of left eye, right eye, nose and mouth were replaced: easy_100_1111.jpg. Many fakes were made from a photograph
that is also in the set as real, or as another fake: the split rule keeps such near-copies on one side by their hash.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from counterfake.sources import Sample, Skipped, SourceConfig
from counterfake.sources.folder import archive_names, is_divisible, read_files

REGIONS = ("left_eye", "right_eye", "nose", "mouth")
FAKE_NAME = re.compile(r"(easy|mid|hard)_(\d+)_([01]{3,4})$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CiplabSource(SourceConfig):
    """The folder or archive with training_real/ and training_fake/, or a folder that holds images.tar.gz."""

    name: str = "ciplab"

    def names(self) -> Iterator[str]:
        yield from archive_names(self._archive())

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        for name, content in read_files(self._archive(), names):
            yield Skipped(name, content) if isinstance(content, str) else self._sample(name, content)

    @property
    def divisible(self) -> bool:
        return is_divisible(self._archive())

    def _archive(self) -> Path:
        path = self.located()
        return path / "images.tar.gz" if (path / "images.tar.gz").is_file() else path

    def _sample(self, name: str, data: bytes) -> Sample | Skipped:
        stem = Path(name).stem
        edited = FAKE_NAME.search(stem)
        if not edited and not stem.startswith("real_"):
            return Skipped(name, "neither real_N nor easy|mid|hard_N_EDITS")
        attributes: dict[str, object] = {}
        if edited:
            attributes = {"difficulty": edited[1]}
            if len(edited[3]) == 4:  # easy_116_111.jpg has lost a digit
                attributes["edited"] = [r for r, flag in zip(REGIONS, edited[3], strict=True) if flag == "1"]
        return Sample(
            image=data,
            path=name,
            fake=int(bool(edited)),
            maker="photoshop" if edited else "camera",
            source=self.label,
            attributes=attributes,
        )
