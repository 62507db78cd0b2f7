"""jobs/ingest.py and parts.py: counts add up, a kill loses no finished part, the same pictures twice add no row, bad sets
are refused in one line."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counterfake import media, parts, temporary
from counterfake.config import override
from counterfake.errors import ConfigError, CorruptError, CounterfakeError, DataError, NotFoundError
from counterfake.fingerprint import is_hash, perceptual_hash
from counterfake.parts import Part, Staging
from counterfake.records import Dataset, Sample, Skipped, SplitRule
from counterfake.sources import listing, parquet
from counterfake.sources.folder import FolderSource
from counterfake.sources.idx import IdxSource
from counterfake.sources.npz import NpzSource
from counterfake.sources.parquet import ParquetSource
from counterfake.sources.synthetic import SyntheticSource
from counterfake.storage import open_store
from counterfake.workspace import Workspace
from jobs import __main__ as shell
from jobs.ingest import PRESETS, IngestJob, run

SMALL = SyntheticSource(identities=12, per_identity=3, size=32)
ROOT = Path(__file__).resolve().parents[2]


def jpeg(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return media.encode(np.kron(small, np.ones((8, 8, 1), np.uint8)), "jpeg")


def fill(root: Path, count: int, seed: int = 0) -> Path:
    """`count` real and `count` fake pictures."""
    for fake in (0, 1):
        folder = root / ("fake/painter" if fake else "real")
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng([seed, fake, number])
            small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            pixels = np.kron(small, np.ones((8, 8, 1), np.uint8))
            (folder / f"{number}.jpg").write_bytes(media.encode(pixels, "jpeg", 90 - 20 * fake))
    return root


def pictures(root: Path, **settings: object) -> IngestJob:
    source = FolderSource(path=str(root), name="mine", licence="CC0-1.0", consent="none")
    return IngestJob(source=source, into="pictures", audit=False, **settings)


def faces(**settings: Any) -> IngestJob:
    return IngestJob(**{"source": SMALL, "into": "faces", "audit": False, **settings})


def test_synthetic_faces_become_a_version_with_people_kept_apart(workspace: Workspace) -> None:
    result = run(faces(), workspace)
    assert result["report"]["seen"] == result["report"]["rows"] == 36
    assert sum(result["splits"].values()) == 36
    dataset = Dataset.open(workspace.dataset("faces"))
    version = dataset.version()
    people = {split: {s.identity for s in dataset.samples(version, split)} for split in version.splits}
    assert sum(map(len, people.values())) == len(set.union(*people.values())) == 12
    assert version.sources["synthetic-faces"] == {"licence": "Apache-2.0", "consent": "synthetic"}
    sample = next(dataset.samples(version, "train"))
    assert sample.face_method == "synthetic"
    assert sample.landmarks is not None
    assert media.decode(sample.image or b"").shape == (32, 32, 3)


def test_the_same_pictures_twice_add_no_row_and_no_version(workspace: Workspace) -> None:
    job = faces()
    first, second = run(job, workspace), run(job, workspace)
    assert second["report"]["rows"] == 0
    assert second["report"]["duplicates"] == 36
    assert (second["version"], second["digest"]) == (first["version"], first["digest"])


def test_new_pictures_are_added_to_the_old(workspace: Workspace) -> None:
    run(faces(), workspace)
    more = override(faces(), {"source.identities": 14})
    result = run(more, workspace)
    assert result["report"]["rows"] == 6
    assert result["rows"] == 42
    alone = run(override(more, {"append": False}), workspace)
    assert alone["rows"] == 42


def test_every_file_is_accounted_for(workspace: Workspace, tmp_path: Path) -> None:
    root = fill(tmp_path / "in", 10)
    (root / "real" / "copy.jpg").write_bytes((root / "real" / "0.jpg").read_bytes())
    (root / "fake" / "real.jpg").write_bytes((root / "real" / "1.jpg").read_bytes())
    (root / "real" / "notes.txt").write_text("no picture")
    (root / "real" / "cut.jpg").write_bytes((root / "real" / "2.jpg").read_bytes()[:300])
    (root / "real" / "empty.png").write_bytes(b"")
    result = run(pictures(root, max_skipped_fraction=0.2), workspace)
    report = result["report"]
    assert report["seen"] == 25
    assert report["skipped"] == {"unsupported": 1, "undecodable": 1, "empty": 1}
    assert (report["rows"], report["duplicates"], report["conflicts"]) == (20, 1, 1)
    assert report["examples"]["undecodable"] == ["real/cut.jpg"]


def test_too_many_bad_files_write_nothing_and_are_named(workspace: Workspace, tmp_path: Path) -> None:
    root = fill(tmp_path / "in", 5)
    (root / "real" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(DataError, match=r"1 of 11 files .*real/broken\.jpg: undecodable; all: ") as caught:
        run(pictures(root), workspace)
    folder, _, name = str(caught.value).rpartition("; all: ")[2].rpartition("/")
    assert json.loads(open_store(folder).read(name))["skipped"] == [["real/broken.jpg", "undecodable"]]
    with pytest.raises(NotFoundError):
        Dataset.open(workspace.dataset("pictures")).version()


def test_what_operating_systems_leave_behind_is_counted_and_no_fault(
    workspace: Workspace, tmp_path: Path
) -> None:
    root = fill(tmp_path / "in", 5)
    for name in (
        "real/.DS_Store",
        "real/Thumbs.db",
        "fake/desktop.ini",
        ".cache/x/1.jpg",
        "fake/painter/._0.jpg",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"nothing")
    result = run(pictures(root, max_skipped_fraction=0.0), workspace)
    assert result["report"]["inputs"] == {"seen": 15, "ok": 10, "skipped": 5}
    assert result["report"]["skipped"] == {listing.HIDDEN: 5}
    (root / "linked").symlink_to(root / "real", target_is_directory=True)
    with pytest.raises(DataError, match=r"1 of 11 files .*First: linked/: a link to a folder"):
        run(pictures(root, max_skipped_fraction=0.0), workspace)


def test_a_broken_parquet_file_costs_its_own_rows_alone(workspace: Workspace, tmp_path: Path) -> None:
    table, root = pa.table({"image": [jpeg(number) for number in range(8)]}), tmp_path / "in"
    root.mkdir()
    for name in ("a", "b"):
        pq.write_table(table.slice(4 * (name == "b"), 4), root / f"{name}.parquet")
    (root / "b.parquet").write_bytes((root / "b.parquet").read_bytes()[:-9])
    source = ParquetSource(path=str(root), licence="MIT", consent="none", fake=0)
    job = IngestJob(source=source, into="table", audit=False)
    with pytest.raises(DataError, match=r"1 of 5 files .*First: b\.parquet: no readable parquet file"):
        run(job, workspace)
    report = run(override(job, {"max_skipped_fraction": 0.5}), workspace)["report"]
    assert report["inputs"] == {"seen": 5, "ok": 4, "skipped": 1}
    assert report["skipped"] == {parquet.DAMAGED: 1}


def test_media_wait_under_the_workspace_and_not_in_a_folder_of_the_system(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = temporary._held, []
    monkeypatch.setattr(temporary, "_held", lambda parent: (seen.append(parent), real(parent))[1])
    run(faces(), workspace)  # one part
    run(faces(part_inputs=10, append=False), workspace)
    assert set(seen) == {workspace.home / "scratch"}
    assert not list((workspace.home / "scratch").iterdir())


def test_what_a_killed_process_left_in_the_scratch_folder_goes_after_a_week(tmp_path: Path) -> None:
    folder = parts.scratch(tmp_path)
    for name, days in (("old", 8), ("young", 6), ("written", 0)):
        (folder / name).mkdir()
        (folder / name / "media").write_bytes(b"x")
        for path in (folder / name / "media", folder / name):
            os.utime(path, (time.time() - 86_400 * days,) * 2)
    os.utime(folder / "written", (1, 1))
    assert sorted(path.name for path in parts.scratch(tmp_path).iterdir()) == ["written", "young"]


def test_an_empty_folder_is_one_clear_line(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="holds no files") as caught:
        run(pictures(tmp_path / "in"), workspace)
    assert "\n" not in str(caught.value)


def test_pictures_of_others_need_licence_and_consent(workspace: Workspace, tmp_path: Path) -> None:
    job = IngestJob(source=FolderSource(path=str(fill(tmp_path, 1))), into="x")
    with pytest.raises(ConfigError, match=r"--set source\.licence=.* --set source\.consent=research"):
        run(job, workspace)
    with pytest.raises(ConfigError, match=r"source\.consent") as caught:
        run(override(job, {"source.licence": "MIT"}), workspace)
    assert "source.licence" not in str(caught.value)


def test_one_encoder_for_both_classes_removes_the_format_as_a_clue(
    workspace: Workspace, tmp_path: Path
) -> None:
    root = fill(tmp_path / "in", 8)
    run(pictures(root, encode="jpeg:85"), workspace)
    dataset = Dataset.open(workspace.dataset("pictures"))
    version = dataset.version()
    found = [s for split in version.splits for s in dataset.samples(version, split)]
    tables = {(s.image or b"").split(b"\xff\xdb")[1][:67] for s in found}
    assert len(tables) == 1
    assert all(s.attributes["encoded"] == "jpeg:85" and len(s.attributes["original"]) == 64 for s in found)
    again = run(pictures(root, encode="jpeg:85"), workspace)
    assert again["report"]["rows"] == 0


@pytest.mark.parametrize("encode", ["gif", "jpeg:0", "jpeg:101", "jpeg:high", "jpeg90"])
def test_an_unknown_encoder_is_refused(encode: str) -> None:
    with pytest.raises(ConfigError, match="encode is"):
        IngestJob(source=SMALL, into="x", encode=encode)


def test_faces_are_found_where_the_source_knows_none(workspace: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "in" / "real"
    root.mkdir(parents=True)
    for number, sample in enumerate(SyntheticSource(identities=12, per_identity=1).samples()):
        (root / f"{number}.jpg").write_bytes(sample.image)  # type: ignore[union-attr,arg-type]
    run(pictures(root.parent, faces="cascade", splits=SplitRule(fractions={"train": 1.0})), workspace)
    found = list(Dataset.open(workspace.dataset("pictures")).samples(None, "train"))
    boxes = [s.face_box for s in found if s.face_box]
    assert len(boxes) >= 9
    assert {s.face_method for s in found} == {"cascade"}


def test_five_points_of_each_face_where_a_model_is_given(
    workspace: Workspace, tmp_path: Path, shared_data: Path
) -> None:
    root = tmp_path / "in" / "real"
    root.mkdir(parents=True)
    with tarfile.open(shared_data / "stylegan_ffhq" / "images.tar.gz") as archive:
        for member in [m for m in archive if m.name.endswith(".jpg")][:6]:
            file = archive.extractfile(member)
            assert file is not None
            (root / Path(member.name).name).write_bytes(file.read())
    weights = str(shared_data / "weights" / "mtcnn" / "onet.pt")
    everything = SplitRule(fractions={"train": 1.0})
    run(pictures(root.parent, faces="cascade", landmarks_model=weights, splits=everything), workspace)
    found = list(Dataset.open(workspace.dataset("pictures")).samples(None, "train"))
    points = [sample.landmarks for sample in found if sample.landmarks]
    assert len(points) >= 4
    assert {len(each) for each in points} == {10}


def test_points_without_faces_are_refused() -> None:
    with pytest.raises(ConfigError, match="set faces=cascade"):
        IngestJob(source=SMALL, into="x", landmarks_model="onet.pt")


def test_the_result_does_not_depend_on_threads(tmp_path: Path) -> None:
    digests = set()
    for threads in (1, 3):
        workspace = Workspace.at(tmp_path / str(threads))
        digests.add(run(faces(threads=threads), workspace)["digest"])
    assert len(digests) == 1


def test_the_version_is_audited_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(faces(audit=True), workspace)
    assert result["audit"]["leaks"] == []
    dataset = Dataset.open(workspace.dataset("faces"))
    assert dataset.store.exists(f"audits/{result['digest']}.json")
    monkeypatch.setattr("counterfake.audit.audit", None)  # not called for a version that was audited
    assert run(faces(audit=True), workspace)["audit"] == result["audit"]


def test_pictures_carry_the_hash_by_which_near_copies_are_found(workspace: Workspace, tmp_path: Path) -> None:
    root = fill(tmp_path / "in", 8)
    (root / "real" / "flat.jpg").write_bytes(media.encode(np.full((32, 32, 3), 7, np.uint8), "jpeg"))
    run(pictures(root, splits=SplitRule(fractions={"train": 1.0})), workspace)
    rows = list(Dataset.open(workspace.dataset("pictures")).samples(None, "train"))
    hashes = {row.path: row.attributes.get("phash") for row in rows}
    assert hashes.pop("real/flat.jpg") is None  # one colour says nothing
    assert all(is_hash(value) for value in hashes.values())
    assert hashes["real/0.jpg"] == perceptual_hash(media.decode((root / "real" / "0.jpg").read_bytes()))


# -- parts ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an ingest of SMALL gives that nobody disturbs."""
    return run(faces(), Workspace.at(tmp_path_factory.mktemp("whole")))


def killed_at(put: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends instead of its put number `put` (from 0) under staging/."""
    done = 0

    def counted(name: str) -> Any:
        real = getattr(type(open_store("file:///x")), name)

        def call(self: Any, key: str, *arguments: Any) -> Any:
            nonlocal done
            if key.startswith("staging/"):
                if done == put:
                    raise Killed
                done += 1
            return real(self, key, *arguments)

        return call

    for name in ("put_file", "put_if_absent"):
        monkeypatch.setattr(type(open_store("file:///x")), name, counted(name))


@pytest.mark.parametrize("put", range(8))
def test_an_ingest_killed_at_any_put_goes_on_and_gives_the_same_version(
    put: int, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, job = Workspace.at(tmp_path / "killed"), faces(part_inputs=9, threads=1)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_at(put, patched)
        run(job, workspace)
    with pytest.raises(NotFoundError):
        Dataset.open(workspace.dataset("faces")).version()
    again = run(job, workspace)
    assert again["parts"] == {"all": 4, "reused": put // 2}  # two puts a part: rows, then the receipt
    assert (again["digest"], again["report"]) == (whole["digest"], whole["report"])
    assert not list(workspace.home.glob("datasets/faces/staging/*"))


def test_a_real_kill_in_the_middle_loses_no_finished_part(whole: dict[str, Any], tmp_path: Path) -> None:
    code = (
        "import sys, os, signal\n"
        "from counterfake.workspace import Workspace\n"
        "from counterfake.parts import Staging\n"
        "from tests.unit.test_ingest import faces, run\n"
        "stage = Staging.stage\n"
        "def killing(self, part, items):\n"
        "    if part.number == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return stage(self, part, items)\n"
        "Staging.stage = killing\n"
        "run(faces(part_inputs=9, threads=1), Workspace.at(sys.argv[1]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    result = run(faces(part_inputs=9), Workspace.at(tmp_path))
    assert result["parts"] == {"all": 4, "reused": 2}
    assert result["digest"] == whole["digest"]


def test_the_size_of_parts_does_not_change_the_version(whole: dict[str, Any], tmp_path: Path) -> None:
    runs = [run(faces(part_inputs=n), Workspace.at(tmp_path / str(n))) for n in (1, 7)]
    assert [found["parts"]["all"] for found in (*runs, whole)] == [36, 6, 1]
    assert {found["digest"] for found in runs} == {whole["digest"]}


def test_an_archive_is_read_once_and_only_what_is_missing_is_prepared(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "in.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(fill(tmp_path / "in", 10), ".")
    job = override(pictures(archive, part_inputs=4), {"source.path": str(archive)})
    assert not job.source.divisible
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_at(5, patched)
        run(job, workspace)
    again = run(job, workspace)
    assert again["parts"] == {"all": 5, "reused": 2}
    plain = run(pictures(tmp_path / "in"), Workspace.at(tmp_path / "plain"))
    assert again["digest"] == plain["digest"]


@pytest.mark.parametrize("size", [0, 4], ids=["one part", "an archive"])
def test_workers_are_not_asked_for_what_they_cannot_share(
    size: int, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("counterfake.cluster.bulk.each", asked)
    with tarfile.open(tmp_path / "in.tar", "w") as file:
        file.add(fill(tmp_path / "in", 8), ".")
    result = run(pictures(tmp_path / "in.tar", part_inputs=size, workers=2), workspace)
    assert (result["rows"], result["parts"]["all"]) == (16, 4 if size else 1)


def test_a_picture_that_changed_since_is_read_again(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fill(tmp_path / "in", 8)
    job = pictures(root, part_inputs=4, threads=1)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_at(6, patched)
        run(job, workspace)
    (root / "real" / "0.jpg").write_bytes(media.encode(np.full((32, 32, 3), 7, np.uint8), "jpeg"))
    assert run(job, workspace)["parts"] == {"all": 4, "reused": 0}


def test_parts_are_staged_on_s3_and_removed_after_the_commit(
    s3: Any, whole: dict[str, Any], tmp_path: Path
) -> None:
    workspace = Workspace.at(tmp_path, storage=f"{s3.uri}/store")
    result = run(faces(part_inputs=12), workspace)
    assert result["digest"] == whole["digest"]
    keys = [entry.key for entry in open_store(workspace.dataset("faces")).list()]
    assert sorted({key.split("/")[0] for key in keys}) == ["ingests", "shards", "versions"]
    assert not list(workspace.cache.rglob("*.arrow"))


def staging(tmp_path: Path) -> Staging:
    return Staging(open_store(tmp_path.as_uri()), "staging/x")


def test_a_part_tells_what_became_of_each_input(tmp_path: Path) -> None:
    def row(path: str, seed: int) -> Sample:
        return Sample(image=jpeg(seed), path=path, source="s", video=path, frame=seed, time_s=seed / 3)

    items: list[Sample | Skipped] = [
        row("a.mp4", 1),
        Skipped("a.mp4", "no_face", whole=False),
        Skipped("a.mp4", "no_face", whole=False),
        row("a.mp4", 2),
        Skipped("b.mp4", "no_face"),
        Skipped("c.mp4", "damaged_frame", whole=False),
    ]
    staged = staging(tmp_path)
    receipt = staged.stage(Part(3, ("a.mp4", "b.mp4", "c.mp4", "d.mp4")), items)
    assert (receipt.inputs, receipt.rows, receipt.unlabelled) == (4, 2, 2)
    assert receipt.skipped == (("b.mp4", "no_face"), ("c.mp4", "damaged_frame"), ("d.mp4", parts.UNREAD))
    assert receipt.partly == (("a.mp4", "no_face", 2), ("c.mp4", "damaged_frame", 1))
    assert (staged.done(), staged.receipt(3)) == ({3}, receipt)
    assert list(staged.samples(receipt, tmp_path)) == [items[0], items[3]]


def test_a_staged_row_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [
        Sample(
            image=jpeg(0), path="odd\udcff.jpg", fake=1, maker="m", class_id=3, identity="i", source="s",
            face_box=(1.5, 2.0, 3.25, 4.0), face_method="cascade", face_margin=1.5, landmarks=[1.0, 2.5],
            attributes={"z": [1, {"a": None}], "b": "ü"}, split="test",
        ),
        Sample(pixels=np.arange(24, dtype=np.uint8).reshape(4, 3, 2), path="p", source="s"),
    ]  # fmt: skip
    staged = staging(tmp_path)
    found = list(staged.samples(staged.stage(Part(0, tuple(r.path for r in rows)), rows), tmp_path))
    assert found[0] == dataclasses.replace(rows[0], path="odd?.jpg")
    assert found[1].pixels is not None
    assert (found[1].pixels == rows[1].pixels).all()
    assert found[1].id == rows[1].id


def test_an_ingest_overtaken_by_its_twin_says_so(tmp_path: Path) -> None:
    staged = staging(tmp_path)
    receipt = staged.stage(Part(0, ("a",)), [Sample(image=jpeg(0), path="a", source="s")])
    staged.clear()
    for read in (lambda: staged.receipt(0), lambda: list(staged.samples(receipt, tmp_path))):
        with pytest.raises(NotFoundError, match="another process has just finished the same ingest"):
            read()
    assert not (tmp_path / "staging" / "x").exists()


def test_a_damaged_staged_part_is_named(tmp_path: Path) -> None:
    staged = staging(tmp_path)
    receipt = staged.stage(Part(0, ("a",)), [Sample(image=jpeg(0), path="a", source="s")])
    file = tmp_path / "staging" / "x" / receipt.file
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError, match=receipt.file):
        list(staged.samples(receipt, tmp_path))
    (tmp_path / "staging/x/part-000000.json").write_text("{}")
    with pytest.raises(CorruptError, match="delete it and run the ingest again"):
        staged.receipt(0)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_all_that_was_skipped_is_named_in_the_report_beside_the_version(
    workspace: Workspace, tmp_path: Path
) -> None:
    root = fill(tmp_path / "in", 15)
    for number in range(30):
        (root / "real" / f"{number:02d}.txt").write_text("no picture")
    result = run(pictures(root, max_skipped_fraction=0.5, part_inputs=16), workspace)
    assert result["report"]["inputs"] == {"seen": 60, "ok": 30, "skipped": 30}
    version = Dataset.open(workspace.dataset("pictures")).version()
    story = json.loads(open_store(workspace.dataset("pictures")).read(version.writer["inputs"]))
    assert story["skipped"] == [[f"real/{number:02d}.txt", "unsupported"] for number in range(30)]
    assert story["inputs"] == version.report["inputs"]


def test_a_label_that_contradicts_another_source_is_counted_and_the_first_one_stays(
    workspace: Workspace, tmp_path: Path
) -> None:
    run(pictures(fill(tmp_path / "in", 6)), workspace)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(3):
        (flat / f"{number}.jpg").write_bytes((tmp_path / "in" / "real" / f"{number}.jpg").read_bytes())
    (flat / "new.jpg").write_bytes(jpeg(99))
    other = FolderSource(path=str(flat), name="theirs", licence="MIT", consent="none", fake=1)
    result = run(IngestJob(source=other, into="pictures", audit=False), workspace)
    assert (result["report"]["conflicts"], result["report"]["rows"], result["rows"]) == (3, 1, 13)
    dataset = Dataset.open(workspace.dataset("pictures"))
    labels = Counter(s.fake for s in dataset.samples(None, "train"))
    assert sum(s.fake or 0 for split in dataset.version().splits for s in dataset.samples(None, split)) == 7
    assert labels[0] <= 6


def test_raw_pictures_of_mixed_sizes_are_refused_in_one_line(workspace: Workspace, tmp_path: Path) -> None:
    for name, side in (("train", 20), ("t10k", 24)):
        images, labels = np.zeros((3, side, side), np.uint8), np.zeros(3, np.uint8)
        images[:, 0, 0] = range(3)
        for array, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
            header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            data = gzip.compress(header + array.tobytes())
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(data)
    source = IdxSource(path=str(tmp_path), licence="MIT", consent="none")
    with pytest.raises(DataError, match=r"test/00000 is pixels \(24, 24, 1\) .* one size of raw pixels"):
        run(IngestJob(source=source, into="digits"), workspace)
    with pytest.raises(NotFoundError):
        Dataset.open(workspace.dataset("digits")).version()


def test_foreign_tables_in_a_folder_are_counted_skips(workspace: Workspace, tmp_path: Path) -> None:
    root = fill(tmp_path / "in", 5)
    run(pictures(root), workspace)
    shard = next(workspace.home.glob("datasets/pictures/shards/*.arrow"))
    (root / "real" / "shard.arrow").write_bytes(shard.read_bytes())
    (root / "real" / "table.parquet").write_bytes(b"PAR1nothingPAR1")
    report = run(pictures(root, max_skipped_fraction=0.5), workspace)["report"]
    assert (report["skipped"], report["inputs"]["skipped"]) == ({"unsupported": 2}, 2)


HOSTILE = """
import json, re, sys
from pathlib import Path
from tests.unit.test_ingest import pictures, run
from counterfake.workspace import Workspace
settings = json.loads(sys.argv[3])
job = pictures(sys.argv[1], max_skipped_fraction=1.0, **settings)
result = run(job, Workspace.at(sys.argv[2]))
# not getrusage: its peak is inherited from the process that started this one
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"report": result["report"], "peak_kb": peak}))
"""


@pytest.mark.parametrize("settings", [{}, {"faces": "cascade", "encode": "jpeg:90"}], ids=["plain", "faces"])
def test_hostile_files_are_all_accounted_for_within_a_gigabyte(
    settings: dict[str, Any], shared_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in" / "real"
    with tarfile.open(shared_data / "hostile" / "hostile.tar.gz") as archive:
        _unpack(archive, folder)
    there = sum(path.is_file() for path in folder.rglob("*"))
    with open(shared_data / "hostile" / "files.csv", newline="") as file:
        assert there >= sum(1 for _ in csv.DictReader(file))
    ended = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(tmp_path / "in"), str(tmp_path / "runs"), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert found["report"]["inputs"]["seen"] == there
    assert found["report"]["inputs"]["ok"] + sum(found["report"]["skipped"].values()) == there
    assert found["peak_kb"] < 1_000_000


VIDEOS = HOSTILE.replace(
    "job = pictures(sys.argv[1], max_skipped_fraction=1.0, **settings)",
    """from counterfake.sources.video import FaceCut, VideoSource
from jobs.ingest import IngestJob
cut = FaceCut(frames=4, eyes=False, deadline_seconds=20)
source = VideoSource(path=sys.argv[1], licence="MIT", consent="none", cut=cut)
job = IngestJob(source=source, into="videos", audit=False, max_skipped_fraction=1.0)""",
).replace(
    "print(json.dumps(",
    """import resource
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"children_kb": children} | """,
)


def test_hostile_files_among_videos_are_all_accounted_for_within_a_gigabyte(
    shared_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    with tarfile.open(shared_data / "hostile" / "hostile.tar.gz") as archive:
        _unpack(archive, folder)
    good = shared_data / "videos" / "real_ffpp_004.mp4"
    (folder / "good.mp4").write_bytes(good.read_bytes())
    for number, data in enumerate((good.read_bytes()[:20_000], good.read_bytes()[:40] + b"\xff" * 9_000)):
        (folder / f"cut{number}.mp4").write_bytes(data)
    there = sum(path.is_file() for path in folder.rglob("*"))
    ended = subprocess.run(
        [sys.executable, "-c", VIDEOS, str(folder), str(tmp_path / "runs"), "{}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    inputs = found["report"]["inputs"]
    assert inputs["seen"] == inputs["ok"] + inputs["skipped"] == there
    assert inputs["ok"] >= 1
    assert sum(found["report"]["skipped"].values()) == inputs["skipped"]
    assert found["peak_kb"] + found["children_kb"] < 1_000_000


# -- presets --------------------------------------------------------------------------------------------------------


def test_every_preset_runs_or_says_which_path_to_set(workspace: Workspace) -> None:
    for name, preset in PRESETS.items():
        job = preset()
        if job.source.consent == "synthetic":  # made up, from no path
            continue
        with pytest.raises(CounterfakeError, match=r"source\.(licence|path)"):
            run(job, workspace)
        ready = override(job, {"source.licence": "x", "source.consent": "none"})
        with pytest.raises(ConfigError, match=r"--set source\.path"):
            run(ready, workspace)
        assert name == name.lower()


def test_presets_bear_the_names_of_the_formats(workspace: Workspace, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 20, 18), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    settings = {"source.path": str(tmp_path / "x.npz"), "source.licence": "MIT", "source.consent": "none"}
    result = run(override(PRESETS["npz"](), {**settings, "source.fake": 0, "audit": False}), workspace)
    assert (result["rows"], result["kind"]) == (40, "image")
    for name, array in (("images-idx3", images), ("labels-idx1", np.arange(40, dtype=np.uint8) % 10)):
        header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        for part in ("train", "t10k"):
            content = header + (array if part == "train" else 255 - array).tobytes()
            (tmp_path / f"{part}-{name}-ubyte").write_bytes(content)
    result = run(
        override(PRESETS["idx"](), {**settings, "source.path": str(tmp_path), "audit": False}), workspace
    )
    assert (result["splits"]["train"], result["splits"]["test"], result["kind"]) == (40, 40, "pixels")
    assert PRESETS["synthetic"]() == PRESETS["synthetic-faces"]()


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`counterfake run ingest PRESET …` -> (exit status, standard output, standard error)."""
    monkeypatch.setenv("COUNTERFAKE_HOME", str(tmp_path / "runs"))
    for name in ("COUNTERFAKE_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        rights = ("--set", "source.licence=CC0-1.0", "--set", "source.consent=none")
        monkeypatch.setattr(sys, "argv", ["counterfake", "run", "ingest", *words, *rights])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            shell.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def test_a_tree_with_spaces_and_other_alphabets_is_ingested_at_the_command(
    command: Any, tmp_path: Path
) -> None:
    root = fill(tmp_path / "mes photos 写真", 8)
    (root / "real" / "0.jpg").rename(root / "real" / "été à la plage (1).jpg")
    (root / "fake" / "painter").rename(root / "fake" / "Художник № 1")
    status, out, err = command("folder", "--set", f"source.path={root}", "--set", "into=mine", "--json")
    assert (status, json.loads(out)["rows"]) == (0, 16), err
    dataset = Dataset.open(Workspace.at(tmp_path / "runs").dataset("mine"))
    rows = [s for split in dataset.version().splits for s in dataset.samples(None, split)]
    assert "real/été à la plage (1).jpg" in {row.path for row in rows}
    assert {row.maker for row in rows} == {"camera", "Художник № 1"}


def test_a_folder_of_files_without_a_picture_is_one_line_at_the_command(command: Any, tmp_path: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    for name in ("a.txt", "b.txt", ".DS_Store"):
        (root / name).write_text("no picture")
    for only_litter in (False, True):
        if only_litter:
            [path.unlink() for path in root.glob("*.txt")]
        status, out, err = command("folder", "--set", f"source.path={root}", "--set", "source.fake=0")
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (status, out) == (2, "")
        assert ("no samples to store" if only_litter else "2 of 2 files cannot be used") in line
        assert "Traceback" not in err
    assert not (tmp_path / "runs" / "datasets" / "pictures" / "versions").exists()


def test_cifake_keeps_its_published_test_split(workspace: Workspace, shared_data: Path) -> None:
    job = PRESETS["cifake"]()
    changes = {"source.path": str(shared_data / "cifake" / "cifake.npz"), "source.limit": 600}
    result = run(override(job, {**changes, "source.licence": "MIT", "source.consent": "none"}), workspace)
    assert result["rows"] + result["report"]["duplicates"] == 600
    dataset = Dataset.open(workspace.dataset("cifake"))
    version = dataset.version()
    for split in version.splits:
        labels = Counter(s.fake for s in dataset.samples(version, split))
        assert min(labels.values()) > 0.3 * sum(labels.values()), split
    assert isinstance(job.source, NpzSource)


def _unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Data only: no links out, no devices. Pythons before 3.11.4 know no filters; the archive is one of ours."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
    else:
        archive.extractall(folder)
