"""Degraded training pictures: the robustness grid's own damage, drawn from (seed, epoch, row) whoever reads the row and when."""

from __future__ import annotations

import numpy as np
import pytest

from counterfake import media
from counterfake.data import DataConfig, Loader
from counterfake.errors import ConfigError
from counterfake.evaluation.robustness import GRID, Cell
from counterfake.images import Degradation, Preprocess, generator, noise
from counterfake.records import Sample, write_version

NEVER = {"jpeg": None, "blur": None, "resize": None, "noise": None}
ALWAYS = Degradation(probability=0.5, share=0.5)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 pictures of 40 × 48 px, and one data set of 4 that the share chain makes smaller."""
    root = tmp_path_factory.mktemp("degraded")
    rng = np.random.default_rng(0)
    facts = {"made": {"licence": "CC0-1.0", "consent": "synthetic"}}

    def samples(count: int, height: int, width: int):
        for i in range(count):
            pixels = np.repeat(
                np.repeat(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8), 8, 0), 8, 1
            )
            box = (width / 2, height / 4, width / 4, height / 2)
            yield Sample(
                image=media.encode(pixels, "png"), fake=i % 2, source="made", path=str(i), face_box=box
            )

    write_version(f"file://{root}/small", samples(64, 40, 48), sources=facts)
    write_version(f"file://{root}/large", samples(4, 800, 1600), sources=facts)
    return f"file://{root}"


def config(stored: str, degradation: Degradation, **changes: object) -> DataConfig:
    settings = {"uri": f"{stored}/small", "split": "*", "batch_size": 16, "preprocess": Preprocess(size=32)}
    return DataConfig(**{**settings, "threads": 1, "degradation": degradation, **changes})


def rows(data: DataConfig, *, first: int = 0, last: int = 8, rank: int = 0, world: int = 1) -> dict:
    """(epoch, id) -> pixels (H, W, C), of the steps `first` to `last` of one rank."""
    batches = Loader(data, rank=rank, world=world).batches(start_step=first)
    found = {}
    for _ in range(first, last):
        batch = next(batches)
        for key, pixels in zip(batch.ids, batch.images.permute(0, 2, 3, 1).numpy(), strict=True):
            found[batch.epoch, key] = pixels.copy()
    batches.close()
    return found


@pytest.mark.parametrize(
    "cell", [cell for cell in GRID if cell.kind in ("jpeg", "blur", "resize", "share")], ids=lambda c: c.name
)
def test_a_training_picture_is_the_grids_cell_bit_for_bit(stored: str, cell: Cell) -> None:
    strength = {cell.kind: (cell.strength, cell.strength)} if cell.kind != "share" else {"share": 1.0}
    probability = 0.0 if cell.kind == "share" else 1.0
    data = config(stored, Degradation(**{**NEVER, "probability": probability, **strength}))
    loader = Loader(data)
    originals = {s.id: media.decode_trusted(s.media) for s in loader.dataset.samples(loader.version, "*")}
    for (_, key), pixels in rows(data, last=1).items():
        assert (pixels == Preprocess(size=32).apply(cell.apply(originals[key], (0, key)))).all()


def test_noise_is_the_grids_function_drawn_from_seed_epoch_and_row(stored: str) -> None:
    only = Degradation(**{**NEVER, "probability": 1.0, "noise": (10.0, 10.0)})
    data = config(stored, only, seed=3)
    loader = Loader(data)
    originals = {s.id: media.decode_trusted(s.media) for s in loader.dataset.samples(loader.version, "*")}
    for (epoch, key), pixels in rows(data, first=3, last=5).items():
        rng = generator(3, epoch, key)
        rng.random(8)  # which steps happen, and how strongly
        assert (pixels == Preprocess(size=32).apply(noise(originals[key], 10.0, rng))).all()


def test_every_world_size_and_every_start_reads_the_same_pictures(stored: str) -> None:
    data = config(stored, ALWAYS)
    whole = rows(data)
    assert len(whole) == 128  # two epochs
    shared = {}
    for rank in (0, 1):
        shared |= rows(data, rank=rank, world=2)
    resumed = rows(data, first=3)
    for found in (shared, resumed, rows(config(stored, ALWAYS, threads=3))):
        assert all((pixels == whole[key]).all() for key, pixels in found.items())
    assert shared.keys() == whole.keys()


def test_another_epoch_and_another_seed_draw_anew_and_off_is_off(stored: str) -> None:
    whole, other = rows(config(stored, ALWAYS)), rows(config(stored, ALWAYS, seed=1))
    ids = {key for _, key in whole}
    assert sum((whole[0, key] != whole[1, key]).any() for key in ids) > 32
    assert sum((whole[0, key] != other[0, key]).any() for key in ids) > 32
    clean = rows(config(stored, Degradation()))
    assert all((clean[0, key] == clean[1, key]).all() for key in ids)


def test_the_face_box_follows_a_picture_that_the_share_chain_made_smaller(stored: str) -> None:
    face = Preprocess(size=32, crop="face", margin=1.0)
    wanted = {"uri": f"{stored}/large", "batch_size": 4, "preprocess": face}
    clean = rows(config(stored, Degradation(), **wanted), last=1)
    shared = rows(config(stored, Degradation(share=1.0), **wanted), last=1)
    for key, pixels in shared.items():
        error = np.abs(pixels.astype(int) - clean[key]).mean()
        assert 0 < error < 25  # JPEG's loss; another part of such a picture differs by about 85


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"probability": 1.5}, "must lie in"), ({"jpeg": (90, 30)}, r"degradation\.jpeg must be \[low, high\] in \[1, 100\]"),
     ({"resize": (0.0, 1.0)}, r"degradation\.resize")],
    ids=["probability", "reversed", "to nothing"],
)  # fmt: skip
def test_impossible_degradations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Degradation(**changes)


def test_the_strengths_reach_the_worst_cells() -> None:
    at_most = Degradation()
    worst = {
        kind: [c.strength for c in GRID if c.kind == kind] for kind in ("jpeg", "blur", "resize", "noise")
    }
    assert at_most.jpeg[0] <= min(worst["jpeg"])
    assert at_most.resize[0] <= min(worst["resize"])
    assert at_most.blur[1] >= max(worst["blur"])
    assert at_most.noise[1] >= max(worst["noise"])
