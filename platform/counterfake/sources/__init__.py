"""Media on disk, or made up, to samples: one file per layout. A source finds, names and labels; it decodes nothing it can leave.

A source yields every file it meets exactly once, as a `Sample` or as `Skipped` with the reason, so that the counts of
an ingest add up. A file added to this folder is imported here by itself, so that `config.from_dict(SourceConfig, ...)`
finds its members.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from counterfake.config import Family
from counterfake.errors import ConfigError, NotFoundError
from counterfake.records import Sample, Skipped

__all__ = ["Consent", "Sample", "Skipped", "SourceConfig"]

Consent = Literal["", "research", "subjects", "synthetic", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Family, abc.ABC):
    """What every source has: where it lies, what it is called, and what may be done with it."""

    path: str = ""  # file or folder; "" = must be set
    name: str = ""  # stored with every sample; "" = the kind of source
    licence: str = ""  # SPDX name or a sentence; required at ingest unless the source is synthetic
    consent: Consent = ""  # of the people shown: research | subjects | synthetic | none

    @abc.abstractmethod
    def samples(self) -> Iterator[Sample | Skipped]:
        """Everything the source holds, in an order that depends on nothing but its content."""

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


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
