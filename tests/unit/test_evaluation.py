"""Figures of a detector against scikit-learn and closed forms."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from sklearn import metrics as reference

from counterfake.errors import DataError
from counterfake.evaluation import detection
from counterfake.gate import Gate


def scores(n: int = 400, seed: int = 0, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels and overlapping probabilities; rounded, so that ties are many."""
    rng = np.random.default_rng(seed)
    fake = rng.integers(0, 2, n)
    logits = rng.normal(size=n) + 1.5 * fake - 0.75
    return fake, np.round(1 / (1 + np.exp(-logits)), digits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("digits", [1, 2, 15], ids=["many-ties", "ties", "no-ties"])
def test_values_agree_with_scikit_learn(seed: int, digits: int) -> None:
    fake, p = scores(seed=seed, digits=digits)
    found = {
        k: v["value"] for k, v in detection.evaluate(fake, p, bootstraps=3).items() if k in detection.METRICS
    }
    called = p >= 0.5
    fpr, tpr, _ = reference.roc_curve(fake, p, drop_intermediate=False)
    expected = {
        "auc": reference.roc_auc_score(fake, p),
        "average_precision": reference.average_precision_score(fake, p),
        "accuracy": reference.accuracy_score(fake, called),
        "recall_fake": reference.recall_score(fake, called),
        "recall_real": reference.recall_score(fake, called, pos_label=0),
        "brier": reference.brier_score_loss(fake, p),
        "tpr_at_fpr_1pct": tpr[fpr <= 0.01].max(),
        "tpr_at_fpr_0_1pct": tpr[fpr <= 0.001].max(),
        "eer": np.interp(0, fpr - (1 - tpr), fpr),
        "ece": sum(
            abs(fake[b].mean() - p[b].mean()) * b.mean()
            for i in range(15)
            if (b := np.minimum((p * 15).astype(int), 14) == i).any()
        ),
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_recall_at_a_thousandth_is_that_of_the_real_picture_at_its_rank() -> None:
    """Closed form: of 2,000 real pictures 2 may be accused, so recall is the share of fakes above the third highest."""
    rng = np.random.default_rng(0)
    real, fakes = rng.uniform(0, 0.7, 2000), rng.uniform(0.3, 1, 500)
    found = detection.evaluate([0] * 2000 + [1] * 500, np.concatenate([real, fakes]), bootstraps=0)
    third = np.sort(real)[-3]
    assert found["tpr_at_fpr_0_1pct"]["value"] == np.mean(fakes > third)


def test_det_is_that_of_scikit_learn() -> None:
    fake, p = scores()
    fpr, miss = detection.det(fake, p)
    theirs_fpr, theirs_miss, _ = reference.det_curve(fake, p)
    ours = set(zip(fpr.round(12), miss.round(12), strict=True))
    assert set(zip(theirs_fpr.round(12), theirs_miss.round(12), strict=True)) <= ours


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("clustered", [False, True], ids=["rows", "clusters"])
def test_shards_merged_in_any_order_give_the_same_bits(ranks: int, clustered: bool) -> None:
    rng = np.random.default_rng(ranks)
    fake, p = scores(300, seed=5, digits=2)
    q = np.round(np.clip(p + rng.normal(0, 0.1, 300), 0, 1), 2)
    makers = np.where(fake, rng.choice(["gan", "swap"], 300), "camera")
    clusters = rng.integers(0, 40, 300).astype(str)
    alone = judged(fake, p, q, makers, clusters if clustered else None)
    order = np.concatenate([np.arange(300)[rank::ranks] for rank in rng.permutation(ranks)])
    mixed = clusters[order] if clustered else None
    assert judged(fake[order], p[order], q[order], makers[order], mixed) == alone


def judged(
    fake: np.ndarray, p: np.ndarray, q: np.ndarray, makers: np.ndarray, clusters: np.ndarray | None
) -> str:
    """Everything said of the rows, to the last digit."""
    names = None if clusters is None else clusters.tolist()
    found = detection.evaluate(fake, p, groups={"maker": makers.tolist()}, clusters=names, bootstraps=40)
    return json.dumps([found, detection.paired(fake, p, q, clusters=names, bootstraps=40)])


def test_a_single_cluster_has_no_interval() -> None:
    fake, p = scores(50)
    found = detection.evaluate(fake, p, clusters=["one"] * 50, bootstraps=20)
    assert found["auc"]["low"] is None


def test_roc_is_that_of_scikit_learn() -> None:
    fake, p = scores()
    for ours, theirs in zip(
        detection.roc(fake, p), reference.roc_curve(fake, p, drop_intermediate=False), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_a_perfect_detector_has_its_closed_form_figures() -> None:
    result = detection.evaluate([0, 0, 1, 1], [0.0, 0.0, 1.0, 1.0], bootstraps=50)
    for name in ("auc", "average_precision", "accuracy", "recall_real", "recall_fake", "tpr_at_fpr_1pct"):
        assert result[name] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["eer"]["value"] == result["ece"]["value"] == result["brier"]["value"] == 0


def test_a_constant_score_is_chance() -> None:
    result = detection.evaluate([0, 1, 1, 0, 1], [0.5] * 5, bootstraps=10)
    assert result["auc"]["value"] == 0.5
    assert result["eer"]["value"] == 0.5
    assert result["average_precision"]["value"] == pytest.approx(0.6)
    assert result["majority"] == 0.6


def test_weighted_resamples_equal_repeated_rows() -> None:
    """A resample through weights is the metric of the rows written out as often as they were drawn."""
    fake, p = scores(60, seed=3, digits=1)
    drawn = detection._Resamples(None, 60, 20, 0)
    rows = np.arange(60)
    found = detection._all(fake.astype(float), p, rows, detection.METRICS, 0.5, drawn)
    for b in range(20):
        repeated = np.repeat(rows, drawn.counts(b, b + 1)[0].astype(int))
        expected = detection.evaluate(fake[repeated], p[repeated], bootstraps=0)
        for name in detection.METRICS:
            assert found[name][b + 1] == pytest.approx(expected[name]["value"], abs=1e-12), name


def test_interval_covers_the_true_auc_about_as_often_as_it_says() -> None:
    hits, true = 0, 0.8555778  # Phi(1.5 / sqrt 2)
    for seed in range(100):
        fake, p = scores(200, seed=seed, digits=15)
        auc = detection.evaluate(fake, p, bootstraps=200, seed=seed)["auc"]
        hits += auc["low"] <= true <= auc["high"]
    assert 87 <= hits <= 100


def test_clusters_widen_the_interval() -> None:
    fake, p = scores(100, seed=1)
    repeated, names = np.repeat(np.arange(100), 8), np.repeat([f"video{i}" for i in range(100)], 8)
    widths = []
    for clusters in (None, list(names)):
        auc = detection.evaluate(fake[repeated], p[repeated], clusters=clusters)["auc"]
        widths.append(auc["high"] - auc["low"])
    assert widths[1] > 2 * widths[0]  # eight copies carry no more information than one


def test_one_class_groups_are_compared_with_the_other_class() -> None:
    fake = np.array([0] * 20 + [1] * 40)
    p = np.concatenate([np.linspace(0, 0.6, 20), np.linspace(0.7, 1, 20), np.linspace(0, 0.6, 20)])
    makers = ["camera"] * 20 + ["easy"] * 20 + ["hard"] * 20
    result = detection.evaluate(fake, p, groups={"maker": makers}, bootstraps=20)
    table = result["groups"]["maker"]
    assert table["easy"]["auc"]["value"] == 1.0
    assert table["hard"]["auc"]["value"] == 0.5
    assert table["hard"]["against"] == "all real"
    assert "recall_real" not in table["hard"]
    assert "recall_fake" not in table["camera"]
    assert result["worst_group"]["name"] == "hard"
    json.dumps(result, allow_nan=False)


def test_paired_difference_of_a_score_with_itself_is_zero_and_of_a_better_one_positive() -> None:
    fake, p = scores(300)
    better = np.clip(p + 0.3 * (fake - 0.5), 0, 1)
    assert detection.paired_difference(fake, p, p, bootstraps=20) == {"value": 0, "low": 0, "high": 0}
    assert detection.paired_difference(fake, better, p)["low"] > 0  # type: ignore[operator]


def test_paired_says_what_each_has_and_how_sure_the_difference_is() -> None:
    fake, p = scores(300)
    better = np.clip(p + 0.3 * (fake - 0.5), 0, 1)
    found = detection.paired(fake, better, p, bootstraps=99)
    assert found["auc"]["first"] == detection.evaluate(fake, better, bootstraps=0)["auc"]["value"]
    assert found["auc"]["difference"]["value"] == found["auc"]["first"] - found["auc"]["second"]
    assert found["auc"]["p"] == pytest.approx(0.02)  # 2 / (99 + 1): no resample went the other way
    assert detection.paired(fake, p, p, bootstraps=99)["auc"]["p"] == 1.0
    assert detection.paired(fake, p, better, bootstraps=0)["auc"]["p"] is None


def test_the_paired_test_errs_about_as_often_as_it_says() -> None:
    """Two equally good detectors: p falls below 0.1 in about a tenth of all sets."""
    wrong = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        fake = rng.integers(0, 2, 120)
        first, second = (1 / (1 + np.exp(-(rng.normal(size=120) + fake))) for _ in range(2))
        found = detection.paired(fake, first, second, metrics=("auc",), bootstraps=199, seed=seed)
        wrong += found["auc"]["p"] < 0.1
    assert 6 <= wrong <= 34  # at most 20 expected, sd 4.2


def test_a_video_is_the_sigmoid_of_its_mean_logit() -> None:
    p = np.array([0.2, 0.9, 0.6, 0.5, np.nan, np.nan])
    films = detection.by_video(["b", "a", "b", "a", "a", "c"], [0, 1, 0, 1, 1, 0], p)
    assert films.names == ["a", "b"]
    assert films.empty == ["c"]
    assert films.frames.tolist() == [2, 2]
    logit = [(np.log(9) + 0) / 2, (np.log(0.25) + np.log(1.5)) / 2]
    np.testing.assert_allclose(films.probability, 1 / (1 + np.exp(-np.array(logit))), rtol=1e-12)
    assert films.fake.tolist() == [1, 0]


def test_confident_frames_decide_as_in_the_published_code() -> None:
    surely_fake = np.array([0.95] * 14 + [0.1] * 18)  # 14 > 32 // 2.5 = 12 and > 11
    assert detection.confident(surely_fake) == pytest.approx(0.95)
    assert detection.confident(surely_fake[3:]) == pytest.approx(
        np.mean(surely_fake[3:])
    )  # 11 are not more than 11
    assert detection.confident(np.array([0.05] * 19 + [0.7])) == pytest.approx(0.05)  # 95 % below 0.2
    assert detection.confident(np.array([0.05] * 18 + [0.7] * 2)) == pytest.approx(0.115)  # 90 % is not more


def test_videos_that_cannot_be_judged_are_named() -> None:
    with pytest.raises(DataError, match=r"none of 1 videos has a frame"):
        detection.by_video(["a"], [1], [np.nan])
    with pytest.raises(DataError, match=r"video a has real and fake frames"):
        detection.by_video(["a", "a"], [1, 0], [0.5, 0.5])


def test_bins_of_few_rows_are_not_shown() -> None:
    fake, p = np.array([0] * 20 + [1] * 3), np.array([0.11] * 20 + [0.91] * 3)
    whole, hidden = detection.histogram(fake, p), detection.histogram(fake, p, least=10)
    assert (whole["real"].sum(), whole["fake"].sum()) == (20, 3)
    assert (hidden["real"].sum(), hidden["fake"].sum()) == (20, 0)
    assert sum(detection.reliability(fake, p, least=10)["count"]) == 20


def test_verdicts_are_counted_by_class_with_what_was_lost() -> None:
    words = ["real", "fake", "uncertain", "out_of_domain", "fake", "real", "uncertain"]
    found = detection.verdicts(words, [0, 0, 0, 0, 1, 1, 1])
    assert found["real"] == {
        "real": 0.25, "fake": 0.25, "uncertain": 0.25, "out_of_domain": 0.25, "n": 4, "lost": 0.5,
    }  # fmt: skip
    assert found["fake"]["real"] == pytest.approx(1 / 3)  # missed
    assert found["fake"]["lost"] == pytest.approx(1 / 3)
    with pytest.raises(DataError, match="need as many verdicts"):
        detection.verdicts(["maybe"], [0])


def test_a_resample_costs_a_fraction_of_judging_its_rows_with_scikit_learn() -> None:
    """Both on the clock of this process in this run, so that a busy machine slows both."""
    fake, p = scores(2000, digits=15)
    rng, few, many = np.random.default_rng(0), 30, 600
    start = time.process_time()
    for _ in range(few):
        rows = rng.integers(len(fake), size=len(fake))
        for judge in (reference.roc_auc_score, reference.average_precision_score, reference.brier_score_loss):
            judge(fake[rows], p[rows])
        reference.roc_curve(fake[rows], p[rows])
    naive = (time.process_time() - start) / few
    start = time.process_time()
    detection.evaluate(fake, p, bootstraps=many)
    assert (time.process_time() - start) / many < 0.5 * naive


def test_resamples_drawn_again_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many clusters to keep: groups must still see the resamples of the whole."""
    fake, p = scores(200)
    kept = detection.evaluate(fake, p, bootstraps=30)
    monkeypatch.setattr(detection, "_KEPT", 0)
    assert detection.evaluate(fake, p, bootstraps=30) == kept


def test_confusion_and_reliability_count_every_row() -> None:
    fake, p = scores(500)
    assert detection.confusion(fake, p) == reference.confusion_matrix(fake, p >= 0.5).tolist()
    assert sum(detection.reliability(fake, p)["count"]) == 500


@pytest.mark.parametrize(
    ("fake", "p", "message"),
    [
        ([1, 1], [0.1, 0.2], "no real row"),
        ([0, 0], [0.1, 0.2], "no fake row"),
        ([0, 1], [0.1], "2 labels but 1 scores"),
        ([0, 2], [0.1, 0.3], "must be 0"),
        ([0, 1], [0.1, float("nan")], "finite"),
        ([0, 1], [0.1, 1.5], "within"),
    ],
)
def test_unusable_input_is_refused_by_name(fake: list[int], p: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        detection.evaluate(fake, p)


def test_without_resamples_there_is_no_interval_and_a_gate_on_it_does_not_pass() -> None:
    found = detection.evaluate(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9]), bootstraps=0)
    assert found["auc"] == {"value": 1.0, "low": None, "high": None}
    assert Gate(min_auc=0.9).check(found) == []
    assert "not measured" in Gate(min_auc=0.9, interval=True).check(found)[0]
