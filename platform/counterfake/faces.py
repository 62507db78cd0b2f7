"""Find faces and say which part of the picture to look at. Keeps networks and file formats away; tracks.py follows faces.

Every box is (x, y, width, height) in pixels of the upright picture, floats, top left origin. The margin and the method
that found a box are stored with it, because a detector trained on one crop is not the same detector on another.
Ingest, uploads and video conversion all crop and align here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from counterfake.errors import ConfigError

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
Point = tuple[float, float]
Method = Literal["cascade", "cascade-default", "yunet", "ultralight"]
METHODS: dict[str, str] = {  # method -> the model file it needs; "" = it ships inside OpenCV's wheel
    "cascade": "",
    "cascade-default": "",
    "yunet": "face_detection_yunet_2023mar.onnx",
    "ultralight": "ultralight_face_slim_320.pth",
}
CASCADES = {
    "cascade": "haarcascade_frontalface_alt2.xml",
    "cascade-default": "haarcascade_frontalface_default.xml",
}
MARGIN = 1.3  # side of a face crop / longer side of the face box; what FaceForensics++ crops with
# Where the eyes lie in a cascade's box, in shares of its sides: the template of `align`. Medians over 207 CIPLAB faces:
# (0.30, 0.39) and (0.69, 0.38), standard deviation 0.02 to 0.03.
EYES = ((0.3, 0.39), (0.7, 0.39))


@dataclasses.dataclass(frozen=True, slots=True)
class Face:
    """One face found in a picture."""

    box: Box  # x, y, width, height in pixels
    score: float  # larger = surer; only comparable within one method
    landmarks: list[Point] | None = None  # eyes[, nose, mouth corners]: left to right as seen


class Detector(Protocol):
    """Anything that finds faces: what `track` and the video sources ask for."""

    method: Method

    def detect(self, pixels: Pixels) -> list[Face]:
        """pixels (H, W, 3) or (H, W, 1) uint8 RGB -> faces, the largest first; [] when there is none."""


class FaceDetector:
    """Finds faces by one of METHODS. Not thread-safe: one per thread."""

    def __init__(
        self,
        method: Method = "cascade",
        *,
        model: str | Path = "",
        max_side: int = 640,
        min_face: float = 0.15,
        eyes: bool = False,
        landmarks_model: str | Path = "",
    ) -> None:
        """model: file of yunet or ultralight. max_side: larger pictures are searched at this size (speed). min_face:
        smallest face / shorter side. eyes: look for the eyes of faces found without landmarks, too; with landmarks_model, a
        file of MTCNN's O-Net, for five points instead.
        Raises ConfigError for an unknown method and for a missing file, CheckpointError for a file of something else."""
        if method not in METHODS:
            raise ConfigError(f"face detector {method!r} is unknown; known: {', '.join(METHODS)}")
        self.method: Method = method
        self.max_side, self.min_face = max_side, min_face
        self._finder = _finder(method, model)
        self._points = _Points(landmarks_model) if str(landmarks_model) else _Eyes() if eyes else None

    def detect(self, pixels: Pixels) -> list[Face]:
        """pixels (H, W, 3) or (H, W, 1) uint8 RGB -> faces, the largest first; [] when there is none."""
        scale = min(1.0, self.max_side / max(pixels.shape[:2]))
        if round(scale * min(pixels.shape[:2])) < 20:  # a strip; OpenCV cannot shrink one to no pixels at all
            return []
        searched = _shrunk(pixels, scale)
        side = max(20, int(self.min_face * min(searched.shape[:2])))
        faces = [f for f in self._finder.find(searched, side) if max(f.box[2:]) >= side]
        faces.sort(key=lambda face: face.box[2] * face.box[3], reverse=True)
        return [self._finished(pixels, _scaled(face, 1 / scale)) for face in faces]

    def largest(self, pixels: Pixels) -> Face | None:
        """The largest face, which is the one a portrait is about; None when there is none."""
        faces = self.detect(pixels)
        return faces[0] if faces else None

    def _finished(self, pixels: Pixels, face: Face) -> Face:
        if face.landmarks is not None or self._points is None:
            return face
        return dataclasses.replace(face, landmarks=self._points.find(pixels, face.box))


# -- cropping and aligning -------------------------------------------------------------------------------------------


def crop_box(box: Box, margin: float, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Square (left, top, right, bottom) around a face, `margin` times its longer side, moved to lie in the picture.

    image_size is (width, height). A square that does not fit is shrunk to the picture's shorter side, so that no
    padding is ever invented.
    """
    width, height = image_size
    x, y, w, h = box
    side = max(1, min(round(max(w, h) * margin), width, height))
    left = min(max(round(x + w / 2 - side / 2), 0), width - side)
    top = min(max(round(y + h / 2 - side / 2), 0), height - side)
    return left, top, left + side, top + side


def crop(pixels: Pixels, box: Box, margin: float = MARGIN) -> Pixels:
    """The part of pixels (H, W, C) inside `crop_box`: a view (S, S, C), no pixel changed."""
    left, top, right, bottom = crop_box(box, margin, (pixels.shape[1], pixels.shape[0]))
    return pixels[top:bottom, left:right]


def align(pixels: Pixels, face: Face, size: int, margin: float = MARGIN) -> Pixels:
    """(size, size, C) around the face with the eyes level and at fixed places, if it has eyes; else its crop, resized.

    A similarity (turn, scale, shift) takes the eyes to EYES of a box that is 1 / margin of the square; what lies outside
    the picture repeats its border. Shrinking is antialiased.
    """
    move = alignment(face, size, margin)
    if move is None:
        return _resized(crop(pixels, face.box, margin), size)
    return moved(pixels, move, size)


def moved(pixels: Pixels, move: NDArray[np.float64], size: int) -> Pixels:
    """pixels (H, W, C) through a similarity (2, 3) as of `alignment` -> (size, size, C); borders repeat, shrinking is
    antialiased."""
    fold = int(1 / np.hypot(move[0, 0], move[1, 0]))
    if fold >= 2:  # warpAffine looks at four pixels each: what is to be halved or more is averaged first
        height, width = pixels.shape[:2]
        pixels = _resized(pixels, max(1, width // fold), max(1, height // fold))
        move = move @ np.diag([width / pixels.shape[1], height / pixels.shape[0], 1.0])
    shift = move[:, 2] + move[:, :2] @ [0.5, 0.5] - 0.5  # OpenCV counts from the middle of the first pixel
    move = np.column_stack([move[:, :2], shift])
    out = cv2.warpAffine(np.ascontiguousarray(pixels), move, (size, size), borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(out, np.uint8).reshape(size, size, pixels.shape[2])


def alignment(face: Face, size: int, margin: float = MARGIN) -> NDArray[np.float64] | None:
    """The similarity (2, 3) of `align`: picture -> square, in pixels from the top left corner; None without two eyes."""
    if face.landmarks is None or len(face.landmarks) < 2:
        return None
    seen = [complex(*eye) for eye in face.landmarks[:2]]
    meant = [complex(*(((share - 0.5) / margin + 0.5) * size for share in eye)) for eye in EYES]
    if abs(seen[1] - seen[0]) < 1:
        return None
    turn = (meant[1] - meant[0]) / (seen[1] - seen[0])
    shift = meant[0] - turn * seen[0]
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(0.0, wide) * max(0.0, high)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


# -- private: methods ------------------------------------------------------------------------------------------------


class _Finder(Protocol):
    def find(self, pixels: Pixels, side: int) -> list[Face]:
        """Faces of at least `side` pixels in (H, W, 1 or 3), in its own pixels and any order."""


def _finder(method: Method, model: str | Path) -> _Finder:
    if not METHODS[method]:
        return _Cascade(CASCADES[method])
    path = Path(model).expanduser()
    if not path.is_file():
        what = f"{path} does not exist" if str(model) else "none is set"
        raise ConfigError(f"face detector {method} needs a model file such as {METHODS[method]}; {what}")
    return _YuNet(path) if method == "yunet" else _Ultralight(path)


class _Cascade:
    """Viola and Jones 2001 with the features that ship inside OpenCV's wheel."""

    def __init__(self, name: str) -> None:
        self._cascade = cv2.CascadeClassifier(_cascade_file(name))

    def find(self, pixels: Pixels, side: int) -> list[Face]:
        boxes, _, weights = self._cascade.detectMultiScale3(
            cv2.equalizeHist(_luma(pixels)),
            scaleFactor=1.1,
            minNeighbors=3,
            minSize=(side, side),
            outputRejectLevels=True,
        )
        return [
            Face((float(x), float(y), float(w), float(h)), float(weight))
            for (x, y, w, h), weight in zip(boxes, np.ravel(weights), strict=True)
        ]


class _YuNet:
    """YuNet (Wu et al. 2023, https://doi.org/10.1007/s11633-023-1423-y) through OpenCV; five landmarks."""

    def __init__(self, model: Path) -> None:
        try:
            self._net = cv2.FaceDetectorYN.create(str(model), "", (320, 320), 0.6)
        except cv2.error as error:
            raise ConfigError(f"{model} is no YuNet model: {str(error).splitlines()[0][:120]}") from error

    def find(self, pixels: Pixels, side: int) -> list[Face]:
        self._net.setInputSize((pixels.shape[1], pixels.shape[0]))
        _, rows = self._net.detect(np.ascontiguousarray(_colour(pixels)[:, :, ::-1]))  # it reads BGR
        return [_from_yunet([float(value) for value in row]) for row in (rows if rows is not None else ())]


def _from_yunet(row: Sequence[float]) -> Face:
    """x, y, w, h, five points (the person's right eye and right mouth corner first: left as seen), score."""
    x, y, w, h = row[:4]
    points = list(zip(row[4:14:2], row[5:14:2], strict=True))
    return Face((x, y, w, h), row[14], points)


class _Ultralight:
    """nets/ultralight.py on the picture fitted into 320 x 240, its aspect ratio kept."""

    THRESHOLD, SAME = 0.6, 0.3  # least score; boxes that overlap more than this are one face

    def __init__(self, model: Path) -> None:
        import torch  # only this method needs it

        from counterfake.nets import ultralight

        self._torch, self._size = torch, (ultralight.WIDTH, ultralight.HEIGHT)
        self._net = ultralight.UltralightConfig(weights=str(model)).build()

    def find(self, pixels: Pixels, side: int) -> list[Face]:
        fitted, scale = _fitted(_colour(pixels), *self._size)
        images = (self._torch.from_numpy(fitted).permute(2, 0, 1)[None].float() - 127) / 128
        with self._torch.inference_mode():
            scores, corners = (out[0].numpy() for out in self._net(images))
        sure = scores > self.THRESHOLD
        edges = corners[sure] * np.array(self._size * 2, np.float32) / scale
        boxes = np.hstack([edges[:, :2], edges[:, 2:] - edges[:, :2]]).astype(float)
        kept = cv2.dnn.NMSBoxes(boxes.tolist(), scores[sure].tolist(), self.THRESHOLD, self.SAME)
        return [Face((*boxes[i],), float(scores[sure][i])) for i in np.ravel(kept).astype(int)]


class _Eyes:
    """Eye centres inside a face box by OpenCV's eye cascades: two detections that can be the eyes of one face."""

    NAMES = ("haarcascade_eye_tree_eyeglasses.xml", "haarcascade_eye.xml")
    SIDE = 96  # pixels; faces are searched at this width. 160 finds 6 % more eyes in four times the time

    def __init__(self) -> None:
        self._cascades = [cv2.CascadeClassifier(_cascade_file(name)) for name in self.NAMES]

    def find(self, pixels: Pixels, box: Box) -> list[Point] | None:
        """[left, right] as seen, in the picture's pixels; None if no pair is plausible."""
        left, top, right, bottom = crop_box(box, 1.0, (pixels.shape[1], pixels.shape[0]))
        scale = self.SIDE / (right - left)
        face = _luma(_resized(pixels[top:bottom, left:right], self.SIDE))
        upper = cv2.equalizeHist(np.ascontiguousarray(face[: int(0.6 * self.SIDE)]))
        for cascade in self._cascades:
            found = cascade.detectMultiScale(upper, 1.05, 3, minSize=(15, 15), maxSize=(45, 45))
            pair = _pair(
                [(x + w / 2, y + h / 2) for x, y, w, h in np.reshape(found, (-1, 4)).tolist()], self.SIDE
            )
            if pair is not None:
                return [(left + x / scale, top + y / scale) for x, y in pair]
        return None


class _Points:
    """nets/onet.py on the face box made square, and again on the box it answers with, which is the one it was trained on."""

    SURE = 0.7  # least score of the better of the two looks

    def __init__(self, weights: str | Path) -> None:
        import torch  # only this needs it

        from counterfake.nets import onet

        path = Path(weights).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"landmarks_model {path} does not exist; give MTCNN's onet.pt, or leave it empty"
            )
        self._torch, self._side = torch, onet.SIDE
        self._net = onet.OnetConfig(weights=str(path)).build()

    def find(self, pixels: Pixels, box: Box) -> list[Point] | None:
        """Five points in the picture's pixels, left to right as seen; None if this is no face to it."""
        colour, best = _colour(pixels), None
        x, y, width, height = box
        corners = np.array([x, y, x + width, y + height])
        for _ in range(2):
            side = float(max(corners[2:] - corners[:2], key=float))
            origin = (corners[:2] + corners[2:] - side) / 2
            score, moves, points = self._look(colour, origin, side)
            if best is None or score > best[0]:
                best = score, origin + side * points
            corners = np.concatenate([origin, origin + side]) + side * moves
            if not (corners[2:] - corners[:2] >= 1).all():
                break
        assert best is not None, "looked at least once"
        return [(float(px), float(py)) for px, py in best[1]] if best[0] >= self.SURE else None

    def _look(
        self, pixels: Pixels, origin: NDArray[np.float64], side: float
    ) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """(score, moves (4,), points (5, 2)) of the square of `side` pixels at `origin`, what lies outside repeated."""
        (left, top), reach = np.rint(origin).astype(int), max(1, round(side))
        height, width = pixels.shape[:2]
        rows = np.clip(np.arange(top, top + reach), 0, height - 1)
        columns = np.clip(np.arange(left, left + reach), 0, width - 1)
        square = _resized(np.ascontiguousarray(pixels[rows[:, None], columns]), self._side, self._side)
        crop = (self._torch.from_numpy(square).permute(2, 0, 1)[None].float() - 127.5) / 128
        with self._torch.inference_mode():
            score, moves, points = (out[0].double().numpy() for out in self._net(crop))
        return float(score), moves, points


def _pair(centres: Sequence[Point], side: int) -> tuple[Point, Point] | None:
    """The two of these that lie most like eyes in a face of this side: near EYES, about level, and not too close."""
    best, least = None, 0.2
    for a, b in itertools.permutations(centres, 2):
        apart, tilt = (b[0] - a[0]) / side, abs(b[1] - a[1]) / side
        if not 0.25 < apart < 0.6 or tilt > 0.35 * apart:
            continue
        middle = ((a[0] + b[0]) / 2 / side - 0.5, (a[1] + b[1]) / 2 / side - EYES[0][1])
        off = float(np.hypot(*middle)) + 0.5 * abs(apart - (EYES[1][0] - EYES[0][0]))
        if off < least:
            best, least = (a, b), off
    return best


# -- private: pixels -------------------------------------------------------------------------------------------------


def _scaled(face: Face, factor: float) -> Face:
    x, y, w, h = (value * factor for value in face.box)
    points = None if face.landmarks is None else [(px * factor, py * factor) for px, py in face.landmarks]
    return Face((x, y, w, h), face.score, points)


def _shrunk(pixels: Pixels, scale: float) -> Pixels:
    out = pixels
    if scale < 1:
        out = np.asarray(cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    return out if out.ndim == 3 else out[:, :, None]


def _resized(pixels: Pixels, width: int, height: int = 0) -> Pixels:
    """(H, W, C) -> (height or width, width, C): area average when shrinking, linear when growing."""
    height = height or width
    method = cv2.INTER_AREA if width <= pixels.shape[1] and height <= pixels.shape[0] else cv2.INTER_LINEAR
    out = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=method)
    return np.asarray(out, np.uint8).reshape(height, width, pixels.shape[2])


def _fitted(pixels: Pixels, width: int, height: int) -> tuple[Pixels, float]:
    """(height, width, 3) with the picture as large as fits in its top left corner, grey around; and the factor."""
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    w, h = (max(1, round(side * scale)) for side in (pixels.shape[1], pixels.shape[0]))
    out = np.full((height, width, 3), 127, np.uint8)
    out[:h, :w] = _resized(pixels, w, h)
    return out, scale


def _colour(pixels: Pixels) -> Pixels:
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def _luma(pixels: Pixels) -> Pixels:
    if pixels.shape[2] == 1:
        return np.ascontiguousarray(pixels[:, :, 0])
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY), np.uint8)


@functools.cache
def _cascade_file(name: str) -> str:
    path = Path(cv2.__file__).parent / "data" / name
    if not path.is_file():
        raise ConfigError(f"OpenCV {cv2.__version__} has no {name}; install opencv-python-headless>=4.13,<5")
    return str(path)
