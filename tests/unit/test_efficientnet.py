"""EfficientNet: published counts, torchvision's names, squeeze and excitation."""

from __future__ import annotations

import pytest
import torch

from counterfake.nets.efficientnet import EfficientNetConfig, SqueezeExcite, efficientnet_b4


@pytest.mark.parametrize(
    ("config", "count"),
    [(EfficientNetConfig(), 5_288_548), (efficientnet_b4(), 19_341_616)],
    ids=["b0", "b4"],
)
def test_parameter_counts_are_torchvisions(config: EfficientNetConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in config.classifier().parameters()) == count


def test_names_and_shapes_are_torchvisions() -> None:
    with torch.device("meta"):
        own = efficientnet_b4().build().state_dict()
    expected = {
        "features.0.0.weight": (48, 3, 3, 3),
        "features.1.0.block.0.0.weight": (48, 1, 3, 3),
        "features.1.0.block.1.fc1.weight": (12, 48, 1, 1),
        "features.2.0.block.2.fc2.bias": (144,),
        "features.7.1.block.3.1.running_var": (448,),
        "features.8.0.weight": (1792, 448, 1, 1),
    }
    assert {name: tuple(own[name].shape) for name in expected} == expected


def test_squeeze_and_excitation_multiplies_channels_by_factors_in_0_to_1() -> None:
    layer, x = SqueezeExcite(6, 2), torch.rand(2, 6, 4, 4) + 0.1
    factor = (layer(x) / x).detach()
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(factor))
    assert 0 < float(factor.min()) <= float(factor.max()) < 1
    torch.nn.init.zeros_(layer.fc2.weight)
    torch.nn.init.zeros_(layer.fc2.bias)
    torch.testing.assert_close(layer(x), x / 2)


def test_residual_branches_are_dropped_more_often_the_later_they_come() -> None:
    net = EfficientNetConfig(width_mult=0.25, drop_path=0.2).build()
    drops = [m.drop.probability for m in net.features.modules() if hasattr(m, "drop")]
    assert drops == sorted(drops)
    assert (drops[0], drops[-1]) == (0.0, pytest.approx(0.2 * 15 / 16))
