"""The adversarial step against autograd, and resuming against never stopping."""

from __future__ import annotations

import copy
import multiprocessing
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterfake import checkpoint, dist
from counterfake.errors import CheckpointError, ConfigError, DataError
from counterfake.learners import LearnerConfig, LearnerContext
from counterfake.learners.diffaugment import AdaConfig, DiffAugment
from counterfake.learners.gan import Gan, GanConfig, standing_statistics, symptoms
from counterfake.learners.gan_losses import discriminator_loss, generator_loss
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.nets.dense_gan import DenseDiscriminator, DenseGenerator
from counterfake.nets.sngan import SnganDiscriminator, SnganGenerator
from jobs.train_gan import PRESETS

TINY = GanConfig(generator=DcganGenerator.tiny(), discriminator=DcganDiscriminator.tiny())
ROWS = 8


class Rows:
    """What a learner needs of a data.Batch."""

    def __init__(self, seed: int, rows: int = ROWS) -> None:
        source = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (rows, 1, 28, 28), dtype=torch.uint8, generator=source)
        self.class_id = torch.arange(rows) % 3

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
    [
        TINY,
        with_(TINY, ema_halflife_images=100),
        with_(TINY, d_steps=2, loss="hinge"),
        with_(TINY, alternate=True, r1_gamma=1.0, r1_every=2, ada=AdaConfig(interval=3, speed_kimg=0.1)),
        with_(TINY, loss="wasserstein", gp_weight=10.0, lr_decay="linear", augment=DiffAugment.paper()),
        GanConfig(
            generator=SnganGenerator(size=28, channels=1, noise_size=8, width=2, classes=3),
            discriminator=SnganDiscriminator(size=28, channels=1, width=2, classes=3),
            loss="hinge",
        ),
    ],
    ids=["article", "average", "two-d-steps", "r1-ada", "gp-decay", "classes"],
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
    own = standing_statistics(copy.deepcopy(learner.generator).eval(), TINY.standing_batches)
    torch.testing.assert_close(copied(noise), own(noise), rtol=1e-5, atol=1e-6)
    running = with_(TINY, standing_batches=0)
    kept = build(running)
    kept.load_state_dict(learner.state_dict())
    net, weights = kept.export()["generator"]
    torch.testing.assert_close(
        weights["dense_norm.running_var"], learner.generator.dense_norm.running_var, rtol=0, atol=0
    )


def test_standing_statistics_draw_what_training_mode_draws() -> None:
    """Running variances start from 1; after few steps evaluation mode draws something else than training mode."""
    generator = DcganGenerator(width=4, noise_size=16).build()
    noise = torch.randn(512, 16)
    with torch.no_grad():
        generator(noise)  # one step of training
        trained = generator(noise)
        lagging = copy.deepcopy(generator).eval()(noise)
        standing = standing_statistics(copy.deepcopy(generator).eval(), batches=16)(noise)
    assert (lagging - trained).abs().mean() > 5 * (standing - trained).abs().mean()
    assert standing.std() == pytest.approx(trained.std().item(), rel=0.05)


def test_standing_statistics_leave_momentum_and_mode_alone() -> None:
    generator = DcganGenerator.tiny().build().eval()
    standing_statistics(generator, batches=2)
    assert generator.dense_norm.momentum == 0.01
    assert not any(module.training for module in generator.modules())


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
    job = PRESETS["dcgan-mnist-s4"]()
    learner = job.learner
    assert isinstance(learner, GanConfig)
    assert (job.data.batch_size, job.data.drop_last, job.loop.epochs) == (256, False, 50)
    assert (learner.g_lr, learner.d_lr, learner.adam_eps) == (1e-4, 1e-4, 1e-7)
    assert (learner.g_betas, learner.d_betas) == ((0.9, 0.999), (0.9, 0.999))
    assert (learner.loss, learner.d_steps, learner.ema_halflife_images) == ("non_saturating", 1, 0)
    assert (job.loop.tick_steps, job.loop.checkpoint_every_ticks) == (0, 5)  # a tick is an epoch
    assert job.loop.keep_checkpoints == 50 // 5  # the article deletes none
    # the one known difference: Keras shows and saves the generator with the running statistics of training
    assert learner.standing_batches == 8
    assert job.loop.total_steps(steps_per_epoch=235, batch_size=256) == 50 * 235


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_data_of_each_preset_fits_its_networks(name: str) -> None:
    job = PRESETS[name]()
    generator, preprocess = job.learner.generator, job.data.preprocess
    assert (generator.size, generator.channels) == (preprocess.size, preprocess.channels)
    assert job.name == name


def test_rates_fall_to_nothing_at_the_end_of_the_run() -> None:
    learner = build(with_(TINY, lr_decay="linear", g_lr=1e-3), total_images=4 * ROWS)
    rates = []
    for _ in range(4):
        train(learner, 1)
        rates.append(learner.g_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_lazy_penalty_comes_every_so_many_steps_and_counts_as_many_times() -> None:
    learner = build(with_(TINY, r1_gamma=2.0, r1_every=3))
    found = []
    for step in range(4):
        dist.seed_step(0, step)
        found.append("r1" in learner.step(Rows(step)))
    assert found == [True, False, False, True]
    always, lazy = (build(with_(TINY, r1_gamma=2.0, r1_every=every)) for every in (1, 5))
    once, often = train(always, 1)["r1"], train(lazy, 1)["r1"]
    torch.testing.assert_close(often, 5 * once)


@pytest.mark.parametrize("alternate", [False, True])
def test_alternating_players_meet_new_fakes(alternate: bool) -> None:
    learner = build(with_(TINY, alternate=alternate))
    drawn: list[Tensor] = []
    learner.generator.register_forward_hook(lambda _, inputs, __: drawn.append(inputs[0]))
    train(learner, 1)
    assert len(drawn) == 1 + alternate
    assert not alternate or not torch.equal(*drawn)


CONDITIONAL = {
    "dcgan-projection": (DcganGenerator, DcganDiscriminator, {}, {}),
    "dcgan-map": (DcganGenerator, DcganDiscriminator, {}, {"judge": "map"}),
    "dense": (DenseGenerator, DenseDiscriminator, {}, {}),
    "sngan": (SnganGenerator, SnganDiscriminator, {}, {}),
    "sngan-embedding": (SnganGenerator, SnganDiscriminator, {"embedding": 12}, {"embedding": 12}),
    "dcgan-embedding": (DcganGenerator, DcganDiscriminator, {"embedding": 12}, {"embedding": 12}),
}


def conditional(name: str, **changes: Any) -> GanConfig:
    makes, reads, told, judged = CONDITIONAL[name]
    generator = with_(makes.tiny(), classes=3, **told)
    discriminator = with_(reads.tiny(), classes=3, **judged)
    return GanConfig(generator=generator, discriminator=discriminator, **changes)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_players_train_and_draw_what_they_are_told(name: str) -> None:
    learner = build(conditional(name, g_lr=1e-2))
    train(learner, 3)
    net, weights = learner.export()["generator"]
    made = net.build().eval()
    made.load_state_dict(weights)
    noise = torch.randn(1, 8).expand(3, 8)
    pictures = made(noise, torch.arange(3))
    assert made.classes == 3
    assert not torch.allclose(pictures[0], pictures[1])
    assert learner.preview(Rows(0))["samples"].shape == (4 * 28 + 6, 3 * 28 + 4, 3)  # a column for each class


def test_classes_and_their_vectors_draw_alike(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
    np.save(tmp_path / "words.npy", table)
    learner = build(conditional("dcgan-embedding", embeddings=str(tmp_path / "words.npy")))
    noise, made = torch.randn(3, 8), learner.generator.eval()
    torch.testing.assert_close(made(noise, torch.arange(3)), made(noise, torch.from_numpy(table)))


def test_embeddings_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "words.npy", np.zeros((3, 5), np.float32))
    with pytest.raises(ConfigError, match=r"has shape \(3, 5\), the networks need \(3, 12\)"):
        build(conditional("dcgan-embedding", embeddings=str(tmp_path / "words.npy")))


def test_data_without_classes_is_refused() -> None:
    batch = Rows(0)
    batch.class_id = torch.full((ROWS,), -1)
    with pytest.raises(DataError, match="8 of 8 pictures have no class"):
        build(conditional("sngan")).step(batch)


@pytest.mark.parametrize("name", ["sngan", "dcgan-embedding"])
def test_a_class_missing_in_a_later_batch_is_refused_too(name: str) -> None:
    """An embedding of class -1 would be that of the last class, without a word."""
    learner, batch = build(conditional(name)), Rows(1)
    learner.step(Rows(0))
    batch.class_id[5] = -1
    with pytest.raises(DataError, match="1 of 8 pictures have no class"):
        learner.step(batch)


def test_more_classes_than_the_networks_know_are_refused() -> None:
    batch = Rows(0)
    batch.class_id = torch.arange(ROWS)
    with pytest.raises(DataError, match="the data has class 7 but the networks know 0 to 2"):
        build(conditional("sngan")).step(batch)


def test_players_told_of_different_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="generator knows 3 classes"):
        GanConfig(generator=with_(DcganGenerator.tiny(), classes=3), discriminator=DcganDiscriminator.tiny())


def test_a_checkpoint_of_other_networks_is_refused() -> None:
    wide = build(with_(TINY, generator=DcganGenerator(noise_size=8, width=4)))
    with pytest.raises(CheckpointError, match="the checkpoint is of another generator: 16 of 19"):
        build().load_state_dict(wide.state_dict())


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"d_won": 0.9, "g_flat": 0.0}, "the discriminator was right about every picture in 90%"),
        ({"d_won": 0.0, "g_flat": 1.0, "g_sample_std": 0.001}, r"nearly all the same \(spread 0.001\)"),
    ],
)
def test_collapse_is_said(metrics: dict[str, float], said: str) -> None:
    (note,) = symptoms(metrics)
    assert re.search(said, note)
    assert symptoms({"d_won": 0.1, "g_flat": 0.0}) == []


def test_a_generator_that_draws_one_picture_is_measured_flat() -> None:
    learner = build()
    assert train(learner, 1)["g_flat"] == 0
    torch.nn.init.zeros_(learner.generator.convs[-1].weight)
    assert train(learner, 1)["g_flat"] == 1


def test_a_discriminator_that_knows_everything_is_measured() -> None:
    learner = build(with_(TINY, d_lr=0.0, discriminator=DcganDiscriminator(width=2, dropout=0.0)))
    learner.discriminator.register_forward_hook(
        lambda _, __, out: out * 0 + torch.cat([torch.ones(ROWS), -torch.ones(ROWS)])
    )
    assert train(learner, 1)["d_won"] == 1


# -- two workers ----------------------------------------------------------------------------------------------------

PARITY = {
    "non-saturating": {},
    "r1": {"r1_gamma": 1.0, "r1_every": 1},
    "wgan-gp": {"loss": "wasserstein", "gp_weight": 10.0},
    "alternate-hinge": {"loss": "hinge", "alternate": True},
}


class _GivenNoise(Gan):
    """A GAN that draws this rank's share of noise that is the same for any number of ranks."""

    def _noise(self, rows: int, source: torch.Generator | None = None) -> Tensor:
        return self._share(torch.randn, rows, 8)

    def _mix(self, rows: int) -> Tensor:
        return self._share(torch.rand, rows)

    def _share(self, draw: Any, rows: int, *shape: int) -> Tensor:
        source = torch.Generator().manual_seed(self.steps)
        everything = draw(rows * dist.world_size(), *shape, generator=source)
        return everything[dist.rank() * rows : (dist.rank() + 1) * rows]


def _gradients_of_a_global_batch(changes: dict[str, Any]) -> list[Tensor]:
    """Both players' after one step on 8 rows, over all ranks; no batch norm, no dropout: rows never mix."""
    config = GanConfig(
        generator=DenseGenerator.tiny(),
        discriminator=DenseDiscriminator(widths=(16,), dropout=0.0),
        **changes,
    )
    dist.seed_build(0)
    rows = ROWS // dist.world_size()
    context = LearnerContext(batch_size=rows, images_per_epoch=64, total_images=640, channels=1, size=28)
    learner = _GivenNoise(config, torch.device("cpu"), context)
    batch = Rows(0)
    batch.images = batch.images[dist.rank() * rows : (dist.rank() + 1) * rows]
    learner.step(batch)
    assert learner.images == ROWS
    players = (dist.unwrap(learner.generator), dist.unwrap(learner.discriminator))
    return [parameter.grad for player in players for parameter in player.parameters()]


def _weights_after_own_pictures(rank: int) -> str:
    """Digest of what all ranks must share after four steps on other pictures and noise: weights, ADA's probability."""
    config = GanConfig(
        generator=with_(SnganGenerator.tiny(), classes=3),
        discriminator=with_(SnganDiscriminator.tiny(), classes=3),
        loss="hinge",
        d_steps=2,
        alternate=True,
        r1_gamma=1.0,
        r1_every=2,
        ada=AdaConfig(interval=2, speed_kimg=0.1),
    )
    learner = build(config)
    for step in range(4):
        dist.seed_step(0, step)
        learner.step(Rows(10 * step + rank))
    players = (dist.unwrap(learner.generator), dist.unwrap(learner.discriminator))
    shared = {str(i): dict(player.named_parameters()) for i, player in enumerate(players)}
    assert learner.ada is not None
    return checkpoint.weights_digest({**shared, "ada": learner.ada.probability})


def _rank_of_two(rank: int, port_file: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    gradients = {name: _gradients_of_a_global_batch(changes) for name, changes in PARITY.items()}
    found = {name: [value.tolist() for value in values] for name, values in gradients.items()}
    results.put((rank, found, _weights_after_own_pictures(rank)))
    torch.distributed.destroy_process_group()


def test_two_workers_have_the_gradients_of_one_and_stay_together(tmp_path: Path) -> None:
    """Each gradient within 1e-5 of its largest entry: sums are taken in another order, nothing else. And with networks that
    have batch norm, where one worker and two cannot agree, both workers hold the same weights, bit for bit."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank_of_two, args=(r, str(tmp_path / "meet"), results)) for r in (0, 1)]
    for process in ranks:
        process.start()
    answers = [results.get(timeout=240) for _ in ranks]
    for process in ranks:
        process.join(30)
    found = {rank: gradients for rank, gradients, _ in answers}
    assert found[0] == found[1]
    assert answers[0][2] == answers[1][2]
    for name, changes in PARITY.items():
        for two, one in zip(found[0][name], _gradients_of_a_global_batch(changes), strict=True):
            assert (torch.tensor(two) - one).abs().max() <= 1e-5 * one.abs().max(), name
