"""An HTTP proxy in front of an S3 server that does to requests and answers what networks and servers do."""

from __future__ import annotations

import http.client
import http.server
import random
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

# (number of the request from 1, method, path) -> "" or the name of a fault
Fault = Callable[[int, str, str], str]
ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>made by a test</Message></Error>"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Share of requests for each fault, drawn by a seed and the number of the request."""

    unavailable: float = 0.05
    reset: float = 0.02
    truncate: float = 0.02
    flip: float = 0.01
    stall: float = 0.01
    seed: int = 0

    def __call__(self, number: int, method: str, path: str) -> str:
        position = random.Random(f"{self.seed}/{number}").random()
        shares = {"503": self.unavailable, "reset": self.reset, "truncate": self.truncate}
        for fault, share in (shares | {"flip": self.flip, "stall": self.stall}).items():
            position -= share
            if position < 0:
                return fault
        return ""


class FaultProxy(http.server.ThreadingHTTPServer):
    """Forwards to `target` and applies the fault that `fault` names for each request.

    Before the server hears of it: 503, reset, black-hole (silence), bad-digest, no-conditions (501 to If-None-Match). After it did its work: lost (the connection
    ends), truncate, flip (one bit of the body), stall (silence before the body), drip (ten bytes a second).
    The request itself: unconditional (If-None-Match is dropped), look-then-write (it is checked, but not atomically),
    no-metadata (x-amz-meta-* is dropped).
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str, fault: Fault, *, stall_s: float = 2.5) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urllib.parse.urlsplit(target).netloc
        self.fault, self.stall_s = fault, stall_s
        self.after: Callable[[str, str], None] = lambda method, path: (
            None
        )  # once the server has done a request
        self.seen: Counter[str] = Counter()
        self.count = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def next_fault(self, method: str, path: str) -> str:
        with self.lock:
            self.count += 1
            fault = self.fault(self.count, method, path)
            self.seen[fault] += 1
        return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this is for."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy
    upstream: http.client.HTTPConnection | None = None

    def handle_any(self) -> None:
        fault = self.server.next_fault(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "no-conditions" and "If-None-Match" in self.headers:
            self.answer(501, [], ERROR % b"NotImplemented")
        elif fault == "503":
            self.answer(503, [], ERROR % b"SlowDown")
        elif fault == "bad-digest":
            self.answer(400, [], ERROR % b"BadDigest")
        elif fault == "reset":
            self.hang_up()
        elif fault == "black-hole":
            time.sleep(self.server.stall_s)
            self.hang_up()
        else:
            self.forward(body, fault)

    def forward(self, body: bytes, fault: str) -> None:
        headers = self.changed_headers(fault)
        if headers is None:
            self.answer(412, [], ERROR % b"PreconditionFailed")
            return
        response = self.ask(self.command, body, headers)
        data = response.read()
        self.server.after(self.command, self.path)
        kept = [
            (k, v) for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding")
        ]
        if fault == "lost":
            self.hang_up()
            return
        if fault == "flip" and data:
            where = random.Random(self.server.count).randrange(len(data))
            data = data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]
        self.answer(response.status, kept, data, fault)

    def ask(self, method: str, body: bytes, headers: dict[str, str]) -> http.client.HTTPResponse:
        """One upstream connection for each of the client's."""
        if self.upstream is None:
            self.upstream = http.client.HTTPConnection(self.server.target)
        self.upstream.request(method, self.path, body, headers)
        return self.upstream.getresponse()

    def changed_headers(self, fault: str) -> dict[str, str] | None:
        """The request's headers; None if it is to be refused as a write to a key that exists."""
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")}
        if fault == "no-metadata":
            return {k: v for k, v in headers.items() if not k.lower().startswith("x-amz-meta-")}
        if fault not in ("unconditional", "look-then-write"):
            return headers
        if headers.pop("If-None-Match", None) and fault == "look-then-write":
            response = self.ask("HEAD", b"", headers | {"Content-Length": "0"})
            response.read()
            if response.status == 200:
                return None
            time.sleep(0.03)
        return headers

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str = "") -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "stall":
            time.sleep(self.server.stall_s)
        if fault == "drip":
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        elif fault == "truncate":
            self.wfile.write(data[: len(data) // 2])
            self.hang_up()
        else:
            self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def log_message(self, *_: object) -> None:
        pass
