"""sources/: every file becomes one sample or one named skip, labels come from where files lie, faces are reproducible."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counterfake import config, media, sources
from counterfake.errors import ConfigError, DataError, NotFoundError
from counterfake.records import Sample, Skipped
from counterfake.sources import SourceConfig, listing
from counterfake.sources.ciplab import CiplabSource
from counterfake.sources.folder import FolderSource
from counterfake.sources.idx import IdxSource
from counterfake.sources.npz import NpzSource
from counterfake.sources.parquet import ParquetSource
from counterfake.sources.synthetic import SyntheticSource, portrait


def jpeg(seed: int = 0) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return media.encode(np.kron(small, np.ones((8, 8, 1), np.uint8)), "jpeg")


def write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


def samples(source: SourceConfig) -> list[Sample]:
    found = list(source.samples())
    assert not [item for item in found if isinstance(item, Skipped)]
    return [item for item in found if isinstance(item, Sample)]


GOLDEN = np.array(
    [
        [185.9, 144.3, 143.8, 185.0],
        [142.0, 174.2, 145.4, 126.8],
        [96.1, 182.8, 200.3, 102.8],
        [107.8, 130.7, 130.9, 105.2],
    ]
)  # mean luma of 16 cells of portrait(0, 3, 0, 64)


# -- the family -----------------------------------------------------------------------------------------------------


def test_every_source_is_found_by_its_kind() -> None:
    kinds = SourceConfig.members()
    assert set(kinds) >= {"FolderSource", "IdxSource", "NpzSource", "CiplabSource", "SyntheticSource"}
    for kind, cls in kinds.items():
        assert isinstance(config.from_dict(SourceConfig, {"kind": kind}), cls)


@pytest.mark.parametrize("cls", [FolderSource, IdxSource, NpzSource, CiplabSource, ParquetSource])
def test_a_source_of_files_asks_for_its_path(cls: type[SourceConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set source\.path"):
        list(cls().samples())
    with pytest.raises(NotFoundError, match="does not exist"):
        list(cls(path=str(tmp_path / "nowhere")).samples())


def folder_source(root: Path) -> SourceConfig:
    return FolderSource(path=str(write(root, "real/b.jpg", "fake/m/a.jpg", "notes/c.jpg", "fake/d.jpg")))


def zip_source(root: Path) -> SourceConfig:
    folder_source(root / "in")
    with zipfile.ZipFile(root / "in.zip", "w") as file:
        for path in sorted((root / "in").rglob("*.jpg")):
            file.write(path, path.relative_to(root / "in").as_posix())
    return FolderSource(path=str(root / "in.zip"))


def tar_source(root: Path) -> SourceConfig:
    folder_source(root / "in")
    with tarfile.open(root / "in.tar.gz", "w:gz") as file:
        file.add(root / "in", ".")
    return FolderSource(path=str(root / "in.tar.gz"))


def ciplab_source(root: Path) -> SourceConfig:
    return CiplabSource(path=str(write(root, "f/easy_1_1010.jpg", "r/real_00001.jpg", "r/odd.jpg")))


def idx_source(root: Path) -> SourceConfig:
    write_mnist(root)
    return IdxSource(path=str(root))


def npz_source(root: Path) -> SourceConfig:
    np.savez(root / "x.npz", images=np.random.default_rng(0).integers(0, 256, (7, 20, 18), dtype=np.uint8))
    return NpzSource(path=str(root / "x.npz"), fake=0)


def parquet_source(root: Path) -> SourceConfig:
    write_parquet(root / "data" / "train-00000-of-00001.parquet", [0, 1, 0, 1, 1], row_group_size=2)
    write_parquet(root / "data" / "test-00000-of-00001.parquet", [1, 0])
    return ParquetSource(path=str(root), label_column="label", labels={"0": 0, "1": 1})


def synthetic_source(_: Path) -> SourceConfig:
    return SyntheticSource(identities=3, per_identity=2, size=16, first_identity=5)


MADE = [
    folder_source,
    zip_source,
    tar_source,
    ciplab_source,
    idx_source,
    npz_source,
    parquet_source,
    synthetic_source,
]


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_any_inputs_can_be_read_by_name_and_each_is_accounted_for(
    make: Callable[[Path], SourceConfig], tmp_path: Path
) -> None:
    source = make(tmp_path)
    names, items = list(source.names()), list(source.samples())
    assert [item.path for item in items] == names == list(source.names())
    assert len(set(names)) == len(names) > 2
    settled = source.settled(names)
    some = names[1::2]
    chosen = [item for item in items if item.path in some]
    for found, item in zip(settled.read(some), chosen, strict=True):
        if isinstance(item, Sample) and item.pixels is not None:
            assert (found.path, found.id) == (item.path, item.id)  # type: ignore[union-attr]
        else:
            assert found == item
    assert not list(source.read([]))


def test_the_stamp_changes_with_the_files_and_only_with_them(tmp_path: Path) -> None:
    source = folder_source(tmp_path)
    before = source.stamp()
    assert source.stamp() == before
    os.utime(tmp_path / "real" / "b.jpg", (1, 1))
    changed = source.stamp()
    (tmp_path / "real" / "new.jpg").write_bytes(b"")
    assert len({before, changed, source.stamp()}) == 3
    assert SyntheticSource().stamp() == SyntheticSource(seed=1).stamp()  # there are no files


def test_a_file_that_disappears_between_listing_and_reading_is_named(tmp_path: Path) -> None:
    source = folder_source(tmp_path)
    names = list(source.names())
    (tmp_path / "real" / "b.jpg").unlink()
    found = {item.path: item for item in source.settled(names).read(names)}
    assert found["real/b.jpg"] == Skipped("real/b.jpg", "cannot be read: No such file or directory")


def test_members_of_one_name_in_an_archive_are_inputs_of_their_own(tmp_path: Path) -> None:
    for kind in ("tar", "zip"):
        archive = tmp_path / f"twice.{kind}"
        with tarfile.open(archive, "w") if kind == "tar" else zipfile.ZipFile(archive, "w") as file:
            for seed in (1, 2):
                if isinstance(file, tarfile.TarFile):
                    info = tarfile.TarInfo("real/a.jpg")
                    info.size = len(jpeg(seed))
                    file.addfile(info, io.BytesIO(jpeg(seed)))
                else:
                    with pytest.warns(UserWarning, match="Duplicate") if seed == 2 else nullcontext():
                        file.writestr("real/a.jpg", jpeg(seed))
        found = samples(FolderSource(path=str(archive)))
        assert [s.path for s in found] == ["real/a.jpg", "real/a.jpg#2"]
        assert [s.image for s in found] == [jpeg(1), jpeg(2)]


# -- procedural faces -----------------------------------------------------------------------------------------------


def test_faces_are_the_same_bytes_in_any_order_and_process() -> None:
    source = SyntheticSource(identities=2, per_identity=2, size=64, seed=7)
    first, again = samples(source), samples(source)
    assert [s.id for s in first] == [s.id for s in again]
    assert source.sample(1, 1).id == first[3].id
    assert len({s.id for s in first}) == 4
    assert samples(SyntheticSource(identities=1, per_identity=1, size=64, seed=8))[0].id != first[0].id


def test_the_renderer_has_not_changed() -> None:
    """A change here is a new population of faces: datasets and figures made before it are no longer comparable."""
    luma = portrait(0, 3, 0, 64).pixels.mean(2)
    means = luma.reshape(4, 16, 4, 16).mean((1, 3))
    assert np.abs(means - GOLDEN).max() < 2.0, means.round(1).tolist()


def test_every_face_has_its_ground_truth() -> None:
    for sample in samples(SyntheticSource(identities=10, per_identity=2, size=96)):
        x, y, w, h = sample.face_box or (0, 0, 0, 0)
        assert x >= 0
        assert y >= 0
        assert x + w <= 96
        assert y + h <= 96
        assert 0.25 * 96 < w < 0.75 * 96
        points = np.array(sample.landmarks).reshape(5, 2)
        assert ((points > (x - 1, y - 1)) & (points < (x + w + 1, y + h + 1))).all()
        left_eye, right_eye, nose, left_mouth, right_mouth = points
        assert left_eye[0] < right_eye[0]
        assert left_mouth[0] < right_mouth[0]
        assert left_eye[1] < nose[1] < left_mouth[1] + 5
        assert sample.face_method == "synthetic"
        assert sample.fake == 0
        assert {"yaw", "smile", "format"} <= set(sample.attributes)


def test_the_mask_covers_the_face_and_nothing_else() -> None:
    for person in range(8):
        made = portrait(3, person, 0)
        inside = made.face_mask > 127
        x, y, w, h = made.face_box
        rows, columns = np.nonzero(inside)
        assert 0.3 * w * h < inside.sum() < 1.2 * w * h
        assert abs(columns.mean() - (x + w / 2)) < 0.12 * w
        assert abs(rows.mean() - (y + h / 2)) < 0.18 * h
        nose = made.landmarks[2]
        assert inside[int(nose[1]), int(nose[0])]


def test_pictures_of_one_person_are_closer_than_pictures_of_two() -> None:
    """Colour inside the face mask: same person in two lights against another person."""

    def colour(person: int, picture: int) -> np.ndarray:
        made = portrait(11, person, picture)
        return made.pixels[made.face_mask > 200].mean(0)

    means = np.array([[colour(person, picture) for picture in range(4)] for person in range(10)])
    within = np.linalg.norm(means - means.mean(1, keepdims=True), axis=2).mean()
    between = np.linalg.norm(means.mean(1) - means.mean((0, 1)), axis=1).mean()
    assert between > 1.5 * within


def test_the_shot_of_another_person_changes_the_face_and_keeps_the_scene() -> None:
    original, swapped = portrait(3, 0, 0), portrait(3, 4, 0, shot_of=0)
    corner = (slice(0, 12), slice(0, 12))
    assert (original.pixels[corner] == swapped.pixels[corner]).all()
    face = original.face_mask > 200
    assert np.abs(original.pixels[face].astype(int) - swapped.pixels[face]).mean() > 8
    drift = np.abs(np.array(original.landmarks) - swapped.landmarks)
    assert drift.max() < 10


@pytest.mark.parametrize("size", [16, 33, 64, 200])
def test_any_size_renders(size: int) -> None:
    made = portrait(0, 3, 1, size)
    assert made.pixels.shape == (size, size, 3)
    assert made.face_mask.shape == (size, size)


def test_formats_and_qualities_vary_like_uploads() -> None:
    found = samples(SyntheticSource(identities=40, per_identity=1, size=32, png_share=0.3))
    kinds = Counter(media.sniff(s.image or b"") for s in found)
    assert 4 <= kinds["png"] <= 22
    assert len({s.attributes.get("quality") for s in found}) > 8


def test_another_range_of_people_is_disjoint() -> None:
    first = samples(SyntheticSource(identities=3, per_identity=1, size=32))
    later = samples(SyntheticSource(identities=3, per_identity=1, size=32, first_identity=3))
    assert not {s.identity for s in first} & {s.identity for s in later}


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="identities"):
        SyntheticSource(identities=0)
    with pytest.raises(ConfigError, match="quality"):
        SyntheticSource(quality=(90, 80))


# -- folders and archives -------------------------------------------------------------------------------------------


def test_labels_makers_and_splits_come_from_folders(tmp_path: Path) -> None:
    write(tmp_path, "real/a.jpg", "fake/b.jpg", "fake/stylegan/c.jpg", "Fake/deep/er/d.jpg")
    found = {s.path: (s.fake, s.maker) for s in samples(FolderSource(path=str(tmp_path), maker="someone"))}
    assert found == {
        "real/a.jpg": (0, "camera"),
        "fake/b.jpg": (1, "someone"),
        "fake/stylegan/c.jpg": (1, "stylegan"),
        "Fake/deep/er/d.jpg": (1, "deep"),
    }


def test_split_folders_above_labels_are_kept(tmp_path: Path) -> None:
    write(tmp_path, "train/REAL/a.jpg", "test/FAKE/b.jpg", "val/real/c.jpg")
    found = {s.path: (s.fake, s.split) for s in samples(FolderSource(path=str(tmp_path)))}
    assert found == {
        "train/REAL/a.jpg": (0, "train"),
        "test/FAKE/b.jpg": (1, "test"),
        "val/real/c.jpg": (0, "validation"),
    }


def test_folders_of_people_give_identities(tmp_path: Path) -> None:
    write(tmp_path, "ann/1.jpg", "ann/2.jpg", "ben/1.jpg")
    found = samples(FolderSource(path=str(tmp_path), fake=0))
    assert [(s.identity, s.fake) for s in found] == [("ann", 0), ("ann", 0), ("ben", 0)]


def test_a_flat_folder_takes_the_label_of_its_settings(tmp_path: Path) -> None:
    write(tmp_path, "b.jpg", "a.jpg")
    found = samples(FolderSource(path=str(tmp_path), fake=1, maker="dalle"))
    assert [(s.path, s.fake, s.maker, s.identity) for s in found] == [
        ("a.jpg", 1, "dalle", None),
        ("b.jpg", 1, "dalle", None),
    ]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    write(tmp_path, "real/a.jpg", "fake/b.jpg", "elsewhere/c.jpg", ".hidden/d.jpg", "real/.e.jpg")
    (tmp_path / "fake" / "link.jpg").symlink_to("/etc/hostname")
    big = tmp_path / "fake" / "big.jpg"
    with open(big, "wb") as file:
        os.truncate(file.fileno(), media.DEFAULT_LIMITS.image_bytes + 1)
    items = list(FolderSource(path=str(tmp_path)).samples())
    skipped = {item.path: item.reason for item in items if isinstance(item, Skipped)}
    assert len(items) == 7
    assert {skipped[".hidden/"], skipped["real/.e.jpg"]} == {listing.HIDDEN}
    assert skipped["elsewhere/c.jpg"] == "lies in no folder called real or fake"
    assert skipped["fake/link.jpg"] == "not a plain file"
    assert skipped["fake/big.jpg"].startswith("larger than")


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_an_archive_reads_like_its_folder(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "in", "fake/x.jpg", "real/y.jpg")
    archive = tmp_path / f"pictures.{kind}"
    names = ("fake/x.jpg", "real/y.jpg")
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            [file.write(folder / name, name) for name in names]
    else:
        with tarfile.open(archive, "w:gz") as file:
            [file.add(folder / name, f"./{name}") for name in names]
    packed, plain = (samples(FolderSource(path=str(p))) for p in (archive, folder))
    assert [(s.id, s.path, s.fake) for s in packed] == [(s.id, s.path, s.fake) for s in plain]


def test_archive_members_that_are_no_plain_files_are_skipped(tmp_path: Path) -> None:
    archive = tmp_path / "odd.tar"
    with tarfile.open(archive, "w") as file:
        link = tarfile.TarInfo("real/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
        data = jpeg()
        info = tarfile.TarInfo("real/good.jpg")
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
    items = list(FolderSource(path=str(archive)).samples())
    assert [type(item) for item in items] == [Skipped, Sample]


def test_a_cut_archive_and_a_plain_file_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", *[f"real/{i}.jpg" for i in range(40)])
    archive = tmp_path / "cut.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, ".")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match="damaged"):
        list(FolderSource(path=str(archive)).samples())
    with pytest.raises(ConfigError, match="neither a folder nor"):
        list(FolderSource(path=str(folder / "real" / "1.jpg")).samples())


def test_an_empty_folder_gives_nothing(tmp_path: Path) -> None:
    assert list(FolderSource(path=str(tmp_path)).samples()) == []


def test_whatever_lies_in_a_folder_is_an_input_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path, "real/a.jpg", "real/.DS_Store", "real/thumbs.DB", "fake/desktop.ini", ".git/objects/1.jpg"
    )
    write(tmp_path, "fake/__MACOSX/._b.jpg", "locked/c.jpg", "fake/ünï cödé/b b.jpg")
    (tmp_path / "fake" / "linked").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "fake" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "fake" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fake" / "pipe.jpg")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = FolderSource(path=str(tmp_path))
    items = list(source.samples())
    assert [item.path for item in items] == list(source.names())
    assert {item.path for item in items if isinstance(item, Sample)} == {
        "real/a.jpg",
        "fake/ünï cödé/b b.jpg",
    }
    skipped = {item.path: item.reason for item in items if isinstance(item, Skipped)}
    hidden = ["real/.DS_Store", "real/thumbs.DB", "fake/desktop.ini", ".git/", "fake/__MACOSX/"]
    assert skipped == dict.fromkeys(hidden, listing.HIDDEN) | {
        "fake/linked/": listing.LINKED, "fake/loop/": listing.LINKED,
        "fake/broken.jpg": "not a plain file", "fake/pipe.jpg": "not a plain file",
        "locked/": "a folder that cannot be read: Permission denied",
    }  # fmt: skip


def test_hidden_members_of_an_archive_are_set_aside_like_hidden_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "real/a.jpg", "__MACOSX/real/._a.jpg", ".DS_Store")
    names = ("real/a.jpg", "__MACOSX/real/._a.jpg", ".DS_Store")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        [packed.write(folder / name, name) for name in names]
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        [file.add(folder / name, f"./{name}") for name in names]
    for archive in ("x.zip", "x.tar"):
        source = FolderSource(path=str(tmp_path / archive))
        picture, *rest = source.settled(list(source.names())).samples()
        assert (picture.path, picture.fake) == ("real/a.jpg", 0)  # type: ignore[union-attr]
        assert rest == [Skipped(name, listing.HIDDEN) for name in names[1:]]


# -- idx ------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(root: Path, count: int = 5) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8)
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (root / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (root / "t10k-images-idx3-ubyte.xz").write_bytes(lzma.compress(idx(images[:2])))
    (root / "t10k-labels.idx1-ubyte").write_bytes(idx(labels[:2]))
    return images


def test_idx_files_give_pixels_classes_and_splits(tmp_path: Path) -> None:
    images = write_mnist(tmp_path)
    found = samples(IdxSource(path=str(tmp_path)))
    assert [(s.split, s.class_id) for s in found] == [
        *[("train", i) for i in range(5)],
        ("test", 0),
        ("test", 1),
    ]
    assert found[3].pixels is not None
    assert (found[3].pixels[:, :, 0] == images[3]).all()
    assert len(samples(IdxSource(path=str(tmp_path), limit=1))) == 2
    assert len(samples(IdxSource(path=str(tmp_path), test=False))) == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3], "should hold"),
        (lambda data: data + b"x", "found more"),
        (lambda data: b"\x1f\x8b" + data, "no idx file"),
    ],
    ids=["short", "long", "foreign"],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, damage: object, message: str) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        list(IdxSource(path=str(tmp_path)).samples())


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="train-images-idx3-ubyte"):
        list(IdxSource(path=str(tmp_path)).samples())


# -- npz ------------------------------------------------------------------------------------------------------------


def test_packed_jpegs_keep_their_exact_bytes(tmp_path: Path) -> None:
    files = [jpeg(i) for i in range(4)]
    offsets = np.cumsum([0, *map(len, files)])
    names = np.array([b"train/FAKE/1.jpg", b"train/REAL/1.jpg", b"test/FAKE/2.jpg", b"test/REAL/2.jpg"])
    path = tmp_path / "set.npz"
    np.savez(
        path, jpeg_bytes=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, name=names,
        is_fake=np.array([True, False, True, False]), cifar_class=np.arange(4, dtype=np.uint8),
    )  # fmt: skip
    found = samples(NpzSource(path=str(path), maker="sd-1.4"))
    assert [s.image for s in found] == files
    assert [(s.fake, s.maker, s.class_id, s.split) for s in found] == [
        (1, "sd-1.4", 0, None), (0, "camera", 1, None), (1, "sd-1.4", 2, "test"), (0, "camera", 3, "test"),
    ]  # fmt: skip
    assert len(samples(NpzSource(path=str(path), limit=2))) == 2


def test_packed_grey_images_become_lossless_pictures_of_people(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 18), dtype=np.uint8)
    path = tmp_path / "faces.npz"
    np.savez(path, images=images, person=np.array([0, 0, 7], np.uint8))
    found = samples(NpzSource(path=str(path), name="orl", fake=0))
    assert [s.identity for s in found] == ["orl-000", "orl-000", "orl-007"]
    assert (media.decode(found[2].image or b"")[:, :, 0] == images[2]).all()


def test_a_foreign_or_lying_npz_is_refused(tmp_path: Path) -> None:
    other, lying, pickled, cut = (tmp_path / name for name in ("o.npz", "l.npz", "p.npz", "c.npz"))
    np.savez(other, stuff=np.zeros(3))
    np.savez(lying, jpeg_bytes=np.zeros(10, np.uint8), offsets=np.array([0, 5, 50]))
    np.savez(pickled, images=np.array([{"a": 1}], dtype=object))
    cut.write_bytes(other.read_bytes()[:40])
    for path, message in (
        (other, "expected jpeg_bytes"),
        (lying, "do not cut"),
        (pickled, "pickles"),
        (cut, "no readable"),
    ):
        with pytest.raises(DataError, match=message):
            list(NpzSource(path=str(path)).samples())


# -- parquet --------------------------------------------------------------------------------------------------------


def write_parquet(
    path: Path,
    labels: list[Any],
    *,
    images: list[Any] | None = None,
    names: list[str] | None = None,
    **options: Any,
) -> Path:
    """A file as `datasets` writes it: column image {bytes, path} and column label, a ClassLabel if it has names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = len(str(path))
    images = images or [{"bytes": jpeg(seed + i), "path": f"{i}.jpg"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels, "who": [f"p{i % 2}" for i in range(len(labels))]})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def test_a_hugging_face_file_gives_labels_people_and_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "test-00000-of-00002.parquet", [0, 1, 1], names=["FAKE", "REAL"])
    source = ParquetSource(
        path=str(tmp_path), label_column="label", maker="sd", identity_column="who", name="hf"
    )
    found = samples(source)
    assert [(s.fake, s.maker, s.identity, s.split) for s in found] == [
        (1, "sd", "hf-p0", "test"), (0, "camera", "hf-p1", "test"), (0, "camera", "hf-p0", "test"),
    ]  # fmt: skip
    assert found[0].path == "data/test-00000-of-00002.parquet#0"
    assert media.decode(found[0].image or b"").shape == (32, 32, 3)


def test_a_file_that_datasets_wrote_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["real", "fake"])}
    )
    rows = {"image": [{"bytes": jpeg(i), "path": None} for i in range(4)], "label": [0, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    found = samples(ParquetSource(path=str(tmp_path / "train.parquet"), label_column="label"))
    assert [(s.fake, s.split, s.image) for s in found] == [
        (label, "train", jpeg(i)) for i, label in enumerate([0, 1, 1, 0])
    ]


def test_plain_bytes_and_a_label_for_all_are_enough(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [5, 6], images=[jpeg(1), jpeg(2)])
    found = samples(ParquetSource(path=str(path), fake=1, class_column="label"))
    assert [(s.path, s.fake, s.maker, s.class_id, s.image) for s in found] == [
        ("x.parquet#0", 1, "unknown", 5, jpeg(1)), ("x.parquet#1", 1, "unknown", 6, jpeg(2)),
    ]  # fmt: skip


def test_rows_without_bytes_or_a_known_label_are_skipped_by_name(tmp_path: Path) -> None:
    images = [{"bytes": jpeg(0), "path": "a"}, {"bytes": None, "path": "/etc/passwd"}, None]
    path = write_parquet(tmp_path / "x.parquet", ["fake", "real", "real"], images=images)
    items = list(ParquetSource(path=str(path), label_column="label", labels={"real": 0}).samples())
    assert items == [
        Skipped("x.parquet#0", "label fake is neither real nor fake: name it in source.labels"),
        Skipped("x.parquet#1", "holds no bytes"),
        Skipped("x.parquet#2", "holds no bytes"),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_column": "picture"},
            r"no column 'picture'; it has image, label, who: set source\.image_column",
        ),
        ({"label_column": "y"}, r"set source\.label_column"),
        ({"image_column": "label"}, "holds int64, expected bytes"),
    ],
    ids=["missing", "label", "type"],
)
def test_a_foreign_table_is_refused_in_one_line(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "x.parquet", [0, 1])
    with pytest.raises(DataError, match=message):
        list(ParquetSource(path=str(tmp_path), **settings).samples())  # type: ignore[arg-type]


def test_what_is_no_parquet_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [0, 1])
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[: len(whole) // 2], b"ARROW1" + whole[6:-4] + b"RROW"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"is no readable parquet file: .*; fetch it again") as caught:
            list(ParquetSource(path=str(path)).samples())
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        list(ParquetSource(path=str(tmp_path / "empty")).samples())
    with pytest.raises(ConfigError, match=r"source\.labels"):
        ParquetSource(labels={"a": 2})


def test_a_broken_file_beside_whole_ones_is_one_skip(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", [0, 1]).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    write_parquet(tmp_path / "c.parquet", [])
    write(tmp_path, "README.md", ".gitattributes", "a#7")
    source = ParquetSource(path=str(tmp_path), fake=0)
    assert source.divisible
    items = list(source.samples())
    assert [item.path for item in items] == list(source.names())
    assert {item.path: item.reason for item in items if isinstance(item, Skipped)} == {
        "b.parquet": sources.parquet.DAMAGED, "c.parquet": "holds no rows", "README.md": listing.BESIDE,
        ".gitattributes": listing.HIDDEN, "a#7": listing.BESIDE,
    }  # fmt: skip
    assert [item.path for item in items if isinstance(item, Sample)] == ["a.parquet#0", "a.parquet#1"]


def test_rows_behind_a_damaged_page_are_skipped_by_name(tmp_path: Path) -> None:
    images = [np.random.default_rng(i).bytes(4000) for i in range(6)]
    path = write_parquet(
        tmp_path / "a.parquet",
        [0] * 6,
        images=images,
        row_group_size=2,
        compression="zstd",
        use_dictionary=False,
    )
    data = bytearray(path.read_bytes())
    at = data.find(images[2][:64])  # noise is stored as it is
    data[at - 40 : at + 4000] = b"\xff" * 4040
    path.write_bytes(data)
    items = list(ParquetSource(path=str(tmp_path), fake=0).samples())
    assert [item.path for item in items] == [f"a.parquet#{row}" for row in range(6)]
    kinds = [type(item) for item in items]
    assert kinds == [Sample] * 2 + [Skipped] * 4
    assert {item.reason for item in items if isinstance(item, Skipped)} == {sources.parquet.DAMAGED}


def test_a_file_of_huge_row_groups_is_read_from_front_to_back(tmp_path: Path) -> None:
    rows = sources.parquet.GROUP_ROWS + 1
    write_parquet(tmp_path / "x.parquet", [0] * rows, images=[b""] * rows)
    assert not ParquetSource(path=str(tmp_path)).divisible
    write_parquet(tmp_path / "x.parquet", [0] * rows, images=[b""] * rows, row_group_size=1000)
    assert ParquetSource(path=str(tmp_path)).divisible


# -- known layouts --------------------------------------------------------------------------------------------------


def test_ciplab_names_are_understood(tmp_path: Path) -> None:
    write(
        tmp_path, "training_fake/easy_100_1010.jpg", "training_real/real_00001.jpg", "training_real/notes.jpg"
    )
    items = list(CiplabSource(path=str(tmp_path)).samples())
    fake, odd, real = items
    assert isinstance(fake, Sample)
    assert (fake.fake, fake.maker) == (1, "photoshop")
    assert fake.attributes == {"difficulty": "easy", "edited": ["left_eye", "nose"]}
    assert isinstance(real, Sample)
    assert (real.fake, real.maker, real.attributes) == (0, "camera", {})
    assert isinstance(odd, Skipped)


def test_the_real_sets_read_completely(shared_data: Path) -> None:
    mnist = IdxSource(path=str(shared_data / "mnist"), limit=50)
    assert len(samples(mnist)) == 100
    stylegan = samples(
        FolderSource(path=str(shared_data / "stylegan_ffhq" / "images.tar.gz"), maker="stylegan")
    )
    assert min(Counter(s.fake for s in stylegan).values()) > 600
    orl = samples(NpzSource(path=str(shared_data / "orl_faces" / "orl_faces.npz"), name="orl", fake=0))
    assert Counter(Counter(s.identity for s in orl).values()) == {10: 40}
    cifake = samples(NpzSource(path=str(shared_data / "cifake" / "cifake.npz"), limit=400))
    assert all(hashlib.sha256(s.image or b"").hexdigest() == s.id for s in cifake)
