"""The linear probe: nothing but its last layer learns, and outside training it is one linear map of the features."""

from __future__ import annotations

from dataclasses import replace

import torch

from counterfake.nets.backbone import Detector
from counterfake.nets.probe import ProbeConfig


def test_only_the_linear_layer_learns_and_the_backbone_keeps_its_statistics() -> None:
    net = probe()
    before = {name: value.clone() for name, value in net.features.state_dict().items()}
    net.train()
    net(torch.rand(8, 3, 64, 64)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == [
        "head.1.weight",
        "head.1.bias",
    ]
    assert all(torch.equal(value, before[name]) for name, value in net.features.state_dict().items())


def test_it_is_mobilenets_features_and_one_linear_layer() -> None:
    net = ProbeConfig().build()
    head = 1280 + 1
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == head
    classifier = 1280 * 1000 + 1000  # what torchvision's 3,504,872 has besides
    assert sum(p.numel() for p in net.parameters()) == 3_504_872 - classifier + head


def test_in_training_the_features_are_those_of_inference() -> None:
    net, batch = probe(), torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.train().features(batch), net.eval().features(batch))


def test_the_head_is_linear_in_the_features() -> None:
    net = probe().eval()
    a, b = torch.rand(3, 320), torch.rand(3, 320)
    mixed = net.head(0.3 * a + 0.7 * b)
    torch.testing.assert_close(mixed, 0.3 * net.head(a) + 0.7 * net.head(b), atol=1e-5, rtol=1e-5)


def test_outside_training_gradients_reach_the_picture_for_heat_maps() -> None:
    picture = torch.rand(1, 3, 64, 64, requires_grad=True)
    probe().eval()(picture).sum().backward()
    assert float(picture.grad.abs().sum()) > 0


def test_the_stored_config_names_no_file() -> None:
    config = ProbeConfig.tiny()
    named = replace(config, backbone=replace(config.backbone, weights_sha256="ab"))
    assert named.without_weights() == named
    assert named.without_weights().backbone.weights is None


def probe() -> Detector:
    torch.manual_seed(0)
    return ProbeConfig.tiny().build()
