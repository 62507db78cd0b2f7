"""Moving digits, the U-Net, and a step with and without an adversary."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterfake import bundle, checkpoint, config, dist
from counterfake.errors import CheckpointError, ConfigError, DataError
from counterfake.images import Preprocess
from counterfake.learners import LearnerConfig, LearnerContext
from counterfake.learners.next_frame import NextFrame, NextFrameConfig, moving_digits, sharpness
from counterfake.nets import NetConfig
from counterfake.nets.dcgan import DcganDiscriminator
from counterfake.nets.unet import UNetConfig
from jobs.study_blur import BATCH, PRESETS, frames

TINY = NextFrameConfig(
    net=UNetConfig.tiny(),
    adversary=DcganDiscriminator(size=32, channels=3, width=2, dropout=0.0, spectral_norm=True),
)
AGAINST = dataclasses.replace(TINY, adversary_weight=0.05)


class Rows:
    """What a learner needs of a data.Batch: bright squares on black."""

    def __init__(self, rows: int = 8) -> None:
        self.images = torch.zeros(rows, 1, 12, 12, dtype=torch.uint8)
        self.images[:, :, 3:9, 3:9] = 255

    def __len__(self) -> int:
        return len(self.images)


def build(settings: NextFrameConfig, **changes: Any) -> NextFrame:
    dist.seed_build(0)
    facts = {
        "batch_size": 8,
        "images_per_epoch": 64,
        "total_images": 640,
        "channels": 1,
        "size": 12,
        **changes,
    }
    return settings.build(device=torch.device("cpu"), context=LearnerContext(**facts))


def train(learner: NextFrame, steps: int) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    for step in range(learner.steps, learner.steps + steps):
        dist.seed_step(0, step)
        metrics = learner.step(Rows())
    return metrics


def test_a_digit_moves_at_its_speed_and_stays_whole() -> None:
    torch.manual_seed(0)
    picture = torch.ones(20, 1, 4, 4)
    film = moving_digits(picture, frames=5, size=32, digits=1, speed=3.0)
    assert film.shape == (20, 5, 32, 32)
    assert ((film == 1).sum(dim=(2, 3)) == 16).all()
    rows = (film == 1).float().argmax(dim=2).amax(dim=2)
    columns = (film == 1).float().argmax(dim=3).amax(dim=2)
    moved = (rows.diff(dim=1) ** 2 + columns.diff(dim=1) ** 2).float().sqrt()
    assert moved.max() <= 3 + 2**0.5  # whole pixels
    assert moved.median() == pytest.approx(3.0, abs=0.6)


def test_two_digits_share_a_canvas_and_the_brighter_wins() -> None:
    pictures = torch.stack([torch.full((1, 8, 8), 0.5), torch.full((1, 8, 8), 1.0)])
    film = moving_digits(pictures, frames=3, size=8, digits=2)  # no room to move: both cover everything
    assert (film == 1.0).all()


def test_the_same_seed_makes_the_same_film() -> None:
    pictures = torch.rand(3, 1, 6, 6)
    first, second = (
        moving_digits(pictures, frames=3, size=16, source=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(DataError, match="no pictures to set in motion"):
        moving_digits(torch.zeros(0, 1, 4, 4), frames=2, size=8)


def test_sharpness_of_a_ramp_is_its_slope_and_of_blur_is_less() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8) * 0.3
    assert sharpness(ramp).item() == pytest.approx(0.3)
    noise = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert sharpness(torch.nn.functional.avg_pool2d(noise, 3, 1)) < 0.5 * sharpness(noise)


@pytest.mark.parametrize("settings", [TINY, AGAINST], ids=["mse", "adversary"])
def test_error_falls(settings: NextFrameConfig) -> None:
    faster = dataclasses.replace(settings, lr=3e-3)
    learner = build(faster)
    first, last = train(learner, 1), train(learner, 40)
    assert last["mse"] < 0.7 * first["mse"]
    assert ("d_loss" in last) == bool(settings.adversary_weight)


def test_the_adversary_learns_only_where_it_has_a_weight() -> None:
    for settings, moves in ((TINY, False), (AGAINST, True)):
        learner = build(settings)
        before = [p.clone() for p in learner.adversary.parameters()]
        train(learner, 1)
        changed = any(
            not torch.equal(a, b) for a, b in zip(before, learner.adversary.parameters(), strict=True)
        )
        assert changed == moves


def test_resuming_equals_not_stopping_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = build(AGAINST), build(AGAINST), build(AGAINST)
    train(whole, 5)
    train(first, 3)
    checkpoint.save(tmp_path / "c", first.state_dict(), {})
    second.load_state_dict(checkpoint.load(tmp_path / "c")[0])
    train(second, 2)
    assert checkpoint.weights_digest(second.state_dict()) == checkpoint.weights_digest(whole.state_dict())


def test_a_checkpoint_of_another_network_is_one_line() -> None:
    other = build(dataclasses.replace(TINY, net=dataclasses.replace(TINY.net, width=TINY.net.width * 2)))
    with pytest.raises(CheckpointError, match="the checkpoint is of another painter of frames: ") as caught:
        build(TINY).load_state_dict(other.state_dict())
    assert "\n" not in str(caught.value)


def test_held_out_figures_are_the_same_every_time() -> None:
    learner = build(TINY)
    first, second = (learner.validate([Rows(), Rows(3)]) for _ in range(2))
    assert first == second
    assert set(first) == {"mse", "sharpness"}
    assert learner.preview(Rows())["next_frame"].shape == (6 * 34 - 2, 3 * 34 - 2, 3)


def test_judged_frames_move_alike_for_every_network_and_differently_in_each_batch(tmp_path: Path) -> None:
    digits = Rows(8).images.permute(0, 2, 3, 1).numpy()
    folders = []
    for weight in (0.0, 0.1):
        net = TINY.net.build()
        torch.nn.init.constant_(next(net.parameters()), weight)
        folder = tmp_path / f"{weight}"
        bundle.write_nets(
            folder, kind="next_frame", name="n", nets={"next_frame": (TINY.net, net.state_dict())},
            preprocess=Preprocess(size=12, channels=1), provenance={},
        )  # fmt: skip
        folders.append(folder)
    many = digits[[0] * 2 * BATCH]  # one digit, in two batches
    (painted, true), (other, same) = (frames(folder, TINY, many, seed=3) for folder in folders)
    assert painted.shape == true.shape == (2 * BATCH, 32, 32, 1)
    assert (true == same).all()
    assert (painted != other).any()
    assert (true[:BATCH] != true[BATCH:]).any()
    assert (frames(folders[0], TINY, many, seed=4)[1] != true).any()


def test_an_adversary_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reads 5 frames of 64 px but judges 2 \+ 1 of 32 px"):
        NextFrameConfig(net=UNetConfig.tiny(), adversary_weight=0.1)


def test_pictures_that_do_not_fit_the_canvas_are_refused() -> None:
    with pytest.raises(ConfigError, match="grey pictures smaller than the canvas of 32 px, got 32 px"):
        build(TINY, size=32)


def test_a_size_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ConfigError, match="size 36 must be a multiple of 16"):
        UNetConfig(size=36)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_fit_and_survive_json(name: str) -> None:
    learner = PRESETS[name]().base.learner
    assert config.from_dict(LearnerConfig, config.to_dict(learner)) == learner
    assert config.from_dict(NetConfig, config.to_dict(UNetConfig.tiny())) == UNetConfig.tiny()
    build(dataclasses.replace(learner, adversary_weight=0.1))
