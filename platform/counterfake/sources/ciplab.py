"""Real and Fake Face Detection (CIPLAB, Yonsei University): expert Photoshop composites of faces, and real faces.

https://www.kaggle.com/datasets/ciplab/real-and-fake-face-detection. File names of fakes say how hard they are to spot
and which of left eye, right eye, nose and mouth were replaced: easy_100_1111.jpg. Many fakes were made from a photograph
that is also in the set as real, or as another fake: a detector tested on one after training on the other is tested on
what it has seen. Pictures whose hashes are near get one group as their identity, and no group lies in two splits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from counterfake import media
from counterfake.errors import MediaError
from counterfake.records import Sample
from counterfake.sources import Skipped, SourceConfig
from counterfake.sources.folder import read_all

REGIONS = ("left_eye", "right_eye", "nose", "mouth")
FAKE_NAME = re.compile(r"(easy|mid|hard)_(\d+)_([01]{3,4})$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CiplabSource(SourceConfig):
    """The folder or archive with training_real/ and training_fake/, or a folder that holds images.tar.gz."""

    name: str = "ciplab"
    near_copy_bits: int = 68  # of 256: hashes that differ in so few bits are one group; -1 = no grouping

    def samples(self) -> Iterator[Sample | Skipped]:
        path = self.located()
        path = path / "images.tar.gz" if (path / "images.tar.gz").is_file() else path
        groups = self._groups(path) if self.near_copy_bits >= 0 else {}
        for name, content in read_all(path):
            yield Skipped(name, content) if isinstance(content, str) else self._sample(name, content, groups)

    def _sample(self, name: str, data: bytes, groups: dict[str, str]) -> Sample | Skipped:
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
            identity=groups.get(name),
            source=self.label,
            attributes=attributes,
        )

    def _groups(self, path: Path) -> dict[str, str]:
        """Name -> group, only for pictures that have a near-copy."""
        names, hashes = [], []
        for name, content in read_all(path):
            try:
                hashes.append(picture_hash(media.decode(content)) if isinstance(content, bytes) else None)
                names.append(name)
            except MediaError:
                continue  # the ingest decodes it again and counts it
        kept = [(name, value) for name, value in zip(names, hashes, strict=True) if value is not None]
        labels = near_copies([value for _, value in kept], self.near_copy_bits)
        sizes = np.bincount(labels) if kept else np.zeros(0, np.int64)
        return {
            name: f"{self.label}-{label:05d}"
            for (name, _), label in zip(kept, labels, strict=True)
            if sizes[label] > 1
        }


def picture_hash(pixels: media.Pixels) -> NDArray[np.uint8]:
    """256 bits (32 bytes): the signs of the 16 x 16 lowest DCT frequencies of a 32-pixel thumbnail.

    Resaving at JPEG quality 50 changes 0-9 bits. Of 1,631 CIPLAB pictures all 32 pairs within 63 bits show one
    photograph twice (looked at), between 64 and 80 about one in four does, and different faces differ in 80-130.
    """
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = np.asarray(cv2.resize(luma, (32, 32), interpolation=cv2.INTER_AREA), np.float32)
    signs = np.asarray(cv2.dct(small))[:16, :16].ravel() > 0
    signs[0] = False  # the mean says nothing
    return np.packbits(signs)


def near_copies(hashes: Sequence[NDArray[np.uint8]], bits: int) -> NDArray[np.int64]:
    """Label of the group of each hash: linked when they differ in at most `bits` bits, directly or through others."""
    labels = np.arange(len(hashes))
    table = np.stack(hashes) if hashes else np.zeros((0, 32), np.uint8)
    for i in range(len(table)):
        near = np.flatnonzero(np.bitwise_count(table[i + 1 :] ^ table[i]).sum(1) <= bits) + i + 1
        for j in near:
            labels[labels == labels[j]] = labels[i]
    return labels
