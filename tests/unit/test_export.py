"""export.py: other tools read the same pictures and labels; interrupted, it goes on; terms are kept."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterfake import export as exporting
from counterfake import media, provenance
from counterfake.errors import ConfigError, DataError
from counterfake.export import Format, export
from counterfake.records import Dataset, Sample, write_version

SOURCES = {
    "made": {"licence": "CC0-1.0", "consent": "synthetic"},
    "web": {"licence": "unknown", "consent": "research"},
    "kept": {"licence": "own", "consent": "subjects", "export": False},
}
FORMATS: list[Format] = ["parquet", "webdataset", "folder"]


def picture(number: int) -> bytes:
    return media.encode(np.full((8, 8, 3), number, np.uint8), "png" if number % 2 else "jpeg")


def rows() -> list[Sample]:
    """24 pictures: 20 of "made", 2 of "web", 2 of "kept"; every third without a label."""
    return [
        Sample(
            image=picture(n),
            path=f"of, {n}.png",
            fake=(0, 1, None)[n % 3],
            maker="../odd maker" if n % 3 == 1 else "camera",
            identity=f"p{n % 5}" if n % 2 else None,
            source="web" if n in (3, 4) else "kept" if n in (5, 6) else "made",
            face_box=(1.0, 2.0, 3.0, 4.0) if n % 4 == 0 else None,
            attributes={"quality": n / 10} if n % 2 else {},
            split="test" if n % 6 == 0 else "train",
        )
        for n in range(24)
    ]


@pytest.fixture
def faces(tmp_path: Path) -> Dataset:
    uri = (tmp_path / "faces").as_uri()
    write_version(uri, rows(), sources=SOURCES, rows_per_shard=6, rows_per_batch=4)
    return Dataset.open(uri)


def exported() -> dict[str, Sample]:
    return {row.id: row for row in rows() if row.source == "made"}


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which has a date."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "export.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


# -- what other tools read ------------------------------------------------------------------------------------------


def parquet_files(faces: Dataset, folder: Path) -> dict[str, list[str]]:
    export(faces, None, folder, "parquet")
    return {
        split: [str(p) for p in sorted((folder / "data").glob(f"{split}-*"))] for split in ("train", "test")
    }


def test_datasets_reads_the_parquet_with_decoded_pictures(faces: Dataset, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=parquet_files(faces, tmp_path / "out"), cache_dir=str(tmp_path / "hf")
    )
    assert loaded["train"].features["image"] == datasets.Image()
    found = {row["id"]: row for split in loaded.values() for row in split}
    assert found.keys() == exported().keys()
    for identifier, row in exported().items():
        np.testing.assert_array_equal(np.asarray(found[identifier]["image"]), media.decode_trusted(row.media))
        assert found[identifier]["face_box"] == (list(row.face_box) if row.face_box else None)
        assert found[identifier]["fake"] == row.fake


def test_pandas_polars_and_duckdb_read_the_parquet(faces: Dataset, tmp_path: Path) -> None:
    pandas, polars, duckdb = (pytest.importorskip(name) for name in ("pandas", "polars", "duckdb"))
    parts = parquet_files(faces, tmp_path / "out")
    every = [path for paths in parts.values() for path in paths]
    expected = {identifier: row.media for identifier, row in exported().items()}
    frame = pandas.concat(pandas.read_parquet(path) for path in every)
    assert {row.id: row.image["bytes"] for row in frame.itertuples()} == expected
    table = polars.read_parquet(every)
    assert {row["id"]: row["image"]["bytes"] for row in table.iter_rows(named=True)} == expected
    assert dict(duckdb.sql(f"select id, image.bytes from read_parquet({every})").fetchall()) == expected


def test_a_webdataset_holds_picture_and_labels_under_one_key(faces: Dataset, tmp_path: Path) -> None:
    manifest = export(faces, None, tmp_path / "out", "webdataset")
    found: dict[str, dict[str, bytes]] = {}
    for part in manifest["files"]:
        with tarfile.open(tmp_path / "out" / part["name"]) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = archive.extractfile(member).read()  # type: ignore[union-attr]
    assert found.keys() == exported().keys()
    for identifier, row in exported().items():
        labels = json.loads(found[identifier].pop("json"))
        assert found[identifier] == {"png" if row.media[:4] == b"\x89PNG" else "jpg": row.media}
        assert (labels["fake"], labels["maker"], labels["split"]) == (row.fake, row.maker, row.split)
        assert labels["attributes"] == row.attributes


def test_a_folder_can_be_ingested_again(faces: Dataset, tmp_path: Path) -> None:
    from counterfake.sources.folder import FolderSource

    export(faces, None, tmp_path / "out", "folder")
    source = FolderSource(path=str(tmp_path / "out"), name="back", licence="CC0-1.0", consent="synthetic")
    back = {
        row.id: row
        for row in source.samples()
        if isinstance(row, Sample) and row.path.endswith(("jpg", "png"))
    }
    expected = {i: row for i, row in exported().items() if row.fake is not None}
    assert {i: (row.fake, row.split) for i, row in back.items()} == {
        i: (row.fake, row.split) for i, row in expected.items()
    }
    assert {row.maker for row in back.values()} == {"camera", "_odd maker".replace(" ", "_")}


def test_the_table_of_a_folder_names_every_file(faces: Dataset, tmp_path: Path) -> None:
    export(faces, None, tmp_path / "out", "folder")
    with open(tmp_path / "out" / "metadata.csv", newline="") as file:
        table = {row["id"]: row for row in csv.DictReader(file)}
    assert table.keys() == exported().keys()
    for identifier, row in exported().items():
        assert (tmp_path / "out" / table[identifier]["file_name"]).read_bytes() == row.media
        assert table[identifier]["path"] == row.path
        assert table[identifier]["fake"] == ("" if row.fake is None else str(row.fake))
        assert json.loads(table[identifier]["attributes"]) == row.attributes


@pytest.mark.parametrize("format", FORMATS)
def test_raw_pixels_leave_without_loss(tmp_path: Path, format: Format) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 1), dtype=np.uint8)
    uri = (tmp_path / "digits").as_uri()
    write_version(uri, [Sample(pixels=p, source="made", fake=0) for p in pixels], sources=SOURCES)
    export(Dataset.open(uri), None, tmp_path / "out", format)
    if format == "folder":
        found = {
            media.decode_trusted(p.read_bytes())[:, :, 0].tobytes() for p in (tmp_path / "out").rglob("*.png")
        }
        assert found == {p.tobytes() for p in pixels}
    assert json.loads((tmp_path / "out" / "export.json").read_text())["rows"] == 10


def test_a_fake_of_raw_pixels_leaves_with_the_mark_of_its_maker_and_a_real_one_without(
    tmp_path: Path,
) -> None:
    uri, pixels = (tmp_path / "digits").as_uri(), np.zeros((2, 6, 5, 1), np.uint8)
    pixels[1] = 9
    rows = [
        Sample(pixels=pixels[0], source="made", fake=0),
        Sample(pixels=pixels[1], source="made", fake=1, maker="dcgan@3"),
    ]
    write_version(uri, rows, sources=SOURCES)
    export(Dataset.open(uri), None, tmp_path / "out", "folder")
    files = [path.read_bytes() for path in (tmp_path / "out").rglob("*.png")]
    found = {int(media.decode_trusted(data).max()): provenance.read(data).maker for data in files}
    assert found == {0: "", 9: "dcgan@3"}


# -- once, whole, resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_export_continues_and_ends_the_same(
    faces: Dataset, tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = exporting._WRITERS[format]

    def fail_at_the_third(part: Path, name: str, *rest: Any) -> Any:
        if len(written) == 2 and not resumed:
            real(part, name, *rest)  # the file is there, its receipt is not
            raise KeyboardInterrupt
        written.append(name)
        return real(part, name, *rest)

    resumed = False
    monkeypatch.setitem(exporting._WRITERS, format, fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        export(faces, None, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    resumed = True
    first = export(faces, None, tmp_path / "out", format)
    assert len(written) == len(set(written))
    assert export(faces, None, tmp_path / "again", format)["rows"] == first["rows"] == len(exported())
    assert files(tmp_path / "out") == files(tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "faces", "out"]


def test_a_finished_export_is_not_done_again(faces: Dataset, tmp_path: Path) -> None:
    counted: list[int] = []
    first = export(faces, None, tmp_path / "out", "parquet", progress=counted.append)
    assert sum(counted) == faces.version().rows()
    assert export(faces, None, tmp_path / "out", "parquet", progress=counted.append) == first
    assert sum(counted) == faces.version().rows()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "folder"}, r"holds the export of .*faces@1 as parquet"),
        ({"splits": ["test"]}, "choose another folder"),
        ({"format": "tfrecord"}, "expected one of parquet, webdataset, folder"),
    ],
    ids=["format", "splits", "unknown"],
)
def test_another_export_there_is_left_alone(
    faces: Dataset, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    export(faces, None, tmp_path / "out", "parquet")
    with pytest.raises(ConfigError, match=message):
        export(faces, None, tmp_path / "out", **{"format": "parquet", **changes})


def test_a_folder_of_something_else_is_left_alone(faces: Dataset, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("final")
    with pytest.raises(ConfigError, match="exists and is no export"):
        export(faces, None, tmp_path / "out", "parquet")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.doc"]


def test_one_split_can_be_exported_alone(faces: Dataset, tmp_path: Path) -> None:
    manifest = export(faces, None, tmp_path / "out", "parquet", splits=["test"])
    assert manifest["rows_of_split"] == {"test": sum(row.split == "test" for row in exported().values())}
    with pytest.raises(DataError, match="no split 'dev'"):
        export(faces, None, tmp_path / "dev", "parquet", splits=["dev"])


# -- terms ----------------------------------------------------------------------------------------------------------


def test_rows_whose_terms_forbid_it_stay_and_are_counted(faces: Dataset, tmp_path: Path) -> None:
    manifest = export(faces, None, tmp_path / "out", "parquet")
    assert manifest["left_out"] == {"kept": 2, "web": 2}
    assert manifest["sources"] == {"made": SOURCES["made"]}
    assert manifest["allow_research"] is False
    research = export(faces, None, tmp_path / "research", "parquet", allow_research=True)
    assert (research["left_out"], research["rows"]) == ({"kept": 2}, 22)
    assert research["allow_research"] is True


@pytest.mark.parametrize("both", [False, True], ids=["all sources", "all rows"])
def test_a_version_of_which_nothing_may_leave_is_refused(tmp_path: Path, both: bool) -> None:
    uri = (tmp_path / "faces").as_uri()
    terms = {name: SOURCES[name] for name in (["web", "made"] if both else ["web"])}
    write_version(uri, [Sample(image=picture(1), source="web")], sources=terms)
    with pytest.raises(
        DataError, match="the terms of web forbid it; consent research needs --allow-research"
    ):
        export(Dataset.open(uri), None, tmp_path / "out", "parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces"]
