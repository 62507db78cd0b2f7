"""The classifier, and the extractors made of it: named, hashed, resized alike, refused when they are others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterfake import arrays, bundle, checkpoint, dist, extractor, provenance
from counterfake.data import DataConfig
from counterfake.errors import CheckpointError, ConfigError, DataError
from counterfake.extractor import BundleExtractor, FactoryExtractor, InceptionExtractor, MobileNetExtractor
from counterfake.images import Preprocess
from counterfake.learners import LearnerContext
from counterfake.learners.classifier import ClassifierConfig, ClassifierLearner, one_cycle
from counterfake.nets.classifier import SmallClassifier
from counterfake.nets.dcgan import DcganGenerator
from counterfake.nets.inception import InceptionV3
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.records import Sample, write_version
from counterfake.storage import file_sha256
from counterfake.workspace import Workspace
from jobs import evaluate_generator
from jobs.evaluate_generator import EvaluateGeneratorJob

NET = SmallClassifier(size=28, classes=4, width=4, features=8, dropout=0.0)
CONFIG = ClassifierConfig(net=NET, lr=1e-2, shift=1)
CPU = torch.device("cpu")


class Rows:
    """Bright quarters: the class says which."""

    def __init__(self, seed: int, rows: int = 16, classes: list[int] | None = None) -> None:
        self.class_id = torch.tensor(classes or np.random.default_rng(seed).integers(0, 4, rows).tolist())
        self.images = torch.from_numpy(quarters(self.class_id.numpy(), seed)).permute(0, 3, 1, 2)

    def to(self, device: Any) -> Rows:
        return self

    def __len__(self) -> int:
        return len(self.images)


def quarters(classes: np.ndarray, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 60, (len(classes), 28, 28, 1), dtype=np.uint8)
    for picture, c in zip(pixels, classes.clip(0, 3), strict=True):
        picture[14 * (c // 2) :, 14 * (c % 2) :][:14, :14] += 150
    return pixels


def build(config: ClassifierConfig = CONFIG) -> ClassifierLearner:
    dist.seed_build(0)
    context = LearnerContext(batch_size=16, images_per_epoch=320, total_images=640, channels=1, size=28)
    return config.build(device=CPU, context=context)


def train(learner: ClassifierLearner, steps: int) -> None:
    for step in range(learner.steps, learner.steps + steps):
        dist.seed_step(0, step)
        learner.step(Rows(step))


# -- learner --------------------------------------------------------------------------------------------------------


def test_it_learns_where_the_light_is() -> None:
    learner = build()
    train(learner, 40)
    found = learner.validate([Rows(99, rows=64)])  # type: ignore[list-item]
    assert found["accuracy"] > 0.95


def test_resuming_is_not_stopping(tmp_path: Path) -> None:
    straight, stopped = build(), build()
    train(straight, 6)
    train(stopped, 3)
    checkpoint.save(tmp_path / "c", stopped.state_dict(), {})
    resumed = build()
    resumed.load_state_dict(checkpoint.load(tmp_path / "c")[0])
    train(resumed, 3)
    assert checkpoint.weights_digest(resumed.state_dict()) == checkpoint.weights_digest(straight.state_dict())


@pytest.mark.parametrize(
    ("classes", "message"),
    [([-1, -1], "no row of the first batch has one"), ([0, 7], "has class 7 but the classifier knows 4")],
    ids=["none", "too many"],
)
def test_data_without_its_classes_is_refused(classes: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build().step(Rows(0, classes=classes))


def test_a_checkpoint_of_another_network_is_one_line() -> None:
    other = build(dataclasses.replace(CONFIG, net=dataclasses.replace(NET, width=8)))
    with pytest.raises(CheckpointError, match="the checkpoint is of another classifier: ") as caught:
        build().load_state_dict(other.state_dict())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ([None, -1], "no picture of digits has one; choose a dataset with classes"),
        ([0, 4], "digits has classes 0 to 4 but the classifier knows 0 to 3; set learner.net.classes=5"),
    ],
    ids=["none", "too many"],
)
def test_rows_it_cannot_learn_are_refused_by_their_counts(classes: list[int | None], says: str) -> None:
    with pytest.raises(DataError, match=says):
        CONFIG.admit([{"class_id": label, "rows": 3} for label in classes], "digits")
    CONFIG.admit([{"class_id": label, "rows": 3} for label in (None, 0, 3)], "digits")


def test_rows_without_a_class_do_not_count() -> None:
    learner = build()
    one, padded = Rows(0, classes=[2]), Rows(0, classes=[2, -1])
    padded.images[0] = one.images[0]
    assert learner.validate([one]) == learner.validate([padded])  # type: ignore[list-item]


def test_the_learning_rate_rises_on_a_line_and_falls_on_a_cosine_to_zero() -> None:
    values = [one_cycle(share, 0.2) for share in (0, 0.1, 0.2, 0.6, 1.0)]
    assert values == pytest.approx([0.005, 0.5025, 1.0, 0.5, 0.0], abs=1e-3)
    assert values[0] > 0


def test_sizes_that_disagree_are_one_line() -> None:
    context = LearnerContext(batch_size=4, images_per_epoch=8, total_images=8, channels=3, size=64)
    with pytest.raises(ConfigError, match="64 px pictures of 3 channels but the classifier reads 28 px of 1"):
        CONFIG.build(device=CPU, context=context)


# -- inception ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(InceptionV3(), 23_850_960), (InceptionV3(classes=1000, fid=False), 23_834_568)],
    ids=["fid", "torchvision without its auxiliary classifier"],
)
def test_inception_has_its_parameters_and_features(config: InceptionV3, parameters: int) -> None:
    net = config.build().eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    with torch.inference_mode():
        assert net.pooled(torch.zeros(1, 3, 75, 75)).shape == (1, 2048)
    names = set(net.state_dict())
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_2.bn.running_var", "Mixed_6e.branch7x7dbl_5.conv.weight",
            "Mixed_7a.branch7x7x3_4.bn.bias", "Mixed_7c.branch3x3dbl_3b.conv.weight", "fc.weight"} <= names  # fmt: skip


def test_the_two_inceptions_differ_in_their_pooling() -> None:
    torch.manual_seed(0)
    fid, plain = InceptionV3(classes=2).build().eval(), InceptionV3(classes=2, fid=False).build().eval()
    plain.load_state_dict(fid.state_dict())
    pictures = torch.rand(1, 3, 107, 107)
    with torch.inference_mode():
        assert not torch.allclose(fid.pooled(pictures), plain.pooled(pictures))


# -- extractors -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a classifier that has learned a little."""
    learner, folder = build(), tmp_path_factory.mktemp("bundles") / "classifier"
    train(learner, 40)
    bundle.write_nets(
        folder, kind="classifier", name="quarters", nets=learner.export(),
        preprocess=Preprocess(size=28, channels=1), provenance={},
    )  # fmt: skip
    return folder


def test_a_bundle_gives_its_features_and_probabilities_whatever_the_batch(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = BundleExtractor(model=str(classifier)).load(Path, CPU)
    pixels = quarters(np.arange(10) % 4)
    found = loaded(pixels)
    monkeypatch.setattr(extractor, "BATCH", 3)
    again = loaded(pixels)
    assert found.values.shape == (10, 8)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    np.testing.assert_allclose(found.values, again.values, atol=1e-5)
    assert (loaded.name, loaded.sha256) == ("quarters", bundle.read(classifier).digest)


def test_an_extractor_with_the_wrong_hash_is_one_line(classifier: Path, tmp_path: Path) -> None:
    digest = bundle.read(classifier).digest
    BundleExtractor(model=str(classifier), sha256=digest[:8]).load(Path, CPU)
    with pytest.raises(CheckpointError, match=r"quarters has SHA-256 .*, but extractor.sha256 is 0000"):
        BundleExtractor(model=str(classifier), sha256="0000").load(Path, CPU)
    weights = tmp_path / "weights.pth"
    torch.save({"x": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match=r"weights\.pth has SHA-256"):
        InceptionExtractor(weights=str(weights), sha256="0000").load(Path, CPU)
    with pytest.raises(
        CheckpointError, match=r"does not fit the network: \d+ weights are missing .* 1 are unknown"
    ):
        InceptionExtractor(weights=str(weights)).load(Path, CPU)


def test_inception_reads_a_weights_file_without_counters_and_with_an_auxiliary_head(tmp_path: Path) -> None:
    state = {k: v for k, v in InceptionV3().build().state_dict().items() if "num_batches" not in k}
    torch.save({**state, "AuxLogits.conv0.conv.weight": torch.zeros(1)}, tmp_path / "inception.pth")
    loaded = InceptionExtractor(weights=str(tmp_path / "inception.pth")).load(Path, CPU)
    assert (loaded.size, loaded.channels, loaded.name) == (299, 3, "inception-v3-2015-12-05")


def test_any_torch_network_is_an_extractor_by_its_dotted_path(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(3, 5, 8).state_dict(), tmp_path / "w.pth")
    config = FactoryExtractor(
        factory="torch.nn.Conv2d", arguments={"in_channels": 3, "out_channels": 5, "kernel_size": 8},
        weights=str(tmp_path / "w.pth"), size=16,
    )  # fmt: skip
    assert config.load(Path, CPU)(quarters(np.arange(3))).values.shape == (3, 5)
    with pytest.raises(ConfigError, match="cannot be imported"):
        dataclasses.replace(config, factory="torch.nn.Nothing").load(Path, CPU)


def test_mobilenets_features_come_from_a_named_file(tmp_path: Path) -> None:
    net = MobileNetV2Config(origin="torch").classifier()
    torch.save({name: tensor.half() for name, tensor in net.state_dict().items()}, tmp_path / "w.pth")
    config = MobileNetExtractor(weights=str(tmp_path / "w.pth"), origin="torch", size=32)
    loaded = config.load(Path, CPU)
    assert (loaded.name, loaded.sha256) == ("mobilenet-v2-torch", file_sha256(tmp_path / "w.pth"))
    pixels = quarters(np.arange(3)).repeat(3, axis=3)
    found = loaded(pixels)
    assert found.probabilities is None
    detector = MobileNetV2Config(weights=str(tmp_path / "w.pth"), origin="torch").build().eval()
    ours = extractor.resized(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), 32) / 127.5 - 1
    with torch.inference_mode():
        np.testing.assert_allclose(found.values, detector.pooled(ours).numpy(), rtol=1e-4, atol=1e-6)
    with pytest.raises(CheckpointError, match="has SHA-256"):
        dataclasses.replace(config, sha256="00").load(Path, CPU)


def test_a_weights_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match="is no file of tensors"):
        InceptionExtractor(weights=str(tmp_path / "module.pth")).load(Path, CPU)


@pytest.mark.parametrize("side", [13, 75], ids=["smaller", "larger"])
def test_pictures_are_resized_as_pillow_does_it(side: int) -> None:
    """Pillow rounds and clips between its two passes: without values to clip, single pixels differ by one."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(80, 170, (40, 40, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), np.int64)
    found = extractor.resized(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), side)
    difference = np.abs(found[0].permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.25


def test_grey_becomes_rgb_and_rgb_grey() -> None:
    rgb = torch.tensor([255.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert float(extractor.channels(rgb, 1)) == round(255 * 0.299)
    assert extractor.channels(torch.zeros(2, 1, 4, 4), 3).shape == (2, 3, 4, 4)


# -- the job --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """120 training and 60 test pictures of four classes."""
    workspace = Workspace.at(tmp_path_factory.mktemp("digits") / "runs")
    samples = []
    for split, count, seed in (("train", 120, 1), ("test", 60, 2)):
        classes = np.arange(count) % 4
        for i, pixels in enumerate(quarters(classes, seed)):
            samples.append(
                Sample(
                    pixels=pixels,
                    fake=0,
                    class_id=int(classes[i]),
                    source="made",
                    split=split,
                    path=f"{split}/{i}",
                )
            )
    write_version(
        workspace.dataset("digits"), samples, sources={"made": {"licence": "none", "consent": "synthetic"}}
    )
    return workspace


def generator(folder: Path) -> Path:
    config = DcganGenerator.tiny()
    bundle.write_nets(
        folder, kind="generator", name="tiny-gan", nets={"generator": (config, config.build().state_dict())},
        preprocess=Preprocess(size=28, channels=1), provenance={},
    )  # fmt: skip
    return folder


def job(classifier: Path, **changes: Any) -> EvaluateGeneratorJob:
    settings = {
        "extractor": BundleExtractor(model=str(classifier)), "reference": "digits", "samples": 40, "neighbours": 40,
        "batch": 16, **changes,
    }  # fmt: skip
    return EvaluateGeneratorJob(**settings)


def test_rows_are_chosen_by_content_and_read_in_that_order(digits: Workspace) -> None:
    data = DataConfig(uri=digits.dataset("digits"), split="train", preprocess=Preprocess(size=28, channels=1))
    some, every = arrays.load(data, limit=30), arrays.load(data)
    assert len(every.pixels) == 120
    assert some.rows.ids == every.rows.ids[:30] == tuple(sorted(every.rows.ids))[:30]
    np.testing.assert_array_equal(some.pixels, every.pixels[:30])
    bright = every.pixels.reshape(-1, 2, 14, 2, 14).mean(axis=(2, 4)).reshape(-1, 4).argmax(axis=1)
    np.testing.assert_array_equal(bright, every.class_id)


def test_real_pictures_are_far_better_than_an_untrained_generators(
    classifier: Path, digits: Workspace, tmp_path: Path
) -> None:
    floor = evaluate_generator.run(job(classifier, floor=True), digits)
    against = str(Path(floor["report"]).parent / "generation.json")
    made = evaluate_generator.run(
        job(classifier, model=str(generator(tmp_path / "g")), against=against), digits
    )
    assert floor["figures"]["fid"] < 0.2 * made["figures"]["fid"]
    assert floor["figures"]["classes_found"] == 4
    assert floor["figures"]["coverage"] > 0.8 > made["figures"]["coverage"]
    assert made["against"]["fid"]["ratio"] > 5
    assert {"memorisation", "kid", "is", "precision", "recall", "density"} <= set(made["figures"])
    files = {path.name for path in Path(made["report"]).parent.iterdir()}
    assert files == {"generation.json", "report.html", "samples.png", "neighbours.png"}
    marks = [
        provenance.read((Path(found["report"]).parent / f"{name}.png").read_bytes()).digital_source_type
        for found in (made, floor)
        for name in ("samples", "neighbours")
    ]
    assert marks == [
        "trainedAlgorithmicMedia",
        "compositeWithTrainedAlgorithmicMedia",
        "",
        "",
    ]  # the floor is real


def test_samples_from_elsewhere_are_judged_as_a_generators_are(
    classifier: Path, digits: Workspace, tmp_path: Path
) -> None:
    model = str(generator(tmp_path / "g"))
    made = evaluate_generator.run(job(classifier, model=model), digits)
    net = bundle.load_nets(bundle.read(tmp_path / "g"))["generator"]
    width = DcganGenerator.tiny().noise_size
    pixels = evaluate_generator.draw(net, width, job(classifier), None, lambda done: None)
    np.save(tmp_path / "theirs.npy", pixels[..., 0])
    theirs = evaluate_generator.run(job(classifier, pictures=str(tmp_path / "theirs.npy")), digits)
    assert theirs["figures"] == made["figures"]
    assert theirs["protocol"] == made["protocol"]
    assert theirs["context"]["model"] == "theirs"
    assert theirs["context"]["digest"] == file_sha256(tmp_path / "theirs.npy")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((40, 28, 28), np.float32), r"holds float32 \(40, 28, 28\); expected uint8"),
        (np.zeros((40, 28, 20), np.uint8), r"\(40, 28, 20\); expected uint8 \(N, side, side\)"),
        (np.zeros((30, 28, 28), np.uint8), "holds 30, fewer than samples=40; set samples=30"),
        (np.array([{}]), "is no readable .npy file of numbers"),
        (None, "is no readable .npy file of numbers"),
    ],
    ids=["floats", "oblong", "few", "objects", "missing"],
)
def test_a_file_of_something_else_is_refused(
    classifier: Path, digits: Workspace, tmp_path: Path, array: Any, says: str
) -> None:
    if array is not None:
        np.save(tmp_path / "x.npy", array)
    with pytest.raises(ConfigError, match=says):
        evaluate_generator.run(job(classifier, pictures=str(tmp_path / "x.npy")), digits)
    with pytest.raises(ConfigError, match="set one of them"):
        job(classifier, pictures="x.npy", floor=True)


def test_the_reference_is_extracted_once_and_the_figures_repeat(
    classifier: Path, digits: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(classifier, model=str(generator(tmp_path / "g")), reference_rows=100)
    kept = digits.cache / "features"
    before = set(kept.glob("*"))
    first = evaluate_generator.run(wanted, digits)
    assert len(set(kept.glob("*")) - before) == 1
    read: list[str] = []
    original = evaluate_generator._read
    monkeypatch.setattr(evaluate_generator, "_read", lambda *a: (read.append(a[1]), original(*a))[1])
    again = evaluate_generator.run(wanted, digits)
    assert read == ["test"]
    assert again["figures"] == first["figures"]
    assert json.loads(json.dumps(again["figures"])) == again["figures"]


def test_a_report_under_another_protocol_is_refused(
    classifier: Path, digits: Workspace, tmp_path: Path
) -> None:
    model = str(generator(tmp_path / "g"))
    first = evaluate_generator.run(job(classifier, model=model), digits)
    against = str(Path(first["report"]).parent / "generation.json")
    with pytest.raises(ConfigError, match=r"differ in samples \(30 against 40\)"):
        evaluate_generator.run(job(classifier, model=model, samples=30, against=against), digits)


def test_what_is_no_generator_is_refused(classifier: Path, digits: Workspace) -> None:
    with pytest.raises(ConfigError, match="is a classifier; evaluate-generator judges generators"):
        evaluate_generator.run(job(classifier, model=str(classifier)), digits)
    with pytest.raises(ConfigError, match="model is not set"):
        evaluate_generator.run(job(classifier), digits)


def test_a_conditional_generator_is_asked_for_every_class_alike(classifier: Path) -> None:
    class Asked(torch.nn.Module):
        def forward(self, noise: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            pixels = torch.from_numpy(quarters(classes.numpy())).permute(0, 3, 1, 2)
            return pixels.float() / 127.5 - 1

    asked = np.arange(40) % 4
    pixels = evaluate_generator.draw(Asked(), 8, job(classifier), asked, lambda count: None)
    found = BundleExtractor(model=str(classifier)).load(Path, CPU)(pixels)
    assert evaluate_generator.generation.asked_accuracy(found.probabilities, asked)["value"] > 0.9
