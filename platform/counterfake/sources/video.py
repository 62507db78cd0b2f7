"""Videos in a folder, or one video: each becomes rows of one face, followed through evenly spread frames.

real/…  fake/MAKER/…      label by folder, as for pictures; under train/, val/, test/ the split is prescribed
…                         anything else: the label is the setting `fake`

`FaceCut` says how a video becomes rows; the layouts of known data sets (ffpp, celebdf, dfdc) share it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from counterfake import faces, media, video
from counterfake.errors import ConfigError, DataError, MediaError, NotFoundError
from counterfake.faces import MARGIN, FaceDetector, Method
from counterfake.sources import Sample, Skipped, SourceConfig
from counterfake.sources.folder import FAKE, REAL, SPLITS
from counterfake.sources.listing import is_litter, listed, refusal
from counterfake.tracks import Sight, Track, track

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
PART = 8  # videos that an ingest reads at a time: some seconds of work
LEAST_MEMORY = 100_000_000  # with less not even a small video decodes
HELD_BYTES = 256_000_000  # of decoded frames kept while the face is followed; longer videos are decoded twice


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceCut:
    """How a video becomes rows: which frames, whose face, and what is stored of it."""

    frames: int = 32  # of each video, spread evenly
    every: int = 0  # every so manieth frame instead; 0 = `frames` of them
    keep: Literal["crop", "frame"] = "crop"  # crop: a square around the face; frame: the whole picture
    margin: float = MARGIN  # side of the square / longer side of the face box
    quality: int = 95  # of the JPEG stored, at full resolution; 0 = PNG
    method: Method = "cascade"  # face detector
    model: str = ""  # its file, for yunet and ultralight
    eyes: bool = True  # look for eyes where the detector gives no landmarks
    tracks: int = (
        1  # most prominent faces of a video; 0 = all. A forged video has one forged face: mind the labels
    )
    isolated: bool = True  # decode each video in a process of its own, which libav may crash: 0.2-0.4 s each
    deadline_seconds: float = 900.0  # of decoding for one video; beyond it the video is skipped as too_slow
    memory_bytes: int = 800_000_000  # for one video, held by the kernel; isolated decoding only

    def __post_init__(self) -> None:
        if self.frames < 1 or self.every < 0 or not 0 <= self.quality <= 100 or self.margin <= 0:
            raise ConfigError(
                f"a cut needs frames >= 1, every >= 0, quality 0-100 and margin > 0; got {self.frames}, {self.every}, "
                f"{self.quality}, {self.margin:g}"
            )
        if self.deadline_seconds <= 0 or self.memory_bytes < LEAST_MEMORY:
            raise ConfigError(
                f"a cut needs deadline_seconds > 0 and memory_bytes >= {LEAST_MEMORY:,}; got {self.deadline_seconds:g}, "
                f"{self.memory_bytes:,}"
            )

    def detector(self) -> FaceDetector:
        return FaceDetector(self.method, model=self.model, eyes=self.eyes)

    def rows(self, file: Path, facts: Sample, detector: FaceDetector) -> Iterator[Sample | Skipped]:
        """The rows of one video, by frame, then track; `facts` is a row without its picture (see `facts`).

        A frame without the face, or damaged, is Skipped(whole=False). A video without any face is one Skipped, and so is
        one that cannot be read."""
        try:
            yield from self._rows(file, facts, detector)
        except MediaError as error:
            yield Skipped(facts.path, error.reason)
        except NotFoundError:
            yield Skipped(facts.path, "cannot be read")

    def _rows(self, file: Path, facts: Sample, detector: FaceDetector) -> Iterator[Sample | Skipped]:
        clip = self.frames_of(file)
        held: list[video.Frame] | None = [] if self._fits(clip.info) else None
        tracks = track(_holding(clip, held), detector)
        tracks = tracks[:1] if self.keep == "frame" else tracks[: self.tracks or None]
        if not tracks:
            yield Skipped(facts.path, "no_face")
            return
        chosen = held if held is not None else self.frames_of(file)
        yield from self.cut(chosen, facts, tracks, detector.method)
        yield from (Skipped(facts.path, "damaged_frame", whole=False) for _ in range(clip.damaged))

    def cut(
        self, frames: Iterable[video.Frame], facts: Sample, tracks: Sequence[Track], method: str
    ) -> Iterator[Sample | Skipped]:
        """The rows of these frames, where it is known by `method` whose face is where."""
        made = _Making(self, facts, method)
        for frame in frames:
            sights = [(track.id, sight) for track in tracks if (sight := track.at(frame.index)) is not None]
            yield from (made.row(frame, number, sight) for number, sight in sights)
            if not sights:
                yield Skipped(facts.path, "no_face", whole=False)

    def frames_of(self, file: Path) -> video.Frames:
        """The frames that become rows. Raises MediaError, NotFoundError."""
        limits = dataclasses.replace(
            video.LOCAL, deadline_seconds=self.deadline_seconds, memory_bytes=self.memory_bytes
        )
        if self.every:
            return video.frames(file, every=self.every, limits=limits, isolated=self.isolated)
        return video.frames(file, count=self.frames, limits=limits, isolated=self.isolated)

    def _fits(self, info: video.Info) -> bool:
        count = -(-info.frames // self.every) if self.every else min(self.frames, info.frames)
        return count * info.width * info.height * 3 <= HELD_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSource(SourceConfig):
    """Every file below a folder, or one file. Kinds are decided by content; what is no video is skipped by name."""

    fake: int | None = None  # label of videos whose folder does not say: 1 fake, 0 real, null unknown
    maker: str = ""  # what made the fakes when no folder says; "" = unknown
    identity: str = ""  # of the person in all of them; "" = unknown
    cut: FaceCut = dataclasses.field(default_factory=FaceCut)

    part_inputs: ClassVar[int] = PART

    def names(self) -> Iterator[str]:
        root = self.located()
        yield from [root.name] if root.is_file() else listed(root)

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        yield from read_videos(self.located(), names, self.cut, self._facts)

    def _facts(self, name: str) -> Sample:
        split, folders = _below_split(name)
        kind = folders[0].lower() if folders else ""
        fake = 0 if kind in REAL else 1 if kind in FAKE else self.fake
        maker = folders[1] if kind in FAKE and len(folders) > 1 else self.maker or "unknown"
        return facts(self, name, fake=fake, maker=maker, identity=self.identity or None, split=split)


def facts(source: SourceConfig, name: str, *, fake: int | None, maker: str, **known: Any) -> Sample:
    """What is known of a video before it is opened, as a row whose picture is still to come."""
    return Sample(
        image=b"",
        path=name,
        fake=fake,
        maker=maker if fake != 0 else "camera",
        source=source.label,
        video=video_key(source, name),
        **known,
    )


def video_key(source: SourceConfig, name: str) -> str:
    """The name of a video in its rows: unique over data sets that hold files of the same name."""
    return f"{source.label}/{Path(name).with_suffix('').as_posix()}"


def read_videos(
    root: Path, names: Sequence[str], cut: FaceCut, known: Callable[[str], Sample | Skipped]
) -> Iterator[Sample | Skipped]:
    """The rows of these inputs of `listed(root)`, or of the one file `root`; known(name) -> its `facts`, or why it is none."""
    detector = cut.detector()
    for name in names:
        reason = None if root.is_file() else refusal(root, name)
        found = Skipped(name, reason) if reason else known(name)
        file = root if root.is_file() else root / name
        yield from [found] if isinstance(found, Skipped) else cut.rows(file, found, detector)


def below(root: Path) -> list[str]:
    """Files under a folder that are not hidden, as names relative to it, sorted; of a file its name."""
    if root.is_file():
        return [root.name]
    return [name for name in listed(root) if not is_litter(name) and (root / name).is_file()]


def in_order(root: Path, *folders: str) -> list[str]:
    """All that `listed` finds, what lies in the first of these folders first, what lies in none of them last."""
    ranks = {folder: rank for rank, folder in enumerate(folders)}
    return sorted(listed(root), key=lambda name: ranks.get(name.split("/")[0], len(ranks)))


def is_video(name: str) -> bool:
    """By its suffix: data sets with a layout of their own hold lists and masks beside their videos."""
    return Path(name).suffix.lower() in SUFFIXES


def tree(source: SourceConfig, *expected: str) -> Path:
    """The root of a data set's own layout. DataError if none of the folders it is known by is there."""
    root = source.located()
    if not any((root / folder).is_dir() for folder in expected):
        raise DataError(
            f"{root} holds none of {', '.join(expected)}; set source.path to the folder that holds them"
        )
    return root


# -- private --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Making:
    cut: FaceCut
    facts: Sample
    method: str

    def row(self, frame: video.Frame, track: int, sight: Sight) -> Sample | Skipped:
        height, width = frame.pixels.shape[:2]
        left, top, right, bottom = self._part(sight, width, height)
        if min(right - left, bottom - top) < media.DEFAULT_LIMITS.min_side:
            return Skipped(self.facts.path, "too_small", whole=False)
        x, y, w, h = sight.face.box
        points = [value for px, py in sight.face.landmarks or () for value in (px - left, py - top)]
        return dataclasses.replace(
            self.facts,
            id="",
            image=self._encoded(frame.pixels[top:bottom, left:right]),
            frame=frame.index,
            time_s=frame.time_s,
            face_box=(x - left, y - top, w, h),
            face_method=self.method,
            face_margin=self.cut.margin if self.cut.keep == "crop" else 1.0,
            landmarks=points or None,
            attributes=self.facts.attributes | self._attributes(track, sight, (width, height)),
        )

    def _part(self, sight: Sight, width: int, height: int) -> tuple[int, int, int, int]:
        if self.cut.keep == "frame":
            return 0, 0, width, height
        return faces.crop_box(sight.face.box, self.cut.margin, (width, height))

    def _attributes(self, track: int, sight: Sight, size: tuple[int, int]) -> dict[str, Any]:
        box = [round(value, 2) for value in sight.face.box]
        known: dict[str, Any] = {"track": track, "box_in_frame": box, "frame_size": list(size)}
        return known | ({"face_score": sight.face.score} if sight.found else {"interpolated": True})

    def _encoded(self, pixels: media.Pixels) -> bytes:
        return (
            media.encode(pixels, "jpeg", self.cut.quality)
            if self.cut.quality
            else media.encode(pixels, "png")
        )


def _holding(clip: Iterable[video.Frame], held: list[video.Frame] | None) -> Iterator[video.Frame]:
    for frame in clip:
        if held is not None:
            held.append(frame)
        yield frame


def _below_split(name: str) -> tuple[str | None, tuple[str, ...]]:
    """(prescribed split, folders below it)."""
    folders = Path(name).parts[:-1]
    split = SPLITS.get(folders[0].lower()) if folders else None
    return split, folders[1:] if split else folders
