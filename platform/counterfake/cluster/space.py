"""A search space over dotted configuration paths, checked before anything starts. Knows no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from counterfake.config import override
from counterfake.errors import ConfigError

T = TypeVar("T")

KINDS = {
    "log": "[low, high] above 0",
    "uniform": "[low, high]",
    "int": "[low, high]",
    "choice": "[a, b, ...]",
}


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """{dotted path: {"log": [low, high]} | {"uniform": [low, high]} | {"int": [low, high]} | {"choice": [a, b]}}.

    "log" and "uniform" draw real numbers, "int" whole ones with both ends included."""

    settings: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not self.settings:
            raise ConfigError(
                "the search space is empty; give at least one path, like learner.lr: {log: [1e-5, 1e-2]}"
            )
        for path, domain in self.settings.items():
            _check(path, domain)

    @classmethod
    def from_file(cls, path: str | Path) -> SearchSpace:
        """A space from a YAML file: one line per path, `learner.lr: {log: [1e-5, 1e-2]}`."""
        try:
            tree = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"search space {path} cannot be read: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"search space {path} does not parse: {str(error).splitlines()[0]}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"search space {path} must hold lines like `learner.lr: {{log: [1e-5, 1e-2]}}`")
        return cls(settings={str(name): domain for name, domain in tree.items()})

    @property
    def logarithmic(self) -> tuple[str, ...]:
        """Paths that are drawn on a logarithmic scale."""
        return tuple(path for path, domain in self.settings.items() if "log" in domain)

    def kind(self, path: str) -> tuple[str, list[Any]]:
        """("log", [low, high]) of a path; numbers that YAML left as text ("1e-5") are numbers here."""
        ((kind, values),) = self.settings[path].items()
        if kind == "choice":
            return kind, list(values)
        return kind, [int(v) if kind == "int" else float(v) for v in values]

    def check(self, base: T) -> None:
        """Raises ConfigError unless the lowest and highest corner and every choice make a valid configuration of `base`."""
        for _ in self.corners(base):
            pass

    def corners(self, base: T) -> Iterator[T]:
        """`base` in the lowest and the highest corner of the space, and with every choice."""
        corner = {path: self.kind(path)[1][0] for path in self.settings}
        yield override(base, corner)
        yield override(base, {path: self.kind(path)[1][-1] for path in self.settings})
        for path in self.settings:
            kind, values = self.kind(path)
            for value in values if kind == "choice" else ():
                yield override(base, {**corner, path: value})

    def within(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with every number brought back into its domain."""
        found = dict(settings)
        for path in self.settings:
            kind, values = self.kind(path)
            if kind != "choice":
                value = min(max(found[path], values[0]), values[-1])
                found[path] = round(value) if kind == "int" else float(value)
        return found


# -- private --------------------------------------------------------------------------------------------------------


def _check(path: str, domain: Any) -> None:
    known = "; ".join(f"{kind}: {form}" for kind, form in KINDS.items())
    if not isinstance(domain, Mapping) or len(domain) != 1 or next(iter(domain)) not in KINDS:
        raise ConfigError(f"search space {path}: {domain!r} is no domain; use one of {known}")
    ((kind, values),) = domain.items()
    if not isinstance(values, list | tuple) or not values:
        raise ConfigError(f"search space {path}.{kind} must be {KINDS[kind]}, got {values!r}")
    if kind == "choice":
        return
    try:
        low, high = (float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"search space {path}.{kind} must be {KINDS[kind]}, got {list(values)!r}"
        ) from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (kind == "log" and low <= 0):
        raise ConfigError(
            f"search space {path}.{kind} must be {KINDS[kind]} with low < high, got {list(values)!r}"
        )
    if kind == "int" and (low != int(low) or high != int(high)):
        raise ConfigError(f"search space {path}.int must be whole numbers, got {list(values)!r}")
