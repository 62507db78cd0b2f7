"""Decoding in a process of its own, which the kernel holds to its memory and its processor time: for files of strangers.

The child's standard input is the file itself, so that it has nothing to open. It answers with lines of JSON; the line of
a frame is followed by its pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from counterfake.errors import MediaError
from counterfake.video.clip import (
    Clip,
    Clock,
    Count,
    Frame,
    Frames,
    Info,
    Pixels,
    Source,
    VideoLimits,
    kind_of,
    opened,
    spread,
)

logger = logging.getLogger(__name__)

CHILD = "from counterfake.video.isolated import child; child()"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def frames(source: Source, count: int | None, every: int | None, limits: VideoLimits) -> Frames:
    """`video.frames` with the decoding in a child: same arguments, same frames, same errors."""
    clock = Clock(limits.deadline_seconds)
    with clock, contextlib.ExitStack() as stack:
        file = stack.enter_context(opened(source, limits))
        kind_of(file)  # what is no video at all is not worth a process
        process = _start(file, {"count": count, "every": every, "limits": dataclasses.asdict(limits)})
        damaged = Count()
        made = _received(process, clock, damaged)
        info = cast(Info, next(made))
        return Frames(info, clock, cast(Iterator[Frame], made), damaged)


def child() -> None:
    """Entry of the process that decodes: standard input is the file, the first argument the request."""
    request = json.loads(sys.argv[1])
    limits = VideoLimits(**request["limits"])
    _confine(limits)
    out = sys.stdout.buffer
    try:
        with Clock(math.inf) as clock:  # the parent watches: here, waiting for it to read would count as well
            clip = Clip(sys.stdin.buffer, limits, clock)
            _say(out, {"info": dataclasses.asdict(clip.info)})
            for frame in clip.chosen(spread(clip.info.frames, request["count"], request["every"], limits)):
                line = {"index": frame.index, "time_s": frame.time_s, "shape": frame.pixels.shape}
                _say(out, line | {"damaged": clip.damaged.value}, frame.pixels)
        _say(out, {"damaged": clip.damaged.value})
    except MediaError as error:
        _say(out, {"error": error.reason, "text": str(error)})
    except MemoryError:
        _say(out, {"error": "bomb", "text": "decoding this video needs more memory than it may have"})


# -- private ------------------------------------------------------------------------------------------------------------


def _start(file: BinaryIO, request: dict[str, Any]) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as stack:
        if isinstance(file, io.BytesIO):
            copy = stack.enter_context(tempfile.TemporaryFile())
            copy.write(file.getbuffer())
            copy.flush()
            file = cast(BinaryIO, copy)
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, json.dumps(request)],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        )


def _environment() -> dict[str, str]:
    """What an interpreter needs to start; no credentials for a decoder that a stranger's file takes over."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _received(process: subprocess.Popen[bytes], clock: Clock, damaged: Count) -> Iterator[Info | Frame]:
    """The child's answer: what the video is, then its frames. The child is killed at the deadline, or if left alone."""
    assert process.stdout is not None
    try:
        while True:
            message, body = _message(process, process.stdout, clock)
            damaged.value = message.get("damaged", damaged.value)
            if "info" in message:
                yield Info(**message["info"])
            elif "shape" in message:
                pixels = np.frombuffer(body, np.uint8).reshape(message["shape"])
                yield Frame(pixels, message["index"], message["time_s"])
            elif "error" in message:
                raise MediaError(message["error"], message["text"])
            else:
                return
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _message(process: subprocess.Popen[bytes], pipe: Any, clock: Clock) -> tuple[dict[str, Any], bytearray]:
    """The next line and its pixels. Raises MediaError if the child ended or was ended without one."""
    alarm = threading.Timer(max(0.0, clock.left), process.kill)
    alarm.daemon = True
    alarm.start()
    try:
        message = json.loads(pipe.readline() or "null")
        body = bytearray(int(np.prod(message["shape"]))) if message and "shape" in message else bytearray()
        if message is not None and (not body or pipe.readinto(body) == len(body)):
            return message, body
    except ValueError as error:
        logger.debug("the decoding process was cut off: %s", error)
    finally:
        alarm.cancel()
    clock.check()
    if process.wait() == -signal.SIGXCPU:
        raise clock.error()
    if process.returncode == -signal.SIGKILL:  # and not by our alarm
        raise MediaError("bomb", "the machine ran out of memory while this video was decoded")
    raise MediaError("undecodable", f"decoding this video ended its process (status {process.returncode})")


def _say(out: Any, line: dict[str, Any], pixels: Pixels | None = None) -> None:
    out.write(json.dumps(line).encode() + b"\n")
    if pixels is not None:
        out.write(pixels.data)
    out.flush()


def _confine(limits: VideoLimits) -> None:
    """From here on: so much memory and processor time, no file written, no core dump."""
    pages = Path("/proc/self/statm")
    now = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    seconds = int(limits.deadline_seconds) + 2
    for kind, value in (
        (resource.RLIMIT_AS, now + limits.memory_bytes), (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        with contextlib.suppress(ValueError, OSError):  # a stricter limit is there already
            resource.setrlimit(kind, (value, value))
