"""What becomes of one item of a source on its way into a dataset: decoded, its face found, measured, hashed, perhaps encoded anew.

The decoder is the one that serving uses, so that what a detector is trained on is what it will be shown; what it refuses
is skipped with its reason. Raw pixels pass as they are.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from counterfake import media, quality
from counterfake.errors import ConfigError, MediaError
from counterfake.faces import FaceDetector
from counterfake.fingerprint import perceptual_hash
from counterfake.samples import Sample, Skipped
from counterfake.sources import SourceConfig

HELD_BYTES = 64 << 20  # of encoded pictures that wait for a thread, or for their turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A source and what is done with each of its items."""

    source: SourceConfig
    encode: str = (
        ""  # "jpeg:90", "png", "webp:100": every picture through one encoder; "" = stored as it came
    )
    faces: Literal["", "cascade", "cascade-default", "yunet", "ultralight"] = ""  # "" = no face is looked for
    faces_model: str = ""  # file of yunet or ultralight
    landmarks_model: str = ""  # file of MTCNN's O-Net: five points of each face; "" = its eyes
    fingerprint: bool = True  # store the perceptual hash by which near-copies are found

    def __post_init__(self) -> None:
        encoder(self.encode)
        if self.landmarks_model and not self.faces:
            raise ConfigError("landmarks_model finds points in faces that were found; set faces=cascade too")


class Preparer:
    """Applies a recipe to items. Not thread-safe: face detectors are not."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._detector = (
            FaceDetector(
                recipe.faces, model=recipe.faces_model, eyes=True, landmarks_model=recipe.landmarks_model
            )
            if recipe.faces
            else None
        )

    def __call__(self, item: Sample | Skipped) -> Sample | Skipped:
        if isinstance(item, Skipped) or item.image is None:
            return item
        try:
            pixels = media.decode(item.image)
        except MediaError as error:
            return Skipped(item.path, error.reason)
        if self._detector is not None and item.face_method is None:
            item = _with_face(item, pixels, self._detector)
        item = described(item, pixels, fingerprint=self.recipe.fingerprint)
        return encoded(item, pixels, self.recipe.encode) if self.recipe.encode else item


def prepared(
    recipe: Recipe, items: Iterable[Sample | Skipped], threads: int = 1
) -> Iterator[Sample | Skipped]:
    """The items, prepared, in their order. At most HELD_BYTES and one picture more are held."""
    if threads == 1:
        yield from map(Preparer(recipe), items)
        return
    local = threading.local()

    def prepare(item: Sample | Skipped) -> Sample | Skipped:
        if not hasattr(local, "preparer"):
            local.preparer = Preparer(recipe)
        result: Sample | Skipped = local.preparer(item)
        return result

    waiting: collections.deque[tuple[int, Future[Sample | Skipped]]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
        for item in items:
            waiting.append((_size(item), pool.submit(prepare, item)))
            while len(waiting) > 8 * threads or sum(size for size, _ in waiting) > HELD_BYTES:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting.popleft()[1].result()


def described(sample: Sample, pixels: media.Pixels, *, fingerprint: bool = True) -> Sample:
    """The sample with what `quality` measures of its pixels (H, W, C), and its perceptual hash if it has one."""
    known = quality.measured(pixels, sample.face_box, sample.attributes.get("face_score"))
    if fingerprint and (phash := perceptual_hash(pixels)):
        known["phash"] = phash
    return dataclasses.replace(sample, attributes=sample.attributes | known)


def encoded(sample: Sample, pixels: media.Pixels, encode: str) -> Sample:
    """The sample with its picture through the one encoder; the digest of the original is kept."""
    format, level = encoder(encode)
    attributes = {**sample.attributes, "encoded": encode, "original": sample.id}
    return dataclasses.replace(
        sample, id="", image=media.encode(pixels, format, level), pixels=None, attributes=attributes
    )


def encoder(text: str) -> tuple[Literal["jpeg", "png", "webp"], int]:
    """ "jpeg:90" -> ("jpeg", 90). Raises ConfigError for anything that is no encoder."""
    name, _, quality = text.partition(":")
    level = quality or "90"
    for format in ("jpeg", "png", "webp"):
        if name == format and level.isdigit() and 1 <= int(level) <= 100:
            return format, int(level)
    if text:
        raise ConfigError(
            f"encode is {text!r}; expected png, or jpeg:QUALITY or webp:QUALITY with quality 1-100"
        )
    return "png", 100


# -- private --------------------------------------------------------------------------------------------------------


def _size(item: Sample | Skipped) -> int:
    return len(item.media) if isinstance(item, Sample) else 0


def _with_face(sample: Sample, pixels: media.Pixels, detector: FaceDetector) -> Sample:
    """The largest face; a picture without one keeps the method's name alone, which says that it was searched."""
    face = detector.largest(pixels)
    points = face.landmarks if face is not None else None
    known = {"face_score": face.score} if face is not None else {}
    return dataclasses.replace(
        sample,
        face_box=face.box if face is not None else None,
        face_method=detector.method,
        face_margin=1.0,
        landmarks=[value for point in points for value in point] if points else None,
        attributes=sample.attributes | known,
    )
