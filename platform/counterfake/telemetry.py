"""Every Prometheus metric of the platform, named once; and the sum of them over many processes.

A process counts in its own `Telemetry`. `Totals` adds the snapshots of all processes into the one page that is scraped.
It keeps the running sum and, per process, the last value it was told, and adds only what is new: so a counter never
falls when a process ends, and a snapshot that comes late or twice changes nothing. The only user of prometheus_client.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Key = tuple[str, str, tuple[str, ...]]  # metric, sample name, label values (a histogram's `le` last)
Snapshot = list[tuple[str, str, tuple[str, ...], float]]

_SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PROBABILITY = tuple(round(0.05 * step, 2) for step in range(1, 21))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One metric: its exported name, what it says, and how several processes are put together."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    over_processes: Literal["sum", "max"] = "sum"  # gauges only; counters and histograms are sums


METRICS: tuple[Spec, ...] = (
    Spec(
        name="counterfake_http_requests_total",
        kind="counter",
        about="HTTP requests answered, by route, method and status.",
        labels=("route", "method", "status"),
    ),
    Spec(
        name="counterfake_http_request_seconds",
        kind="histogram",
        about="Seconds from the first byte of a request to the last byte of its answer.",
        labels=("route",),
        buckets=_SECONDS,
    ),
    Spec(name="counterfake_http_in_flight", kind="gauge", about="HTTP requests being answered now."),
    Spec(
        name="counterfake_upload_bytes",
        kind="histogram",
        about="Size of accepted pictures in bytes.",
        buckets=(1e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 2e7),
    ),
    Spec(
        name="counterfake_refusals_total",
        kind="counter",
        about="Requests refused with a 4xx status, by reason.",
        labels=("reason",),
    ),
    Spec(
        name="counterfake_errors_total",
        kind="counter",
        about="Requests that failed on our side with a 5xx status, by reason.",
        labels=("reason",),
    ),
    Spec(
        name="counterfake_verdicts_total",
        kind="counter",
        about="Verdicts given, by word.",
        labels=("verdict",),
    ),
    Spec(
        name="counterfake_abstentions_total",
        kind="counter",
        about="Verdicts that were neither real nor fake, by reason.",
        labels=("reason",),
    ),
    Spec(
        name="counterfake_ensemble_score",
        kind="histogram",
        about="Calibrated probability that a picture is fake.",
        buckets=_PROBABILITY,
    ),
    Spec(
        name="counterfake_detector_score",
        kind="histogram",
        about="Probability given by each detector before calibration.",
        labels=("detector",),
        buckets=_PROBABILITY,
    ),
    Spec(
        name="counterfake_detector_seconds",
        kind="histogram",
        about="Seconds a detector takes for one batch.",
        labels=("detector",),
        buckets=_SECONDS,
    ),
    Spec(
        name="counterfake_detector_wait_seconds",
        kind="histogram",
        about="Seconds a decoded picture waits for its batch.",
        labels=("detector",),
        buckets=_SECONDS,
    ),
    Spec(
        name="counterfake_detector_errors_total",
        kind="counter",
        about="Pictures a detector owed an opinion of: unavailable after retries, failed in its own code, or overloaded.",
        labels=("detector", "reason"),
    ),
    Spec(
        name="counterfake_detector_queue",
        kind="gauge",
        about="Pictures inside a detector: being decoded, waiting or predicted.",
        labels=("detector",),
    ),
    Spec(
        name="counterfake_batch_size",
        kind="histogram",
        about="Pictures per predicted batch.",
        labels=("detector",),
        buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64),
    ),
    Spec(
        name="counterfake_replicas",
        kind="gauge",
        about="Processes that report to this page, by what they are.",
        labels=("role",),
    ),
    Spec(
        name="counterfake_model_info",
        kind="gauge",
        about="1 for the ensemble that answers now.",
        labels=("name", "version", "digest"),
        over_processes="max",
    ),
    Spec(
        name="counterfake_detector_in_use",
        kind="gauge",
        about="1 for each detector of the ensemble that answers now.",
        labels=("detector",),
        over_processes="max",
    ),
    Spec(
        name="counterfake_model_swaps_total",
        kind="counter",
        about="Moves of the followed alias, by outcome: live or refused.",
        labels=("outcome",),
    ),
    Spec(
        name="counterfake_follow_errors_total",
        kind="counter",
        about="Polls of the model registry that failed; requests do not depend on it.",
    ),
    Spec(
        name="counterfake_follow_success_timestamp_seconds",
        kind="gauge",
        about="Unix time of the last successful poll of the model registry.",
        over_processes="max",
    ),
)

_SPECS = {spec.name: spec for spec in METRICS}


class Telemetry:
    """The metrics of one process: `count`, `observe`, `set` and `add` by name, `snapshot` to send them on."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {spec.name: _instrument(spec, self._registry) for spec in METRICS}

    def count(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        """Add to a counter; amount >= 0."""
        self._of(name, "counter", labels).inc(amount)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """One value into a histogram."""
        self._of(name, "histogram", labels).observe(value)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """The value of a gauge now."""
        self._of(name, "gauge", labels).set(value)

    def add(self, name: str, amount: float, /, **labels: str) -> None:
        """Move a gauge up or down, as requests come and go."""
        self._of(name, "gauge", labels).inc(amount)

    def clear(self, name: str) -> None:
        """Forget all label values of a gauge, such as the model that was live before."""
        self._metrics[name].clear()

    def snapshot(self) -> Snapshot:
        """Every value so far, cumulative since the process began; plain data."""
        rows: Snapshot = []
        for spec in METRICS:
            names = spec.labels + (("le",) if spec.kind == "histogram" else ())
            for family in self._metrics[spec.name].collect():
                for sample in family.samples:
                    values = tuple(sample.labels[label] for label in names if label in sample.labels)
                    rows.append((spec.name, sample.name, values, float(sample.value)))
        return rows

    def _of(self, name: str, kind: str, labels: dict[str, str]) -> Any:
        if name not in _SPECS or _SPECS[name].kind != kind:
            raise ValueError(f"{name} is no {kind} of telemetry.METRICS; add it there first")
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric


class Totals:
    """The sum over processes. Counters and histograms only grow; gauges hold what live processes say now."""

    def __init__(self) -> None:
        self._sums: dict[Key, float] = {}
        self._processes: dict[str, _Process] = {}

    def add(self, process: str, sequence: int, snapshot: Snapshot, *, now: float, role: str = "") -> None:
        """Take a process's cumulative snapshot. `process` is unique per start; older sequences change nothing."""
        known = self._processes.setdefault(process, _Process())
        known.role, known.seen = role or known.role, max(known.seen, now)
        if sequence <= known.sequence:
            return
        known.sequence = sequence
        for metric, sample, labels, value in snapshot:
            if metric not in _SPECS:
                continue  # a process of an older or newer release
            key = (metric, sample, tuple(labels))
            if _SPECS[metric].kind != "gauge":
                grown = value - known.values.get(key, 0.0)
                self._sums[key] = self._sums.get(key, 0.0) + max(grown, 0.0)
        known.values = {(metric, sample, tuple(labels)): value for metric, sample, labels, value in snapshot}

    def live(self, now: float, within_seconds: float) -> dict[str, str]:
        """{process: role} of those heard of within that many seconds."""
        return {name: p.role for name, p in self._processes.items() if now - p.seen <= within_seconds}

    def forget(self, now: float, silent_seconds: float) -> None:
        """Drop the books of processes silent for so long that they cannot come back; the sums stay."""
        for name in [n for n, p in self._processes.items() if now - p.seen > silent_seconds]:
            del self._processes[name]

    def value(self, sample: str, /, **labels: str) -> float:
        """Sum of one counter sample over all labels that match; for tests and summaries."""
        total = 0.0
        for (metric, name, values), value in self._sums.items():
            named = dict(zip((*_SPECS[metric].labels, "le"), values, strict=False))
            if name == sample and all(named.get(k) == v for k, v in labels.items()):
                total += value
        return total

    def render(self, *, now: float, within_seconds: float = 15.0) -> bytes:
        """The page: text exposition format 0.0.4, every metric with HELP and TYPE."""
        registry = CollectorRegistry()
        registry.register(_Fixed(list(self._families(now, within_seconds))))
        return generate_latest(registry)

    def state(self) -> dict[str, Any]:
        """JSON-able; `Totals.from_state(totals.state())` goes on where this one stopped."""
        return {
            "sums": [[*key, value] for key, value in self._sums.items()],
            "processes": {name: process.state() for name, process in self._processes.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Totals:
        """Totals as they were when `state` was written."""
        totals = cls()
        totals._sums = {(m, s, tuple(labels)): v for m, s, labels, v in state["sums"] if m in _SPECS}
        totals._processes = {name: _Process.from_state(p) for name, p in state["processes"].items()}
        return totals

    def _families(self, now: float, within_seconds: float) -> Iterator[Metric]:
        values = dict(self._sums)
        live = self.live(now, within_seconds)
        for name in live:
            _merge_gauges(values, self._processes[name].values)
        for role in live.values():
            key: Key = ("counterfake_replicas", "counterfake_replicas", (role,))
            values[key] = values.get(key, 0.0) + 1
        rows: dict[str, list[tuple[str, tuple[str, ...], float]]] = {}
        for (metric, sample, labels), value in values.items():
            rows.setdefault(metric, []).append((sample, labels, value))
        for spec in METRICS:
            yield _family(spec, rows.get(spec.name, []))


# -- private --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Process:
    role: str = ""
    seen: float = 0.0  # Unix time of the last word from it
    sequence: int = -1
    values: dict[Key, float] = dataclasses.field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        rows = [[*key, value] for key, value in self.values.items() if _SPECS[key[0]].kind != "gauge"]
        return {"role": self.role, "seen": self.seen, "sequence": self.sequence, "values": rows}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> _Process:
        values = {(m, s, tuple(labels)): v for m, s, labels, v in state["values"] if m in _SPECS}
        return cls(state["role"], state["seen"], state["sequence"], values)


class _Fixed:
    """A collector of families that are already there."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _instrument(spec: Spec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if spec.kind == "histogram":
        return Histogram(spec.name, spec.about, spec.labels, registry=registry, buckets=spec.buckets)
    if spec.kind == "gauge":
        return Gauge(spec.name, spec.about, spec.labels, registry=registry)
    return Counter(spec.name, spec.about, spec.labels, registry=registry)


def _merge_gauges(values: dict[Key, float], said: dict[Key, float]) -> None:
    for key, value in said.items():
        spec = _SPECS.get(key[0])
        if spec is not None and spec.kind == "gauge":
            before = values.get(key)
            joined = value if before is None else before + value
            values[key] = joined if spec.over_processes == "sum" or before is None else max(before, value)


def _family(spec: Spec, rows: list[tuple[str, tuple[str, ...], float]]) -> Metric:
    family = Metric(spec.name.removesuffix("_total"), spec.about, spec.kind)
    for sample, labels, value in sorted(rows, key=_order):
        names = spec.labels + (("le",) if sample.endswith("_bucket") else ())
        family.add_sample(sample, dict(zip(names, labels, strict=True)), value)
    return family


def _order(row: tuple[str, tuple[str, ...], float]) -> tuple[Any, ...]:
    sample, labels, _ = row
    if not sample.endswith("_bucket"):
        return (labels, 1, 0.0, sample)
    return (labels[:-1], 0, float(labels[-1].replace("+Inf", "inf")), sample)
