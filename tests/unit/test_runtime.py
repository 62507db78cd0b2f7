"""Runtimes beside torch: the same answers from one export, a record that is believed only where it can be followed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterfake import bundle as bundles
from counterfake import locks, media, predictor, runtime
from counterfake.data import DataConfig
from counterfake.errors import CheckpointError, ConfigError, DataError
from counterfake.images import Preprocess, to_float
from counterfake.nets import NetConfig, mobilenetv2
from counterfake.nets.convnext import ConvNextConfig
from counterfake.nets.dense_gan import DenseDiscriminator
from counterfake.nets.efficientnet import EfficientNetConfig
from counterfake.nets.frequency import FrequencyConfig
from counterfake.nets.gan_discriminator import GanDiscriminatorConfig
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.nets.probe import ProbeConfig
from counterfake.nets.resnet import ResNetConfig
from counterfake.nets.xception import XceptionConfig
from counterfake.predictor import Decoded
from counterfake.records import Dataset, Sample, SplitRule, write_version
from counterfake.registry import Registry
from counterfake.runtime import CANDIDATES, TORCH, Candidate
from counterfake.workspace import Workspace
from jobs import optimise
from jobs.optimise import OptimiseJob

ORT, OPENVINO = Candidate(library="onnxruntime"), Candidate(library="openvino")


def needs(candidate: Candidate) -> None:
    libraries = (candidate.library, *(("onnx", "onnxruntime") if candidate.precision == "int8" else ()))
    if reason := runtime.missing(*libraries):
        pytest.skip(reason)


def settled(config: NetConfig, side: int, channels: int = 3) -> torch.nn.Module:
    """Random weights with the batch statistics of random pictures, so that logits differ."""
    torch.manual_seed(0)
    net = config.build()
    with torch.no_grad():
        for _ in range(5):
            net(torch.rand(16, channels, side, side) * 2 - 1)
    return net.eval()


def pictures(count: int, side: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (count, side // 4, side // 4, channels)).repeat(4, axis=1).repeat(4, axis=2)
    noise = rng.normal(0, 20, coarse.shape)  # a spectrum without zeros, whose phase would be any number
    return np.clip(coarse + noise, 0, 255).astype(np.uint8)


def detector(folder: Path, config: NetConfig, side: int, channels: int = 3) -> bundles.Bundle:
    return bundles.write_nets(
        folder, kind="detector", name="net", nets={"detector": (config, settled(config, side, channels).state_dict())},
        preprocess=Preprocess(size=side, channels=channels), provenance={},
    )  # fmt: skip


def recorded(folder: Path, candidate: Candidate, side: int = 32) -> bundles.Bundle:
    """A bundle that asks for this candidate."""
    plain = detector(folder / "plain", MobileNetV2Config.tiny(), side)
    model = runtime.export(next(iter(bundles.load_nets(plain).values())), side, 3)
    if candidate.precision == "int8":
        model = runtime.quantised(model, pictures(16, side))
    record = {"cpu": {"library": candidate.library, "precision": candidate.precision, "file": candidate.file}}
    return bundles.with_runtime(plain, folder / "fast", record, {candidate.file: model})


@pytest.mark.parametrize("candidate", [ORT, OPENVINO], ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("config", "side", "channels"),
    [
        (MobileNetV2Config.tiny(), 32, 3),
        (dataclasses.replace(MobileNetV2Config.tiny(), mirror=True), 32, 3),
        (ResNetConfig.tiny(), 32, 3),
        (ConvNextConfig.tiny(), 64, 3),
        (EfficientNetConfig.tiny(), 64, 3),
        (XceptionConfig.tiny(), 64, 3),
        (FrequencyConfig.tiny(), 32, 3),
        (ProbeConfig.tiny(), 32, 3),
        (GanDiscriminatorConfig(discriminator=DenseDiscriminator.tiny()), 28, 1),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, NetConfig) else None,
)
def test_an_export_answers_as_torch_does(
    candidate: Candidate, config: NetConfig, side: int, channels: int
) -> None:
    needs(candidate)
    net, images = settled(config, side, channels), pictures(5, side, channels)
    engine = runtime.opened(candidate, runtime.export(net, side, channels), 1)
    with torch.inference_mode():
        expected = net(to_float(runtime.as_tensor(images))).double().sigmoid().numpy()
    np.testing.assert_allclose(runtime.probabilities(engine, images), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
def test_a_bundle_is_answered_as_it_records_whatever_else_is_in_the_batch(
    candidate: Candidate, tmp_path: Path
) -> None:
    needs(candidate)
    made = recorded(tmp_path, candidate)
    loaded, eager = predictor.load(made.folder), predictor.load(made.folder, eager=True)
    assert isinstance(loaded, predictor.NetPredictor)
    assert (loaded.runtime, eager.runtime) == (candidate.name, "torch-fp32")  # type: ignore[union-attr]
    images = [Decoded(pixels=pixels) for pixels in pictures(11, 32)]
    found = loaded.predict(images)
    allowed = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.25}[candidate.precision]  # nothing is learnt yet
    np.testing.assert_allclose(found, eager.predict(images), atol=allowed, rtol=0)
    alone = np.concatenate([loaded.predict([image]) for image in images])
    np.testing.assert_allclose(found, alone, atol=1e-5, rtol=0)
    assert loaded.heatmap(images[0]) is not None  # by torch, which is still there


def test_two_threads_do_not_mix_their_answers(tmp_path: Path) -> None:
    needs(OPENVINO)
    from concurrent.futures import ThreadPoolExecutor

    loaded = predictor.load(recorded(tmp_path, OPENVINO).folder)
    images = [Decoded(pixels=pixels) for pixels in pictures(16, 32)]
    expected = loaded.predict(images)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: float(loaded.predict([image])[0]), images * 8))
    np.testing.assert_allclose(found, np.tile(expected, 8), atol=1e-5, rtol=0)


def test_without_the_library_torch_answers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs(ORT)
    made = recorded(tmp_path, ORT)
    monkeypatch.setattr(runtime, "missing", lambda *names: f"{names[0]} is not installed")
    with caplog.at_level(logging.INFO, "counterfake.predictor"):
        loaded = predictor.load(made.folder)
    assert loaded.runtime == "torch-fp32"  # type: ignore[union-attr]
    assert "asks for onnxruntime-fp32, but onnxruntime is not installed" in caplog.text


def test_the_service_says_what_runs_each_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What /v1/models shows of a member."""
    from serving.models import _member

    needs(OPENVINO)
    made = recorded(tmp_path, OPENVINO)
    member = _member("net", made.folder)
    assert (member.runtime, member.runtime_reason) == ("openvino-fp32", "as the bundle records")
    monkeypatch.setattr(runtime, "missing", lambda *names: f"{names[0]} is not installed")
    member = _member("net", made.folder)
    assert member.runtime == "torch-fp32"
    assert "openvino is not installed" in member.runtime_reason


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"library": "onnxruntime"}, "incomplete"),
        ({"library": "shell", "precision": "fp32", "file": "net.onnx"}, "unknown"),
        ({"library": "openvino", "precision": "fp32", "file": "../net.onnx"}, "unknown"),
        ({"library": "openvino", "precision": "fp32", "file": "net.onnx"}, "unknown"),  # not in the bundle
    ],
    ids=["incomplete", "library", "path", "absent"],
)
def test_a_record_of_another_form_is_refused(record: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        runtime.select({"files": {}, "runtime": {"cpu": record}})


def test_a_record_for_the_cpu_says_nothing_about_another_device() -> None:
    record = {"library": "openvino", "precision": "fp32", "file": "net.onnx"}
    chosen, why = runtime.select({"files": {}, "runtime": {"cpu": record}}, "cuda")
    assert chosen == TORCH
    assert "no choice for cuda" in why


def test_an_altered_export_is_not_opened(tmp_path: Path) -> None:
    made = recorded(tmp_path, ORT)
    path = made.folder / "net.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"net\.onnx was altered"):
        predictor.load(made.folder)


def test_a_new_record_replaces_the_old_one_and_its_file(tmp_path: Path) -> None:
    made = recorded(tmp_path, ORT)
    again = bundles.with_runtime(made, tmp_path / "again", {"cpu": {"library": "torch"}}, {})
    assert not [name for name in again.info["files"] if name.endswith(".onnx")]
    assert again.info["files"]["weights.safetensors"] == made.info["files"]["weights.safetensors"]


def test_a_net_without_an_onnx_form_is_left_to_torch() -> None:
    class Strange(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(images[:, 0, :4, :4]).real.sum(dim=1)

    with pytest.raises(ConfigError, match="no ONNX form"):
        runtime.export(Strange(), 8, 3)


# -- the job --------------------------------------------------------------------------------------------------------


def faces(count: int = 160) -> Iterator[Sample]:
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = np.clip(rng.normal(100 + 50 * (i % 2), 40, (32, 32, 3)), 0, 255).astype(np.uint8)
        yield Sample(image=media.encode(pixels, "png"), fake=i % 2, source="made")


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace with pictures and a detector bundle that was "trained" on them."""
    workspace = Workspace.at(tmp_path / "runs")
    uri = workspace.dataset("made")
    version = write_version(
        uri, faces(), sources={"made": {"licence": "CC0", "consent": "synthetic"}},
        splits=SplitRule(fractions={"train": 0.5, "validation": 0.5}),
    )  # fmt: skip
    made = detector(tmp_path / "plain", MobileNetV2Config.tiny(), 32)
    bundles.write_nets(
        tmp_path / "net", kind="detector", name="net",
        nets={"detector": (MobileNetV2Config.tiny(), next(iter(bundles.load_nets(made).values())).state_dict())},
        preprocess=Preprocess(size=32),
        provenance={"dataset": {"uri": uri, "version": version.number, "digest": version.digest}},
    )  # fmt: skip
    return workspace


def test_a_locked_split_chooses_no_runtime(place: Workspace, tmp_path: Path) -> None:
    dataset = Dataset.open(place.dataset("made"))
    locks.lock(dataset, dataset.version(), ["validation"])
    with pytest.raises(DataError, match=r"split validation of .* is locked and cannot be used to choose"):
        optimise.run(OptimiseJob(model=str(tmp_path / "net")), place)


def test_the_job_registers_what_was_measured(place: Workspace, tmp_path: Path) -> None:
    needs(ORT)
    job = OptimiseJob(model=str(tmp_path / "net"), seconds=0.02, turns=1, range_pictures=8, max_changed=1.0, max_auc_loss=1.0)  # fmt: skip
    result = optimise.run(job, place)
    made = bundles.read(Registry.at(place).fetch(result["registered"], place.cache))
    record = made.info["runtime"]["cpu"]
    assert result["registered"] == "net/1"
    assert json.loads(json.dumps(result["record"])) == record
    assert {"torch-fp32", "onnxruntime-fp32", "onnxruntime-int8"} <= set(record["measured"]) | set(
        record["absent"]
    )
    assert record["measured"]["torch-fp32"]["max_difference"] == 0
    assert record["measured"]["onnxruntime-fp32"]["max_difference"] <= optimise.PARITY
    for found in record["measured"].values():
        assert {"changed", "auc", "auc_loss", "alone_against_batch", "refused"} <= set(found)
        assert all(rate > 0 for rate in found["pictures_per_second"].values())
    assert record["held_out"]["split"] == "validation"
    assert predictor.load(made.folder).runtime == result["chosen"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("precision", "found", "message"),
    [
        ("fp32", {"max_difference": 2e-4}, "differs from torch by 2.0e-04, at most 0.0001"),
        ("bf16", {"max_difference": 0.1}, None),
        ("int8", {"changed": 0.02}, "changes 2.00% of the decisions"),
        ("int8", {"auc_loss": 0.01}, "loses 0.0100 AUC"),
        ("fp32", {"alone_against_batch": 1e-3}, "alone and in a batch"),
    ],
    ids=["parity", "bf16", "decisions", "auc", "batch"],
)
def test_what_costs_too_much_is_refused(precision: Any, found: dict[str, float], message: str | None) -> None:
    none = {"max_difference": 0.0, "changed": 0.0, "auc_loss": 0.0, "alone_against_batch": 0.0}
    reason = optimise.refusal(OptimiseJob(), Candidate(library="openvino", precision=precision), none | found)
    assert reason is None if message is None else message in str(reason)


def test_what_changes_is_counted_in_decisions_and_auc() -> None:
    found = optimise.change(
        np.array([0.2, 0.6, 0.9, 0.4]), np.array([0.2, 0.4, 0.9, 0.4]), np.array([0, 1, 1, 0])
    )
    assert found["changed"] == 0.25
    assert found["max_difference"] == pytest.approx(0.2)
    assert found["mean_difference"] == pytest.approx(0.05)
    assert found["auc_loss"] == pytest.approx(0.125)  # the second is tied with the last now


def test_there_is_nothing_to_choose_for_an_unknown_candidate() -> None:
    with pytest.raises(ConfigError, match="candidates are onnxruntime-fp32, onnxruntime-int8"):
        OptimiseJob(candidates=("tensorrt",), data=DataConfig())


def test_the_benchmark_runs_every_runtime_on_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.benchmark import BenchmarkJob
    from jobs.benchmarks import inference
    from jobs.benchmarks.harness import Spec
    from jobs.console import Console

    needs(Candidate(library="onnxruntime", precision="int8"))
    monkeypatch.setattr(mobilenetv2, "MobileNetV2Config", MobileNetV2Config.tiny)
    job = BenchmarkJob(name="inference", pictures=2, size=32, batch_size=2)
    inputs = inference.setting_up(job, tmp_path, Console(quiet=True))
    found = {}
    for name, make in inference.CONTESTANTS.items():
        if name == "counterfake" or not runtime.missing(name.partition("-")[0]):
            spec = Spec(
                benchmark="inference", contestant=name, folder=str(tmp_path), inputs=inputs, batch_size=2, size=32, threads=1,
                precision="fp32", matmul="highest", seed=0, seconds=0.01,
            )  # fmt: skip
            contestant = make(spec)
            assert contestant.round() == 2
            found[name] = np.array(contestant.facts()["probabilities"])  # type: ignore[misc]
    # statistics of two pictures: fp32 is 1e-3 from fp64 on this net
    np.testing.assert_allclose(found["onnxruntime-fp32"], found["torch-eager"], atol=5e-3)
    assert predictor.load(Path(inputs["recorded"])).runtime.endswith("-int8")  # type: ignore[union-attr]
