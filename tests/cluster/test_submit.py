"""Jobs submitted to a Ray head with token authentication: train, tune and evaluate run to their end; no token, no entry."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from counterfake.records import SplitRule, write_version
from counterfake.registry import Registry
from counterfake.sources.synthetic import SyntheticSource
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a small dataset: half of the people are declared fakes."""
    workspace = Workspace.at(tmp_path_factory.mktemp("submit") / "runs")
    source = SyntheticSource(identities=16, per_identity=8, size=64)
    people: dict[str, int] = {}

    def samples() -> Iterator[object]:
        for sample in source.samples():
            fake = people.setdefault(sample.identity, len(people) % 2)
            yield dataclasses.replace(sample, fake=fake, maker="test-maker" if fake else "camera")

    rule = SplitRule(fractions={"train": 0.5, "validation": 0.25, "test": 0.25})
    facts = {source.label: {"licence": source.licence, "consent": source.consent}}
    write_version(workspace.dataset("faces"), samples(), sources=facts, splits=rule)
    return workspace


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """`ray start --head` with a token of its own -> (dashboard address, environment that has the token)."""
    folder = Path(tempfile.mkdtemp(prefix="cf", dir="/tmp"))  # Ray's socket paths must be short
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    ports = _free_ports(5)
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = f"""ray start --head --block --num-cpus 2 --disable-usage-stats --temp-dir {folder}/ray
        --port {ports[0]} --dashboard-port {ports[1]} --dashboard-agent-listen-port {ports[2]}
        --metrics-export-port {ports[3]} --ray-client-server-port {ports[4]} --object-store-memory 200000000"""
    log = (folder / "head.log").open("wb")
    process = subprocess.Popen(command.split(), env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        _wait_for(address, process, folder / "head.log")
        yield address, env
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(head: tuple[str, dict[str, str]], place: Workspace) -> Submit:
    address, env = head

    def call(*words: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        hidden = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nonexistent"}
        command = [
            sys.executable,
            "-m",
            "jobs",
            "submit",
            *words,
            "--address",
            address,
            "--home",
            str(place.home),
        ]
        return subprocess.run(
            command,
            env=env if token else env | hidden,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return call


DATA = ("--set", "data.uri=faces@1", "--set", "validation.uri=faces@1")
SMALL = (
    "loop.images=128", "loop.tick_steps=2", "data.batch_size=16", "validation.batch_size=16",
    "data.preprocess.size=32", "validation.preprocess.size=32",
)  # fmt: skip


def test_train_tune_and_evaluate_run_on_the_cluster_to_their_end(submit: Submit, place: Workspace) -> None:
    small = [word for assignment in SMALL for word in ("--set", assignment)]
    trained = submit(
        "train-detector", "mobilenetv2-demo", *DATA, *small, "--workers", "2", "--set", "cpus_per_worker=0.5"
    )
    assert trained.returncode == 0, trained.stdout[-3000:] + trained.stderr[-1000:]
    model = Registry.at(place).get("mobilenetv2-faces")
    assert Tracker.at(place).read(model.run_id)["status"] == "FINISHED"

    below = [f"train.{word}" if "=" in word else word for word in (*DATA, *small)]
    tuned = submit("tune-detector", "detector-demo", *below, "--set", "trials=2")
    assert tuned.returncode == 0, tuned.stdout[-3000:] + tuned.stderr[-1000:]
    assert list((place.home / "searches").glob("*.yaml"))

    judged = submit(
        "evaluate",
        "--set",
        f"model={model.name}/{model.version}",
        "--set",
        "data.uri=faces@1",
        "--set",
        "bootstraps=50",
    )
    assert judged.returncode == 0, judged.stdout[-3000:] + judged.stderr[-1000:]
    found = next((place.home / "evaluations").glob("*/evaluation.json"))
    assert json.loads(found.read_text())["n"] > 0


def test_a_failing_job_ends_the_command_with_its_status(submit: Submit) -> None:
    done = submit("evaluate", "--set", "model=absent", "--set", "data.uri=faces@1")
    assert done.returncode == 1
    assert "no model 'absent'" in done.stdout + done.stderr


def test_without_the_token_nothing_is_submitted(submit: Submit) -> None:
    done = submit("evaluate", "--set", "model=absent", "--set", "data.uri=faces@1", token=False)
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr


def _free_ports(count: int) -> list[int]:
    import socket

    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
            return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return  # it answers, and asks for the token
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no dashboard at {address}: {log.read_text()[-2000:]}")
