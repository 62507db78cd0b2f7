"""The article's networks: counts, shapes, Keras conventions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from counterfake import config
from counterfake.errors import ConfigError
from counterfake.nets import NetConfig, dcgan
from counterfake.nets.dcgan import SIZES, DcganDiscriminator, DcganGenerator, LeakyDropout


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


@pytest.mark.parametrize("judge", [None, "map", "projection"])
@pytest.mark.parametrize(("spectral", "training"), [(False, True), (False, False), (True, False)])
def test_the_discriminator_is_that_of_keras(judge: str | None, spectral: bool, training: bool) -> None:
    """Keras' "same" for a 5x5 kernel of stride 2 puts one pixel before an even size and two after it, and flattens."""
    torch.manual_seed(0)
    told = {"classes": 3, "judge": judge} if judge else {}
    net = DcganDiscriminator(width=3, dropout=0.0, spectral_norm=spectral, **told).build().train(training)
    pictures = torch.randn(4, 1, 28, 28, requires_grad=True)
    classes = torch.tensor([2, 0, 1, 2])

    def as_keras() -> torch.Tensor:
        code = net.code(net.condition(classes)) if judge else None
        x = torch.cat([pictures, code.view(4, 1, 28, 28)], dim=1) if judge == "map" else pictures
        for conv in net.convs:
            x = nn.functional.leaky_relu(conv(nn.functional.pad(x, (1, 2, 1, 2))), 0.3)
        logits = net.dense(x.flatten(1)).squeeze(1)
        return logits + (code * x.mean(dim=(2, 3))).sum(dim=1) if judge == "projection" else logits

    inputs = [pictures, *net.parameters()]
    ours, keras = net(pictures, *([classes] if judge else [])), as_keras()
    torch.testing.assert_close(ours, keras, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(keras.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dropout_drops_its_share_and_keeps_the_mean(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.ones(32, 16, 20, 20).to(memory_format=layout).requires_grad_()
    shares = []
    for _ in range(40):  # each call drops 76 or 77 of 256
        out = LeakyDropout(0.2, 0.3)(x)
        shares.append((out == 0).float().mean().item())
        assert out.mean().item() == pytest.approx(1.0, abs=0.01)
        assert out.stride() == x.stride()
    assert all(0.290 < share < 0.307 for share in shares)
    assert np.mean(shares) == pytest.approx(0.3, abs=0.001)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out.detach())  # of ones: the mask itself


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.999])
def test_dropout_has_the_slope_and_the_derivatives_of_leaky_relu(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 50, dtype=torch.double, requires_grad=True)
    out = LeakyDropout(0.2, probability)(x)
    kept = out != 0
    scale = (out / nn.functional.leaky_relu(x, 0.2))[kept]
    torch.testing.assert_close(scale, scale[0].expand_as(scale))  # one scale for a call
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert torch.equal(slope[kept] > 0.5 * scale[0], x[kept] > 0)
    torch.testing.assert_close(slope.detach() * x.detach(), out.detach())
    (second,) = torch.autograd.grad((slope * x).sum(), x)  # as a gradient penalty takes it
    torch.testing.assert_close(second, slope)


def test_dropout_is_seeded_and_silent_in_evaluation() -> None:
    layer, x = LeakyDropout(0.2, 0.5), torch.randn(7, 3)  # 21 elements: not a multiple of eight
    draws = [(torch.manual_seed(1), layer(x))[1] for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(layer.eval()(x), nn.functional.leaky_relu(x, 0.2))


def test_dropout_masks_of_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    mask = (LeakyDropout(1.0, 0.5)(torch.ones(800_000)) > 0).float().view(
        -1, 8
    ) - 0.5  # eight bytes of one draw
    correlation = (mask.T @ mask / len(mask)) * 4
    assert (correlation - torch.eye(8)).abs().max() < 0.02


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
