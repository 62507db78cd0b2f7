"""Parquet files with a column of pictures, as Hugging Face keeps image data sets: struct<bytes, path>, or plain bytes.

https://huggingface.co/docs/datasets/image_dataset. A file called train-00000-of-00004.parquet, or lying in a folder
called train, prescribes the split of its rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from counterfake.errors import ConfigError, DataError
from counterfake.sources import Sample, Skipped, SourceConfig
from counterfake.sources.folder import FAKE, LIMIT, REAL, SPLITS

BATCH_ROWS = 16  # pictures of a file that are in memory at once
GROUP_ROWS = (
    4096  # a file with larger row groups is read from front to back: reading a few rows unpacks the group
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetSource(SourceConfig):
    """Every .parquet file below a folder, or one file. Inputs are rows: data/train-00000-of-00001.parquet#17."""

    image_column: str = "image"
    label_column: str = ""  # says whether a picture is fake; "" = the setting `fake` does
    labels: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # value, or name of the class, -> 1 fake, 0 real; {} = by names such as REAL and FAKE
    maker_column: str = ""  # what made the fakes; "" = the setting `maker`
    identity_column: str = ""  # who is shown
    class_column: str = ""  # number of a class, e.g. for a conditional GAN
    fake: int | None = None  # label where no column says: 1 fake, 0 real, null unknown
    maker: str = ""  # what made the fakes; "" = unknown

    def __post_init__(self) -> None:
        if wrong := [value for value in self.labels.values() if value not in (0, 1)]:
            raise ConfigError(f"source.labels gives 1 (fake) or 0 (real) for a value, not {wrong[0]}")

    def names(self) -> Iterator[str]:
        root = self.located()
        for file in _files(root):
            with _opened(file) as opened:
                yield from (f"{_name(root, file)}#{row}" for row in range(opened.metadata.num_rows))

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        root = self.located()
        for name, chosen in itertools.groupby(names, lambda name: name.rpartition("#")[0]):
            rows = [int(one.rpartition("#")[2]) for one in chosen]
            with _opened(root if root.is_file() else root / name) as file:
                yield from self._rows(file, name, rows)

    @property
    def divisible(self) -> bool:
        return all(_largest_group(file) <= GROUP_ROWS for file in _files(self.located()))

    def _rows(self, file: pq.ParquetFile, name: str, rows: Sequence[int]) -> Iterator[Sample | Skipped]:
        columns = self._columns(file, name)
        classes = _class_names(file.schema_arrow, self.label_column)
        for number, row in _chosen(file, rows, columns):
            yield self._sample(f"{name}#{number}", row, classes)

    def _columns(self, file: pq.ParquetFile, name: str) -> list[str]:
        settings = ("image_column", "label_column", "maker_column", "identity_column", "class_column")
        wanted = {setting: getattr(self, setting) for setting in settings if getattr(self, setting)}
        found = file.schema_arrow
        for setting, column in wanted.items():
            if column not in found.names:
                raise DataError(
                    f"{name} has no column {column!r}; it has {', '.join(found.names)}: set source.{setting}"
                )
        kind = found.field(self.image_column).type
        if not (_is_bytes(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
            raise DataError(
                f"{name}: column {self.image_column!r} holds {kind}, expected bytes or struct<bytes, path>; "
                "set source.image_column to the column of pictures"
            )
        return list(dict.fromkeys(wanted.values()))

    def _sample(self, name: str, row: Mapping[str, Any], classes: Sequence[str]) -> Sample | Skipped:
        data = row[self.image_column]
        data = data["bytes"] if isinstance(data, Mapping) else data
        if data is None:
            return Skipped(name, "holds no bytes")
        if len(data) > LIMIT:
            return Skipped(name, f"larger than {LIMIT:,} bytes")
        fake = self._label(row[self.label_column], classes) if self.label_column else self.fake
        if isinstance(fake, str):
            return Skipped(name, fake)
        maker = (row[self.maker_column] if self.maker_column else self.maker) or "unknown"
        identity = row[self.identity_column] if self.identity_column else None
        class_id = row[self.class_column] if self.class_column else None
        return Sample(
            image=data,
            path=name,
            fake=fake,
            maker="camera" if fake == 0 else str(maker),
            identity=None if identity is None else f"{self.label}-{identity}",
            class_id=int(class_id) if isinstance(class_id, int) else None,
            source=self.label,
            split=_split(name),
        )

    def _label(self, value: Any, classes: Sequence[str]) -> int | str:
        """1, 0, or why there is none."""
        known = isinstance(value, int) and 0 <= value < len(classes)
        for word in (str(value), classes[value] if known else str(value)):
            if word in self.labels:
                return self.labels[word]
            if not self.labels and word.lower() in REAL + FAKE:
                return int(word.lower() in FAKE)
        return f"label {word} is neither real nor fake: name it in source.labels"


# -- private --------------------------------------------------------------------------------------------------------


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    found = sorted(root.rglob("*.parquet"))
    if not found:
        raise DataError(f"{root} holds no .parquet file; set source.path to the folder that does")
    return found


def _name(root: Path, file: Path) -> str:
    return file.name if root.is_file() else file.relative_to(root).as_posix()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(file) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:
        text = str(error).splitlines()[0][:120]
        raise DataError(f"{file} is no readable parquet file: {text}; fetch it again") from error


def _largest_group(file: Path) -> int:
    with _opened(file) as opened:
        facts = opened.metadata
        return max((facts.row_group(i).num_rows for i in range(facts.num_row_groups)), default=0)


def _chosen(
    file: pq.ParquetFile, rows: Sequence[int], columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of these ascending rows; row groups without any of them are not read."""
    wanted, start = set(rows), 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        here = wanted.intersection(range(start, start + count))
        if here:
            yield from _of_group(file, group, start, here, columns)
        start += count


def _of_group(
    file: pq.ParquetFile, group: int, start: int, wanted: set[int], columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False):
        inside = [i for i in range(batch.num_rows) if start + i in wanted]
        rows = batch.take(pa.array(inside, pa.int64())).to_pylist() if inside else []
        yield from ((start + i, row) for i, row in zip(inside, rows, strict=True))
        start += batch.num_rows


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema, column: str) -> list[str]:
    """The names of a Hugging Face ClassLabel column, by number; [] for any other."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _split(name: str) -> str | None:
    """By the first folder or the file's own prefix: test/a.parquet, data/test-00000-of-00001.parquet."""
    path = Path(name)
    words = (path.parts[0] if len(path.parts) > 1 else "", path.name.partition("-")[0].partition(".")[0])
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), None)
