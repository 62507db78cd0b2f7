"""The frequency net: its transforms against SciPy-free closed forms and torch.fft, its bands, and a pattern that only phase shows."""

from __future__ import annotations

import pytest
import torch

from counterfake.errors import ConfigError
from counterfake.nets.frequency import BANDS, CHANNELS, FrequencyConfig, Spectra, band_masks, dct_matrix
from counterfake.nets.resnet import ResNetConfig


def test_the_dct_is_orthonormal_and_a_cosine_is_one_coefficient() -> None:
    basis = dct_matrix(16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16), atol=1e-5, rtol=0)
    wave = torch.cos(torch.pi * (2 * torch.arange(16) + 1) * 3 / 32)
    spectrum = basis @ wave
    assert spectrum[3] == pytest.approx(
        8**0.5, abs=1e-5
    )  # sqrt(2 / 16) times the sum of 16 squares of mean 1/2
    assert spectrum[torch.arange(16) != 3].abs().max() < 1e-5


def test_phase_only_is_the_fourier_transform_with_amplitudes_one() -> None:
    torch.manual_seed(0)
    luma = torch.randn(3, 24, 24)
    spectrum = torch.fft.fft2(luma)
    want = torch.fft.ifft2(spectrum / spectrum.abs(), norm="ortho").real
    torch.testing.assert_close(Spectra(24).phase_only(luma)[:, 0], want, atol=2e-5, rtol=0)


def test_phase_does_not_see_brightness_but_sees_a_shift() -> None:
    torch.manual_seed(0)
    spectra, luma = Spectra(16), torch.randn(1, 16, 16)
    torch.testing.assert_close(spectra.phase_only(3 * luma), spectra.phase_only(luma), atol=1e-4, rtol=0)
    moved = spectra.phase_only(luma.roll(5, 2))
    torch.testing.assert_close(moved, spectra.phase_only(luma).roll(5, 3), atol=1e-4, rtol=0)


def test_the_three_bands_divide_the_spectrum_and_the_fourth_is_the_picture() -> None:
    bands = band_masks(32)
    assert torch.equal(bands[:3].sum(0), torch.ones(32, 32))
    assert torch.equal(bands[3], torch.ones(32, 32))
    spectra = Spectra(32, learned=False)
    torch.nn.init.zeros_(spectra.masks)  # 2 sigmoid(0) - 1 = 0
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    parts = spectra.decomposed(picture).unflatten(1, (len(BANDS), 3))
    torch.testing.assert_close(parts[:, 3], picture, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts[:, :3].sum(1), picture, atol=1e-5, rtol=0)


def test_masks_learn_and_can_be_fixed() -> None:
    net = FrequencyConfig.tiny().build()
    net(torch.rand(4, 3, 32, 32)).sum().backward()
    spectra = net.features[0][0]
    assert float(spectra.masks.grad.abs().sum()) > 0
    fixed = FrequencyConfig(size=32, trunk=ResNetConfig.tiny(), learned=False).build()
    assert not fixed.features[0][0].masks.requires_grad


def test_the_network_reads_thirteen_channels_and_has_1_5_million_parameters() -> None:
    net = FrequencyConfig().build()
    trunk = net.features[1]
    assert trunk.conv1.weight.shape == (32, CHANNELS, 7, 7)
    assert sum(p.numel() for p in net.parameters()) == 1_508_347


def test_bf16_does_not_reach_the_transforms() -> None:
    spectra, picture = Spectra(16), torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = spectra(picture)
    assert torch.equal(inside, spectra(picture))


def test_another_size_than_the_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"net\.size is 32 but the pictures are 48×48"):
        FrequencyConfig.tiny().build()(torch.zeros(1, 3, 48, 48))
    with pytest.raises(ConfigError, match="at least 16"):
        FrequencyConfig(size=8)
