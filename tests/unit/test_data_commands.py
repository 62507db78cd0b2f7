"""`counterfake data …`: what each command prints, its exit status, and that it does what the library does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from counterfake.audit import admit
from counterfake.errors import ConfigError, DataError, NotFoundError
from counterfake.records import Dataset, Sample, SplitRule, write_version
from counterfake.sources.synthetic import SyntheticSource
from counterfake.workspace import Workspace
from jobs import __main__ as command
from jobs.ingest import IngestJob, run

SOURCES = {
    "made": {"licence": "CC0-1.0", "consent": "synthetic"},
    "web": {"licence": "?", "consent": "research"},
}
Data = Callable[..., Result]


def sample(number: int, **changes: Any) -> Sample:
    facts: dict[str, Any] = {"fake": number % 2, "maker": ("camera", "dcgan@1")[number % 2], "source": "made"}
    return Sample(image=b"picture %d" % number, **{**facts, **changes})


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """Two versions of `faces`, 20 and 30 rows; `others` with 5 rows, one in conflict."""
    place = Workspace.at(tmp_path / "runs")
    faces, others = place.dataset("faces"), place.dataset("others")
    first = write_version(faces, [sample(n) for n in range(20)], sources=SOURCES, writer={"job": "ingest"})
    write_version(faces, [sample(n) for n in range(20, 30)], sources=SOURCES, parent=first)
    rows = [sample(n, source="web", maker="web") for n in range(100, 104)]
    write_version(others, [*rows, sample(1, fake=0)], sources=SOURCES)
    return place


@pytest.fixture
def data(place: Workspace) -> Data:
    def call(*words: str) -> Result:
        return CliRunner().invoke(
            command.app, ["data", *words, "--home", str(place.home)], catch_exceptions=True
        )

    return call


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list_names_the_newest_versions(data: Data) -> None:
    assert answer(data("list", "--json")) == [
        {"name": "faces", "version": 2, "rows": 30},
        {"name": "others", "version": 1, "rows": 5},
    ]


def test_history_tells_where_versions_come_from(data: Data) -> None:
    answer(data("derive", "faces", "--into", "faces", "--where", "fake=0", "--json"))
    entries = answer(data("history", "faces", "--json"))
    assert [(e["version"], e["parent"], e["rows"]) for e in entries] == [
        (1, None, 20),
        (2, 1, 30),
        (3, None, 15),
    ]
    assert entries[0]["made by"] == "ingest"
    assert entries[2]["made by"].startswith("data derive from file://")
    assert entries[2]["made by"].endswith("faces@2 fake=0")
    assert "data derive" in data("history", "faces").stdout


def test_a_broken_version_does_not_hide_the_history(data: Data, place: Workspace) -> None:
    manifest = place.home / "datasets" / "faces" / "versions" / "000001.json"
    manifest.write_text(manifest.read_text().replace("CC0", "MIT"))
    result = data("history", "faces", "--json")
    assert result.exit_code == 1
    assert [entry["version"] for entry in json.loads(result.stdout)] == [2]
    assert "was altered" in result.stderr


def test_diff_counts_by_maker_and_defaults_to_the_parent(data: Data) -> None:
    found = answer(data("diff", "faces@2", "--json"))
    assert found == answer(data("diff", "faces@1", "faces@2", "--json"))
    rows = {change["maker"]: 0 for change in found["changes"]}
    for change in found["changes"]:
        assert change["change"] == "added"
        rows[change["maker"]] += change["rows"]
    assert rows == {"camera": 5, "dcgan@1": 5}
    assert "added" in data("diff", "faces@2").stdout
    assert isinstance(data("diff", "faces@1").exception, ConfigError)


def test_derive_writes_the_rows_asked_for(data: Data, place: Workspace) -> None:
    made = answer(
        data("derive", "faces@1", "--into", "real", "--where", "fake=0", "--where", "maker=camera", "--json")
    )
    assert made["dataset"] == f"{place.dataset('real')}@1"
    assert made["rows"] == sum(made["splits"].values()) == 10
    assert Dataset.open(place.dataset("real")).version().names("maker") == ["camera"]


@pytest.fixture
def drawn(place: Workspace) -> Workspace:
    """`portraits`: 16 drawn faces of 16 people, 48 and 96 pixels."""
    for size in (48, 96):
        source = SyntheticSource(identities=8, per_identity=1, size=size, seed=size)
        run(IngestJob(source=source, into="portraits", audit=False), place)
    return place


def test_derive_chooses_by_what_was_measured_at_ingest(data: Data, drawn: Workspace) -> None:
    made = answer(data("derive", "portraits", "--into", "large", "--min", "short_side=96", "--json"))
    assert made["rows"] == 8
    dataset = Dataset.open(drawn.dataset("portraits"))
    rows = [s for split in dataset.version().splits for s in dataset.samples(None, split)]
    middle = sorted(row.attributes["sharpness"] for row in rows)[8]
    words = ("--min", f"sharpness={middle}", "--where", "attributes.face_side<1000")
    assert answer(data("derive", "portraits", "--into", "sharp", *words, "--json"))["rows"] == 8
    result = data("derive", "portraits", "--into", "x", "--min", "beauty=1")
    assert "sharpness, short_side, face_side, face_score" in str(result.exception)


def test_derive_maps_every_row_and_accounts_for_it(data: Data, drawn: Workspace) -> None:
    made = answer(data("derive", "portraits", "--into", "crops", "--map", "crop-faces:1.1", "--json"))
    dataset = Dataset.open(drawn.dataset("crops"))
    version = dataset.version()
    assert version.writer["change"] == "crop-faces:1.1"
    rows = [s for split in version.splits for s in dataset.samples(version, split)]
    assert [round(row.face_margin or 0, 3) for row in rows] == [1.1] * 16
    assert made["rows"] == 16
    broken = data("derive", "faces", "--into", "none", "--map", "png")
    assert "30 unsupported" in str(broken.exception)  # none of these is a picture
    assert isinstance(data("derive", "faces", "--into", "none", "--map", "blur").exception, ConfigError)


def test_derived_and_merged_versions_are_audited_and_a_leak_is_told(data: Data, place: Workspace) -> None:
    made = answer(data("derive", "faces", "--into", "real", "--where", "fake=0", "--json"))
    assert made["audit"]["leaks"] == []
    dataset = Dataset.open(place.dataset("real"))
    assert dataset.store.exists(f"audits/{made['digest']}.json")
    for number, name, split in ((500, "a", "train"), (501, "b", "test")):
        person = sample(number, identity="ann", split=split)
        write_version(place.dataset(name), [person], sources=SOURCES, splits=SplitRule(by="id"))
    result = data("merge", "a", "b", "--into", "both", "--json")
    (leak,) = answer(result)["audit"]["leaks"]
    assert leak.startswith("identity: 1 times rows of one identity lie in several splits")
    assert "training refuses a version with a leak" in result.stderr
    with pytest.raises(DataError, match="found a leak"):
        both = Dataset.open(place.dataset("both"))
        admit(both, both.version(), allow_leaks=False)


def test_merge_keeps_the_first_label_and_says_so(data: Data, place: Workspace) -> None:
    result = data("merge", "faces", "others", "--into", "all", "--json")
    made = answer(result)
    assert (made["rows"], made["conflicts"]) == (34, 1)
    assert set(made["sources"]) == set(SOURCES)
    assert "the first label stays" in result.stderr
    assert "needs at least two" in str(data("merge", "faces", "--into", "all").exception)


def test_export_leaves_out_what_may_not_leave(data: Data, tmp_path: Path) -> None:
    words = ("export", "others", "--to", str(tmp_path / "out"), "--format", "webdataset", "--json")
    result = data(*words)
    manifest = answer(result)
    assert (manifest["rows"], manifest["left_out"]) == (1, {"web": 4})
    assert "4 rows of source web were left out" in result.stderr
    assert answer(data(*words)) == manifest
    allowed = answer(data("export", "others", "--to", str(tmp_path / "all"), "--allow-research", "--json"))
    assert (allowed["rows"], allowed["format"]) == (5, "parquet")


def test_audit_fails_for_a_leak_and_is_kept(data: Data, place: Workspace) -> None:
    uri = place.dataset("leaky")
    rows = [sample(n, identity="anna", split="train" if n < 6 else "test") for n in range(12)]
    write_version(uri, rows, sources=SOURCES)
    result = data("audit", "leaky", "--json")
    assert result.exit_code == 1
    assert "identity" in {finding["kind"] for finding in json.loads(result.stdout)["findings"]}
    assert [entry.key for entry in Dataset.open(uri).store.list("audits/")]
    assert "anna" in data("audit", "leaky").stdout
    assert data("audit", "faces").exit_code == 0


def test_gc_shows_first_and_deletes_only_when_told(data: Data, place: Workspace) -> None:
    store = Dataset.open(place.dataset("faces")).store
    key = f"shards/{'0' * 64}.arrow"
    store.put(key, b"left behind")
    plan = answer(data("gc", "faces", "--json"))
    assert plan["would delete"] == {"shards": 0, "staging": 0, "bytes": 0}
    old = time.time() - 2 * 86_400
    for path in (place.home / "datasets" / "faces" / "shards").iterdir():
        os.utime(path, (old, old))
    assert answer(data("gc", "faces", "--json"))["would delete"] == {"shards": 1, "staging": 0, "bytes": 11}
    assert store.exists(key)
    assert answer(data("gc", "faces", "--yes", "--json"))["deleted"]["shards"] == 1
    assert not store.exists(key)
    assert answer(data("verify", "faces", "--json"))["problems"] == []
    assert data("gc", "faces", "--hours", "1").exit_code != 0


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("show", "nothing"), NotFoundError, "ingest it first"),
        (("history", "nothing"), NotFoundError, "ingest it first"),
        (("diff", "faces@1", "faces@9"), NotFoundError, "has no version 9"),
        (
            ("derive", "faces", "--into", "x", "--where", "label=1"),
            ConfigError,
            "cannot be chosen by 'label'",
        ),
        (
            ("derive", "faces", "--into", "x@1", "--where", "fake=1"),
            ConfigError,
            "names a version, which never changes",
        ),
        (("derive", "faces", "--into", "../x"), ConfigError, "names no dataset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(
    data: Data, words: tuple[str, ...], error: type[Exception], message: str
) -> None:
    result = data(*words)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize("words", [("show", "faces"), ("verify", "faces"), ("list",), ("gc", "faces")])
def test_people_get_text(data: Data, words: tuple[str, ...]) -> None:
    result = data(*words)
    assert result.exit_code == 0
    with pytest.raises(json.JSONDecodeError):
        json.loads(result.stdout)
