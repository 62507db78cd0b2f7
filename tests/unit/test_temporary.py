"""Temporary folders: gone at the end, gone after a kill, and never taken from an owner who lives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from counterfake.outbox import Outbox
from counterfake.temporary import temporary_folder

OWNER = """
import sys
from pathlib import Path
from counterfake.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "media").write_bytes(bytes(100))
    print(folder, flush=True)
    sys.stdin.read()
"""
PART = """
import os, signal, sys
from counterfake.parts import Part, Staging
from counterfake.samples import Sample
from counterfake.storage import open_store
def items():
    yield Sample(image=b"bytes", source="s", path="a", fake=0)
    os.kill(os.getpid(), signal.SIGKILL)
Staging(open_store(sys.argv[1]), "staging").stage(Part(0, ("a",)), items())
"""


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_folder_goes_at_the_end_with_all_that_is_in_it(
    error: type[BaseException] | None, tmp_path: Path
) -> None:
    try:
        with temporary_folder(tmp_path) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_bytes(b"bytes")
            assert folder.parent == tmp_path
            if error is not None:
                raise error
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_what_a_killed_owner_left_goes_and_what_a_living_one_holds_stays(tmp_path: Path) -> None:
    living, killed = _owner(tmp_path), _owner(tmp_path)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(os.listdir(tmp_path)) == 2
    with temporary_folder(tmp_path) as folder:
        assert len(os.listdir(tmp_path)) == 2
        assert folder.name in os.listdir(tmp_path)
    (held,) = tmp_path.iterdir()
    assert os.listdir(held) == ["media"]
    living.communicate("")
    assert os.listdir(tmp_path) == []


def test_folders_of_another_machine_and_of_others_are_left_alone(tmp_path: Path) -> None:
    host = socket.gethostname()
    others = ["counterfake-work-elsewhere-abcdefgh", f"counterfake-work-{host}-2-abcdefgh", "counterfake-0"]
    for name in others:
        (tmp_path / name).mkdir()
    with temporary_folder(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_many_at_once_take_nothing_from_each_other(tmp_path: Path) -> None:
    def work(number: int) -> bytes:
        with temporary_folder(tmp_path) as folder:
            (folder / "mine").write_bytes(b"%d" % number)
            with temporary_folder(tmp_path):
                return (folder / "mine").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(200))) == [b"%d" % number for number in range(200)]
    assert os.listdir(tmp_path) == []


def test_a_part_of_an_ingest_leaves_nothing_once_its_killed_worker_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    store = (tmp_path / "store").as_uri()
    code = subprocess.run([sys.executable, "-c", PART, store], env=environment, check=False).returncode
    assert code == -signal.SIGKILL
    assert len(os.listdir(tmp_path / "temporary")) == 1
    survived = PART.replace("os.kill(os.getpid(), signal.SIGKILL)", "return")
    subprocess.run([sys.executable, "-c", survived, store], env=environment, check=True)
    assert os.listdir(tmp_path / "temporary") == []


def test_what_waits_to_be_sent_goes_with_its_outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outbox = Outbox("test", permanent=lambda error: True)
    outbox.spool("report").write_bytes(b"bytes")
    assert len(os.listdir(tmp_path)) == 1
    outbox.close()
    assert os.listdir(tmp_path) == []


def _owner(where: Path) -> subprocess.Popen[str]:
    """A process that holds a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(where)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process
