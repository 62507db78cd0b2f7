"""A sample, the Arrow schema it is stored with, and the report of where every input went."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from counterfake.errors import DataError
from counterfake.versions import SCHEMA_VERSION

EXAMPLES = 20  # of each reason that a report names


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture and what is known of it. Either `image` (encoded bytes) or `pixels` (H, W, C) uint8 is set."""

    image: bytes | None = None
    pixels: NDArray[np.uint8] | None = None
    id: str = ""  # SHA-256 (hex) of the media bytes; computed when left out
    path: str = ""  # where it came from, for people
    fake: int | None = None  # 1 fake, 0 real, None unknown
    maker: str = "camera"  # or what made it, e.g. dcgan-faces@7
    class_id: int | None = None
    identity: str | None = None
    source: str
    video: str | None = None
    frame: int | None = None
    time_s: float | None = None
    face_box: tuple[float, float, float, float] | None = None  # x, y, width, height in pixels
    face_method: str | None = None
    face_margin: float | None = None
    landmarks: list[float] | None = None  # x0, y0, x1, y1, … in pixels
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)  # anything else that JSON can hold
    split: str | None = None  # prescribed by the source; else the split rule decides

    def __post_init__(self) -> None:
        if (self.image is None) == (self.pixels is None):
            raise DataError(f"sample {self.path or self.id!r} needs either image or pixels")
        if self.fake not in (0, 1, None):
            raise DataError(f"sample {self.path or self.id!r} has fake={self.fake!r}; expected 1, 0 or None")
        if self.pixels is not None:
            self._check_pixels(self.pixels)
        if not self.id:
            object.__setattr__(self, "id", hashlib.sha256(self.media).hexdigest())
        elif not re.fullmatch("[0-9a-f]{64}", self.id):
            raise DataError(
                f"sample {self.path!r} has id {self.id!r}; expected the SHA-256 of its media in hex"
            )

    def _check_pixels(self, pixels: NDArray[np.uint8]) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
            raise DataError(
                f"sample {self.path!r} has pixels {pixels.dtype} {pixels.shape}; expected uint8 (H, W, C)"
            )
        if pixels.ndim == 2:
            object.__setattr__(self, "pixels", pixels[:, :, None])

    @property
    def media(self) -> bytes:
        """What is stored: the encoded file, or the raw pixels in row order."""
        if self.image is not None:
            return self.image
        assert self.pixels is not None
        return self.pixels.tobytes()


LABEL_TYPES: list[tuple[str, pa.DataType]] = [
    ("id", pa.string()),
    ("fake", pa.int8()),
    ("maker", pa.string()),
    ("class_id", pa.int32()),
    ("identity", pa.string()),
    ("source", pa.string()),
    ("video", pa.string()),
    ("frame", pa.int32()),
    ("time_s", pa.float64()),
    ("face_box", pa.list_(pa.float32(), 4)),
    ("face_method", pa.string()),
    ("face_margin", pa.float32()),
    ("landmarks", pa.list_(pa.float32())),
    ("attributes", pa.string()),
]
LABELS = tuple(name for name, _ in LABEL_TYPES)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def schema(kind: str, shape: Sequence[int] | None = None) -> pa.Schema:
    """The Arrow schema of a shard, with metadata that makes `datasets` decode the pictures."""
    if kind == "image":
        media = [pa.field("image", IMAGE)]
    else:
        assert shape is not None, "raw pixels need their shape"
        media = [pa.field("pixels", pa.list_(pa.uint8(), int(np.prod(shape)))), pa.field("path", pa.string())]
    fields = [
        pa.field("id", pa.string(), nullable=False),
        *media,
        *(pa.field(n, t) for n, t in LABEL_TYPES[1:]),
    ]
    features = {field.name: _feature(field) for field in fields}
    ours = {"schema_version": SCHEMA_VERSION, "kind": kind, "shape": list(shape or [])}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), "counterfake": json.dumps(ours)}
    return pa.schema(fields, metadata=metadata)


def _feature(field: pa.Field) -> dict[str, Any]:
    """The field in the words of Hugging Face `datasets`."""
    if field.name == "image":
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(field.type):
        inner = {"dtype": str(field.type.value_type).replace("float", "float32"), "_type": "Value"}
        return {"feature": inner, "length": field.type.list_size, "_type": "Sequence"}
    if pa.types.is_list(field.type):
        return {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
    names = {"float": "float32", "double": "float64"}
    return {"dtype": names.get(str(field.type), str(field.type)), "_type": "Value"}


def to_sample(row: dict[str, Any], shape: tuple[int, int, int] | None, split: str) -> Sample:
    """A stored row as a sample again."""
    image, pixels = row.pop("image", None), row.pop("pixels", None)
    if image is not None:
        row |= {"image": image["bytes"], "path": image["path"] or ""}
    else:
        row["pixels"] = np.array(pixels, np.uint8).reshape(shape or (-1,))
    box = row["face_box"]
    row["face_box"] = tuple(box) if box is not None else None
    row["attributes"] = json.loads(row["attributes"] or "{}")
    return Sample(**row, split=split)


# -- what an ingest found -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """An input that gave no row, or a part of one, and why."""

    path: str
    reason: str
    whole: bool = True  # False: only a part of the input (one frame of a video) gave no row


@dataclasses.dataclass(kw_only=True)
class Tally:
    """Inputs of an ingest, such as files: each one is ok (gave a row) or skipped."""

    ok: int = 0
    skipped: int = 0

    @property
    def seen(self) -> int:
        return self.ok + self.skipped

    def to_dict(self) -> dict[str, int]:
        return {"seen": self.seen, "ok": self.ok, "skipped": self.skipped}


@dataclasses.dataclass(kw_only=True)
class Report:
    """Where everything went: seen = rows + duplicates + conflicts + skipped. A picture is one row, a video gives many."""

    rows: int = 0
    duplicates: int = 0  # the same bytes were there already
    conflicts: int = 0  # the same bytes were there with the opposite label; the first label stays
    skipped: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )  # reason -> inputs without any row
    partly: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )  # reason -> parts (frames) of inputs that gave no row; not in `seen`
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # reason -> the first few paths
    inputs: Tally | None = None  # where inputs were counted, not only rows

    @property
    def seen(self) -> int:
        return self.rows + self.duplicates + self.conflicts + sum(self.skipped.values())

    def skip(self, path: str, reason: str, count: int = 1, *, whole: bool = True) -> None:
        (self.skipped if whole else self.partly)[reason] += count
        self.example(path, reason)

    def example(self, path: str, reason: str) -> None:
        paths = self.examples.setdefault(reason, [])
        if len(paths) < EXAMPLES:
            paths.append(path)

    def to_dict(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "rows": self.rows,
            "duplicates": self.duplicates,
            "conflicts": self.conflicts,
            "skipped": dict(self.skipped),
            "partly": dict(self.partly),
            "examples": self.examples,
            "inputs": self.inputs.to_dict() if self.inputs else None,
        }
