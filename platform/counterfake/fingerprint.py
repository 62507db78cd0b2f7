"""Perceptual hashes: which pictures are near-copies of each other, without looking at them again.

A hash is the signs, against their median, of the 16 x 16 lowest DCT frequencies of a grey 32 x 32 thumbnail: 256 bits, of
which the mean's says nothing. Faces need that many: of 64 bits (8 x 8 frequencies) copies change up to 8 and different
faces sometimes as few as 2. Of 256, measured on CIPLAB, FFHQ and StyleGAN faces and on ORL's grey ones, a copy at JPEG
quality 30, at a quarter of the size, or darker by a quarter differs in at most 18 bits, one without its outer 1 % in at
most 28, and different faces in 120 +- 10. `NEAR_BITS` lies between. A copy without its outer 2 % differs in about 40 and
is not found; nor is a 32-pixel picture at a quarter of its size (about 90).
Letters: N hashes, M pairs, W = 4 words of 64 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

THUMBNAIL, FREQUENCIES = 32, 16  # pixels and DCT frequencies on a side
BITS = FREQUENCIES**2
NEAR_BITS = (
    31  # pictures whose hashes differ in so few bits are near-copies; the most that bands find quickly
)
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
LEAST_CONTRAST = 1.0  # median size of the frequencies, in grey levels; below it noise decides the signs
BANDS = 16  # of 16 bits each
_FEW = 4096  # up to so many hashes all pairs are compared: quicker than bands
_CHUNK = 1 << 19  # pairs compared at once

Pixels = NDArray[np.uint8]
Words = NDArray[np.uint64]  # (N, 4)
Pairs = NDArray[np.int64]  # (M, 2)


def perceptual_hash(pixels: Pixels) -> str:
    """(H, W, 3), (H, W, 1) or (H, W) uint8 -> 64 hex digits; "" for a picture of one colour, or almost."""
    grey = pixels @ LUMA if pixels.ndim == 3 and pixels.shape[2] == 3 else pixels.reshape(pixels.shape[:2])
    rows, columns = (_frequencies(length) for length in grey.shape)
    found = (rows @ grey.astype(np.float32, copy=False) @ columns.T).ravel()  # (256,)
    if np.median(np.abs(found[1:])) < LEAST_CONTRAST:
        return ""
    signs = found > np.median(found[1:])
    signs[0] = False  # brightness
    return np.packbits(signs).tobytes().hex()


def is_hash(text: object) -> bool:
    """Was this written by `perceptual_hash`, of a picture that has a hash?"""
    return isinstance(text, str) and len(text) == BITS // 4 and set(text) <= set("0123456789abcdef")


def words(hashes: Sequence[str]) -> Words:
    """Hashes as (N, 4) uint64, to be compared. Raises ValueError for what is no hash."""
    joined = np.frombuffer(bytes.fromhex("".join(hashes)), ">u8").astype(np.uint64)
    return joined.reshape(len(hashes), BITS // 64)


def distances(table: Words, pairs: Pairs) -> NDArray[np.int64]:
    """Bits in which the hashes of each pair differ."""
    return np.bitwise_count(table[pairs[:, 0]] ^ table[pairs[:, 1]]).sum(1, dtype=np.int64)


def near_pairs(hashes: Sequence[str] | Words, max_distance: int = NEAR_BITS) -> Pairs:
    """Every pair (i < j) of hashes that differ in at most `max_distance` bits, sorted: exact.

    Two hashes within 31 bits agree, but for one bit, in one of 16 bands of 16 bits (multi-index hashing,
    https://arxiv.org/abs/1307.2982), so only those are compared. Beyond 31 bits all pairs are, N^2 / 2 of them.
    Equal hashes make quadratically many pairs; `clusters` does not.
    """
    table = hashes if isinstance(hashes, np.ndarray) else words(hashes)
    wide = max_distance >= 2 * BANDS
    candidates = _all_pairs(len(table)) if wide or len(table) <= _FEW else _band_pairs(table)
    near = [found[distances(table, found) <= max_distance] for found in candidates]
    return np.unique(np.concatenate([np.zeros((0, 2), np.int64), *near]), axis=0)


def clusters(hashes: Sequence[str] | Words, max_distance: int = NEAR_BITS) -> NDArray[np.int64]:
    """(N,) the group of each hash: the index of its first member. Linked directly or through others."""
    table = hashes if isinstance(hashes, np.ndarray) else words(hashes)
    if not len(table):
        return np.zeros(0, np.int64)
    _, first, same = np.unique(table, axis=0, return_index=True, return_inverse=True)
    linked = near_pairs(table[first], max_distance)
    ends = [np.arange(len(table)), first[linked[:, 0]]], [first[same.ravel()], first[linked[:, 1]]]
    return components(len(table), *(np.concatenate(end) for end in ends))


def components(count: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Union-find over `count` nodes with edges a[i]-b[i] -> (count,) the smallest node each is connected with."""
    root = np.arange(count)
    while True:
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        open_ = low < high
        if not open_.any():
            return root
        np.minimum.at(root, high[open_], low[open_])  # a root hangs itself below a smaller one
        while (above := root[root]).tobytes() != root.tobytes():
            root = above


# -- private --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _frequencies(length: int) -> NDArray[np.float32]:
    """(16, length): area-average `length` pixels to 32, then the 16 lowest of the orthonormal DCT-II."""
    edges = np.arange(THUMBNAIL + 1) * length / THUMBNAIL
    left = np.arange(length)
    covered = np.minimum(edges[1:, None], left + 1) - np.maximum(edges[:-1, None], left)  # (32, length)
    wave = np.pi * (2 * np.arange(THUMBNAIL) + 1) / (2 * THUMBNAIL)
    dct = np.sqrt(2 / THUMBNAIL) * np.cos(np.arange(FREQUENCIES)[:, None] * wave)
    dct[0] /= np.sqrt(2)
    return np.asarray(dct @ np.clip(covered, 0, None) * THUMBNAIL / length, np.float32)


def _all_pairs(count: int) -> Iterator[Pairs]:
    """Every i < j, a chunk at a time."""
    start = 0
    while start < count - 1:
        stop = min(count - 1, start + max(1, _CHUNK // count))
        i, j = np.nonzero(np.arange(start, stop)[:, None] < np.arange(count))
        yield np.stack([i + start, j], axis=1)
        start = stop


def _band_pairs(table: Words) -> Iterator[Pairs]:
    """Pairs, some several times, that agree but for at most one bit in a band."""
    for band in range(BANDS):
        keys = _band(table, band)
        order = np.argsort(keys, kind="stable")
        ends = np.cumsum(np.bincount(keys, minlength=1 << 16))
        starts = np.concatenate([[0], ends[:-1]])
        ranked = keys[order]
        yield from _expand(order, np.arange(len(order)), np.arange(len(order)) + 1, ends[ranked])
        for bit in 1 << np.arange(16):
            lower = np.flatnonzero(ranked & bit == 0)  # each pair once: from the one without the bit
            other = ranked[lower] | bit
            yield from _expand(order, lower, starts[other], ends[other])


def _band(table: Words, band: int) -> NDArray[np.int64]:
    """(N,) 16 bits of each hash, every sixteenth: a mix of low frequencies, alike among faces, and high ones."""
    bits = np.unpackbits(table.byteswap().view(np.uint8), axis=1)[:, band::BANDS]
    return np.asarray(bits @ (1 << np.arange(16)), np.int64)


def _expand(
    order: NDArray[np.int64], left: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> Iterator[Pairs]:
    """Pairs of left[k] with each position in starts[k]..ends[k] of `order`, smaller index first."""
    sizes = ends - starts
    total = np.cumsum(sizes)
    cuts = np.searchsorted(total, np.arange(_CHUNK, int(total[-1]) + _CHUNK if len(total) else 0, _CHUNK))
    for first, last in zip([0, *cuts], [*cuts, len(left)], strict=True):
        size = sizes[first:last]
        if not size.sum():
            continue
        steps = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        right = order[np.repeat(starts[first:last], size) + steps]
        mine = np.repeat(order[left[first:last]], size)
        yield np.stack([np.minimum(mine, right), np.maximum(mine, right)], axis=1)
