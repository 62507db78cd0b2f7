"""Ingest on Ray: the same version as in one process, a killed driver loses no finished part, errors come out as themselves."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from counterfake import parts
from counterfake.cluster import bulk
from counterfake.errors import DataError
from counterfake.sources.npz import NpzSource
from counterfake.sources.synthetic import SyntheticSource
from counterfake.workspace import Workspace
from jobs.ingest import IngestJob, run

pytestmark = pytest.mark.cluster

SOURCE = SyntheticSource(identities=16, per_identity=4, size=96)
JOB = IngestJob(source=SOURCE, into="faces", part_inputs=8, audit=False)
SHARED = dataclasses.replace(JOB, workers=2)
DRIVER = """
import sys
from counterfake.workspace import Workspace
from tests.cluster.test_ingest import SHARED
from jobs.ingest import run
run(SHARED, Workspace.at(sys.argv[1]))
"""


def staged(home: Path) -> list[Path]:
    """Receipts of the parts that are there."""
    return sorted(home.glob("datasets/faces/staging/*/part-*.json"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What one process makes of it, without Ray."""
    return run(JOB, Workspace.at(tmp_path_factory.mktemp("alone")))


def test_two_workers_make_the_same_version_as_one_process(
    ray_local: object, alone: dict[str, object], workspace: Workspace
) -> None:
    result = run(SHARED, workspace)
    assert result["digest"] == alone["digest"]
    assert result["parts"] == {"all": 8, "reused": 0}
    assert result["report"] == alone["report"]
    assert not list(workspace.home.glob("datasets/faces/staging/*"))


def test_a_killed_driver_goes_on_where_it_was(
    ray_local: object, alone: dict[str, object], tmp_path: Path
) -> None:
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(Path.cwd())}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300  # a busy machine takes minutes to start Ray
    while len(staged(tmp_path)) < 2 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # what its workers had in hand may still come
    there = len(staged(tmp_path))
    assert 2 <= there < 8, "the driver was to be killed in the middle"
    assert not (tmp_path / "datasets/faces/versions").exists()
    result = run(SHARED, Workspace.at(tmp_path))
    assert result["parts"] == {"all": 8, "reused": there}
    assert result["digest"] == alone["digest"]


def test_a_worker_killed_in_the_middle_costs_nothing_but_time(
    ray_local: object, alone: dict[str, object], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = str(workspace.home / "killed")

    def deadly(item: dict[str, object], **settings: object) -> dict[str, int]:
        """On a worker: `stage_one`, but the first that comes to part 3 is killed as if its machine had run out of memory."""
        if item["number"] == 3 and not os.path.exists(marker):
            with open(marker, "w") as file:
                file.write(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return parts.stage_one(item, **settings)  # type: ignore[arg-type]

    workspace.home.mkdir(parents=True)
    monkeypatch.setattr("jobs.ingest.parts.stage_one", deadly)
    result = run(SHARED, workspace)
    assert Path(marker).read_text() != str(os.getpid())
    assert result["digest"] == alone["digest"]
    assert result["report"] == alone["report"]


def test_an_error_of_a_worker_comes_out_as_itself(ray_local: object, tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    source = NpzSource(path=str(tmp_path / "broken.npz"))
    rows = [{"number": 0, "names": ["000000"]}]
    settings = {"recipe": {"source": {"kind": "NpzSource", "path": source.path}}, "uri": tmp_path.as_uri()}
    with pytest.raises(DataError, match=r"broken\.npz is no readable \.npz archive"):
        list(bulk.each(parts.stage_one, rows, workers=2, prefix="staging/x", **settings))
