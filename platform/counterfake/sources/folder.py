"""Pictures in a folder or an archive, labelled by where they lie.

real/…  fake/…            label by folder; fake/MAKER/… names what made them
train/real/…  test/fake/… the same under a split
PERSON/…                  one folder per person (layout "identities")
…                         anything else (layout "flat"): the label is the setting `fake`
"""

from __future__ import annotations

import contextlib
import dataclasses
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from counterfake.errors import ConfigError, DataError
from counterfake.media import DEFAULT_LIMITS
from counterfake.records import Sample
from counterfake.sources import Skipped, SourceConfig

Layout = Literal["auto", "labels", "identities", "flat"]
REAL = ("real", "original", "originals", "genuine", "authentic", "0_real", "training_real")
FAKE = ("fake", "fakes", "manipulated", "generated", "synthetic", "1_fake", "training_fake")
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "calibration": "calibration", "test": "test", "testing": "test",
}  # fmt: skip
LIMIT = DEFAULT_LIMITS.image_bytes  # larger files are named and skipped, never read


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSource(SourceConfig):
    """Every file below a folder, or in a .tar, .tar.gz, .tar.xz or .zip archive. Kinds are decided by content."""

    layout: Layout = (
        "auto"  # auto: labels if folders are called real or fake, identities if all lie in folders, else flat
    )
    fake: int | None = None  # label of pictures whose folder does not say: 1 fake, 0 real, null unknown
    maker: str = ""  # what made the fakes when no folder says; "" = unknown

    def samples(self) -> Iterator[Sample | Skipped]:
        """In order of their paths (archives: in the order they were packed)."""
        path = self.located()
        layout = self._layout([name for name, _ in _names(path)]) if self.layout == "auto" else self.layout
        for name, content in read_all(path):
            yield Skipped(name, content) if isinstance(content, str) else self._sample(name, content, layout)

    def _layout(self, names: list[str]) -> Layout:
        folders = [_without_split(name)[:-1] for name in names]
        if any(part.lower() in REAL + FAKE for parts in folders for part in parts[:1]):
            return "labels"
        return "identities" if folders and all(folders) and len({f[0] for f in folders}) > 1 else "flat"

    def _sample(self, name: str, data: bytes, layout: Layout) -> Sample | Skipped:
        split = SPLITS.get(name.split("/")[0].lower()) if "/" in name else None
        *folders, _ = _without_split(name)
        fake, identity, maker = self.fake, None, self.maker
        if layout == "labels":
            fake = _label(folders[0]) if folders else None
            if fake is None:
                return Skipped(name, "lies in no folder called real or fake")
            maker = folders[1] if fake and len(folders) > 1 else maker
        elif layout == "identities":
            if not folders:
                return Skipped(name, "lies in no person's folder")
            identity = folders[0]
        return Sample(
            image=data,
            path=name,
            fake=fake,
            maker=(maker or "unknown") if fake else ("camera" if fake == 0 else maker or "unknown"),
            identity=identity,
            source=self.label,
            split=split,
        )


def read_all(path: Path) -> Iterator[tuple[str, bytes | str]]:
    """(name, bytes) of every file of a folder or archive; (name, reason) for one that is not read."""
    if path.is_dir():
        yield from _read_folder(path)
    elif zipfile.is_zipfile(path):
        yield from _read_zip(path)
    elif tarfile.is_tarfile(path):
        yield from _read_tar(path)
    else:
        raise ConfigError(f"{path} is neither a folder nor a .tar, .tar.gz or .zip archive")


# -- private --------------------------------------------------------------------------------------------------------


def _label(folder: str) -> int | None:
    return 0 if folder.lower() in REAL else 1 if folder.lower() in FAKE else None


def _without_split(name: str) -> list[str]:
    parts = name.split("/")
    return parts[1:] if len(parts) > 1 and parts[0].lower() in SPLITS else parts


def _names(path: Path) -> Iterator[tuple[str, bool]]:
    """(name, whether a plain file) without reading any content."""
    if path.is_dir():
        yield from ((str(file.relative_to(path).as_posix()), True) for file in _files(path))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from ((info.filename, True) for info in archive.infolist() if not info.is_dir())
    elif tarfile.is_tarfile(path):
        with _open_tar(path) as archive:
            yield from ((_tar_name(info), info.isreg()) for info in archive if not info.isdir())


def _files(folder: Path) -> list[Path]:
    """Everything below a folder that is not hidden, sorted; links to folders are not followed."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(root) / name
            for name in files
            if not name.startswith(".") and name not in ("Thumbs.db", "desktop.ini")
        ]
    return sorted(found)


def _read_folder(folder: Path) -> Iterator[tuple[str, bytes | str]]:
    for file in _files(folder):
        name = file.relative_to(folder).as_posix()
        try:
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode):
                yield name, "not a plain file"
            elif status.st_size > LIMIT:
                yield name, f"larger than {LIMIT:,} bytes"
            else:
                yield name, file.read_bytes()
        except OSError as error:
            yield name, f"cannot be read: {error.strerror}"


def _read_tar(path: Path) -> Iterator[tuple[str, bytes | str]]:
    with _open_tar(path) as archive:
        for info in archive:
            if info.isdir():
                continue
            content = archive.extractfile(info) if info.isreg() and info.size <= LIMIT else None
            if content is not None:
                yield _tar_name(info), content.read()
            else:
                yield _tar_name(info), f"larger than {LIMIT:,} bytes" if info.isreg() else "not a plain file"


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DataError(f"archive {path} is damaged: {error}; fetch it again") from error


def _tar_name(info: tarfile.TarInfo) -> str:
    return info.name.removeprefix("./")


def _read_zip(path: Path) -> Iterator[tuple[str, bytes | str]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.file_size > LIMIT:
                yield info.filename, f"larger than {LIMIT:,} bytes"
                continue
            try:
                with archive.open(info) as file:
                    yield info.filename, file.read(LIMIT + 1)
            except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, OSError) as error:
                yield info.filename, f"cannot be unpacked: {type(error).__name__}"
