"""Processes to be killed or to race: starts once, then forks a writer for each line `URI ENDPOINT FIRST LAST AT` on its input.

It says `ready 0` first. A writer begins at the time AT (seconds since 1970). The answer is `started PID` and, to the line
`wait PID`, `ended STATUS`; until then the number stays the writer's own. A fork costs milliseconds where an interpreter
with its imports would cost seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback

import boto3  # noqa: F401 - so that no fork has to import it
import pandas as pd  # noqa: F401 - which pyarrow imports on first use

from tests.chaos import pictures


def main() -> None:
    print("ready", 0, flush=True)
    for line in iter(sys.stdin.readline, ""):  # reads no further than it must: a fork has the rest as well
        words = line.split()
        if words[0] == "wait":
            print("ended", os.waitstatus_to_exitcode(os.waitpid(int(words[1]), 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _write(*words)
        print("started", pid, flush=True)


def _write(uri: str, endpoint: str, first: str, last: str, at: str) -> None:
    """Ends the process."""
    access = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(access | {"AWS_ENDPOINT_URL": endpoint})
    time.sleep(max(0.0, float(at) - time.time()))
    try:
        pictures.store(uri, int(first), int(last))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Writers:
    """The other end: `start` writers, perhaps kill them, `wait` for the exit code of each."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.chaos.writer"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer("ready")  # its imports are no writer's time

    def start(self, uri: str, first: int, last: int, endpoint: str = "none", at: float = 0.0) -> int:
        """The process id of a writer of pictures [first, last) that begins at a time (seconds since 1970)."""
        return self._ask(f"{uri} {endpoint} {first} {last} {at}", "started")

    def wait(self, pid: int) -> int:
        """0, or minus the number of the signal that ended it."""
        return self._ask(f"wait {pid}", "ended")

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, line: str, word: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer(word)

    def _answer(self, word: str) -> int:
        assert self._process.stdout is not None
        found, number = self._process.stdout.readline().split()
        assert found == word, f"the writer said {found} instead of {word}"
        return int(number)


if __name__ == "__main__":
    main()
