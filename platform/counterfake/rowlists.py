"""Rows named one by one: lists of ids on storage, and `where={"id": "@URI#part"}`, which chooses the rows of one part.

A list is content-addressed (`<its sha256>.json`), so a job that names one is decided by it, and its rows are not copied. The
file holds cells of ids and parts made of cells: {"cells": {"0.1": [ids]}, "parts": {"train-0": ["1.0", "1.1"]}}.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from counterfake.config import canonical_json
from counterfake.errors import ConfigError, CorruptError
from counterfake.storage import open_store

MARK = "@"  # before the URI, where a value of `where` could stand


def is_list(wanted: Any) -> bool:
    """Whether a value of `where` names a list instead of a value."""
    return isinstance(wanted, str) and wanted.startswith(MARK) and "://" in wanted


def write(root: str, cells: Mapping[str, Sequence[str]], parts: Mapping[str, Sequence[str]]) -> str:
    """Store a list below the URI `root` -> its URI. The same list again is the same file."""
    content = canonical_json({"cells": cells, "parts": parts})
    key = f"{hashlib.sha256(content).hexdigest()}.json"
    open_store(root).put_if_absent(key, content)
    return f"{root}/{key}"


@functools.lru_cache(maxsize=16)
def ids(wanted: str) -> frozenset[str]:
    """The ids of "@URI#part". Raises NotFoundError, CorruptError for a changed file, ConfigError for an unknown part."""
    uri, _, part = wanted.removeprefix(MARK).partition("#")
    root, _, key = uri.rpartition("/")
    content = open_store(root).read(key)
    if hashlib.sha256(content).hexdigest() != key.removesuffix(".json"):
        raise CorruptError(f"the list of rows {uri} was altered (its SHA-256 does not fit); make it anew")
    tree = json.loads(content)
    if part not in tree["parts"]:
        raise ConfigError(
            f"the list of rows {uri} has no part {part!r}; it has {', '.join(sorted(tree['parts']))}"
        )
    return frozenset(row for cell in tree["parts"][part] for row in tree["cells"][cell])
