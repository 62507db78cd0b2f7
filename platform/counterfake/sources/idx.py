"""MNIST's own file format: idx images and labels, plain, .gz or .xz. http://yann.lecun.com/exdb/mnist/"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import itertools
import lzma
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from counterfake.errors import DataError, NotFoundError
from counterfake.sources import Sample, Skipped, SourceConfig

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

    part_inputs: ClassVar[int] = 16_384  # small ones; each part unpacks the file anew

    def names(self) -> Iterator[str]:
        """train/00000, …, test/00000, …"""
        folder = self.located()
        for split, wanted in (("train", self.train), ("test", self.test)):
            if wanted:
                count = min(_shape(_find(folder, name))[0] for name in PARTS[split])
                yield from (f"{split}/{i:05d}" for i in range(min(count, self.limit or count)))

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        folder = self.located()
        for split, chosen in itertools.groupby(names, lambda name: name.partition("/")[0]):
            images, labels = (read_idx(_find(folder, name)) for name in PARTS[split])
            if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
                raise DataError(
                    f"{folder}: {split} has images {images.shape} and labels {labels.shape}; the counts must agree"
                )
            yield from (self._sample(name, split, images, labels) for name in chosen)

    def _sample(self, name: str, split: str, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Sample:
        number = int(name.partition("/")[2])
        return Sample(
            pixels=images[number, :, :, None],
            path=name,
            fake=0,
            maker="camera",
            class_id=int(labels[number]),
            source=self.label,
            split=split,
        )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an idx file of unsigned bytes. Raises DataError if it is cut short or something else."""
    with _open(path) as (file, shape):
        size = math.prod(shape)
        data = file.read(size + 1)
    if len(data) != size:
        raise DataError(
            f"{path} should hold {size:,} bytes of {shape}, found {'more' if len(data) > size else f'{len(data):,}'}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


# -- private --------------------------------------------------------------------------------------------------------


def _shape(path: Path) -> tuple[int, ...]:
    with _open(path) as (_, shape):
        return shape


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The unpacked file behind its header, and the shape that the header claims."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            magic = file.read(4)
            if magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
                raise DataError(f"{path} is no idx file of bytes (it starts with {magic.hex()})")
            yield file, struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
    except (OSError, EOFError, lzma.LZMAError, zlib.error, struct.error, MemoryError, OverflowError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}; fetch it again") from error


def _find(folder: Path, name: str) -> Path:
    for suffix in ("", ".gz", ".xz"):
        for spelled in (name, name.replace("-idx", ".idx")):
            if (folder / f"{spelled}{suffix}").is_file():
                return folder / f"{spelled}{suffix}"
    raise NotFoundError(
        f"{folder} has no {name}, {name}.gz or {name}.xz; set source.path to the folder that holds it"
    )
