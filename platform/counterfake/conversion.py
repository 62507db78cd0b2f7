"""Swap faces in whole pictures and videos: find and follow them, cut, paint, put back, label, mark. Knows no registry, no job.

A video is read twice: `follow` finds the faces and keeps only where they are, `convert_video` paints frame by frame.
Neither holds more than a few frames, so memory does not depend on the length. Cuts follow the smoothed track to a
fraction of a pixel, so that neither the network's input nor the pasted square trembles with the detector.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from counterfake import faces, provenance, video
from counterfake.blending import Blending, Floats, Place, compose, soft_mask
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation.swap import Flicker
from counterfake.faces import Box, Detector, Face, FaceDetector, Method, Pixels, Point
from counterfake.images import Preprocess
from counterfake.learners.faceswap import swap_with_mask
from counterfake.nets.swap_family import SwapFamily
from counterfake.tracks import Sight, Track, track

SOURCE_TYPE: provenance.SourceType = "compositeWithTrainedAlgorithmicMedia"
T = TypeVar("T")
FPS = 25.0  # of a video that is one picture long


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """How faces are found, swapped and shown."""

    blending: Blending = dataclasses.field(default_factory=Blending)
    faces: int = 1  # most prominent faces that are swapped; 0 = all
    method: Method = "cascade"  # face detector
    detector_model: str = ""  # its file, for yunet and ultralight
    detect_every: int = (
        2  # frames of a video from one search for faces to the next; between them they are interpolated
    )
    smoothing: float = 5.0  # sigma over time of a face's place, frames; 0 = as detected
    label: bool = True  # words in the lower left corner say that this was generated
    crf: int = 18  # of the video written: 0 lossless … 51
    batch: int = 8  # frames painted at a time

    def __post_init__(self) -> None:
        if (
            self.faces < 0
            or self.detect_every < 1
            or self.smoothing < 0
            or self.batch < 1
            or not 0 <= self.crf <= 51
        ):
            raise ConfigError(
                "conversion needs faces and smoothing >= 0, detect_every and batch >= 1 and crf 0-51; got"
                f" {self.faces}, {self.smoothing:g}, {self.detect_every}, {self.batch}, {self.crf}"
            )

    def chosen(self, found: Sequence[T]) -> list[T]:
        """Of faces or tracks, the most prominent first: those that are swapped."""
        return list(found[: self.faces or None])


class Painter:
    """A face-swap network that paints one person into any picture."""

    def __init__(
        self, net: nn.Module, config: SwapFamily, preprocess: Preprocess, identity: str, device: str = "cpu"
    ) -> None:
        """preprocess: what the network was trained with. Raises ConfigError for a person it does not know, and for a
        network of whole pictures."""
        if not preprocess.needs_face:
            raise ConfigError(
                f"this model was trained with preprocess.crop={preprocess.crop}; a swap needs face or aligned"
            )
        if identity not in config.identities:
            raise ConfigError(
                f"this model does not know {identity!r}; {_nearest(identity, config.identities)}"
            )
        self.net, self.config, self.preprocess = net.to(device), config, preprocess
        self.who, self.device = config.identities.index(identity), device

    def convert(
        self,
        pictures: Sequence[tuple[Pixels, Sequence[Face]]],
        blending: Blending,
        shown: Sequence[int] | None = None,
    ) -> list[Pixels]:
        """(pixels (H, W, 3), faces in it) each -> new pixels with all these faces swapped, painted as one batch.

        shown: whose faces each picture has, where that is known: a swap of people whom the model knows is better for it."""
        size = self.preprocess.size
        moves = [[window(f, p, self.preprocess) for f in found] for p, found in pictures]
        crops = [faces.moved(p, m, size) for (p, _), ms in zip(pictures, moves, strict=True) for m in ms]
        own = None if shown is None else [w for w, ms in zip(shown, moves, strict=True) for _ in ms]
        painted = iter(self.paint(crops, own))
        out = []
        for (pixels, _), ms in zip(pictures, moves, strict=True):
            for move in ms:
                face, mask = next(painted)
                pixels = compose(pixels, face, self.place(move), mask, blending)
            out.append(pixels)
        return out

    def paint(
        self, crops: Sequence[Pixels], shown: Sequence[int] | None = None
    ) -> list[tuple[Pixels, Floats]]:
        """Face crops (size, size, 3) -> the painted middle (s, s, 3) of each and its mask (s, s), the network's own or an
        ellipse. shown: whose faces they are, see `convert`."""
        if not crops:
            return []
        rows = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(self.device)
        who = torch.full((len(crops),), self.who, device=self.device)
        seen = who if shown is None else torch.tensor(shown, device=self.device)
        painted, masks = swap_with_mask(self.net, self.config, rows, who, seen)
        usual = soft_mask(self.config.size)
        made = painted.permute(0, 2, 3, 1).cpu().numpy()
        own = [usual] * len(crops) if masks is None else list(masks[:, 0].float().cpu().numpy())
        return list(zip(made, own, strict=True))

    def place(self, move: Place) -> Place:
        """Pixels of the painted square -> pixels of the picture whose `window` is `move`; see blending.py."""
        size, coverage = self.preprocess.size, self.config.coverage
        start = (1 - coverage) / 2 * size + 0.5  # from the middle of a pixel to the corner of the crop
        scale = coverage * size / self.config.size
        to_crop = np.array([[scale, 0, start], [0, scale, start], [0, 0, 1]])
        to_picture = np.linalg.inv(np.vstack([move, [0, 0, 1]])) @ to_crop
        return np.asarray(to_picture[:2] - [[0, 0, 0.5], [0, 0, 0.5]], np.float64)


def window(face: Face, pixels: Pixels, preprocess: Preprocess) -> Place:
    """The similarity (2, 3) from the picture to the face crop that `preprocess` cuts, in pixels from the top left corner.

    What `faces.crop_box` rounds to whole pixels is left as it is here."""
    move = faces.alignment(face, preprocess.size, preprocess.margin) if preprocess.crop == "aligned" else None
    if move is not None:
        return move
    height, width = pixels.shape[:2]
    x, y, w, h = face.box
    side = min(max(max(w, h) * preprocess.margin, 1.0), width, height)
    left = min(max(x + w / 2 - side / 2, 0.0), width - side)
    top = min(max(y + h / 2 - side / 2, 0.0), height - side)
    scale = preprocess.size / side
    return np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])


def find_with(config: ConversionConfig, preprocess: Preprocess) -> FaceDetector:
    """The detector of a conversion; it looks for eyes where the network's crops are aligned by them."""
    eyes = preprocess.crop == "aligned"
    return FaceDetector(config.method, model=config.detector_model, eyes=eyes)


# -- pictures -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Converted:
    """One picture with its faces swapped, not labelled yet."""

    pixels: Pixels  # (H, W, 3)
    faces: list[Face]  # that were swapped, the largest first; where they were found before


def convert_picture(
    painter: Painter, pixels: Pixels, detector: Detector, config: ConversionConfig
) -> Converted:
    """pixels (H, W, 3) with its largest faces as the painter's person. Raises DataError if there is no face."""
    found = config.chosen(detector.detect(pixels))
    if not found:
        raise DataError(f"no face was found by {detector.method}; try another one with --set method")
    return Converted(painter.convert([(pixels, found)], config.blending)[0], found)


# -- videos ---------------------------------------------------------------------------------------------------------


class Positions:
    """Where one face is in every frame, also in those that nobody searched."""

    def __init__(self, track: Track, step: int) -> None:
        """step: frames from one search to the next."""
        self.indices = np.array([sight.index for sight in track.sights])
        self.faces = [sight.face for sight in track.sights]
        self.step = step

    def at(self, index: int) -> Face | None:
        """The face in this frame; None where it is not seen."""
        after = int(np.searchsorted(self.indices, index))
        if after < len(self.faces) and self.indices[after] == index:
            return self.faces[after]
        if 0 < after < len(self.faces):
            before = self.indices[after - 1]
            share = float((index - before) / (self.indices[after] - before))
            return _between(self.faces[after - 1], self.faces[after], share)
        end = 0 if after == 0 else len(self.faces) - 1
        return self.faces[end] if abs(int(self.indices[end]) - index) < self.step else None


@dataclasses.dataclass(frozen=True)
class Followed:
    """What the first reading of a video found."""

    source: Path
    info: video.Info
    positions: list[Positions]  # of the faces that are to be swapped

    def faces(self, index: int) -> list[Face]:
        """Those that are seen in a frame."""
        return [face for where in self.positions if (face := where.at(index)) is not None]

    def tracks(self) -> list[Track]:
        """The faces in every frame where they were swapped."""
        every = [[(i, where.at(i)) for i in range(self.info.frames)] for where in self.positions]
        return [
            Track(number, tuple(Sight(i, face, True) for i, face in places if face is not None))
            for number, places in enumerate(every)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film:
    """What `convert_video` wrote."""

    frames: int
    swapped: int  # of them, frames with a swapped face
    damaged: int  # frames that did not decode and are missing; the one before is shown for longer
    seconds: float  # duration
    audio: bool  # whether sound was copied
    faces: int  # tracks that were swapped
    flicker: dict[str, float | None]  # see evaluation.swap.Flicker; of the most prominent face


def follow(
    source: Path, detector: Detector, config: ConversionConfig, progress: Callable[[int], None] | None = None
) -> Followed:
    """First reading: where the faces are. progress(frames) is called as frames are searched.

    Raises DataError for a video without a face that is seen more than by chance, MediaError for one that cannot be read."""
    clip = video.frames(source, every=config.detect_every, limits=video.LOCAL)
    tracks = track(_counted(clip, progress, config.detect_every), detector, smoothing=config.smoothing)
    if not tracks:
        raise DataError(
            f"no face was found by {detector.method} in {clip.info.frames} frames; nothing was written. Try another one with"
            " --set method"
        )
    return Followed(source, clip.info, [Positions(t, config.detect_every) for t in config.chosen(tracks)])


def convert_video(
    painter: Painter,
    followed: Followed,
    target: Path,
    config: ConversionConfig,
    *,
    maker: str,
    terms: str = "",
    signer: provenance.Signer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Film:
    """Second reading: an MP4 at `target`, marked as generated by `maker`, with the times and the sound of the source.

    Frames without a face stay as they are. The file appears under its name when it is whole and marked. terms: what it
    may be used for. Raises MediaError and DataError as video.frames and video.write do."""
    clip = video.frames(followed.source, every=1, limits=video.LOCAL)
    tally = _Tally(painter.preprocess)
    pictures = _counted(_converted(clip, painter, followed, config, tally), progress, 1)
    partial = target.with_name(f".{target.stem}.{os.getpid()}.converting.mp4")
    try:
        written = video.write(
            partial,
            pictures,
            fps=followed.info.rate or FPS,
            audio_from=followed.source if followed.info.audio else None,
            crf=config.crf,
            metadata={"comment": f"AI-generated: faces swapped by {maker}. {terms}".strip()},
        )
        provenance.mark_video(partial, maker=maker, source_type=SOURCE_TYPE, terms=terms, signer=signer)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return Film(
        frames=written.frames,
        swapped=tally.swapped,
        damaged=clip.damaged,
        seconds=written.seconds,
        audio=written.audio,
        faces=len(followed.positions),
        flicker=tally.flicker.figures(),
    )


# -- private --------------------------------------------------------------------------------------------------------


class _Tally:
    """What is counted while frames pass."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess, self.swapped, self.flicker = preprocess, 0, Flicker()

    def add(self, before: Pixels, after: Pixels, found: Sequence[Face]) -> None:
        if not found:
            self.flicker.cut()
            return
        self.swapped += 1
        move = window(found[0], before, self.preprocess)
        self.flicker.add(*(faces.moved(p, move, self.preprocess.size) for p in (before, after)))


def _converted(
    clip: Iterable[video.Frame], painter: Painter, followed: Followed, config: ConversionConfig, tally: _Tally
) -> Iterator[video.Frame]:
    frames = iter(clip)
    while batch := list(itertools.islice(frames, config.batch)):
        found = [followed.faces(frame.index) for frame in batch]
        given = [(frame.pixels, seen) for frame, seen in zip(batch, found, strict=True)]
        made = painter.convert(given, config.blending)
        for frame, seen, pixels in zip(batch, found, made, strict=True):
            tally.add(frame.pixels, pixels, seen)
            shown = provenance.label(pixels) if config.label else pixels
            yield video.Frame(shown, frame.index, frame.time_s)


def _counted(
    frames: Iterable[video.Frame], progress: Callable[[int], None] | None, step: int
) -> Iterator[video.Frame]:
    for frame in frames:
        yield frame
        if progress:
            progress(step)


def _between(a: Face, b: Face, share: float) -> Face:
    points: list[Point] | None = None
    if a.landmarks and b.landmarks:
        points = [(float(x), float(y)) for x, y in _mix(a.landmarks, b.landmarks, share)]
    x, y, w, h = (float(value) for value in _mix(a.box, b.box, share))
    box: Box = (x, y, w, h)
    return Face(box, min(a.score, b.score), points)


def _mix(
    a: Sequence[float] | Sequence[Point], b: Sequence[float] | Sequence[Point], share: float
) -> NDArray[np.float64]:
    return (1 - share) * np.array(a, np.float64) + share * np.array(b, np.float64)


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
    return f"did you mean {near[0]}? It knows {shown}" if near else f"it knows {shown}"
