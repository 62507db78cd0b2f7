"""Procedural faces as a source: real uploads in all but the people. Deterministic by (seed, identity, picture)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from counterfake import face_masks, media
from counterfake.errors import ConfigError
from counterfake.sources import Consent, Sample, Skipped, SourceConfig
from counterfake.sources.portrait import people
from counterfake.sources.portrait.painter import Portrait, render
from counterfake.sources.portrait.people import Identity, Shot

__all__ = ["Identity", "Portrait", "Shot", "SyntheticSource", "portrait", "render"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSource(SourceConfig):
    """Faces nobody owns: `identities` people, `per_identity` pictures of each."""

    name: str = "synthetic-faces"
    licence: str = "Apache-2.0"
    consent: Consent = "synthetic"
    identities: int = 100  # people
    per_identity: int = 10  # pictures of each
    first_identity: int = 0  # number of the first person: another range is another set of people
    size: int = 128  # side of the picture, pixels
    seed: int = 0  # of the whole population
    png_share: float = 0.15  # share of pictures stored as PNG; the others are JPEG
    quality: tuple[int, int] = (72, 96)  # JPEG quality, uniform

    def __post_init__(self) -> None:
        if self.identities < 1 or self.per_identity < 1 or self.size < 16:
            raise ConfigError(
                "synthetic faces need identities >= 1, per_identity >= 1, size >= 16; "
                f"got {self.identities}, {self.per_identity}, {self.size}"
            )
        if not (1 <= self.quality[0] <= self.quality[1] <= 100 and 0 <= self.png_share <= 1):
            raise ConfigError(
                f"quality {self.quality} must lie in 1-100 and png_share {self.png_share} in 0-1"
            )

    def names(self) -> Iterator[str]:
        """Round by round over the people, so that any prefix holds many of them."""
        for picture in range(self.per_identity):
            for person in range(self.first_identity, self.first_identity + self.identities):
                yield self._name(person, picture)

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        """Names are SEED/PERSON/PICTURE.FORMAT; the numbers say all."""
        for name in names:
            _, person, picture = name.partition(".")[0].split("/")
            yield self.sample(int(person), int(picture))

    def sample(self, person: int, picture: int) -> Sample:
        """Picture number `picture` of person number `person`, with its exact ground truth."""
        shot = people.shot(self.seed, person, picture)
        made = render(people.identity(self.seed, person), shot, self.size)
        data, attributes = self._encoded(made, person, picture)
        return Sample(
            image=data,
            path=self._name(person, picture),
            fake=0,
            maker="camera",
            identity=self.person(person),
            source=self.label,
            face_box=made.face_box,
            face_method="synthetic",
            face_margin=1.0,
            landmarks=[value for point in made.landmarks for value in point],
            attributes=people.differences(shot)
            | attributes
            | {face_masks.NAME: face_masks.packed(made.face_mask)},
        )

    def person(self, number: int) -> str:
        """The name of person `number` in `Sample.identity`."""
        return f"synthetic-{self.seed}-{number:06d}"

    def _name(self, person: int, picture: int) -> str:
        return f"{self.seed}/{person:06d}/{picture:04d}.{self._format(person, picture)[0]}"

    def _encoded(self, made: Portrait, person: int, picture: int) -> tuple[bytes, dict[str, str | int]]:
        format, quality = self._format(person, picture)
        if format == "png":
            return media.encode(made.pixels, "png"), {"format": "png"}
        return media.encode(made.pixels, "jpeg", quality), {"format": "jpeg", "quality": quality}

    def _format(self, person: int, picture: int) -> tuple[Literal["png", "jpeg"], int]:
        rng = np.random.default_rng([self.seed, person, picture, 8])
        as_png = rng.random() < self.png_share
        quality = int(rng.integers(self.quality[0], self.quality[1] + 1))
        return ("png" if as_png else "jpeg"), quality


def portrait(
    seed: int, person: int, picture: int, size: int = 128, *, shot_of: int | None = None
) -> Portrait:
    """Render person `person`; with `shot_of`, in the pose, expression and light of that other person's picture.

    `portrait(seed, b, i, shot_of=a)` is what swapping b's face into picture i of a should look like.
    """
    shot = people.shot(seed, person if shot_of is None else shot_of, picture)
    return render(people.identity(seed, person), shot, size)
