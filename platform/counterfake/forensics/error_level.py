"""Error levels: what JPEG takes from a picture when it is compressed once more, block by block, then trees.

"A Picture's Worth", Krawetz, Hacker Factor 2007 (error level analysis): what was compressed at about this quality before
changes little, what was pasted in, drawn or generated changes more. The picture that the method draws is left to people; here
its statistics are a row of features for a forest. Blocks are those of JPEG, 8 × 8 from the top left; a block's error is the mean
absolute difference between the picture and its recompression, in Y, Cb and Cr (BT.601). Because texture raises it too,
each error is also divided by the block's contrast. Trees as for first digits (forest.py).
Legend: N pictures, Q qualities, R regions, M block statistics (error, and error over contrast, of three channels), B blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from counterfake import media
from counterfake.errors import ConfigError, DataError
from counterfake.forensics.benford import middle

Floats = NDArray[np.float32]
BLOCK = 8  # pixels; JPEG's own
CHANNELS = ("y", "cb", "cr")
STATISTICS = (*(f"{c}/error" for c in CHANNELS), *(f"{c}/relative" for c in CHANNELS))
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
WHOLE = ("mean", "sd", "skew", "kurtosis", *(f"p{100 * q:g}" for q in QUANTILES), "highest", "lowest")
FLOOR = 1.0  # added to a block's contrast, in levels: a flat block has none
TO_YCBCR = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorLevelConfig:
    """What is measured of a picture. The defaults give 528 features."""

    qualities: tuple[int, ...] = (75, 90)  # JPEG quality factors of the recompression, 4:2:0
    regions: int = 4  # a side: mean and spread of each of regions × regions parts
    min_side: int = 64  # pixels; smaller pictures have too few blocks
    max_side: int = 1024  # pixels; larger pictures are cut to their middle, on the grid of 8

    def __post_init__(self) -> None:
        if not self.qualities or not all(1 <= q <= 100 for q in self.qualities):
            raise ConfigError(f"error_level needs qualities in 1..100, got {self.qualities}")
        if self.regions < 1 or self.min_side < BLOCK * max(2, self.regions):
            raise ConfigError(
                f"error_level.min_side must be at least {BLOCK * max(2, self.regions)} for regions={self.regions}, "
                f"got {self.min_side}"
            )

    @property
    def family(self) -> str:
        """The kind of its bundles."""
        return "error_level"

    def names(self) -> list[str]:
        """The name of every feature, in the order of `features`."""
        regions = [(row, column) for row in range(self.regions) for column in range(self.regions)]
        own = [*WHOLE, *(f"r{row}{column}/{what}" for row, column in regions for what in ("mean", "sd"))]
        return [
            f"q{q}/{statistic}/{name}" for q in self.qualities for statistic in STATISTICS for name in own
        ]

    def features_of(self, pictures: Sequence[NDArray[np.uint8]]) -> Floats:
        """Features (N, F) of pictures of any sizes."""
        return features_of(pictures, self)


def features(pixels: NDArray[np.uint8], config: ErrorLevelConfig) -> Floats:
    """pixels (H, W, 3) RGB or (H, W) grey, uint8 -> features (F,). DataError below `min_side`."""
    side = min(pixels.shape[:2])
    if side < config.min_side:
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise DataError(
            f"a picture of {size} pixels has too few blocks for error levels; {config.min_side} are needed"
        )
    levels = (maps(pixels, quality, config) for quality in config.qualities)
    return np.concatenate([_summary(one, config.regions) for level in levels for one in level])


def features_of(pictures: Sequence[NDArray[np.uint8]], config: ErrorLevelConfig) -> Floats:
    """Features (N, F) of pictures of any sizes. A picture's row does not depend on the others."""
    return np.stack([features(picture, config) for picture in pictures])


def maps(pixels: NDArray[np.uint8], quality: int, config: ErrorLevelConfig | None = None) -> Floats:
    """pixels (H, W, 3) or (H, W) -> (M, H // 8, W // 8): every statistic of every whole block after one recompression."""
    side = (config or ErrorLevelConfig()).max_side
    colour = np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))
    colour = np.ascontiguousarray(middle(colour, side))
    again = media.decode_trusted(media.encode(colour, "jpeg", quality))
    before, after = (_planes(picture) for picture in (colour, again))
    error = _blocks(np.abs(before - after)).mean(axis=(2, 4))  # (3, rows, columns)
    contrast = _blocks(before).std(axis=(2, 4))
    return np.concatenate([error, error / (contrast + FLOOR)]).astype(np.float32)


# -- private --------------------------------------------------------------------------------------------------------


def _planes(picture: NDArray[np.uint8]) -> Floats:
    """(H, W, 3) RGB -> (3, H, W) Y, Cb, Cr, in levels."""
    return np.asarray(np.tensordot(TO_YCBCR, picture.astype(np.float32), axes=([1], [2])))


def _blocks(planes: Floats) -> Floats:
    """(3, H, W) -> (3, rows, 8, columns, 8) of whole blocks."""
    rows, columns = (n // BLOCK for n in planes.shape[1:])
    whole = planes[:, : rows * BLOCK, : columns * BLOCK]
    return whole.reshape(3, rows, BLOCK, columns, BLOCK)


def _summary(level: Floats, regions: int) -> Floats:
    """(rows, columns) of one statistic -> moments and quantiles over all blocks, extremes and moments of regions."""
    values = level.ravel().astype(np.float64)
    mean, sd = values.mean(), values.std()
    standard = (values - mean) / (sd + 1e-9)
    parts = list(_regions(level, regions))
    means = [float(part.mean()) for part in parts]
    own = [m for part, m in zip(parts, means, strict=True) for m in (m, float(part.std()))]
    extremes = [max(means) / (np.median(means) + 1e-6), min(means) / (np.median(means) + 1e-6)]
    moments = [mean, sd, (standard**3).mean(), (standard**4).mean(), *np.quantile(values, QUANTILES)]
    return np.array([*moments, *extremes, *own], np.float32)


def _regions(level: Floats, regions: int) -> Iterator[Floats]:
    for band in np.array_split(level, regions, axis=0):
        yield from np.array_split(band, regions, axis=1)
