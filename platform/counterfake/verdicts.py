"""Bulk scoring: pictures of a dataset version or a folder through one ensemble, into Parquet, part by part.

A verdict here is the one that serving gives for the same bytes, bit for bit: the same predictor decodes them, looks for
faces, and its probabilities do not depend on what else is in a batch. Parts are cut from the inputs alone, and a part is
there whole or not at all, so that any number of workers and attempts give the same files. Who shares the parts out is the
job, on threads here or through cluster/bulk.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from counterfake import config, locks, predictor, provenance
from counterfake.errors import ConfigError, DataError, MediaError, NotFoundError
from counterfake.predictor import Decoded, EnsemblePredictor
from counterfake.records import Dataset
from counterfake.registry import Registry
from counterfake.samples import Sample, to_sample
from counterfake.sources.folder import FolderSource, archive_names, is_divisible, read_files
from counterfake.sources.listing import is_litter
from counterfake.storage import Store, open_store

FORMAT = 1  # of parts; raised when they would hold something else
CHUNK = 32  # pictures decoded and judged at a time
MANIFEST = "score.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One input: encoded bytes, raw pixels of a dataset, or the reason why it was not read."""

    id: str  # SHA-256 of the media; "" if it was not read
    path: str
    fake: int | None = None  # label, where the input has one
    data: bytes | None = None
    pixels: Any = None  # (H, W, C) uint8
    unread: str = ""


# -- parts ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetParts:
    """A split of a version: each record batch belongs to one part."""

    uri: str  # with @version
    split: str
    rows: int  # of a part, about

    def cut(self, cache: Path) -> list[dict[str, Any]]:
        """[{"number", "shard", "batches": [first, end), "rows"}], in stored order. DataError for a locked split."""
        dataset = Dataset.open(self.uri, cache=cache)
        version = dataset.version()
        locks.refuse(dataset, version, [self.split], "scored row by row")
        found: list[dict[str, Any]] = []
        for shard, held in enumerate(version.shards(self.split)):
            for first, end, rows in _runs(held.rows_per_batch, self.rows):
                found.append({"number": len(found), "shard": shard, "batches": [first, end], "rows": rows})
        return found

    def digest(self, cache: Path) -> str:
        return config.digest([Dataset.open(self.uri, cache=cache).version().digest, self.split, self.rows])

    def read(self, part: Mapping[str, Any], cache: Path) -> Iterator[Picture]:
        dataset = Dataset.open(self.uri, cache=cache)
        version = dataset.version()
        reader = dataset.reader(version.shards(self.split)[part["shard"]])
        for index in range(*part["batches"]):
            for row in reader.get_batch(index).to_pylist():
                yield _picture(to_sample(row, version.shape, self.split))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderParts:
    """Every file of a folder or archive, by name."""

    path: str
    rows: int

    def cut(self, cache: Path) -> list[dict[str, Any]]:
        """[{"number", "names", "rows"}]. DataError for a folder without files, ConfigError for a compressed archive."""
        if not is_divisible(self._path):
            raise ConfigError(
                f"{self.path} can only be read from front to back; unpack it, or pack it as .zip"
            )
        names = [name for name in archive_names(self._path) if not is_litter(name)]
        if not names:
            raise DataError(f"{self.path} holds no files; name a folder with pictures")
        chunks = [names[start : start + self.rows] for start in range(0, len(names), self.rows)]
        return [{"number": n, "names": chunk, "rows": len(chunk)} for n, chunk in enumerate(chunks)]

    def digest(self, cache: Path) -> str:
        source = FolderSource(path=str(self._path))
        return config.digest([str(self._path), source.stamp(), self.rows])

    def read(self, part: Mapping[str, Any], cache: Path) -> Iterator[Picture]:
        for name, content in read_files(self._path, part["names"]):
            if isinstance(content, str):
                yield Picture(id="", path=name, unread=content)
            else:
                yield Picture(id=hashlib.sha256(content).hexdigest(), path=name, data=content)

    @property
    def _path(self) -> Path:
        path = Path(self.path).expanduser()
        if not path.exists():
            raise NotFoundError(f"{path} does not exist; name a folder with pictures")
        return path


Parts = DatasetParts | FolderParts


# -- judging --------------------------------------------------------------------------------------------------------


def load(folder: str | Path) -> EnsemblePredictor:
    """The ensemble in a bundle folder, once in each process. ConfigError for a model that gives no verdicts."""
    return _loaded(str(folder))


def judge(
    loaded: EnsemblePredictor, pictures: Sequence[Picture], pool: ThreadPoolExecutor
) -> list[dict[str, Any]]:
    """The verdict of each picture, as `EnsemblePredictor.verdict` gives it, without timings and heat map.

    A picture that was not read or cannot be decoded is no_verdict with its reason."""
    found = list(pool.map(functools.partial(_decoded, loaded), pictures))
    good = [picture for picture in found if isinstance(picture, Decoded)]
    columns = loaded.member_probabilities(good) if good else {}
    rows = iter({name: float(column[i]) for name, column in columns.items()} for i in range(len(good)))
    return [
        _answer(loaded, picture, one, next(rows)) if isinstance(one, Decoded) else loaded.judge.refuse(*one)
        for picture, one in zip(pictures, found, strict=True)
    ]


def table(
    loaded: EnsemblePredictor, pictures: Sequence[Picture], verdicts: Sequence[Mapping[str, Any]]
) -> pa.Table:
    """Rows as they are stored: id, path, fake, verdict, reason, detail, probability_fake, and one column per detector."""
    rows = [
        {
            "id": picture.id, "path": picture.path.encode("utf-8", "replace").decode(), "fake": picture.fake,
            **{key: verdict.get(key) for key in ("verdict", "reason", "detail", "probability_fake")},
            **{f"probability_{d['name']}": d["probability"] for d in verdict["detectors"]},
        }
        for picture, verdict in zip(pictures, verdicts, strict=True)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema(loaded))


def schema(loaded: EnsemblePredictor) -> pa.Schema:
    """Columns of a part. Labels of the input stand beside the verdict and took no part in it."""
    text = [pa.field(name, pa.string()) for name in ("verdict", "reason", "detail")]
    members = [pa.field(f"probability_{name}", pa.float64()) for name in loaded.ensemble.members]
    first = [pa.field("id", pa.string()), pa.field("path", pa.string()), pa.field("fake", pa.int8())]
    return pa.schema([*first, *text, pa.field("probability_fake", pa.float64()), *members])


# -- on storage -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the parts go: part-000000.parquet … and score.json, which says of what model and input they are."""

    store: Store

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Claim the place. ConfigError if it holds verdicts of another model or other inputs."""
        data = config.canonical_json({"format": FORMAT, **facts})
        if self.store.put_if_absent(MANIFEST, data):
            return
        there = json.loads(self.store.read(MANIFEST))
        for key, value in json.loads(data).items():
            if there.get(key) != value:
                raise ConfigError(
                    f"{self.store.uri} holds verdicts of {key} {str(there.get(key))[:80]}, not {str(value)[:80]}; "
                    "set another `into`, or leave it out"
                )

    def done(self) -> set[int]:
        """Numbers of the parts that are there."""
        found = (re.fullmatch(r"part-(\d{6,})\.parquet", entry.key) for entry in self.store.list("part-"))
        return {int(match[1]) for match in found if match}

    def put(self, number: int, rows: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(rows, sink, compression="zstd")
        self.store.put_if_absent(f"part-{number:06d}.parquet", sink.getvalue())

    def counts(self, number: int) -> dict[str, int]:
        """Pictures of a part by verdict; of no_verdict by reason."""
        rows = pq.read_table(
            io.BytesIO(self.store.read(f"part-{number:06d}.parquet")), columns=["verdict", "reason"]
        )
        words = zip(rows["verdict"].to_pylist(), rows["reason"].to_pylist(), strict=True)
        names = [f"no_verdict: {reason}" if word == "no_verdict" else word for word, reason in words]
        return {name: names.count(name) for name in sorted(set(names))}


def read(uri: str, digest: str) -> pa.Table:
    """All verdicts at `uri`. ConfigError if they are not of the ensemble with this digest."""
    store = open_store(uri)
    if (found := json.loads(store.read(MANIFEST))["model"]) != digest:
        raise ConfigError(
            f"{uri} holds probabilities of ensemble {found[:12]}, not of {digest[:12]}; score again with this version"
        )
    output = Output(store)
    parts = [pq.read_table(io.BytesIO(store.read(f"part-{n:06d}.parquet"))) for n in sorted(output.done())]
    if not parts:
        raise DataError(f"{uri} holds no verdicts yet; run the scoring to its end")
    return pa.concat_tables(parts)


def score_part(
    part: Mapping[str, Any],
    *,
    inputs: Mapping[str, Any],
    bundle: Mapping[str, str],
    uri: str,
    cache: str,
    threads: int,
) -> dict[str, Any]:
    """Judge one part and store it -> {"number", "rows"}. What a worker runs: everything it is given is JSON-able.

    bundle: {"folder", "digest", "bundles"}; where a node has no such folder, the bundle is fetched by its digest."""
    loaded, source = load(_here(bundle, Path(cache))), parts_of(inputs)
    with ThreadPoolExecutor(threads, thread_name_prefix="score") as pool:
        chunks = _chunks(source.read(part, Path(cache)))
        tables = [table(loaded, chunk, judge(loaded, chunk, pool)) for chunk in chunks]
    rows = pa.concat_tables([schema(loaded).empty_table(), *tables])
    Output(open_store(uri)).put(part["number"], rows)
    return {"number": part["number"], "rows": rows.num_rows}


def parts_of(inputs: Mapping[str, Any]) -> Parts:
    """The inverse of dataclasses.asdict."""
    return DatasetParts(**inputs) if "uri" in inputs else FolderParts(**inputs)


# -- private --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _loaded(folder: str) -> EnsemblePredictor:
    found = predictor.load(folder)
    if not isinstance(found, EnsemblePredictor):
        raise ConfigError(
            f"{folder} is a {found.bundle.kind}, not an ensemble; only an ensemble gives verdicts"
        )
    return found


def _here(bundle: Mapping[str, str], cache: Path) -> Path:
    folder = Path(bundle["folder"])
    return (
        folder if folder.is_dir() else Registry("", bundle["bundles"]).fetch_digest(bundle["digest"], cache)
    )


def _answer(
    loaded: EnsemblePredictor, picture: Picture, decoded: Decoded, own: Mapping[str, float]
) -> dict[str, Any]:
    """The verdict of one picture from its detectors' probabilities."""
    reasons = {n: why for n, member in loaded.members.items() if (why := member.refusal(decoded))}
    origin = config.to_dict(provenance.read(picture.data)) if picture.data is not None else {}
    return loaded.judge.answer(own, reasons=reasons, faces=decoded.faces, origin=origin)


def _decoded(loaded: EnsemblePredictor, picture: Picture) -> Decoded | tuple[str, str]:
    """Pixels, or reason and detail."""
    if picture.unread:
        return "unread", picture.unread
    if picture.data is None:
        return Decoded(pixels=picture.pixels).searched(loaded.finders, loaded.finds_eyes)
    try:
        return loaded.decode(picture.data)
    except MediaError as error:
        return error.reason, str(error)


def _picture(sample: Sample) -> Picture:
    return Picture(
        id=sample.id, path=sample.path, fake=sample.fake, data=sample.image,
        pixels=None if sample.pixels is None else np.asarray(sample.pixels),
    )  # fmt: skip


def _runs(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int, int]]:
    """Neighbouring record batches of together at most `most` rows (one at least): (first, end, rows)."""
    first, rows = 0, 0
    for index, length in enumerate(lengths):
        if rows and rows + length > most:
            yield first, index, rows
            first, rows = index, 0
        rows += length
    if rows:
        yield first, len(lengths), rows


def _chunks(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    chunk: list[Picture] = []
    for picture in pictures:
        chunk.append(picture)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
