"""Batches from S3 over HTTP (moto's server, a process of its own): with an empty cache and a full one.

All have the same pictures, read by `threads` threads. `s3-cold` is a whole epoch into an empty cache, download, digest and
decoding together; `s3-fetch` leaves the decoding out; `ranged-get` asks for the same bytes in ranges of 16 MiB and drops
them, which is all that the server and the connection give. Where that is faster than decoding (loopback), a cold epoch
can at best be as fast as a local one, hence the comparison with the slower of the two. Server and client share the cores
of one machine, as they would not elsewhere, so a cold epoch here pays for both; the contestants `…-network` read through
a line of NETWORK megabytes a second, where the line is what there is to be used. A round is one epoch; rates are pictures
per second.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.benchmarks import loader
from jobs.benchmarks.harness import Contestant, Spec

UNIT = "pictures/s"
LIMIT = "ranged-get"
NEEDS: dict[str, tuple[str, ...]] = {}
NETWORK = (
    60.0  # megabytes per second of the narrow line: about half of a gigabit, less than two cores can decode
)
COMPARISONS = {
    "cold_to_ranged_get_over_network": ("s3-cold-network", ("ranged-get-network",)),
    "warm_to_local": ("s3-warm", ("local",)),
    "fetch_to_ranged_get": ("s3-fetch", ("ranged-get",)),
    "cold_to_ranged_get": ("s3-cold", ("ranged-get",)),
    "cold_to_slower_of_decoding_and_get": ("s3-cold", ("local", "ranged-get")),
}
BUCKET = "benchmark"
SHARDS = 80  # an epoch begins with 16 of them: 4 lanes that mix 4 each


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """The pictures of the benchmark `loader` in SHARDS shards: of a large set, only a part is needed at the start, too."""
    found = loader.setting_up(job, folder.parent / "loader", console)
    dataset = folder / f"dataset-{job.size}-{job.pictures}"
    if not (dataset / "versions").exists():
        loader.store(Path(found["files"]), dataset, max(64, job.pictures // SHARDS))
    return {"dataset": dataset.as_uri(), "cache": str(folder / "cache")}


def conclusions(facts: dict[str, Any]) -> dict[str, Any]:
    return {"megabytes": facts.get("ranged-get", [{}])[0].get("megabytes")}


def _local(spec: Spec) -> Contestant:
    return _epochs(loader.opened_loader(spec, spec.inputs["dataset"]))


def _warm(spec: Spec) -> Contestant:
    uri, server = _served(spec)
    return _epochs(loader.opened_loader(spec, uri, _cache(spec)), server)  # the warm-up round fills the cache


def _cold(spec: Spec, line: float = 0.0) -> Contestant:
    uri, server = _served(spec, line)

    def one_epoch() -> int:
        opened = loader.opened_loader(spec, uri, _cache(spec))
        return sum(len(batch.images) for batch in opened.batches(epochs=1))

    return Contestant(one_epoch, facts=lambda: {"server": server.pid})


def _fetch(spec: Spec) -> Contestant:
    """Every shard into an empty cache, verified, four at a time as the loader does."""
    from counterfake.records import Dataset

    uri, server = _served(spec)

    def one_epoch() -> int:
        dataset = Dataset.open(uri, cache=_cache(spec))
        shards = dataset.version().shards("train")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(dataset.local, shards))
        return sum(shard.rows for shard in shards)

    return Contestant(one_epoch, facts=lambda: {"server": server.pid})


def _ranged_get(spec: Spec, line: float = 0.0) -> Contestant:
    from counterfake.records import Dataset
    from counterfake.storage import PART_BYTES

    uri, server = _served(spec, line)
    dataset = Dataset.open(uri)
    shards = dataset.version().shards("train")
    client = dataset.store.client  # type: ignore[attr-defined] # boto3's own: no retries, no digests
    parts = [(shard, start) for shard in shards for start in range(0, shard.bytes, PART_BYTES)]

    def get(part: tuple[Any, int]) -> None:
        shard, start = part
        span = f"bytes={start}-{min(start + PART_BYTES, shard.bytes) - 1}"
        client.get_object(Bucket=BUCKET, Key=f"faces/{shard.key}", Range=span)["Body"].read()

    pool = ThreadPoolExecutor(4)

    def one_epoch() -> int:
        list(pool.map(get, parts))
        return sum(shard.rows for shard in shards)

    megabytes = round(sum(shard.bytes for shard in shards) / 1e6, 1)
    return Contestant(one_epoch, facts=lambda: {"megabytes": megabytes, "server": server.pid})


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "s3-cold": _cold,
    "s3-warm": _warm,
    "s3-fetch": _fetch,
    "local": _local,
    "ranged-get": _ranged_get,
    "s3-cold-network": functools.partial(_cold, line=NETWORK),
    "ranged-get-network": functools.partial(_ranged_get, line=NETWORK),
}


# -- private --------------------------------------------------------------------------------------------------------


def _epochs(opened: Any, server: Any = None) -> Contestant:
    batches = opened.batches()

    def one_epoch() -> int:
        return sum(len(next(batches).images) for _ in range(opened.steps_per_epoch))

    return Contestant(one_epoch, facts=lambda: {"server": server.pid if server else None})


def _cache(spec: Spec) -> Path:
    """An empty folder."""
    folder = Path(spec.inputs["cache"]) / spec.contestant
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _served(spec: Spec, line: float = 0.0) -> tuple[str, Any]:
    """(URI of the data set on a server of its own, the server's process)."""
    from counterfake.storage import open_store
    from jobs.benchmarks import s3_server

    server, endpoint = s3_server.start(line)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys | {"AWS_ENDPOINT_URL": endpoint})
    store, local = open_store(f"s3://{BUCKET}/faces"), open_store(spec.inputs["dataset"])
    store.client.create_bucket(Bucket=BUCKET)  # type: ignore[attr-defined]
    for entry in local.list():
        store.put(entry.key, local.read(entry.key))
    return store.uri, server
