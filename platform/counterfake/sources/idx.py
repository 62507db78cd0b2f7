"""MNIST's own file format: idx images and labels, plain, .gz or .xz. http://yann.lecun.com/exdb/mnist/"""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake.errors import DataError, NotFoundError
from counterfake.records import Sample
from counterfake.sources import Skipped, SourceConfig

PARTS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdxSource(SourceConfig):
    """Small grey pictures as raw pixels (H, W, 1) with a class; the split is that of the files."""

    name: str = "idx"
    train: bool = True  # read the train-* files
    test: bool = True  # read the t10k-* files
    limit: int = 0  # at most this many of each part, from the front; 0 = all

    def samples(self) -> Iterator[Sample | Skipped]:
        folder = self.located()
        for split, wanted in (("train", self.train), ("test", self.test)):
            if wanted:
                yield from self._part(folder, split)

    def _part(self, folder: Path, split: str) -> Iterator[Sample]:
        images, labels = (read_idx(_find(folder, name)) for name in PARTS[split])
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"{folder}: {split} has images {images.shape} and labels {labels.shape}; the counts must agree"
            )
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            if self.limit and number >= self.limit:
                return
            yield Sample(
                pixels=image[:, :, None],
                path=f"{split}/{number:05d}",
                fake=0,
                maker="camera",
                class_id=int(label),
                source=self.label,
                split=split,
            )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an idx file of unsigned bytes. Raises DataError if it is cut short or something else."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            magic = file.read(4)
            if magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
                raise DataError(f"{path} is no idx file of bytes (it starts with {magic.hex()})")
            shape = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
            size = int(np.prod(shape, dtype=np.int64))
            data = file.read(size + 1)
    except (OSError, EOFError, lzma.LZMAError, struct.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}; fetch it again") from error
    if len(data) != size:
        raise DataError(
            f"{path} should hold {size:,} bytes of {shape}, found {'more' if len(data) > size else f'{len(data):,}'}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


# -- private --------------------------------------------------------------------------------------------------------


def _find(folder: Path, name: str) -> Path:
    for suffix in ("", ".gz", ".xz"):
        for spelled in (name, name.replace("-idx", ".idx")):
            if (folder / f"{spelled}{suffix}").is_file():
                return folder / f"{spelled}{suffix}"
    raise NotFoundError(
        f"{folder} has no {name}, {name}.gz or {name}.xz; set source.path to the folder that holds it"
    )
