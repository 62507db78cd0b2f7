"""An ingest in parts, so that it can be shared by workers and go on after a kill: each part is prepared and staged alone.

`<dataset>/staging/<digest of recipe and inputs>/part-000123.json` is the receipt of a part, written last with
put-if-absent: what became of each input, and which Arrow file beside it holds the rows. Parts depend on the inputs
alone, so that any number of workers, and any number of attempts, give the same rows in the same order.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from counterfake import config
from counterfake.errors import CorruptError, NotFoundError
from counterfake.prepare import Recipe, prepared
from counterfake.samples import LABEL_TYPES, Sample, Skipped
from counterfake.storage import Store, file_sha256, open_store
from counterfake.temporary import temporary_folder

FORMAT = 2  # of staged parts; raised when older ones would be misread or prepared differently
FLUSH_BYTES = 16 << 20  # of media in one record batch of a staged part
FLUSH_ROWS = 1024
LEFT_SECONDS = 7 * 86_400
OVERTAKEN = "if another process has just finished the same ingest, run this one again to see its result"
UNREAD = "was not read: it disappeared"
COLUMNS = pa.schema(
    [pa.field(name, kind) for name, kind in LABEL_TYPES]
    + [pa.field("path", pa.string()), pa.field("split", pa.string())]
    + [pa.field("media", pa.binary()), pa.field("shape", pa.list_(pa.int32()))]  # shape: of raw pixels
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some neighbouring inputs of a source."""

    number: int
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of the inputs of a part."""

    number: int
    inputs: int  # in the part: ok + skipped
    rows: int
    unlabelled: int  # rows with neither a label nor a person
    sha256: str  # of the Arrow file with the rows; "" = there are none
    skipped: tuple[tuple[str, str], ...]  # (input, reason) of each one that gave no row
    partly: tuple[
        tuple[str, str, int], ...
    ]  # (input, reason, count) of parts, such as frames, that gave no row

    @property
    def file(self) -> str:
        return f"{_stem(self.number)}-{self.sha256[:16]}.arrow"

    @classmethod
    def parse(cls, data: bytes) -> Self:
        tree: dict[str, Any] = json.loads(data)
        lists = {name: tuple(tuple(entry) for entry in tree[name]) for name in ("skipped", "partly")}
        return cls(**tree | lists)


def cut(names: Sequence[str], size: int) -> list[Part]:
    """Every name in one part of at most `size`, in order."""
    chunks = (tuple(names[start : start + size]) for start in range(0, len(names), size))
    return [Part(number, chunk) for number, chunk in enumerate(chunks)]


def digest(recipe: Recipe, names: Iterable[str], size: int) -> str:
    """SHA-256 (hex) of everything that decides what the staged parts hold, the times of the files included."""
    found = hashlib.sha256(config.canonical_json([FORMAT, config.to_dict(recipe), size]))
    found.update(recipe.source.stamp().encode())
    for name in names:
        found.update(name.encode("utf-8", "surrogateescape") + b"\n")
    return found.hexdigest()


def scratch(home: Path) -> Path:
    """A folder for media on their way into a version, under a workspace's home: those of a system may be small.

    What a killed process of another machine left there goes after LEFT_SECONDS in which nothing was written to it."""
    folder = home / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        with contextlib.suppress(OSError):  # another process is faster, or at work in it
            newest = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if newest < time.time() - LEFT_SECONDS:
                shutil.rmtree(left)
    return folder


class Staging:
    """The staged parts of one ingest, under `prefix` of a store. Safe to use from several processes.

    scratch: folder for a part that is being made; None = the system's."""

    def __init__(self, store: Store, prefix: str, scratch: Path | None = None) -> None:
        self.store, self.prefix, self.scratch = store, prefix.rstrip("/"), scratch

    def done(self) -> set[int]:
        """Numbers of the parts that are there."""
        found = (re.search(r"/part-(\d{6,})\.json$", e.key) for e in self.store.list(f"{self.prefix}/"))
        return {int(match[1]) for match in found if match}

    def stage(self, part: Part, items: Iterable[Sample | Skipped]) -> Receipt:
        """Store the prepared items of a part. Nobody sees it before its receipt is there."""
        with temporary_folder(self.scratch) as folder:
            path = folder / "rows.arrow"
            tally = _Tally(part)
            with _Writer(path) as writer:
                for item in items:
                    tally.add(item)
                    if isinstance(item, Sample):
                        writer.add(item)
            receipt = tally.receipt(file_sha256(path) if tally.rows else "")
            if receipt.rows:
                self.store.put_file(f"{self.prefix}/{receipt.file}", path)
        self.store.put_if_absent(self._key(part.number), config.canonical_json(dataclasses.asdict(receipt)))
        return receipt

    def receipt(self, number: int) -> Receipt:
        """Raises NotFoundError, or CorruptError for what is no receipt."""
        try:
            return Receipt.parse(self.store.read(self._key(number)))
        except NotFoundError as error:
            raise NotFoundError(f"{error}; {OVERTAKEN}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptError(
                f"{self.store.uri}/{self._key(number)} is not readable; delete it and run the ingest again"
            ) from error

    def samples(self, receipt: Receipt, cache: Path) -> Iterator[Sample]:
        """The rows of a part in order, their bytes verified."""
        if not receipt.rows:
            return
        try:
            path = self.store.fetch(f"{self.prefix}/{receipt.file}", sha256=receipt.sha256, cache=cache)
        except NotFoundError as error:
            raise NotFoundError(f"{error}; {OVERTAKEN}") from error
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                yield from map(_to_sample, reader.get_batch(index).to_pylist())
        if not self.store.is_local:
            path.unlink(missing_ok=True)  # a copy that is of no use again

    def clear(self) -> None:
        """Remove everything, receipts first: from then on no part is taken for staged."""
        entries = self.store.list(f"{self.prefix}/")
        for entry in sorted(entries, key=lambda entry: not entry.key.endswith(".json")):
            self.store.delete(entry.key)
        if self.store.is_local:
            system, root = self.store.filesystem()
            system.delete_dir(f"{root}/{self.prefix}")

    def _key(self, number: int) -> str:
        return f"{self.prefix}/{_stem(number)}.json"


def stage_here(recipe: Recipe, parts: Sequence[Part], staging: Staging, threads: int) -> Iterator[Receipt]:
    """Stage the parts in threads of this process. Receipts come as parts are finished."""
    if recipe.source.divisible:
        yield from _in_threads(recipe, parts, staging, threads)
        return
    numbers = {name: part.number for part in parts for name in part.names}
    items = recipe.source.read([name for part in parts for name in part.names])
    runs = {part.number: part for part in parts}
    for number, run in itertools.groupby(items, key=lambda item: numbers[item.path]):
        yield staging.stage(runs.pop(number), prepared(recipe, run, threads))
    yield from (staging.stage(part, ()) for part in runs.values())  # of which nothing came


def stage_one(item: dict[str, Any], *, recipe: dict[str, Any], uri: str, prefix: str) -> dict[str, int]:
    """Stage one part on a worker: {"number", "names"} -> {"number", "inputs"}."""
    made = config.from_dict(Recipe, recipe)
    part = Part(int(item["number"]), tuple(item["names"]))
    items = prepared(made, made.source.read(part.names))
    receipt = Staging(open_store(uri), prefix).stage(part, items)
    return {"number": receipt.number, "inputs": receipt.inputs}


# -- private --------------------------------------------------------------------------------------------------------


def _in_threads(recipe: Recipe, parts: Sequence[Part], staging: Staging, threads: int) -> Iterator[Receipt]:
    """Each part in a thread; with fewer parts than threads, each of them shared by several."""
    outer = min(threads, max(1, len(parts)))

    def stage(part: Part) -> Receipt:
        return staging.stage(part, prepared(recipe, recipe.source.read(part.names), threads // outer))

    with ThreadPoolExecutor(outer, thread_name_prefix="part") as pool:
        futures = [pool.submit(stage, part) for part in parts]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interrupt: no further part


def _stem(number: int) -> str:
    return f"part-{number:06d}"


class _Tally:
    """Counts what became of each input of a part."""

    def __init__(self, part: Part) -> None:
        self.part, self.rows, self.unlabelled = part, 0, 0
        self._ok: set[str] = set()
        self._skipped: dict[str, str] = {}
        self._partly: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, item: Sample | Skipped) -> None:
        if isinstance(item, Sample):
            self._ok.add(item.path)
            self.rows += 1
            self.unlabelled += item.fake is None and item.identity is None
        elif item.whole:
            self._skipped.setdefault(item.path, item.reason)
        else:
            self._partly[item.path, item.reason] += 1

    def receipt(self, sha256: str) -> Receipt:
        names = self.part.names
        stray = (self._ok | self._skipped.keys() | {path for path, _ in self._partly}) - set(names)
        assert not stray, f"part {self.part.number} was given an input that is not its own: {min(stray)}"
        reasons = dict(sorted(self._partly)) | self._skipped
        skipped = tuple((name, reasons.get(name, UNREAD)) for name in names if name not in self._ok)
        partly = tuple((path, reason, count) for (path, reason), count in sorted(self._partly.items()))
        return Receipt(
            number=self.part.number,
            inputs=len(names),
            rows=self.rows,
            unlabelled=self.unlabelled,
            sha256=sha256,
            skipped=skipped,
            partly=partly,
        )


class _Writer:
    """Rows into an Arrow file, a bounded number of bytes at a time."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._file = pa.ipc.new_file(self._sink, COLUMNS)
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()
        self._sink.close()

    def add(self, sample: Sample) -> None:
        row = {name: _text(getattr(sample, name)) for name in COLUMNS.names if name not in ("media", "shape")}
        row["attributes"] = json.dumps(sample.attributes, sort_keys=True)
        shape = None if sample.pixels is None else list(sample.pixels.shape)
        self._rows.append({**row, "media": sample.media, "shape": shape})
        self._bytes += len(self._rows[-1]["media"])
        if self._bytes >= FLUSH_BYTES or len(self._rows) == FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=COLUMNS))
        self._rows, self._bytes = [], 0


def _text(value: Any) -> Any:
    """File names need not be UTF-8; Arrow's strings are."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _to_sample(row: dict[str, Any]) -> Sample:
    data, shape = row.pop("media"), row.pop("shape")
    row["face_box"] = tuple(row["face_box"]) if row["face_box"] is not None else None
    row["attributes"] = json.loads(row["attributes"])
    if shape is None:
        return Sample(**row, image=data)
    return Sample(**row, pixels=np.frombuffer(data, np.uint8).reshape(shape))
