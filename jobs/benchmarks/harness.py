"""Contestants in processes of their own, taking turns, so that a busy machine is busy for all of them; medians at the end."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

ENDS_AFTER = 600  # seconds a contestant may take, its warm-up included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a contestant's process is told."""

    benchmark: str
    contestant: str
    folder: str  # of this benchmark's cached input
    inputs: dict[str, Any]  # what `setting_up` returned
    batch_size: int
    size: int  # pixels
    threads: int
    precision: str
    matmul: Literal["auto", "highest", "high", "medium"]
    seed: int  # the number of the repeat
    seconds: float  # to measure, after the warm-up


@dataclasses.dataclass
class Contestant:
    """One way to do the work, ready to go."""

    round: Callable[[], int]  # does one epoch, step or call; returns how many pictures that was
    warmup: int = 1  # rounds before the clock starts
    facts: Callable[[], dict[str, Any]] = dict  # what else it found, asked once at the end
    whole: Callable[[], dict[str, Any]] | None = None  # measures itself: rate, per_cpu_second, facts


class ContestantFailed(Exception):
    """A contestant's process ended without a figure; the message is its last line."""


def measure(spec: Spec, python: Path | str = sys.executable) -> dict[str, Any]:
    """Run one contestant once -> {"rate": pictures/s, "per_cpu_second": …, "facts": …}."""
    return run_process(spec, "measure", python)


def run_process(spec: Spec, action: str, python: Path | str = sys.executable) -> dict[str, Any]:
    """`python -m jobs.benchmarks.process` with this spec. Raises ContestantFailed with the last line of its errors."""
    with tempfile.TemporaryDirectory(prefix="counterfake-benchmark-") as folder:
        order, answer = Path(folder) / "order.json", Path(folder) / "answer.json"
        order.write_text(json.dumps({"action": action, **dataclasses.asdict(spec)}))
        command = [str(python), "-m", "jobs.benchmarks.process", str(order), str(answer)]
        try:
            done = subprocess.run(
                command,
                env=_environment(spec),
                capture_output=True,
                text=True,
                timeout=ENDS_AFTER,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ContestantFailed(f"{spec.contestant} did not end within {ENDS_AFTER} s") from error
        if done.returncode or not answer.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines()
            last = lines[-1] if lines else f"{spec.contestant} ended with {done.returncode}"
            raise ContestantFailed(last.removeprefix(f"{__name__}.ContestantFailed: "))
        return dict(json.loads(answer.read_text()))


def interleaved(
    names: Sequence[str],
    repeats: int,
    once: Callable[[str, int], dict[str, Any]],
    advance: Callable[[int], None],
) -> dict[str, list[dict[str, Any]]]:
    """`once(name, repeat)` for each contestant in turn, every other round backwards, so that drift favours nobody."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            results[name].append(once(name, repeat))
            advance(1)
    return results


def median(runs: Sequence[Mapping[str, Any]], key: str = "rate") -> float | None:
    """Median over the repeats; None where there is nothing."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return round(statistics.median(values), 3) if values else None


def ratio(value: float | None, other: float | None) -> float | None:
    return round(value / other, 3) if value and other else None


def machine() -> dict[str, Any]:
    """Where this was measured, and how busy it was just now."""
    from importlib.metadata import version

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # processes, mean of the last minute
        "system": f"{os.uname().sysname} {os.uname().release}",
        "python": sys.version.split()[0],
        "torch": version("torch"),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), os.uname().machine
    )


def _environment(spec: Spec) -> dict[str, str]:
    quiet = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return (
        os.environ
        | quiet
        | {"OMP_NUM_THREADS": str(spec.threads), "HF_DATASETS_CACHE": f"{spec.folder}/datasets-cache"}
    )
