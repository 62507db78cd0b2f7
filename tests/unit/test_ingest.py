"""jobs/ingest.py: counts add up, the same pictures twice add no row, bad sets are refused in one line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from counterfake import media
from counterfake.config import override
from counterfake.errors import ConfigError, CounterfakeError, DataError, NotFoundError
from counterfake.records import Dataset, SplitRule
from counterfake.sources.folder import FolderSource
from counterfake.sources.npz import NpzSource
from counterfake.sources.synthetic import SyntheticSource
from counterfake.workspace import Workspace
from jobs.ingest import PRESETS, IngestJob, run

SMALL = SyntheticSource(identities=12, per_identity=3, size=32)


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
    return IngestJob(source=source, into="pictures", **settings)


def test_synthetic_faces_become_a_version_with_people_kept_apart(workspace: Workspace) -> None:
    result = run(IngestJob(source=SMALL, into="faces"), workspace)
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
    job = IngestJob(source=SMALL, into="faces")
    first, second = run(job, workspace), run(job, workspace)
    assert second["report"]["rows"] == 0
    assert second["report"]["duplicates"] == 36
    assert (second["version"], second["digest"]) == (first["version"], first["digest"])


def test_new_pictures_are_added_to_the_old(workspace: Workspace) -> None:
    run(IngestJob(source=SMALL, into="faces"), workspace)
    more = override(IngestJob(source=SMALL, into="faces"), {"source.identities": 14})
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
    with pytest.raises(DataError, match=r"1 of 11 files .*real/broken\.jpg: undecodable"):
        run(pictures(root), workspace)
    with pytest.raises(NotFoundError):
        Dataset.open(workspace.dataset("pictures")).version()


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


def test_the_result_does_not_depend_on_threads(tmp_path: Path) -> None:
    digests = set()
    for threads in (1, 3):
        workspace = Workspace.at(tmp_path / str(threads))
        digests.add(run(IngestJob(source=SMALL, into="faces", threads=threads), workspace)["digest"])
    assert len(digests) == 1


def test_every_preset_runs_or_says_which_path_to_set(workspace: Workspace) -> None:
    for name, preset in PRESETS.items():
        job = preset()
        if isinstance(job.source, SyntheticSource):
            continue
        with pytest.raises(CounterfakeError, match=r"source\.(licence|path)"):
            run(job, workspace)
        ready = override(job, {"source.licence": "x", "source.consent": "none"})
        with pytest.raises(ConfigError, match=r"--set source\.path"):
            run(ready, workspace)
        assert name == name.lower()


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
