"""Stacking and conformal verdicts: closed forms, coverage on made data, agreement with scikit-learn and MAPIE."""

from __future__ import annotations

import json

import numpy as np
import pytest

from counterfake import ensemble
from counterfake.ensemble import Ensemble
from counterfake.errors import ConfigError, DataError
from counterfake.scoring import Scored
from jobs import fit_ensemble
from jobs.fit_ensemble import EnsembleJob


def made(n: int, seed: int, strength: tuple[float, ...] = (1.5, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """Members (n, M) whose logits are Gaussian around +-strength, each badly scaled; labels (n,)."""
    rng = np.random.default_rng(seed)
    fake = rng.integers(0, 2, n)
    logits = rng.normal(size=(n, len(strength))) * 2 + np.outer(2 * fake - 1, strength)
    return 1 / (1 + np.exp(-2.5 * logits)), fake


def fitted(n: int = 600, seed: int = 0, **settings: object) -> Ensemble:
    p, fake = made(n, seed)
    return Ensemble.fit(["net", "forest"], p, fake, **settings)  # type: ignore[arg-type]


def test_temperature_has_its_closed_form() -> None:
    """Logits +-z, right in a share s of the rows: sigmoid(z / T) = s, so T = z / logit(s)."""
    logits, fake = np.full(100, 4.0), np.r_[np.ones(80), np.zeros(20)]
    assert ensemble.temperature(logits, fake) == pytest.approx(4 / np.log(4), rel=1e-9)


def test_temperature_undoes_a_scale() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20_000) * 2
    fake = (rng.random(20_000) < 1 / (1 + np.exp(-logits))).astype(float)
    assert ensemble.temperature(3 * logits, fake) == pytest.approx(3, rel=0.05)


def test_stacking_agrees_with_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    p, fake = made(500, 1)
    x = np.log(p / (1 - p)) / 3
    reference = LogisticRegression(C=1e9, tol=1e-10, max_iter=10_000).fit(x, fake)
    many = np.tile(x, (2000, 1))
    weights, bias = ensemble._logistic(
        many, np.tile(fake, 2000).astype(float)
    )  # a million rows drown the pull
    np.testing.assert_allclose(weights, reference.coef_[0], atol=1e-3)
    assert bias == pytest.approx(reference.intercept_[0], abs=1e-3)


def test_separable_members_give_finite_weights() -> None:
    fake = np.arange(200) % 2
    fit = Ensemble.fit(["a", "b"], np.column_stack([fake, 1.0 * fake]), fake)
    assert np.isfinite(fit.weights).all()
    assert [fit.verdict(q) for q in fit.probability([[0, 0], [1, 1]])] == ["real", "fake"]


def test_conformal_quantile_is_the_order_statistic() -> None:
    p = np.r_[np.linspace(0, 0.19, 20), np.full(39, 0.9)]
    quantiles, n = ensemble._conformal(p, np.r_[np.zeros(20), np.ones(39)], 0.05)
    assert quantiles["real"] == pytest.approx(0.19)  # ceil(21 * .95) = 20th of 20
    assert n == {"real": 20, "fake": 39}


@pytest.mark.parametrize(
    ("quantiles", "word"),
    [((0.6, 0.6), "uncertain"), ((0.6, 0.4), "real"), ((0.4, 0.6), "fake"), ((0.4, 0.4), "out_of_domain")],
)
def test_every_set_of_labels_has_its_word(quantiles: tuple[float, float], word: str) -> None:
    fit = Ensemble(
        members=("a",), temperatures=(1,), weights=(1,), bias=0, alpha=0.05, n={"real": 99, "fake": 99},
        quantiles={"real": quantiles[0], "fake": quantiles[1]},
    )  # fmt: skip
    assert fit.verdict(0.5) == word


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_each_class_errs_about_alpha_over_many_splits(alpha: float) -> None:
    """Mean over splits: at most alpha of the reals lose the label real, at most alpha of the fakes the label fake."""
    misses: dict[str, list[float]] = {"real": [], "fake": []}
    for seed in range(100):
        fit = fitted(400, seed, alpha=alpha, smaller=False)
        p, fake = made(400, 10_000 + seed)
        q = fit.probability(p)
        misses["real"].append(np.mean(q[fake == 0] > fit.quantiles["real"]))
        misses["fake"].append(np.mean(1 - q[fake == 1] > fit.quantiles["fake"]))
    for label, shares in misses.items():
        error = np.std(shares) / np.sqrt(len(shares))
        assert alpha - 0.012 - 2 * error < np.mean(shares) < alpha + 2 * error, (
            label
        )  # 1/(n+1) below alpha at most


@pytest.mark.parametrize("stacking", ["logistic", "boosted"])
def test_coverage_counts_what_alpha_promises(stacking: ensemble.Stacking) -> None:
    """Over 100 random halves (8 with trees) of rows in clusters; none of them lies in both halves."""
    p, fake = made(800, 3)
    splits = 100 if stacking == "logistic" else 8
    clusters = [f"person{i // 2}" for i in range(800)]
    found = ensemble.coverage(
        ["a", "b"], p, fake, alpha=0.1, clusters=clusters, splits=splits, stacking=stacking
    )
    for name in ("false_accusation", "miss"):
        assert abs(found[name]["mean"] - 0.1) <= 2 * found[name]["sd"], name
        assert found[name]["within"]
    assert 0 < found["uncertain"]["mean"] < 1
    assert found["n"]["real"] + found["n"]["fake"] == 800


def test_too_few_rows_to_count_coverage_say_so() -> None:
    p, fake = made(60, 3)
    with pytest.raises(DataError, match=r"alpha 0.05 needs at least 19 real rows in the conformal half"):
        ensemble.coverage(["a", "b"], p, fake, splits=2)


def test_trees_find_what_no_weights_can() -> None:
    """Fake where the two members disagree: the logistic stack is blind to it."""
    from sklearn.metrics import roc_auc_score

    p = np.random.default_rng(0).random((1200, 2))
    fake = ((p[:, 0] > 0.5) != (p[:, 1] > 0.5)).astype(int)
    fits = {s: Ensemble.fit(["a", "b"], p[:800], fake[:800], stacking=s) for s in ("logistic", "boosted")}  # type: ignore[arg-type]
    auc = {name: roc_auc_score(fake[800:], fit.probability(p[800:])) for name, fit in fits.items()}
    assert auc["logistic"] < 0.6
    assert auc["boosted"] > 0.9
    boosted = fits["boosted"]
    again = Ensemble.from_dict(json.loads(json.dumps(boosted.to_dict())))
    np.testing.assert_array_equal(again.probability(p), boosted.probability(p))
    alone = np.concatenate([boosted.probability(row[None]) for row in p[:50]])
    np.testing.assert_array_equal(alone, boosted.probability(p[:50]))
    assert boosted.calibration_id != fits["logistic"].calibration_id


def test_the_stack_is_calibrated_on_rows_it_did_not_see() -> None:
    """Trees are sure of rows they grew on; the line behind them takes that back: a lower log-loss on new rows."""
    p, fake = made(300, 0, (0.3, 0.2))
    fit = Ensemble.fit(["a", "b"], p, fake, stacking="boosted", smaller=False)
    assert fit.slope < 0.9
    new, truth = made(4000, 1, (0.3, 0.2))
    raw = fit._stack().raw(new)

    def loss(logits: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, logits) - truth * logits))

    assert loss(fit.slope * raw + fit.shift) < loss(raw)


def test_members_of_noise_give_the_share_of_fakes() -> None:
    rng = np.random.default_rng(0)
    fit = Ensemble.fit(["a", "b"], rng.random((600, 2)), (np.arange(600) % 3 == 0).astype(int), smaller=False)
    np.testing.assert_allclose(fit.probability(rng.random((50, 2))), 1 / 3, atol=0.12)


def test_the_set_is_that_of_mapie_when_classes_are_alike() -> None:
    """MAPIE has the marginal form only: on scores that are symmetric in the classes, both forms have one quantile."""
    classification = pytest.importorskip("mapie.classification")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        classes_ = np.array([0, 1])

        def fit(self, x: object, y: object) -> Given:
            return self

        def predict_proba(self, x: np.ndarray) -> np.ndarray:
            return np.column_stack([1 - x[:, 0], x[:, 0]])

        def predict(self, x: np.ndarray) -> np.ndarray:
            return (x[:, 0] > 0.5).astype(int)

        def __sklearn_is_fitted__(self) -> bool:
            return True

    p, fake = made(2000, 4, (1.0,))
    both = np.r_[p[:, 0], 1 - p[:, 0]]
    labels = np.r_[fake, 1 - fake]
    quantiles, _ = ensemble._conformal(both, labels.astype(float), 0.1)
    mapie = classification.SplitConformalClassifier(
        Given(), confidence_level=0.9, conformity_score="lac", prefit=True
    )
    mapie.conformalize(both[:, None], labels)
    test = np.linspace(0.001, 0.999, 999)
    _, sets = mapie.predict_set(test[:, None])
    ours = np.column_stack([test <= quantiles["real"], 1 - test <= quantiles["fake"]])
    assert np.mean(ours == sets[:, :, 0]) > 0.995  # the quantiles differ by one order statistic of 4,000


def test_halves_share_no_cluster_and_hold_both_classes() -> None:
    rng = np.random.default_rng(0)
    fake = rng.integers(0, 2, 300).astype(float)
    clusters = [f"id{i}" for i in rng.integers(0, 40, 300)]
    half = ensemble._parts(fake, clusters, 2)
    first, second = half == 0, half == 1
    assert not set(np.array(clusters)[first]) & set(np.array(clusters)[second])
    for half in (first, second):
        assert 0.3 < half.mean() < 0.7
        assert 0 < fake[half].mean() < 1


def test_the_split_depends_on_names_not_on_order() -> None:
    p, fake = made(400, 0)
    names = [f"p{i}" for i in range(400)]
    order = np.random.default_rng(1).permutation(400)
    one = Ensemble.fit(["a", "b"], p, fake, clusters=names)
    two = Ensemble.fit(["a", "b"], p[order], fake[order], clusters=[names[i] for i in order])
    np.testing.assert_allclose(one.weights, two.weights, rtol=1e-8)
    assert one.quantiles == pytest.approx(two.quantiles)


def test_it_survives_json_and_gives_the_same_answers() -> None:
    fit = fitted()
    again = Ensemble.from_dict(json.loads(json.dumps(fit.to_dict())))
    assert again == fit
    p, _ = made(50, 9)
    np.testing.assert_array_equal(again.probability(p), fit.probability(p))


def test_one_row_gets_the_same_probability_alone_and_in_company() -> None:
    fit, (p, _) = fitted(), made(64, 5)
    alone = np.concatenate([fit.probability(row[None]) for row in p])
    np.testing.assert_array_equal(alone, fit.probability(p))


def test_missing_members_have_their_own_fit() -> None:
    p, fake = made(600, 2, (1.5, 1.0, 0.5, 0.2))
    fit = Ensemble.fit(["a", "b", "c", "d"], p, fake)
    assert len(fit.subsets) == 4 + 6
    assert fit.only(["c", "a", "b", "d"]) is fit
    assert fit.only(["d", "b"]).members == ("b", "d")
    with pytest.raises(DataError, match="at most 2 of 4"):
        fit.only(["a"])


def test_one_member_is_calibrated_alone() -> None:
    p, fake = made(300, 0, (1.5,))
    fit = Ensemble.fit(["only"], p, fake)
    assert fit.subsets == ()
    assert fit.only(["only"]) is fit


@pytest.mark.parametrize(
    ("n", "alpha", "error", "message"),
    [(60, 0.01, DataError, "at least 99 (real|fake) rows"), (60, 0.7, ConfigError, "between 0 and 0.5")],
)
def test_too_few_rows_are_refused_with_the_number_needed(
    n: int, alpha: float, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        fitted(n, alpha=alpha)


def test_one_class_or_wrong_shapes_are_refused() -> None:
    p, _ = made(100, 0)
    with pytest.raises(DataError, match="real and fake"):
        Ensemble.fit(["a", "b"], p, np.ones(100))
    with pytest.raises(DataError, match="need"):
        Ensemble.fit(["a"], p, np.arange(100) % 2)
    with pytest.raises(DataError, match="takes"):
        fitted().probability([[0.1]])


def scored(videos: list[str], fake: list[int], p: np.ndarray) -> Scored:
    rows = len(fake)
    return Scored(
        version=None, uri="d@1", ids=[f"id{i}" for i in range(rows)], fake=np.array(fake), groups={}, keys=[()] * rows,
        videos=videos, probabilities={"a": p[:, 0], "b": p[:, 1]}, refused={}, images_per_second=1.0,
    )  # type: ignore[arg-type]  # fmt: skip


def test_a_video_is_one_row_of_the_calibration() -> None:
    """The mean logit of its frames; pictures stay one row each."""
    p = np.array([[0.2, 0.5], [0.8, 0.5], [0.9, 0.1], [0.9, 0.4], [0.3, 0.3]])
    rows = scored(["v", "v", "", "w", "w"], [0, 0, 1, 1, 1], p)
    units = fit_ensemble._units(EnsembleJob(), rows, ["a", "b"])
    logit = np.log(p / (1 - p))
    expected = 1 / (1 + np.exp(-np.stack([logit[2], logit[:2].mean(axis=0), logit[3:].mean(axis=0)])))
    np.testing.assert_allclose(units.matrix, expected, atol=1e-12)
    assert units.fake.tolist() == [1, 0, 1]
    assert len(set(units.clusters)) == 3
    frames = fit_ensemble._units(EnsembleJob(by_video=False), rows, ["a", "b"])
    np.testing.assert_array_equal(frames.matrix, p)


def test_one_split_gives_no_spread() -> None:
    with pytest.raises(ConfigError, match="2 or more give a spread"):
        EnsembleJob(coverage_splits=1)


def test_platts_line_is_the_one_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 20_000)
    fake = rng.random(len(logit)) < 1 / (1 + np.exp(-(0.5 * logit - 1)))
    slope, shift = ensemble.platt(1 / (1 + np.exp(-logit)), fake)
    assert (slope, shift) == pytest.approx((0.5, -1), abs=0.05)
    better = ensemble.scaled(1 / (1 + np.exp(-logit)), slope, shift)
    assert better.mean() == pytest.approx(fake.mean(), abs=0.01)
    assert np.array_equal(np.argsort(better), np.argsort(logit))


def test_platts_line_of_one_class_changes_nothing() -> None:
    assert ensemble.platt([0.2, 0.7], [1, 1]) == (1.0, 0.0)
    assert ensemble.scaled([0.2, 0.7], 1.0, 0.0) == pytest.approx([0.2, 0.7])
