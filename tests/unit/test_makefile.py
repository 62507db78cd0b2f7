"""The Makefile as a user calls it: what DATA and KEEP become, and what a Python that does not fit is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    ours = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "DATA", "KEEP", "PYTHON")  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def demo(tmp_path: Path, *words: str) -> list[str]:
    """The arguments that `make demo` gives to the command, in an environment that counts as installed."""
    script(tmp_path / "counterfake", "printf '%s\\n' \"$@\"")
    (tmp_path / "stamp-now").touch()
    done = make("demo", f"BIN={tmp_path}", f"STAMP={tmp_path}/stamp", "INSTALL_KEY=now", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]  # after the line that make echoes


@pytest.mark.parametrize("folder", ["pictures", "/home/me/my pictures", 'it\'s $HOME "here"; echo no'])
def test_data_reaches_the_demo_as_it_was_typed(tmp_path: Path, folder: str) -> None:
    typed = folder.replace("$", "$$")  # make's own sign
    assert demo(tmp_path, f"DATA={typed}") == ["run", "demo", "--set", f"data={folder}"]


@pytest.mark.parametrize(
    ("word", "kept"), [("1", True), ("yes", True), ("0", False), ("no", False), ("", False)]
)
def test_keep_is_a_yes_or_a_no(tmp_path: Path, word: str, kept: bool) -> None:
    assert demo(tmp_path, f"KEEP={word}") == ["run", "demo", *(["--set", "keep=true"] if kept else [])]


def test_another_python_is_told_in_one_line(tmp_path: Path) -> None:
    pretend = "import sys; code = sys.argv[1]; sys.version_info = (3, 14, 0); exec(code)"
    other = script(tmp_path / "python3", f'exec "{sys.executable}" -c "{pretend}" "$2"')
    done = make("setup", f"PYTHON={other}", f"VENV={tmp_path}/venv", "INSTALL_KEY=now")
    assert done.returncode != 0
    first, *rest = done.stderr.splitlines()
    assert first == "Python 3.11 or 3.12 is needed, this is 3.14; set PYTHON=python3.11"
    assert len(rest) == 1, "make's own line"
    assert not (tmp_path / "venv").exists()
