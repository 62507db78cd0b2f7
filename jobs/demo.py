"""The main job, from end to end: faces, shards, GAN, face swap, fakes, detectors, search, ensemble, gate, service, report.

    make demo                          2 cores, no GPU, about 5 minutes once installed
    make demo DATA=folder              your own folder/real and folder/fake in the detector stages
    make demo KEEP=1                   leaves the service up and prints the page's address

Everything is real and small: procedural people, networks of about a million weights, two Ray Train workers. Leaves
`runs/demo/report.html` and `runs/demo/summary.json`. Killed and run again, it continues: finished training is reused.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jobs
from counterfake import config
from counterfake.cluster import session
from counterfake.errors import ConfigError, DataError, GateError, ServiceError
from counterfake.gate import CHAMPION, Gate
from counterfake.records import Dataset, Sample
from counterfake.storage import write_atomic
from counterfake.workspace import Workspace
from jobs import demo_report
from jobs.console import Console

ENSEMBLE = "ensemble"  # what `counterfake serve` and `counterfake detect` look for
FACES = "demo-faces"
OWN_SPLITS = {"train": 0.5, "validation": 0.1, "calibration": 0.25, "test": 0.15}  # a folder may be small
ALPHA = 0.1  # error rate of the verdicts, where the calibration split has rows enough for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoJob:
    """The main job; every stage is an ordinary job with its `-demo` preset."""

    data: str = ""  # folder with real/ and fake/ for the detector stages; "" = what the demo made itself
    licence: str = "unstated"  # of that folder
    consent: str = "none"  # of that folder: research, subjects, synthetic, none
    keep: bool = False  # leave the service up
    workers: int = 2  # Ray Train workers of GAN and swap
    port: int = 8000  # of the service
    pictures: int = 10  # held-out pictures posted to the service
    identities: int = 48  # procedural people
    per_identity: int = 18  # pictures of each
    scale: float = 1.0  # of every training's length; 0.1 is a quick look that detects little
    gate: Gate = CHAMPION  # before @champion

    def __post_init__(self) -> None:
        if min(self.pictures, self.workers, self.identities, self.per_identity) < 1 or self.scale <= 0:
            raise ConfigError(
                "pictures, workers, identities and per_identity must be at least 1, scale above 0"
            )


PRESETS = {"demo": DemoJob}


def run(job: DemoJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Walks all stages; returns what summary.json holds."""
    console = console or Console(quiet=True)
    if job.data and not Path(job.data).is_dir():
        raise ConfigError(f"data={job.data} is no folder; it must hold real/ and fake/ with pictures")
    _require_free(job.port)
    walk = _Walk(job, workspace, console)
    cpus = len(os.sched_getaffinity(0))
    learning = (_dataset, _gan, _swap, _fakes, _tune, _detector, _benford, _ensemble, _champion)
    answering = (_served, _metrics)
    with (
        session.session(workspace, cpus=max(cpus, 2)),
        console.progress("the main job", len(learning) + len(answering)) as advance,
    ):
        for stage in learning:
            walk.take(stage)
            advance(1)
        try:
            for stage in answering:
                walk.take(stage)
                advance(1)
        finally:
            _stop_serving()
    summary = walk.finish()
    if job.keep:
        summary["page"] = _leave_running(walk)
    return summary


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a person wants to read at the end; `--json` and summary.json have everything."""
    stages = summary["stages"]
    auc, served = stages["ensemble"]["evaluation"]["auc"], stages["served"]
    return {
        "minutes": round(summary["seconds"] / 60, 1),
        "test AUC": f"{auc['value']:.3f} (95 % interval {auc['low']:.3f} to {auc['high']:.3f})",
        "gate": "passed" if stages["champion"]["promoted"] else stages["champion"]["refused"],
        "verdicts over HTTP": f"{served['right']} of {served['decided']} decided ones right, {served['requests']} asked",
        "report": summary["report"],
        "figures": str(Path(summary["report"]).with_name("summary.json")),
        **({"page": summary["page"]} if "page" in summary else {}),
    }


class _Walk:
    """The stages taken so far, what each gave, and the two files they end in."""

    def __init__(self, job: DemoJob, workspace: Workspace, console: Console) -> None:
        self.job, self.workspace, self.console = job, workspace, console
        self.folder = workspace.home / "demo"
        self.stages: dict[str, dict[str, Any]] = {}
        self.extras: dict[str, Any] = {}  # pictures and longer results, for the report
        self.served = f"{ENSEMBLE}@champion"  # model of the service
        self.started = time.perf_counter()

    @property
    def data(self) -> str:
        """Dataset of the detector stages."""
        return "demo-own" if self.job.data else FACES

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.job.port}"

    def take(self, stage: Callable[[_Walk], dict[str, Any]]) -> None:
        name = stage.__name__.strip("_")
        self.console.stage(f"{name}: {(stage.__doc__ or '').strip().splitlines()[0]}")
        started = time.perf_counter()
        result = stage(self)
        self.stages[name] = {"seconds": round(time.perf_counter() - started, 2), **result}
        self.console.event(f"  {self.stages[name]['seconds']:.0f} s")

    def do(self, job: str, preset: str, *, scaled: str = "", **changes: Any) -> dict[str, Any]:
        """One ordinary job with its preset; `__` in a name stands for the dot of a path, `scaled` is its duration."""
        module = jobs.load(job)
        made = jobs.preset(module, preset)
        dotted = {path.replace("__", "."): value for path, value in changes.items()}
        if scaled:
            duration = config.flatten(config.to_dict(made))[scaled]
            dotted[scaled] = max(1, round(duration * self.job.scale))
        return dict(module.run(config.override(made, dotted), self.workspace, console=self.console))

    def finish(self) -> dict[str, Any]:
        summary = {
            "seconds": round(time.perf_counter() - self.started, 2),
            "stages": self.stages,
            "report": str(self.folder / "report.html"),
        }
        page = demo_report.build(summary, self.extras, self.workspace)
        write_atomic(self.folder / "report.html", page.encode())
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2, default=str).encode())
        self.console.event(f"report: {self.folder / 'report.html'}")
        return summary


# -- stages ---------------------------------------------------------------------------------------------------------


def _dataset(walk: _Walk) -> dict[str, Any]:
    """People who do not exist, into versioned Arrow shards"""
    job, result = walk.job, {}
    if job.data:  # first: what is wrong with a folder shows at once
        own = walk.do(
            "ingest", "folder", into="demo-own",
            source__path=job.data, source__licence=job.licence, source__consent=job.consent,
            splits__fractions=OWN_SPLITS,
        )  # fmt: skip
        result["own"] = _ingested(own)
        _alpha(walk)
    made = walk.do(
        "ingest", "synthetic-faces-demo", into=FACES,
        source__identities=job.identities, source__per_identity=job.per_identity, source__size=128,
    )  # fmt: skip
    return {"faces": _ingested(made), **result}


def _ingested(result: dict[str, Any]) -> dict[str, Any]:
    wanted = ("dataset", "version", "digest", "rows", "splits", "pictures_per_second", "report")
    return {key: result[key] for key in wanted if key in result}


def _gan(walk: _Walk) -> dict[str, Any]:
    """A DCGAN on the real faces, data-parallel on Ray Train workers"""
    made = walk.do(
        "train-gan", "dcgan-faces-demo", scaled="loop.steps", data__uri=_real(walk.workspace), workers=walk.job.workers
    )  # fmt: skip
    walk.extras["gan_run"] = made["run_id"]
    return _trained(made)


def _swap(walk: _Walk) -> dict[str, Any]:
    """A face swap, one encoder for everyone and a decoder per person, on Ray Train workers"""
    people = _people(walk.workspace)
    made = walk.do(
        "train-swap", "swap-demo", scaled="loop.images", data__uri=_real(walk.workspace), data__split="*",
        data__where={"fake": 0, "identity": people}, workers=walk.job.workers, cpus_per_worker=0.5,
    )  # fmt: skip
    walk.extras["swap_run"] = made["run_id"]
    return {**_trained(made), "people": people}


def _fakes(walk: _Walk) -> dict[str, Any]:
    """Fakes by both models into new versions, every row with its maker, every file marked as generated"""
    generated = walk.do("generate", "gan-faces-demo", into=FACES, size=128, count=500)
    swapped = walk.do("generate", "swap-faces-demo", into=FACES, faces=FACES, count=400)
    walk.extras["makers"] = ["camera", generated["maker"], swapped["maker"]]
    keys = ("maker", "dataset", "version", "digest", "rows", "splits", "report", "pictures_per_second")
    return {"gan": {k: generated[k] for k in keys}, "swap": {k: swapped[k] for k in keys}}


def _tune(walk: _Walk) -> dict[str, Any]:
    """Ray Tune searches the detector's settings: Optuna proposes, ASHA stops the weak"""
    found = walk.do(
        "tune-detector", "detector-demo", scaled="train.loop.images", **_both(walk.data, "train__")
    )
    walk.extras["tune_run"] = found["run_id"]
    trials = [
        {k: t[k] for k in ("name", "settings", "value", "steps", "state", "run_id")} for t in found["trials"]
    ]
    keys = ("run_id", "metric", "best", "settings_file", "concurrent", "importance")
    return {**{k: found[k] for k in keys}, "trials": trials}


def _detector(walk: _Walk) -> dict[str, Any]:
    """MobileNetV2 trained with the settings the search found"""
    settings = config.load_file(walk.stages["tune"]["settings_file"])
    changes = {path.replace(".", "__"): value for path, value in settings.items()}
    changes |= _both(walk.data)
    made = walk.do("train-detector", "mobilenetv2-demo", scaled="loop.images", **changes)
    walk.extras["detector_run"] = made["run_id"]
    return {**_trained(made), "settings": settings}


def _benford(walk: _Walk) -> dict[str, Any]:
    """The second family: first digits of DCT coefficients, a random forest"""
    made = walk.do("train-benford", "benford-demo", data__uri=walk.data)
    return {k: v for k, v in made.items() if not isinstance(v, bytes)}


def _ensemble(walk: _Walk) -> dict[str, Any]:
    """Stacked and calibrated on rows that neither training nor the test used"""
    members = [walk.stages["detector"]["registered"], walk.stages["benford"]["registered"]]
    made = walk.do(
        "fit-ensemble",
        "demo",
        members=members,
        data__uri=walk.data,
        test__uri=walk.data,
        alpha=_alpha(walk),
        promote="",
        register_as=ENSEMBLE,
    )
    walk.extras["ensemble_run"] = made.get("run_id")
    return made


def _champion(walk: _Walk) -> dict[str, Any]:
    """Through the gate, or not: only what passes becomes @champion"""
    from counterfake.registry import Registry

    registry = Registry.at(walk.workspace)
    version = registry.get(walk.stages["ensemble"]["registered"])
    try:
        version = registry.promote(version.name, version.version, gate=walk.job.gate)
        walk.served, refusal = f"{ENSEMBLE}@champion", ""
    except GateError as error:
        walk.served, refusal = version.reference, str(error)
        walk.console.event(
            f"the gate refused it, so it is served by its number, for you to look at: {refusal}"
        )
    facts = {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "lineage": dict(version.tags),
    }
    return {**facts, "promoted": not refusal, "refused": refusal}


def _served(walk: _Walk) -> dict[str, Any]:
    """One autoscaling deployment per detector behind a gateway; held-out pictures posted to it over HTTP"""
    from serving import client

    _start_serving(walk)
    answers = []
    for sample in _held_out(walk):
        started = time.perf_counter()
        verdict = client.detect(walk.url, sample.media)
        seconds = time.perf_counter() - started
        answers.append(
            {"truth": "fake" if sample.fake else "real", "maker": sample.maker, "seconds": seconds, **verdict}
        )
        walk.extras.setdefault("pictures", []).append(sample.media)
    walk.extras["answers"] = answers
    decided = [a for a in answers if a["verdict"] in ("real", "fake")]
    return {
        "url": walk.url,
        "requests": len(answers),
        "decided": len(decided),
        "right": sum(a["verdict"] == a["truth"] for a in decided),
        "median_milliseconds": round(1e3 * sorted(a["seconds"] for a in answers)[len(answers) // 2], 1),
        "model": answers[0]["model"],
        "first": answers[0],
    }


def _metrics(walk: _Walk) -> dict[str, Any]:
    """The application's Prometheus page"""
    with urllib.request.urlopen(f"{walk.url}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    samples = [line for line in page.splitlines() if line and not line.startswith("#")]
    wanted = ("counterfake_http_requests_total", "counterfake_verdicts_total", "counterfake_detector")
    shown = [
        line
        for line in samples
        if line.startswith(wanted) and "_bucket" not in line and "_created" not in line
    ]
    walk.extras["metrics"] = shown
    return {"series": len(samples), "page": f"{walk.url}/metrics", "some": shown[:12]}


# -- parts of stages ------------------------------------------------------------------------------------------------


def _alpha(walk: _Walk) -> float:
    """ALPHA, or the least that a small folder of one's own allows: half of the rows calibrate, 1/alpha - 1 per class."""
    rows = [0, 0]
    for row in Dataset.open(walk.workspace.dataset(walk.data)).version().counts:
        if row["split"] == "calibration" and row["fake"] in (0, 1):
            rows[row["fake"]] += row["rows"]
    alpha = max(ALPHA, math.ceil(1000 / (0.4 * min(rows) + 1)) / 1000)
    if alpha > 0.3:
        raise DataError(
            f"{min(rows)} pictures of one class are left for calibration, too few for an error rate under 30 %; "
            "put at least 40 real and 40 fake pictures into the folder"
        )
    return alpha


def _both(uri: str, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}data__uri": uri, f"{prefix}validation__uri": uri}


def _trained(result: dict[str, Any]) -> dict[str, Any]:
    keys = (
        "name",
        "registered",
        "run_id",
        "steps",
        "images",
        "images_per_second",
        "metrics",
        "weights_digest",
        "reused",
    )
    return {key: result[key] for key in keys}


def _real(workspace: Workspace) -> str:
    """The newest version of the faces before any fake: run again, the demo finds its generators trained on it."""
    versions = Dataset.open(workspace.dataset(FACES)).history()
    return f"{FACES}@{max(v.number for v in versions if v.names('maker') == ['camera'])}"


def _people(workspace: Workspace) -> list[str]:
    """Some people of every split: a swap takes source and target from one split, so no face crosses over."""
    dataset = Dataset.open(workspace.dataset(FACES))
    by_split: dict[str, list[str]] = {}
    for row in dataset.version().counts:
        if row["fake"] == 0 and row["identity"] is not None:
            by_split.setdefault(row["split"], []).append(row["identity"])
    wanted = {"train": 3, "validation": 1, "calibration": 2, "test": 2}
    return sorted(name for split, count in wanted.items() for name in sorted(set(by_split[split]))[:count])


def _held_out(walk: _Walk) -> Iterator[Sample]:
    """Pictures of the test split, makers in turn, real ones every second time."""
    dataset = Dataset.open(walk.workspace.dataset(walk.data), cache=walk.workspace.cache)
    by_maker: dict[str, list[Sample]] = {}
    for sample in dataset.samples(dataset.version(), "test"):
        by_maker.setdefault(sample.maker if sample.fake else "", []).append(sample)
    real, makers = iter(by_maker.pop("", [])), [iter(by_maker[name]) for name in sorted(by_maker)]
    for i in range(walk.job.pictures):
        queue = real if i % 2 == 0 else makers[(i // 2) % len(makers)]
        yield from itertools.islice(queue, 1)


def _require_free(port: int) -> None:
    """Before the long stages, not after them."""
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ServiceError(
                f"port {port} is in use, perhaps by the service of an earlier KEEP=1; stop it, or use another: --set port={port + 1}"
            )


def _start_serving(walk: _Walk) -> None:
    """On the Ray session that is already there, with small shares of its CPUs."""
    from serving import app

    small = {
        "detectors.cpus": 0.2,
        "gateway.cpus": 0.1,
        "detectors.max_replicas": 2,
        "gateway.max_replicas": 2,
    }
    changes = {"model": walk.served, "port": walk.job.port, **small}
    app.start(config.override(app.Settings(), changes), walk.workspace, blocking=False)


def _stop_serving() -> None:
    from serving import app

    app.stop()


def _leave_running(walk: _Walk) -> str:
    """A service of its own, that outlives this command."""
    job, workspace = walk.job, walk.workspace
    log = workspace.home / "demo" / "serve.log"
    words = [
        sys.executable,
        "-m",
        "jobs",
        "serve",
        "--model",
        walk.served,
        "--port",
        str(job.port),
        "--home",
        str(workspace.home),
    ]
    words += ["--storage", workspace.storage, "--tracking", workspace.tracking_uri]
    with log.open("wb") as out:
        child = subprocess.Popen(
            words, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    url = walk.url
    with _ends_with_us(child):
        deadline = time.monotonic() + 180
        while not _ready(url):
            if child.poll() is not None or time.monotonic() > deadline:
                raise ServiceError(f"the service did not come up; see {log}")
            time.sleep(0.5)
    walk.console.event(f"the page: {url}   (stop it with `kill {child.pid}`)")
    return url


@contextmanager
def _ends_with_us(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Until the block ends well, the child ends with the parent."""
    try:
        yield
    except BaseException:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        raise


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
