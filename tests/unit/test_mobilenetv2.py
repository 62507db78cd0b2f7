"""MobileNetV2: names and counts of the public network, its weights on known photographs, and the one-logit head."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from counterfake import images, media
from counterfake.config import from_dict, to_dict
from counterfake.errors import CheckpointError, ConfigError
from counterfake.nets import NetConfig, mobilenetv2
from counterfake.nets.backbone import ImageNetClassifier
from counterfake.nets.mobilenetv2 import MobileNetV2Config, Origin

TOP1 = {  # file -> words of the class its name promises
    "bird": "chickadee",
    "cat": "Egyptian cat",
    "dragonfly": "dragonfly",
    "grace_hopper": "military uniform",
    "hot_dog": "hotdog",
    "parrot": "macaw",
    "sunflower": "daisy",  # ImageNet has no sunflower; the nearest of its flowers
}


@pytest.fixture(scope="module")
def weights(shared_data: Path) -> Path:
    return _existing(shared_data / "weights" / "mobilenet_v2_imagenet_fp16.pth")


@pytest.fixture(scope="module")
def classifier(weights: Path) -> ImageNetClassifier:
    return MobileNetV2Config(weights=str(weights)).classifier().eval()


def test_the_public_network_has_its_published_number_of_parameters() -> None:
    classifier = MobileNetV2Config().classifier()
    assert sum(p.numel() for p in classifier.parameters()) == 3_504_872  # torchvision.models.mobilenet_v2


def test_the_head_is_dense_256_batch_norm_dropout_and_one_logit() -> None:
    net = MobileNetV2Config().build()
    assert sum(p.numel() for p in net.head.parameters()) == 1280 * 256 + 256 + 2 * 256 + 256 + 1
    assert net.eval()(torch.zeros(2, 3, 96, 96)).shape == (2,)


@pytest.mark.parametrize("name", TOP1)
def test_the_given_weights_recognise_known_photographs(
    classifier: ImageNetClassifier, shared_data: Path, name: str
) -> None:
    folder = shared_data / "weights"
    labels = _existing(folder / "imagenet_labels_1001.txt").read_text().splitlines()
    pixels = media.decode(_existing(folder / "check_photos" / f"{name}.jpg").read_bytes())
    square = images.Preprocess(size=224, crop="center").apply(pixels)
    tensor = torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        top = int(classifier(images.to_float(tensor)).argmax())
    assert TOP1[name] in labels[top + 1]  # the file starts with "background", which these weights leave out


def test_a_detector_starts_from_the_given_features_and_records_their_digest(weights: Path) -> None:
    config = MobileNetV2Config(weights=str(weights))
    net, given = config.build(), torch.load(weights, weights_only=True)
    name = "features.18.0.weight"
    assert torch.equal(net.state_dict()[name], given[name].float())
    stored = config.without_weights()
    assert stored.weights is None
    assert stored.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    stored.build().load_state_dict(net.state_dict())  # needs no file


def test_weights_that_do_not_fit_are_refused(weights: Path, tmp_path: Path) -> None:
    both_shapes = r"do not fit.*expected \(16, 3, 3, 3\), it has shape \(32, 3, 3, 3\)"
    with pytest.raises(CheckpointError, match=both_shapes):
        MobileNetV2Config(weights=str(weights), width_mult=0.5).build()
    with pytest.raises(CheckpointError, match="expected abc"):
        MobileNetV2Config(weights=str(weights), weights_sha256="abc").build()
    with pytest.raises(CheckpointError, match="cannot be read"):
        MobileNetV2Config(weights=str(tmp_path / "none.pth")).build()


@pytest.mark.parametrize("origin", ["tensorflow", "torch"])
@pytest.mark.parametrize("size", [64, 33])
def test_the_layers_are_those_of_keras_or_torchvision(origin: Origin, size: int) -> None:
    """Keras pads (0, 1) before a stride of 2 where the side is even; all else is padded alike on both sides."""
    torch.manual_seed(0)
    net = MobileNetV2Config(width_mult=0.25, origin=origin).build().features.double().eval()
    for statistic in net.buffers():  # so that batch norm does something, and differs by channel
        if statistic.is_floating_point():
            statistic.uniform_(0.5, 1.5)
    pictures = torch.rand(2, 3, size, size, dtype=torch.double) * 2 - 1

    def plain(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(conv, mobilenetv2.Conv3x3):
            return conv(x)
        far_only = origin == "tensorflow" and conv.stride[0] == 2 and x.shape[-1] % 2 == 0
        x = nn.functional.pad(x, (0, 1, 0, 1) if far_only else (1, 1, 1, 1))
        return nn.functional.conv2d(x, conv.weight, stride=conv.stride, groups=conv.groups)

    def through(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, mobilenetv2.InvertedResidual):
            y = through(layer.conv, x)
            return x + y if layer.residual else y
        if isinstance(layer, nn.Sequential):
            for inner in layer:
                x = through(inner, x)
            return x
        return plain(layer, x)

    ours, theirs = net(pictures), through(net, pictures)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    weights = list(net.parameters())
    for one, other in zip(
        torch.autograd.grad(ours.square().sum(), weights),
        torch.autograd.grad(theirs.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("size", "stride", "side"), [(64, 2, 2), (64, 1, 4), (32, 1, 2), (33, 2, 2)])
def test_any_side_from_32_pixels_works(size: int, stride: int, side: int) -> None:
    net = MobileNetV2Config(width_mult=0.25, hidden=8, stem_stride=stride).build().eval()
    maps = net.features(torch.zeros(1, 3, size, size))
    assert maps.shape[2] in (side, side - 1)
    assert net(torch.zeros(1, 3, size, size)).isfinite().all()


def test_a_picture_scores_the_same_whatever_its_batch_mates() -> None:
    torch.manual_seed(0)
    net = MobileNetV2Config.tiny().build().eval()
    batch = torch.rand(5, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        together, alone = net(batch), torch.cat([net(row[None]) for row in batch])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_the_config_survives_its_dictionary() -> None:
    config = MobileNetV2Config(width_mult=0.5, dropout=0.4)
    assert from_dict(NetConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="stem_stride"):
        MobileNetV2Config(stem_stride=3)


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is not in the test data")
    return path
