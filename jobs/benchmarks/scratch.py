"""Scratch environments for peers: a venv that sees the packages of this one and adds its own. Never a dependency."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from jobs.benchmarks.harness import ContestantFailed

INSTALLS_WITHIN = 600  # seconds


def python_with(packages: Sequence[str], root: Path) -> Path:
    """The interpreter of an environment with these packages, made on first use. ContestantFailed if pip cannot.

    torch is held at the version that is here, so that no second one is downloaded.
    """
    key = hashlib.sha256(json.dumps([sorted(packages), sys.version, sys.prefix]).encode()).hexdigest()[:12]
    folder = root / f"{re.sub(r'[^A-Za-z0-9.-]', '-', packages[0])}-{key}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        _make(folder)
        _install(python, packages, folder)
        done.touch()
    return python


def _make(folder: Path) -> None:
    venv.create(folder, with_pip=False, clear=True)
    here = sysconfig.get_paths()["purelib"]
    inside = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (inside / "host.pth").write_text(f"import site; site.addsitedir({here!r})\n")


def _install(python: Path, packages: Sequence[str], folder: Path) -> None:
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={importlib.metadata.version('torch').split('+')[0]}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "-c",
        str(constraints),
    ]
    try:
        done = subprocess.run(
            [*command, *packages], capture_output=True, text=True, timeout=INSTALLS_WITHIN, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ContestantFailed(f"pip install {' '.join(packages)} took over {INSTALLS_WITHIN} s") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            "ERROR: pip failed"
        ]
        raise ContestantFailed(f"cannot be installed: {errors[-1].removeprefix('ERROR: ')}")
