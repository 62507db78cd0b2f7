"""The article's autoencoder: parameters, loss, resuming, and its uses against closed forms and scikit-learn."""

from __future__ import annotations

import dataclasses
import gzip
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

import jobs
from counterfake import checkpoint, dist, provenance
from counterfake.data import DataConfig
from counterfake.errors import CheckpointError, ConfigError
from counterfake.evaluation import autoencoding
from counterfake.evaluation.autoencoding import Principal, Quantiser
from counterfake.images import Preprocess
from counterfake.learners import LearnerContext
from counterfake.learners.autoencoder import AutoencoderConfig, AutoencoderLearner, corrupt, to_unit
from counterfake.loop import LoopConfig
from counterfake.nets.autoencoder import DenseAutoencoder
from counterfake.records import Sample, write_version
from counterfake.sources.idx import IdxSource
from counterfake.workspace import Workspace
from jobs import autoencoder, train_autoencoder
from jobs.benchmarks import autoencoder as benchmark
from jobs.benchmarks.harness import Spec

TINY = AutoencoderConfig(net=DenseAutoencoder.tiny(), lr=1e-2)
SIDE = TINY.net.size


class Rows:
    """What a learner needs of a data.Batch: bright squares on black, at one of a few places."""

    def __init__(self, seed: int, rows: int = 16) -> None:
        self.images = torch.from_numpy(squares(rows, seed)).permute(0, 3, 1, 2)

    def to(self, device: Any) -> Rows:
        return self

    def __len__(self) -> int:
        return len(self.images)


def squares(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pixels = np.zeros((rows, SIDE, SIDE, 1), np.uint8)
    for picture, (top, left) in zip(pixels, rng.integers(0, 2, (rows, 2)) * 4, strict=True):
        picture[top : top + 4, left : left + 4] = 200
    return pixels


def build(config: AutoencoderConfig = TINY) -> AutoencoderLearner:
    dist.seed_build(0)
    context = LearnerContext(batch_size=16, images_per_epoch=64, total_images=640, channels=1, size=SIDE)
    return config.build(device=torch.device("cpu"), context=context)


def train(learner: AutoencoderLearner, steps: int) -> list[float]:
    losses = []
    for step in range(learner.steps, learner.steps + steps):
        dist.seed_step(0, step)
        losses.append(float(learner.step(Rows(step))["bce"]))
    return losses


# -- network and learner --------------------------------------------------------------------------------------------


def test_the_articles_network_has_its_parameters() -> None:
    net = DenseAutoencoder().build()
    assert sum(p.numel() for p in net.parameters()) == 209_968
    assert [tuple(p.shape) for p in net.parameters() if p.ndim == 2] == [
        (128, 784),
        (32, 128),
        (128, 32),
        (784, 128),
    ]


def test_kernels_start_glorot_uniform_and_biases_at_zero() -> None:
    net = DenseAutoencoder().build()
    for layer in (m for m in net.modules() if isinstance(m, torch.nn.Linear)):
        limit = (6 / sum(layer.weight.shape)) ** 0.5
        assert limit * 0.99 < float(layer.weight.detach().abs().max()) <= limit
        assert not layer.bias.any()


def test_codes_are_not_negative_and_pictures_lie_between_0_and_1() -> None:
    net = TINY.net.build()
    pictures = torch.rand(5, 1, SIDE, SIDE)
    assert not (net.encode(pictures) < 0).any()
    made = net(pictures).detach()
    assert made.shape == pictures.shape
    assert 0 < float(made.min()) <= float(made.max()) < 1


def test_the_loss_is_keras_binary_cross_entropy_of_the_reconstruction() -> None:
    learner = build()
    batch = Rows(0)
    clean = to_unit(batch.images)
    expected = autoencoding.cross_entropy(learner.net(clean).detach(), clean)
    assert float(learner.step(batch)["bce"]) == pytest.approx(expected, rel=1e-5)


def test_an_empty_share_of_a_batch_changes_nothing() -> None:
    learner = build()
    before = checkpoint.weights_digest(learner.net.state_dict())
    assert float(learner.step(Rows(0, rows=0))["bce"]) == 0
    assert checkpoint.weights_digest(learner.net.state_dict()) == before


def test_training_lowers_the_loss() -> None:
    losses = train(build(), 60)
    assert losses[-1] < 0.5 * losses[0]


def test_resuming_is_not_stopping(tmp_path: Path) -> None:
    straight, stopped = build(), build()
    train(straight, 6)
    train(stopped, 3)
    checkpoint.save(tmp_path / "c", stopped.state_dict(), {})
    resumed = build()
    resumed.load_state_dict(checkpoint.load(tmp_path / "c")[0])
    train(resumed, 3)
    assert checkpoint.weights_digest(resumed.state_dict()) == checkpoint.weights_digest(straight.state_dict())


def test_a_checkpoint_of_another_network_is_one_line() -> None:
    other = build(
        dataclasses.replace(TINY, net=dataclasses.replace(TINY.net, code_size=TINY.net.code_size + 1))
    )
    with pytest.raises(CheckpointError, match="the checkpoint is of another autoencoder: ") as caught:
        build().load_state_dict(other.state_dict())
    assert "\n" not in str(caught.value)


def test_validation_is_the_mean_over_all_rows_and_counts_dead_units() -> None:
    learner = build()
    with torch.no_grad():
        learner.net.encoder[-2].bias[1] = -100.0  # this unit never fires
    batches = [Rows(0, rows=3), Rows(1, rows=13)]
    clean = torch.cat([to_unit(b.images) for b in batches])
    found = learner.validate(batches)  # type: ignore[arg-type]
    assert found["mse"] == pytest.approx(float(F.mse_loss(learner.net(clean).detach(), clean)), rel=1e-5)
    assert found["dead_units"] >= 1


def test_noise_is_clipped_has_its_spread_and_leaves_the_target_clean() -> None:
    grey = torch.full((200, 1, SIDE, SIDE), 0.5)
    noisy = corrupt(grey, 0.1)
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.05)
    wild = corrupt(grey, 5.0)
    assert (float(wild.min()), float(wild.max())) == (0.0, 1.0)
    assert corrupt(grey, 0.0) is grey


def test_sizes_that_disagree_are_one_line() -> None:
    context = LearnerContext(batch_size=4, images_per_epoch=8, total_images=8, channels=3, size=64)
    with pytest.raises(
        ConfigError, match="64 px pictures of 3 channels but the autoencoder reads 28 px of 1"
    ):
        AutoencoderConfig().build(device=torch.device("cpu"), context=context)
    with pytest.raises(ConfigError, match="at least 1"):
        DenseAutoencoder(code_size=0)


# -- figures --------------------------------------------------------------------------------------------------------


def test_principal_components_are_scikit_learns() -> None:
    from sklearn.decomposition import PCA

    rows = np.random.default_rng(0).random((200, 12)) * 0.2 + 0.4
    ours, theirs = Principal.fit(rows, 3), PCA(3).fit(rows)
    expected = theirs.inverse_transform(theirs.transform(rows))
    np.testing.assert_allclose(ours.decode(ours.encode(rows)), expected, atol=1e-10)


def test_neighbour_accuracy_is_scikit_learns() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    rows, queries = rng.standard_normal((300, 4)), rng.standard_normal((80, 4))
    classes, truth = (rows[:, 0] > 0.3).astype(int), (queries[:, 0] > 0.3).astype(int)
    expected = KNeighborsClassifier(5).fit(rows, classes).score(queries, truth)
    assert autoencoding.neighbour_accuracy(rows, classes, queries, truth, k=5) == pytest.approx(expected)


def test_quantised_codes_come_back_within_half_a_step() -> None:
    codes = np.random.default_rng(0).random((100, 6)) * [1, 10, 100, 1, 1, 0]
    quantiser = Quantiser.fit(codes, bits=8)
    packed = quantiser.pack(codes)
    assert int(packed.max()) == 255
    assert (np.abs(quantiser.unpack(packed) - codes) <= quantiser.step / 2 + 1e-9).all()


def test_bits_of_an_ideal_coder_are_the_entropy() -> None:
    packed = np.stack([np.arange(64) % 4, np.zeros(64)], axis=1).astype(np.uint16)
    assert autoencoding.entropy_bits(packed) == pytest.approx(2.0)


def test_gzip_is_counted_in_bits_per_picture() -> None:
    pictures = squares(10, 0)
    found = autoencoding.gzip_bits(pictures)
    assert found["together"] == 8 * len(gzip.compress(pictures.tobytes(), 9, mtime=0)) / 10
    assert found["alone"] > found["together"]


# -- jobs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(workspace: Workspace) -> tuple[Workspace, dict[str, Any]]:
    """A tiny autoencoder of squares, trained through the job; the class of a picture is where its square lies."""
    pixels = np.unique(squares(64, 1), axis=0)
    rng = np.random.default_rng(2)
    samples = [
        Sample(
            pixels=np.clip(picture + rng.integers(0, 40, picture.shape), 0, 255).astype(np.uint8), fake=0, class_id=i,
            source="made", split=split, path=f"{split}/{n}/{i}",
        )
        for split, count in (("train", 20), ("test", 6)) for n in range(count) for i, picture in enumerate(pixels)
    ]  # fmt: skip
    facts = {"made": {"licence": "none", "consent": "synthetic"}}
    write_version(workspace.dataset("squares"), samples, sources=facts)
    data = DataConfig(uri="squares", batch_size=16, preprocess=Preprocess(size=SIDE, channels=1))
    job = dataclasses.replace(
        train_autoencoder.ae_mnist_s3(), name="ae-squares", data=data, learner=TINY, register_as="",
        validation=dataclasses.replace(data, split="test"), loop=LoopConfig(steps=80, tick_steps=40),
    )  # fmt: skip
    return workspace, train_autoencoder.run(job, workspace)


def test_the_job_judges_against_principal_components_and_every_use_runs(
    trained: tuple[Workspace, dict[str, Any]],
) -> None:
    workspace, result = trained
    judged = result["judged"]
    assert judged["mse"] < judged["mean_picture_mse"]
    assert judged["code_size"] == 4
    assert judged["mse_under_pca"] == pytest.approx(1 - judged["mse"] / judged["pca_mse"])

    def use(name: str) -> dict[str, Any]:
        job = dataclasses.replace(jobs.preset(autoencoder, name), model=result["bundle"])
        return autoencoder.run(job, workspace)

    found = use("denoise")
    assert found["mse_denoised"] < found["mse_noisy"]
    assert use("reduce")["accuracy_codes"] > 0.9
    table = pq.read_table(use("features")["file"])
    assert (table.num_rows, table.column_names) == (24, ["id", "class_id", "code"])
    found = use("compress")["ways"]
    assert found["code"]["bits"] == 6 * 4 < found["gzip_alone"]["bits"]
    assert found["code_ideal_coder"]["bits"] <= found["code"]["bits"]
    found = use("generate")
    assert found["nearness"] > 0
    mark = provenance.read((Path(found["folder"]) / "generate.png").read_bytes())
    assert mark.digital_source_type == "compositeWithTrainedAlgorithmicMedia"


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute on a quiet machine
def test_the_articles_autoencoder_reaches_its_figures_on_mnist(
    shared_data: Path, workspace: Workspace
) -> None:
    source = IdxSource(path=str(shared_data / "mnist"), licence="MIT", consent="none")
    facts = {source.label: {"licence": source.licence, "consent": source.consent}}
    write_version(workspace.dataset("mnist"), source.samples(), sources=facts)
    job = dataclasses.replace(train_autoencoder.ae_mnist_s3(), register_as="")
    judged = train_autoencoder.run(job, workspace)["judged"]
    assert judged["bce"] <= 0.095
    assert judged["mse_under_pca"] >= 0.30


def test_a_bundle_of_another_kind_is_refused(tmp_path: Path) -> None:
    from counterfake import bundle
    from counterfake.nets.classifier import SmallClassifier

    config = SmallClassifier.tiny()
    nets = {"classifier": (config, config.build().state_dict())}
    bundle.write_nets(
        tmp_path / "b", kind="classifier", name="c", nets=nets, preprocess=Preprocess(), provenance={}
    )
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        train_autoencoder.load(tmp_path / "b")


def test_the_presets_are_those_of_the_article() -> None:
    job = jobs.preset(train_autoencoder, "ae-mnist-s3")
    assert (job.data.batch_size, job.loop.epochs, job.learner.noise) == (32, 3, 0.0)
    assert jobs.preset(train_autoencoder, "ae-mnist-copy").learner.net.code_size == 784
    assert set(autoencoder.PRESETS) == set(autoencoder.USES)


def test_our_benchmark_step_and_the_plain_one_lose_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "LOSS_STEPS", 60)
    inputs = benchmark.setting_up(types.SimpleNamespace(pictures=64, size=28), tmp_path, None)
    facts: dict[str, list[dict[str, Any]]] = {}
    for name in ("counterfake", "torch-eager"):
        specs = (
            Spec(
                benchmark="autoencoder", contestant=name, folder="", inputs=inputs, batch_size=32, size=28, threads=1,
                precision="fp32", matmul="highest", seed=seed, seconds=0.01,
            )
            for seed in (0, 1)
        )  # fmt: skip
        facts[name] = [benchmark.CONTESTANTS[name](spec).facts() for spec in specs]
    assert benchmark.conclusions(facts)["losses_agree"] == {"torch-eager": True}
