"""records.py, staging.py and versions.py: what is written is what every reader gets, whoever else writes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterfake import records, versions
from counterfake.curation import gc_plan
from counterfake.errors import ConfigError, CorruptError, DataError, NotFoundError
from counterfake.records import Dataset, Report, Sample, Skipped, SplitRule, write_version

SOURCES = {"made": {"licence": "CC0-1.0", "consent": "synthetic"}}
TRAIN = SplitRule(fractions={"train": 1.0})


def picture(seed: int) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int, **changes: Any) -> Sample:
    facts: dict[str, Any] = {
        "image": b"picture %d" % number,
        "path": f"folder/{number}.png",
        "fake": number % 2,
        "source": "made",
    }
    return Sample(**{**facts, **changes})


def samples(numbers: Iterable[int], **changes: Any) -> list[Sample]:
    return [sample(number, **changes) for number in numbers]


def write(uri: str, rows: Iterable[Sample | Skipped], **options: Any) -> records.Version:
    return write_version(uri, rows, **{"sources": SOURCES, **options})


def ids(dataset: Dataset, version: records.Version | None = None) -> dict[str, list[str]]:
    version = version or dataset.version()
    return {split: [s.id for s in dataset.samples(version, split)] for split in version.splits}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return (tmp_path / "faces").as_uri()


@pytest.fixture(params=["file", "s3"])
def any_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        (tmp_path / "faces").as_uri()
        if request.param == "file"
        else f"{request.getfixturevalue('s3').uri}/faces"
    )


# -- a sample -------------------------------------------------------------------------------------------------------


def test_an_id_is_the_digest_of_the_media() -> None:
    assert sample(1).id == hashlib.sha256(b"picture 1").hexdigest()
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert Sample(pixels=pixels, source="made").id == hashlib.sha256(pixels.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "either image or pixels"),
        ({"fake": 2}, "expected 1, 0 or None"),
        ({"image": None, "pixels": np.zeros((2, 2), np.float32)}, "expected uint8"),
        ({"id": "7"}, "expected the SHA-256"),
    ],
    ids=["no media", "label", "type", "id"],
)
def test_an_impossible_sample_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        sample(1, **changes)


# -- what goes in comes out -----------------------------------------------------------------------------------------


def test_every_field_survives(any_uri: str, tmp_path: Path) -> None:
    full = sample(
        1,
        maker="dcgan-faces@7",
        class_id=3,
        identity="anna",
        video="v1",
        frame=7,
        time_s=0.25,
        face_box=(1.0, 2.0, 30.0, 40.0),
        face_method="cascade",
        face_margin=1.5,
        landmarks=[1.0, 2.0, 3.0, 4.0],
        attributes={"difficulty": "hard", "n": [1, 2]},
        split="test",
    )
    bare = Sample(image=b"bare", source="made", split="train")
    write(any_uri, [full, bare])
    dataset = Dataset.open(any_uri, cache=tmp_path / "cache")
    assert list(dataset.samples(None, "test")) == [full]
    assert list(dataset.samples(None, "train")) == [bare]
    assert list(dataset.samples(None, "validation")) == []
    assert dataset.read(None, "test", ["identity", "fake"]).to_pylist() == [{"identity": "anna", "fake": 1}]
    assert dataset.read(None, "validation", ["id"]).num_rows == 0


def test_raw_pixels_survive_with_their_shape(uri: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (10, 28, 28), dtype=np.uint8)
    version = write(
        uri, [Sample(pixels=p, source="made", class_id=i) for i, p in enumerate(pixels)], splits=TRAIN
    )
    assert version.shape == (28, 28, 1)
    back = {s.class_id: s.pixels for s in Dataset.open(uri).samples(version, "train")}
    for index, expected in enumerate(pixels):
        np.testing.assert_array_equal(back[index], expected[:, :, None])


def test_shards_and_batches_have_the_asked_size_and_the_manifest_knows_it(uri: str) -> None:
    version = write(uri, samples(range(100)), splits=TRAIN, rows_per_shard=40, rows_per_batch=16)
    assert [s.rows_per_batch for s in version.shards("train")] == [[16, 16], [16, 16], [16, 16, 4]]
    dataset = Dataset.open(uri)
    for shard in version.shards("train"):
        reader = dataset.reader(shard)
        assert [
            reader.get_batch(i).num_rows for i in range(reader.num_record_batches)
        ] == shard.rows_per_batch
    assert version.rows() == version.rows("train") == 100


def test_large_pictures_make_smaller_batches_and_shards(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from counterfake import staging

    monkeypatch.setattr(staging, "BATCH_BYTES", 25_000)
    monkeypatch.setattr(records, "SHARD_BYTES", 60_000)
    rows = [Sample(image=bytes([n]) * 10_000, source="made") for n in range(10)]
    version = write(uri, rows, splits=TRAIN)
    assert [s.rows_per_batch for s in version.shards("train")] == [[2, 2]] * 2 + [[2]]


def test_the_same_samples_in_any_order_give_the_same_digest(tmp_path: Path) -> None:
    rows = samples(range(200))
    one = write((tmp_path / "a").as_uri(), rows)
    random.Random(0).shuffle(rows)
    two = write((tmp_path / "b").as_uri(), rows, writer={"job": "another"})
    assert one.digest == two.digest
    assert one.digest != write((tmp_path / "c").as_uri(), rows[1:]).digest


def test_rows_are_mixed_whatever_the_order_of_the_source(uri: str) -> None:
    version = write(uri, samples(range(0, 400, 2)) + samples(range(1, 400, 2)), splits=TRAIN)
    fake = Dataset.open(uri).read(version, "train", ["fake"])["fake"].to_pylist()
    assert 10 < sum(fake[:50]) < 40


# -- other readers --------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(uri: str) -> Path:
    rows = [
        sample(n, image=picture(n), identity="anna", face_box=(0.0, 0.0, 8.0, 8.0), landmarks=[1.0, 2.0])
        for n in range(6)
    ]
    version = write(uri, rows, splits=TRAIN)
    return Dataset.open(uri).local(version.shards("train")[0])


@pytest.fixture
def raw_shard(uri: str) -> Path:
    rows = [Sample(pixels=np.full((4, 4), n, np.uint8), source="made", class_id=n) for n in range(6)]
    version = write(uri, rows, splits=TRAIN)
    return Dataset.open(uri).local(version.shards("train")[0])


def test_pandas_reads_a_shard(shard: Path, raw_shard: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_feather(shard)
    assert len(frame) == 6
    assert frame.image[0]["bytes"].startswith(b"\x89PNG")
    assert sorted(pandas.read_feather(raw_shard).class_id) == list(range(6))


def test_polars_reads_a_shard(shard: Path, raw_shard: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.read_ipc(shard)
    assert sorted(frame["fake"].to_list()) == [0, 0, 0, 1, 1, 1]
    assert polars.read_ipc(raw_shard)["pixels"].to_list()[0] == [frame_value(raw_shard)] * 16


def frame_value(path: Path) -> int:
    return int(pa.ipc.open_file(str(path)).read_all()["class_id"][0].as_py())


def test_duckdb_reads_a_shard(shard: Path, raw_shard: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    rows = pa.ipc.open_file(str(shard)).read_all()
    assert rows.num_rows == 6
    assert duckdb.sql(
        "select count(*), sum(fake), max(octet_length(image.bytes)) > 0 from rows"
    ).fetchall() == [(6, 3, True)]
    raw = pa.ipc.open_file(str(raw_shard)).read_all()
    assert raw.num_rows == 6
    assert duckdb.sql("select sum(len(pixels)) from raw").fetchall() == [(96,)]


def test_datasets_opens_a_shard_with_decoded_pictures(shard: Path, raw_shard: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    options = {"split": "train", "cache_dir": str(tmp_path / "hf")}
    loaded = datasets.load_dataset("arrow", data_files=str(shard), **options)
    assert loaded.features["image"] == datasets.Image()
    first = loaded[0]
    np.testing.assert_array_equal(
        np.asarray(first["image"]),
        np.random.default_rng(int(Path(table_path(shard)).stem)).integers(
            0, 255, (16, 16, 3), dtype=np.uint8
        ),
    )
    raw = datasets.load_dataset("arrow", data_files=str(raw_shard), **options)
    assert len(raw[0]["pixels"]) == 16


def table_path(path: Path) -> str:
    return str(pa.ipc.open_file(str(path)).read_all()["image"][0].as_py()["path"])


# -- versions -------------------------------------------------------------------------------------------------------


def test_an_append_keeps_the_old_rows_and_counts_duplicates(any_uri: str, tmp_path: Path) -> None:
    first = write(any_uri, samples(range(50)), cache=tmp_path / "cache")
    report = Report()
    second = write(
        any_uri,
        samples(range(40, 70)),
        parent=first,
        report=report,
        cache=tmp_path / "cache",
        writer={"job": "j"},
    )
    assert (second.number, second.parent, second.rows()) == (2, 1, 70)
    assert (report.seen, report.rows, report.duplicates) == (30, 20, 10)
    assert second.writer == {"job": "j"}
    dataset = Dataset.open(any_uri, cache=tmp_path / "cache")
    before, after = ids(dataset, first), ids(dataset, second)
    for split in before:
        assert after[split][: len(before[split])] == before[split]
    everything = [i for split in after.values() for i in split]
    assert len(everything) == len(set(everything)) == 70
    assert [v.number for v in dataset.history()] == [1, 2]
    assert sum(row["rows"] for row in second.counts) == 70


def test_ingesting_the_same_media_twice_adds_nothing(uri: str) -> None:
    first = write(uri, samples(range(30)))
    assert write(uri, samples(range(30)), parent="append").number == first.number
    assert write(uri, samples(range(30))).number == first.number
    assert Dataset.open(uri).versions() == [1]


def test_append_to_nothing_starts_afresh_and_no_parent_replaces(uri: str) -> None:
    assert write(uri, samples(range(5)), parent="append").parent is None
    second = write(uri, samples(range(5, 8)))
    assert (second.number, second.parent, second.rows()) == (2, None, 3)


def test_an_old_version_stays_readable_by_its_number(uri: str) -> None:
    write(uri, samples(range(10)))
    write(uri, samples(range(10, 20)), parent="append")
    assert Dataset.open(f"{uri}@1").version().rows() == 10
    assert Dataset.open(uri).version().rows() == 20
    assert Dataset.open(uri).version(1).rows() == 10


def test_a_missing_dataset_or_version_says_what_there_is(uri: str) -> None:
    with pytest.raises(NotFoundError, match="ingest it first"):
        Dataset.open(uri).version()
    write(uri, samples(range(3)))
    with pytest.raises(NotFoundError, match="has no version 7; it has 1"):
        Dataset.open(f"{uri}@7").version()
    with pytest.raises(DataError, match="no split 'dev'; it has train"):
        Dataset.open(uri).version().shards("dev")
    with pytest.raises(ConfigError, match="version number"):
        Dataset.open(f"{uri}@champion")


def test_concurrent_writers_lose_nothing(any_uri: str, tmp_path: Path) -> None:
    writers = 16 if any_uri.startswith("file") else 5
    base = write(any_uri, samples(range(4)), splits=TRAIN)
    common = samples(range(1000, 1003))

    def append(writer: int) -> tuple[records.Version, Report]:
        report = Report()
        own = samples(range(10 + writer * 3, 13 + writer * 3))
        version = write(
            any_uri, own + common, splits=TRAIN, parent=base, report=report, cache=tmp_path / "cache"
        )
        return version, report

    with ThreadPoolExecutor(writers) as pool:
        done = list(pool.map(append, range(writers)))
    dataset = Dataset.open(any_uri, cache=tmp_path / "cache")
    assert sorted(version.number for version, _ in done) == list(range(2, 2 + writers))
    found = ids(dataset)["train"]
    expected = {s.id for s in samples([*range(4), *range(10, 10 + 3 * writers), *range(1000, 1003)])}
    assert set(found) == expected
    assert len(found) == len(expected)
    assert sum(report.rows for _, report in done) == 3 * writers + 3
    assert sum(report.duplicates for _, report in done) == (writers - 1) * 3
    assert [v.parent for v in dataset.history()] == [None, *range(1, 1 + writers)]
    assert dataset.verify()["problems"] == []


def test_rows_that_a_fresh_start_dropped_meanwhile_are_no_duplicates(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(uri, samples(range(4)), splits=TRAIN)
    commit, overtaken = records.versions.commit, []

    def late(store: Any, version: records.Version) -> bool:
        if not overtaken:
            overtaken.append(True)
            write(uri, samples(range(10, 12)), splits=TRAIN)  # without a parent: rows 0 to 3 are gone
        return commit(store, version)

    monkeypatch.setattr(records.versions, "commit", late)
    report = Report()
    version = write(uri, samples(range(6)), splits=TRAIN, parent="append", report=report)
    assert (version.number, version.parent, version.rows()) == (3, 2, 8)
    assert (report.rows, report.duplicates) == (6, 0)


def test_a_writer_killed_before_its_manifest_leaves_the_old_version(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(uri, samples(range(10)))

    class Killed(BaseException):
        pass

    def die(*_: object) -> bool:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(versions, "commit", die)
        with pytest.raises(Killed):
            write(uri, samples(range(10, 20)), parent=first)
    dataset = Dataset.open(uri)
    assert dataset.version() == first
    assert gc_plan(dataset, older_than_s=-1).shards
    assert gc_plan(dataset).shards == []  # young: it may belong to a writer at work
    again = write(uri, samples(range(10, 20)), parent=first)
    assert (again.number, again.rows()) == (2, 20)
    assert gc_plan(dataset, older_than_s=-1).shards == []


# -- bad input ------------------------------------------------------------------------------------------------------


def test_skips_conflicts_and_duplicates_add_up(uri: str) -> None:
    report = Report()
    rows: list[Sample | Skipped] = [
        *samples(range(10)),
        sample(3),
        sample(4, fake=1),
        Skipped("bad.png", "undecodable"),
    ]
    version = write(uri, rows, report=report)
    assert (report.seen, report.rows, report.duplicates, report.conflicts) == (13, 10, 1, 1)
    assert report.skipped == {"undecodable": 1}
    assert report.examples["undecodable"] == ["bad.png"]
    assert version.report == report.to_dict()
    later = Report()
    write(uri, [sample(5, fake=0), sample(99)], parent="append", report=later)
    assert (later.rows, later.conflicts) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no samples to store"),
        ([Skipped("x", "undecodable")], "1 inputs seen; skipped: 1 undecodable"),
        ([sample(1), Sample(pixels=np.zeros((2, 2, 3), np.uint8), source="made")], "one kind and one size"),
        (
            [Sample(pixels=np.zeros((n, 2, 3), np.uint8), source="made") for n in (2, 3)],
            r"pixels \(3, 2, 3\) but .* \(2, 2, 3\)",
        ),
        ([sample(1, source="elsewhere")], "no licence and consent"),
    ],
    ids=["nothing", "only skips", "mixed kinds", "mixed sizes", "unknown source"],
)
def test_unusable_samples_are_refused_and_nothing_is_written(uri: str, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(uri, rows)
    assert Dataset.open(uri).versions() == []


def test_a_source_needs_licence_and_consent(uri: str) -> None:
    for facts in ({}, {"licence": "MIT"}, {"licence": "MIT", "consent": "perhaps"}):
        with pytest.raises(DataError, match="needs licence and consent"):
            write(uri, samples(range(3)), sources={"made": facts})


def test_an_append_never_changes_the_terms_of_rows_that_are_there(uri: str) -> None:
    research = {"made": {"licence": "CC0-1.0", "consent": "research"}}
    first = write(uri, samples(range(3)), sources=research)
    for numbers in (range(3, 4), range(2)):  # one picture more, and none that is new
        with pytest.raises(
            DataError,
            match=r"source 'made' is .*research.* in .*faces@1 but .*synthetic.* in the new samples; "
            r"ingest one of them again under another source\.name",
        ):
            write(uri, samples(numbers), parent="append")
    assert Dataset.open(uri).versions() == [1]
    assert write(uri, samples(range(3, 4)), sources=research, parent=first).sources == research
    assert write(uri, samples(range(9)), parent=None).sources == SOURCES  # nothing of the old version is kept


def test_another_kind_cannot_be_appended(uri: str) -> None:
    write(uri, samples(range(3)))
    with pytest.raises(DataError, match="write them to a dataset of their own"):
        write(uri, [Sample(pixels=np.zeros((2, 2, 3), np.uint8), source="made")], parent="append")


def test_a_version_of_the_future_is_refused(uri: str, tmp_path: Path) -> None:
    write(uri, samples(range(3)))
    path = tmp_path / "faces" / "versions" / "000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(DataError, match="has schema 99, this counterfake reads up to 1; update"):
        Dataset.open(uri).version()


def test_a_foreign_or_future_arrow_file_is_refused(uri: str, tmp_path: Path) -> None:
    version = write(uri, samples(range(3)), splits=TRAIN)
    future = {"counterfake": json.dumps({"schema_version": 99})}
    for content, message in (
        (b"junk", "not an Arrow IPC file"),
        (_foreign(), "did not write"),
        (_foreign(future), "has schema 99, this counterfake reads up to 1; update"),
        *((_foreign({"counterfake": odd}), "did not write.*names no schema") for odd in ODD),
    ):
        shard = dataclasses.replace(version.shards("train")[0], sha256=hashlib.sha256(content).hexdigest())
        (tmp_path / "faces" / shard.key).write_bytes(content)
        with pytest.raises(DataError, match=message):
            Dataset.open(uri).reader(shard)


ODD = ("", "junk", "{}", "[]", "null", '{"schema_version": null}', '{"schema_version": 1e999}', "[" * 100_000)


def _foreign(metadata: dict[str, str] | None = None) -> bytes:
    table = pa.table({"id": ["a"]}).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_an_unusable_shard_is_named_with_the_version_and_split_it_is_read_for(
    uri: str, tmp_path: Path
) -> None:
    write(uri, samples(range(3)), splits=TRAIN)
    second = write(uri, samples(range(3, 5)), splits=TRAIN, parent="append")
    shard = second.shards("train")[0]  # in both versions
    (tmp_path / "faces" / shard.key).write_bytes(b"junk")
    dataset = Dataset.open(uri)
    for number in (1, 2):
        named = rf"faces@{number} split train: .*faces/{shard.key} has SHA-256"
        uses = (
            lambda n=number: dataset.read(n, "train"),
            lambda n=number: list(dataset.samples(n, "*")),
            lambda n=number: dataset.reader(shard, version=dataset.version(n)),
        )
        for use in uses:
            with pytest.raises(CorruptError, match=named):
                use()
    with pytest.raises(CorruptError, match=r"faces@2 split train: "):
        dataset.reader(shard)
    (tmp_path / "faces" / shard.key).unlink()
    with pytest.raises(NotFoundError, match=r"faces@1 split train: .*does not exist"):
        dataset.read(1, "train")
    with pytest.raises(DataError, match=r"faces@2 split train: .*has no column 'nose'"):
        dataset.reader(second.shards("train")[1], ["nose"])


def test_one_changed_byte_is_found_in_a_shard_and_in_a_manifest(uri: str, tmp_path: Path) -> None:
    version = write(uri, samples(range(8)), splits=TRAIN)
    root, rng = tmp_path / "faces", random.Random(0)
    shard = root / version.shards("train")[0].key
    manifest = root / "versions" / "000001.json"
    for path, uses in (
        (shard, lambda d: d.local(version.shards("train")[0])),
        (manifest, lambda d: d.version()),
    ):
        original = path.read_bytes()
        for _ in range(100):
            at = rng.randrange(len(original))
            changed = bytearray(original)
            changed[at] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(changed))
            with pytest.raises((CorruptError, DataError), match="faces"):
                uses(Dataset.open(uri))
        path.write_bytes(original)
    shard.write_bytes(b"")
    assert "restore it" in Dataset.open(uri).verify()["problems"][0]
    os.remove(shard)
    assert "does not exist" in Dataset.open(uri).verify()["problems"][0]


# -- splits ---------------------------------------------------------------------------------------------------------


def test_fractions_are_met_in_each_label(uri: str) -> None:
    version = write(uri, [sample(n, fake=int(n < 50)) for n in range(200)])
    rows = {(row["split"], row["fake"]): row["rows"] for row in version.counts}
    assert [rows[s, 0] for s in version.splits] == [105, 15, 15, 15]
    assert [rows[s, 1] for s in version.splits] == [35, 5, 5, 5]


def test_small_sets_have_some_of_each_label_in_each_split(uri: str) -> None:
    version = write(uri, samples(range(10)))
    assert {(row["split"], row["fake"]) for row in version.counts} == {
        (s, f) for s in version.splits for f in (0, 1)
    }


def test_an_identity_stays_in_its_split_also_when_rows_are_added(uri: str) -> None:
    write(uri, [sample(n, identity=f"p{n % 12}") for n in range(60)])
    version = write(uri, [sample(n, identity=f"p{n % 20}") for n in range(60, 200)], parent="append")
    where: dict[str, set[str]] = {}
    for split in version.splits:
        for row in Dataset.open(uri).read(version, split, ["identity"])["identity"].to_pylist():
            where.setdefault(row, set()).add(split)
    assert len(where) == 20
    assert all(len(splits) == 1 for splits in where.values())
    assert {s for splits in where.values() for s in splits} == set(version.splits)


def test_frames_of_a_video_stay_together(uri: str) -> None:
    version = write(uri, [sample(n, video=f"v{n // 10}") for n in range(100)])
    for split in version.splits:
        found = Dataset.open(uri).read(version, split, ["video"])["video"].to_pylist()
        assert all(found.count(video) == 10 for video in found)


def test_a_file_name_that_is_no_text_does_not_stop_an_ingest(uri: str) -> None:
    write(uri, [sample(1, path=os.fsdecode(b"caf\xe9.png"), identity=os.fsdecode(b"\xff"))], splits=TRAIN)
    assert next(Dataset.open(uri).samples(None, "train")).path == "caf?.png"


def test_a_prescribed_split_is_kept(uri: str) -> None:
    version = write(uri, samples(range(6), split="train") + samples(range(6, 10), split="held-out"))
    assert version.rows("train") == 6
    assert version.rows("held-out") == 4


def test_bad_fractions_are_refused() -> None:
    with pytest.raises(ConfigError, match="add up to 1"):
        SplitRule(fractions={"train": 0.5, "test": 0.4})


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    shares=st.lists(st.integers(1, 10), min_size=1, max_size=5),
)
def test_every_group_gets_a_split_and_totals_stay_near_the_fractions(
    sizes: list[int], shares: list[int]
) -> None:
    fractions = {f"s{i}": share / sum(shares) for i, share in enumerate(shares)}
    groups = {f"{label}/{n}": (label,) for label, size in enumerate(sizes) for n in range(size)}
    dealt = SplitRule(fractions=fractions).assign(groups)
    assert set(dealt) == set(groups)
    shuffled = dict(sorted(groups.items(), key=lambda item: hash(item)))
    assert SplitRule(fractions=fractions).assign(shuffled) == dealt
    if len(sizes) > 20:  # no minimum for each split then: only rounding is left
        for name, fraction in fractions.items():
            found = sum(split == name for split in dealt.values())
            assert abs(found - fraction * len(groups)) <= len(fractions)


def test_above_the_exact_limit_the_rule_goes_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "EXACT_GROUPS", 100)
    dealt = SplitRule().assign({str(n): (0,) for n in range(4000)})
    assert sum(split == "train" for split in dealt.values()) == pytest.approx(2800, abs=120)


def test_progress_counts_every_input(uri: str) -> None:
    counted: list[int] = []
    write(uri, samples(range(150)), progress=counted.append)
    assert counted == sorted(counted)
    assert counted[-1] == 150


def test_a_description_is_plain_json(uri: str) -> None:
    described = write(uri, samples(range(20))).describe()
    assert json.loads(json.dumps(described))["splits"]["train"] == {
        "rows": 14,
        "shards": 1,
        "bytes": described["splits"]["train"]["bytes"],
    }
