"""Checkpoints: what goes in comes out, what was altered is refused, half a folder is none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterfake import checkpoint
from counterfake.config import canonical_json
from counterfake.errors import CheckpointError


@pytest.fixture
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.5, 0.9))
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    return {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "mixed": {"list": [torch.ones(2, dtype=torch.bfloat16), 1.5, None], "images": images, "$odd": True},
        "steps": 7,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_a_nested_state_comes_back_as_it_was(tmp_path: Path, state: dict[str, Any]) -> None:
    checkpoint.save(tmp_path / "c", state, {"step": 7, "note": "x"})
    found, meta = checkpoint.load(tmp_path / "c")
    assert same(found, state)
    assert meta == {"step": 7, "note": "x"} == checkpoint.read_meta(tmp_path / "c")


def test_only_safetensors_and_json_are_written(tmp_path: Path, state: dict[str, Any]) -> None:
    checkpoint.save(tmp_path / "c", state, {})
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert names == {"state.json", "net.safetensors", "optimizer.safetensors", "mixed.safetensors"}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]  # nothing temporary is left


def test_the_digest_names_the_content(tmp_path: Path, state: dict[str, Any]) -> None:
    first = checkpoint.save(tmp_path / "a", state, {})
    assert first == checkpoint.save(tmp_path / "b", state, {})
    assert json.loads((tmp_path / "a" / "state.json").read_text())["state_sha256"] == first
    state["net"]["bias"][0] += 1e-6
    assert checkpoint.save(tmp_path / "c", state, {}) != first


@pytest.mark.parametrize("name", ["net.safetensors", "optimizer.safetensors"])
def test_any_altered_byte_is_found(tmp_path: Path, state: dict[str, Any], name: str) -> None:
    checkpoint.save(tmp_path / "c", state, {})
    path = tmp_path / "c" / name
    data = bytearray(path.read_bytes())
    for position in range(0, len(data), 37):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"{name} was altered"):
            checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("lost", ["state.json", "net.safetensors"])
def test_an_incomplete_folder_is_no_checkpoint(tmp_path: Path, state: dict[str, Any], lost: str) -> None:
    checkpoint.save(tmp_path / "c", state, {})
    (tmp_path / "c" / lost).unlink()
    with pytest.raises(CheckpointError, match=f"no complete checkpoint: {lost}"):
        checkpoint.load(tmp_path / "c")


def rewrite(folder: Path, *, sealed: bool = True, **changes: Any) -> None:
    """Other members in `state.json`, with a digest that fits them or with none."""
    info = json.loads((folder / "state.json").read_text())
    del info["state_sha256"]
    text = canonical_json(info | changes)
    digest = hashlib.sha256(text).hexdigest()
    (folder / "state.json").write_bytes(checkpoint._sealed(text, digest) if sealed else text)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, state: dict[str, Any]) -> None:
    checkpoint.save(tmp_path / "c", state, {})
    rewrite(tmp_path / "c", files={"../../secret.safetensors": "0" * 64})
    with pytest.raises(CheckpointError, match="outside its folder"):
        checkpoint.load(tmp_path / "c")


def test_keys_and_numbers_that_json_changes_keep_the_digest(tmp_path: Path) -> None:
    meta = {"by_step": {10: "a", 9: "b"}, "lr": 1e-07, "name": "é"}
    checkpoint.save(tmp_path / "c", {"w": torch.ones(1)}, meta)
    assert checkpoint.read_meta(tmp_path / "c") == {**meta, "by_step": {"10": "a", "9": "b"}}


def test_a_text_that_looks_like_the_digest_does_no_harm(tmp_path: Path) -> None:
    meta = {"zz": 1, "state_sha256": "0" * 64, "text": ',"state_sha256":"'}
    checkpoint.save(tmp_path / "c", {"w": torch.ones(1)}, meta)
    assert checkpoint.load(tmp_path / "c")[1] == meta


def test_a_checkpoint_of_format_1_is_read_with_a_warning(
    tmp_path: Path, state: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path / "c", state, {"step": 7})
    rewrite(tmp_path / "c", sealed=False, format=1)
    found, meta = checkpoint.load(tmp_path / "c")
    assert same(found, state)
    assert meta == {"step": 7}
    assert "has no digest of its own" in caplog.text


@pytest.mark.parametrize(
    ("changes", "sealed", "message"),
    [({}, False, "its own digest is gone"), ({"format": 3}, True, "format 3; this version reads 1 and 2")],
    ids=["no digest", "the future"],
)
def test_a_state_without_digest_or_of_the_future_is_refused(
    tmp_path: Path, changes: dict[str, Any], sealed: bool, message: str
) -> None:
    checkpoint.save(tmp_path / "c", {"w": torch.ones(1)}, {})
    rewrite(tmp_path / "c", sealed=sealed, **changes)
    with pytest.raises(CheckpointError, match=rf"c/state\.json .*{message}"):
        checkpoint.load(tmp_path / "c")


def test_a_checkpoint_is_never_overwritten(tmp_path: Path, state: dict[str, Any]) -> None:
    checkpoint.save(tmp_path / "c", state, {})
    with pytest.raises(CheckpointError, match="never overwritten"):
        checkpoint.save(tmp_path / "c", state, {})


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only tensors and JSON"):
        checkpoint.save(tmp_path / "c", {"net": {"w": torch.ones(1), "f": print}}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_weights_digest_sees_every_bit_and_no_layout() -> None:
    weight = torch.randn(4, 3, 5, 5)
    first = checkpoint.weights_digest({"g": {"w": weight}})
    assert first == checkpoint.weights_digest(
        {"g": {"w": weight.to(memory_format=torch.channels_last)}, "steps": 3}
    )
    assert first != checkpoint.weights_digest({"g": {"w": weight.nextafter(torch.tensor(9.0))}})
    assert first != checkpoint.weights_digest({"g": {"v": weight}})
