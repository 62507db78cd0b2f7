"""Depthwise convolution: the function of nn.Conv2d, and its derivatives where bf16 takes its own way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from counterfake.nets.depthwise import Depthwise, depthwise

SHAPES = pytest.mark.parametrize(
    ("kernel", "stride", "side"), [(3, 1, 9), (3, 2, 16), (3, 2, 9), (5, 2, 16), (5, 1, 8)]
)


@SHAPES
def test_it_is_the_convolution_of_torch(kernel: int, stride: int, side: int) -> None:
    torch.manual_seed(0)
    ours = Depthwise(6, kernel, stride)
    theirs = nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6, bias=False)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(2, 6, side, side)
    assert torch.equal(ours(maps), theirs(maps))
    assert ours(maps).shape[2] == -(-side // stride)


@SHAPES
def test_in_bf16_it_has_the_derivatives_of_fp32(kernel: int, stride: int, side: int) -> None:
    torch.manual_seed(0)
    layer = Depthwise(8, kernel, stride)
    maps = torch.randn(4, 8, side, side).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(maps)
    assert out.dtype == torch.bfloat16
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, [maps, layer.weight], gradient)
    exact = torch.autograd.grad(
        depthwise(maps.float(), layer.weight, stride), [maps, layer.weight], gradient.float()
    )
    for one, other in zip(found, exact, strict=True):
        scale = float(other.float().abs().max())
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-7, atol=2**-7 * scale)


def test_frozen_layers_hand_on_the_derivatives_of_their_maps_alone() -> None:
    torch.manual_seed(0)
    layer = Depthwise(8, 3, 2).requires_grad_(False)
    maps = torch.randn(4, 8, 16, 16).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(maps).sum().backward()
    assert layer.weight.grad is None
    assert maps.grad is not None
    assert maps.grad.abs().sum() > 0
