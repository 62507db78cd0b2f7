"""Frozen dataclasses as configuration: dotted overrides, plain dicts, JSON, digests.

A configuration is a tree of frozen keyword-only dataclasses. One `override(job, {"learner.g_lr": 1e-4})` serves the
command line, a settings file and Tune's search space; all changes apply at once, so fields that depend on each other
can change together. A field typed with a `Family` base takes any of its subclasses and is stored with its `kind`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from counterfake.errors import ConfigError

T = TypeVar("T")


class Family:
    """Base of a family of configurations: a field typed with it takes any subclass, stored as {"kind": name, ...}."""

    @classmethod
    def members(cls) -> dict[str, type[Any]]:
        """Every concrete dataclass of the family that has been imported, by class name."""
        found: dict[str, type[Any]] = {}
        for child in cls.__subclasses__():
            if dataclasses.is_dataclass(child):
                found[child.__name__] = child
            found.update(child.members())
        return found


def override(config: T, changes: Mapping[str, Any]) -> T:
    """A copy of `config` with every dotted path of `changes` set, all at once.

    Values may be text as typed on a command line ("1e-4", "true", "[1, 2]"). Raises ConfigError for an unknown path
    (naming the nearest one), a wrong type, or values the dataclass itself refuses.
    """
    if not changes:
        return config
    tree = to_dict(config)
    for path in sorted(changes, key=lambda p: (p.count("."), not p.endswith("kind"))):
        _set(tree, path.split("."), changes[path], type(config).__name__, path)
    return from_dict(type(config), tree)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-able dict of a configuration; members of a Family carry their `kind`."""
    result = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return {"kind": type(config).__name__, **result} if isinstance(config, Family) else result


def from_dict(cls: type[T], tree: Mapping[str, Any], path: str = "") -> T:
    """The inverse of `to_dict`, with types checked. Missing fields take their defaults."""
    tree = dict(tree)
    if issubclass(cls, Family):
        cls = _member(cls, tree.pop("kind", cls.__name__), path)
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for name in tree:
        if name not in known:
            raise _unknown(cls.__name__, f"{path}{name}", [f"{path}{n}" for n in known])
    values = {name: _convert(hints[name], value, f"{path}{name}") for name, value in tree.items()}
    missing = [n for n, f in known.items() if n not in values and _required(f)]
    if missing:
        raise ConfigError(
            f"{cls.__name__} needs {path}{missing[0]}; set it with --set {path}{missing[0]}=VALUE"
        )
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path.rstrip('.') or cls.__name__}: {error}") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; the form MLflow parameters and Tune search spaces take."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(config: Any) -> str:
    """SHA-256 (hex) of a configuration's canonical JSON; equal settings have equal digests on every machine."""
    value = to_dict(config) if dataclasses.is_dataclass(config) else config
    return hashlib.sha256(canonical_json(value)).hexdigest()


def load_file(path: str | Path) -> dict[str, Any]:
    """Dotted overrides from a YAML, TOML or JSON file. Nested and dotted keys may be mixed."""
    import yaml  # here: jobs are built where there is only torch, too

    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"settings file {path} is no text; write YAML, TOML or JSON in UTF-8") from error
    try:
        tree = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"settings file {path} does not parse: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"settings file {path} must hold settings by name, like `learner.g_lr: 0.0001`")
    return flatten(tree)


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """["a.b=1", "c=x"] -> {"a.b": "1", "c": "x"}; what `--set` gives."""
    pairs: dict[str, str] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {text!r} is not path=value; for example --set data.batch_size=64")
        pairs[name.strip()] = value
    return pairs


# -- private --------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _set(tree: dict[str, Any], parts: list[str], value: Any, owner: str, path: str) -> None:
    node = tree
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None and part in node:
            node[part] = {}
        if not isinstance(node.get(part), dict):
            here = ".".join([*parts[:depth], ""])
            raise _unknown(owner, path, [f"{here}{name}" for name in flatten(node)])
        node = node[part]
    last = parts[-1]
    if last == "kind" and node.get("kind") not in (None, value):
        node.clear()  # another member of the family: its own defaults, not the old member's fields
    elif last not in node and "kind" not in node and not _is_open(node):
        here = ".".join([*parts[:-1], ""]) if len(parts) > 1 else ""
        raise _unknown(owner, path, [f"{here}{name}" for name in flatten(node)] or [here])
    if isinstance(node.get(last), dict) and isinstance(value, Mapping):
        node[last].update(value)
    else:
        node[last] = value


def _is_open(node: dict[str, Any]) -> bool:
    return not node  # an empty dict is a dict[str, X] field or a None that an override fills


def _unknown(owner: str, path: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known)[:12])}"
    return ConfigError(f"{owner} has no setting {path}; {hint}")


def _member(family: type[Any], kind: str, path: str) -> type[Any]:
    members = family.members()
    if dataclasses.is_dataclass(family):
        members[family.__name__] = family
    if kind not in members:
        near = difflib.get_close_matches(str(kind), members, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(members))}"
        raise ConfigError(f"{path}kind is {kind!r}, which is no {family.__name__}; {hint}")
    return members[kind]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if origin is typing.Literal:
        return _convert_literal(arguments, value, path)
    if origin in (tuple, list):
        return _convert_sequence(origin, arguments, value, path)
    if origin in (dict, Mapping) or hint is dict:
        return _convert_mapping(arguments, value, path)
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, Family)):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return from_dict(hint, value, f"{path}.")
        raise _wrong(path, f"settings of {hint.__name__}", value)
    return _convert_scalar(hint, value, path)


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if type(None) in arguments and (value is None or str(value).lower() in ("none", "null")):
        return None
    candidates = [a for a in arguments if a is not type(None)]
    errors = []
    for candidate in sorted(candidates, key=lambda a: a is str):  # text fits everything: try it last
        try:
            return _convert(candidate, value, path)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_literal(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    for choice in choices:
        if value == choice or str(value).lower() == str(choice).lower():
            return choice
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = ", ".join(str(choice) for choice in choices if choice != "")
    raise ConfigError(f"{path} is {value!r}; expected one of {known}{hint}")


def _convert_sequence(origin: type, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if isinstance(value, str):
        parsed = _parse(value)
        value = (
            parsed
            if isinstance(parsed, list)
            else [part.strip() for part in value.split(",") if part.strip()]
        )
    if not isinstance(value, list | tuple):
        raise _wrong(path, "a list", value)
    if (origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis) or origin is list:
        return origin(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise ConfigError(f"{path} needs {len(arguments)} values, got {len(value)}")
    return tuple(
        _convert(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(arguments, value, strict=True))
    )


def _convert_mapping(arguments: tuple[Any, ...], value: Any, path: str) -> dict[str, Any]:
    value = _parse(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise _wrong(path, "settings by name", value)
    inner = arguments[1] if arguments else Any
    return {str(key): _convert(inner, item, f"{path}.{key}") for key, item in value.items()}


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is str:
        if isinstance(value, str | Path):
            return str(value)
        raise _wrong(path, "text", value)
    parsed = _parse(value) if isinstance(value, str) else value
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise _wrong(path, "a finite number", value)
    if hint is bool and isinstance(parsed, bool):
        return parsed
    if (
        hint is int
        and isinstance(parsed, int | float)
        and not isinstance(parsed, bool)
        and parsed == int(parsed)
    ):
        return int(parsed)
    if hint is float and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        return float(parsed)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    raise _wrong(path, names.get(hint, getattr(hint, "__name__", str(hint))), value)


def _parse(text: str) -> Any:
    """A command-line value: YAML, except that 1e-4 is a number as everywhere else."""
    import yaml

    try:
        return float(text) if "e" in text.lower() and text.strip()[-1:].isdigit() else yaml.safe_load(text)
    except ValueError:
        pass
    except yaml.YAMLError:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _wrong(path: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{path} must be {expected}, got {value!r}")
