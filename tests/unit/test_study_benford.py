"""Soft first digits against hard ones, their gradient, the GAN that is penalised by them, and the study around it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterfake import dist
from counterfake.config import from_dict, to_dict
from counterfake.data import Batch
from counterfake.errors import ConfigError
from counterfake.forensics import benford
from counterfake.learners import LearnerConfig, LearnerContext
from counterfake.learners.gan import GanConfig
from counterfake.learners.soft_benford import (
    FLOOR,
    BenfordGanConfig,
    K,
    SoftBenford,
    SoftBenfordConfig,
    curves,
    measure,
)
from counterfake.loop import TrainJob
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from jobs.study_benford import PRESETS, table, train_job

CPU = torch.device("cpu")
JOB = PRESETS["benford-gan-64"]()


def pictures(count: int = 6, side: int = 64, channels: int = 1) -> Tensor:
    """(N, C, H, W) uint8 with the slope of natural spectra."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None]) + 1 / side
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(count, channels, side, side))) / frequency).real
    return torch.from_numpy(np.clip(128 + 40 * noise / noise.std(), 0, 255).astype(np.uint8))


def scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def hard_counts(pixels: Tensor, config: SoftBenfordConfig) -> np.ndarray:
    """(Q, K, D) as the detector counts them, over all pictures."""
    features = benford.BenfordConfig(qualities=config.qualities, bases=(config.base,))
    planes = pixels.permute(0, 2, 3, 1).numpy()
    return sum(benford._magnitudes(plane, features) for plane in planes) @ benford._digit_table(config.base)


@pytest.mark.parametrize("base", [10, 20])
def test_at_temperature_zero_digits_are_counted_as_the_detector_does(base: int) -> None:
    config = SoftBenfordConfig(temperature=1e-5, base=base)
    found = SoftBenford(config, CPU).counts(scaled(pictures()))
    assert np.abs(found.numpy() - hard_counts(pictures(), config)).max() < 1e-2


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.05])
def test_every_coefficient_that_is_not_zero_counts_once_at_any_temperature(temperature: float) -> None:
    config = SoftBenfordConfig(temperature=temperature)
    found = SoftBenford(config, CPU).counts(scaled(pictures())).sum(dim=2)
    assert found.numpy() == pytest.approx(hard_counts(pictures(), config).sum(axis=2), rel=1e-4)


def test_the_law_with_a_0_and_m_1_is_benfords() -> None:
    digits = np.arange(1, 10)
    assert curves(((1.0, 0.0, 1.0),), 10).numpy()[0] == pytest.approx(np.log10(1 + 1 / digits), abs=1e-6)


def test_the_measured_law_is_the_fit_to_the_counted_digits() -> None:
    config = SoftBenfordConfig()
    counts = hard_counts(pictures(), config).reshape(-1, 9).astype(np.float64)
    expected = benford.fit(counts / counts.sum(axis=1, keepdims=True), 10)[1]
    found = curves(measure([scaled(pictures()[:4]), scaled(pictures()[4:])], config), 10)
    assert found.numpy() == pytest.approx(expected / expected.sum(axis=1, keepdims=True), abs=1e-4)


def test_the_penalty_is_the_mean_divergence_from_the_law() -> None:
    law = ((1.0, 0.0, 1.0),) * (K * 3)
    config = SoftBenfordConfig(law=law, temperature=1e-5)
    counts = hard_counts(pictures(), config)
    shares = np.maximum(counts / counts.sum(axis=2, keepdims=True), FLOOR)
    expected = (shares * np.log(shares / np.log10(1 + 1 / np.arange(1, 10)))).sum(axis=2).mean()
    assert float(SoftBenford(config, CPU)(scaled(pictures()))) == pytest.approx(expected, rel=1e-3)


def test_following_its_gradient_brings_the_counted_digits_to_the_law() -> None:
    config = SoftBenfordConfig(law=measure([scaled(pictures(24))], SoftBenfordConfig()))
    penalty = SoftBenford(config, CPU)
    torch.manual_seed(0)
    images = (0.02 * torch.randn(3, 1, 64, 64)).requires_grad_()  # flat noise: small digits only
    before, optimizer = float(penalty(images).detach()), torch.optim.Adam([images], lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        penalty(images).backward()
        optimizer.step()
    hard = SoftBenford(dataclasses.replace(config, temperature=1e-5), CPU)
    assert float(hard(images.detach())) < 0.2 * before


# -- the GAN --------------------------------------------------------------------------------------------------------


def batch(step: int = 0) -> Batch:
    unknown = torch.full((6,), -1)
    names = {"fake": unknown, "class_id": unknown, "identity": unknown, "maker": unknown}
    return Batch(images=pictures(), ids=[""] * 6, step=step, epoch=0, **names)


def stepped(config: GanConfig, steps: int = 1) -> Any:
    """A GAN of `config` after some steps, from seeds that are the same for all."""
    dist.seed_build(0)
    context = LearnerContext(batch_size=6, images_per_epoch=6, total_images=60, channels=1, size=64)
    learner = config.build(device=CPU, context=context)
    for step in range(steps):
        dist.seed_step(0, step)
        learner.metrics = learner.step(batch(step))
    return learner


def config(weight: float, *, law: bool = True, **changes: Any) -> BenfordGanConfig:
    found = measure([scaled(pictures())], SoftBenfordConfig()) if law else ()
    return BenfordGanConfig(
        generator=DcganGenerator(size=64, noise_size=8, width=2),
        discriminator=DcganDiscriminator(size=64, width=2),
        benford=SoftBenfordConfig(law=found, weight=weight),
        **changes,
    )


def gradients(learner: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in learner.generator.parameters()])


@pytest.mark.parametrize(
    "changes", [{}, {"alternate": True}, {"loss": "hinge"}], ids=["shared", "alternate", "hinge"]
)
def test_the_penalty_joins_the_generators_gradient_in_proportion_to_its_weight(
    changes: dict[str, Any],
) -> None:
    none, one, three = (stepped(config(weight, **changes)) for weight in (0.0, 1.0, 3.0))
    share = gradients(one) - gradients(none)
    assert share.norm() > 1e-3 * gradients(none).norm()
    assert torch.allclose(
        gradients(three) - gradients(none), 3 * share, rtol=1e-3, atol=1e-5 * float(share.norm())
    )
    assert float(one.metrics["benford"]) > 0
    for name, value in one.discriminator.named_parameters():
        assert torch.equal(value.grad, dict(none.discriminator.named_parameters())[name].grad)


def test_without_a_law_it_is_the_plain_gan_bit_for_bit() -> None:
    penalised = config(1.0, law=False)
    plain = GanConfig(generator=penalised.generator, discriminator=penalised.discriminator)
    one, other = stepped(penalised, 3), stepped(plain, 3)
    for name, value in one.generator.state_dict().items():
        assert torch.equal(value, other.generator.state_dict()[name])
    assert "benford" not in one.metrics


def test_a_gan_with_a_law_survives_being_written_down() -> None:
    settings = config(2.0)
    assert from_dict(LearnerConfig, to_dict(settings)) == settings  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0"),
        ({"law": ((1.0, 0.0, 1.0),)}, "1 rows but 3 qualities need 27"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SoftBenfordConfig(**changes)


def test_small_pictures_are_refused() -> None:
    context = LearnerContext(batch_size=6, images_per_epoch=6, total_images=60, channels=1, size=28)
    with pytest.raises(ConfigError, match="64 px or more, got 28"):
        BenfordGanConfig().build(device=CPU, context=context)


# -- the study ------------------------------------------------------------------------------------------------------


def test_a_run_has_the_weight_and_the_seed_of_its_cell() -> None:
    law = ((1.0, 0.0, 1.0),) * (K * 3)
    plain, penalised = (train_job(JOB, weight, 2, law) for weight in (0.0, 1.0))
    assert (plain.learner.benford.law, penalised.learner.benford.law) == ((), law)  # type: ignore[attr-defined]
    assert penalised.learner.benford.weight == 1.0  # type: ignore[attr-defined]
    assert (penalised.loop.seed, penalised.name) == (2, "benford-gan-64-w1-seed2")
    assert from_dict(TrainJob, to_dict(penalised)) == penalised


def test_the_table_has_the_fall_against_the_gan_of_the_same_seed() -> None:
    auc = {(0.0, 0): 0.9, (0.0, 1): 0.8, (1.0, 0): 0.7, (1.0, 1): 0.7}
    rows = [
        {"weight": w, "seed": s, "divergence": 0.1, "auc": value, "retrained": 0.9}
        for (w, s), value in auc.items()
    ]
    plain, penalised = table(rows)
    assert (plain["AUC"], plain["fall"]) == (pytest.approx(0.85), 0.0)
    assert (penalised["fall"], penalised["seeds"]) == (pytest.approx(0.15), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0, 2.0)}, "needs weight 0"),
        ({"test_split": "train"}, "must not be a split that the GAN sees"),
        (
            {"base": dataclasses.replace(JOB.base, learner=GanConfig())},
            "must be a BenfordGanConfig, got GanConfig",
        ),
    ],
)
def test_a_study_that_cannot_answer_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(JOB, **changes)
