"""A checkpoint is a folder: safetensors + `state.json`, which is written last and holds every digest. No pickle anywhere.

A state is a nested dict of tensors and JSON scalars. Each top-level entry that holds tensors becomes one
`<name>.safetensors`; the tree itself, with the tensors replaced by their names, is in `state.json`, which ends with the
SHA-256 of its own bytes before that. Format 1 lacked it: such a checkpoint is read with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from counterfake.config import canonical_json
from counterfake.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = 2
STATE = "state.json"
_SEAL = b',"state_sha256":"'  # what stands between the content of `state.json` and its digest


def save(folder: Path, state: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """Write `folder` whole or not at all -> SHA-256 of its content. `folder` must not exist, or be empty.

    `meta` is JSON for people and for resuming: step, epoch, resolved job, dataset version, commit."""
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} already holds files; a checkpoint is never overwritten, give a new folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir()
    try:
        fingerprint = _write(part, state, meta)
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync(folder.parent)
    return fingerprint


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, meta) of a checkpoint, every byte verified. Raises CheckpointError."""
    info = _read_info(folder)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, expected in info["files"].items():
        data = _read(folder, name)
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise CheckpointError(
                f"{folder / name} was altered: its SHA-256 is {found[:12]}, written with {expected[:12]}; "
                "use an older checkpoint"
            )
        try:
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / name} is no safetensors file: {error}") from error
    return _restore(info["tree"], tensors, folder), info["meta"]


def read_meta(folder: Path) -> dict[str, Any]:
    """Only the JSON part, verified, without reading weights."""
    return _read_info(folder)["meta"]


def weights_digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of all tensors of a state, nested or of one module: equal if names, types, shapes and every bit are."""
    tensors: dict[str, dict[str, Tensor]] = {}
    _split(state, "all", "", tensors)
    return hashlib.sha256(safetensors.torch.save(_plain(tensors.get("all", {})))).hexdigest()


# -- private --------------------------------------------------------------------------------------------------------


def _write(folder: Path, state: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    tensors: dict[str, dict[str, Tensor]] = {}
    tree = {name: _split(value, name, "", tensors) for name, value in state.items()}
    files = {}
    for group, members in tensors.items():
        data = safetensors.torch.save(_plain(members))
        files[f"{group}.safetensors"] = hashlib.sha256(data).hexdigest()
        _put(folder / f"{group}.safetensors", data)
    try:
        text = canonical_json({"format": FORMAT, "files": files, "tree": tree, "meta": dict(meta)})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"only tensors and JSON values can be stored: {error}") from error
    fingerprint = hashlib.sha256(text).hexdigest()
    _put(folder / STATE, _sealed(text, fingerprint))
    _sync(folder)
    return fingerprint


def _sealed(text: bytes, fingerprint: str) -> bytes:
    """A JSON object with its digest as the last member: over bytes, because reading a number or a key may change them."""
    return b'%s%s%s"}' % (text.removesuffix(b"}"), _SEAL, fingerprint.encode())


def _unsealed(path: Path, data: bytes) -> bytes | None:
    """The content of a sealed `state.json`, verified; None if there is no seal. Raises CheckpointError."""
    content, seal, _ = data.rpartition(_SEAL)
    if not seal:
        return None
    text = content + b"}"
    if _sealed(text, found := hashlib.sha256(text).hexdigest()) != data:
        raise CheckpointError(
            f"{path} was altered: its content has SHA-256 {found[:12]} and not the one it ends with; "
            "use an older checkpoint"
        )
    return text


def _split(value: Any, group: str, path: str, tensors: dict[str, dict[str, Tensor]]) -> Any:
    """The JSON form of a value; its tensors go to tensors[group][path]."""
    if isinstance(value, Tensor):
        tensors.setdefault(group, {})[path or "value"] = value
        return {"$tensor": path or "value"}
    join = f"{path}/" if path else ""
    if isinstance(value, Mapping):
        items = [[key, _split(item, group, f"{join}{key}", tensors)] for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return (
            dict(items) if plain else {"$items": items}
        )  # optimizers count their parameters with integer keys
    if isinstance(value, list | tuple):
        parts = [_split(item, group, f"{join}{i}", tensors) for i, item in enumerate(value)]
        return {"$tuple": parts} if isinstance(value, tuple) else parts
    return value


def _restore(
    tree: Mapping[str, Any], tensors: Mapping[str, dict[str, Tensor]], folder: Path
) -> dict[str, Any]:
    try:
        return {name: _join(value, tensors.get(name, {})) for name, value in tree.items()}
    except KeyError as error:
        raise CheckpointError(f"{folder} lacks the tensor {error}; use an older checkpoint") from error


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$items" in value:
        return {key: _join(item, tensors) for key, item in value["$items"]}
    if "$tuple" in value:
        return tuple(_join(item, tensors) for item in value["$tuple"])
    return {key: _join(item, tensors) for key, item in value.items()}


def _read_info(folder: Path) -> dict[str, Any]:
    data = _read(folder, STATE)
    text = _unsealed(folder / STATE, data)
    try:
        info = json.loads(data if text is None else text)
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE} is not JSON ({error}); use an older checkpoint") from error
    if not isinstance(info, dict) or not {"format", "files", "tree", "meta"} <= info.keys():
        raise CheckpointError(
            f"{folder / STATE} is not a checkpoint's; expected format, files, tree and meta"
        )
    if info["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"{folder / STATE} has checkpoint format {info['format']}; this version reads 1 and {FORMAT}"
        )
    if text is None and info["format"] != 1:
        raise CheckpointError(
            f"{folder / STATE} was altered: its own digest is gone; use an older checkpoint"
        )
    if text is None:
        logger.warning("%s is of format 1, which has no digest of its own: only weights are verified", folder)
    if any(Path(name).name != name for name in info["files"]):
        raise CheckpointError(f"{folder / STATE} names files outside its folder; it was altered")
    return info


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} is no complete checkpoint: {name}: {error.strerror}") from error


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _put(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
