"""Residual networks: published counts, torchvision's names, and resolutions."""

from __future__ import annotations

import pytest
import torch

from counterfake.nets.resnet import BasicBlock, ResNetConfig, resnet50


@pytest.mark.parametrize(
    ("config", "count"), [(ResNetConfig(), 11_689_512), (resnet50(), 25_557_032)], ids=["18", "50"]
)
def test_parameter_counts_are_torchvisions(config: ResNetConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in config.classifier().parameters()) == count


def test_names_and_shapes_are_torchvisions() -> None:
    with torch.device("meta"):
        own = resnet50().build().features.state_dict()
    expected = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_mean": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer4.2.bn3.bias": (2048,),
    }
    assert {name: tuple(own[name].shape) for name in expected} == expected
    assert len(own) == 318  # torchvision's resnet50 has 320 entries, with fc.weight and fc.bias


@pytest.mark.parametrize(("small", "side"), [(False, 2), (True, 8)])
def test_the_small_stem_keeps_four_times_the_resolution(small: bool, side: int) -> None:
    net = ResNetConfig(blocks=(1, 1, 1), width=4, small=small).build().eval()
    assert net.features(torch.zeros(1, 3, 32, 32)).shape == (1, 16, side, side)


def test_a_block_whose_branch_is_silent_passes_its_input_on() -> None:
    block = BasicBlock(4, 4, 1).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x)
