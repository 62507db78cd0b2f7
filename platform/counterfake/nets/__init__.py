"""Network architectures: one file each, a config dataclass with `build()` and `tiny()`. No losses, no paths, no training.

A file added to this folder is imported here by itself, so that `config.from_dict(NetConfig, ...)` finds its members.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from typing import Self

from torch import nn

from counterfake.config import Family


class NetConfig(Family, abc.ABC):
    """Settings of one architecture; subclasses are frozen keyword-only dataclasses."""

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """A new network on the CPU, initialised from torch's global random state."""

    @classmethod
    @abc.abstractmethod
    def tiny(cls) -> Self:
        """The same architecture, small enough for a unit test."""

    def without_weights(self) -> Self:
        """The config to store beside trained weights: it names no file that may be gone."""
        return self


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
