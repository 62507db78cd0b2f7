"""MobileNetV2: names and counts of the public network, its weights on known photographs, and the one-logit head."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from counterfake import images, media
from counterfake.config import from_dict, to_dict
from counterfake.errors import CheckpointError, ConfigError
from counterfake.nets import NetConfig
from counterfake.nets.backbone import ImageNetClassifier
from counterfake.nets.mobilenetv2 import MobileNetV2Config

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


def test_tensorflow_origin_pads_stride_two_on_the_far_side_only() -> None:
    """A stride-2 convolution that picks its window's first pixel returns the even pixels, not the odd ones before them."""
    conv = MobileNetV2Config(width_mult=0.25).build().features[0][0]
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, 0, 0, 0] = 1
    picture = torch.arange(64.0).view(1, 1, 8, 8).repeat(1, 3, 1, 1)
    assert torch.equal(conv(picture)[0, 0], picture[0, 0, ::2, ::2])


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
