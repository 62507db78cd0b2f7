"""The nets that judge swaps, taught once and kept: who a face is taken for, and how it looks.

A reader lies under the SHA-256 of what it was taught with (settings, pictures or the recipe of their painter, people), as a
checkpoint whose every byte is verified. So models of the same people are judged by the same readers, and nothing is
taught twice. evaluate_swap.py asks them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake import checkpoint, config
from counterfake.errors import CheckpointError
from counterfake.evaluation import swap
from counterfake.evaluation.reading import Reader, ReadingConfig, recogniser, regressor
from counterfake.sources.portrait import people
from counterfake.sources.synthetic import portrait
from jobs.swap_studio import NEW, PARAMETERS, Studio

Pixels = NDArray[np.uint8]
Names = Callable[[Pixels], NDArray[np.int64]]


class Readers:
    """Readers of one setting, under one local folder; safe to delete."""

    def __init__(self, folder: Path, reading: ReadingConfig) -> None:
        self.folder, self.reading = folder, reading

    def people(self, faces: Pixels, who: NDArray[np.int64], count: int) -> tuple[Reader, Names]:
        """(the net, faces (N, s, s, 3) -> the person (N,) each is taken for), taught by faces (N, s, s, 3) of `who` (N,)."""
        known = {"reads": "people", "faces": _sha256(faces), "who": who.tolist(), "count": count}
        reader = self._kept(known, lambda: recogniser(faces, who, count, self.reading))
        gallery = swap.centroids(reader.read(faces), who, count)
        return reader, lambda shown: swap.nearest(reader.read(shown), gallery)

    def poses(self, studio: Studio, strangers: int, size: int, seed: int) -> Reader:
        """Reads PARAMETERS; taught by procedural strangers, so that it cannot know what the people usually look like."""
        first = _faces(studio, [(seed, NEW, 0)], size)  # another painter or cut is another reader
        known = {
            "reads": "poses",
            "strangers": strangers,
            "size": size,
            "seed": seed,
            "first": _sha256(first),
        }
        return self._kept(known, lambda: self._taught(studio, strangers, size, seed))

    def _taught(self, studio: Studio, strangers: int, size: int, seed: int) -> Reader:
        shots = [(seed, NEW + person, picture) for person in range(strangers) for picture in range(2)]
        values = [[getattr(people.shot(*shot), name) for name in PARAMETERS] for shot in shots]
        return regressor(_faces(studio, shots, size), np.array(values), self.reading)

    def _kept(self, known: dict[str, Any], teach: Callable[[], Reader]) -> Reader:
        key = config.digest({"reading": config.to_dict(self.reading), **known})
        target = self.folder / key[:32]
        if target.exists():
            state, _ = checkpoint.load(target)
            return Reader.of(self.reading.net, state)
        reader = teach()
        try:
            checkpoint.save(target, reader.state_dict(), {"reader_sha256": reader.sha256})
        except (CheckpointError, OSError):
            if not target.exists():  # else another process was quicker, with the same reader
                raise
        return reader


def _faces(studio: Studio, shots: Sequence[tuple[int, int, int]], size: int) -> Pixels:
    """(N, s, s, 3) what the network reads of procedural pictures (population, person, picture)."""
    made = [portrait(*shot, size) for shot in shots]
    return studio.middle([studio.preprocess.apply(m.pixels, m.face_box, m.landmarks) for m in made])


def _sha256(faces: Pixels) -> str:
    return hashlib.sha256(faces.tobytes() + str(faces.shape).encode()).hexdigest()
