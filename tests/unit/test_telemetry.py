"""One Prometheus page over many processes: sums that only grow, whatever comes, goes, repeats or arrives late."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from counterfake.telemetry import METRICS, Telemetry, Totals

REQUESTS = "counterfake_http_requests_total"
LABELS = {"route": "/v1/detect", "method": "POST", "status": "200"}


def requests(totals: Totals) -> float:
    return totals.value(REQUESTS, route="/v1/detect")


def test_the_page_sums_processes_and_parses_as_prometheus_text() -> None:
    totals = Totals()
    for number in range(3):
        process = Telemetry()
        process.count(REQUESTS, number + 1, **LABELS)
        process.observe("counterfake_detector_score", 0.42, detector="cnn")
        process.set("counterfake_http_in_flight", 2)
        process.set("counterfake_model_info", 1, name="e", version="3", digest="ab")
        totals.add(f"gateway#{number}", 0, process.snapshot(), now=100.0, role="gateway")
    page = totals.render(now=101.0).decode()
    samples = {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(page)
        for s in family.samples
    }
    assert samples[REQUESTS, tuple(sorted(LABELS.items()))] == 6
    assert samples["counterfake_detector_score_count", (("detector", "cnn"),)] == 3
    assert samples["counterfake_detector_score_bucket", (("detector", "cnn"), ("le", "0.45"))] == 3
    assert samples["counterfake_detector_score_bucket", (("detector", "cnn"), ("le", "0.4"))] == 0
    assert samples["counterfake_http_in_flight", ()] == 6
    assert samples["counterfake_model_info", (("digest", "ab"), ("name", "e"), ("version", "3"))] == 1
    assert samples["counterfake_replicas", (("role", "gateway"),)] == 3
    assert page.count("# TYPE") == len(METRICS)


def test_a_process_that_ends_keeps_its_counts_and_loses_its_gauges() -> None:
    totals, process = Totals(), Telemetry()
    process.count(REQUESTS, 5, **LABELS)
    process.set("counterfake_http_in_flight", 4)
    totals.add("a", 0, process.snapshot(), now=0.0, role="gateway")
    totals.forget(now=10_000.0, silent_seconds=3600)
    assert requests(totals) == 5
    page = totals.render(now=10_000.0).decode()
    assert "\ncounterfake_http_in_flight" not in page


def test_a_snapshot_that_comes_twice_or_late_changes_nothing() -> None:
    totals, process = Totals(), Telemetry()
    process.count(REQUESTS, 2, **LABELS)
    early = process.snapshot()
    process.count(REQUESTS, 3, **LABELS)
    late = process.snapshot()
    totals.add("a", 1, late, now=0.0)
    totals.add("a", 0, early, now=1.0)
    totals.add("a", 1, late, now=2.0)
    assert requests(totals) == 5


def test_totals_go_on_after_their_state_was_written_and_read() -> None:
    totals, process = Totals(), Telemetry()
    process.count(REQUESTS, 7, **LABELS)
    process.observe("counterfake_batch_size", 4, detector="cnn")
    totals.add("a", 0, process.snapshot(), now=0.0, role="gateway")
    again = Totals.from_state(json.loads(json.dumps(totals.state())))
    process.count(REQUESTS, 1, **LABELS)
    again.add("a", 1, process.snapshot(), now=1.0, role="gateway")
    assert requests(again) == 8
    assert again.value("counterfake_batch_size_count") == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["count", "push", "old", "restart", "forget", "save"])),
        max_size=40,
    )
)
def test_no_history_of_processes_makes_a_counter_fall(history: list[tuple[int, str]]) -> None:
    totals, truth, clock = Totals(), 0.0, 0.0
    processes = {n: (f"p{n}", Telemetry()) for n in range(4)}
    sequences, sent, shown = dict.fromkeys(range(4), 0), {}, 0.0
    for who, what in history:
        name, process = processes[who]
        clock += 1.0
        if what == "count":
            process.count(REQUESTS, **LABELS)
            truth += 1
        elif what == "push":
            sequences[who] += 1
            sent[who] = (name, sequences[who], process.snapshot())
            totals.add(*sent[who], now=clock)
        elif what == "old" and who in sent:
            totals.add(*sent[who], now=clock)
        elif what == "restart":
            totals.add(name, sequences[who] + 1, process.snapshot(), now=clock)
            sequences[who] = 0
            sent.pop(who, None)
            processes[who] = (f"p{who}-{clock}", Telemetry())
        elif what == "forget":
            totals.forget(now=clock, silent_seconds=3600.0)
        elif what == "save":
            totals = Totals.from_state(json.loads(json.dumps(totals.state())))
        assert requests(totals) >= shown
        shown = requests(totals)
    for who, (name, process) in processes.items():
        totals.add(name, sequences[who] + 1, process.snapshot(), now=clock)
    assert requests(totals) == truth


@pytest.mark.parametrize("name", ["counterfake_nothing", "counterfake_http_in_flight"])
def test_a_metric_must_be_named_in_the_table_and_be_of_that_kind(name: str) -> None:
    with pytest.raises(ValueError, match="METRICS"):
        Telemetry().count(name)


def test_names_follow_the_prometheus_conventions() -> None:
    for spec in METRICS:
        assert spec.name.startswith("counterfake_")
        assert spec.name.endswith("_total") == (spec.kind == "counter"), spec.name
        assert spec.about.endswith("."), spec.name
        assert bool(spec.buckets) == (spec.kind == "histogram"), spec.name
