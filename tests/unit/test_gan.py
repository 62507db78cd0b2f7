"""The adversarial step against autograd, and resuming against never stopping."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterfake import checkpoint, dist
from counterfake.errors import ConfigError
from counterfake.learners import LearnerConfig, LearnerContext
from counterfake.learners.gan import Gan, GanConfig, discriminator_loss, generator_loss
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator

TINY = GanConfig(generator=DcganGenerator.tiny(), discriminator=DcganDiscriminator.tiny())
ROWS = 8


class Rows:
    """What a learner needs of a data.Batch."""

    def __init__(self, seed: int, rows: int = ROWS) -> None:
        source = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (rows, 1, 28, 28), dtype=torch.uint8, generator=source)

    def __len__(self) -> int:
        return len(self.images)


def build(config: GanConfig = TINY, **context: Any) -> Gan:
    dist.seed_build(0)
    settings = {
        "batch_size": ROWS,
        "images_per_epoch": 64,
        "total_images": 640,
        "channels": 1,
        "size": 28,
        **context,
    }
    return config.build(device=torch.device("cpu"), context=LearnerContext(**settings))


def train(learner: Gan, steps: int) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    for step in range(learner.steps, learner.steps + steps):
        dist.seed_step(0, step)
        metrics = learner.step(Rows(step))
    return metrics


def with_(config: GanConfig, **changes: Any) -> GanConfig:
    import dataclasses

    return dataclasses.replace(config, **changes)


def gradients(learner: Gan, real: Tensor, noise: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(G's, D's) by autograd, written down from the definition."""
    fake = learner.generator(noise)
    real_logits, fake_logits = learner.discriminator(torch.cat([real, fake])).split([len(real), len(fake)])
    d_loss = discriminator_loss(learner.config.loss, real_logits, fake_logits)
    g_loss = generator_loss(learner.config.loss, fake_logits)
    g = torch.autograd.grad(g_loss, list(learner.generator.parameters()), retain_graph=True)
    d = torch.autograd.grad(d_loss, list(learner.discriminator.parameters()))
    return list(g), list(d)


@pytest.mark.parametrize("loss", ["non_saturating", "minimax", "lsgan", "hinge"])
def test_both_gradients_are_those_of_autograd(loss: Any) -> None:
    no_dropout = with_(TINY, loss=loss, discriminator=DcganDiscriminator(width=2, dropout=0.0))
    learner = build(no_dropout)
    train(learner, 3)
    reference = copy.deepcopy(learner)
    batch = Rows(99)
    dist.seed_step(0, 99)
    real, noise = batch.images.float() / 127.5 - 1, reference._noise(ROWS)
    g, d = gradients(reference, real, noise)
    dist.seed_step(0, 99)
    learner.step(batch)
    for found, expected in zip(learner.generator.parameters(), g, strict=True):
        torch.testing.assert_close(found.grad, expected, rtol=2e-4, atol=1e-6)
    for found, expected in zip(learner.discriminator.parameters(), d, strict=True):
        torch.testing.assert_close(found.grad, expected, rtol=2e-4, atol=1e-6)


def test_one_pass_and_two_passes_train_alike() -> None:
    config = with_(TINY, discriminator=DcganDiscriminator(width=2, dropout=0.0))
    one, two = build(config), build(config)
    two._shared = False
    assert one._shared
    train(one, 5), train(two, 5)
    for a, b in zip(one.generator.parameters(), two.generator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_losses_are_those_of_the_definitions() -> None:
    real, fake = torch.randn(6), torch.randn(4)
    ones, zeros = torch.ones_like, torch.zeros_like
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        discriminator_loss("non_saturating", real, fake), bce(real, ones(real)) + bce(fake, zeros(fake))
    )
    torch.testing.assert_close(generator_loss("non_saturating", fake), bce(fake, ones(fake)))
    torch.testing.assert_close(generator_loss("minimax", fake), torch.log(1 - torch.sigmoid(fake)).mean())


@pytest.mark.parametrize(
    ("d_steps", "updated"),
    [(1, [True, True, True, True]), (2, [False, True, False, True]), (3, [False, False, True, False])],
)
def test_generator_is_updated_every_d_steps(d_steps: int, updated: list[bool]) -> None:
    learner = build(with_(TINY, d_steps=d_steps))
    found = []
    for step in range(4):
        before = [p.clone() for p in learner.generator.parameters()]
        judge = [p.clone() for p in learner.discriminator.parameters()]
        dist.seed_step(0, step)
        metrics = learner.step(Rows(step))
        found.append(
            any(not torch.equal(a, b) for a, b in zip(before, learner.generator.parameters(), strict=True))
        )
        assert ("g_loss" in metrics) == found[-1]
        assert any(
            not torch.equal(a, b) for a, b in zip(judge, learner.discriminator.parameters(), strict=True)
        )
    assert found == updated


def test_a_smaller_last_batch_still_meets_a_full_batch_of_fakes() -> None:
    learner = build()
    seen: list[int] = []
    learner.discriminator.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    learner.step(Rows(0, rows=3))
    assert seen == [3 + ROWS]
    assert learner.images == 3


@pytest.mark.parametrize(
    "config",
    [TINY, with_(TINY, ema_halflife_images=100), with_(TINY, d_steps=2, loss="hinge")],
    ids=["article", "average", "two-d-steps"],
)
def test_resuming_equals_not_stopping_bit_for_bit(tmp_path: Path, config: GanConfig) -> None:
    whole = build(config)
    train(whole, 7)
    first = build(config)
    train(first, 4)
    checkpoint.save(tmp_path / "c", first.state_dict(), {})
    second = build(config)
    second.load_state_dict(checkpoint.load(tmp_path / "c")[0])
    train(second, 3)
    assert checkpoint.weights_digest(second.state_dict()) == checkpoint.weights_digest(whole.state_dict())
    assert (second.steps, second.images) == (7, 7 * ROWS)


def test_the_average_follows_the_generator() -> None:
    learner = build(with_(TINY, ema_halflife_images=10**9, ema_rampup=10**9))
    start = copy.deepcopy(learner.average)
    train(learner, 3)
    assert learner.average is not None
    assert start is not None
    moved = [
        (a - b).abs().max() for a, b in zip(start.parameters(), learner.average.parameters(), strict=True)
    ]
    assert max(moved) < 1e-6  # a half-life of 10^9 images hardly moves
    followed = build(with_(TINY, ema_halflife_images=1))
    train(followed, 3)
    for a, b in zip(followed.average.parameters(), followed.generator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # 8 half-lives per step


def test_preview_is_the_same_noise_every_time_and_changes_nothing() -> None:
    learner = build()
    train(learner, 1)
    before = checkpoint.weights_digest(learner.state_dict())
    first, second = (learner.preview(Rows(0))["samples"] for _ in range(2))
    assert first.shape == (4 * 28 + 3 * 2, 4 * 28 + 3 * 2, 3)
    assert (first == second).all()
    assert checkpoint.weights_digest(learner.state_dict()) == before
    assert learner.generator.training


def test_export_builds_the_same_generator() -> None:
    learner = build()
    train(learner, 2)
    net, weights = learner.export()["generator"]
    copied = net.build().eval()
    copied.load_state_dict(weights)
    noise = torch.randn(3, 8)
    torch.testing.assert_close(copied(noise), learner.generator.eval()(noise), rtol=1e-5, atol=1e-6)


def test_bf16_learns_the_same_direction() -> None:
    exact, rounded = build(), build(precision="bf16")
    a, b = train(exact, 3), train(rounded, 3)
    assert b["d_loss"].dtype == torch.float32
    assert abs(a["d_loss"] - b["d_loss"]) < 0.05


def test_discriminator_learns_within_thirty_steps() -> None:
    learner = build(with_(TINY, d_lr=2e-3))
    first, last = train(learner, 1), train(learner, 30)
    assert last["d_loss"] < first["d_loss"]


def test_players_of_different_sizes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="generator makes 64 px pictures of 3 channels but the discriminator reads 28 px"
    ):
        GanConfig(generator=DcganGenerator(size=64, channels=3))


def test_data_of_another_size_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="the data gives 32 px pictures of 3 channels but the generator makes 28 px"
    ):
        build(size=32, channels=3)


def test_the_config_is_found_by_its_kind() -> None:
    from counterfake.config import from_dict, to_dict

    assert from_dict(LearnerConfig, to_dict(TINY)) == TINY


def test_the_s4_preset_is_the_articles_recipe() -> None:
    from jobs.train_gan import PRESETS

    job = PRESETS["dcgan-mnist-s4"]()
    learner = job.learner
    assert isinstance(learner, GanConfig)
    assert (job.data.batch_size, job.data.drop_last, job.loop.epochs) == (256, False, 50)
    assert (learner.g_lr, learner.d_lr, learner.adam_eps) == (1e-4, 1e-4, 1e-7)
    assert (learner.g_betas, learner.d_betas) == ((0.9, 0.999), (0.9, 0.999))
    assert (learner.loss, learner.d_steps, learner.ema_halflife_images) == ("non_saturating", 1, 0)
    assert (job.loop.tick_steps, job.loop.checkpoint_every_ticks) == (0, 5)  # a tick is an epoch
    assert job.loop.total_steps(steps_per_epoch=235, batch_size=256) == 50 * 235


@pytest.mark.parametrize(
    "name", ["dcgan-mnist-s4", "dcgan-mnist-smoke", "dcgan-faces-64", "dcgan-faces-demo"]
)
def test_the_data_of_each_preset_fits_its_networks(name: str) -> None:
    from jobs.train_gan import PRESETS

    job = PRESETS[name]()
    generator, preprocess = job.learner.generator, job.data.preprocess
    assert (generator.size, generator.channels) == (preprocess.size, preprocess.channels)
