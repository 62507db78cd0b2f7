"""Face-swap autoencoder: published sizes, routing of rows to decoders, and gradients for data-parallel ranks."""

from __future__ import annotations

import pytest
import torch

from counterfake.config import from_dict, to_dict
from counterfake.errors import ConfigError, DataError
from counterfake.nets import NetConfig
from counterfake.nets.swap import SwapConfig, SwapDecoder, SwapEncoder, SwapNet, parameters, standardise


@pytest.fixture
def net() -> SwapNet:
    torch.manual_seed(0)
    return SwapConfig.tiny().with_identities(("a", "b", "c")).build()


def test_the_full_network_has_the_published_sizes() -> None:
    config = SwapConfig(identities=("a", "b"))
    with torch.device("meta"):  # 300 MB of weights that nobody needs to hold
        assert parameters(SwapEncoder(config)) == 69_662_976
        assert parameters(SwapDecoder(config)) == 6_199_747


def test_the_full_network_maps_64_pixels_to_64_pixels() -> None:
    config = SwapConfig(identities=("a", "b"))
    with torch.device("meta"):
        codes = SwapEncoder(config)(torch.zeros(1, 3, 64, 64))
        assert codes.shape == (1, 512, 8, 8)
        assert SwapDecoder(config)(codes).shape == (1, 3, 64, 64)


def test_each_row_goes_through_its_own_decoder(net: SwapNet) -> None:
    faces, identity = torch.rand(6, 3, 16, 16), torch.tensor([2, 0, 1, 0, 2, 2])
    everyone = net.matrix(faces)
    torch.testing.assert_close(
        net(faces, identity), everyone[torch.arange(6), identity], atol=1e-6, rtol=1e-5
    )


def test_a_decoder_without_rows_gets_zero_gradients_not_none(net: SwapNet) -> None:
    """Data-parallel ranks wait for every gradient: a missing one would hang them."""
    net(torch.rand(2, 3, 16, 16), torch.tensor([0, 2])).mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(not p.grad.any() for p in net.decoders[1].parameters())
    assert any(p.grad.any() for p in net.decoders[2].parameters())


def test_a_face_without_identity_is_refused(net: SwapNet) -> None:
    with pytest.raises(DataError, match="1 of 2 faces have no identity"):
        net(torch.rand(2, 3, 16, 16), torch.tensor([0, -1]))


def test_the_painted_faces_are_pixels_between_0_and_1(net: SwapNet) -> None:
    painted = net(torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2]))
    assert painted.min() >= 0
    assert painted.max() <= 1


def test_standard_light_has_one_mean_and_deviation_keeps_hue_and_goes_back() -> None:
    faces = torch.rand(3, 3, 32, 32) * torch.tensor([0.2, 0.6, 0.4]).view(3, 1, 1, 1) + 0.1
    out, mean, deviation = standardise(faces)
    middle = out[:, :, 8:24, 8:24]
    torch.testing.assert_close(middle.mean(dim=(1, 2, 3)), torch.full((3,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(middle.std(dim=(1, 2, 3)), torch.full((3,), 0.2), atol=0.01, rtol=0)
    torch.testing.assert_close((out - 0.5) / 0.2 * deviation + mean, faces, atol=1e-5, rtol=1e-4)


def test_stages_that_do_not_match_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="needs 3"):
        SwapConfig(decoder=(64,))
    with pytest.raises(ConfigError, match="multiple of 16"):
        SwapConfig(size=40)
    with pytest.raises(ConfigError, match="identities is empty"):
        SwapConfig().build()


def test_the_config_survives_its_dictionary_with_its_identities() -> None:
    config = SwapConfig.tiny().with_identities(("ada", "bob"))
    assert from_dict(NetConfig, to_dict(config)) == config
