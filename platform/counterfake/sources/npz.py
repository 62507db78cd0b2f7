"""Pictures packed into one NumPy archive: JPEG bytes with offsets (CIFAKE, anime faces), or raw grey images with persons (ORL)."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake import media
from counterfake.errors import DataError
from counterfake.records import Sample
from counterfake.sources import Skipped, SourceConfig
from counterfake.sources.folder import SPLITS

Arrays = Mapping[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzSource(SourceConfig):
    """`jpeg_bytes` + `offsets` (+ `is_fake`, `name`, a class array), or `images` (N, H, W[, 3]) (+ `person`)."""

    fake: int | None = None  # label where the archive has no `is_fake`: 1 fake, 0 real, null unknown
    maker: str = "unknown"  # what made the fakes
    classes: str = "cifar_class"  # array of class numbers, used where present
    limit: int = 0  # at most this many, evenly spread; 0 = all

    def samples(self) -> Iterator[Sample | Skipped]:
        path = self.located()
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no readable .npz archive without pickles: {error}") from error
        count = self._count(arrays)
        chosen = (
            range(count)
            if not self.limit
            else np.unique(np.linspace(0, count - 1, min(self.limit, count)).astype(int))
        )
        for number in chosen:
            yield self._sample(arrays, int(number))

    def _count(self, arrays: Arrays) -> int:
        if "jpeg_bytes" in arrays and "offsets" in arrays:
            offsets = arrays["offsets"].astype(np.int64)
            if (
                len(offsets) < 1
                or (np.diff(offsets) < 0).any()
                or offsets[0] < 0
                or offsets[-1] > len(arrays["jpeg_bytes"])
            ):
                raise DataError(
                    f"{self.path}: offsets do not cut jpeg_bytes ({len(arrays['jpeg_bytes']):,} bytes) into files"
                )
            return len(offsets) - 1
        if "images" in arrays and arrays["images"].dtype == np.uint8 and arrays["images"].ndim in (3, 4):
            return len(arrays["images"])
        raise DataError(
            f"{self.path} holds {', '.join(sorted(arrays))}; expected jpeg_bytes and offsets, or uint8 images"
        )

    def _sample(self, arrays: Arrays, number: int) -> Sample:
        fake = int(arrays["is_fake"][number]) if "is_fake" in arrays else self.fake
        name = arrays["name"][number].decode() if "name" in arrays else f"{number:06d}"
        person = arrays["person"][number] if "person" in arrays else None
        split = SPLITS.get(name.split("/")[0].lower()) if "/" in name else None
        return Sample(
            image=_bytes(arrays, number),
            path=name,
            fake=fake,
            maker=self.maker if fake else "camera",
            class_id=int(arrays[self.classes][number]) if self.classes in arrays else None,
            identity=None if person is None else f"{self.label}-{int(person):03d}",
            source=self.label,
            split="test" if split == "test" else None,  # the rest is divided by the ingest's own rule
        )


# -- private --------------------------------------------------------------------------------------------------------


def _bytes(arrays: Arrays, number: int) -> bytes:
    if "images" in arrays:
        return media.encode(arrays["images"][number], "png")
    start, end = (int(arrays["offsets"][i]) for i in (number, number + 1))
    return arrays["jpeg_bytes"][start:end].tobytes()
