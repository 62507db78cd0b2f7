"""curation.py: rows chosen, merged and compared as they are; nothing that a version reaches is ever deleted."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterfake import curation, records, versions
from counterfake.curation import Condition, GcPlan, collect, derive, diff, gc_plan, merge
from counterfake.errors import ConfigError, DataError
from counterfake.records import Dataset, Report, Sample, SplitRule, Version, write_version
from counterfake.storage import files

SOURCES = {"made": {"licence": "CC0-1.0", "consent": "synthetic"}}
TRAIN = SplitRule(fractions={"train": 1.0})
DAY = 86_400


def sample(number: int, **changes: Any) -> Sample:
    facts: dict[str, Any] = {"image": b"picture %d" % number, "fake": number % 2, "source": "made"}
    return Sample(**{**facts, **changes})


def write(uri: str, rows: Iterable[Sample], **options: Any) -> Version:
    return write_version(uri, rows, **{"sources": SOURCES, **options})


def ids(dataset: Dataset, version: Version | None = None) -> dict[str, set[str]]:
    version = version or dataset.version()
    return {split: {s.id for s in dataset.samples(version, split)} for split in version.splits}


@pytest.fixture
def faces(tmp_path: Path) -> Dataset:
    """40 rows of four people and three makers in four splits; quality in the attributes of every other row."""
    rows = [
        sample(
            n,
            identity=f"p{n % 4}" if n % 5 else None,
            maker=("camera", "dcgan@1", "camera", "swap@2")[n % 4],
            attributes={"quality": n / 40, "sharp": n > 20} if n % 2 else {},
        )
        for n in range(40)
    ]
    uri = (tmp_path / "faces").as_uri()
    write(uri, rows, splits=SplitRule(by="id"), rows_per_shard=5)
    return Dataset.open(uri)


# -- derive ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        (["fake=0"], lambda s: s.fake == 0),
        (["fake!=0"], lambda s: s.fake != 0),
        (["maker=dcgan@1,swap@2", "identity=p1"], lambda s: s.maker != "camera" and s.identity == "p1"),
        (["identity=null"], lambda s: s.identity is None),
        (["identity!=null", "fake = 1"], lambda s: s.identity is not None and s.fake == 1),
        (["attributes.quality>=0.5"], lambda s: s.attributes.get("quality", 0) >= 0.5),
        (["attributes.quality<1e-1"], lambda s: s.attributes.get("quality", 1) < 0.1),
        (["attributes.sharp=true"], lambda s: s.attributes.get("sharp") is True),
        ({"fake": 0, "identity": ["p0", "p2"]}, lambda s: s.fake == 0 and s.identity in ("p0", "p2")),
    ],
    ids=lambda value: "kept" if callable(value) else str(value),
)
def test_derive_keeps_the_rows_asked_for_and_their_splits(
    faces: Dataset, tmp_path: Path, where: Any, keep: Any
) -> None:
    version = derive(faces, None, where, uri=(tmp_path / "derived").as_uri())
    every = {split: list(faces.samples(None, split)) for split in faces.version().splits}
    expected = {split: {s.id for s in rows if keep(s)} for split, rows in every.items()}
    assert ids(Dataset.open((tmp_path / "derived").as_uri())) == expected
    assert version.rows() == sum(map(len, expected.values())) > 0
    assert version.writer["derived_from"] == f"{faces.store.uri}@1"


def test_a_derived_row_is_the_same_in_every_field(faces: Dataset, tmp_path: Path) -> None:
    derive(faces, None, ["fake=0"], uri=(tmp_path / "derived").as_uri())
    before = {s.id: s for s in faces.samples(None, "train")}
    for after in Dataset.open((tmp_path / "derived").as_uri()).samples(None, "train"):
        assert after == before[after.id]


def test_a_change_gives_new_ids_and_may_leave_rows_out(faces: Dataset, tmp_path: Path) -> None:
    def change(row: Sample) -> Sample | None:
        return None if row.fake else dataclasses.replace(row, image=(row.image or b"") + b"!", maker="edited")

    version = derive(faces, None, change=change, uri=(tmp_path / "derived").as_uri())
    found = ids(Dataset.open((tmp_path / "derived").as_uri()))
    expected = {sample(0, image=b"picture %d!" % n).id for n in range(0, 40, 2)}
    assert set().union(*found.values()) == expected
    assert version.names("maker") == ["edited"]
    assert version.writer["change"].endswith("change")


def test_only_sources_of_chosen_rows_remain(tmp_path: Path) -> None:
    uri = (tmp_path / "two").as_uri()
    both = SOURCES | {"web": {"licence": "unknown", "consent": "research"}}
    write(uri, [sample(1), sample(2, source="web", maker="web")], sources=both)
    assert derive(Dataset.open(uri), None, ["maker!=web"]).sources == SOURCES


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"label": 1}, ConfigError, "cannot be chosen by 'label'"),
        (["fake"], ConfigError, "'fake' is no condition; write one like fake=0"),
        (["attributes.quality>=good"], ConfigError, "needs one number"),
        (["maker=nobody"], DataError, "@1 has no row with maker=nobody"),
    ],
    ids=["column", "no-operation", "no-number", "no-row"],
)
def test_a_choice_that_cannot_be_is_refused(
    faces: Dataset, where: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        derive(faces, None, where)
    assert faces.versions() == [1]


def test_a_condition_reads_as_it_was_written() -> None:
    for text in ("fake=0", "identity!=null", "attributes.quality>=0.5", "maker=a,b"):
        assert str(Condition.parse(text)) == text


# -- merge ----------------------------------------------------------------------------------------------------------


def test_merge_unites_rows_sources_and_splits(faces: Dataset, tmp_path: Path) -> None:
    other = (tmp_path / "other").as_uri()
    terms = {"web": {"licence": "CC-BY-4.0", "consent": "none"}}
    extra = [sample(n, source="web", split="test") for n in range(100, 110)]
    clash = sample(2, fake=1, source="web", split="held-out")
    write(other, [*extra, sample(3, source="web", split="train"), clash], sources=terms)
    report = Report()
    merged = merge([faces, Dataset.open(other)], (tmp_path / "all").as_uri(), report=report)
    found, before = ids(Dataset.open((tmp_path / "all").as_uri())), ids(faces)
    assert (report.rows, report.duplicates, report.conflicts) == (50, 1, 1)
    assert found["test"] == before["test"] | {row.id for row in extra}
    assert all(found[split] == before[split] for split in ("train", "validation", "calibration"))
    assert merged.sources == SOURCES | terms
    assert merged.writer["merged_from"] == [f"{faces.store.uri}@1", f"{other}@1"]


def test_merging_is_the_same_in_any_order_where_nothing_clashes(faces: Dataset, tmp_path: Path) -> None:
    other = (tmp_path / "other").as_uri()
    write(other, [sample(n) for n in range(100, 120)])
    parts = [faces, Dataset.open(other)]
    one = merge(parts, (tmp_path / "one").as_uri())
    two = merge(parts[::-1], (tmp_path / "two").as_uri())
    assert one.digest == two.digest


def test_one_name_for_two_sources_is_refused(faces: Dataset, tmp_path: Path) -> None:
    other = (tmp_path / "other").as_uri()
    write(other, [sample(100)], sources={"made": {"licence": "MIT", "consent": "none"}})
    with pytest.raises(DataError, match=r"source 'made' is .*CC0.* but .*MIT.*; ingest one of them again"):
        merge([faces, Dataset.open(other)], (tmp_path / "all").as_uri())


# -- diff -----------------------------------------------------------------------------------------------------------


def test_a_version_does_not_differ_from_itself(faces: Dataset) -> None:
    pair = (faces, faces.version())
    assert diff(pair, pair).same


def test_diff_counts_what_was_added_removed_relabelled_and_moved(tmp_path: Path) -> None:
    uri = (tmp_path / "faces").as_uri()
    first = write(uri, [sample(n, split="train") for n in range(10)])
    rows = [sample(n, split="train") for n in range(2, 8)]
    rows += [sample(8, split="test"), sample(9, fake=0, split="train")]
    rows += [sample(n, split="test", maker="dcgan@1") for n in range(20, 23)]
    second = write(uri, rows)
    found = diff((Dataset.open(uri), first), (Dataset.open(uri), second))
    assert [tuple(change.values()) for change in found.changes] == [
        ("added", "dcgan@1", "test", "fake", 1),
        ("added", "dcgan@1", "test", "real", 2),
        ("moved", "camera", "train → test", "real", 1),
        ("relabelled", "camera", "train", "fake → real", 1),
        ("removed", "camera", "train", "fake", 1),
        ("removed", "camera", "train", "real", 1),
    ]


def test_diff_opens_no_shard_that_both_have(faces: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = faces.version()
    second = write(faces.store.uri, [sample(n) for n in range(100, 104)], parent=first)
    opened: list[str] = []
    real = Dataset.reader
    monkeypatch.setattr(
        Dataset,
        "reader",
        lambda self, shard, *rest: (opened.append(shard.sha256), real(self, shard, *rest))[1],
    )
    found = diff((faces, first), (faces, second))
    assert sum(change["rows"] for change in found.changes) == 4
    assert found.shards["shared"] == sum(len(first.shards(split)) for split in first.splits)
    assert not set(opened) & {s.sha256 for split in first.splits for s in first.shards(split)}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_diff_agrees_with_sets(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    uri = tmp_path_factory.mktemp("diff").as_uri()
    found = []
    for _ in range(2):
        places = data.draw(
            st.dictionaries(st.integers(0, 12), st.sampled_from(["train", "test"]), min_size=1)
        )
        rows = [sample(n, split=split) for n, split in places.items()]
        found.append((places, write(uri, rows, rows_per_shard=3, parent=None)))
    (old, first), (new, second) = found
    counted = {"added": 0, "removed": 0, "moved": 0, "relabelled": 0}
    for change in diff((Dataset.open(uri), first), (Dataset.open(uri), second)).changes:
        counted[change["change"]] += change["rows"]
    both = old.keys() & new.keys()
    moved = sum(old[n] != new[n] for n in both)
    assert counted == {
        "added": len(new) - len(both),
        "removed": len(old) - len(both),
        "moved": moved,
        "relabelled": 0,
    }


# -- garbage --------------------------------------------------------------------------------------------------------

OPERATIONS = st.tuples(
    st.sampled_from(["write", "append", "killed", "age", "gc", "gc meanwhile", "old plan meanwhile"]),
    st.sets(st.integers(0, 5), min_size=1, max_size=4),
)
_FOLDER = itertools.count()


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Path]:
    """A folder whose writes do not wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_sync", lambda path: None)
        yield tmp_path_factory.mktemp("histories")


def age(root: Path, days: float = 2) -> None:
    for path in root.glob("s*/**/*"):  # shards, staging
        os.utime(path, (time.time() - days * DAY,) * 2)


def missing(dataset: Dataset) -> set[str]:
    """Keys of shards that a version names and storage does not have."""
    there = {entry.key for entry in dataset.store.list("shards/")}
    return {s.key for v in dataset.history() for split in v.splits for s in v.shards(split)} - there


class Killed(BaseException):
    """Stands for kill -9."""


def play(dataset: Dataset, root: Path, operation: str, numbers: set[int]) -> None:
    """One event in the life of a dataset; `meanwhile` happens after a writer's upload and before its manifest."""
    rows, options = [sample(n) for n in sorted(numbers)], {"splits": TRAIN, "rows_per_shard": 2}
    old_plan = gc_plan(dataset)
    real = versions.commit

    def commit(store: Any, version: Version) -> bool:
        if operation == "killed":
            raise Killed
        collect(dataset, old_plan if operation == "old plan meanwhile" else gc_plan(dataset))
        return real(store, version)

    if operation == "age":
        age(root)
    elif operation == "gc":
        collect(dataset, gc_plan(dataset))
    elif operation in ("write", "append"):
        write(dataset.store.uri, rows, parent="append" if operation == "append" else None, **options)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records.versions, "commit", commit)
            with contextlib.suppress(Killed):
                write(dataset.store.uri, rows, parent="append" if len(numbers) > 2 else None, **options)


@settings(max_examples=500, deadline=None)
@given(history=st.lists(OPERATIONS, min_size=1, max_size=7))
def test_collection_never_deletes_what_a_version_reaches(
    hasty: Path, history: list[tuple[str, set[int]]]
) -> None:
    root = hasty / str(next(_FOLDER))
    dataset = Dataset.open(root.as_uri())
    for operation, numbers in history:
        play(dataset, root, operation, numbers)
        assert missing(dataset) == set(), f"after {operation}"
    age(root)
    collect(dataset, gc_plan(dataset))
    reachable = {s.key for v in dataset.history() for split in v.splits for s in v.shards(split)}
    assert {entry.key for entry in dataset.store.list("shards/")} == reachable


def test_a_shard_deleted_under_a_writer_is_written_again(
    faces: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment that no order of looking and deleting excludes: gone after the upload, and after the manifest."""
    rows, real, deleted = [sample(n) for n in range(100, 104)], versions.commit, []

    def delete_new() -> None:
        for entry in gc_plan(faces, older_than_s=-1).shards:
            deleted.append(entry.key)
            faces.store.delete(entry.key)

    def commit(store: Any, version: Version) -> bool:
        delete_new()
        return real(store, version)

    monkeypatch.setattr(records.versions, "commit", commit)
    version = write(faces.store.uri, rows)
    assert deleted
    assert version.number == 2
    assert missing(faces) == set()
    assert faces.verify()["problems"] == []


def test_newer_versions_are_looked_for_before_each_batch_of_deletions(
    faces: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that appears after the first deletion, of old shards: what it reaches and is still there stays."""
    monkeypatch.setattr(curation, "AT_ONCE", 1)
    rows = [sample(n) for n in range(100, 104)]
    number = write(faces.store.uri, rows, splits=TRAIN, rows_per_shard=1, rows_per_batch=1).number
    key = f"versions/{number:06d}.json"
    manifest = faces.store.read(key)
    faces.store.delete(key)
    age(tmp_path / "faces")
    dataset = Dataset.open(faces.store.uri)
    plan = gc_plan(dataset)
    assert len(plan.shards) == 4
    gone = collect(dataset, plan, progress=lambda _: dataset.store.put(key, manifest))
    assert (gone["shards"], gone["kept"]) == (1, 3)
    assert missing(dataset) == {plan.shards[0].key}


def test_young_shards_and_busy_staging_stay(faces: Dataset, tmp_path: Path) -> None:
    store = faces.store
    for key in (
        "shards/" + "0" * 64 + ".arrow",
        "staging/done/part-0",
        "staging/busy/part-0",
        "staging/busy/part-1",
    ):
        store.put(key, b"12345678")
    assert (gc_plan(faces).shards, gc_plan(faces).staging) == ([], [])
    age(tmp_path / "faces")
    os.utime(tmp_path / "faces" / "staging" / "busy" / "part-1")
    plan = gc_plan(faces)
    assert [entry.key for entry in plan.shards] == ["shards/" + "0" * 64 + ".arrow"]
    assert [entry.key for entry in plan.staging] == ["staging/done/part-0"]
    assert plan.bytes == 16
    steps: list[int] = []
    assert collect(faces, plan, progress=steps.append) == {"shards": 1, "staging": 1, "bytes": 16, "kept": 0}
    assert steps == [1, 1]
    assert faces.verify()["problems"] == []
    assert collect(faces, plan)["kept"] == 2


def test_collection_works_on_s3(s3: Any, tmp_path: Path) -> None:
    write(f"{s3.uri}/faces", [sample(n) for n in range(4)], cache=tmp_path)
    dataset = Dataset.open(f"{s3.uri}/faces", cache=tmp_path)
    dataset.store.put(f"shards/{'0' * 64}.arrow", b"left behind")
    assert gc_plan(dataset) == GcPlan(before=pytest.approx(time.time() - DAY, abs=5), shards=[], staging=[])
    assert collect(dataset, gc_plan(dataset, older_than_s=-60))["shards"] == 1
    assert dataset.verify()["problems"] == []


def test_sums_of_masks_are_rows(faces: Dataset) -> None:
    batch = faces.reader(faces.version().shards("train")[0]).get_batch(0)
    split = [Condition.parse(text).mask(batch) for text in ("fake=1", "fake!=1")]
    np.testing.assert_array_equal(split[0], ~split[1])
