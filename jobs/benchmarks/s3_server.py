"""moto's S3 server as a process of its own: prints its port, ends when its standard input does, so with whoever started it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

from jobs.benchmarks.harness import ContestantFailed


def start() -> tuple[subprocess.Popen[str], str]:
    """(the process, to be kept; its endpoint). Access is for anybody, with keys of any kind."""
    command = [sys.executable, "-m", "jobs.benchmarks.s3_server"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    if not port:
        raise ContestantFailed(
            "moto's server did not start; install it with: pip install 'counterfake[test]'"
        )
    return process, f"http://127.0.0.1:{port}"


def main() -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
