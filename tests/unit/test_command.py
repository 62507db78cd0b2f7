"""The `counterfake` command: what it parses, prints and refuses. No job runs here."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import jobs
from counterfake import config
from counterfake.errors import ConfigError, CounterfakeError
from counterfake.workspace import Workspace
from jobs import __main__ as command
from jobs import submit
from jobs.console import Console

RUNNER = CliRunner()


def invoke(*words: str) -> object:
    return RUNNER.invoke(command.app, list(words))


@pytest.mark.parametrize("name", jobs.names())
def test_every_job_has_a_docstring_presets_and_run(name: str) -> None:
    module = jobs.load(name)
    assert module.__doc__, f"{name} says nothing about itself"
    assert module.PRESETS, f"{name} has no preset"
    assert list(inspect.signature(module.run).parameters) == ["job", "workspace", "console"]


@pytest.mark.parametrize(
    ("job", "preset"), [(j, p) for j in jobs.names() for p in jobs.load(j).PRESETS], ids=lambda value: value
)
def test_every_preset_survives_json(job: str, preset: str) -> None:
    made = jobs.preset(jobs.load(job), preset)
    assert dataclasses.is_dataclass(made)
    assert config.from_dict(type(made), json.loads(json.dumps(config.to_dict(made)))) == made


def test_every_model_that_a_preset_names_is_registered_by_a_preset() -> None:
    used: dict[str, str] = {}
    registered: set[str] = set()
    for job in jobs.names():
        for preset in jobs.load(job).PRESETS:
            tree = config.to_dict(jobs.preset(jobs.load(job), preset))
            registered.add(tree.get("register_as") or "")
            names = [tree.get("model") or "", *tree.get("members", ())]
            used |= {name.partition("@")[0]: f"{job} {preset}" for name in names if name}
    assert {"ensemble", "dcgan-mnist", "dcgan-faces", "benford"} <= set(used)
    assert {name: by for name, by in used.items() if name not in registered} == {}


def test_dashes_and_underscores_are_the_same() -> None:
    assert jobs.load("train_gan") is jobs.load("train-gan")
    assert jobs.preset(jobs.load("train-gan"), "dcgan_mnist_s4") == jobs.preset(
        jobs.load("train-gan"), "dcgan-mnist-s4"
    )


def test_print_shows_the_resolved_job_with_overrides() -> None:
    result = invoke(
        "run", "train-gan", "dcgan-mnist-s4", "--set", "data.uri=mnist", "--workers", "2", "--print", "--json"
    )
    tree = json.loads(result.stdout)
    assert (tree["data"]["uri"], tree["workers"]) == ("mnist", 2)


def test_settings_file_comes_before_set(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("data:\n  batch_size: 32\n  seed: 5\n")
    words = (
        "run",
        "train-gan",
        "dcgan-mnist-s4",
        "--settings",
        str(tmp_path / "s.yaml"),
        "--set",
        "data.batch_size=64",
    )
    tree = json.loads(invoke(*words, "--print", "--json").stdout)
    assert (tree["data"]["batch_size"], tree["data"]["seed"]) == (64, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "train-gann"), "did you mean train-gan?"),
        (("run", "train-gan", "dcgan-mnist"), "did you mean dcgan-mnist"),
        (("run", "train-gan"), "several presets"),
        (("run", "train-gan", "dcgan-mnist-s4", "--set", "learner.g_lrr=1"), "did you mean learner."),
        (("run", "train-gan", "dcgan-mnist-s4", "--set", "workers=two"), "whole number"),
    ],
    ids=["job", "preset", "no-preset", "setting", "type"],
)
def test_mistakes_are_one_line_without_traceback(words: tuple[str, ...], message: str) -> None:
    result = invoke(*words)
    assert isinstance(result.exception, CounterfakeError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_the_installed_command_exits_with_2_and_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "run", "train-gan", "nope"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error:")


def test_submitted_command_carries_what_differs_from_the_preset(tmp_path: Path) -> None:
    module = jobs.load("train-gan")
    base = jobs.preset(module, "dcgan-mnist-s4")
    changed = config.override(base, {"data.uri": "mnist@3", "workers": 2})
    words = submit.entrypoint("train-gan", "dcgan-mnist-s4", changed, base, Workspace.at(tmp_path))
    assert "--set data.uri=mnist@3" in words
    assert "--set workers=2" in words
    assert words.count("--set") == 2
    assert f"--home {tmp_path}" in words


def test_beside_shared_storage_no_folder_of_this_machine_is_named(tmp_path: Path) -> None:
    base = jobs.preset(jobs.load("train-gan"), "dcgan-mnist-s4")
    words = submit.entrypoint(
        "train-gan", "dcgan-mnist-s4", base, base, Workspace.at(tmp_path, "s3://bucket/counterfake")
    )
    assert "--storage s3://bucket/counterfake" in words
    assert str(tmp_path) not in words
    place = Workspace.at(tmp_path, "s3://bucket/counterfake", "http://mlflow:5000")
    assert "--tracking http://mlflow:5000" in submit.entrypoint("train-gan", None, base, base, place)


class _BrokenLog:
    """A cluster whose log connection breaks while the job goes on."""

    def __init__(self) -> None:
        self.states = iter(("RUNNING", "RUNNING", "SUCCEEDED", "SUCCEEDED"))

    def submit_job(self, **_: object) -> str:
        return "raysubmit_1"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "step 1\n"
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        state = next(self.states)
        status = SimpleNamespace(value=state, is_terminal=lambda: state == "SUCCEEDED")
        return SimpleNamespace(status=status, message="")


def test_a_log_that_breaks_off_is_not_the_end_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_client", lambda address: _BrokenLog())
    quiet = Console(quiet=True, as_json=True)
    assert submit.submit("true", address="http://head", follow=True, working_dir=None, console=quiet) == 0


@pytest.mark.parametrize("elsewhere", ["", "http://127.0.0.1:1"], ids=["plain", "RAY_ADDRESS-set"])
def test_submit_to_nothing_names_the_address_and_a_way_out(
    free_port: int, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if elsewhere:
        monkeypatch.setenv("RAY_ADDRESS", elsewhere)  # must not win over --address
    result = invoke("submit", "train-gan", "dcgan-mnist-s4", "--address", f"http://127.0.0.1:{free_port}")
    assert isinstance(result.exception, CounterfakeError)
    assert f"127.0.0.1:{free_port}" in str(result.exception)


def test_list_prints_every_job_as_json() -> None:
    listed = json.loads(invoke("run", "--json").stdout)
    assert [entry["job"] for entry in listed] == jobs.names()


def test_an_unknown_job_without_a_near_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="there are"):
        jobs.load("zzzzzz")
