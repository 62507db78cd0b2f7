"""The plan of a study: which runs, how long, and what its tables say."""

from __future__ import annotations

import dataclasses

import pytest

from counterfake.errors import ConfigError
from counterfake.learners.detector import DetectorConfig
from counterfake.learners.gan import GanConfig
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from jobs.study_gan import PRESETS, Cell, cells, table, train_job, updates

JOB = PRESETS["gan-minimax-k"]()


def test_every_setting_is_run_under_both_budgets() -> None:
    plan = list(cells(JOB))
    assert len(plan) == len(set(plan)) == 2 * 2 * 3 * 3
    assert {cell.k for cell in plan} == {1, 2, 5}


@pytest.mark.parametrize(("k", "expected"), [(1, 5000), (2, 3000), (5, 1364)])
def test_equal_work_means_equally_many_pictures_through_the_discriminator(k: int, expected: int) -> None:
    equal = updates(JOB, Cell("equal work", "minimax", k, 0))
    assert equal == expected
    assert equal * (2 * k + 1) == pytest.approx(3 * 5000, rel=1e-3)
    assert updates(JOB, Cell("equal generator updates", "minimax", k, 0)) == 5000


def test_a_run_has_the_settings_of_its_cell() -> None:
    job = train_job(JOB, Cell("equal generator updates", "non_saturating", 5, 2))
    assert isinstance(job.learner, GanConfig)
    assert (job.learner.loss, job.learner.d_steps, job.learner.alternate) == ("non_saturating", 5, True)
    assert (job.loop.steps, job.loop.seed) == (25_000, 2)  # a step is an update of D
    assert job.name == "gan-minimax-k-non-saturating-k5"


def test_with_one_step_both_budgets_are_the_same_run() -> None:
    one, other = (
        train_job(JOB, Cell(budget, "minimax", 1, 0)) for budget in ("equal generator updates", "equal work")
    )
    assert one == other


def test_the_dcgan_of_the_articles_is_studied_too() -> None:
    job = train_job(PRESETS["gan-minimax-k-dcgan"](), Cell("equal work", "minimax", 2, 0))
    assert isinstance(job.learner, GanConfig)
    assert (job.learner.generator, job.learner.discriminator) == (DcganGenerator(), DcganDiscriminator())
    assert (job.name, job.data.batch_size) == ("gan-minimax-k-dcgan-minimax-k2", 256)


def test_a_table_has_means_over_seeds() -> None:
    rows = [
        {
            **Cell("equal work", "minimax", k, seed)._asdict(),
            "fid": 10.0 * k + seed,
            "generator_updates": 100,
            "pictures_through_d": 2_000_000,
            "mean_confidence": 0.5,
            "classes_found": 10,
        }
        for k in (1, 2)
        for seed in (0, 2)
    ]
    first, second = table(rows, "equal work")
    assert (first["k"], first["FID"], first["FID, deviation"], first["seeds"]) == (
        1,
        11.0,
        pytest.approx(2**0.5),
        2,
    )
    assert (second["FID"], second["work, million pictures"]) == (21.0, 2.0)


def test_a_study_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"base\.learner must be a GanConfig, got DetectorConfig"):
        dataclasses.replace(JOB, base=dataclasses.replace(JOB.base, learner=DetectorConfig()))
    told = GanConfig(generator=DcganGenerator(classes=10), discriminator=DcganDiscriminator(classes=10))
    with pytest.raises(
        ConfigError, match=r"told one of 10 classes; set classes=0 in base\.learner\.generator"
    ):
        dataclasses.replace(JOB, base=dataclasses.replace(JOB.base, learner=told))
    with pytest.raises(ConfigError, match="d_steps of 1 or more"):
        dataclasses.replace(JOB, d_steps=(0,))
