"""What callers may rely on: names of fields, closed inputs, settings that refuse nonsense in one line."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from counterfake import config
from counterfake.errors import ConfigError
from serving.schemas import TITLES, Following, Member, Problem, Verdict
from serving.settings import Autoscale, Settings

V1_FIELDS = {
    "verdict", "reason", "probability_fake", "error_rate", "detectors", "faces", "frames", "heatmap", "provenance",
    "model", "request_id", "timings",
}  # fmt: skip


def test_the_fields_of_a_v1_verdict_only_ever_grow() -> None:
    assert set(Verdict.model_fields) >= V1_FIELDS
    words = Verdict.model_json_schema()["properties"]["verdict"]["enum"]
    assert words == ["real", "fake", "uncertain", "no_verdict"]


def test_problems_have_the_members_of_rfc_9457() -> None:
    assert {"type", "title", "status", "detail"} <= set(Problem.model_fields)
    assert all(status >= 400 for status in TITLES)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        Member(name="a", kind="detector", version="1", digest="d", colour="red")  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Following(reference="a@b", state="asleep")  # type: ignore[arg-type]


def test_settings_take_dotted_overrides_and_survive_a_round_trip() -> None:
    changed = config.override(Settings(), {"detectors.max_replicas": "8", "limits.image_bytes": "1000000"})
    assert (changed.detectors.max_replicas, changed.limits.image_bytes) == (8, 1_000_000)
    assert config.from_dict(Settings, config.to_dict(changed)) == changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("port", 0),
        ("batch_size", 0),
        ("detectors.min_replicas", 0),
        ("detectors.max_replicas", 0),
        ("prot", 1),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(path: str, value: int) -> None:
    with pytest.raises(ConfigError, match=path.split(".")[-1]):
        config.override(Settings(), {path: value})


def test_replicas_never_scale_to_nothing() -> None:
    assert Autoscale().min_replicas >= 1
    assert Settings().gateway.min_replicas >= 1
