"""The metadata probe: can real and fake be told apart by the files, without looking at a single pixel?

Where that works, a detector learns the file format instead of the forgery, and its figures mean nothing: real pictures
as camera JPEG and fakes as PNG is the usual case. Headers alone are read, no pixel is decoded. A small boosted forest
guesses the label from them, cross-validated so that what belongs together (one person, one video, near-copies) is never
on both sides; its AUC is the answer. Each family of features is tried alone too, and the one that explains most is named.
Letters: N files, F features, K folds.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterfake import media
from counterfake.errors import DataError, MediaError
from counterfake.evaluation.detection import evaluate
from counterfake.forensics.forest import BenfordForest, ForestConfig

Facts = dict[str, float | str]  # "family.name" -> number, or a word to be one-hot coded
Floats = NDArray[np.float64]

LIMIT = 0.6  # AUC above which a set is said to leak
LEAST = 20  # files of each label; fewer say nothing
FOLDS = 5
NOISE = 0.02  # of AUC; families that explain as much to within this are told apart by their order
WORDS = 24  # one-hot columns of a word-valued fact, most frequent first
RARE = 0.005  # share of the files below which a word gets no column

# Families in the order of blame: what comes first explains what comes later (a PNG has no quantisation table).
FAMILIES = {
    "format": "file format",
    "quantisation": "JPEG quantisation tables",
    "coding": "JPEG coding (subsampling, progressive, Huffman tables)",
    "segments": "metadata segments (JFIF, EXIF, XMP, ICC, their order)",
    "png": "PNG chunks and bit depth",
    "webp": "WEBP kind",
    "dimensions": "width and height",
    "bytes": "file size",
}
REENCODE = "ingest both classes through one encoder: --set encode=jpeg:90"
FIXES = {
    "dimensions": "crop and scale both classes alike before ingest",
    "bytes": f"{REENCODE}; if it was, one class has less detail or was compressed harder before, which no encoder undoes",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What the files alone give away. AUC 0.5 = nothing, 1 = everything."""

    auc: float
    low: float  # of the 95 % interval, bootstrapped over groups
    high: float
    real: int  # files
    fake: int
    family: str  # of the features that explain most
    family_auc: float  # of that family alone
    alone: dict[str, float]  # family -> AUC of it alone, of those that vary at all

    @property
    def leaks(self) -> bool:
        """Above LIMIT with all features, or with one family alone: noise of the others can hide it."""
        return max(self.auc, self.family_auc) > LIMIT and self.low > 0.5

    def sentence(self) -> str:
        """One line for a person: the figure, and where it leaks the reason and the way out."""
        figure = f"AUC {self.auc:.2f} ({self.low:.2f}-{self.high:.2f}) from the files alone, no pixel seen"
        if not self.leaks:
            return figure
        name, fix = FAMILIES[self.family], FIXES.get(self.family, REENCODE)
        return f"{figure}; most of it from {name} (alone {self.family_auc:.2f}): {fix}"


def facts(data: bytes) -> Facts:
    """What the file's headers say, for JPEG, PNG and WEBP; never raises for damaged ones."""
    kind = media.sniff(data)
    found: Facts = {"format.kind": kind, "bytes.bytes": len(data)}
    try:
        width, height = media.header_size(data, kind)
        found |= {"dimensions.width": width, "dimensions.height": height, "dimensions.aspect": width / height}
        found |= {"bytes.per_pixel": len(data) / (width * height)}
        return found | {"jpeg": _jpeg, "png": _png, "webp": _webp}[kind](data)
    except (MediaError, KeyError, ValueError, IndexError, struct.error):
        return found


def probe(
    files: Sequence[Mapping[str, float | str]],
    fake: ArrayLike,
    groups: Sequence[str] | None = None,
    *,
    bootstraps: int = 500,
    seed: int = 0,
) -> Probe:
    """files: N results of `facts`; fake (N,) in {0, 1}; groups: what must stay on one side, default each file alone.

    Deterministic. Raises DataError for fewer than LEAST files of a label, or all of a label in one group.
    """
    labels = np.asarray(fake, np.int64)
    names = np.unique(groups, return_inverse=True)[1] if groups is not None else np.arange(len(labels))
    _check(labels, names)
    x, families = _table(files)
    folds = _folds(labels, names, seed)
    score = _held_out(x, labels, folds, trees=60, seed=seed)
    clusters = [str(name) for name in names]
    figure = evaluate(labels, score, clusters=clusters, bootstraps=bootstraps, seed=seed)["auc"]
    alone = {
        family: _auc(labels, _held_out(x[:, columns], labels, folds, trees=30, seed=seed))
        for family, columns in families.items()
    }
    best = max(alone.values(), default=0.5)
    family = next((name for name in FAMILIES if alone.get(name, 0) >= best - NOISE), "format")
    return Probe(
        **{"auc" if key == "value" else key: round(value, 4) for key, value in figure.items()},
        real=int((labels == 0).sum()),
        fake=int(labels.sum()),
        family=family,
        family_auc=round(alone.get(family, 0.5), 4),
        alone={name: round(value, 4) for name, value in alone.items()},
    )


# -- private: headers -----------------------------------------------------------------------------------------------

_SIZE_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# How many codes of each length the tables of ITU-T T.81, K.3 have: what encoders write that do not optimise.
_STANDARD_HUFFMAN = {
    bytes.fromhex("00010501010101010100000000000000"),
    bytes.fromhex("00030101010101010101010000000000"),
    bytes.fromhex("0002010303020403050504040000017d"),
    bytes.fromhex("00020102040403040705040400010277"),
}
_STANDARD_LUMA_SUM = 3688  # of the luma table at quality 50, ITU-T T.81, K.1


def _jpeg(data: bytes) -> Facts:
    segments = media.jpeg_segments(data)
    payloads: dict[int, list[bytes]] = collections.defaultdict(list)
    for marker, start, end in segments:
        payloads[marker].append(data[start:end])
    order = " ".join(f"{marker:02x}" for marker, _, _ in segments[:64])
    return {
        **_quantisation(payloads[0xDB]),
        **_coding(payloads),
        **_segments(payloads),
        "segments.order": order,
        "segments.count": len(segments),
    }


def _quantisation(payloads: list[bytes]) -> Facts:
    tables = [table for payload in payloads for table in _tables(payload)]
    sums = [float(sum(table)) for table in tables]
    scale = 100 * sums[0] / _STANDARD_LUMA_SUM if sums else 0.0
    digest = hashlib.sha256(repr(tables).encode()).hexdigest()[:12]
    quality = (200 - scale) / 2 if scale <= 100 else 5000 / scale
    return {
        "quantisation.tables": digest,
        "quantisation.count": len(tables),
        "quantisation.luma_sum": sums[0] if sums else 0.0,
        "quantisation.chroma_sum": sums[1] if len(sums) > 1 else 0.0,
        "quantisation.quality": quality,  # of the IJG scale, estimated
    }


def _tables(payload: bytes) -> list[tuple[int, ...]]:
    """The 64 steps of each table of a DQT segment, in zigzag order."""
    tables, at = [], 0
    while at < len(payload):
        wide = payload[at] >> 4
        size = 128 if wide else 64
        tables.append(struct.unpack_from(">64H" if wide else ">64B", payload, at + 1))
        at += 1 + size
    return tables


def _coding(payloads: Mapping[int, list[bytes]]) -> Facts:
    frame = next(((m, p[0]) for m, p in payloads.items() if m in _SIZE_MARKERS and p), None)
    marker, header = frame or (0, b"\0" * 6)
    sampling = header[7 : 6 + 3 * header[5] : 3]
    lengths = [counts for payload in payloads.get(0xC4, []) for counts in _code_lengths(payload)]
    interval = payloads.get(0xDD, [b"\0\0"])[0]
    return {
        "coding.subsampling": sampling.hex(),
        "coding.precision": header[0],
        "coding.process": f"{marker:02x}",  # c0 baseline, c1 extended, c2 progressive
        "coding.optimised": float(any(counts not in _STANDARD_HUFFMAN for counts in lengths)),
        "coding.huffman_tables": len(lengths),
        "coding.restart": int.from_bytes(interval[:2], "big"),
    }


def _code_lengths(payload: bytes) -> list[bytes]:
    """How many codes of each length 1-16 each table of a DHT segment has."""
    found, at = [], 0
    while at + 17 <= len(payload):
        counts = payload[at + 1 : at + 17]
        found.append(counts)
        at += 17 + sum(counts)
    return found


def _segments(payloads: Mapping[int, list[bytes]]) -> Facts:
    jfif = next((p for p in payloads.get(0xE0, []) if p.startswith(b"JFIF\0") and len(p) >= 12), None)
    app1 = payloads.get(0xE1, [])
    return {
        "segments.jfif": jfif[5:7].hex() if jfif else "none",
        "segments.density": " ".join(map(str, struct.unpack(">BHH", jfif[7:12]))) if jfif else "none",
        "segments.exif": sum(len(p) for p in app1 if p.startswith(b"Exif\0")),
        "segments.xmp": sum(len(p) for p in app1 if p.startswith(media.XMP_JPEG)),
        "segments.icc": sum(len(p) for p in payloads.get(0xE2, []) if p.startswith(b"ICC_PROFILE\0")),
        "segments.comment": sum(len(p) for p in payloads.get(0xFE, [])),
    }


def _png(data: bytes) -> Facts:
    chunks = media.png_chunks(data)
    names = [name.decode("latin-1") for name, _, _ in chunks]
    pixels = [end - start for name, start, end in chunks if name == b"IDAT"]
    return {
        "png.chunks": " ".join(dict.fromkeys(names)),
        "png.depth": data[24],
        "png.colour": data[25],
        "png.interlaced": data[28],
        "png.level": data[42] if len(data) > 42 else 0,  # of deflate, where IDAT follows IHDR
        "png.largest_chunk": max(pixels, default=0),
        "segments.exif": sum(end - start for name, start, end in chunks if name == b"eXIf"),
        "segments.xmp": len(media.read_xmp(data) or b""),
        "segments.icc": sum(end - start for name, start, end in chunks if name == b"iCCP"),
    }


def _webp(data: bytes) -> Facts:
    chunks = media.webp_chunks(data)
    return {
        "webp.chunks": " ".join(dict.fromkeys(name.decode("latin-1") for name, _, _ in chunks)),
        "segments.exif": sum(end - start for name, start, end in chunks if name == b"EXIF"),
        "segments.xmp": sum(end - start for name, start, end in chunks if name == b"XMP "),
        "segments.icc": sum(end - start for name, start, end in chunks if name == b"ICCP"),
    }


# -- private: the classifier ----------------------------------------------------------------------------------------


def _check(labels: NDArray[np.int64], groups: NDArray[np.int64]) -> None:
    for label, name in ((0, "real"), (1, "fake")):
        chosen = groups[labels == label]
        if len(chosen) < LEAST or len(np.unique(chosen)) < 2:
            raise DataError(
                f"the metadata probe needs {LEAST} {name} files in two groups or more, "
                f"got {len(chosen)} in {len(np.unique(chosen))}"
            )


def _table(files: Sequence[Mapping[str, float | str]]) -> tuple[Floats, dict[str, NDArray[np.int64]]]:
    """(N, F) numbers, words one-hot coded, what never varies left out; family -> its columns."""
    columns: list[Floats] = []
    families: dict[str, list[int]] = collections.defaultdict(list)
    for name in sorted({name for found in files for name in found}):
        for column in _columns([found.get(name) for found in files]):
            if np.ptp(column) > 0:
                families[name.partition(".")[0]].append(len(columns))
                columns.append(column)
    x = np.stack(columns, axis=1) if columns else np.zeros((len(files), 1))
    return x, {name: np.array(indices) for name, indices in families.items()}


def _columns(values: Sequence[float | str | None]) -> list[Floats]:
    if not any(isinstance(value, str) for value in values):
        return [np.array([-1.0 if value is None else value for value in values], np.float64)]
    counted = collections.Counter(values).most_common(WORDS)
    frequent = sorted(
        str(word) for word, count in counted if count >= RARE * len(values) and word is not None
    )
    return [np.array([value == word for value in values], np.float64) for word in frequent]


def _folds(labels: NDArray[np.int64], groups: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """(N,) the fold of each file: whole groups, dealt in turn within fakes and within the rest."""
    has_fake = np.bincount(groups, weights=labels) > 0
    order = np.random.default_rng(seed).permutation(len(has_fake))
    order = order[np.argsort(has_fake[order], kind="stable")]
    fold = np.empty(len(order), np.int64)
    fold[order] = np.arange(len(order)) % FOLDS
    return fold[groups]


def _held_out(
    x: Floats, labels: NDArray[np.int64], folds: NDArray[np.int64], trees: int, seed: int
) -> Floats:
    """(N,) probability of fake, of each file from a forest that saw none of its fold."""
    config = ForestConfig(kind="boosting", trees=trees, max_depth=2, min_leaf=5, seed=seed)
    score = np.full(len(labels), 0.5)
    for fold in np.unique(folds):
        held = folds == fold
        if len(np.unique(labels[~held])) == 2:
            score[held] = BenfordForest.fit(x[~held], labels[~held], config).predict(x[held])
    return score


def _auc(labels: NDArray[np.int64], score: Floats) -> float:
    """The share of (real, fake) pairs in which the fake scores higher, ties counted half (Mann-Whitney)."""
    _, rank, count = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count - 1) / 2
    fakes = labels.sum()
    above = middle[rank][labels == 1].sum() - fakes * (fakes + 1) / 2
    return float(above / (fakes * (len(labels) - fakes)))
