"""Training through the platform against the same steps alone: what Ray Train, the data plane, checkpoints and MLflow cost.

`counterfake` is `fit` on one Ray Train worker: batches from Arrow shards, a tick of TICK_STEPS steps with its report, its
checkpoint and its preview in MLflow. `bare` is the learner's step on batches that lie ready in memory, and nothing else.
`two-workers` shares the same global batch between two, each with as many threads as the one has. Start-up is left out: time
and processor time count from the report of the first tick to that of the last, by when they reach the driver (0.3 s apart at
most). Pictures are random pixels: what they show does not change the time.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks import process
from jobs.benchmarks.harness import Contestant, Spec

UNIT = "images/s"
LIMIT = "bare"
NEEDS: dict[str, tuple[str, ...]] = {}
COMPARISONS = {
    "platform_to_bare": ("counterfake", ("bare",)),
    "two_workers_to_one": ("two-workers", ("counterfake",)),
}
TICK_STEPS = 50  # the loop's default
READY = 16  # batches in the memory of `bare`


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """Random pixels (28, 28, 1) as a dataset."""
    uri = (folder / f"dataset-{job.size}-{job.pictures}").as_uri()
    rng = np.random.default_rng(0)
    shape = (job.size, job.size, 1)
    store(uri, ({"pixels": rng.integers(0, 256, shape, dtype=np.uint8)} for _ in range(job.pictures)))
    return {"dataset": uri}


def train_job(spec: Spec, workers: int) -> Any:
    """The article's DCGAN with this benchmark's data and threads."""
    from jobs.train_gan import dcgan_mnist_s4

    job = dcgan_mnist_s4()
    data = dataclasses.replace(
        job.data, uri=spec.inputs["dataset"], batch_size=spec.batch_size, drop_last=True
    )
    return with_loop(dataclasses.replace(job, data=data, workers=workers), spec)


def with_loop(job: Any, spec: Spec) -> Any:
    """One tick that is not measured; `through_platform` says how many follow."""
    from counterfake.loop import LoopConfig

    loop = LoopConfig(
        steps=TICK_STEPS,
        tick_steps=TICK_STEPS,
        threads=spec.threads,
        precision=spec.precision,  # type: ignore[arg-type]
        matmul=spec.matmul,  # type: ignore[arg-type]
        seed=spec.seed,
    )
    return dataclasses.replace(job, loop=loop, cpus_per_worker=1.0 if job.workers < 2 else 0.5)


def through_platform(job: Any, spec: Spec) -> Contestant:
    """`fit`, for about spec.seconds after the first tick; at least one tick."""

    def whole() -> dict[str, Any]:
        from counterfake.cluster.train import fit
        from counterfake.workspace import Workspace

        ticks = 1 + max(1, round(spec.seconds / (TICK_STEPS * _seconds_per_step(job, spec))))
        run = dataclasses.replace(job, loop=dataclasses.replace(job.loop, steps=ticks * TICK_STEPS))
        seen: list[tuple[float, float, int]] = []
        with tempfile.TemporaryDirectory(prefix="counterfake-benchmark-") as home:
            fit(
                run,
                Workspace.at(home),
                on_progress=lambda tick: seen.append(
                    (time.perf_counter(), process.cpu_seconds(), tick.images)
                ),
            )
        return between(seen)

    return Contestant(lambda: 0, whole=whole)


def between(seen: list[tuple[float, float, int]]) -> dict[str, Any]:
    """(seconds, processor seconds, images) at each tick -> the rates from the first to the last."""
    (start, cpu_start, first), (end, cpu_end, last) = seen[0], seen[-1]
    cpu = cpu_end - cpu_start
    return {
        "rate": (last - first) / (end - start),
        "per_cpu_second": (last - first) / cpu if cpu > 0 else None,
        "facts": {"ticks": len(seen) - 1, "seconds": round(end - start, 2)},
    }


def bare(job: Any, spec: Spec) -> Contestant:
    """The learner's step on batches in memory."""
    step, batches = _stepping(job, spec)
    rounds = iter(range(10**9))

    def one() -> int:
        batch = batches[next(rounds) % len(batches)]
        step(batch)
        return len(batch)

    return Contestant(one, warmup=2)


def store(uri: str, media: Iterable[dict[str, Any]]) -> None:
    """Samples of this media, every other one fake, as version 1 of a dataset, unless it is there."""
    from counterfake.records import Dataset, write_version
    from counterfake.samples import Sample

    if Dataset.open(uri).versions():
        return
    samples = (
        Sample(source="made", split="train", fake=n % 2, maker=("camera", "made")[n % 2], **one)
        for n, one in enumerate(media)
    )
    write_version(uri, samples, sources={"made": {"licence": "CC0-1.0", "consent": "synthetic"}})


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "counterfake": lambda spec: through_platform(train_job(spec, 1), spec),
    "two-workers": lambda spec: through_platform(train_job(spec, 2), spec),
    "bare": lambda spec: bare(train_job(spec, 0), spec),
}


# -- private --------------------------------------------------------------------------------------------------------


def _stepping(job: Any, spec: Spec) -> tuple[Callable[[Any], Any], list[Any]]:
    """The step of a new learner, set up as a worker does, and READY batches of the job's data."""
    import torch

    from counterfake import dist, memory, precision
    from counterfake.data import Loader
    from counterfake.learners import LearnerContext

    torch.set_num_threads(spec.threads)
    precision.set_matmul(spec.matmul, torch.device("cpu"))
    memory.keep()
    loader = Loader(job.data)
    context = LearnerContext(
        batch_size=job.data.batch_size,
        images_per_epoch=loader.rows,
        total_images=10**6,
        channels=job.data.preprocess.channels,
        size=job.data.preprocess.size,
        makers=tuple(loader.makers),
        precision=spec.precision,
    )
    dist.seed_build(spec.seed)
    learner = job.learner.build(device=torch.device("cpu"), context=context)
    stream = loader.batches()
    batches = [next(stream) for _ in range(min(READY, loader.steps_per_epoch))]
    stream.close()  # type: ignore[attr-defined]
    return learner.step, batches


def _seconds_per_step(job: Any, spec: Spec) -> float:
    step, batches = _stepping(job, spec)
    step(batches[0])
    start = time.perf_counter()
    for batch in batches[:2]:
        step(batch)
    return (time.perf_counter() - start) / len(batches[:2])
