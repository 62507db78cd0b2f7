"""A bundle: the folder that is registered, stored and served. safetensors, ONNX, JSON, Markdown and PNG; nothing is ever unpickled.

`bundle.json` names every other file with its SHA-256; the digest of the bundle is that of the canonical `bundle.json`, so one
hash stands for weights, settings, calibration, evaluation and card together. An ensemble holds its members as whole bundles
under `members/<name>/`. Knows no MLflow and no object storage: `registry.py` moves these folders about.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from counterfake import config as settings
from counterfake.errors import CheckpointError
from counterfake.evaluation.card import model_card
from counterfake.nets import NetConfig

Kind = Literal[
    "detector",
    "benford",
    "error_level",
    "generator",
    "faceswap",
    "autoencoder",
    "classifier",
    "next_frame",
    "ensemble",
]
KINDS: tuple[str, ...] = get_args(Kind)
FORMAT = 1
FILE_KINDS = (".json", ".safetensors", ".md", ".png", ".onnx")
MANIFEST, WEIGHTS, EVALUATION, CARD = "bundle.json", "weights.safetensors", "evaluation.json", "MODEL_CARD.md"
MANIFEST_BYTES = 8 << 20  # a manifest larger than this is refused unread
LABELS = {"real": 0, "fake": 1}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle on the local disk. `info` is the content of bundle.json."""

    folder: Path
    kind: str  # one of KINDS
    name: str
    digest: str  # sha256 hex of the canonical bundle.json, which holds the digest of every file
    info: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """Settings tree: {net name: net config} for nets, the forest's or ensemble's own settings otherwise."""
        return dict(self.info["config"])

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What `evaluation.detection.evaluate` gave on held-out data; None if it was never evaluated."""
        path = self.folder / EVALUATION
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def members(self) -> dict[str, Path]:
        """Folders of the members of an ensemble, by name, in the ensemble's order."""
        return {name: self.folder / "members" / name for name in self.info.get("members", [])}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of weights.safetensors. CheckpointError when the file is not well-formed."""
        path = self.folder / WEIGHTS
        if not path.is_file():
            return {}
        try:
            return load_file(path)
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} is no valid safetensors file: {str(error).splitlines()[0]}"
            ) from error

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`tensors()` as numpy arrays."""
        return {name: tensor.numpy() for name, tensor in self.tensors().items()}


def write(
    folder: Path,
    *,
    kind: Kind,
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor | NDArray[Any]],
    preprocess: Any,
    provenance: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    members: Mapping[str, Path] | None = None,
) -> Bundle:
    """Writes a bundle into a temporary folder beside `folder` and renames it there; an older bundle there is replaced.

    `config` and `preprocess` may hold dataclasses. `provenance` takes dataset {uri, version, digest}, sources {name:
    {licence, consent}}, run_id, commit, created_at and notes; anything else JSON-able is kept under its own name.
    """
    files = dict(extra_files or {})
    if tensors:
        files[WEIGHTS] = save({key: _tensor(value) for key, value in tensors.items()})
    if evaluation is not None:
        files[EVALUATION] = _pretty(evaluation)
    for member, source in (members or {}).items():
        files.update(
            {f"members/{member}/{key}": data for key, data in _contents(read(source).folder).items()}
        )
    info = _info(kind, name, config, preprocess, provenance)
    if members:
        info["members"] = list(members)
    return _commit(Path(folder), info, files, evaluation)


def write_nets(
    folder: Path,
    *,
    kind: Kind,
    name: str,
    nets: Mapping[str, tuple[Any, Mapping[str, torch.Tensor]]],
    **rest: Any,
) -> Bundle:
    """`write` for what a learner exports: {net name: (its config, its state dict)}. Tensors are named "net/parameter"."""
    config = {net: settings.to_dict(tree) for net, (tree, _) in nets.items()}
    tensors = {f"{net}/{key}": value for net, (_, state) in nets.items() for key, value in state.items()}
    return write(folder, kind=kind, name=name, config=config, tensors=tensors, **rest)


def read(folder: Path) -> Bundle:
    """Opens a bundle and verifies it: every file listed, no other file, every digest. CheckpointError otherwise."""
    folder = Path(folder)
    info = _manifest(folder)
    listed, present = info["files"], set(_names(folder)) - {MANIFEST}
    for key in sorted(present.symmetric_difference(listed)):
        what = "is not listed in bundle.json" if key in present else "is missing"
        raise CheckpointError(f"bundle {folder}: {key} {what}; fetch or write the bundle again")
    for key, expected in listed.items():
        if _sha256(folder / key) != expected:
            raise CheckpointError(f"bundle {folder}: {key} was altered (its SHA-256 is not the recorded one)")
    return Bundle(
        folder=folder, kind=info["kind"], name=info["name"], digest=settings.digest(info), info=info
    )  # fmt: skip


def with_evaluation(bundle: Bundle, folder: Path, evaluation: Mapping[str, Any]) -> Bundle:
    """A copy of `bundle` in `folder` with this evaluation.json and the model card written anew; other files unchanged."""
    return _changed(bundle, folder, {}, {EVALUATION: _pretty(evaluation)}, evaluation)


def with_runtime(
    bundle: Bundle, folder: Path, record: Mapping[str, Any], files: Mapping[str, bytes]
) -> Bundle:
    """A copy of `bundle` in `folder` that says what runs it: record = {"cpu": {library, precision, file, …}}, see runtime.py.

    `files`: the exported networks by name. An earlier record and its files are replaced; weights and evaluation stay."""
    return _changed(bundle, folder, {"runtime": _plain(record)}, files, bundle.evaluation, without=".onnx")


def load_nets(bundle: Bundle) -> dict[str, torch.nn.Module]:
    """Every net of the bundle, built from its settings with the stored weights, in eval mode on the CPU."""
    tensors, nets = bundle.tensors(), {}
    for net, tree in bundle.config.items():
        module = settings.from_dict(NetConfig, _without_files(tree)).build()  # type: ignore[type-abstract]
        state = {
            key.removeprefix(f"{net}/"): value for key, value in tensors.items() if key.startswith(f"{net}/")
        }
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"bundle {bundle.folder}: the weights do not fit net {net!r}: {reason}"
            ) from error
        nets[net] = module.eval().requires_grad_(False)
    return nets


def source_commit() -> str | None:
    """The commit of the code that runs; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# -- private --------------------------------------------------------------------------------------------------------


def _changed(
    bundle: Bundle, folder: Path, info: Mapping[str, Any], files: Mapping[str, bytes],
    evaluation: Mapping[str, Any] | None, without: str = "",
) -> Bundle:  # fmt: skip
    """A copy with other entries of bundle.json and other files; kept files of suffix `without` are left out."""
    kept = {
        key: data
        for key, data in _contents(bundle.folder).items()
        if key not in (MANIFEST, CARD) and Path(key).suffix != without
    }
    entries = {key: value for key, value in bundle.info.items() if key != "files"}
    return _commit(Path(folder), {**entries, **info}, {**kept, **files}, evaluation)


def _info(
    kind: str, name: str, config: Mapping[str, Any], preprocess: Any, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    if kind not in KINDS:
        raise CheckpointError(f"bundle kind {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"bundle name {name!r} must be letters, digits, '.', '_' or '-', at most 128 of them"
        )
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    prepared = _plain(preprocess)
    return {
        "dataset": None, "run_id": None, "commit": None, "created_at": now, **_plain(provenance),
        "format": FORMAT, "kind": kind, "name": name, "config": _plain(config), "labels": LABELS,
        "preprocess": prepared, "preprocess_digest": settings.digest(prepared),
    }  # fmt: skip


def _commit(
    folder: Path, info: dict[str, Any], files: dict[str, bytes], evaluation: Mapping[str, Any] | None
) -> Bundle:
    files[CARD] = model_card(info, evaluation).encode()
    info["files"] = {key: hashlib.sha256(data).hexdigest() for key, data in sorted(files.items())}
    for key in files:
        _check_name(key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        for key, data in [*files.items(), (MANIFEST, _pretty(info))]:
            _write_file(temporary / key, data)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read(folder)


def _replace(temporary: Path, folder: Path) -> None:
    old = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.old"
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder} exists and is no bundle; choose another folder")
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no bundle: it has no {MANIFEST}")
    if path.stat().st_size > MANIFEST_BYTES:
        raise CheckpointError(f"{path} is larger than {MANIFEST_BYTES} bytes; it is no bundle of ours")
    try:
        info = json.loads(path.read_bytes())
        version, kind, files = info["format"], info["kind"], info["files"]
        info["name"], info["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is incomplete or no JSON: {str(error)[:120]}") from error
    if version != FORMAT or kind not in KINDS or not isinstance(files, dict):
        raise CheckpointError(
            f"{path} has format {version!r} and kind {kind!r}; this version reads format {FORMAT}"
        )
    for key in files:
        _check_name(key)
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in info.get("members", [])):
        raise CheckpointError(f"{path} names members that are no names: {str(info['members'])[:120]}")
    return dict(info)


def _check_name(key: str) -> None:
    path = Path(key)
    if path.suffix not in FILE_KINDS:
        raise CheckpointError(f"a bundle may hold {', '.join(FILE_KINDS)} files only, not {key!r}")
    if path.is_absolute() or ".." in path.parts or path.as_posix() != key:
        raise CheckpointError(f"file name {key!r} leaves the bundle")


def _names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        key = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise CheckpointError(f"bundle {folder}: {key} is a link; a bundle holds plain files only")
        if not path.is_dir():
            _check_name(key)
            yield key


def _contents(folder: Path) -> dict[str, bytes]:
    return {key: (folder / key).read_bytes() for key in _names(folder)}


def _without_files(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the path of the initial weights: the bundle's own weights replace them, the path may be gone."""
    return {key: value for key, value in tree.items() if key != "weights"}


def _tensor(value: torch.Tensor | NDArray[Any]) -> torch.Tensor:
    tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return settings.to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _pretty(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a bundle stores JSON only: {error}") from error


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
