"""What grows with the rows of a dataset: seconds and memory of commit, open, plan, first batch, append and garbage collection.

Every size runs in a process of its own. The manifest is simulated: shards of 4,096 rows that are not there, one person in
a hundred rows, as real and as fake. `append` reads made labels of all rows, as a writer that adds to the version does.
The first batch is read from real shards of 1,000 rows of 4 x 4 pixels, made once; above 1,000,000 rows a hundred of them
come again and again. The collection finds as many empty files as the version has shards, and 640 more that it deletes.
Ours is how many rows a second open and plan make ready; its limit is to parse the manifest's JSON and do nothing with it.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.benchmarks import harness
from jobs.benchmarks.harness import Contestant, Spec

UNIT = "rows/s"
LIMIT = "json.loads"
NEEDS: dict[str, tuple[str, ...]] = {}
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
ROWS_PER_SHARD = 4096  # of the simulated manifest
REAL_ROWS_PER_SHARD = 1000
SIDE = 4  # pixels of a real row
MOST_REAL_ROWS = 1_000_000  # of which each has bytes of its own
REPEATED = 100  # shards that make a larger dataset
GARBAGE = 640  # shards that no version reaches
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STAMP = "2026-01-01T00:00:00+00:00"


def table(job: Any, folder: Path, console: Any) -> list[dict[str, Any]]:
    """One row of figures for each size up to job.pictures: medians over job.repeats processes."""
    sizes = [rows for rows in SIZES if rows <= job.pictures] or [job.pictures]
    with console.progress("making shards", None) as advance:
        for rows in sizes:
            _real(folder, rows)
            advance(1)
    found = []
    with console.progress("measuring", len(sizes) * job.repeats) as advance:
        for rows in sizes:
            runs = []
            for repeat in range(job.repeats):
                runs.append(harness.measure(_spec(job, folder, rows, repeat))["facts"])
                advance(1)
            found.append({name: statistics.median(run[name] for run in runs) for name in runs[0]})
    return found


def rates(table: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows a second at the largest size, as `benchmark.summary` takes them."""
    last = table[-1]
    seconds = {"counterfake": last["open_s"] + last["plan_s"], LIMIT: last["parse_s"]}
    return {name: [{"rate": last["rows"] / max(value, 1e-9)}] for name, value in seconds.items()}


def _spec(job: Any, folder: Path, rows: int, repeat: int) -> Spec:
    return Spec(
        benchmark="growth",
        contestant="counterfake",
        folder=str(folder),
        inputs={"rows": rows},
        batch_size=job.batch_size,
        size=SIDE,
        threads=job.threads,
        precision=job.precision,
        matmul=job.matmul,
        seed=repeat,
        seconds=0,  # one round
    )


def _counterfake(spec: Spec) -> Contestant:
    found: dict[str, Any] = {}

    def once() -> int:
        found.update(figures(Path(spec.folder), int(spec.inputs["rows"]), spec.batch_size, spec.threads))
        return int(spec.inputs["rows"])

    return Contestant(once, warmup=0, facts=lambda: found)


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {"counterfake": _counterfake}


def figures(folder: Path, rows: int, batch_size: int, threads: int) -> dict[str, Any]:
    """Seconds (…_s) and resident memory above the start (…_mb) of each step at this many rows."""
    import tempfile

    from counterfake.curation import GcPlan, collect, gc_plan
    from counterfake.order import Order
    from counterfake.records import Dataset
    from counterfake.versions import commit

    found: dict[str, Any] = {"rows": rows} | _first_batch(_real(folder, rows), folder, batch_size, threads)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        dataset = Dataset.open(Path(scratch, "simulated").as_uri())
        version = simulated(rows)
        found |= _append(version)
        found |= _cost("commit", lambda: commit(dataset.store, version))
        found["manifest_mb"] = _round(dataset.store.list("versions/")[0].size / 1e6)
        data = dataset.store.read("versions/000001.json")
        found |= _cost("parse", lambda: json.loads(data))
        found |= _cost("open", lambda: dataset.version())
        blocks = [list(shard.rows_per_batch) for shard in dataset.version().shards("train")]
        settings: dict[str, Any] = {"lanes": 4, "window": 16, "mix_shards": 4, "seed": 0, "drop_last": True}
        order: list[Order] = []
        found |= _cost("plan", lambda: order.append(Order(blocks, batch_size=256, **settings)))
        found |= _cost("any_step", lambda: [order[0].slice(3, order[0].steps // 2, n) for n in range(4)])
        _make_files(Path(scratch, "simulated"), version)
        plans: list[GcPlan] = []
        found |= _cost("gc_plan", lambda: plans.append(gc_plan(dataset, older_than_s=-60)))
        found |= _cost("gc_collect", lambda: collect(dataset, plans[0]))
    return found


def simulated(rows: int) -> Any:
    """A version of so many rows whose shards nobody wrote."""
    from counterfake.versions import Shard, Version

    rng = np.random.default_rng(rows)
    shards = []
    for first in range(0, rows, ROWS_PER_SHARD):
        count = min(ROWS_PER_SHARD, rows - first)
        runs = tuple((n, times) for n, times in ((64, count // 64), (count % 64, 1)) if n and times)
        shards.append(Shard(rng.bytes(32).hex(), 20_000 * count, count, runs))
    held_out = len(shards) // 10
    splits = {"train": tuple(shards[held_out:]), "test": tuple(shards[:held_out])}
    counts = tuple(
        {
            "split": "train",
            "fake": fake,
            "class_id": None,
            "maker": maker,
            "identity": f"person-{n:07d}",
            "rows": 50,
        }
        for n in range(rows // 100)
        for fake, maker in ((0, "camera"), (1, "swap@1"))
    )
    return _version(Version, rows, splits, counts, "image", None)


def _version(kind: Any, rows: int, splits: Any, counts: Any, media: str, shape: Any) -> Any:
    return kind(
        number=1, digest=f"{rows:064d}", kind=media, shape=shape, splits=splits, parent=None,
        sources={"made": {"licence": "CC0-1.0", "consent": "synthetic"}}, counts=counts,
        report={}, writer={"job": "benchmark growth"}, created_at=STAMP,
    )  # fmt: skip


def _append(version: Any) -> dict[str, float]:
    """What a writer learns of the rows it adds to: ids, labels, groups."""
    from counterfake.staging import Known

    known, tables = Known(), _made_labels(version)
    return _cost("append", lambda: known.add(version, lambda shard: next(tables)))


def _made_labels(version: Any) -> Iterator[pa.Table]:
    """For each shard a table with all label columns."""
    rng, person = np.random.default_rng(0), 0
    for split in version.splits:
        for shard in version.shards(split):
            yield _labels(rng, shard.rows, [f"person-{(person + n) // 100:07d}" for n in range(shard.rows)])
            person += shard.rows


def _labels(rng: np.random.Generator, rows: int, identities: list[str] | None) -> pa.Table:
    from counterfake.samples import LABEL_TYPES

    text = rng.bytes(32 * rows).hex()
    made: dict[str, Any] = {
        "id": [text[64 * n : 64 * (n + 1)] for n in range(rows)],
        "fake": [n % 2 for n in range(rows)],
        "maker": [("camera", "swap@1")[n % 2] for n in range(rows)],
        "source": ["made"] * rows,
        "identity": identities if identities else [None] * rows,
    }
    columns = {name: pa.array(made.get(name, [None] * rows), kind) for name, kind in LABEL_TYPES}
    return pa.table(columns)


# -- real shards ----------------------------------------------------------------------------------------------------


def _real(folder: Path, rows: int) -> str:
    """URI of a dataset of so many tiny pictures, written once."""
    from counterfake import versions
    from counterfake.records import Dataset

    uri = (folder / f"tiny-{rows}").as_uri()
    dataset = Dataset.open(uri)
    if not dataset.versions():
        rng = np.random.default_rng(rows)
        sizes = [min(REAL_ROWS_PER_SHARD, rows - first) for first in range(0, rows, REAL_ROWS_PER_SHARD)]
        different = sizes if rows <= MOST_REAL_ROWS else sizes[:REPEATED]
        made_once = [_write_shard(folder / f"tiny-{rows}", rng, size) for size in different]
        shards = tuple(itertools.islice(itertools.cycle(made_once), len(sizes)))
        counts = tuple(
            {
                "split": "train",
                "fake": n,
                "class_id": None,
                "maker": maker,
                "identity": None,
                "rows": rows // 2,
            }
            for n, maker in enumerate(("camera", "swap@1"))
        )
        made = _version(versions.Version, rows, {"train": shards}, counts, "pixels", (SIDE, SIDE, 1))
        versions.commit(dataset.store, made)
    return uri


def _write_shard(root: Path, rng: np.random.Generator, rows: int) -> Any:
    from counterfake.samples import schema
    from counterfake.storage import file_sha256
    from counterfake.versions import Shard

    target = schema("pixels", (SIDE, SIDE, 1))
    flat = pa.array(rng.integers(0, 256, rows * SIDE * SIDE, dtype=np.uint8))
    pixels = pa.FixedSizeListArray.from_arrays(flat, type=target.field("pixels").type)
    labels = _labels(rng, rows, None).append_column("pixels", pixels)
    labels = labels.append_column("path", pa.nulls(rows, pa.string()))
    part = root / "part.arrow"
    part.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, target) as writer:
        writer.write_table(labels.select(target.names).cast(target), max_chunksize=64)
    runs = tuple((n, times) for n, times in ((64, rows // 64), (rows % 64, 1)) if n and times)
    shard = Shard(file_sha256(part), part.stat().st_size, rows, runs)
    (root / shard.key).parent.mkdir(exist_ok=True)
    part.rename(root / shard.key)
    return shard


def _first_batch(uri: str, folder: Path, batch_size: int, threads: int) -> dict[str, Any]:
    """Seconds from nothing to the first batch; with balance the first time, when labels are read, and the next."""
    import shutil

    from counterfake.data import DataConfig, Loader
    from counterfake.images import Preprocess

    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    shape = Preprocess(size=SIDE, channels=1)

    def first(balance: Any) -> None:
        config = DataConfig(
            uri=uri, batch_size=batch_size, preprocess=shape, threads=threads, balance=balance
        )
        batches: Any = Loader(config, cache=cache).batches()
        next(batches)
        batches.close()

    return {
        **_cost("first_batch", lambda: first("")),
        **_cost("balanced_first_time", lambda: first("fake")),
        **_cost("balanced", lambda: first("fake")),
    }


def _make_files(root: Path, version: Any) -> None:
    """An empty file for each shard, and the garbage."""
    (root / "shards").mkdir(parents=True)
    for number in range(GARBAGE):
        (root / "shards" / f"{number:064d}.arrow").touch()
    for split in version.splits:
        for shard in version.shards(split):
            (root / shard.key).touch()


# -- measures -------------------------------------------------------------------------------------------------------


def _cost(name: str, work: Callable[[], Any]) -> dict[str, float]:
    """{NAME_s: seconds, NAME_mb: the most memory it held above what was there before}."""
    gc.collect()
    if RESET.exists():
        RESET.write_text("5")  # the kernel forgets the peak so far
    before, start = _memory_mb("VmRSS"), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {f"{name}_s": _round(seconds), f"{name}_mb": _round(max(0.0, _memory_mb("VmHWM") - before))}


def _memory_mb(name: str) -> float:
    """Resident memory (VmRSS) or its peak (VmHWM) of this process; 0 where there is no /proc."""
    if not STATUS.exists():
        return 0.0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def _round(value: float) -> float:
    return float(f"{value:.3g}")
