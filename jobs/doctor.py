"""Checks of the machine, the storage and the services, each with what to do when it is not well."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from counterfake.errors import CounterfakeError
from counterfake.workspace import Workspace

State = Literal["good", "warn", "bad"]
GIB = 2**30
PORTS = {8000: "detection service", 8265: "Ray dashboard and jobs", 6379: "Ray head"}


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how it is, what was found, what to do."""

    check: str
    state: State
    found: str
    advice: str = ""

    def row(self) -> tuple[str, str, str, str]:
        return self.check, self.state, self.found, self.advice


def examine(workspace: Workspace) -> list[Finding]:
    """All findings, in the order in which a first run would meet them."""
    checks: list[Callable[[Workspace], Iterator[Finding]]] = [
        _python, _packages, _machine, _disk, _ports, _storage, _tracking, _tokens,
    ]  # fmt: skip
    return [finding for check in checks for finding in check(workspace)]


def _python(workspace: Workspace) -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding(
        "python",
        "good" if good else "bad",
        platform.python_version(),
        "" if good else "use Python 3.11 or 3.12",
    )
    shadowed = Path("platform/__init__.py").exists()
    if shadowed:
        yield Finding(
            "platform/", "bad", "platform/__init__.py", "remove it: it shadows the standard library"
        )


def _packages(workspace: Workspace) -> Iterator[Finding]:
    tested = _constraints()
    for name in ("ray", "torch", "mlflow", "pyarrow", "boto3", "prometheus-client"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "bad", "not installed", "run make setup")
            continue
        wanted = tested.get(name, found)
        same = found.split("+")[0] == wanted.split("+")[0]
        yield Finding(
            name, "good" if same else "warn", found, "" if same else f"tested with {wanted}; run make setup"
        )


def _constraints() -> dict[str, str]:
    path = Path(__file__).resolve().parent.parent / "constraints.txt"
    if not path.exists():
        return {}
    pairs = (line.strip().partition("==") for line in path.read_text().splitlines() if "==" in line)
    return {name.lower().replace("_", "-"): version for name, _, version in pairs}


def _machine(workspace: Workspace) -> Iterator[Finding]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = len(os.sched_getaffinity(0))
    state: State = "good" if cores >= 2 and memory >= 7 else "warn"
    advice = "" if state == "good" else "the demo wants 2 cores and 8 GiB"
    yield Finding("processor", state, f"{cores} cores, {memory:.0f} GiB", advice)
    count = torch.cuda.device_count()
    yield Finding(
        "accelerator",
        "good",
        f"{count} × {torch.cuda.get_device_name(0)}" if count else "none: trains on CPU",
    )
    shared = Path("/dev/shm")
    if shared.exists():
        free = shutil.disk_usage(shared).free / GIB
        ok = free >= 1
        yield Finding(
            "shared memory", "good" if ok else "warn", f"{free:.1f} GiB free", "" if ok else "Ray falls back to disk; docker run --shm-size=2g"
        )  # fmt: skip


def _disk(workspace: Workspace) -> Iterator[Finding]:
    folder = next(p for p in (workspace.home, *workspace.home.parents) if p.exists())
    free = shutil.disk_usage(folder).free / GIB
    state: State = "good" if free >= 5 else "warn" if free >= 1 else "bad"
    yield Finding(
        "disk",
        state,
        f"{free:.0f} GiB free under {folder}",
        "" if state == "good" else "free 5 GiB or set COUNTERFAKE_HOME",
    )
    if not os.access(folder, os.W_OK):
        yield Finding("home", "bad", f"{folder} is not writable", "set COUNTERFAKE_HOME to a folder of yours")


def _ports(workspace: Workspace) -> Iterator[Finding]:
    for port, purpose in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(0.5)
            used = probe.connect_ex(("127.0.0.1", port)) == 0
        advice = f"{purpose} wants it; choose another or stop what listens" if used else ""
        yield Finding(
            f"port {port}", "warn" if used else "good", "in use" if used else f"free ({purpose})", advice
        )


def _storage(workspace: Workspace) -> Iterator[Finding]:
    from counterfake.storage import open_store, probe

    try:
        found = probe(open_store(workspace.storage))
        found.require(workspace.storage)
    except CounterfakeError as error:
        yield Finding("storage", "bad", workspace.storage, str(error))
        return
    if workspace.storage.startswith("file:"):
        checked = "checked by their digest when they are read"
    else:
        checked = "checked by the server" if found.checksums else "checked by us alone"
    yield Finding("storage", "good", f"{workspace.storage}: one of many writers wins, bytes are {checked}")


def _tracking(workspace: Workspace) -> Iterator[Finding]:
    from counterfake import tracking

    uri = workspace.tracking_uri
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        yield Finding("mlflow", "good", f"{uri} (made at first use)")
        return
    try:
        tracking.connect(uri)
        yield Finding("mlflow", "good", uri)
    except CounterfakeError as error:
        yield Finding("mlflow", "bad", uri, str(error))


def _tokens(workspace: Workspace) -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if mode != "token":
        yield Finding(
            "ray token",
            "warn",
            f"RAY_AUTH_MODE is {mode or 'not set'}",
            "export RAY_AUTH_MODE=token before `ray start --head`",
        )
    elif os.environ.get("RAY_AUTH_TOKEN"):  # as KubeRay gives it to its pods; goes before the file
        yield Finding("ray token", "good", "in RAY_AUTH_TOKEN")
    elif not path.exists():
        yield Finding(
            "ray token",
            "bad",
            f"no token at {path}",
            "ray get-auth-token --generate, or set RAY_AUTH_TOKEN_PATH",
        )
    elif path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield Finding("ray token", "warn", f"{path} is readable by others", f"chmod 600 {path}")
    else:
        yield Finding("ray token", "good", str(path))
