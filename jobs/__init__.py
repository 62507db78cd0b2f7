"""What a user submits. A job is a module with a docstring, `PRESETS` and `run(job, workspace, *, console)`; nothing imports it.

The command finds jobs by walking this folder, so adding one means adding one file. In names `-` and `_` are the same.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from counterfake.errors import ConfigError

_PLUMBING = {
    "__main__", "auditing", "benchmarks", "consent", "console", "data_commands", "demo_report", "doctor", "evaluation_grid",
    "evaluation_page", "options", "signing", "studies", "submit", "swap_readers", "swap_studio", "training",
}  # fmt: skip  # no jobs


def names() -> list[str]:
    """Names of all jobs, as typed: `train-gan`, `ingest`, …"""
    found = (info.name for info in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found if name not in _PLUMBING)


def load(name: str) -> ModuleType:
    """The module of a job. ConfigError names the nearest job."""
    wanted = name.replace("_", "-")
    if wanted not in names():
        raise ConfigError(f"there is no job {name!r}; {_nearest(wanted, names())}")
    return importlib.import_module(f"{__name__}.{wanted.replace('-', '_')}")


def preset(module: ModuleType, name: str | None) -> Any:
    """The job dataclass of a preset. Without a name: the only one there is, or the one the module calls USUAL."""
    presets: dict[str, Any] = {key.replace("_", "-"): make for key, make in module.PRESETS.items()}
    job = module.__name__.rpartition(".")[2].replace("_", "-")
    if name is None:
        usual = getattr(module, "USUAL", "")
        if len(presets) > 1 and not usual:
            raise ConfigError(f"{job} has several presets, name one: {', '.join(presets)}")
        name = usual or next(iter(presets))
    wanted = name.replace("_", "-")
    if wanted not in presets:
        raise ConfigError(f"{job} has no preset {name!r}; {_nearest(wanted, list(presets))}")
    return presets[wanted]()


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? It has {', '.join(known)}" if near else f"there are {', '.join(known)}"
