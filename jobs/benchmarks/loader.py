"""Batches of decoded pictures from local disk, shuffled: counterfake.data against packaged loaders. All decode with simplejpeg.

Every contestant gives uint8 batches (N, H, W, 3) or (N, 3, H, W) as torch tensors in the main process, from the same JPEG
bytes, with as many decoding threads or worker processes as the others. A round is one epoch; the first is not measured,
so files lie in the page cache and workers are up. The limit is the decoder alone, from memory, in as many threads.
Peers are given the encoded bytes when their format is written, never pictures to encode again.
"""

from __future__ import annotations

import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.benchmarks.harness import Contestant, Spec

UNIT = "pictures/s"
LIMIT = "decode-only"
NEEDS = {
    "litdata": ("litdata",),
    "mosaicml-streaming": ("mosaicml-streaming",),
    "webdataset": ("webdataset",),
    "huggingface-datasets": ("datasets",),
}
QUALITY = 90  # of the JPEG files
EPOCHS = 20  # over which memory is looked at
SHARDS = 20  # of peers that ask for a number of files


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """JPEG files of procedural faces, and the same bytes as a dataset of ours."""
    files = folder / f"pictures-{job.size}-{job.pictures}"
    if not (files / "complete").exists():
        _draw(files, job.size, job.pictures, job.threads, console)
    dataset = folder / f"dataset-{job.size}-{job.pictures}"
    if not (dataset / "versions").exists():
        console.event("writing them as a dataset")
        store(files, dataset)
    return {
        "files": str(files),
        "dataset": dataset.as_uri(),
        "peers": str(folder / f"peers-{job.size}-{job.pictures}"),
    }


def conclusions(facts: dict[str, Any]) -> dict[str, Any]:
    """Of ours: the shape of a batch, seconds from opening to the first one, and memory over EPOCHS epochs."""
    ours = facts.get("counterfake", [])
    first = statistics.median(run["first_batch_s"] for run in ours) if ours else None
    memory: list[float] = next((run["resident_mib"] for run in ours if "resident_mib" in run), [])
    settled = memory[2:]  # buffers and caches fill in the first epochs
    slope = statistics.linear_regression(range(len(settled)), settled).slope if len(settled) > 1 else None
    return {
        "batch": ours[0]["batch"] if ours else None,
        "first_batch_s": first,
        "resident_mib": memory,
        "resident_mib_per_epoch": None if slope is None else round(slope, 3),
    }


# -- ours and the limit ---------------------------------------------------------------------------------------------


def _counterfake(spec: Spec) -> Contestant:
    import counterfake.data  # noqa: F401 - loading torch is not opening

    opened = time.perf_counter()
    loader = opened_loader(spec, spec.inputs["dataset"])
    batches = loader.batches()
    shape = list(next(batches).images.shape)
    first_batch_s = round(time.perf_counter() - opened, 4)
    batches.close()
    batches = loader.batches()
    memory: list[float] = []

    def one_epoch() -> int:
        total = sum(len(next(batches).images) for _ in range(loader.steps_per_epoch))
        memory.append(resident_mib())
        return total

    def facts() -> dict[str, Any]:
        while spec.seed == 0 and len(memory) < EPOCHS:
            one_epoch()
        found = {"resident_mib": memory[:EPOCHS]} if spec.seed == 0 else {}
        return {"batch": shape, "first_batch_s": first_batch_s, **found}

    return Contestant(one_epoch, facts=facts)


def opened_loader(spec: Spec, uri: str, cache: Path | None = None) -> Any:
    """Our loader as it is measured, here and in storage.py."""
    from counterfake.data import DataConfig, Loader
    from counterfake.images import Preprocess

    config = DataConfig(
        uri=uri,
        batch_size=spec.batch_size,
        preprocess=Preprocess(size=spec.size),
        threads=spec.threads,
        seed=spec.seed,
    )
    return Loader(config, cache=cache)


def resident_mib() -> float:
    """Memory of this process that is in RAM and no file's: shards are mapped, and their pages come and go."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def _decode_only(spec: Spec) -> Contestant:
    """`threads` threads, bytes in memory, each into one buffer over and over."""
    import numpy as np
    import simplejpeg

    pictures = [path.read_bytes() for path in _files(spec)]

    def part(first: int) -> int:
        buffer = np.empty((spec.size, spec.size, 3), np.uint8)
        chosen = pictures[first :: spec.threads]
        for data in chosen:
            simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=buffer)
        return len(chosen)

    pool = ThreadPoolExecutor(spec.threads)
    return Contestant(lambda: sum(pool.map(part, range(spec.threads))))


# -- peers ----------------------------------------------------------------------------------------------------------


def _image_folder(spec: Spec) -> Contestant:
    """torch's DataLoader over files."""
    from torch.utils.data import DataLoader, Dataset

    files = _files(spec)

    class Files(Dataset[Any]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> Any:
            return _decode(files[index].read_bytes())

    return _epochs(DataLoader(Files(), shuffle=True, **_workers(spec)))


def _write_litdata(spec: Spec) -> None:
    import litdata  # type: ignore[import-not-found]

    with _once(spec, "litdata") as folder:
        if folder:
            files = [str(path) for path in _files(spec)]
            litdata.optimize(_read, files, str(folder), chunk_bytes="16MB", num_workers=1, verbose=False)


def _litdata(spec: Spec) -> Contestant:
    from litdata import StreamingDataLoader, StreamingDataset

    class Pictures(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            return _decode(super().__getitem__(index))

    dataset = Pictures(str(_peer(spec, "litdata")), shuffle=True, drop_last=True, seed=spec.seed)
    return _epochs(StreamingDataLoader(dataset, **_workers(spec)))


def _write_mosaicml(spec: Spec) -> None:
    _leave_out_torchvision()
    from streaming import MDSWriter  # type: ignore[import-not-found]

    with _once(spec, "mosaicml") as folder:
        if folder:
            with MDSWriter(out=str(folder), columns={"image": "bytes"}, size_limit="16mb") as writer:
                for path in _files(spec):
                    writer.write({"image": path.read_bytes()})


def _mosaicml(spec: Spec) -> Contestant:
    _leave_out_torchvision()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader

    class Pictures(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            return _decode(super().__getitem__(index)["image"])

    clean_stale_shared_memory()
    folder = str(_peer(spec, "mosaicml"))
    dataset = Pictures(local=folder, shuffle=True, batch_size=spec.batch_size, shuffle_seed=spec.seed)
    return _epochs(DataLoader(dataset, **_workers(spec)))


def _write_webdataset(spec: Spec) -> None:
    import webdataset  # type: ignore[import-not-found]

    with _once(spec, "webdataset") as folder:
        if folder:
            files = _files(spec)
            pattern = str(folder / "%06d.tar")
            with webdataset.ShardWriter(pattern, maxcount=-(-len(files) // SHARDS), verbose=0) as writer:
                for path in files:
                    writer.write({"__key__": path.stem, "jpg": path.read_bytes()})


def _webdataset(spec: Spec) -> Contestant:
    import torch
    import webdataset

    shards = [str(path) for path in sorted(_peer(spec, "webdataset").glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=spec.seed).shuffle(1000)
    dataset = dataset.map(lambda sample: _decode(sample["jpg"]))
    dataset = dataset.batched(spec.batch_size, collation_fn=torch.stack, partial=False)
    workers = {"num_workers": spec.threads, "persistent_workers": True}
    return _epochs(webdataset.WebLoader(dataset, batch_size=None, **workers))


def _write_datasets(spec: Spec) -> None:
    import datasets  # type: ignore[import-untyped]

    with _once(spec, "datasets") as folder:
        if folder:
            features = datasets.Features({"image": datasets.Value("binary")})
            pictures = {"image": [path.read_bytes() for path in _files(spec)]}
            datasets.Dataset.from_dict(pictures, features=features).save_to_disk(
                str(folder), num_shards=SHARDS
            )


def _datasets(spec: Spec) -> Contestant:
    """A map-style dataset over memory-mapped Arrow; whole batches are fetched at once, which is its fastest way."""
    import datasets
    import torch
    from torch.utils.data import DataLoader

    dataset = datasets.load_from_disk(str(_peer(spec, "datasets"))).with_format("arrow")

    class Pictures(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(dataset)

        def __getitems__(self, indices: list[int]) -> Any:
            found = dataset[indices]["image"]
            return [_decode(memoryview(value.as_buffer()).cast("B")) for value in found]

    return _epochs(DataLoader(Pictures(), shuffle=True, **_workers(spec)))


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "counterfake": _counterfake,
    "torch-image-folder": _image_folder,
    "litdata": _litdata,
    "mosaicml-streaming": _mosaicml,
    "webdataset": _webdataset,
    "huggingface-datasets": _datasets,
    "decode-only": _decode_only,
}
WRITERS: dict[str, Callable[[Spec], None]] = {
    "litdata": _write_litdata,
    "mosaicml-streaming": _write_mosaicml,
    "webdataset": _write_webdataset,
    "huggingface-datasets": _write_datasets,
}


# -- private --------------------------------------------------------------------------------------------------------


def _decode(data: Any) -> Any:
    """JPEG bytes -> uint8 tensor (H, W, 3)."""
    import simplejpeg
    import torch

    return torch.from_numpy(simplejpeg.decode_jpeg(data, colorspace="RGB"))


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _workers(spec: Spec) -> dict[str, Any]:
    return {
        "batch_size": spec.batch_size,
        "num_workers": spec.threads,
        "persistent_workers": True,
        "prefetch_factor": 4,
        "drop_last": True,
    }


def _epochs(loader: Iterable[Any]) -> Contestant:
    return Contestant(lambda: sum(len(batch) for batch in loader))


def _files(spec: Spec) -> list[Path]:
    return sorted(Path(spec.inputs["files"]).glob("*.jpg"))


def _peer(spec: Spec, name: str) -> Path:
    return Path(spec.inputs["peers"]) / name


class _once:
    """`with _once(spec, name) as folder`: an empty folder to write to, or None if it is complete already."""

    def __init__(self, spec: Spec, name: str) -> None:
        self.folder = _peer(spec, name)
        self._marker = self.folder.with_name(f"{name}.complete")

    def __enter__(self) -> Path | None:
        import shutil

        if self._marker.exists():
            return None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self._marker.touch()


def _leave_out_torchvision() -> None:
    """streaming imports torchvision for three sub-packages that play no part here; it does not import on CPU builds."""
    for part in ("multimodal", "text", "vision"):
        sys.modules.setdefault(f"streaming.{part}", types.ModuleType(f"streaming.{part}"))


def _draw(files: Path, size: int, count: int, processes: int, console: Any) -> None:
    import multiprocessing

    files.mkdir(parents=True, exist_ok=True)
    chunks = [(str(files), size, range(i, min(i + 50, count))) for i in range(0, count, 50)]
    with (
        console.progress(f"drawing {count} faces of {size} px", count) as advance,
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        for drawn in pool.map(_draw_some, chunks):
            advance(drawn)
    (files / "complete").touch()


def _draw_some(chunk: tuple[str, int, range]) -> int:
    from counterfake.media import encode
    from counterfake.sources.synthetic import portrait

    files, size, numbers = chunk
    for number in numbers:
        path = Path(files) / f"{number:06d}.jpg"
        if not path.exists():
            path.write_bytes(encode(portrait(0, number // 10, number % 10, size).pixels, "jpeg", QUALITY))
    return len(numbers)


def store(files: Path, dataset: Path, rows_per_shard: int = 4096) -> None:
    """The files as a dataset of one split."""
    from counterfake.records import Sample, SplitRule, write_version

    def samples() -> Iterator[Sample]:
        for path in sorted(files.glob("*.jpg")):
            yield Sample(image=path.read_bytes(), path=path.name, source="benchmark", fake=0)

    rights = {"benchmark": {"licence": "Apache-2.0", "consent": "synthetic"}}
    splits = SplitRule(fractions={"train": 1.0}, by="id")
    write_version(
        dataset.as_uri(),
        samples(),
        sources=rights,
        splits=splits,
        writer={"job": "benchmark"},
        rows_per_shard=rows_per_shard,
    )
