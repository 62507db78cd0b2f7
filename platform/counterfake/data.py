"""Shards -> batches: a deterministic, resumable, elastic order, decoded by threads into uint8 batches.

The order of rows is order.py's; a rank reads the slice of each global batch that its lanes make.
Letters: N rows of a batch, C channels, H W pixels, L lanes, W world size.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from counterfake import face_masks, labels, locks, media
from counterfake.errors import ConfigError, DataError, MediaError
from counterfake.images import Degradation, Preprocess, degrade, generator
from counterfake.order import Balanced, Order, Rows
from counterfake.records import Dataset
from counterfake.versions import Version, fits

logger = logging.getLogger(__name__)

EYES, POINTS = 2, 5  # of a face: eyes; eyes, nose tip, corners of the mouth
BALANCED_BY = {"class": "class_id", "maker": "maker", "fake": "fake"}  # data.balance -> column


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, in which order, as which pixels."""

    uri: str = ""  # of the data set, perhaps with @version; must be set
    split: str = "train"  # "*" = every split
    batch_size: int = 64  # of the global batch, over all ranks
    preprocess: Preprocess = dataclasses.field(default_factory=Preprocess)
    lanes: int = (
        4  # independent streams; the world size must divide them (gcd with batch_size where it does not fit)
    )
    window: int = 16  # record batches of a lane whose rows are shuffled together
    mix_shards: int = 4  # shards of a lane whose record batches are mixed
    seed: int = 0  # of the order, and of degradation
    drop_last: bool = True  # leave out the rows of an epoch that do not fill a batch
    where: dict[str, Any] = dataclasses.field(default_factory=dict)  # {"fake": 0}, {"identity": ["a", "b"]}
    balance: Literal["", "class", "maker", "fake"] = (
        ""  # equal shares of each in every batch, small ones repeated
    )
    allow_leaks: bool = False  # train though the audit of this version found a leak; recorded with the run
    landmarks: bool = False  # give the points of each face and its exact mask with it, see Batch
    # done to the decoded picture before it is cut out, by the functions of the robustness grid; drawn from (seed, epoch, id)
    degradation: Degradation = dataclasses.field(default_factory=Degradation)
    threads: int = 2  # decoding threads of each rank
    prefetch: int = 4  # batches decoded ahead

    def __post_init__(self) -> None:
        for name in ("batch_size", "lanes", "window", "mix_shards", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if unknown := sorted(set(self.where) - set(labels.COLUMNS)):
            raise ConfigError(
                f"data.where has no column {unknown[0]!r}; it may name {', '.join(labels.COLUMNS)}"
            )

    @property
    def streams(self) -> int:
        """Lanes in use: as many as both divide the batch and were asked for."""
        return math.gcd(self.batch_size, self.lanes)


@dataclasses.dataclass(kw_only=True)
class Batch:
    """One rank's share of a global batch. With drop_last=False the last of an epoch is smaller, on some ranks empty."""

    images: torch.Tensor  # (N, C, H, W) uint8, channels last in memory
    fake: torch.Tensor  # (N,) int64; 1 fake, 0 real, -1 unknown
    class_id: torch.Tensor  # (N,) int64; -1 unknown
    identity: torch.Tensor  # (N,) int64 index into Loader.identities; -1 unknown
    maker: torch.Tensor  # (N,) int64 index into Loader.makers; -1 unknown
    ids: list[str]
    step: int  # of the run, counted over epochs
    epoch: int
    makers: tuple[str, ...] = ()  # the names that `maker` indexes
    landmarks: torch.Tensor | None = (
        None  # (N, 5, 2) float32 x, y in pixels of the images, NaN unknown (of some faces all but the eyes); where asked for
    )
    mask: torch.Tensor | None = (
        None  # (N, 1, H, W) float32 in [0, 1], 1 over the face, NaN in rows without; with landmarks, if a row has one
    )

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; from pinned memory the copy does not wait."""
        names = ("images", "fake", "class_id", "identity", "maker", "landmarks", "mask")
        held = {name: value for name in names if (value := getattr(self, name)) is not None}
        moved = {name: value.to(device, non_blocking=True) for name, value in held.items()}
        return dataclasses.replace(self, **moved)


def chosen(dataset: Dataset, version: Version, config: DataConfig) -> tuple[NDArray[np.bool_], int]:
    """((rows of the split,) which of them `where` chooses and `preprocess` can cut, how many it chooses without a face_box).

    Raises DataError if none of those that `where` chooses has one and the crop needs it."""
    keep = np.ones(version.rows(config.split), bool)
    for column, wanted in config.where.items():
        found = labels.read(dataset, version, config.split, column)
        good = [fits(value, wanted) for value in (*found.values, None)]  # the last answers code -1
        keep &= np.array(good)[found.codes]
    if not config.preprocess.needs_face:
        return keep, 0
    seen = labels.read(dataset, version, config.split, "face_box").codes >= 0
    if keep.any() and not (keep & seen).any():
        raise DataError(
            f"{dataset.store.uri}@{version.number} split {config.split}: none of the {int(keep.sum())} rows"
            f"{f' where {config.where}' if config.where else ''} has a face_box, which data.preprocess.crop={config.preprocess.crop}"
            " needs; ingest them with --set faces=cascade, or set the crop to center"
        )
    return keep & seen, int((keep & ~seen).sum())


def used_sources(dataset: Dataset, version: Version, config: DataConfig) -> dict[str, dict[str, Any]]:
    """Licence and consent of every source that has a row among those `chosen`, by its name; from labels alone."""
    known = version.sources
    if len(known) > 1:
        found, (keep, _) = (
            labels.read(dataset, version, config.split, "source"),
            chosen(dataset, version, config),
        )
        names = [found.values[code] for code in np.unique(found.codes[keep]) if code >= 0]
        known = {name: known[name] for name in names}
    return {name: dict(facts) for name, facts in known.items()}


class Loader:
    """The batches of one rank. Opening reads the manifest and the locks only, and the labels that `where` and `balance` name;
    where the crops need faces, which rows have one: the others are left out and counted."""

    def __init__(
        self, config: DataConfig, *, rank: int = 0, world: int = 1, cache: Path | None = None
    ) -> None:
        """Raises ConfigError where batch, lanes and world size do not fit; DataError for no rows or another schema."""
        if not config.uri:
            raise ConfigError("data.uri is not set; name a dataset, like --set data.uri=faces@3")
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world} workers does not exist")
        check_world(config, world)
        self.config, self.rank, self.world = config, rank, world
        self.dataset = Dataset.open(config.uri, cache=cache)
        self.version = self.dataset.version()
        locks.refuse(self.dataset, self.version, [config.split], "read in batches")
        self.identities = self.version.names("identity", config.where)
        self.makers = self.version.names("maker", config.where)
        self._shards = self.version.shards(config.split)
        self._order = self._ordered()
        if self.rows == 0:
            raise DataError(f"{self._name} has no rows{self._filter}; choose another split or filter")
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{self._name} has {self.rows} rows{self._filter}, fewer than data.batch_size={config.batch_size}; "
                f"lower it or set data.drop_last=false"
            )

    @property
    def rows(self) -> int:
        """Rows of an epoch, over all ranks, before drop_last."""
        return self._order.rows

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps

    def batches(self, start_step: int = 0, epochs: int | None = None) -> Iterator[Batch]:
        """Batches from `start_step` of the run on, for ever or until `epochs` are full. Close it to stop its threads."""
        end = None if epochs is None else epochs * self.steps_per_epoch
        return _prefetched(self, start_step, end)

    def plan(self, step: int) -> Rows:
        """(N, 3): shard, record batch and row of each sample of this rank at `step`, in order."""
        epoch, local = divmod(step, self.steps_per_epoch)
        each = self._order.lanes // self.world
        lanes = range(self.rank * each, (self.rank + 1) * each)
        return np.concatenate([self._order.slice(epoch, local, lane) for lane in lanes])

    @property
    def _name(self) -> str:
        return f"{self.dataset.store.uri}@{self.version.number} split {self.config.split}"

    @property
    def _filter(self) -> str:
        return f" where {self.config.where}" if self.config.where else ""

    def _ordered(self) -> Order | Balanced:
        config = self.config
        settings: dict[str, Any] = {
            "batch_size": config.batch_size,
            "lanes": config.streams,
            "window": config.window,
            "mix_shards": config.mix_shards,
            "seed": config.seed,
            "drop_last": config.drop_last,
        }
        if not config.balance:
            every = [list(shard.rows_per_batch) for shard in self._shards]
            some = config.where or config.preprocess.needs_face
            return Order(self._divided(self._chosen()) if some else every, **settings)
        return Balanced([self._divided(rows) for rows in self._groups()], **settings)

    def _chosen(self) -> NDArray[np.bool_]:
        """(rows of the split,) which of them `chosen` chooses; says how many have no face."""
        keep, faceless = chosen(self.dataset, self.version, self.config)
        if faceless and self.rank == 0:
            logger.warning(
                "%s: %d of %d rows%s have no face_box and are left out",
                self._name, faceless, faceless + int(keep.sum()), self._filter,
            )  # fmt: skip
        return keep

    def _groups(self) -> list[NDArray[np.bool_]]:
        """For each class, maker or label that is balanced: which rows it has. Raises DataError for fewer than two."""
        name = BALANCED_BY[self.config.balance]
        found, keep = labels.read(self.dataset, self.version, self.config.split, name), self._chosen()
        if missing := int((keep & (found.codes < 0)).sum()):
            logger.warning("%s: %d rows without %s are left out by data.balance", self._name, missing, name)
        groups = {value: keep & (found.codes == code) for code, value in enumerate(found.values)}
        present = [groups[value] for value in sorted(groups) if groups[value].any()]
        if len(present) < 2:
            raise DataError(
                f"{self._name} has {len(present)} values of {name}{self._filter}, nothing to balance; "
                f"leave data.balance empty or choose another dataset"
            )
        return present

    def _divided(self, keep: NDArray[np.bool_]) -> list[list[Rows | int]]:
        """For each shard, of each record batch: the numbers of its rows that are kept."""
        lengths = [rows for shard in self._shards for rows in shard.rows_per_batch]
        ends = np.cumsum(lengths)
        rows = np.flatnonzero(keep)
        parts = np.split(rows, np.searchsorted(rows, ends)[:-1])
        inside = iter([part - start for part, start in zip(parts, ends - lengths, strict=True)])
        return [[next(inside) for _ in shard.rows_per_batch] for shard in self._shards]


def check_world(config: DataConfig, world: int) -> None:
    """Raises ConfigError where `world` workers cannot share a batch, with a batch size and lanes that they can."""
    if config.streams % world:
        lanes = math.lcm(config.lanes, world)
        batch = math.ceil(config.batch_size / lanes) * lanes
        raise ConfigError(
            f"data.batch_size={config.batch_size} in {config.streams} lanes cannot be shared by {world} workers; "
            f"set data.batch_size={batch} and data.lanes={lanes}, or another number of workers"
        )


# -- decoding -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Block:
    """An open record batch. `rows` holds (id, fake, class_id, identity, maker, face_box, landmarks, face mask)
    of each row."""

    rows: list[tuple[Any, ...]]
    pixels: NDArray[np.uint8] | None  # (rows, H, W, C) view of raw pixels
    media: memoryview | None  # of all encoded pictures; row i is media[ends[i]:ends[i + 1]]
    ends: list[int]

    def decode(self, row: int) -> NDArray[np.uint8]:
        """(H, W, C) uint8 of a row."""
        return self.pixels[row] if self.pixels is not None else media.decode_trusted(self._bytes(row))

    def decode_into(self, row: int, out: NDArray[np.uint8]) -> bool:
        """The same straight into `out`, where that can be done."""
        return self.pixels is None and media.decode_into(self._bytes(row), out)

    def _bytes(self, row: int) -> bytes:
        assert self.media is not None
        return bytes(self.media[self.ends[row] : self.ends[row + 1]])


class _Shown:
    """Where faces are in the pictures of a batch: `points` (N, 5, 2) and `mask` (N, 1, S, S), None until a row has one."""

    def __init__(self, rows: int, side: int) -> None:
        self.points = np.full((rows, POINTS, 2), np.nan, np.float32)
        self.mask: NDArray[np.float32] | None = None
        self._shape = rows, 1, side, side

    def put(
        self,
        slot: int,
        preprocess: Preprocess,
        pixels: NDArray[np.uint8],
        box: Any,
        marks: list[tuple[float, float]] | None,
        mask: str | None,
    ) -> None:
        """Points and mask of a decoded picture (H, W, C), moved as `preprocess` moves its pixels."""
        height, width = pixels.shape[:2]
        if marks and len(marks) in (EYES, POINTS):
            self.points[slot, : len(marks)] = preprocess.place(marks, (width, height), box)
        if mask is not None:
            if self.mask is None:
                self.mask = np.full(self._shape, np.nan, np.float32)
            grey = dataclasses.replace(preprocess, channels=1)
            whole = face_masks.unpacked(mask, width, height)[:, :, None]
            self.mask[slot, 0] = grey.apply(whole, box, marks)[:, :, 0] / np.float32(255)


class _Buffers:
    """Batch memory that is used again once no tensor refers to it: fresh pages for a large batch cost a good part of its
    decoding. Pinned memory is kept by torch's own allocator."""

    MOST = 32

    def __init__(self, *, pinned: bool) -> None:
        self._pinned, self._lock = pinned, threading.Lock()
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A uint8 tensor with whatever was in it before."""
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        with self._lock:
            return torch.from_numpy(self._free(shape))  # the tensor's storage holds the array

    def _free(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        for index in range(len(self._arrays)):
            # the list and getrefcount's own argument: nobody else
            if sys.getrefcount(self._arrays[index]) == 2 and self._arrays[index].shape == shape:
                return self._arrays[index]
        array = np.empty(shape, np.uint8)
        if len(self._arrays) < self.MOST:
            self._arrays.append(array)
        return array


class _Decoder:
    """Opens shards and record batches, keeps the latest, and fills batches. Used by several threads at once."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._shards = loader._shards
        self._preprocess = loader.config.preprocess
        self._points = loader.config.landmarks
        self._degradation = loader.config.degradation
        self._as_stored = (
            self._preprocess.crop == "none"
            and self._preprocess.channels == 3
            and not (self._points or self._degradation.active)
        )
        self._makers = tuple(loader.makers)
        self._raw_shape = loader.version.shape
        self._vocabulary = {
            name: {value: index for index, value in enumerate(values)}
            for name, values in (("identity", loader.identities), ("maker", loader.makers))
        }
        each = loader._order.lanes // loader.world
        self._blocks: collections.OrderedDict[tuple[int, int], _Block] = collections.OrderedDict()
        self._most_blocks = 2 * each * loader.config.window * loader._order.groups + 16
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._most_readers = 2 * each * loader.config.mix_shards * loader._order.groups + 8
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        self._buffers = _Buffers(pinned=torch.cuda.is_available())
        self.closed = threading.Event()

    def batch(self, step: int) -> Batch:
        """Decode this rank's share of `step`. Raises DataError naming shard and id."""
        plan = self._loader.plan(step).tolist()
        side, channels = self._preprocess.size, self._preprocess.channels
        images = self._buffers.take((len(plan), side, side, channels))
        shown = _Shown(len(plan), side) if self._points else None
        epoch = step // self._loader.steps_per_epoch
        labels = self._fill(images.numpy(), plan, shown, epoch)
        ids = [row[0] for row in labels]
        fake, class_id, identity, maker = (
            torch.tensor([row[1:5] for row in labels]).reshape(-1, 4).long().unbind(1)
        )
        return Batch(
            images=images.permute(0, 3, 1, 2),  # (N, C, H, W)
            fake=fake,
            class_id=class_id,
            identity=identity,
            maker=maker,
            ids=ids,
            step=step,
            epoch=epoch,
            makers=self._makers,
            landmarks=None if shown is None else torch.from_numpy(shown.points),
            mask=None if shown is None or shown.mask is None else torch.from_numpy(shown.mask),
        )

    def _fill(
        self,
        images: NDArray[np.uint8],
        plan: list[list[int]],
        shown: _Shown | None,
        epoch: int,
    ) -> list[tuple[Any, ...]]:
        """Decode every row of the plan into its slot, and what is shown where that is asked for; the labels of each."""
        blocks = {
            (shard, number): self._block(shard, number) for shard, number in {(s, n) for s, n, _ in plan}
        }
        labels = []
        for slot, (shard, number, row) in enumerate(plan):
            if self.closed.is_set():
                raise DataError("the batches were closed")
            block = blocks[shard, number]
            label = block.rows[row]
            try:
                if not (self._as_stored and block.decode_into(row, images[slot])):
                    pixels, box, marks = block.decode(row), label[5], _paired(label[6])
                    if self._degradation.active:
                        rng = generator(self._loader.config.seed, epoch, label[0])
                        worse = degrade(pixels, self._degradation, rng)
                        box, marks = _followed(box, marks, pixels, worse)
                        pixels = worse
                    images[slot] = self._preprocess.apply(pixels, box, marks)
                    if shown is not None:
                        shown.put(slot, self._preprocess, pixels, box, marks, label[7])
            except (MediaError, DataError, ValueError) as error:
                where = f"{self._loader.dataset.store.uri}/{self._shards[shard].key}"
                raise DataError(f"{where}, id {label[0]}: {error}") from error
            labels.append(label)
        return labels

    def _block(self, shard: int, number: int) -> _Block:
        key = (shard, number)
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:  # one download; readers are not for two threads at once
            block = self._open(self._reader(shard).get_batch(number))
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > self._most_blocks:
                self._blocks.popitem(last=False)
        return block

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        reader = self._loader.dataset.reader(self._shards[shard], version=self._loader.version)
        with self._lock:
            self._readers[shard] = reader
            while len(self._readers) > self._most_readers:
                self._readers.popitem(last=False)
        return reader

    def fetch(self, shard: int) -> None:
        """Bring a shard into the local cache."""
        if not self.closed.is_set():
            self._loader.dataset.local(self._shards[shard])

    def _open(self, batch: pa.RecordBatch) -> _Block:
        columns = [batch.column("id").to_pylist()]
        columns += [_integers(batch.column(name)) for name in ("fake", "class_id")]
        columns += [_indices(batch.column(name), known) for name, known in self._vocabulary.items()]
        nothing = [None] * batch.num_rows
        boxes = batch.column("face_box").to_pylist() if self._preprocess.needs_face else nothing
        wanted = self._points or self._preprocess.crop == "aligned"
        marks = batch.column("landmarks").to_pylist() if wanted else nothing
        masks = face_masks.texts(batch.column("attributes").to_pylist()) if self._points else nothing
        rows = list(zip(*columns, boxes, marks, masks, strict=True))
        if self._raw_shape:
            flat = batch.column("pixels").flatten().to_numpy(zero_copy_only=True)
            return _Block(rows, flat.reshape(-1, *self._raw_shape), None, [])
        pictures = batch.column("image").field("bytes")
        _, offsets, data = pictures.buffers()
        ends = np.frombuffer(offsets, np.int32)[pictures.offset : pictures.offset + len(pictures) + 1]
        return _Block(rows, None, memoryview(data), ends.tolist())


def _followed(
    box: Any, marks: list[tuple[float, float]] | None, before: NDArray[np.uint8], after: NDArray[np.uint8]
) -> tuple[Any, list[tuple[float, float]] | None]:
    """Box (x, y, width, height) and points of a face in a picture whose size changed."""
    if before.shape[:2] == after.shape[:2]:
        return box, marks
    down, across = (new / old for new, old in zip(after.shape[:2], before.shape[:2], strict=True))
    scaled = [value * (across, down)[i % 2] for i, value in enumerate(box)] if box is not None else None
    return scaled, [(x * across, y * down) for x, y in marks] if marks else marks


def _paired(flat: list[float] | None) -> list[tuple[float, float]] | None:
    """x0, y0, x1, y1, … -> points; None where there are none."""
    return list(zip(flat[::2], flat[1::2], strict=True)) if flat else None


def _integers(column: pa.Array) -> list[int]:
    return [-1 if value is None else value for value in column.to_pylist()]


def _indices(column: pa.Array, known: dict[str, int]) -> list[int]:
    return [known.get(value, -1) for value in column.to_pylist()]


def _prefetched(loader: Loader, start: int, end: int | None) -> Iterator[Batch]:
    """Batches in order, each decoded whole by one thread, `prefetch` of them ahead of the consumer."""
    decoder = _Decoder(loader)
    pool = ThreadPoolExecutor(loader.config.threads, "decode")
    fetchers = None if loader.dataset.store.is_local else _Fetchers(loader, decoder)
    pending: collections.deque[Future[Batch]] = collections.deque()
    step = start
    try:
        while True:
            while len(pending) < loader.config.prefetch + 1 and (end is None or step < end):
                if fetchers is not None:
                    fetchers.ahead(step)
                pending.append(pool.submit(decoder.batch, step))
                step += 1
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        decoder.closed.set()
        pool.shutdown(wait=True, cancel_futures=True)
        if fetchers is not None:
            fetchers.close()


class _Fetchers:
    """Downloads the shards that each lane of this rank needs next, before a decoding thread asks for them."""

    def __init__(self, loader: Loader, decoder: _Decoder) -> None:
        self._loader, self._decoder = loader, decoder
        self._pool = ThreadPoolExecutor(4, "fetch")
        self._asked: set[int] = set()

    def ahead(self, step: int) -> None:
        epoch, local = divmod(step, self._loader.steps_per_epoch)
        order = self._loader._order
        each = order.lanes // self._loader.world
        for lane in range(self._loader.rank * each, (self._loader.rank + 1) * each):
            needed = order.shards_ahead(epoch, local, lane)
            if len(needed) < self._loader.config.mix_shards:  # the epoch ends soon
                needed += order.shards_ahead(epoch + 1, 0, lane)
            for shard in needed:
                if shard not in self._asked:
                    self._asked.add(shard)
                    # a failure is raised by the decoding thread, which asks again
                    self._pool.submit(self._decoder.fetch, shard)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
