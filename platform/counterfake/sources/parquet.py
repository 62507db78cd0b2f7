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
from counterfake.sources.listing import BESIDE, listed, refusal

DAMAGED = "no readable parquet file, or a damaged part of one: fetch it again"
BATCH_ROWS = 16  # pictures of a file that are in memory at once
GROUP_ROWS = (
    4096  # a file with larger row groups is read from front to back: reading a few rows unpacks the group
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetSource(SourceConfig):
    """Every .parquet file below a folder, or one file. Inputs are rows: data/train-00000-of-00001.parquet#17.

    Every other file of the folder, and a .parquet file that cannot be opened, is one input that is skipped."""

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
        if root.is_file():
            yield from _numbered(root.name, _count(root))
            return
        for name in _listed(root):
            yield from _numbered(name, _rows_in(root, name)) or [name]

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        root = self.located()
        for name, chosen in itertools.groupby(names, _file_of):
            file = root if root.is_file() else root / name
            wanted = list(chosen)
            if wanted == [name]:
                yield Skipped(name, _complaint(root, name))
            else:
                yield from self._rows(file, name, [int(one.rpartition("#")[2]) for one in wanted])

    @property
    def divisible(self) -> bool:
        root = self.located()
        names = [""] if root.is_file() else [name for name in _listed(root) if _is_table(root, name)]
        return all(_largest_group(root / name) <= GROUP_ROWS for name in names)

    def _rows(self, path: Path, name: str, rows: Sequence[int]) -> Iterator[Sample | Skipped]:
        """These rows of a file; from a damaged page on they are skipped."""
        done = 0
        try:
            with _opened(path) as file:
                columns = self._columns(file, name)
                classes = _class_names(file.schema_arrow, self.label_column)
                for number, row in _chosen(file, rows, columns):
                    done += 1
                    yield self._sample(f"{name}#{number}", row, classes)
        except _Unreadable:
            yield from (Skipped(f"{name}#{number}", DAMAGED) for number in rows[done:])

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


class _Unreadable(DataError):
    """The file, or a page of it, is no parquet."""


def _listed(root: Path) -> list[str]:
    """What lies below the folder. DataError if no .parquet file does."""
    found = listed(root)
    if not any(_is_table(root, name) for name in found):
        raise DataError(f"{root} holds no .parquet file; set source.path to the folder that does")
    return found


def _is_table(root: Path, name: str) -> bool:
    return name.endswith(".parquet") and refusal(root, name) is None


def _rows_in(root: Path, name: str) -> int:
    """Rows of a file below the folder; 0 if it is no table, or cannot be opened."""
    try:
        return _count(root / name) if _is_table(root, name) else 0
    except _Unreadable:
        return 0


def _numbered(name: str, rows: int) -> list[str]:
    return [f"{name}#{row}" for row in range(rows)]


def _file_of(name: str) -> str:
    """data/a.parquet#17 -> data/a.parquet; a name without a number is a file that was not opened."""
    file, _, number = name.rpartition("#")
    return file if file.endswith(".parquet") and number.isdigit() else name


def _complaint(root: Path, name: str) -> str:
    """Why none of the file's rows is an input."""
    if not _is_table(root, name):
        return refusal(root, name) or BESIDE
    try:
        return DAMAGED if _count(root / name) else "holds no rows"
    except _Unreadable:
        return DAMAGED


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(file) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:
        text = str(error).splitlines()[0][:120]
        raise _Unreadable(f"{file} is no readable parquet file: {text}; fetch it again") from error


def _count(file: Path) -> int:
    with _opened(file) as opened:
        return int(opened.metadata.num_rows)


def _largest_group(file: Path) -> int:
    """Rows; 0 for a file that cannot be opened."""
    try:
        with _opened(file) as opened:
            facts = opened.metadata
            return max((facts.row_group(i).num_rows for i in range(facts.num_row_groups)), default=0)
    except _Unreadable:
        return 0


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
