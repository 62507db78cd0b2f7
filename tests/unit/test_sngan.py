"""The residual and the dense networks: counts, shapes, what a condition does, what spectral norm bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from counterfake import config
from counterfake.errors import ConfigError, DataError
from counterfake.nets import NetConfig
from counterfake.nets.conditioning import Condition
from counterfake.nets.dense_gan import DenseDiscriminator, DenseGenerator
from counterfake.nets.sngan import SIZES, ConditionalNorm, SnganDiscriminator, SnganGenerator


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_dense_networks_have_the_articles_parameters() -> None:
    assert trainable(DenseGenerator().build()) == 1_486_352
    assert trainable(DenseDiscriminator().build()) == 1_460_225


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", [0, 3])
def test_every_size_fits_both_players(size: int, classes: int) -> None:
    generator = SnganGenerator(size=size, width=2, noise_size=5, classes=classes).build()
    discriminator = SnganDiscriminator(size=size, width=2, classes=classes).build()
    told = (torch.tensor([0, 2]),) if classes else ()
    images = generator(torch.randn(2, 5), *told)
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images, *told).shape == (2,)


def test_every_layer_of_the_discriminator_is_bounded() -> None:
    discriminator = SnganDiscriminator.tiny().build()
    for _ in range(60):
        discriminator(torch.randn(2, 1, 28, 28))
    discriminator.eval()
    layers = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 3 + 3 + 2 + 1
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "net", [SnganDiscriminator.tiny(), DenseDiscriminator.tiny()], ids=["sngan", "dense"]
)
def test_an_answer_depends_on_its_own_picture_only(net: Any) -> None:
    discriminator = net.build().eval()
    images = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]), rtol=1e-4, atol=1e-5)


def test_conditional_norm_takes_scale_and_shift_from_the_class() -> None:
    layer = ConditionalNorm(2, told=3)
    nn.init.zeros_(layer.code.weight)
    layer.code.weight.data[:, 1] = torch.tensor([1.0, 1.0, 5.0, 5.0])  # class 1: twice as strong, 5 higher
    x = torch.randn(8, 2, 4, 4)
    plain = layer(x, torch.eye(3)[torch.zeros(8, dtype=torch.long)])
    told = layer(x, torch.eye(3)[torch.ones(8, dtype=torch.long)])
    torch.testing.assert_close(told, 2 * plain + 5)


def test_a_condition_is_one_hot_a_row_of_a_table_or_itself() -> None:
    classes = torch.tensor([2, 0])
    torch.testing.assert_close(Condition(3)(classes), torch.eye(3)[classes])
    table = Condition(3, 12)
    torch.testing.assert_close(table(classes), table.table[classes])
    torch.testing.assert_close(table.table.norm(dim=1), torch.ones(3))
    vector = torch.randn(2, 12)
    assert table(vector) is vector
    assert torch.equal(Condition(3, 12).table, table.table)  # without a file: the same everywhere


def test_a_condition_that_is_missing_or_of_another_length_is_refused() -> None:
    generator = SnganGenerator(size=28, width=2, noise_size=5, classes=3).build()
    with pytest.raises(
        ConfigError, match=r"draws one of 3 classes; give it classes \(N,\) or vectors \(N, 3\)"
    ):
        generator(torch.randn(2, 5))
    with pytest.raises(DataError, match=r"vectors \(N, 3\), got shape \(2, 7\)"):
        generator(torch.randn(2, 5), torch.randn(2, 7))


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="size is 48 px; an SNGAN is built for one of 28, 32, 64, 128"):
        SnganGenerator(size=48)


@pytest.mark.parametrize("cls", [SnganGenerator, SnganDiscriminator, DenseGenerator, DenseDiscriminator])
def test_configs_are_tiny_and_survive_json(cls: type[NetConfig]) -> None:
    assert trainable(cls.tiny().build()) < 20_000
    assert config.from_dict(NetConfig, config.to_dict(cls.tiny())) == cls.tiny()
