"""The article's networks: counts, shapes, Keras conventions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from counterfake import config
from counterfake.errors import ConfigError
from counterfake.nets import NetConfig, dcgan
from counterfake.nets.dcgan import SIZES, DcganDiscriminator, DcganGenerator, Dropout


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_generator_has_the_articles_parameters() -> None:
    generator = DcganGenerator().build()
    statistics = sum(b.numel() for name, b in generator.named_buffers() if "num_batches" not in name)
    assert trainable(generator) == 2_305_472
    assert trainable(generator) + statistics == 2_330_944


def test_discriminator_has_the_articles_parameters() -> None:
    assert trainable(DcganDiscriminator().build()) == 212_865


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_fits_both_players(size: int, channels: int) -> None:
    generator = DcganGenerator(size=size, channels=channels, width=2, noise_size=5).build()
    discriminator = DcganDiscriminator(size=size, channels=channels, width=2).build()
    images = generator(torch.randn(3, 5))
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (3,)


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="size is 48 px; a DCGAN is built for one of 28, 32, 64, 128"):
        DcganGenerator(size=48)


def test_keras_conventions() -> None:
    generator, discriminator = DcganGenerator().build(), DcganDiscriminator().build()
    assert (generator.dense_norm.eps, generator.dense_norm.momentum) == (1e-3, 0.01)
    assert all(conv.bias is None for conv in generator.convs)
    assert all((conv.bias == 0).all() for conv in discriminator.convs)
    fan = (64 + 128) * 25
    limit = (6 / fan) ** 0.5  # Glorot uniform
    kernel = discriminator.convs[1].weight
    assert kernel.abs().max() <= limit
    assert kernel.std().item() == pytest.approx(limit / 3**0.5, rel=0.01)


def test_same_padding_puts_one_pixel_before_and_two_after() -> None:
    """Keras: out[i] of a stride-2 5x5 kernel on 28 pixels reads inputs 2i-1 … 2i+3."""
    discriminator = DcganDiscriminator(width=1, dropout=0.0, slope=1.0).build()
    conv = discriminator.convs[0]
    nn.init.zeros_(conv.weight)
    conv.weight.data[0, 0, 0, 0] = 1.0  # the first tap
    image = torch.arange(28.0 * 28).view(1, 1, 28, 28)
    out = conv(nn.functional.pad(image, (1, 2, 1, 2)))
    assert out.shape == (1, 1, 14, 14)
    assert out[0, 0, 1, 1] == image[0, 0, 1, 1]  # 2 * 1 - 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dropout_drops_its_share_and_keeps_the_mean(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.ones(32, 16, 20, 20).to(memory_format=layout).requires_grad_()
    out = Dropout(0.3)(x)
    out.sum().backward()
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(x.grad, out.detach())  # of ones: the mask itself
    assert out.stride() == x.stride()


def test_dropout_is_seeded_and_silent_in_evaluation() -> None:
    layer, x = Dropout(0.5), torch.randn(7, 3)  # 21 elements: not a multiple of four
    draws = [(torch.manual_seed(1), layer(x))[1] for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_masks_of_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    mask = (Dropout(0.5)(torch.ones(400_000)) > 0).float().view(-1, 4) - 0.5  # four slices of one draw
    correlation = (mask.T @ mask / len(mask)) * 4
    assert (correlation - torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize("spectral", [False, True])
def test_convolutions_as_products_with_patches_are_the_same_function(
    spectral: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    discriminator = DcganDiscriminator(width=3, dropout=0.0, spectral_norm=spectral).build().double().eval()
    generator = DcganGenerator(width=3, noise_size=5).build().double().eval()
    noise = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    inputs = [noise, *generator.parameters(), *discriminator.parameters()]

    def derivatives() -> list[torch.Tensor]:
        """The logits, their gradients, and those of a gradient penalty."""
        logits = discriminator(generator(noise))
        first = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs, allow_unused=True)
        return [logits, *first, *(g for g in second if g is not None)]

    assert dcgan._as_patches(1, noise), "the fast way is not taken"
    assert discriminator(torch.zeros(0, 1, 28, 28, dtype=torch.double)).shape == (0,)  # a rank without reals
    fast = derivatives()
    monkeypatch.setattr(dcgan, "_as_patches", lambda *_: False)
    plain = derivatives()
    assert len(fast) == len(plain) > len(inputs)
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_configs_survive_json() -> None:
    for net in (DcganGenerator(size=64, channels=3), DcganDiscriminator(spectral_norm=True)):
        assert config.from_dict(NetConfig, config.to_dict(net)) == net


def test_spectral_norm_bounds_the_layers() -> None:
    discriminator = DcganDiscriminator(width=2, spectral_norm=True).build()
    for _ in range(30):
        discriminator(torch.randn(2, 1, 28, 28))
    kernel = discriminator.eval().convs[1].weight.flatten(1)
    assert torch.linalg.matrix_norm(kernel, 2).item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("cls", [DcganGenerator, DcganDiscriminator])
def test_tiny_is_tiny(cls: type[NetConfig]) -> None:
    assert trainable(cls.tiny().build()) < 20_000
