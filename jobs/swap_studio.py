"""The people of a face-swap model in front of a camera: real pictures of them, swaps of these, and what is known of both.

Procedural people can be photographed anew and their true swaps and masks be painted; of others there is what the dataset
holds. evaluate_swap.py measures what happens here.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from counterfake import conversion, media
from counterfake.blending import compose, soft_mask
from counterfake.conversion import ConversionConfig, Painter
from counterfake.errors import DataError
from counterfake.faces import Face
from counterfake.learners.faceswap import swap_with_mask
from counterfake.learners.warp import centre
from counterfake.records import Dataset, Sample
from counterfake.sources.portrait import people
from counterfake.sources.synthetic import SyntheticSource, portrait, render
from jobs import generate

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

POSE, EXPRESSION = (
    ("yaw", "pitch", "roll"),
    ("smile", "mouth_open", "brow_raise", "eye_open", "gaze_x", "gaze_y"),
)
PARAMETERS = (*POSE, *EXPRESSION)
NEW = 1_000_000  # number of the first new picture, and of the first new person, of a procedural population
HELD_OUT = 3  # of people who are not procedural, every so manieth picture is swapped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photo:
    """A real picture of one of the people, and what is known of it."""

    pixels: Pixels  # (H, W, 3)
    who: int  # number of the person
    face: Face
    crop: Pixels  # (S, S, 3) as the network reads it
    format: generate.Encoding
    parameters: tuple[float, ...] | None = None  # PARAMETERS, where they are known
    shot: tuple[int, int, int] | None = None  # procedural: (population, person, picture)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swap:
    """A held-out picture as somebody."""

    source: Photo
    target: int  # number of the person painted
    painted: Pixels  # (s, s, 3)
    mask: NDArray[np.float32]  # (s, s)
    picture: Pixels  # (H, W, 3) with the painted face pasted back


class Studio:
    """The model and how its people are seen."""

    def __init__(self, model: generate.Model) -> None:
        self.net, self.net_config, self.preprocess = model.net, model.swap_config, model.preprocess
        self.names = self.net_config.identities
        self.painters = [Painter(model.net, self.net_config, model.preprocess, name) for name in self.names]
        found = [re.fullmatch(r"synthetic-(\d+)-(\d+)", name) for name in self.names]
        numbers = [(int(match[1]), int(match[2])) for match in found if match]
        self.numbers = (
            numbers if len(numbers) == len(self.names) else []
        )  # (population, person); [] = not procedural

    def photo(self, sample: Sample) -> Photo:
        """A row as a picture. Raises DataError without a face_box."""
        if sample.face_box is None:
            raise DataError(f"{sample.path} has no face_box; ingest the faces with --set faces=cascade")
        pixels, flat = media.decode_trusted(sample.media), sample.landmarks or []
        points = list(zip(flat[::2], flat[1::2], strict=True))
        parameters = tuple(float(sample.attributes.get(name, np.nan)) for name in PARAMETERS)
        return Photo(
            pixels=pixels,
            who=self.names.index(str(sample.identity)),
            face=Face(sample.face_box, 1.0, points or None),
            crop=self.preprocess.apply(pixels, sample.face_box, points or None),
            format=generate.encoding(sample.media),
            parameters=None if np.isnan(parameters).any() else parameters,
        )

    def new(self, who: int, picture: int, size: int) -> Photo:
        """A procedural person in a picture that no dataset holds."""
        seed, person = self.numbers[who]
        sample = SyntheticSource(size=size, seed=seed).sample(person, NEW + picture)
        return dataclasses.replace(self.photo(sample), shot=(seed, person, NEW + picture))

    def middle(self, crops: Sequence[Pixels]) -> Pixels:
        """What the network reads of face crops: (N, s, s, 3)."""
        rows = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()
        read = centre(rows, self.net_config.size, self.net_config.coverage)
        return read.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()

    def paint(
        self, photos: Sequence[Photo], targets: Sequence[int]
    ) -> list[tuple[Pixels, NDArray[np.float32]]]:
        """Each face as the person asked for, and the mask it is pasted through."""
        rows = torch.from_numpy(np.stack([p.crop for p in photos])).permute(0, 3, 1, 2)
        own = torch.tensor([p.who for p in photos])
        painted, masks = swap_with_mask(self.net, self.net_config, rows, torch.tensor(targets), own)
        usual = soft_mask(self.net_config.size)
        made = list(painted.permute(0, 2, 3, 1).numpy())
        return [(face, usual if masks is None else masks[i, 0].numpy()) for i, face in enumerate(made)]

    def swaps(self, sources: Sequence[Photo], how: ConversionConfig) -> list[Swap]:
        """Every held-out picture as everybody else."""
        found = []
        for target, painter in enumerate(self.painters):
            photos = [photo for photo in sources if photo.who != target]
            for photo, (face, mask) in zip(photos, self.paint(photos, [target] * len(photos)), strict=True):
                place = painter.place(conversion.window(photo.face, photo.pixels, self.preprocess))
                picture = compose(photo.pixels, face, place, mask, how.blending)
                found.append(Swap(source=photo, target=target, painted=face, mask=mask, picture=picture))
        return found

    def pasted_true(self, made: Swap, how: ConversionConfig) -> Pixels:
        """(H, W, 3) the source's picture with the true swap pasted as the painted one was: what a perfect network gives."""
        move = conversion.window(made.source.face, made.source.pixels, self.preprocess)
        place = self.painters[made.target].place(move)
        return compose(made.source.pixels, self.true_swap(made), place, made.mask, how.blending)

    def true_swap(self, made: Swap) -> Pixels:
        """(s, s, 3) the target person in the source's pose, expression and light, cut where the source was cut."""
        assert made.source.shot is not None, "only procedural people have a true swap"
        seed, person, picture = made.source.shot
        identity = people.identity(*self.numbers[made.target])
        true = render(identity, people.shot(seed, person, picture), len(made.source.pixels))
        return np.asarray(self.middle([self.cut(true.pixels, made.source.face)])[0], np.uint8)

    def true_mask(self, photo: Photo) -> NDArray[np.float64]:
        """(s, s) in [0, 1]: where the face is."""
        assert photo.shot is not None, "only procedural people have a true mask"
        mask = portrait(*photo.shot, len(photo.pixels)).face_mask
        shown = self.middle([self.cut(mask[:, :, None].repeat(3, axis=2), photo.face)])
        return np.asarray(shown[0, :, :, 0] / 255, np.float64)

    def cut(self, pixels: Pixels, face: Face) -> Pixels:
        """The face crop (S, S, 3) of any picture."""
        return self.preprocess.apply(pixels, face.box, face.landmarks)


def pictures(
    studio: Studio, dataset: Dataset, gallery: int, held_out: int
) -> tuple[list[Photo], list[Photo]]:
    """(what readers learn from, what is swapped): at most `gallery` and `held_out` of each person. Procedural people are
    photographed anew, of others every HELD_OUT-th picture is kept apart. Raises DataError for fewer than two of a person."""
    found = _found(studio, dataset, gallery if studio.numbers else gallery + held_out)
    if studio.numbers:
        size = found[0][0].pixels.shape[0]
        new = [studio.new(who, i, size) for who in range(len(studio.names)) for i in range(held_out)]
        return [photo for photos in found.values() for photo in photos], new
    known, kept = [], []
    for photos in found.values():
        held = photos[::HELD_OUT][:held_out]
        apart = {id(photo) for photo in held}
        kept += held
        known += [photo for photo in photos if id(photo) not in apart]
    return known, kept


def _found(studio: Studio, dataset: Dataset, most: int) -> dict[int, list[Photo]]:
    version = dataset.version(dataset.pinned)
    found: dict[int, list[Photo]] = collections.defaultdict(list)
    faceless = 0
    for split in version.splits:
        for sample in dataset.samples(version, split):
            if sample.fake != 1 and sample.identity in studio.names:
                who = studio.names.index(sample.identity)
                faceless += sample.face_box is None
                if len(found[who]) < most and sample.face_box is not None:
                    found[who].append(studio.photo(sample))
    if faceless:
        logger.warning("%s: %d rows have no face_box and are left out", dataset.name, faceless)
    if few := [name for who, name in enumerate(studio.names) if len(found[who]) < 2]:
        raise DataError(
            f"{dataset.name} has fewer than two real pictures with a face of {', '.join(few[:8])}"
            f" ({faceless} rows have no face_box); name another dataset with --set faces=…"
        )
    return found
