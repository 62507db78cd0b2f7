"""How fast the platform is, as ratios to its peers measured in the same run, in turns, on the same input.

    counterfake run benchmark loader --json      batches from 20,000 JPEG pictures, against packaged loaders; 2 cores: 5 min
    counterfake run benchmark storage --json     the same batches from S3 over HTTP, cold and cached; 3 min
    counterfake run benchmark gan --json         the article's DCGAN step, against plain torch and TensorFlow; 4 min
    counterfake run benchmark gan-dense --json   the dense GAN's step, against plain torch, tf.function and train_on_batch; 2 min
    counterfake run benchmark autoencoder --json   the autoencoder of the article at batch 32, against plain torch and Keras fit
    counterfake run benchmark swap --json        the face swap of 2017, against its step in plain torch; 5 min
    counterfake run benchmark training --json    the DCGAN on one and on two Ray Train workers, against its bare steps; 20 min
    counterfake run benchmark detector --json    MobileNetV2 on a Ray Train worker from JPEG pictures, against its bare steps; 10 min
    counterfake run benchmark gan --gpu          steps as CUDA graphs in bf16, share of the GPU's limits; also swap, detector
    counterfake run benchmark serving --json     MobileNetV2 in a bundle, against eager torch, ONNX Runtime, OpenVINO; 2 min
    counterfake run benchmark inference --json   the same network in every runtime a bundle can record, fp32, bf16 and int8; 3 min
    counterfake run benchmark forensics --json   Benford features, against a loop over coefficients with curve_fit; 1 min
    counterfake run benchmark growth             seconds and memory of a dataset of 10^4 to 10^7 rows; no peers

One JSON object each: `ours`, `peers` and `limit` are medians of `repeats`; a peer that cannot be installed or run is null
and `absent` says why. First use makes the input and installs the peers into environments of their own under the
workspace's cache (loader: 1 GB, gan: 1.5 GB); nothing of that is a dependency. Absolute figures mean little on a busy
machine (`machine.load`); the ratios stay.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from counterfake.config import to_dict
from counterfake.errors import ConfigError
from counterfake.workspace import Workspace
from jobs.benchmarks import harness, scratch
from jobs.benchmarks.harness import ContestantFailed, Spec
from jobs.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkJob:
    """One benchmark: on what, for how long, against whom."""

    name: Literal[
        "loader",
        "storage",
        "gan",
        "gan_dense",
        "swap",
        "autoencoder",
        "training",
        "detector",
        "serving",
        "inference",
        "forensics",
        "growth",
    ]
    pictures: int  # of the input
    size: int  # side of a picture, pixels
    batch_size: int  # pictures per batch, step or call
    threads: int = 2  # each contestant's, or its worker processes
    repeats: int = 3  # turns of each contestant
    seconds: float = 5.0  # measured in each turn, after the warm-up
    peers: tuple[str, ...] = ()  # whom to measure against; empty = all
    precision: Literal["fp32", "bf16"] = "fp32"  # of our training steps; with `gpu` always bf16
    matmul: Literal["auto", "highest", "high", "medium"] = "auto"  # of our training steps, as in loop.matmul
    gpu: bool = False  # the benchmark's steps on a GPU: benchmarks/gpu.py, which reads `seconds` only

    def __post_init__(self) -> None:
        for name in ("pictures", "size", "batch_size", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size > self.pictures:
            raise ConfigError(
                f"batch_size {self.batch_size} is more than the {self.pictures} pictures there are"
            )


def run(job: BenchmarkJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Make the input, install the peers, measure in turns; returns the figures."""
    console = console or Console(quiet=True)
    if job.gpu:
        from jobs.benchmarks import gpu

        return gpu.run(job.name, seconds=job.seconds, tell=console.event)
    module = importlib.import_module(f"jobs.benchmarks.{job.name}")
    folder = workspace.cache / "benchmark" / job.name
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(module, "table"):
        return _tabulated(job, module, folder, console)
    names, before = _contestants(module, job.peers), harness.machine()
    console.stage(f"benchmark {job.name}: {', '.join(names)}")
    started = time.monotonic()
    inputs = module.setting_up(job, folder, console)
    turn = _Turns(job, module, folder, inputs, console)
    present = [name for name in names if turn.prepare(name)]
    with console.progress("measuring", len(present) * job.repeats) as advance:
        runs = harness.interleaved(present, job.repeats, turn, advance)
    after = {"load_after": harness.machine()["load"], "seconds": round(time.monotonic() - started, 1)}
    return summary(job, module, runs, turn.absent) | {"machine": before | after}


def _tabulated(job: BenchmarkJob, module: ModuleType, folder: Path, console: Console) -> dict[str, Any]:
    """A benchmark without peers: a row of figures for each size."""
    console.stage(f"benchmark {job.name}")
    before, rows = harness.machine(), module.table(job, folder, console)
    return summary(job, module, module.rates(rows), {}) | {"table": rows, "machine": before}


class _Turns:
    """Who can run, in which interpreter; a peer that fails is out, ours must not."""

    def __init__(
        self, job: BenchmarkJob, module: ModuleType, folder: Path, inputs: Mapping[str, Any], console: Console
    ) -> None:
        self._job, self._module, self._console = job, module, console
        self._folder, self._inputs = folder, dict(inputs)
        self._pythons: dict[str, Path] = {}
        self.absent: dict[str, str] = {}  # peer -> why it was not measured

    def prepare(self, name: str) -> bool:
        """Install what the contestant needs and write its input; False if it cannot take part."""
        packages = self._module.NEEDS.get(name)
        write = name in getattr(self._module, "WRITERS", {})
        try:
            if packages:
                self._console.event(f"{name}: environment with {', '.join(packages)}")
                self._pythons[name] = scratch.python_with(packages, self._folder.parent / "environments")
            if write:
                self._process(name, 0, "write")
        except ContestantFailed as error:
            return self._leave(name, error)
        return True

    def __call__(self, name: str, repeat: int) -> dict[str, Any]:
        if name in self.absent:
            return {}
        try:
            return self._process(name, repeat, "measure")
        except ContestantFailed as error:
            self._leave(name, error)
            return {}

    def _process(self, name: str, repeat: int, action: str) -> dict[str, Any]:
        job = self._job
        spec = Spec(
            benchmark=job.name,
            contestant=name,
            folder=str(self._folder),
            inputs=self._inputs,
            batch_size=job.batch_size,
            size=job.size,
            threads=job.threads,
            precision=job.precision,
            matmul=job.matmul,
            seed=repeat,
            seconds=job.seconds,
        )
        return harness.run_process(spec, action, *([self._pythons[name]] if name in self._pythons else []))

    def _leave(self, name: str, error: ContestantFailed) -> bool:
        if name == next(iter(self._module.CONTESTANTS)):
            raise error
        self.absent[name] = str(error)
        self._console.event(f"{name} is left out: {error}")
        return False


def summary(
    job: BenchmarkJob, module: ModuleType, runs: Mapping[str, list[dict[str, Any]]], absent: Mapping[str, str]
) -> dict[str, Any]:
    """Medians and ratios of what was measured. `ratios` holds ours over each peer."""
    pairs = getattr(
        module, "COMPARISONS", {}
    )  # name -> (contestant, those of which it is held against the slowest)
    rates = {name: harness.median(found) or 0.0 for name, found in runs.items()}
    compared = {
        name: harness.ratio(rates.get(one), min(rates.get(other, 0.0) for other in others))
        for name, (one, others) in pairs.items()
    }
    result = {
        "name": job.name,
        "unit": module.UNIT,
        **_compared(module, runs, absent, "rate"),
        **({"comparisons": compared} if pairs else {}),
        "per_cpu_second": _compared(module, runs, absent, "per_cpu_second"),
        "runs": {name: [round(run["rate"], 2) for run in found if run] for name, found in runs.items()},
        "absent": dict(absent),
        "settings": to_dict(job),
    }
    facts = {name: [run["facts"] for run in found if run.get("facts")] for name, found in runs.items()}
    return result | getattr(module, "conclusions", lambda _: {})({k: v for k, v in facts.items() if v})


def _compared(
    module: ModuleType, runs: Mapping[str, list[dict[str, Any]]], absent: Mapping[str, str], key: str
) -> dict[str, Any]:
    values = {name: None if name in absent else harness.median(found, key) for name, found in runs.items()}
    values |= dict.fromkeys(set(absent) - set(values))
    ours, limit = values.pop(next(iter(module.CONTESTANTS))), values.pop(module.LIMIT, None)
    best = max((value for value in values.values() if value), default=None)
    return {
        "ours": ours,
        "peers": values,
        "limit": limit,
        "ratio_to_best_peer": harness.ratio(ours, best),
        "ratio_to_limit": harness.ratio(ours, limit),
        "ratios": {name: harness.ratio(ours, value) for name, value in values.items()},
    }


def _contestants(module: ModuleType, peers: tuple[str, ...]) -> list[str]:
    """Ours, the chosen peers (all if none is named), the limit."""
    ours, *others = module.CONTESTANTS
    known = [name for name in others if name != module.LIMIT]
    if unknown := sorted(set(peers) - set(known)):
        raise ConfigError(f"there is no peer {unknown[0]!r} here; peers are {', '.join(known)}")
    limit = [module.LIMIT] if module.LIMIT else []
    return [ours, *(name for name in known if not peers or name in peers), *limit]


# -- presets --------------------------------------------------------------------------------------------------------


def loader() -> BenchmarkJob:
    """Shuffled batches of 256 from 20,000 JPEG pictures of 128 pixels; `--set size=256` for larger ones."""
    return BenchmarkJob(name="loader", pictures=20_000, size=128, batch_size=256, seconds=4)


def storage() -> BenchmarkJob:
    """Batches from S3 over HTTP: with nothing cached and with all, against local files and a loop of ranged GETs."""
    return BenchmarkJob(name="storage", pictures=20_000, size=128, batch_size=256, seconds=4)


def gan() -> BenchmarkJob:
    """Training steps of the article's MNIST DCGAN at batch 256; `--set precision=bf16` for mixed precision."""
    return BenchmarkJob(name="gan", pictures=1536, size=28, batch_size=256, seconds=8)


def gan_dense() -> BenchmarkJob:
    """Training steps of the dense GAN of the articles at batch 128."""
    return BenchmarkJob(name="gan_dense", pictures=1536, size=28, batch_size=128, seconds=4)


def autoencoder() -> BenchmarkJob:
    """Training steps of the article's autoencoder at Keras' default batch of 32."""
    return BenchmarkJob(name="autoencoder", pictures=1536, size=28, batch_size=32, seconds=4)


def swap() -> BenchmarkJob:
    """Training steps of swap-shared in full, ours in bf16; `--set precision=fp32 --set matmul=highest` for the original's."""
    return BenchmarkJob(name="swap", pictures=64, size=64, batch_size=32, seconds=10, precision="bf16")


def training() -> BenchmarkJob:
    """The article's DCGAN at batch 256 through Ray Train, data plane and MLflow: one worker and two of one thread each."""
    return BenchmarkJob(name="training", pictures=8192, size=28, batch_size=256, threads=1, seconds=60)


def detector() -> BenchmarkJob:
    """MobileNetV2 on 64 px JPEG pictures at batch 32 through Ray Train, data plane and MLflow."""
    return BenchmarkJob(name="detector", pictures=2048, size=64, batch_size=32, threads=1, seconds=60)


def serving() -> BenchmarkJob:
    """Decoded pictures through MobileNetV2, in batches of 8 and one by one."""
    return BenchmarkJob(name="serving", pictures=8, size=224, batch_size=8, seconds=4)


def inference() -> BenchmarkJob:
    """Pixels through MobileNetV2 in every runtime a bundle can record, in batches of 8 and one by one."""
    return BenchmarkJob(name="inference", pictures=32, size=224, batch_size=8, seconds=3)


def forensics() -> BenchmarkJob:
    """The 540 Benford features of 256-pixel pictures."""
    return BenchmarkJob(name="forensics", pictures=32, size=256, batch_size=8, threads=1, seconds=4)


def growth() -> BenchmarkJob:
    """A dataset of 10^4 to 10^7 rows: commit, open, plan, first batch, garbage plan, append. `pictures` is the largest."""
    return BenchmarkJob(name="growth", pictures=10_000_000, size=4, batch_size=256, repeats=1)


PRESETS: dict[str, Callable[[], BenchmarkJob]] = {
    "loader": loader,
    "storage": storage,
    "gan": gan,
    "gan_dense": gan_dense,
    "swap": swap,
    "autoencoder": autoencoder,
    "training": training,
    "detector": detector,
    "serving": serving,
    "inference": inference,
    "forensics": forensics,
    "growth": growth,
}
