"""A process to be killed: starts once, then forks a writer for each line `URI ENDPOINT FIRST LAST` on its input.

It answers `started PID` and, to the line `wait`, `ended STATUS`; until then the number stays the writer's own. A fork
costs milliseconds where an interpreter with its imports would cost seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback

import boto3  # noqa: F401 - so that no fork has to import it

from tests.chaos import pictures


def main() -> None:
    pid = 0
    for line in iter(sys.stdin.readline, ""):  # reads no further than it must: a fork has the rest as well
        if line.strip() == "wait":
            print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _write(*line.split())
        print("started", pid, flush=True)


def _write(uri: str, endpoint: str, first: str, last: str) -> None:
    """Ends the process."""
    access = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(access | {"AWS_ENDPOINT_URL": endpoint})
    try:
        pictures.store(uri, int(first), int(last))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Writers:
    """The other end: `start` a writer, perhaps kill it, `wait` for its exit code."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.chaos.writer"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, uri: str, first: int, last: int, endpoint: str = "none") -> int:
        return self._ask(f"{uri} {endpoint} {first} {last}", "started")

    def wait(self) -> int:
        """0, or minus the number of the signal that ended it."""
        return self._ask("wait", "ended")

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, line: str, word: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        found, number = self._process.stdout.readline().split()
        assert found == word, f"the writer said {found} instead of {word}"
        return int(number)


if __name__ == "__main__":
    main()
