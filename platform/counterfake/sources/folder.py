"""Pictures in a folder or an archive, labelled by where they lie.

real/…  fake/…            label by folder; fake/MAKER/… names what made them
train/real/…  test/fake/… the same under a split
PERSON/…                  one folder per person (layout "identities")
…                         anything else (layout "flat"): the label is the setting `fake`
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Literal, Self

from counterfake.errors import ConfigError, DataError
from counterfake.media import DEFAULT_LIMITS
from counterfake.sources import Sample, Skipped, SourceConfig, unique
from counterfake.sources.listing import HIDDEN, is_litter, listed, refusal

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

    def names(self) -> Iterator[str]:
        """In order of their paths (archives: in the order they were packed)."""
        yield from archive_names(self.located())

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        path, layout = self.located(), self.layout
        if layout == "auto":
            layout = self._layout(list(self.names()))
        for name, content in read_files(path, names):
            yield Skipped(name, content) if isinstance(content, str) else self._sample(name, content, layout)

    @property
    def divisible(self) -> bool:
        return is_divisible(self.located())

    def settled(self, names: Sequence[str]) -> Self:
        return dataclasses.replace(self, layout=self._layout(names)) if self.layout == "auto" else self

    def _layout(self, names: Sequence[str]) -> Layout:
        folders = [_without_split(name)[:-1] for name in names if not is_litter(name)]
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


def archive_names(path: Path) -> Iterator[str]:
    """The name of every file of a folder or archive, hidden ones too; a file's second of the same name ends in #2. Reads no
    content. A folder that is not entered is a name as well (see `listed`)."""
    if path.is_dir():
        yield from listed(path)
    elif zipfile.is_zipfile(path):
        with _open_zip(path) as archive:
            yield from unique(info.filename for info in archive.infolist() if not info.is_dir())
    elif tarfile.is_tarfile(path):
        with _open_tar(path) as archive:
            yield from unique(_tar_name(info) for info in archive if not info.isdir())
    else:
        raise ConfigError(f"{path} is neither a folder nor a .tar, .tar.gz or .zip archive")


def read_files(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes | str]]:
    """(name, bytes) of these files of a folder or archive; (name, reason) for one that is not read."""
    if path.is_dir():
        yield from ((name, refusal(path, name) or _read_file(path / name)) for name in names)
    elif zipfile.is_zipfile(path):
        yield from _read_zip(path, names)
    else:
        yield from _read_tar(path, set(names))


def is_divisible(path: Path) -> bool:
    """Whether a few files can be read without passing over the others: not in a .tar, which has no index."""
    return path.is_dir() or zipfile.is_zipfile(path)


# -- private --------------------------------------------------------------------------------------------------------


def _label(folder: str) -> int | None:
    return 0 if folder.lower() in REAL else 1 if folder.lower() in FAKE else None


def _without_split(name: str) -> list[str]:
    parts = name.split("/")
    return parts[1:] if len(parts) > 1 and parts[0].lower() in SPLITS else parts


def _read_file(file: Path) -> bytes | str:
    """The file's bytes, or why it is not read. Never waits: a pipe or device is no plain file."""
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "not a plain file"
        return file.read_bytes() if status.st_size <= LIMIT else _too_large()
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _too_large() -> str:
    return f"larger than {LIMIT:,} bytes"


def _read_tar(path: Path, wanted: Set[str]) -> Iterator[tuple[str, bytes | str]]:
    with _open_tar(path) as archive:
        members = (info for info in archive if not info.isdir())
        named, counted = itertools.tee(members)
        for info, name in zip(named, unique(_tar_name(info) for info in counted), strict=True):
            if name in wanted:
                yield name, HIDDEN if is_litter(name) else _read_member(archive, info)


def _read_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | str:
    if info.size > LIMIT:
        return _too_large()
    content = archive.extractfile(info) if info.isreg() else None
    return content.read() if content is not None else "not a plain file"


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DataError(f"archive {path} is damaged: {error}; fetch it again") from error


def _tar_name(info: tarfile.TarInfo) -> str:
    return info.name.removeprefix("./")


def _read_zip(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes | str]]:
    with _open_zip(path) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
        found = dict(zip(unique(info.filename for info in files), files, strict=True))
        for name in names:
            yield name, HIDDEN if is_litter(name) else _unzipped(archive, found[name])


def _unzipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes | str:
    if info.file_size > LIMIT:
        return _too_large()
    try:
        with archive.open(info) as file:
            return file.read(LIMIT + 1)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, OSError) as error:
        return f"cannot be unpacked: {type(error).__name__}"


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise DataError(f"archive {path} is damaged: {error}; fetch it again") from error
