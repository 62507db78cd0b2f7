"""Distances between feature sets against closed forms, scipy and definitions written as loops."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import generation
from counterfake.evaluation.generation import GenerationReport, Moments, Protocol


def normal(rows: int, width: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)) * scale + shift


def covariance(width: int, seed: int, rank: int | None = None) -> np.ndarray:
    factor = normal(width, rank or width, seed)
    return factor @ factor.T / width


# -- Fréchet distance -----------------------------------------------------------------------------------------------


def test_moments_are_numpys() -> None:
    rows = normal(50, 7, shift=1e6)
    found = generation.moments(rows)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12)


def test_gaussians_with_diagonal_covariances_have_a_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 2.0])
    means = np.array([0.0, 1.0, 2.0]), np.array([3.0, 1.0, -2.0])
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = generation.frechet_distance(Moments(9, means[0], np.diag(a)), Moments(9, means[1], np.diag(b)))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("rank_a", "rank_b"), [(16, 16), (16, 5), (5, 5)], ids=["full", "one low", "both low"]
)
def test_the_distance_is_that_of_scipys_matrix_square_root(rank_a: int, rank_b: int) -> None:
    from scipy.linalg import sqrtm

    a, b = covariance(16, 1, rank_a), covariance(16, 2, rank_b)
    mean = normal(2, 16, 3)
    expected = ((mean[0] - mean[1]) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    found = generation.frechet_distance(Moments(99, mean[0], a), Moments(99, mean[1], b))
    # scipy loses half the digits where the product is singular
    assert found == pytest.approx(expected, rel=1e-10 if rank_a == rank_b == 16 else 1e-5)


def test_a_set_is_at_no_distance_from_itself_even_with_fewer_rows_than_features() -> None:
    found = generation.moments(normal(10, 64))
    assert generation.frechet_distance(found, found) == pytest.approx(0, abs=1e-9)


def test_the_distance_is_symmetric_and_unmoved_by_rotation() -> None:
    a, b = normal(200, 8, 1), normal(200, 8, 2, scale=1.5, shift=0.3)
    turn, _ = np.linalg.qr(normal(8, 8, 3))
    forth = generation.frechet_distance(generation.moments(a), generation.moments(b))
    back = generation.frechet_distance(generation.moments(b), generation.moments(a))
    turned = generation.frechet_distance(generation.moments(a @ turn), generation.moments(b @ turn))
    assert forth == pytest.approx(back, rel=1e-10)
    assert forth == pytest.approx(turned, rel=1e-10)


# -- kernel distance, inception score -------------------------------------------------------------------------------


def test_squared_mmd_is_the_sum_over_pairs_of_its_definition() -> None:
    x, y = normal(6, 3, 1), normal(5, 3, 2)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within_x = np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])
    within_y = np.mean([kernel(a, b) for a, b in itertools.permutations(y, 2)])
    between = np.mean([kernel(a, b) for a, b in itertools.product(x, y)])
    assert generation.squared_mmd(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_the_kernel_distance_of_one_number_is_that_of_its_moments() -> None:
    """(x y + 1)³ sums over moments: MMD² = Σ C(3, j) (E x^j - E y^j)²."""
    real, fake = normal(20_000, 1, 1), normal(20_000, 1, 2, scale=1.2, shift=0.5)
    m = [np.mean(real**j) - np.mean(fake**j) for j in range(4)]
    expected = 3 * m[1] ** 2 + 3 * m[2] ** 2 + m[3] ** 2
    found = generation.kernel_distance(real, fake, subsets=50, size=1000)
    assert found["value"] == pytest.approx(expected, abs=3 * found["std"] / np.sqrt(50))


def test_equal_distributions_have_a_kernel_distance_around_zero() -> None:
    found = generation.kernel_distance(normal(2000, 8, 1), normal(2000, 8, 2), subsets=40, size=500)
    assert abs(found["value"]) < 3 * found["std"]


@pytest.mark.parametrize(
    ("rows", "expected"), [(np.eye(5), 5.0), (np.full((5, 5), 0.2), 1.0)], ids=["sure", "blank"]
)
def test_the_inception_score_has_its_two_ends(rows: np.ndarray, expected: float) -> None:
    found = generation.inception_score(np.tile(rows, (20, 1)), splits=4)
    assert found["value"] == pytest.approx(expected, rel=1e-12)


def test_labels_are_counted() -> None:
    rows = np.eye(4)[[0, 0, 1, 2]] * 0.8 + 0.05
    found = generation.label_figures(rows)
    assert (found["classes_found"], found["classes"]) == (3, 4)
    assert found["mean_confidence"] == pytest.approx(0.85)
    asked = generation.asked_accuracy(rows, [0, 1, 1, 3])
    assert asked == {"value": 0.5, "by_class": {"0": 1.0, "1": 0.5, "3": 0.0}}


# -- neighbours -----------------------------------------------------------------------------------------------------


def test_fid_kid_and_inception_score_are_torchmetrics() -> None:
    """Made features in double precision; torchmetrics reads them through a network that changes nothing."""
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    rng = np.random.default_rng(5)
    real, fake = rng.normal(0, 1, (90, 12)), rng.normal(0.3, 1.4, (70, 12)) @ rng.normal(0, 0.5, (12, 12))
    same = torch.nn.Identity()
    same.num_features = 12  # type: ignore[assignment]
    fid = FrechetInceptionDistance(feature=same).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=same, subsets=2, subset_size=70)  # both are all rows
    for metric, pictures in ((fid, real), (kid, real[:70])):
        metric.update(torch.from_numpy(pictures), real=True)
        metric.update(torch.from_numpy(fake), real=False)
    ours = generation.frechet_distance(generation.moments(real), generation.moments(fake))
    assert ours == pytest.approx(float(fid.compute()), rel=1e-9)
    assert generation.squared_mmd(real[:70], fake) == pytest.approx(float(kid.compute()[0]), rel=1e-9)
    score = InceptionScore(feature=same, splits=1)
    score.update(torch.from_numpy(fake))
    probabilities = torch.from_numpy(fake).softmax(dim=1)
    assert generation.inception_score(probabilities, splits=1)["value"] == pytest.approx(
        float(score.compute()[0]), rel=1e-9
    )


def test_distances_are_those_of_subtraction_far_from_the_origin_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "CHUNK", 4)
    a, b = normal(10, 5, 1, shift=1e5), normal(7, 5, 2, shift=1e5)
    found = np.concatenate([block for _, block in generation.squared_distances(a, b)])
    np.testing.assert_allclose(found, ((a[:, None] - b[None]) ** 2).sum(axis=2), rtol=1e-8)


def test_precision_recall_density_and_coverage_follow_their_definitions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generation, "CHUNK", 16)
    real, fake = normal(40, 3, 1), normal(50, 3, 2, scale=1.3, shift=0.4)
    between = np.linalg.norm(real[:, None] - fake[None], axis=2)  # (N, M)

    def reach(rows: np.ndarray, k: int) -> np.ndarray:
        return np.sort(np.linalg.norm(rows[:, None] - rows[None], axis=2), axis=1)[:, k]  # 0 is itself

    found = generation.precision_recall(real, fake, k=3)
    assert found["precision"] == pytest.approx((between <= reach(real, 3)[:, None]).any(axis=0).mean())
    assert found["recall"] == pytest.approx((between <= reach(fake, 3)[None]).any(axis=1).mean())
    found = generation.density_coverage(real, fake, k=5)
    inside = between <= reach(real, 5)[:, None]
    assert found["density"] == pytest.approx(inside.sum() / (5 * 50))
    assert found["coverage"] == pytest.approx(inside.any(axis=1).mean())


def test_a_copy_is_perfect_and_a_far_set_is_worthless() -> None:
    real = normal(60, 4, 1)
    assert generation.precision_recall(real, real.copy()) == {"precision": 1.0, "recall": 1.0}
    assert generation.density_coverage(real, real.copy())["coverage"] == 1.0
    assert generation.precision_recall(real, real + 100) == {"precision": 0.0, "recall": 0.0}
    assert generation.density_coverage(real, real + 100) == {"density": 0.0, "coverage": 0.0}


def test_one_repeated_sample_is_precise_and_recalls_nothing() -> None:
    real = normal(200, 4, 1)
    fake = real[:1] + 1e-9 * normal(200, 4, 2)
    found = generation.precision_recall(real, fake)
    assert found["precision"] == 1.0
    assert found["recall"] <= 0.01


def test_copies_of_training_pictures_are_told_from_new_ones() -> None:
    training, held_out = normal(500, 6, 1), normal(500, 6, 2)
    copied = generation.memorisation(training[:200] + 1e-6, training, held_out)
    fresh = generation.memorisation(normal(500, 6, 3), training, held_out, quantile=0.05)
    assert (copied["value"], copied["expected"]) == (1.0, generation.FLOOR_QUANTILE)
    assert fresh["value"] == pytest.approx(0.05, abs=0.04)
    assert fresh["median_ratio"] == pytest.approx(1, abs=0.15)


# -- protocol -------------------------------------------------------------------------------------------------------

PROTOCOL = Protocol(
    extractor="mnist-classifier", extractor_sha256="ab", features=128, size=28, dataset_digest="cd", split="train",
    rows_sha256="ef", rows=100, samples=50, neighbours=50, seed=0,
)  # fmt: skip


def report(fid: float, **changes: object) -> GenerationReport:
    figures = {"fid": fid, "kid": {"value": fid / 2, "std": 0.1}, "memorisation": None}
    return GenerationReport(protocol=dataclasses.replace(PROTOCOL, **changes), figures=figures)


def test_reports_under_one_protocol_are_compared_metric_by_metric() -> None:
    found = generation.compare(report(3.0), report(6.0))
    assert found == {
        "fid": {"ours": 3.0, "theirs": 6.0, "ratio": 0.5},
        "kid": {"ours": 1.5, "theirs": 3.0, "ratio": 0.5},
    }


@pytest.mark.parametrize(
    ("name", "value"), [("samples", 10_000), ("extractor_sha256", "00"), ("resize", "linear")]
)
def test_reports_under_other_protocols_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"cannot be compared, they differ in {name} \("):
        generation.compare(report(3.0), report(3.0, **{name: value}))


def test_a_report_survives_json_and_other_json_is_refused() -> None:
    first = report(3.0)
    assert GenerationReport.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    with pytest.raises(ConfigError, match="no report of a generator"):
        GenerationReport.from_dict({"figures": {}})


def test_features_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(DataError, match="features of 3 and 4 numbers"):
        generation.kernel_distance(normal(5, 3), normal(5, 4))
    with pytest.raises(
        DataError, match=r"at least 4 rows of features \(N, D\) are needed, got shape \(2, 3\)"
    ):
        generation.precision_recall(normal(2, 3), normal(9, 3))
    with pytest.raises(DataError, match="NaN or infinity"):
        generation.moments(np.full((4, 2), np.nan))
