"""Pictures to an MP4 file, with the sound of another video; memory does not depend on the length."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from counterfake.errors import DataError
from counterfake.video.clip import LOCAL, Clock, Frame, Pixels, Source, demuxer, opened, stamp_of, translated

logger = logging.getLogger(__name__)

AUDIO_IN_MP4 = ("aac", "mp3", "mp3float", "ac3", "eac3", "opus", "alac", "flac")
TICKS = Fraction(1, 90_000)  # time base of what is written; holds 24, 25, 30 and 30000/1001 fps exactly


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What `write` made."""

    frames: int
    seconds: float
    codec: str
    audio: bool  # whether sound was copied


def write(
    path: str | Path,
    pictures: Iterable[Pixels | Frame],
    *,
    fps: float | Fraction = 25,
    audio_from: Source | None = None,
    crf: int = 18,
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """An MP4 (H.264, or MPEG-4 part 2 where the wheel has no encoder for it) from pictures (H, W, 3) uint8 RGB.

    A `Frame` keeps its own time, a plain picture gets its number / fps. crf: 0 lossless ... 51. The sound of `audio_from`
    is copied up to the end of the last frame, packet by packet; a codec MP4 cannot hold is left out with a warning. Odd
    sides grow by one repeated line (4:2:0 needs even ones). Memory does not depend on the length. The file appears under
    its name when it is whole. Raises DataError if there is no picture or they differ in size, MediaError for `audio_from`.
    """
    path = Path(path).absolute()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with contextlib.ExitStack() as stack:
            container = stack.enter_context(
                av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"})
            )
            container.metadata.update(metadata or {})
            sound = _Sound(stack, audio_from, container) if audio_from is not None else None
            written = _encode_all(container, pictures, Fraction(fps).limit_denominator(90_000), crf, sound)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return written


# -- private ------------------------------------------------------------------------------------------------------------


class _Sound:
    """Packets of an audio stream, handed to the output in step with its pictures."""

    def __init__(self, stack: contextlib.ExitStack, source: Source, output: Any) -> None:
        with translated():
            file = stack.enter_context(opened(source, LOCAL))
            container, _ = demuxer(file, LOCAL, stack.enter_context(Clock(math.inf)))
            self.stream: Any = next(iter(container.streams.audio), None)
            self._target: Any = None
            self._packets: Iterator[Any] = iter(())
            if self.stream is not None and self._fits():
                self._target = output.add_stream_from_template(self.stream)
                self._packets = (
                    p for p in container.demux(self.stream) if p.size and stamp_of(p) is not None
                )
        self._container, self._next, self.packets = container, next(self._packets, None), 0

    def _fits(self) -> bool:
        name = self.stream.codec_context.name if self.stream.codec_context else "unknown"
        if name not in AUDIO_IN_MP4:
            logger.warning("the sound is %s, which MP4 cannot hold; it is left out", name)
        return name in AUDIO_IN_MP4

    def until(self, output: Any, seconds: float) -> None:
        """Write what is heard before `seconds`."""
        while self._next is not None and stamp_of(self._next) * self.stream.time_base < seconds:
            packet, self._next = self._next, next(self._packets, None)
            packet.stream = self._target
            output.mux(packet)
            self.packets += 1


def _encode_all(
    output: Any, pictures: Iterable[Pixels | Frame], fps: Fraction, crf: int, sound: _Sound | None
) -> Written:
    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None:
        raise DataError("there is no picture to make a video of; give at least one")
    shape = _pixels(first).shape
    stream = _video_out(output, shape, fps, crf)
    count, last = 0, -1
    for number, picture in enumerate(itertools.chain([first], pictures)):
        if _pixels(picture).shape != shape:
            raise DataError(
                f"picture {number} is {_pixels(picture).shape}, the first one {shape}; make them alike"
            )
        seconds = picture.time_s if isinstance(picture, Frame) else number / fps
        last = max(last + 1, round(seconds / TICKS))  # two frames never share a time
        output.mux(stream.encode(_encodable(_pixels(picture), last)))
        if sound is not None:
            sound.until(output, float(last * TICKS))
        count += 1
    output.mux(stream.encode())
    end = float(last * TICKS + 1 / fps)
    if sound is not None:
        sound.until(output, end)
    audio = sound is not None and sound.packets > 0
    return Written(frames=count, seconds=end, codec=stream.codec_context.name, audio=audio)


def _pixels(picture: Pixels | Frame) -> Pixels:
    return picture.pixels if isinstance(picture, Frame) else picture


def _video_out(output: Any, shape: tuple[int, ...], fps: Fraction, crf: int) -> Any:
    if len(shape) != 3 or shape[2] != 3:
        raise DataError(f"a video is made of pictures (H, W, 3), got {shape}")
    codec: Literal["libx264", "mpeg4"] = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": str(crf)} if codec == "libx264" else {"qscale": str(2 + crf // 4)}
    stream = output.add_stream(codec, rate=fps, options=options)
    stream.height, stream.width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
    stream.pix_fmt, stream.time_base, stream.codec_context.time_base = "yuv420p", TICKS, TICKS
    stream.codec_context.colorspace = stream.codec_context.color_primaries = 1  # BT.709, and said so
    stream.codec_context.color_trc = stream.codec_context.color_range = 1
    return stream


def _encodable(pixels: Pixels, stamp: int) -> Any:
    even = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), "edge")
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
    frame = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
    frame.pts, frame.time_base = stamp, TICKS
    return frame
