"""Face-swap networks: published sizes, routing of rows to people, gradients for data-parallel ranks, what makes each design."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from counterfake.config import from_dict, to_dict
from counterfake.errors import ConfigError, DataError
from counterfake.nets import NetConfig
from counterfake.nets.swap import (
    Centres,
    SwapConfig,
    SwapDecoder,
    SwapEncoder,
    SwapMaskConfig,
    SwapNet,
    SwapPartsConfig,
    SwapTwoEncodersConfig,
    SwapUnetConfig,
)
from counterfake.nets.swap_dfl import SwapDfConfig, SwapLiaeConfig
from counterfake.nets.swap_discriminator import SwapDiscriminatorConfig
from counterfake.nets.swap_family import SelfAttention, SwapFamily, parameters, standardise


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
    codes = net.encoder(faces)
    alone = [net.decoders[who](codes[row : row + 1])[0] for row, who in enumerate(identity.tolist())]
    torch.testing.assert_close(net(faces, identity).face, torch.stack(alone), atol=1e-6, rtol=1e-5)


def test_a_decoder_without_rows_gets_zero_gradients_not_none(net: SwapNet) -> None:
    """Data-parallel ranks wait for every gradient: a missing one would hang them."""
    net(torch.rand(2, 3, 16, 16), torch.tensor([0, 2])).face.mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(not p.grad.any() for p in net.decoders[1].parameters())
    assert any(p.grad.any() for p in net.decoders[2].parameters())


def test_a_face_without_identity_is_refused(net: SwapNet) -> None:
    with pytest.raises(DataError, match="1 of 2 faces have no identity"):
        net(torch.rand(2, 3, 16, 16), torch.tensor([0, -1]))


def test_the_painted_faces_are_pixels_between_0_and_1(net: SwapNet) -> None:
    painted = net(torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])).face
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


# -- the designs ----------------------------------------------------------------------------------------------------

DESIGNS = [
    SwapConfig, SwapTwoEncodersConfig, SwapUnetConfig, SwapMaskConfig, SwapPartsConfig, SwapDfConfig, SwapLiaeConfig,
]  # fmt: skip


def built(design: type[SwapFamily], people: int = 3) -> tuple[SwapFamily, torch.nn.Module]:
    torch.manual_seed(0)
    config = design.tiny().with_identities(tuple("abcdef"[:people]))
    return config, config.build()


@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_paints_faces_of_its_size_between_0_and_1(design: type[SwapFamily]) -> None:
    config, net = built(design)
    painted = net(torch.rand(4, 3, config.size, config.size), torch.tensor([2, 0, 1, 2]))
    assert painted.face.shape == (4, 3, config.size, config.size)
    assert (painted.mask is not None) == bool(config.MASKS)
    for part in painted:
        if part is not None:
            assert part.min() >= 0
            assert part.max() <= 1
            assert part.shape[2:] == (config.size, config.size)


@pytest.mark.parametrize("design", DESIGNS)
def test_in_every_design_whoever_is_absent_has_zero_gradients(design: type[SwapFamily]) -> None:
    config, net = built(design)
    painted = net(torch.rand(2, 3, config.size, config.size), torch.tensor([0, 2]))
    sum(part.mean() for part in painted if part is not None).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("design", DESIGNS)
def test_in_every_design_a_row_does_not_depend_on_the_others(design: type[SwapFamily]) -> None:
    config, net = built(design)
    faces, who = torch.rand(3, 3, config.size, config.size), torch.tensor([1, 0, 1])
    whole = net(faces, who).face
    torch.testing.assert_close(net(faces[1:2], who[1:2]).face[0], whole[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("design", DESIGNS)
def test_in_every_design_another_person_gives_another_face(design: type[SwapFamily]) -> None:
    config, net = built(design)
    faces = torch.rand(1, 3, config.size, config.size)
    a, b, c = (net(faces, torch.tensor([who])).face for who in range(3))
    assert not torch.allclose(a, b)
    assert not torch.allclose(b, c)


def test_two_encoders_read_a_swap_with_the_encoder_of_whom_it_shows() -> None:
    _, net = built(SwapTwoEncodersConfig)
    faces, a, b = torch.rand(1, 3, 16, 16), torch.tensor([0]), torch.tensor([1])
    exchanged = net.decoders[1](net.encoders[0](faces))
    assert torch.equal(net(faces, b, a).face, exchanged)
    assert torch.equal(net(faces, b).face, net.decoders[1](net.encoders[1](faces)))


def test_skips_finer_than_8_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"skip_side 16 must lie between 4, .* and 8: finer skips carry"):
        SwapUnetConfig(skip_side=16)
    with torch.device("meta"):
        net = SwapUnetConfig(identities=("a", "b")).build()
    assert net.decoders[0].up[0].conv.in_channels == 512 + 512  # codes and features, both 8×8
    assert SwapUnetConfig(skip_side=4).code_side == 4


def test_a_swap_moves_codes_to_where_the_targets_lie() -> None:
    torch.manual_seed(0)
    centres = Centres(2, 4)
    spread, middle = torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [-2.0]])
    who = torch.arange(64) % 2
    for _ in range(800):
        centres(spread[who] * torch.randn(64, 4) + middle[who], who, None)
    centres.eval()
    mine = torch.randn(1000, 4) + 5
    yours = centres(mine, torch.ones(1000).long(), torch.zeros(1000).long())
    torch.testing.assert_close(yours, 3 * (mine - 5) - 2, atol=1.0, rtol=0)
    torch.testing.assert_close(yours.mean(dim=0), torch.full((4,), -2.0), atol=0.4, rtol=0)
    torch.testing.assert_close(yours.std(dim=0), torch.full((4,), 3.0), atol=0.4, rtol=0)


def test_a_face_that_stays_itself_keeps_its_code_and_so_does_one_of_nobody_known() -> None:
    _, net = built(SwapConfig)
    faces, who = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    net.train()(faces, who)
    assert float(net.centres.moments.abs().sum()) > 0
    net.eval()
    alone, known, others = net(faces, who), net(faces, who, who), net(faces, who, who.roll(1))
    assert torch.equal(alone.face, known.face)
    assert not torch.equal(alone.face, others.face)


def test_a_model_of_before_there_were_centres_loads_and_moves_no_code() -> None:
    _, net = built(SwapConfig)
    old = {name: value for name, value in net.state_dict().items() if not name.startswith("centres")}
    _, again = built(SwapConfig)
    again.eval().load_state_dict(old)
    faces, who = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    torch.testing.assert_close(again(faces, who, who.roll(1)).face, again(faces, who).face)


def test_a_skip_carries_what_the_code_does_not() -> None:
    """With the bottleneck cut, only skips let a face through."""
    for design, passes in ((SwapConfig, False), (SwapUnetConfig, True)):
        _, net = built(design)
        torch.nn.init.zeros_(net.encoder.widen.weight)
        a, b = (net(torch.rand(1, 3, 16, 16), torch.tensor([0])).face for _ in range(2))
        assert (not torch.allclose(a, b)) is passes


def test_a_mask_chooses_between_the_painted_and_the_given() -> None:
    _, net = built(SwapMaskConfig)
    faces = torch.rand(2, 3, 16, 16)
    for bias, expected in ((30.0, None), (-30.0, faces)):
        for decoder in net.decoders:
            decoder.paint.weight.data[0], decoder.paint.bias.data[0] = 0.0, bias
        painted = net(faces, torch.tensor([0, 1]))
        torch.testing.assert_close(painted.face, painted.raw if expected is None else expected)


def test_self_attention_starts_as_nothing_and_sees_every_place() -> None:
    torch.manual_seed(0)
    layer, features = SelfAttention(8), torch.rand(1, 8, 4, 4)
    assert torch.equal(layer(features), features)
    torch.nn.init.ones_(layer.weight)
    moved = features.clone()
    moved[..., 3, 3] += 1
    assert (layer(moved) - layer(features))[..., 0, 0].abs().max() > 1e-4


def test_attention_of_the_full_network_is_at_16_pixels_in_both_halves() -> None:
    with torch.device("meta"):
        net = SwapMaskConfig(identities=("a", "b")).build()
    assert net.encoder.at == 1  # after the second convolution, of 256 channels
    assert isinstance(net.decoders[0].up[1], SelfAttention)


def test_liae_codes_the_first_person_as_everyone_and_others_with_an_inter_of_their_own() -> None:
    _, net = built(SwapLiaeConfig)
    faces = torch.rand(1, 3, 32, 32)
    shared = net.inter_all(net.encoder(faces))
    first = net.decoder(torch.cat([shared, shared], dim=1))
    torch.testing.assert_close(net(faces, torch.tensor([0])).face, first[:, :3])
    own = net.decoder(torch.cat([net.inter_own[1](net.encoder(faces)), shared], dim=1))
    torch.testing.assert_close(net(faces, torch.tensor([2])).face, own[:, :3])


def test_the_unit_code_has_the_same_length_for_every_face() -> None:
    _, net = built(SwapDfConfig)
    codes = net.encoder(torch.rand(3, 3, 32, 32) * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1))
    torch.testing.assert_close(codes.square().mean(dim=1), torch.ones(3), atol=0.05, rtol=0)


@pytest.mark.parametrize("double", [True, False], ids=["d", "plain"])
def test_df_and_liae_paint_their_own_size_with_and_without_d(double: bool) -> None:
    for design in (SwapDfConfig, SwapLiaeConfig):
        config = replace(design.tiny(), double=double)
        with torch.device("meta"):
            painted = config.build()(torch.zeros(1, 3, 32, 32), torch.tensor([0], device="cpu"))
        assert painted.face.shape == (1, 3, 32, 32)


def test_the_full_sizes_of_the_designs() -> None:
    """shared is the published one; the others are ours, so that a change is noticed."""
    found = {}
    with torch.device("meta"):
        for design in DESIGNS:
            found[design.__name__] = parameters(design(identities=("a", "b")).build())
    assert found["SwapConfig"] == 69_662_976 + 2 * 6_199_747
    assert found["SwapTwoEncodersConfig"] == 2 * (69_662_976 + 6_199_747)
    assert found == SIZES


SIZES = {
    "SwapConfig": 82_062_470,
    "SwapTwoEncodersConfig": 151_725_446,
    "SwapUnetConfig": 110_374_022,
    "SwapMaskConfig": 82_312_395,
    "SwapPartsConfig": 87_526_542,
    "SwapDfConfig": 54_470_998,
    "SwapLiaeConfig": 82_376_555,
}


def test_the_critic_judges_patches_and_rows_alone() -> None:
    torch.manual_seed(0)
    critic = SwapDiscriminatorConfig().build()
    pairs = torch.rand(2, 6, 64, 64)
    logits = critic(pairs)
    assert logits.shape == (2, 1, 4, 4)
    torch.testing.assert_close(critic(pairs[:1]), logits[:1], atol=1e-5, rtol=1e-4)


def test_the_config_survives_its_dictionary_with_its_identities() -> None:
    config = SwapConfig.tiny().with_identities(("ada", "bob"))
    assert from_dict(NetConfig, to_dict(config)) == config
