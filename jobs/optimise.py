"""Measure what runs a detector fastest on this machine's CPU, and register the detector again with that recorded in it.

    counterfake run optimise --set model=mobilenetv2-faces                          2 cores: about 1 min
    counterfake run optimise --set model=mobilenetv2-faces --set candidates=[onnxruntime-fp32,openvino-fp32]

torch eager, ONNX Runtime and OpenVINO answer the same pictures from one ONNX export, in turns, one picture and `batch` of them
per call. At fp32 a probability may differ from torch's by at most 1e-4. At bf16 and int8 (activation ranges from pictures
of the `ranges` split) the record states on the labelled rows of `data` how far probabilities move, how many decisions
change and what AUC loses; more than `max_changed` or `max_auc_loss` rules the candidate out. The fastest that is left is recorded.
The evaluation in the bundle stays that of torch: judge the new version by `counterfake run evaluate`, and fit an ensemble
again with it, whose conformal quantiles then come from the probabilities that are served.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterfake import bundle, config, locks, predictor, runtime, scoring
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection
from counterfake.images import Preprocess
from counterfake.predictor import NetPredictor
from counterfake.registry import Registry
from counterfake.runtime import BATCH, CANDIDATES, TORCH, Candidate, Engine
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.evaluate import resolve

PARITY = 1e-4  # largest difference of a probability from torch's at fp32
ALONE = 1e-5  # largest difference between a picture alone and in a batch; the service refuses more

Pixels = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiseJob:
    """One detector, what it is tried on, and what a lower precision may cost."""

    model: str = ""  # "name@alias", "name/3", "name", or a bundle folder
    candidates: tuple[str, ...] = ()  # names as in the table it prints; empty = all
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(split="validation")
    )  # labelled rows that show what a lower precision costs; uri "" = the data the model was trained on
    ranges: str = "train"  # split of the same data that gives int8 its activation ranges
    limit: int = 1000  # rows of data; 0 = all
    range_pictures: int = 128
    batch: int = BATCH  # pictures per call for which the fastest is chosen; 1 = for the shortest answer
    threads: int = 0  # of every candidate; 0 = as many as torch takes here
    seconds: float = 1.0  # of each turn
    turns: int = 3  # of each candidate; the median counts
    max_changed: float = 0.01  # share of decisions at 0.5 that a lower precision may change
    max_auc_loss: float = 0.002
    register_as: str = ""  # name in the registry; "" = the name the bundle has

    def __post_init__(self) -> None:
        known = [candidate.name for candidate in CANDIDATES]
        if unknown := sorted(set(self.candidates) - set(known)):
            raise ConfigError(f"candidate {unknown[0]!r} is unknown; candidates are {', '.join(known)}")
        if not 1 <= self.batch <= BATCH or self.turns < 1 or self.range_pictures < 1 or self.limit < 0:
            raise ConfigError(
                f"batch lies between 1 and {BATCH}, turns and range_pictures are at least 1; got {self.batch}, "
                f"{self.turns}, {self.range_pictures}"
            )


PRESETS: dict[str, Callable[[], OptimiseJob]] = {"detector": OptimiseJob}


def run(job: OptimiseJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Export, compare, time, choose, write, register. Raises ConfigError for an ensemble or a Benford forest."""
    console = console or Console(quiet=True)
    loaded = _detector(job, workspace)
    torch.set_num_threads(job.threads or torch.get_num_threads())
    data = _data(job, loaded, workspace)
    pictures, fake = _held_out(job, loaded, data, workspace, console)
    engines, absent, files = _engines(job, loaded, data, workspace, console)
    measured = _compared(job, engines, pictures, fake)
    _timed(job, engines, measured, pictures, console)
    best = _best(measured, job.batch)
    record = _record(job, best, measured, absent, data, workspace, len(fake))
    kept = {best.file: files[best.file]} if best != TORCH else {}
    folder = workspace.home / "models" / f"{loaded.name}-{loaded.bundle.digest[:8]}-{best.name}"
    made = bundle.with_runtime(loaded.bundle, folder, {"cpu": record}, kept)
    _say(console, best, measured, absent, job.batch)
    name = job.register_as or loaded.name
    with Tracker.at(workspace).start("optimise", name, params=config.to_dict(job)) as log:
        log.json("runtime.json", record)
        version = Registry.at(workspace).register(folder, name, run_id=log.id)
    return {
        "model": job.model, "chosen": best.name, "registered": version.reference, "bundle": str(folder),
        "digest": made.digest, "run_id": log.id, "record": record,
    }  # fmt: skip


def headline(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome without the record, which the bundle holds."""
    return {key: value for key, value in outcome.items() if key != "record"}


# -- what it is tried on --------------------------------------------------------------------------------------------


def _detector(job: OptimiseJob, workspace: Workspace) -> NetPredictor:
    folder = resolve(job.model, workspace)
    kind = bundle.read(folder).kind
    if kind == "ensemble":
        raise ConfigError(f"{job.model} is an ensemble; optimise its members, then fit it again with them")
    loaded = predictor.load(folder, eager=True)
    if not isinstance(loaded, NetPredictor):
        raise ConfigError(f"{job.model} is a {kind} and holds no network; there is nothing to choose")
    return loaded


def _data(job: OptimiseJob, loaded: NetPredictor, workspace: Workspace) -> DataConfig:
    known = loaded.bundle.info.get("dataset") or {}
    if job.data.uri:
        return dataclasses.replace(job.data, uri=workspace.dataset(job.data.uri))
    if not known.get("uri"):
        raise ConfigError(
            f"{job.model} does not say what it was trained on; set data.uri to a dataset like it"
        )
    return dataclasses.replace(job.data, uri=f"{known['uri'].partition('@')[0]}@{known['version']}")


def _held_out(
    job: OptimiseJob, loaded: NetPredictor, data: DataConfig, workspace: Workspace, console: Console
) -> tuple[Pixels, NDArray[np.int64]]:
    """Pictures (N, size, size, C) as the net reads them, and labels (N,)."""
    pictures, fake = _prepared(loaded, data, job.limit, workspace, console)
    if len(np.unique(fake)) < 2 or len(fake) < BATCH:
        raise DataError(
            f"{data.uri} split {data.split} has {len(fake)} labelled pictures that {loaded.name} can answer, "
            f"{int(fake.sum())} of them fake; at least {BATCH} and both classes are needed to see what changes"
        )
    return pictures, fake


def _prepared(
    loaded: NetPredictor, data: DataConfig, limit: int, workspace: Workspace, console: Console
) -> tuple[Pixels, NDArray[np.int64]]:
    dataset, version = scoring.opened(data, workspace.cache)
    locks.refuse(dataset, version, [data.split], "used to choose a runtime")
    rows = itertools.islice(scoring.labelled(dataset, version, data), limit or None)
    found: list[tuple[Pixels, int]] = []
    with (
        console.progress(f"pictures of {data.split}", limit or None) as advance,
        ThreadPoolExecutor(data.threads) as pool,
    ):
        while chunk := list(itertools.islice(rows, scoring.CHUNK)):
            decoded = pool.map(lambda s: scoring.decoded(s, loaded.finders, eyes=loaded.finds_eyes), chunk)
            for sample, picture in zip(chunk, decoded, strict=True):
                if loaded.refusal(picture) is None and sample.fake is not None:
                    found.append((loaded.prepare(picture), sample.fake))
            advance(len(chunk))
    if not found:
        raise DataError(f"{data.uri} split {data.split} has no picture that {loaded.name} can answer")
    return np.stack([pixels for pixels, _ in found]), np.array([fake for _, fake in found])


# -- candidates -----------------------------------------------------------------------------------------------------


def _engines(
    job: OptimiseJob, loaded: NetPredictor, data: DataConfig, workspace: Workspace, console: Console
) -> tuple[dict[Candidate, Engine], dict[str, str], dict[str, bytes]]:
    """Who can run, why others cannot, and the exported files."""
    asked = [c for c in CANDIDATES if not job.candidates or c.name in job.candidates]
    engines: dict[Candidate, Engine] = {TORCH: loaded.engine}
    files, absent = {}, {}
    try:
        net = next(iter(bundle.load_nets(loaded.bundle).values()))
        files["net.onnx"] = runtime.export(net, loaded.preprocess.size, loaded.preprocess.channels)
    except ConfigError as error:
        return engines, {candidate.name: str(error) for candidate in asked}, files
    for candidate in asked:
        needed = (candidate.library, *(("onnx", "onnxruntime") if candidate.precision == "int8" else ()))
        if reason := runtime.missing(*needed):
            absent[candidate.name] = reason
            continue
        if candidate.file not in files:
            few = dataclasses.replace(data, split=job.ranges)
            pictures, _ = _prepared(loaded, few, job.range_pictures, workspace, console)
            files[candidate.file] = runtime.quantised(files["net.onnx"], pictures)
        try:
            engines[candidate] = _tried(candidate, files[candidate.file], loaded.preprocess)
        except (
            Exception
        ) as error:  # whatever a library finds in a graph: it is no candidate then, and says why
            absent[candidate.name] = f"cannot run it: {' '.join(str(error).split())[:200]}"
    return engines, absent, files


def _tried(candidate: Candidate, model: bytes, preprocess: Preprocess) -> Engine:
    """Opened, and run on two numbers of pictures."""
    engine = runtime.opened(candidate, model, torch.get_num_threads())
    for count in (1, 3):
        engine(np.zeros((count, preprocess.size, preprocess.size, preprocess.channels), np.uint8))
    return engine


def _compared(
    job: OptimiseJob, engines: Mapping[Candidate, Engine], pictures: Pixels, fake: NDArray[np.int64]
) -> dict[Candidate, dict[str, Any]]:
    """Per candidate how its answers differ from torch's; "refused" says why it may not be chosen, if so."""
    expected = runtime.probabilities(engines[TORCH], pictures)
    measured = {}
    for candidate, engine in engines.items():
        found = runtime.probabilities(engine, pictures)
        changes = change(expected, found, fake)
        few = pictures[:BATCH]
        alone = np.concatenate([runtime.probabilities(engine, picture[None]) for picture in few])
        changes["alone_against_batch"] = float(np.abs(alone - runtime.probabilities(engine, few)).max())
        measured[candidate] = {**changes, "refused": refusal(job, candidate, changes)}
    return measured


def change(
    expected: NDArray[np.float64], found: NDArray[np.float64], fake: NDArray[np.int64]
) -> dict[str, float]:
    """Probabilities (N,) of torch and of a candidate, labels (N,) -> differences, decisions at 0.5 that changed, AUCs."""
    difference = np.abs(found - expected)
    auc = {name: detection.evaluate(fake, p, bootstraps=0)["auc"]["value"] for name, p in
           (("torch", expected), ("here", found))}  # fmt: skip
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "changed": float(np.mean((found >= 0.5) != (expected >= 0.5))),
        "auc": auc["here"],
        "auc_loss": auc["torch"] - auc["here"],
    }


def refusal(job: OptimiseJob, candidate: Candidate, found: Mapping[str, float]) -> str | None:
    """Why this candidate may not be chosen, or None."""
    if found["alone_against_batch"] > ALONE:
        return f"a picture differs by {found['alone_against_batch']:.1e} alone and in a batch, at most {ALONE:g} is allowed"
    if candidate.precision == "fp32":
        over = found["max_difference"] > PARITY
        return f"differs from torch by {found['max_difference']:.1e}, at most {PARITY:g}" if over else None
    if found["changed"] > job.max_changed:
        return f"changes {found['changed']:.2%} of the decisions, at most {job.max_changed:.2%} is allowed"
    if found["auc_loss"] > job.max_auc_loss:
        return f"loses {found['auc_loss']:.4f} AUC, at most {job.max_auc_loss} is allowed"
    return None


# -- speed ----------------------------------------------------------------------------------------------------------


def _timed(
    job: OptimiseJob, engines: Mapping[Candidate, Engine], measured: dict[Candidate, dict[str, Any]],
    pictures: Pixels, console: Console,
) -> None:  # fmt: skip
    """Adds pictures per second for calls of 1 and of BATCH pictures: medians of turns taken one after the other."""
    rates: dict[tuple[Candidate, int], list[float]] = {}
    sizes = sorted({1, job.batch, BATCH})
    with console.progress("timing", job.turns * len(engines) * len(sizes)) as advance:
        for _, (candidate, engine), size in itertools.product(range(job.turns), engines.items(), sizes):
            rates.setdefault((candidate, size), []).append(_rate(engine, pictures[:size], job.seconds))
            advance(1)
    for candidate in engines:
        measured[candidate]["pictures_per_second"] = {
            str(size): round(statistics.median(rates[candidate, size]), 1) for size in sizes
        }


def _rate(engine: Engine, pictures: Pixels, seconds: float) -> float:
    for _ in range(3):
        runtime.probabilities(engine, pictures)
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not calls:
        runtime.probabilities(engine, pictures)
        calls += 1
    return calls * len(pictures) / elapsed


def _best(measured: Mapping[Candidate, Mapping[str, Any]], batch: int) -> Candidate:
    allowed = [candidate for candidate, found in measured.items() if found["refused"] is None]
    return max(allowed, key=lambda candidate: measured[candidate]["pictures_per_second"][str(batch)])


# -- what is left behind --------------------------------------------------------------------------------------------


def _record(
    job: OptimiseJob, best: Candidate, measured: Mapping[Candidate, Mapping[str, Any]], absent: Mapping[str, str],
    data: DataConfig, workspace: Workspace, rows: int,
) -> dict[str, Any]:  # fmt: skip
    _, version = scoring.opened(data, workspace.cache)
    return {
        "library": best.library, "precision": best.precision, "file": best.file, "batch": job.batch,
        "measured": {candidate.name: dict(found) for candidate, found in measured.items()}, "absent": dict(absent),
        "held_out": {
            "uri": data.uri.partition("@")[0], "version": version.number, "digest": version.digest, "split": data.split, "n": rows,
        },
        "ranges": {"split": job.ranges, "pictures": job.range_pictures},
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "libraries": runtime.libraries()},
    }  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def _say(
    console: Console, best: Candidate, measured: Mapping[Candidate, Mapping[str, Any]], absent: Mapping[str, str], batch: int
) -> None:  # fmt: skip
    eager = measured[TORCH]["pictures_per_second"][str(batch)]
    for candidate, found in measured.items():
        rate = found["pictures_per_second"][str(batch)]
        told = found["refused"] or f"{found['changed']:.2%} of decisions change"
        console.event(f"{candidate.name}: {rate:.0f} pictures/s, {rate / eager:.2f} x torch; {told}")
    for name, reason in absent.items():
        console.event(f"{name}: left out, {reason}")
    console.event(f"chosen: {best.name}")
