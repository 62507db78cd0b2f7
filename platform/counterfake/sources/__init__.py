"""Media on disk, or made up, to samples: one file per layout. A source finds, names and labels; it decodes nothing it can leave.

A source names its inputs (files, mostly) without opening them, and reads any of them by name: every input ends as
`Sample`s or as `Skipped` with the reason, so that the counts of an ingest add up, and many workers can share one source.
A file added to this folder is imported here by itself, so that `config.from_dict(SourceConfig, ...)` finds its members.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import hashlib
import importlib
import os
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from counterfake.config import Family
from counterfake.errors import ConfigError, NotFoundError
from counterfake.samples import Sample, Skipped
from counterfake.sources.listing import listed

__all__ = ["Consent", "Sample", "Skipped", "SourceConfig", "unique"]

Consent = Literal["", "research", "subjects", "synthetic", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Family, abc.ABC):
    """What every source has: where it lies, what it is called, and what may be done with it."""

    path: str = ""  # file or folder; "" = must be set
    name: str = ""  # stored with every sample; "" = the kind of source
    licence: str = ""  # SPDX name or a sentence; required at ingest unless the source is synthetic
    consent: Consent = ""  # of the people shown: research | subjects | synthetic | none

    part_inputs: ClassVar[int] = (
        256  # inputs that an ingest reads at a time: the unit of resuming and sharing
    )

    @abc.abstractmethod
    def names(self) -> Iterator[str]:
        """Every input, each under a name of its own, in an order that depends on nothing but the content. Opens none."""

    @abc.abstractmethod
    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        """The rows of these inputs in the order of `names`, those of one input in one run, each with it as its `path`.

        `names` are some of `names()`, in that order."""

    @property
    def divisible(self) -> bool:
        """False if reading a few names costs as much as reading all of them (a compressed archive)."""
        return True

    def samples(self) -> Iterator[Sample | Skipped]:
        """Everything the source holds."""
        return self.read(list(self.names()))

    def settled(self, names: Sequence[str]) -> Self:
        """The same source with nothing left to find out from all of its `names`, so that parts read alike."""
        return self

    def stamp(self) -> str:
        """Digest of the names, sizes and times of the files: another one where an input may have changed."""
        found = hashlib.sha256()
        for file in _files(Path(self.path).expanduser()) if self.path else ():
            try:
                status = os.lstat(file)
            except OSError:  # gone since it was listed
                continue
            found.update(f"{os.fsencode(file)!r} {status.st_size} {status.st_mtime_ns}\n".encode())
        return found.hexdigest()

    @property
    def label(self) -> str:
        """The name stored with every sample."""
        return self.name or type(self).__name__.removesuffix("Source").lower()

    def located(self) -> Path:
        """`path` if it exists; otherwise ConfigError or NotFoundError saying what to set."""
        if not self.path:
            raise ConfigError(
                f"{type(self).__name__} reads files of yours: say where with --set source.path=PATH"
            )
        path = Path(self.path).expanduser()
        if not path.exists():
            raise NotFoundError(f"{path} does not exist; set source.path to the {type(self).__name__} files")
        return path


def unique(names: Iterable[str]) -> Iterator[str]:
    """The names, the second of the same name as NAME#2: an archive may hold one name several times."""
    seen: collections.Counter[str] = collections.Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


# -- private --------------------------------------------------------------------------------------------------------


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or all that `listed` finds below the folder, in one order."""
    if path.is_dir():
        yield from (path / name for name in listed(path))
    else:
        yield path


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
