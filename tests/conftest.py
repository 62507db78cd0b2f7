"""Fixtures shared by all tests. Nothing here loads Ray or MLflow until a test asks for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_ADDRESS", "local")  # never join a cluster that happens to run on this machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share two cores
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run the promises at their full figures too: minutes"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a promise at its full figure; runs with --full only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="the full figure of a promise: pytest --full"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout. A user's machine has none of it, and then the test says so."""
    folder = Path(os.environ.get("COUNTERFAKE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set COUNTERFAKE_TEST_DATA to run this test")
    return folder


@dataclass(frozen=True)
class Credentials:
    """PEM files of a throwaway signer: its chain up to a root of its own, and its key."""

    certificate: str
    key: str


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Credentials]:
    """`credentials(algorithm="es256")` or "ed25519" -> a new signer of C2PA manifests; days: how long it is valid."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def certificate(name: str, issuer: str, key: Any, issued_by: Any, days: int) -> Any:
        now, root = datetime.now(UTC), name == issuer
        subject, signer = (
            x509.Name(
                [
                    x509.NameAttribute(o, v)
                    for o, v in ((NameOID.ORGANIZATION_NAME, "tests"), (NameOID.COMMON_NAME, n))
                ]
            )
            for n in (name, issuer)
        )
        usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False)  # fmt: skip
        made = x509.CertificateBuilder(
            signer,
            subject,
            key.public_key(),
            x509.random_serial_number(),
            now - timedelta(days=30),
            now + timedelta(days=days),
        )
        made = made.add_extension(x509.BasicConstraints(root, None), critical=True)
        made = made.add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=root, crl_sign=root, **usage), critical=True
        )
        made = made.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issued_by.public_key()), critical=False
        )
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        if not root:
            made = made.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
            )
        return made.sign(
            issued_by, None if isinstance(issued_by, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        )

    def issue(algorithm: str = "es256", *, days: int = 30) -> Credentials:
        edwards = algorithm == "ed25519"
        root, own = (
            ed25519.Ed25519PrivateKey.generate() if edwards else ec.generate_private_key(ec.SECP256R1())
            for _ in range(2)
        )
        chain = certificate("leaf", "root", own, root, days), certificate("root", "root", root, root, 30)
        folder, pem = tmp_path_factory.mktemp("credentials"), serialization.Encoding.PEM
        (folder / "chain.pem").write_bytes(b"".join(c.public_bytes(pem) for c in chain))
        form = (
            serialization.PrivateFormat.TraditionalOpenSSL
            if not edwards
            else serialization.PrivateFormat.PKCS8
        )
        (folder / "key.pem").write_bytes(own.private_bytes(pem, form, serialization.NoEncryption()))
        return Credentials(str(folder / "chain.pem"), str(folder / "key.pem"))

    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    return issue


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    """A run in this process leaves torch its threads, and two cores shared by several processes make those spin."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


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
    """moto's server: S3 over real HTTP, its conditional writes made atomic: moto looks first and then writes."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    responses = pytest.importorskip("moto.s3.responses").S3Response
    put_object, one_at_a_time = responses.put_object, threading.Lock()

    def put(request: Any) -> Any:
        with one_at_a_time:
            return put_object(request)

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses, "put_object", put)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A fresh bucket on moto, with the environment that boto3 and pyarrow read."""
    return _bucket(s3_endpoint, "test", "test", monkeypatch)


@pytest.fixture(scope="session")
def swift_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """OpenStack Swift, a real S3 server, started by a script beside the checkout that a user's machine may not have."""
    default = ROOT.parent / "shared" / "tools" / "swift-s3"
    script = Path(os.environ.get("COUNTERFAKE_TEST_SWIFT", default))
    if not script.is_file():
        pytest.skip(f"no S3 server to start at {script}; set COUNTERFAKE_TEST_SWIFT to a script that does")
    if os.geteuid() != 0:
        pytest.skip("Swift writes to /etc/swift, which needs root")
    folder, port = (
        Path("/var/tmp/counterfake-test-swift"),
        _five_free_ports(),
    )  # its install is kept between runs
    command = [str(script), str(folder), str(port)]
    started = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    pids = [int(pid) for pid in (folder / "pids").read_text().split()] if (folder / "pids").exists() else []
    try:
        if started.returncode or '"swift"' not in started.stdout:
            pytest.skip(f"Swift did not start: {(started.stderr.strip() or 'no answer').splitlines()[-1]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


@pytest.fixture
def swift(swift_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A fresh bucket on Swift."""
    return _bucket(swift_endpoint, "test:tester", "testing", monkeypatch)


@pytest.fixture
def faulty_s3(s3: S3) -> Iterator[Callable[..., Any]]:
    """`faulty_s3(fault)` -> a FaultProxy in front of this test's bucket on moto, with `fault(number, method, path)`."""
    from tests.chaos.proxy import FaultProxy

    with ExitStack() as stack:
        yield lambda fault, **options: stack.enter_context(FaultProxy(s3.endpoint, fault, **options))


def _bucket(endpoint: str, key: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    import boto3
    from botocore.config import Config

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    style = Config(s3={"addressing_style": "path"})
    session = boto3.session.Session()  # the default one keeps the credentials of an earlier test
    session.client("s3", endpoint_url=endpoint, config=style).create_bucket(Bucket=bucket)
    return S3(f"s3://{bucket}", endpoint)


def _five_free_ports() -> int:
    """The first of five neighbouring ports that nobody uses."""
    while True:
        first = free_port()
        try:
            with ExitStack() as stack:
                for port in range(first, first + 5):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
        except (OSError, OverflowError):
            continue


@pytest.fixture(scope="session")
def ray_local() -> Iterator[object]:
    """One local Ray for all cluster tests of this run: two CPUs, shut down at the end."""
    from counterfake.cluster import session

    with session.session(cpus=2) as info:
        yield info
