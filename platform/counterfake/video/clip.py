"""One video file: opened safely, timed by its packets, decoded frame by frame.

libav reads through our own file object: it never sees a name, and every further file or address it asks for is refused.
Only MP4/MOV and WebM/Matroska reach a demuxer, chosen by content, and only codecs of CODECS reach a decoder. Two passes:
the first one reads packets without decoding them and gives the exact times of all frames, so that a missing duration or
a variable rate changes nothing; the second one decodes, jumping over what nobody asked for.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import io
import logging
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import av.error
import av.stream
import av.video.reformatter
import numpy as np
from numpy.typing import NDArray

from counterfake import media
from counterfake.errors import DataError, MediaError, NotFoundError

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Source = str | Path | bytes  # a local file, or what one holds
DEMUXERS = {"mp4": "mov", "webm": "matroska"}  # what media.sniff says -> libav's name
MOST_RATE = 1000  # frames per allowed second; more would only fill memory with their times
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4")
# Without these flags libswscale's fast path gives pictures 1.3 of 255 too dark.
EXACT = (
    av.video.reformatter.Interpolation.BILINEAR
    | av.video.reformatter.Interpolation.ACCURATE_RND
    | av.video.reformatter.Interpolation.FULL_CHR_H_INT
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """What one video may cost. The defaults are those of the public endpoint."""

    bytes: int = 200_000_000  # of the file
    seconds: float = 120.0  # from the first frame to the end of the last
    frames: int = 64  # handed out
    side: int = 4096  # pixels, width and height each
    min_side: int = media.DEFAULT_LIMITS.min_side
    deadline_seconds: float = 60.0  # spent decoding; the caller's time between two frames does not count
    memory_bytes: int = 1_000_000_000  # beyond a bare interpreter's; isolated decoding only


UPLOAD = VideoLimits()
LOCAL = VideoLimits(
    bytes=50_000_000_000, seconds=6 * 3600, frames=1_000_000, side=8192, deadline_seconds=3600
)  # a data set of one's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What a video is, measured from its packets and not believed from its header."""

    container: str  # mp4 | webm
    codec: str
    width: int  # pixels as coded; the frames of a phone held upright have the sides swapped
    height: int
    frames: int  # that the container holds; a damaged one may not decode
    seconds: float  # from the first frame to the end of the last
    rate: float | None  # frames per second on average; None for a single frame
    variable_rate: bool  # whether distances between frames differ by more than a tick
    audio: str | None  # codec of the first audio stream


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One decoded frame, upright."""

    pixels: Pixels  # (H, W, 3) RGB
    index: int  # its place in the video, counted from 0 in order of time
    time_s: float  # presentation time: pts x time base


class Frames(Iterator[Frame]):
    """Frames in order of time. `damaged` counts those met so far that did not decode; close() frees the file early."""

    def __init__(self, info: Info, clock: Clock, made: Iterator[Frame], damaged: Count) -> None:
        self.info = info
        self._clock, self._made, self._damaged = clock, made, damaged

    @property
    def damaged(self) -> int:
        return self._damaged.value

    def __next__(self) -> Frame:
        with self._clock:
            return next(self._made)

    def close(self) -> None:
        cast(Any, self._made).close()


class Clip:
    """One open video and the times of all its frames."""

    def __init__(self, file: BinaryIO, limits: VideoLimits, clock: Clock) -> None:
        self.file, self.limits, self.clock = file, limits, clock
        self.damaged = Count()
        self._reached = 0  # index of the furthest packet read
        with translated():
            self._open()
            self.stamps, self.keys, end = self._scan()
            self.info = self._measured(end)
        if self.info.seconds > limits.seconds:
            raise MediaError(
                "too_large", f"the video is {self.info.seconds:.0f} s long; the limit is {limits.seconds:g} s"
            )

    def _open(self) -> None:
        self.container, self.kind = demuxer(self.file, self.limits, self.clock)
        self.stream = self._video_stream()
        for other in self.container.streams:
            if other is not self.stream:
                other.discard = av.stream.Discard.all  # its packets are not even read

    def _video_stream(self) -> Any:
        pictures = av.stream.Disposition.attached_pic  # a cover, not a film
        videos = [s for s in self.container.streams.video if not s.disposition & pictures]
        if not videos:
            raise MediaError("unsupported", "the file holds no video stream")
        context = videos[0].codec_context
        name = context.name if context is not None else "unknown"
        if name not in CODECS:
            raise MediaError("unsupported", f"video codec {name}; read are {', '.join(CODECS)}")
        if context.width:  # 0: not known before a frame is decoded
            self._check_size(context.width, context.height)
        context.options = {"max_pixels": str(self.limits.side**2), "err_detect": "explode"}
        # threads multiply a hostile file's memory, and callers run several videos at once
        context.thread_count = 1
        return videos[0]

    def _check_size(self, width: int, height: int) -> None:
        side = self.limits.side
        if max(width, height) > side:
            raise MediaError(
                "bomb", f"the video claims {width} x {height} pixels; the limit is {side} x {side}"
            )
        if min(width, height) < self.limits.min_side:
            raise MediaError(
                "too_small", f"the video is {width} x {height}; each side needs {self.limits.min_side} pixels"
            )

    def _packets(self) -> Iterator[Any]:
        for packet in self.container.demux(self.stream):
            self.clock.check()
            yield packet

    def _scan(self) -> tuple[list[int], list[int], int]:
        """(times of all frames, times of key frames, end of the last), in ticks and sorted."""
        stamps, keys, end = [], [], 0
        try:
            for packet in self._packets():
                stamp = stamp_of(packet)
                if packet.size == 0 or packet.is_discard or stamp is None:
                    continue
                stamps.append(stamp)
                end = max(end, stamp + (packet.duration or 0))
                if packet.is_keyframe:
                    keys.append(stamp)
                if len(stamps) > self.limits.seconds * MOST_RATE:
                    raise MediaError("too_large", f"the video holds more than {len(stamps) - 1:,} frames")
        except av.error.FFmpegError as error:
            logger.debug("the container ends early: %s", error)
        if not stamps:
            raise MediaError("undecodable", "the video holds no frame")
        return sorted(stamps), sorted(keys), end

    def _measured(self, end: int) -> Info:
        steps = np.diff(self.stamps)
        usual = float(np.median(steps)) if len(steps) else 0.0
        span = max(end, self.stamps[-1] + usual) - self.stamps[0]
        seconds = float(span * self.stream.time_base)
        context = self.stream.codec_context
        sound = self.container.streams.audio
        return Info(
            container=self.kind,
            codec=context.name,
            width=context.width,
            height=context.height,
            frames=len(self.stamps),
            seconds=seconds,
            rate=len(self.stamps) / seconds if len(steps) and seconds > 0 else None,
            variable_rate=bool(len(steps) and steps.max() - steps.min() > 1),
            audio=sound[0].codec_context.name if sound and sound[0].codec_context else None,
        )

    def chosen(self, wanted: Sequence[int]) -> Iterator[Frame]:
        """The frames with these indices (increasing); the next good one in place of a damaged one."""
        ahead, given = collections.deque(wanted), 0
        with translated():
            self.container.close()
            self._open()
            for frame in self._decoded(ahead):
                index = self._index(frame)
                if index < ahead[0]:
                    continue
                while ahead and ahead[0] <= index:
                    ahead.popleft()
                yield self._upright(frame, index)
                given += 1
                if not ahead:
                    break
        if not given:
            raise MediaError("undecodable", f"none of the video's {len(self.stamps)} frames decodes")

    def _decoded(self, ahead: collections.deque[int]) -> Iterator[Any]:
        """Every frame that decodes, from the key frame before ahead[0] on."""
        jumped, packets = -1, self._packets()
        while ahead:
            key = self._key_before(ahead[0])
            if key > max(jumped, self._reached):
                self.container.seek(self.stamps[key], stream=self.stream)
                jumped, packets = key, self._packets()
            packet = next(packets, None)
            if packet is None:
                return
            self._reached = max(self._reached, self._place(stamp_of(packet)))
            yield from self._good(packet)

    def _good(self, packet: Any) -> Iterator[Any]:
        try:
            decoded = packet.decode()
        except (av.error.InvalidDataError, av.error.BugError, av.error.UnknownError):
            self.damaged.value += 1
            return
        for frame in decoded:
            self._check_size(frame.width, frame.height)  # a stream may change its size half-way
            if frame.is_corrupt:
                self.damaged.value += 1
            else:
                yield frame

    def _key_before(self, index: int) -> int:
        """Index of the last key frame at or before `index`; 0 if there is none."""
        at = bisect.bisect_right(self.keys, self.stamps[index])
        return self._place(self.keys[at - 1]) if at else 0

    def _place(self, stamp: int | None) -> int:
        return 0 if stamp is None else min(bisect.bisect_left(self.stamps, stamp), len(self.stamps) - 1)

    def _index(self, frame: Any) -> int:
        return self._place(frame.pts if frame.pts is not None else frame.dts)

    def _upright(self, frame: Any, index: int) -> Frame:
        colours = av.video.reformatter.Colorspace
        untold = frame.colorspace == 2  # as players do: large pictures without a tag are HDTV's
        space = (colours.ITU709 if frame.height >= 720 else colours.ITU601) if untold else None
        pixels = frame.to_ndarray(format="rgb24", src_colorspace=space, interpolation=EXACT)
        turned = np.rot90(pixels, round(frame.rotation / 90) % 4)
        stamp = frame.pts if frame.pts is not None else self.stamps[index]
        return Frame(np.ascontiguousarray(turned), index, float(stamp * self.stream.time_base))


class Clock:
    """Seconds left; they run only inside `with`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = self.left = seconds
        self._since = 0.0

    def __enter__(self) -> Clock:
        self._since = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.left -= time.monotonic() - self._since

    def check(self) -> None:
        if time.monotonic() - self._since > self.left:
            raise self.error()

    def error(self) -> MediaError:
        return MediaError(
            "too_slow", f"decoding took more than {self.seconds:g} s; send a shorter or smaller video"
        )


class Count:
    def __init__(self) -> None:
        self.value = 0


@contextlib.contextmanager
def opened(source: Source, limits: VideoLimits) -> Iterator[BinaryIO]:
    """The source as a seekable file, its size checked. A path must name a plain file: no pipe, no device."""
    if isinstance(source, bytes):
        _check_bytes(len(source), limits)
        yield io.BytesIO(source)
        return
    path = Path(source)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise MediaError("unsupported", f"{path.name} is not a plain file")
        _check_bytes(status.st_size, limits)
        file = path.open("rb")
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield file


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Whatever libav raises on hostile bytes -> MediaError. A mistake of ours (NameError, TypeError, ...) passes."""
    try:
        yield
    except (MediaError, DataError):
        raise
    except MemoryError as error:
        raise MediaError("bomb", "decoding this video needs more memory than it may have") from error
    except (av.error.FFmpegError, ValueError, LookupError, ArithmeticError, OSError, RuntimeError) as error:
        text = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise MediaError("undecodable", f"the video is damaged or cut short: {text}") from error


def demuxer(file: BinaryIO, limits: VideoLimits, clock: Clock) -> tuple[Any, str]:
    """(open container, what it is by its first bytes)."""
    kind = kind_of(file)
    options = {  # for the demuxer and for the decoders that it tries while it looks at the streams
        "max_pixels": str(limits.side**2), "threads": "1", "max_streams": "32", "protocol_whitelist": "none",
    }  # fmt: skip
    container = av.open(
        _Reader(file, clock),
        format=DEMUXERS[kind],
        options=options,
        io_open=_refuse_other_files,
        metadata_errors="replace",
    )
    return container, kind


def kind_of(file: BinaryIO) -> str:
    """A key of DEMUXERS, by the file's first bytes; the file is at its start afterwards. MediaError for anything else."""
    file.seek(0)
    kind = media.sniff(file.read(64))
    if kind not in DEMUXERS:
        raise MediaError("unsupported", f"the file is {kind}; videos may be MP4, MOV, WebM or Matroska")
    file.seek(0)
    return kind


def stamp_of(packet: Any) -> int | None:
    return packet.pts if packet.pts is not None else packet.dts


def spread(total: int, count: int | None, every: int | None, limits: VideoLimits) -> list[int]:
    if every is None:
        assert count is not None
        return sorted({int((k + 0.5) * total / count) for k in range(count)})
    chosen = range(0, total, every)
    if len(chosen) > limits.frames:
        raise MediaError(
            "too_large", f"every {every}. frame of {total} gives {len(chosen)}; the limit is {limits.frames}"
        )
    return list(chosen)


# -- private ------------------------------------------------------------------------------------------------------------


class _Reader:
    """A file object for libav that ends with the deadline. It has no name, so that none can be believed."""

    def __init__(self, file: BinaryIO, clock: Clock) -> None:
        self._file, self._clock = file, clock
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self._clock.check()
        return self._file.read(size)


def _check_bytes(size: int, limits: VideoLimits) -> None:
    if size == 0:
        raise MediaError("empty", "the file is empty")
    if size > limits.bytes:
        raise MediaError("too_large", f"the video has {size:,} bytes; the limit is {limits.bytes:,}")


def _refuse_other_files(url: str, _flags: int, _options: dict[str, str]) -> Any:
    raise MediaError(
        "unsupported", f"the video refers to another file ({url[:80]}); send one file that holds all"
    )
