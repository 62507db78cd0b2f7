"""A version as files that other tools read: Parquet, WebDataset archives, or a folder of pictures with a table.

The export grows in a folder beside its destination, one shard after the other, each marked by a receipt; what is marked is
not done again. When all is there the folder gets its name, so the destination exists whole or not at all. Rows of sources
whose terms forbid it are left out and counted in `export.json`, which lists sources, licences and files.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from counterfake import locks, media, provenance
from counterfake.config import canonical_json
from counterfake.errors import ConfigError, DataError, StorageError
from counterfake.records import Dataset
from counterfake.samples import LABELS
from counterfake.storage import write_atomic
from counterfake.versions import Shard, Version

Format = Literal["parquet", "webdataset", "folder"]
EXPORT_VERSION = 1  # of export.json
ROW_GROUP = 1024  # rows of a Parquet row group
_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def export(
    dataset: Dataset,
    version: Version | int | None,
    folder: Path,
    format: Format,
    *,
    splits: Sequence[str] = (),
    allow_research: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a version (of it `splits`, default all) as the new folder `folder` -> what export.json says.

    The same call again continues an interrupted export, or returns what a finished one wrote. progress(rows) comes
    after each shard. Rows whose source says `export: false`, or consent `research` without allow_research, are left out.
    Raises ConfigError for a folder that holds something else, DataError if no row may be exported.
    """
    found = version if isinstance(version, Version) else dataset.version(version)
    if format not in get_args(Format):
        raise ConfigError(f"export format is {format!r}; expected one of {', '.join(get_args(Format))}")
    names = list(splits) or list(found.splits)
    locks.refuse(dataset, found, names, "exported")
    work = _Export(dataset, found, format, {name: found.shards(name) for name in names}, allow_research)
    folder = Path(folder).expanduser().absolute()
    if done := _finished(folder, work.identity):
        return done
    with _disk(folder):
        return work.run(folder, progress)


def refused(version: Version, *, allow_research: bool) -> set[str]:
    """Names of the sources whose rows may not leave."""
    return {
        name
        for name, facts in version.sources.items()
        if facts.get("export") is False or (facts["consent"] == "research" and not allow_research)
    }


# -- private --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Export:
    dataset: Dataset
    version: Version
    format: Format
    splits: dict[str, tuple[Shard, ...]]
    allow_research: bool

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two exports the same."""
        return {
            "schema": EXPORT_VERSION,
            "dataset": f"{self.dataset.store.uri}@{self.version.number}",
            "digest": self.version.digest,
            "format": self.format,
            "splits": list(self.splits),
            "allow_research": self.allow_research,
        }

    def run(self, folder: Path, progress: Callable[[int], None] | None) -> dict[str, Any]:
        unwanted = refused(self.version, allow_research=self.allow_research)
        if unwanted >= set(self.version.sources):
            raise self._nothing(unwanted)
        digest = hashlib.sha256(canonical_json(self.identity)).hexdigest()
        part = folder.with_name(f"{folder.name}.part-{digest[:8]}")
        (part / "receipts").mkdir(parents=True, exist_ok=True)
        receipts = []
        for split, shards in self.splits.items():
            for number, shard in enumerate(shards):
                name = f"{_safe(split)}-{number:05d}-of-{len(shards):05d}"
                receipts.append(self._once(part, name, split, shard, unwanted))
                if progress is not None:
                    progress(shard.rows)
        manifest = self._manifest(receipts)
        if not manifest["rows"]:
            shutil.rmtree(part)
            raise self._nothing(unwanted)
        return _finish(part, folder, manifest)

    def _once(self, part: Path, name: str, split: str, shard: Shard, unwanted: set[str]) -> dict[str, Any]:
        """Write one shard unless its receipt is there -> the receipt."""
        receipt = part / "receipts" / f"{name}.json"
        if not receipt.exists():
            table = self.dataset.reader(shard).read_all()
            keep = pc.invert(pc.is_in(table["source"], value_set=pa.array(sorted(unwanted), pa.string())))
            left_out = Counter(table.filter(pc.invert(keep))["source"].to_pylist())
            kept = table.filter(keep)
            files = _WRITERS[self.format](part, name, split, kept, self.version) if kept.num_rows else []
            facts = {"split": split, "rows": kept.num_rows, "left_out": left_out, "files": files}
            write_atomic(receipt, canonical_json(facts))
        return dict(json.loads(receipt.read_bytes()))

    def _manifest(self, receipts: list[dict[str, Any]]) -> dict[str, Any]:
        left_out: Counter[str] = sum((Counter(r["left_out"]) for r in receipts), Counter())
        rows = {name: sum(r["rows"] for r in receipts if r["split"] == name) for name in self.splits}
        gone = refused(self.version, allow_research=self.allow_research)
        return {
            **self.identity,
            "rows": sum(rows.values()),
            "rows_of_split": rows,
            "left_out": dict(left_out),
            "sources": {name: facts for name, facts in self.version.sources.items() if name not in gone},
            "files": [file for r in receipts for file in r["files"]],
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _nothing(self, unwanted: set[str]) -> DataError:
        return DataError(
            f"{self.dataset.store.uri}@{self.version.number} has no row that may be exported: the terms of "
            f"{', '.join(sorted(unwanted)) or 'its sources'} forbid it; consent research needs --allow-research"
        )


def _finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of an export that is there already. Raises ConfigError where something else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = dict(json.loads((folder / "export.json").read_bytes()))
    except (OSError, ValueError):
        raise ConfigError(f"{folder} exists and is no export; choose a folder that does not exist") from None
    if any(manifest.get(key) != value for key, value in identity.items()):
        raise ConfigError(
            f"{folder} holds the export of {manifest.get('dataset')} as {manifest.get('format')}; "
            "choose another folder or delete it"
        )
    return manifest


def _finish(part: Path, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    tables = sorted((part / "receipts").glob("*.csv"))
    if tables:
        with open(part / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_HEADER)
            for table in tables:
                file.write(table.read_text(encoding="utf-8"))
    write_atomic(part / "export.json", json.dumps(manifest, indent=1).encode())
    shutil.rmtree(part / "receipts")
    os.replace(part, folder)
    return manifest


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}; check the disk, then run the same command again"
        ) from error


# -- formats: each writes the rows of one shard and says which files it made ---------------------------------------


def _parquet(part: Path, name: str, split: str, table: pa.Table, version: Version) -> list[dict[str, Any]]:
    """data/SPLIT-N-of-M.parquet with the shard's columns and metadata, so that `datasets` decodes the pictures."""
    path = part / "data" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table.cast(_parquet_schema(table.schema)), path, row_group_size=ROW_GROUP)
    return [_file(part, path, table.num_rows)]


def _parquet_schema(schema: pa.Schema) -> pa.Schema:
    """face_box as a list of any length: pyarrow 25 writes missing fixed-size lists to Parquet but cannot read them."""
    described = json.loads(schema.metadata[b"huggingface"])
    described["info"]["features"]["face_box"].pop("length", None)
    place = schema.get_field_index("face_box")
    loose = schema.set(place, pa.field("face_box", pa.list_(pa.float32())))
    return loose.with_metadata({**schema.metadata, b"huggingface": json.dumps(described).encode()})


def _webdataset(part: Path, name: str, split: str, table: pa.Table, version: Version) -> list[dict[str, Any]]:
    """SPLIT-N-of-M.tar of ID.jpg and ID.json, which holds the labels."""
    path = part / f"{name}.tar"
    with tarfile.open(path, "w") as archive:
        for row, data, extension in _pictures(table, version):
            labels = json.dumps({**row, "split": split}, allow_nan=False).encode()
            for suffix, content in ((extension, data), ("json", labels)):
                info = tarfile.TarInfo(f"{row['id']}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return [_file(part, path, table.num_rows)]


def _folder(part: Path, name: str, split: str, table: pa.Table, version: Version) -> list[dict[str, Any]]:
    """SPLIT/real/ID.jpg, SPLIT/fake/MAKER/ID.jpg, SPLIT/unknown/ID.jpg; the labels go to metadata.csv."""
    text = io.StringIO()
    writer = csv.writer(text)
    for row, data, extension in _pictures(table, version):
        place = {0: ("real",), 1: ("fake", _safe(row["maker"] or "unknown"))}.get(row["fake"], ("unknown",))
        path = part.joinpath(_safe(split), *place, f"{row['id']}.{extension}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        labels = {**row, "file_name": path.relative_to(part).as_posix(), "split": split}
        writer.writerow([_cell(labels[column]) for column in _HEADER])
    write_atomic(part / "receipts" / f"{name}.csv", text.getvalue().encode())
    return []


_HEADER = ("file_name", "split", *LABELS, "path")
_WRITERS: dict[Format, Callable[[Path, str, str, pa.Table, Version], list[dict[str, Any]]]] = {
    "parquet": _parquet,
    "webdataset": _webdataset,
    "folder": _folder,
}


def _pictures(table: pa.Table, version: Version) -> Iterator[tuple[dict[str, Any], bytes, str]]:
    """(labels, file bytes, extension) of every row; raw pixels become PNG, which loses nothing, marked where a maker of fakes
    is known."""
    for batch in table.to_batches(max_chunksize=64):
        for row in batch.to_pylist():
            image, pixels = row.pop("image", None), row.pop("pixels", None)
            row["attributes"] = json.loads(row["attributes"] or "{}")
            if image is not None:
                row["path"] = image["path"]
                yield row, image["bytes"], _EXTENSIONS.get(media.sniff(image["bytes"]), "bin")
            else:
                assert version.shape is not None
                data = media.encode(np.array(pixels, np.uint8).reshape(version.shape), "png")
                made = row.get("fake") == 1 and row.get("maker")
                yield row, provenance.mark(data, maker=row["maker"]) if made else data, "png"


def _file(part: Path, path: Path, rows: int) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # before the receipt that says it is whole
    return {"name": path.relative_to(part).as_posix(), "rows": rows, "bytes": path.stat().st_size}


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _safe(name: str) -> str:
    """A name as one part of a path: no separators, never hidden, never the folder above."""
    return re.sub(r"[^\w@+.-]", "_", name).lstrip(".") or "_"
