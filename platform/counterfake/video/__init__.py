"""Video files to frames with true timestamps, and frames to video files. Holds the only import of PyAV.

clip.py opens and decodes one file, isolated.py does it in a process of its own, writing.py makes an MP4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from counterfake.errors import ConfigError
from counterfake.video import isolated as confined
from counterfake.video.clip import (
    DEMUXERS,
    LOCAL,
    UPLOAD,
    Clip,
    Clock,
    Frame,
    Frames,
    Info,
    Pixels,
    Source,
    VideoLimits,
    opened,
    spread,
)  # fmt: skip
from counterfake.video.writing import Written, write

__all__ = [
    "DEMUXERS", "LOCAL", "UPLOAD", "Frame", "Frames", "Info", "Pixels", "Source", "VideoLimits", "Written", "frames",
    "probe", "write",
]  # fmt: skip


def probe(source: Source, limits: VideoLimits = UPLOAD) -> Info:
    """What the video is, without decoding a frame. Raises MediaError (reasons as `frames`), NotFoundError."""
    with Clock(limits.deadline_seconds) as clock, opened(source, limits) as file:
        return Clip(file, limits, clock).info


def frames(
    source: Source,
    *,
    count: int | None = None,
    every: int | None = None,
    limits: VideoLimits = UPLOAD,
    isolated: bool = False,
) -> Frames:
    """`count` frames spread evenly over the video (the middle of each of `count` equal parts), or every `every`-th.

    A frame that does not decode is counted and the next good one stands in for it, once. Error concealment is off, but
    frames that refer to a lost one may show traces of that. isolated: decode in a process of its own, held to
    limits.memory_bytes and limits.deadline_seconds by the kernel: for files of strangers.
    Raises ConfigError unless exactly one of count and every is given; NotFoundError; MediaError with reason empty,
    too_large (bytes, seconds, frames), too_small, unsupported (container, codec, no video), bomb (size, memory), too_slow
    or undecodable. An error may also be raised by the iteration: it is decoding that finds it.
    """
    if (count is None) == (every is None) or (count or every or 0) < 1:
        raise ConfigError(f"give either count or every, 1 or more; got count={count}, every={every}")
    if count is not None and count > limits.frames:
        raise ConfigError(f"count is {count} but limits.frames is {limits.frames}; ask for fewer frames")
    if isolated:
        return confined.frames(source, count, every, limits)
    return _here(source, count, every, limits)


# -- private ------------------------------------------------------------------------------------------------------------


def _here(source: Source, count: int | None, every: int | None, limits: VideoLimits) -> Frames:
    clock, stack = Clock(limits.deadline_seconds), contextlib.ExitStack()
    with stack, clock:
        clip = Clip(stack.enter_context(opened(source, limits)), limits, clock)
        wanted = spread(clip.info.frames, count, every, limits)
        return Frames(clip.info, clock, _closing(stack.pop_all(), clip.chosen(wanted)), clip.damaged)


def _closing(stack: contextlib.ExitStack, made: Iterator[Frame]) -> Iterator[Frame]:
    with stack:
        yield from made
