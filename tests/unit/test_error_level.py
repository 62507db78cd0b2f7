"""Error levels: what recompression takes, where it takes it, and a detector that finds what was pasted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from counterfake import bundle, media, predictor
from counterfake.config import from_dict, override, to_dict
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection
from counterfake.forensics import error_level
from counterfake.forensics.error_level import ErrorLevelConfig
from counterfake.forensics.forest import BenfordForest, ForestConfig
from counterfake.records import write_version
from counterfake.samples import Sample
from counterfake.workspace import Workspace
from jobs import train_benford
from jobs.train_benford import BenfordJob

SMALL = ErrorLevelConfig(qualities=(75,), regions=2)


def photo(seed: int, side: int = 128) -> NDArray[np.uint8]:
    """(side, side, 3) with the slope of natural spectra."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None]) + 1 / side
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, side, side))) / frequency).real
    return np.clip(128 + 40 * noise / noise.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def saved(pixels: NDArray[np.uint8], quality: int = 75) -> NDArray[np.uint8]:
    return media.decode_trusted(media.encode(pixels, "jpeg", quality))


def spliced(seed: int) -> NDArray[np.uint8]:
    """A JPEG into which 32 × 32 pixels of a picture that never was one are pasted."""
    rng, whole = np.random.default_rng(seed), saved(photo(seed)).copy()
    top, left = 8 * rng.integers(0, 12, 2)
    whole[top : top + 32, left : left + 32] = photo(seed + 1000)[top : top + 32, left : left + 32]
    return whole


def test_every_feature_has_a_name() -> None:
    for config in (ErrorLevelConfig(), SMALL):
        names = config.names()
        assert error_level.features(photo(0), config).shape == (len(names),)
        assert len(set(names)) == len(names)
    assert len(ErrorLevelConfig().names()) == 528


def test_the_error_of_a_block_is_the_mean_difference_to_its_recompression() -> None:
    pixels = photo(1, 64)
    luma = [error_level._planes(picture)[0] for picture in (pixels, saved(pixels, 60))]
    found = error_level.maps(pixels, 60)
    assert found.shape == (6, 8, 8)
    assert found[0, 2, 3] == pytest.approx(np.abs(luma[0] - luma[1])[16:24, 24:32].mean(), rel=1e-4)
    contrast = luma[0][16:24, 24:32].std()
    assert found[3, 2, 3] == pytest.approx(found[0, 2, 3] / (contrast + error_level.FLOOR), rel=1e-4)


def test_what_was_compressed_before_changes_little_and_one_colour_not_at_all() -> None:
    fresh, again = (error_level.maps(p, 75)[0].mean() for p in (photo(2), saved(photo(2))))
    assert again < 0.5 * fresh
    assert error_level.maps(np.full((64, 64, 3), 128, np.uint8), 75).max() == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_splice_has_the_highest_error(seed: int) -> None:
    clean, made = saved(photo(seed)), spliced(seed)
    pasted = (clean != made).any(axis=2).reshape(16, 8, 16, 8).any(axis=(1, 3))  # (rows, columns) of blocks
    level = error_level.maps(made, 75)[0]
    assert np.median(level[pasted]) > 2 * np.median(level[~pasted])


def test_a_picture_does_not_depend_on_its_mates_and_grey_is_three_equal_channels() -> None:
    pictures = [photo(0), photo(1, 64), photo(2, 96)]
    together = error_level.features_of(pictures, SMALL)
    np.testing.assert_array_equal(together, [error_level.features(p, SMALL) for p in pictures])
    grey = photo(3)[:, :, 0]
    coloured = np.repeat(grey[:, :, None], 3, axis=2)
    for one in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(error_level.features(one, SMALL), error_level.features(coloured, SMALL))


def test_large_pictures_are_cut_to_their_middle() -> None:
    config, picture = ErrorLevelConfig(max_side=64, regions=2), photo(0, 128)
    np.testing.assert_array_equal(
        error_level.features(picture, config), error_level.features(picture[32:96, 32:96], config)
    )


def test_too_small_pictures_and_wrong_settings_are_refused() -> None:
    with pytest.raises(DataError, match="32x32 pixels has too few blocks"):
        error_level.features(photo(0, 32), SMALL)
    with pytest.raises(ConfigError, match=r"qualities in 1\.\.100"):
        ErrorLevelConfig(qualities=(0,))
    with pytest.raises(ConfigError, match=r"min_side must be at least 128 for regions=16"):
        ErrorLevelConfig(regions=16)


def test_a_forest_tells_splices_from_clean_pictures_that_it_never_saw() -> None:
    rows = error_level.features_of(
        [p for seed in range(60) for p in (saved(photo(seed)), spliced(seed))], SMALL
    )
    fake = np.tile([0, 1], 60)
    forest = BenfordForest.fit(rows[:80], fake[:80], ForestConfig(trees=30))
    found = detection.evaluate(fake[80:], forest.predict(rows[80:]), bootstraps=0)
    assert found["auc"]["value"] > 0.95


def test_the_settings_survive_text_and_an_override() -> None:
    job = train_benford.error_level()
    assert from_dict(BenfordJob, to_dict(job)) == job
    changed = override(job, {"features.regions": "2", "features.qualities": "[80]"})
    assert changed.features == ErrorLevelConfig(regions=2, qualities=(80,))


def test_the_job_leaves_a_detector_of_plain_arrays(workspace: Workspace) -> None:
    samples = (
        Sample(
            image=media.encode(picture, "png"), fake=label, source="s", identity=f"p{seed}",
            split="train" if seed < 16 else "validation",
        )
        for seed in range(24) for label, picture in enumerate((saved(photo(seed, 64), 75), photo(seed, 64)))
    )  # fmt: skip
    write_version(workspace.dataset("made"), samples, sources={"s": {"licence": "MIT", "consent": "none"}})
    job = BenfordJob(
        name="levels", data=DataConfig(uri="made"), features=SMALL, forest=ForestConfig(trees=10)
    )
    made = train_benford.run(job, workspace)
    assert made["metrics"]["val_auc"] > 0.9  # never compressed against compressed once
    held = bundle.read(Path(made["bundle"]))
    assert held.kind == "error_level"
    assert {path.suffix for path in held.folder.iterdir()} == {".json", ".safetensors", ".md"}
    loaded = predictor.load(held.folder)
    pictures = [media.encode(photo(seed, 64), "png") for seed in (50, 51)]
    assert min(loaded.predict_bytes(pictures)) > 0.5
    assert loaded.refusal(loaded.decode(media.encode(photo(0, 40), "png"))) == "too_small"
