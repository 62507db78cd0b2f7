"""Bundles: atomic, verified, nothing but safetensors, JSON, Markdown and PNG."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from counterfake import bundle, config
from counterfake.errors import CheckpointError
from counterfake.nets import NetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineConfig(NetConfig):
    """A net of three numbers."""

    inputs: int = 2
    weights: str | None = None  # a path that only existed where it was trained

    def build(self) -> torch.nn.Module:
        assert self.weights is None, "the initial weights must not be read again"
        return torch.nn.Linear(self.inputs, 1)

    @classmethod
    def tiny(cls) -> LineConfig:
        return cls()


def written(folder: Path, **changes: object) -> bundle.Bundle:
    net = torch.nn.Linear(2, 1)
    arguments = {
        "kind": "detector",
        "name": "line",
        "nets": {"detector": (LineConfig(weights="/gone.pth"), net.state_dict())},
        "preprocess": {"size": 2},
        "provenance": {
            "dataset": {"uri": "file:///d", "version": 3, "digest": "ab"},
            "run_id": "r",
            "commit": "c",
        },
        **changes,
    }
    return bundle.write_nets(folder, **arguments)  # type: ignore[arg-type]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    made = written(tmp_path / "b", evaluation={"n": 4, "auc": {"value": 0.9, "low": 0.8, "high": 1.0}})
    again = bundle.read(tmp_path / "b")
    assert again == made
    assert again.evaluation == {"n": 4, "auc": {"value": 0.9, "low": 0.8, "high": 1.0}}
    assert again.info["dataset"]["version"] == 3
    assert again.info["preprocess_digest"] == config.digest({"size": 2})
    assert sorted(again.tensors()) == ["detector/bias", "detector/weight"]
    assert [p.name for p in tmp_path.iterdir()] == ["b"]  # no temporary folder stays
    card = (tmp_path / "b" / "MODEL_CARD.md").read_text()
    assert "0.900 (0.800 to 1.000)" in card
    assert "Intended use" in card


def test_nets_come_back_with_their_weights_and_without_their_initial_file(tmp_path: Path) -> None:
    made = written(tmp_path / "b")
    net = bundle.load_nets(made)["detector"]
    assert not net.training
    torch.testing.assert_close(net.weight, made.tensors()["detector/weight"])  # type: ignore[arg-type]


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 1).state_dict()
    made = written(tmp_path / "b", nets={"detector": (LineConfig(), state)})
    with pytest.raises(CheckpointError, match="do not fit net 'detector'"):
        bundle.load_nets(made)


def test_the_digest_depends_on_every_byte_and_on_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torch.nn.Linear(2, 1).state_dict()
    nets = {"detector": (LineConfig(), state)}
    when = {"created_at": "2026-01-01"}
    same = [written(tmp_path / n, nets=nets, provenance=when).digest for n in ("a", "b")]
    assert same[0] == same[1]
    state["bias"] += 1e-6
    assert written(tmp_path / "c", nets=nets, provenance=when).digest != same[0]


@pytest.mark.parametrize("name", ["weights.safetensors", "MODEL_CARD.md", "evaluation.json"])
def test_an_altered_file_is_named(tmp_path: Path, name: str) -> None:
    written(tmp_path / "b", evaluation={"n": 1})
    path = tmp_path / "b" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        bundle.read(tmp_path / "b")


def test_missing_extra_linked_and_foreign_files_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "b")
    (tmp_path / "b" / "more.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"more\.json is not listed"):
        bundle.read(tmp_path / "b")
    (tmp_path / "b" / "more.json").rename(tmp_path / "b" / "code.pkl")
    with pytest.raises(CheckpointError, match=r"code\.pkl"):
        bundle.read(tmp_path / "b")
    (tmp_path / "b" / "code.pkl").unlink()
    (tmp_path / "b" / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="link"):
        bundle.read(tmp_path / "b")
    (tmp_path / "b" / "link.json").unlink()
    (tmp_path / "b" / "MODEL_CARD.md").unlink()
    with pytest.raises(CheckpointError, match=r"MODEL_CARD\.md is missing"):
        bundle.read(tmp_path / "b")


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "x.pt", "a/../../x.md", "bad.pickle"])
def test_names_outside_the_bundle_are_refused_when_writing(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError):
        written(tmp_path / "b", extra_files={name: b""})
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "b")
    path = tmp_path / "b" / "bundle.json"
    info = json.loads(path.read_text())
    info["files"]["../secret.json"] = "0" * 64
    path.write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match="leaves the bundle"):
        bundle.read(tmp_path / "b")


@pytest.mark.parametrize("member", ["../../elsewhere", "", 7])
def test_a_member_that_is_no_name_is_refused(tmp_path: Path, member: object) -> None:
    written(tmp_path / "b")
    path = tmp_path / "b" / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "members": [member]}))
    with pytest.raises(CheckpointError, match="no names"):
        bundle.read(tmp_path / "b")


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": 9, "kind": "detector", "files": {}}', "[" * 100_000]
)
def test_a_broken_manifest_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(CheckpointError):
        bundle.read(tmp_path)


def test_mutated_weights_give_a_typed_error_even_when_the_digest_was_made_to_fit(tmp_path: Path) -> None:
    made = written(tmp_path / "b")
    path, rng = made.folder / "weights.safetensors", random.Random(0)
    original = path.read_bytes()
    for _ in range(1000):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.2 else data)
        with contextlib.suppress(CheckpointError):
            bundle.load_nets(made)


def test_writing_again_replaces_a_bundle_but_never_another_folder(tmp_path: Path) -> None:
    first = written(tmp_path / "b")
    assert written(tmp_path / "b", name="other").digest != first.digest
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is no bundle"):
        written(tmp_path / "photos")
    assert (tmp_path / "photos" / "me.png").read_bytes() == b"x"


def test_an_evaluation_added_later_keeps_the_weights(tmp_path: Path) -> None:
    made = written(tmp_path / "a")
    judged = bundle.with_evaluation(made, tmp_path / "b", {"n": 7})
    assert judged.evaluation == {"n": 7}
    assert judged.info["files"]["weights.safetensors"] == made.info["files"]["weights.safetensors"]
    assert bundle.with_evaluation(judged, tmp_path / "b", {"n": 8}).evaluation == {"n": 8}  # also in place


def test_an_ensemble_carries_its_members_whole(tmp_path: Path) -> None:
    member = written(tmp_path / "a")
    made = bundle.write(
        tmp_path / "e", kind="ensemble", name="both", config={}, tensors={}, preprocess=None, provenance={},
        members={"line": member.folder},
    )  # fmt: skip
    assert bundle.read(made.members["line"]).digest == member.digest
    with (made.folder / "members/line/MODEL_CARD.md").open("a") as file:
        file.write("!")
    with pytest.raises(CheckpointError, match="altered"):
        bundle.read(made.folder)
