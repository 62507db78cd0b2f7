"""No call outlives its deadline: attempts, the waits between them, patience with a silent server, bodies that drip.

Bodies that arrive truncated or altered are read again, which boto3 never does.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity

from counterfake.errors import CorruptError, StorageError, StorageTimeoutError
from counterfake.storage import aws

T = TypeVar("T")

DEADLINE_SECONDS = 120.0  # of one call, retries and waits included
ATTEMPTS = 8  # about 10 s of waiting at most before an endpoint that refuses is given up
STALL_SECONDS = 8.0  # a socket silent for so long is given up and the request made again
FIRST_STALL_SECONDS = (0.25, 0.5, 1.0, 2.0)  # of a read's first attempt; the server's usual pace chooses
CHUNK_BYTES = 1 << 20  # between two looks at the clock


class Again(Exception):
    """A failure worth another attempt; the message is its short reason."""

    busy = False  # the server asks for time


class Retries:
    """The calls of one store: each is tried until it works, fails for good, or the attempts or the time are used up."""

    def __init__(self, uri: str, deadline_s: float) -> None:
        self.uri, self.deadline_s = uri, deadline_s
        self.stall_s = min(STALL_SECONDS, deadline_s / 4)

    def call(self, verb: str, key: str, attempt: Callable[[float], T]) -> T:
        """`attempt(deadline)`, a time of `time.monotonic`. Raises StorageError, of the kind that fits.

        None begins so late that a connection and an answer which both stall would end after the deadline.
        """
        what = f"{verb} {self.uri}/{key}"
        start, last = time.monotonic(), self.deadline_s - 2 * self.stall_s
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(last),
            wait=_pause,
            retry=tenacity.retry_if_exception_type(Again),
            reraise=True,
        )
        try:
            return retrying(_once, attempt, start + self.deadline_s, what)
        except Again as error:
            raise _gave_up(error, what, time.monotonic() - start, retrying, self.deadline_s) from error

    def bulk_attempts(self) -> int:
        """Of the AWS SDK below pyarrow, so that one call ends by the deadline though each attempt stalls twice, in connecting
        and in the answer. Before attempt n + 1 it waits 2^(n-1) seconds at most."""
        fitting = (
            n for n in range(2, ATTEMPTS + 1) if 2 * n * self.stall_s + 2 ** (n - 1) - 1 <= self.deadline_s
        )
        return max(fitting, default=1)


class Patience:
    """How long the first attempt of a read bears silence: eight times what this server usually needs for an answer.

    An epoch in order waits for each stalled request, so two seconds for every hundredth of a few milliseconds would make
    it many times as long. Later attempts have STALL_SECONDS, and teach it where the server has become slow.
    """

    def __init__(self) -> None:
        self._usual_s, self._answers = 0.0, 0

    def learn(self, seconds: float) -> None:
        """A moving average; threads may lose one of the other's answers, which does no harm."""
        weight = 0.1 if self._answers else 1.0
        self._usual_s += weight * (seconds - self._usual_s)
        self._answers += 1

    def seconds(self) -> float:
        wanted = 8 * self._usual_s if self._answers >= 16 else FIRST_STALL_SECONDS[-1]
        return next((step for step in FIRST_STALL_SECONDS if step >= wanted), FIRST_STALL_SECONDS[-1])


def upload_body(data: bytes, deadline: float) -> bytes | io.BytesIO:
    """What to send; it stops at the deadline. Small bodies go out at once: for a file the client would first ask the server
    to continue."""
    return data if len(data) <= CHUNK_BYTES else _Body(data, deadline)


def drain(body: Any, expected: int, deadline: float) -> bytes:
    """All bytes of a response. Raises Again if they are too few or come too slowly."""
    # read1 returns what one recv gave, so that a server that drips bytes cannot outlive the deadline
    raw = getattr(body, "_raw_stream", body)
    read = getattr(raw, "read1", raw.read)
    chunks: list[bytes] = []
    received = 0
    while received < expected:
        if time.monotonic() > deadline:
            raise Again(f"stalled after {received} of {expected} bytes")
        chunk = read(min(CHUNK_BYTES, expected - received))
        if not chunk:
            raise Again(f"body ended after {received} of {expected} bytes")
        chunks.append(chunk)
        received += len(chunk)
    return b"".join(chunks)


# -- private --------------------------------------------------------------------------------------------------------

_BACKOFF = tenacity.wait_random_exponential(multiplier=0.1, max=5)


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before another attempt: none after the first failure, unless the server is busy."""
    error = state.outcome.exception() if state.outcome else None
    return 0.0 if state.attempt_number == 1 and not getattr(error, "busy", True) else _BACKOFF(state)


def _once(attempt: Callable[[float], T], deadline: float, what: str) -> T:
    try:
        return attempt(deadline)
    except (Again, StorageError):
        raise
    except Exception as error:
        if aws.is_transient(error):
            again = Again(aws.reason(error))
            again.busy = aws.status(error) is not None  # it did answer
            raise again from error
        raise aws.final(error, what) from error


def _gave_up(error: Again, what: str, seconds: float, retrying: Any, deadline_s: float) -> StorageError:
    tries = retrying.statistics.get("attempt_number", 1)
    story = f"cannot {what}: {tries} attempts in {seconds:.0f} s, the last: {error}"
    if str(error).startswith("SHA-256"):
        return CorruptError(f"{story}; the stored bytes were altered: restore the object from a copy")
    if tries < ATTEMPTS:
        return StorageTimeoutError(
            f"{story}; the deadline is {deadline_s:g} s: check that the endpoint is up"
        )
    return StorageError(f"{story}; check that the endpoint is up and the network is healthy, then run again")


class _Body(io.BytesIO):
    """An upload that stops at the deadline. A socket's own time-out is for all of a bytes object, but for each block of a file."""

    def __init__(self, data: bytes, deadline: float) -> None:
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._deadline:
            raise Again(f"the upload stalled after {self.tell()} bytes")
        return super().read(size)
