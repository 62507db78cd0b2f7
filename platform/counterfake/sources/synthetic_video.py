"""Procedural people on film: clips of a moving face, and the same clips with the face swapped, frame by frame.

A clip is one shot of a person whose pose, expression and gaze drift smoothly (two sines each, and blinks). Its swap shows the
same motion with the partner's face, rendered in the very pose of each frame, pasted through a soft mask and matched in
colour. A swap made frame by frame does not hold still: its colour and place are drawn anew for every frame around the right ones
(`flicker`), which one frame hardly shows and a sequence does. Sensor noise and JPEG come after the paste, for both alike.
People are partners in pairs (0 and 1, 2 and 3, …) and linked by `also`, so that a split never parts them.
Deterministic by (seed, person, clip, frame).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from counterfake import blending, face_masks, media
from counterfake.blending import Blending
from counterfake.errors import ConfigError
from counterfake.sources import Consent, Sample, Skipped, SourceConfig
from counterfake.sources.portrait import people
from counterfake.sources.portrait.painter import Portrait, render
from counterfake.sources.portrait.people import Shot

Kind = Literal["real", "swap"]
MAKER = "procedural-swap"
MOTION = {  # of a shot: largest way from its middle, slowest and fastest sine in Hz, bounds
    "yaw": (0.2, 0.15, 0.5, (-0.5, 0.5)),
    "pitch": (0.07, 0.2, 0.6, (-0.22, 0.22)),
    "roll": (0.06, 0.15, 0.5, (-0.25, 0.25)),
    "shift_x": (0.012, 0.15, 0.5, (-0.05, 0.05)),
    "shift_y": (0.01, 0.2, 0.6, (-0.02, 0.06)),
    "smile": (0.25, 0.1, 0.4, (-0.35, 1.0)),
    "mouth_open": (0.3, 0.8, 2.5, (0.0, 1.0)),
    "brow_raise": (0.25, 0.2, 0.8, (-0.5, 1.0)),
    "gaze_x": (0.35, 0.2, 0.8, (-0.9, 0.9)),
    "gaze_y": (0.12, 0.2, 0.8, (-0.5, 0.5)),
}
BLINK_SECONDS = (3.0, 0.25)  # mean time between two blinks, and how long one lasts
PASTE = Blending(erode=0.02, blur=0.02)
COLOUR = 5.0  # levels of 255: standard deviation of each channel's offset per frame at flicker 1
PLACE = 0.008  # of the side: standard deviation of the face's place per frame at flicker 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticVideoSource(SourceConfig):
    """Clips of faces nobody owns: `clips` real ones of each person, and the swap of each to the partner's face."""

    name: str = "synthetic-videos"
    licence: str = "Apache-2.0"
    consent: Consent = "synthetic"
    identities: int = 40  # people, an even number: each is swapped with its neighbour
    clips: int = 5  # of each person; as many swaps
    frames: int = 16  # of each clip
    fps: float = 8.0  # frames per second
    size: int = 128  # side of the picture, pixels
    flicker: float = 1.0  # of the swaps, in the units above; 0 = every frame right by itself
    seed: int = 0  # of the whole population
    quality: tuple[int, int] = (80, 95)  # JPEG quality of a clip, uniform

    part_inputs: ClassVar[int] = 16  # clips

    def __post_init__(self) -> None:
        if self.identities < 2 or self.identities % 2 or self.clips < 1 or self.frames < 1 or self.size < 32:
            raise ConfigError(
                "synthetic videos need an even number of identities, clips >= 1, frames >= 1 and size >= 32; "
                f"got {self.identities}, {self.clips}, {self.frames}, {self.size}"
            )
        if not (1 <= self.quality[0] <= self.quality[1] <= 100 and self.flicker >= 0 and self.fps > 0):
            raise ConfigError(
                f"quality {self.quality} must lie in 1-100, flicker {self.flicker:g} be at least 0 and fps {self.fps:g} above 0"
            )

    def names(self) -> Iterator[str]:
        """SEED/PERSON/KIND/CLIP, clip by clip over the people, so that any prefix holds many of them."""
        for clip in range(self.clips):
            for person in range(self.identities):
                yield from (f"{self.seed}/{person:06d}/{kind}/{clip:03d}" for kind in ("real", "swap"))

    def read(self, names: Sequence[str]) -> Iterator[Sample | Skipped]:
        for name in names:
            _, person, kind, clip = name.split("/")
            yield from self.clip(int(person), int(clip), "real" if kind == "real" else "swap")

    def clip(self, person: int, clip: int, kind: Kind) -> Iterator[Sample]:
        """The frames of one clip with their exact ground truth."""
        quality = int(
            np.random.default_rng([self.seed, person, clip, 11]).integers(
                self.quality[0], self.quality[1] + 1
            )
        )
        for frame, shot in enumerate(self.shots(person, clip)):
            target = render(people.identity(self.seed, person), shot, self.size)
            pixels = target.pixels if kind == "real" else self._swapped(target, person, clip, frame, shot)
            pixels = self._sensed(pixels, person, clip, kind, frame)
            yield self._sample(target, pixels, quality, (person, clip, kind), frame, shot)

    def shots(self, person: int, clip: int) -> list[Shot]:
        """One shot per frame. The camera's noise is left out: it is added after the paste."""
        base = dataclasses.replace(people.shot(self.seed, person, clip), noise=0.0)
        seconds = np.arange(self.frames) / self.fps
        rng = np.random.default_rng([self.seed, person, clip, 12])
        moved: dict[str, NDArray[np.float64]] = {
            name: np.clip(getattr(base, name) + way * _drift(seconds, slow, fast, rng), *bounds)
            for name, (way, slow, fast, bounds) in MOTION.items()
        }
        moved["eye_open"] = np.maximum(0.25, base.eye_open * _blinks(seconds, rng))
        return [
            _moved(base, {name: float(values[frame]) for name, values in moved.items()})
            for frame in range(self.frames)
        ]

    def person(self, number: int) -> str:
        """The name of person `number` in `Sample.identity`; the same people as the source of pictures has."""
        return f"synthetic-{self.seed}-{number:06d}"

    # -- private ----------------------------------------------------------------------------------------------------

    def _swapped(self, target: Portrait, person: int, clip: int, frame: int, shot: Shot) -> NDArray[np.uint8]:
        """The partner's face in the target's frame, off by this frame's colour and place."""
        rng = np.random.default_rng([self.seed, person, clip, frame, 13])
        donor = render(people.identity(self.seed, _partner(person)), shot, self.size)
        across, down = rng.normal(0, PLACE * self.size * self.flicker, 2)
        place = np.array([[1.0, 0.0, across], [0.0, 1.0, down]])
        mask = np.asarray(target.face_mask / 255, np.float32)
        pasted = blending.compose(target.pixels, donor.pixels, place, mask, PASTE)
        face = blending.shaped(mask, PASTE)[:, :, None]
        offset = rng.normal(0, COLOUR * self.flicker, 3)
        return np.clip(np.rint(pasted + face * offset), 0, 255).astype(np.uint8)

    def _sensed(
        self, pixels: NDArray[np.uint8], person: int, clip: int, kind: Kind, frame: int
    ) -> NDArray[np.uint8]:
        """Sensor noise of this frame, as strong as the shot's."""
        strength = people.shot(self.seed, person, clip).noise
        rng = np.random.default_rng([self.seed, person, clip, frame, 14, kind == "swap"])
        return np.clip(np.rint(pixels + rng.normal(0, strength, pixels.shape)), 0, 255).astype(np.uint8)

    def _sample(
        self, target: Portrait, pixels: NDArray[np.uint8], quality: int, which: tuple[int, int, Kind], frame: int, shot: Shot
    ) -> Sample:  # fmt: skip
        person, clip, kind = which
        name = f"{self.seed}/{person:06d}/{kind}/{clip:03d}"
        known: dict[str, Any] = {
            "also": [f"identity:{self.person(_partner(person))}"],
            face_masks.NAME: face_masks.packed(target.face_mask),
        }
        return Sample(
            image=media.encode(pixels, "jpeg", quality),
            path=name,
            fake=int(kind == "swap"),
            maker="camera" if kind == "real" else MAKER,
            identity=self.person(person),
            source=self.label,
            video=name,
            frame=frame,
            time_s=frame / self.fps,
            face_box=target.face_box,
            face_method="synthetic",
            face_margin=1.0,
            landmarks=[value for point in target.landmarks for value in point],
            attributes=people.differences(shot) | known | {"format": "jpeg", "quality": quality},
        )


def _moved(base: Shot, values: dict[str, Any]) -> Shot:
    return dataclasses.replace(base, **values)


def _partner(person: int) -> int:
    return person ^ 1


def _drift(
    seconds: NDArray[np.float64], slow: float, fast: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(T,) in [-1, 1]: two sines of random frequency and phase."""
    hertz, phase = rng.uniform(slow, fast, 2), rng.uniform(0, 2 * np.pi, 2)
    waves = np.sin(2 * np.pi * hertz[:, None] * seconds + phase[:, None])
    return np.asarray(0.65 * waves[0] + 0.35 * waves[1])


def _blinks(seconds: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """(T,) how open the eyes are: 1, and down to 0.3 in the middle of a blink."""
    between, lasts = BLINK_SECONDS
    at = np.cumsum(rng.exponential(between, 2 + int(seconds[-1] / between * 3)))
    nearest = np.abs(seconds[:, None] - at[None, :]).min(axis=1)
    return np.asarray(1 - 0.7 * np.clip(1 - 2 * nearest / lasts, 0, 1))
