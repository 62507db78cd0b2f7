"""ConvNeXt: published count, torchvision's names, layer norm over channels."""

from __future__ import annotations

import torch

from counterfake.nets.convnext import Block, ConvNextConfig, LayerNorm2d


def test_the_parameter_count_is_torchvisions() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ConvNextConfig().classifier().parameters()) == 28_589_128


def test_names_and_shapes_are_torchvisions() -> None:
    with torch.device("meta"):
        own = ConvNextConfig().classifier().state_dict()
    expected = {
        "features.0.0.weight": (96, 3, 4, 4),
        "features.0.1.bias": (96,),
        "features.1.0.layer_scale": (96, 1, 1),
        "features.1.0.block.0.weight": (96, 1, 7, 7),
        "features.1.0.block.2.weight": (96,),
        "features.1.0.block.3.weight": (384, 96),
        "features.2.1.weight": (192, 96, 2, 2),
        "features.7.2.block.5.weight": (768, 3072),
        "classifier.0.weight": (768,),
        "classifier.2.weight": (1000, 768),
    }
    assert {name: tuple(own[name].shape) for name in expected} == expected


def test_layer_norm_sees_the_channels_of_one_pixel() -> None:
    x = torch.randn(2, 8, 3, 5)
    out = LayerNorm2d(8, 1e-6)(x)
    torch.testing.assert_close(out.mean(dim=1), torch.zeros(2, 3, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.var(dim=1, correction=0), torch.ones(2, 3, 5), atol=1e-4, rtol=0)


def test_a_block_starts_as_almost_the_identity() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(Block(8, 0.0)(x), x, atol=1e-4, rtol=0)
