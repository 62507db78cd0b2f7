"""Fixtures shared by all tests. Nothing here loads Ray or MLflow until a test asks for it."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("RAY_ADDRESS", "local")  # never join a cluster that happens to run on this machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share two cores
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout. A user's machine has none of it, and then the test says so."""
    folder = Path(os.environ.get("COUNTERFAKE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set COUNTERFAKE_TEST_DATA to run this test")
    return folder


@pytest.fixture
def workspace(tmp_path: Path):
    from counterfake.workspace import Workspace

    return Workspace.at(tmp_path / "runs")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(name="free_port")
def _free_port() -> int:
    return free_port()


@dataclass(frozen=True)
class S3:
    uri: str  # s3://bucket, a new bucket for each test
    endpoint: str  # http://127.0.0.1:port


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """moto's server: S3 over real HTTP."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A fresh bucket, with the environment that boto3 and pyarrow read."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return S3(f"s3://{bucket}", s3_endpoint)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[object]:
    """One local Ray for all cluster tests of this run: two CPUs, shut down at the end."""
    from counterfake.cluster import session

    with session.session(cpus=2) as info:
        yield info
