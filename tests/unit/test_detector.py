"""Detector learning: the augmentation against libjpeg and OpenCV, schedules, freezing, balance, and updates that learn."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from counterfake import bundle, dist, images, predictor
from counterfake.config import override
from counterfake.data import Batch
from counterfake.errors import ConfigError, DataError
from counterfake.learners import LearnerContext, detector
from counterfake.learners.augmentation import AugmentationConfig, augment, blur, cropped, jittered, jpeg
from counterfake.learners.detector import (
    DetectorConfig,
    DetectorLearner,
    _climbed,
    _figures,
    _loss,
    schedule,
    thawing,
)
from counterfake.nets import NetConfig
from counterfake.nets.meso import MesoConfig
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.nets.probe import ProbeConfig
from counterfake.nets.temporal import TemporalConfig
from counterfake.records import write_version
from counterfake.sources.synthetic import SyntheticSource
from counterfake.workspace import Workspace
from jobs import train_detector

CPU = torch.device("cpu")


# -- augmentation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(64, 72, 3) uint8 with edges, slopes and grain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:72]
    picture = np.stack([x * 3, y * 3, (x + y)], -1).astype(float)
    picture[20:40, 30:50] += 60
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("quality", [50, 75, 90])
def test_grey_jpeg_is_libjpegs_up_to_rounding(photo: np.ndarray, quality: int) -> None:
    grey = photo[:, :, :1]
    data = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    want = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)[:, :, None].astype(float)
    got = jpeg(_tensor(grey), torch.tensor([float(quality)]))
    error = np.abs(_pixels(got) - want)
    assert (error > 2).mean() < 0.05  # a coefficient within the integer DCT's error of a rounding threshold
    assert error.mean() < 0.4


def test_colour_jpeg_loses_more_at_lower_quality(photo: np.ndarray) -> None:
    batch = _tensor(photo).repeat(3, 1, 1, 1)
    errors = (jpeg(batch, torch.tensor([30.0, 60.0, 95.0])) - batch).abs().mean(dim=(1, 2, 3)).tolist()
    assert errors[0] > errors[1] > errors[2] > 0


def test_blur_is_opencvs_gaussian_with_a_sigma_per_picture(photo: np.ndarray) -> None:
    sigmas = [0.7, 1.3]
    got = blur(_tensor(photo).repeat(2, 1, 1, 1), torch.tensor(sigmas))
    for row, sigma in enumerate(sigmas):
        want = cv2.GaussianBlur(photo.astype(np.float32), (9, 9), sigma, borderType=cv2.BORDER_REFLECT_101)
        assert np.abs(_pixels(got[row : row + 1]) - want).max() < 0.01


def test_augmentation_off_changes_nothing_and_on_repeats_with_the_seed(photo: np.ndarray) -> None:
    batch = _tensor(photo).repeat(8, 1, 1, 1)
    torch.testing.assert_close(augment(batch, AugmentationConfig.off()), batch)
    torch.manual_seed(4)
    first = augment(batch, AugmentationConfig())
    torch.manual_seed(4)
    assert torch.equal(first, augment(batch, AugmentationConfig()))
    assert len({float(row.mean()) for row in first}) == 8
    assert first.abs().max() <= 1


def test_a_flip_alone_is_the_mirror_image(photo: np.ndarray) -> None:
    only_flip = override(AugmentationConfig.off(), {"flip": 1.0})
    torch.testing.assert_close(augment(_tensor(photo), only_flip), _tensor(photo).flip(3))


def test_jitter_moves_whole_pixels_and_reflects_the_border(photo: np.ndarray) -> None:
    torch.manual_seed(0)
    batch = _tensor(photo).repeat(6, 1, 1, 1)
    moved = jittered(batch, 3)
    padded = torch.nn.functional.pad(batch, (3, 3, 3, 3), mode="reflect")
    height, width = batch.shape[2:]
    windows = [padded[0, :, y : y + height, x : x + width] for y in range(7) for x in range(7)]
    assert all(any(torch.equal(row, window) for window in windows) for row in moved)
    assert len({float(row[0, 0, 0]) for row in moved}) > 1


def test_a_crop_is_a_window_of_the_picture_anywhere_in_it(photo: np.ndarray) -> None:
    torch.manual_seed(0)
    whole = _tensor(photo)[:, :, :9, :12]
    windows = [whole[0, :, y : y + 7, x : x + 7] for y in range(3) for x in range(6)]
    found = [
        next(i for i, window in enumerate(windows) if torch.equal(row, window))
        for row in cropped(whole.repeat(400, 1, 1, 1), 7)
    ]
    assert set(found) == set(range(18))
    assert augment(whole, override(AugmentationConfig.off(), {"crop": 7})).shape == (1, 3, 7, 7)
    assert torch.equal(cropped(whole, 0), whole)


def test_a_detector_learns_from_windows_and_judges_whole_pictures() -> None:
    windows = replace(AugmentationConfig.off(), crop=24)
    whole, parts = make_learner(), make_learner(augmentation=windows)
    torch.testing.assert_close(
        whole.net.state_dict(), parts.net.state_dict()
    )  # looking at it first draws nothing
    seen: list[tuple[int, ...]] = []
    parts.net.features.register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape)))
    for step in range(2):
        parts.step(make_batch(step))
    parts.validate([make_batch()])
    assert [shape[2:] for shape in seen] == [(24, 24), (24, 24), (32, 32)]


# -- learning -------------------------------------------------------------------------------------------------------


CONTEXT = LearnerContext(batch_size=16, images_per_epoch=4000, total_images=960, size=32)


def make_learner(**changes: object) -> DetectorLearner:
    config = DetectorConfig(
        net=replace(MobileNetV2Config.tiny(), stem_stride=1), lr=5e-3, augmentation=AugmentationConfig.off()
    )
    torch.manual_seed(0)
    return override(config, changes).build(device=CPU, context=CONTEXT)


def make_batch(step: int = 0, fakes: int = 8) -> Batch:
    """Noise; the fakes are a little redder."""
    rng = np.random.default_rng(step)
    fake = torch.from_numpy(rng.permutation(np.arange(16) < fakes).astype(np.int64))
    red = np.array([30.0, 0, 0])[:, None, None]
    pixels = 90 + rng.normal(0, 20, (16, 3, 32, 32)) + fake.numpy()[:, None, None, None] * red
    unknown = torch.full((16,), -1)
    return Batch(
        images=torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), fake=fake, class_id=unknown, identity=unknown,
        maker=unknown, ids=[f"{i:064x}" for i in range(16)], step=step, epoch=0,
    )  # fmt: skip


def run(learner: DetectorLearner, first: int, last: int) -> list[dict[str, float]]:
    metrics = []
    for step in range(first, last):
        dist.seed_step(0, step)
        metrics.append({name: float(value) for name, value in learner.step(make_batch(step)).items()})
    return metrics


def test_the_detector_learns_and_validation_keeps_the_best_weights() -> None:
    learner = make_learner()
    metrics = run(learner, 0, 90)
    assert np.mean([m["loss"] for m in metrics[-5:]]) < 0.5 * metrics[0]["loss"]
    held_out = [make_batch(1000), make_batch(1001)]
    good = learner.validate(held_out)
    assert good["auc"] > 0.95
    assert good["images"] == 32
    best = {name: value.clone() for name, value in learner.net.state_dict().items()}
    with torch.no_grad():
        learner.net.head[-1].weight.neg_()  # a collapse
    assert learner.validate(held_out)["best_auc"] == good["auc"] == good["best_auc"]
    exported = learner.export()["detector"][1]
    assert all(torch.equal(exported[name], best[name]) for name in best)


def test_resuming_equals_not_stopping_bit_for_bit() -> None:
    settings = {"ema_halflife_images": 64.0, "augmentation.flip": 0.5, "augmentation.contrast": 0.2}
    whole = make_learner(**settings)
    run(whole, 0, 6)
    first, second = make_learner(**settings), make_learner(**settings)
    run(first, 0, 3)
    second.load_state_dict(first.state_dict())
    run(second, 3, 6)
    for a, b in ((whole.net, second.net), (whole.average, second.average)):
        assert all(
            torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        )


def test_the_worst_maker_is_the_least_auc_over_makers_against_all_real_pictures() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 9.0, 7.0])
    fake = torch.tensor([0, 0, 1, 1, 1, 1, -1])
    makers = torch.tensor([0, 0, 1, 1, 2, -1, 2])  # camera, gan, swap; -1 = not recorded
    found = _figures(logits, fake, makers, ("camera", "gan", "swap"))
    assert {k: v for k, v in found.items() if k.startswith("auc.")} == {
        "auc.gan": 1.0, "auc.swap": 0.5, "auc.unknown": 1.0,
    }  # fmt: skip
    assert found["worst_auc"] == 0.5
    assert found["auc"] == pytest.approx(7 / 8)
    alone = _figures(logits[:4], fake[:4], makers[:4], ("camera", "gan", "swap"))
    assert alone["worst_auc"] == alone["auc"]
    assert not [name for name in alone if name.startswith("auc.")]  # one maker says nothing new


@pytest.mark.parametrize(("select", "kept"), [("auc", 1), ("worst_auc", 0)])
def test_the_kept_weights_are_those_of_the_figure_that_a_search_compares(
    select: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(select=select)
    answers = iter([{"auc": 0.7, "worst_auc": 0.6}, {"auc": 0.9, "worst_auc": 0.5}])
    monkeypatch.setattr(detector, "_figures", lambda *rows: next(answers))
    weights = []
    for step in range(2):
        run(learner, step, step + 1)
        weights.append({name: value.clone() for name, value in learner.net.state_dict().items()})
        found = learner.validate([make_batch(90)])
    exported = learner.export()["detector"][1]
    assert all(torch.equal(exported[name], weights[kept][name]) for name in exported)
    name = learner.config.kept_metric.removeprefix("val_")
    assert found[name] == {"auc": 0.9, "worst_auc": 0.6}[select]
    again = make_learner(select=select)
    again.load_state_dict(learner.state_dict())
    assert again.best_figure == found[name]


def test_a_state_goes_on_under_the_settings_of_whoever_loads_it() -> None:
    donor, heir = make_learner(lr=5e-3), make_learner(lr=1e-4, weight_decay=0.3)
    run(donor, 0, 2)
    heir.load_state_dict(donor.state_dict())
    assert {g["peak_lr"] for g in heir.optimizer.param_groups} == {1e-4}
    assert {g["weight_decay"] for g in heir.optimizer.param_groups} == {0.0, 0.3}
    assert heir.steps == 2
    before = [p.clone() for p in heir.net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, donor.net.parameters(), strict=True))
    rate = run(heir, 2, 3)[0]["lr"]
    assert rate == pytest.approx(1e-4 * schedule(32, 960, heir.config))


def test_frozen_features_keep_weights_and_statistics_while_the_head_learns() -> None:
    learner = make_learner(freeze_images=32)
    features = {n: v.clone() for n, v in learner.net.features.state_dict().items()}
    head = [p.clone() for p in learner.net.head.parameters()]
    run(learner, 0, 2)
    assert all(torch.equal(v, features[n]) for n, v in learner.net.features.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(head, learner.net.head.parameters(), strict=True))
    run(learner, 2, 3)
    assert any(not torch.equal(v, features[n]) for n, v in learner.net.features.state_dict().items())


def test_features_learn_at_their_own_rate_and_norms_do_not_decay() -> None:
    learner = make_learner(features_lr_factor=0.1)
    rates = {(g["part"], g["weight_decay"] > 0): g["peak_lr"] for g in learner.optimizer.param_groups}
    assert rates[("features", True)] == pytest.approx(5e-4)
    assert rates[("head", False)] == pytest.approx(5e-3)
    grouped = sum(len(g["params"]) for g in learner.optimizer.param_groups)
    assert grouped == len(list(learner.net.parameters()))


def detectors() -> list[NetConfig]:
    """`tiny()` of every architecture in nets/ that DetectorLearner can train: pictures -> one logit, by features and head."""
    found = []
    for kind in walk(NetConfig):
        if kind is TemporalConfig:  # its head reads clips: learners/video.py trains it
            continue
        config = kind.tiny()
        net = config.build().eval()
        if not all(isinstance(getattr(net, part, None), torch.nn.Module) for part in ("features", "head")):
            continue
        with torch.no_grad():
            logits = net(torch.zeros(2, 3, 32, 32))
            maps = net.features(torch.zeros(2, 3, 32, 32))
            if logits.shape == (2,) and net.head(maps.mean(dim=(2, 3))).shape == (2, 1):
                found.append(config)
    return found


def walk(kind: type[NetConfig]) -> list[type[NetConfig]]:
    """The architectures of nets/ below `kind`; other tests declare some of their own."""
    below = [leaf for child in kind.__subclasses__() for leaf in (child, *walk(child))]
    concrete = [
        c for c in below if not inspect.isabstract(c) and c.__module__.startswith("counterfake.nets.")
    ]
    return sorted(set(concrete), key=lambda c: c.__name__)


TINY = detectors()


def test_the_walk_finds_the_detectors_that_the_presets_use() -> None:
    used = {type(make().learner.net) for make in train_detector.PRESETS.values()}
    assert used <= {type(net) for net in TINY}


@pytest.mark.parametrize("net", TINY, ids=lambda net: type(net).__name__)
def test_every_architecture_trains_resumes_and_exports(net: NetConfig) -> None:
    config = DetectorConfig(net=net, lr=5e-3, ema_halflife_images=32, augmentation=AugmentationConfig.off())
    torch.manual_seed(0)
    learner, again = (config.build(device=CPU, context=CONTEXT) for _ in range(2))
    losses = [m["loss"] for m in run(learner, 0, 6)]
    assert all(math.isfinite(loss) for loss in losses)
    again.load_state_dict(learner.state_dict())
    assert learner.validate([make_batch(99)]) == again.validate([make_batch(99)])
    stored, weights = again.export()["detector"]
    stored.build().load_state_dict(weights)


@pytest.mark.parametrize("net", TINY, ids=lambda net: type(net).__name__)
def test_every_architecture_becomes_a_bundle_that_answers_and_explains(
    net: NetConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    nets = {"detector": (net, net.build().state_dict())}
    written = bundle.write_nets(
        tmp_path / "b",
        kind="detector",
        name="tiny",
        nets=nets,
        preprocess=images.Preprocess(size=32),
        provenance={},
    )
    detector = predictor.NetPredictor(written)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    pictures = [predictor.Decoded(pixels=picture) for picture in pixels]
    together, alone = detector.predict(pictures), [detector.predict([p])[0] for p in pictures]
    assert together == pytest.approx(alone, abs=1e-6)
    heat = detector.heatmap(pictures[0])
    assert heat.ndim == 2
    assert np.isfinite(heat).all()


def test_a_probe_trains_its_last_layer_only() -> None:
    learner = DetectorConfig(net=ProbeConfig.tiny()).build(device=CPU, context=CONTEXT)
    grouped = [p for group in learner.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in learner.net.head.parameters()}


@pytest.mark.parametrize("changes", [{"optimizer": "sgd", "lr": 0.05}, {"sam_rho": 0.05}], ids=["sgd", "sam"])
def test_other_optimizers_learn_and_resume_bit_for_bit(changes: dict[str, object]) -> None:
    whole = make_learner(**changes)
    metrics = run(whole, 0, 40)
    assert np.mean([m["loss"] for m in metrics[-5:]]) < 0.8 * metrics[0]["loss"]
    whole, first, second = (make_learner(**changes) for _ in range(3))
    run(whole, 0, 4)
    run(first, 0, 2)
    second.load_state_dict(first.state_dict())
    run(second, 2, 4)
    pairs = zip(whole.net.parameters(), second.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_sharpness_aware_steps_climb_by_rho_and_come_back() -> None:
    weights = [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([3.0]))]
    before = [w.detach().clone() for w in weights]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    with _climbed(weights, 0.5):
        torch.testing.assert_close(weights[0].detach(), before[0] + torch.tensor([0.3, 0.0]))
        torch.testing.assert_close(weights[1].detach(), before[1] + 0.4)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_blended_rows_count_as_fakes_and_can_replace_them() -> None:
    learner = make_learner(**{"blending.share": 0.5})
    for step in range(3):  # real pictures only: the other class is made from them
        dist.seed_step(0, step)
        metrics = learner.step(make_batch(step, fakes=0))
    assert math.isfinite(float(metrics["loss"]))
    assert min(learner._seen.tolist()) > 0


def test_composites_need_points_and_count_as_fakes() -> None:
    learner = make_learner(**{"composites.share": 0.5})
    with pytest.raises(ConfigError, match=r"data\.landmarks=true"):
        learner.step(make_batch(0, fakes=0))
    for step in range(3):
        dist.seed_step(0, step)
        batch = make_batch(step, fakes=0)
        eyes = torch.tensor([[10.0, 12.0], [20.0, 12.0], *[[math.nan] * 2] * 3])
        metrics = learner.step(replace(batch, landmarks=eyes.expand(len(batch), 5, 2).clone()))
    assert math.isfinite(float(metrics["loss"]))
    assert min(learner._seen.tolist()) > 0


def test_composites_of_rows_without_faces_are_refused_by_name() -> None:
    learner = make_learner(**{"composites.share": 0.5})
    with pytest.raises(DataError, match="ingest with --set faces=cascade"):
        for step in range(200):
            batch = make_batch(step)
            unknown = torch.full((len(batch), 5, 2), math.nan)
            learner.step(replace(batch, landmarks=unknown))


def test_frozen_norms_keep_their_statistics_and_their_weights_still_learn() -> None:
    for frozen in (True, False):
        learner = make_learner(frozen_norms=frozen)
        before = {name: value.clone() for name, value in learner.net.features.state_dict().items()}
        run(learner, 0, 2)
        after = learner.net.features.state_dict()
        same = [torch.equal(before[name], after[name]) for name in before if name.endswith("running_mean")]
        assert same
        assert all(same) if frozen else not any(same)
        assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))


def test_the_schedule_counts_images_up_then_down() -> None:
    config = DetectorConfig(warmup_images=100, final_lr_factor=0.1)
    factors = [schedule(seen, 1100, config) for seen in (0, 49, 100, 600, 1100, 5000)]
    assert factors == pytest.approx([0.01, 0.5, 1.0, 0.55, 0.1, 0.1])


def test_features_thaw_slowly_after_the_head_learned_alone() -> None:
    config = DetectorConfig(freeze_images=200, warmup_images=100)
    assert [thawing(seen, config) for seen in (0, 199, 200, 249, 299, 5000)] == pytest.approx(
        [0, 0, 0.01, 0.5, 1, 1]
    )
    assert thawing(0, DetectorConfig(warmup_images=100)) == 1  # never frozen: one warm-up is enough
    learner = make_learner(freeze_images=32, warmup_images=64, features_lr_factor=0.5)
    rates = []
    for step in range(4):
        learner.step(make_batch(step))
        rates.append({group["part"]: group["lr"] for group in learner.optimizer.param_groups})
    assert [rate["features"] for rate in rates[:2]] == [0, 0]
    assert 0 < rates[2]["features"] < rates[3]["features"] < 0.5 * rates[3]["head"]


def test_balance_weighs_both_classes_alike_and_unknown_labels_not_at_all() -> None:
    fake = torch.tensor([1.0] + [0.0] * 9)
    logits = torch.zeros(10, requires_grad=True)
    _loss(logits, fake, 0.0, True).backward()
    positive, negative = float(-logits.grad[0]), float(logits.grad[1:].sum())
    assert positive / negative == pytest.approx((1 / 2) / (9 / 10))
    plain = _loss(torch.zeros(3), torch.tensor([1.0, 0.0, -1.0]), 0.0, False)
    assert float(plain) == pytest.approx(math.log(2))
    confident = _loss(torch.tensor([9.0, -9.0, 50.0]), torch.tensor([1.0, 0.0, -1.0]), 0.0, True)
    assert float(confident) < 0.001


def test_one_class_only_is_refused_in_one_line() -> None:
    learner = make_learner()
    with pytest.raises(DataError, match="hold 512 real and 0 fake"):
        for step in range(40):
            learner.step(make_batch(step, fakes=0))
    with pytest.raises(DataError, match="fake"):
        make_learner().validate([make_batch(0, fakes=0)])


def test_a_resumed_run_counts_the_classes_anew_before_it_refuses() -> None:
    first, second = make_learner(), make_learner()
    run(first, 0, 33)  # past CLASS_CHECK_IMAGES, both classes seen
    second.load_state_dict(first.state_dict())
    second.step(make_batch(33, fakes=0))  # a rare class may be missing from one batch
    with pytest.raises(DataError, match="hold 512 real and 0 fake"):
        for step in range(34, 70):
            second.step(make_batch(step, fakes=0))


def test_every_metric_lies_on_the_learners_device() -> None:
    learner = make_learner()
    learner.device = torch.device("meta")  # the only other device that every machine has
    assert learner._lr_tensor().device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loop.patience_ticks": 3, "loop.stop_metric": "loss"},
            "stop_metric loss is measured on training rows",
        ),
        ({"validation.split": "test"}, "rows that the detector is judged on"),
        (
            {"validation.split": "train"},
            r"validation\.split=train holds rows that data\.split=train trains on",
        ),
        ({"validation.split": "*"}, r"validation\.split=\* holds rows"),
    ],
    ids=["training metric", "test", "train", "every split"],
)
def test_a_detector_is_stopped_and_chosen_by_the_validation_split_only(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(train_detector.mobilenetv2_demo(), changes)


def test_only_the_robust_preset_degrades_and_never_the_held_out_rows() -> None:
    jobs = {name: make() for name, make in train_detector.PRESETS.items()}
    assert [name for name, job in jobs.items() if job.data.degradation.active] == ["stylegan-ffhq-256-robust"]
    assert not any(job.validation.degradation.active for job in jobs.values())
    assert jobs["stylegan-ffhq-256-robust"].learner.augmentation.probability == 0  # nothing is blurred twice
    assert jobs["xception-299"].loop.patience_ticks > 0


def test_a_fold_of_other_rows_of_the_same_split_may_validate() -> None:
    folds = {
        "data.where": {"identity": ["a"]},
        "validation.split": "train",
        "validation.where": {"identity": ["b"]},
    }
    assert override(train_detector.mobilenetv2_demo(), folds).validation.split == "train"


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reaches sigma 2, got 3; data\.degradation\.blur"):
        AugmentationConfig(blur=(0.1, 3.0))
    with pytest.raises(ConfigError, match="label_smoothing"):
        DetectorConfig(label_smoothing=1.0)
    with pytest.raises(ConfigError, match="jitter and crop must be at least 0 pixels, got 0 and -1"):
        AugmentationConfig(crop=-1)
    with pytest.raises(ConfigError, match=r"crop is 64 px but the pictures have 32; set it to at most"):
        make_learner(augmentation=AugmentationConfig(crop=64))
    with pytest.raises(
        ConfigError, match=r"MesoNet reads pictures of one size, not windows of 24 px; .*crop=0"
    ):
        make_learner(net=MesoConfig.tiny(), augmentation=AugmentationConfig(crop=24))
    context = LearnerContext(batch_size=16, images_per_epoch=100, total_images=100, size=32, channels=1)
    with pytest.raises(ConfigError, match="reads RGB"):
        DetectorConfig(net=MobileNetV2Config.tiny()).build(device=CPU, context=context)


def test_the_preview_shows_each_picture_with_its_probability() -> None:
    picture = make_learner().preview(make_batch())["predictions"]
    assert picture.ndim == 3
    assert picture.shape[2] == 3


def test_the_export_needs_no_weights_file() -> None:
    config, weights = make_learner().export()["detector"]
    assert config.weights is None
    config.build().load_state_dict(weights)


def test_the_job_says_which_split_lacks_a_class(workspace: Workspace) -> None:
    source = SyntheticSource(identities=8, per_identity=1, size=24)
    facts = {source.label: {"licence": source.licence, "consent": source.consent}}
    write_version(workspace.dataset("faces"), source.samples(), sources=facts)
    job = override(train_detector.mobilenetv2_demo(), {"data.uri": "faces", "validation.uri": "faces"})
    with pytest.raises(DataError, match="faces split train has 5 real and 0 fake"):
        train_detector.run(job, workspace)


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return images.to_float(torch.from_numpy(pixels).permute(2, 0, 1)[None])


def _pixels(tensor: torch.Tensor) -> np.ndarray:
    return (tensor[0].permute(1, 2, 0).numpy() + 1) * 127.5
