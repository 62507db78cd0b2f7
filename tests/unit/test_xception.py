"""Xception: published count, the names of the public port, sides that valid padding gives."""

from __future__ import annotations

import pytest
import torch

from counterfake.nets.xception import Block, XceptionConfig


def test_the_parameter_count_is_the_papers() -> None:
    with torch.device("meta"):
        net = XceptionConfig().classifier()
    assert (
        sum(p.numel() for p in net.parameters()) == 22_855_952
    )  # table 3 of the paper, and Keras' trainable ones
    statistics = sum(b.numel() for name, b in net.named_buffers() if "running" in name)
    assert 22_855_952 + statistics == 22_910_480  # what Keras prints as total


def test_names_and_shapes_are_the_public_ports() -> None:
    with torch.device("meta"):
        own = XceptionConfig().build().features.state_dict()
    expected = {
        "conv1.weight": (32, 3, 3, 3),
        "block1.rep.0.conv1.weight": (64, 1, 3, 3),
        "block1.skip.weight": (128, 64, 1, 1),
        "block2.rep.1.pointwise.weight": (128 * 2, 128, 1, 1),
        "block12.rep.4.pointwise.weight": (1024, 728, 1, 1),
        "block11.rep.8.running_mean": (728,),
        "conv4.pointwise.weight": (2048, 1536, 1, 1),
        "bn4.weight": (2048,),
    }
    assert {name: tuple(own[name].shape) for name in expected} == expected


@pytest.mark.parametrize(("size", "side"), [(299, 10), (256, 8), (64, 2)])
def test_299_pixels_become_10(size: int, side: int) -> None:
    with torch.inference_mode():
        maps = XceptionConfig.tiny().build().eval().features(torch.zeros(1, 3, size, size))
    assert maps.shape[2:] == (side, side)


def test_a_block_does_not_change_the_input_that_its_shortcut_reads() -> None:
    block, x = Block(8, (8, 8, 8), 1).eval(), torch.randn(1, 8, 6, 6)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)
