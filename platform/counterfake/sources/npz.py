"""Pictures packed into one NumPy archive: JPEG bytes with offsets (CIFAKE, anime faces), or raw grey images with persons (ORL)."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from counterfake import media
from counterfake.errors import DataError
from counterfake.sources import Sample, Skipped, SourceConfig, unique
from counterfake.sources.folder import SPLITS

Arrays = Mapping[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzSource(SourceConfig):
    """`jpeg_bytes` + `offsets` (+ `is_fake`, `name`, a class array), or `images` (N, H, W[, 3]) (+ `person`)."""

    fake: int | None = None  # label where the archive has no `is_fake`: 1 fake, 0 real, null unknown
    maker: str = "unknown"  # what made the fakes
    classes: str = "cifar_class"  # array of class numbers, used where present
    limit: int = 0  # at most this many, evenly spread; 0 = all

    part_inputs: ClassVar[int] = 2048  # each part opens the archive anew

    def names(self) -> Iterator[str]:
        """The archive's own names, or numbers, of the chosen pictures in order."""
        yield from self._chosen(self._arrays())

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        arrays = self._arrays()
        chosen = self._chosen(arrays)
        yield from (self._sample(arrays, name, chosen[name]) for name in names)

    def _arrays(self) -> Arrays:
        path = self.located()
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} is no readable .npz archive without pickles: {error}") from error

    def _chosen(self, arrays: Arrays) -> dict[str, int]:
        """name -> number in the archive, evenly spread where there is a limit."""
        count = self._count(arrays)
        given = (name.decode() for name in arrays["name"]) if "name" in arrays else None
        names = list(unique(given or (f"{number:06d}" for number in range(count))))
        if len(names) != count:
            raise DataError(f"{self.path} holds {count:,} pictures but {len(names):,} names; make it again")
        spread = np.linspace(0, count - 1, min(self.limit or count, count)).astype(int)
        return {names[number]: int(number) for number in np.unique(spread)}

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

    def _sample(self, arrays: Arrays, name: str, number: int) -> Sample:
        fake = int(arrays["is_fake"][number]) if "is_fake" in arrays else self.fake
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
