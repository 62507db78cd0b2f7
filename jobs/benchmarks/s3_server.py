"""moto's S3 server as a process of its own: prints its port, ends when its standard input does, so with whoever started it.

Loopback is faster than any network. With `megabytes_per_second` the answers pass through a relay that lets no more
than that through, over all connections together.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time

from jobs.benchmarks.harness import ContestantFailed

CHUNK = 1 << 16  # bytes the relay lets through at a time


def start(megabytes_per_second: float = 0.0) -> tuple[subprocess.Popen[str], str]:
    """(the process, to be kept; its endpoint). Access is for anybody, with keys of any kind. 0 = as fast as it goes."""
    command = [sys.executable, "-m", "jobs.benchmarks.s3_server", str(megabytes_per_second)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    if not port:
        raise ContestantFailed(
            "moto's server did not start; install it with: pip install 'counterfake[test]'"
        )
    return process, f"http://127.0.0.1:{port}"


class _Link:
    """A shared line: whoever wants to send waits until what was sent before is through."""

    def __init__(self, megabytes_per_second: float) -> None:
        self._seconds_per_byte = 1 / (megabytes_per_second * 1e6)
        self._free_at = 0.0

    async def pass_through(self, size: int) -> None:
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + size * self._seconds_per_byte
        await asyncio.sleep(self._free_at - now)


async def _relay(server: int, link: _Link) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection("127.0.0.1", server)
        await asyncio.gather(_pump(reader, requests, None), _pump(answers, writer, link))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, link: _Link | None) -> None:
    try:
        while data := await source.read(CHUNK):
            if link is not None:
                await link.pass_through(len(data))
            sink.write(data)
            await sink.drain()
    except ConnectionError:
        pass  # the other side has gone; so does this one
    finally:
        sink.close()


def main() -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    limit = float(sys.argv[1])
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    if limit:
        threading.Thread(target=asyncio.run, args=(_relay(port, _Link(limit)),), daemon=True).start()
    else:
        print(port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
