"""The video network: any number of frames, the control without order, and an order that only the GRU sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from counterfake.errors import ConfigError
from counterfake.nets.temporal import FrameHead, TemporalConfig


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("frames", [1, 5])
def test_a_clip_of_any_length_gives_one_logit(recurrent: bool, frames: int) -> None:
    net = replace(TemporalConfig.tiny(), recurrent=recurrent).build().eval()
    with torch.inference_mode():
        assert net(torch.rand(2, frames, 3, 32, 32)).shape == (2,)


def test_the_parameters_are_the_backbones_the_grus_and_one_logit() -> None:
    features = 3_504_872 - (1280 * 1000 + 1000)  # torchvision's mobilenet_v2 without its classifier
    gru = 2 * (3 * 128 * (1280 + 128) + 2 * 3 * 128)  # two directions, three gates, two biases each
    for recurrent, rest in ((True, gru + 2 * 128 + 1), (False, 1280 + 1)):
        net = TemporalConfig(recurrent=recurrent).build()
        assert sum(p.numel() for p in net.parameters()) == features + rest


def test_the_control_is_the_mean_of_the_frames_own_logits() -> None:
    head = FrameHead(6, replace(TemporalConfig.tiny(), recurrent=False)).eval()
    frames = torch.randn(3, 7, 6)
    each = torch.stack([head(frames[:, t : t + 1]) for t in range(7)], dim=1)
    torch.testing.assert_close(head(frames), each.mean(dim=1))
    torch.testing.assert_close(head(frames), head(frames[:, torch.randperm(7)]))


def test_one_frame_repeated_is_a_still_for_the_control_but_not_for_the_gru() -> None:
    torch.manual_seed(0)
    still, frames = torch.randn(4, 1, 6), torch.randn(4, 5, 6)
    for recurrent in (False, True):
        head = FrameHead(6, replace(TemporalConfig.tiny(), recurrent=recurrent)).eval()
        assert (head(still.repeat(1, 5, 1)) - head(still)).abs().max() < 1e-5 or recurrent
        assert ((head(frames) - head(frames.flip(1))).abs().max() > 1e-4) == recurrent


def test_the_gru_learns_a_flicker_that_no_frame_mean_can_show() -> None:
    """Fakes alternate around the mean that real clips keep: every mean over frames is the same in both classes."""

    def accuracy(recurrent: bool) -> float:
        torch.manual_seed(0)
        head = FrameHead(4, replace(TemporalConfig.tiny(), recurrent=recurrent))
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        for _ in range(60):
            clips, fake = flickering(64)
            loss = F.binary_cross_entropy_with_logits(head(clips), fake)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        clips, fake = flickering(400)
        with torch.inference_mode():
            return float(((head(clips) > 0) == (fake > 0)).float().mean())

    assert accuracy(recurrent=True) > 0.9
    assert accuracy(recurrent=False) < 0.65


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="hidden"):
        TemporalConfig(hidden=0)


def flickering(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    fake = (torch.rand(count) < 0.5).float()
    level = torch.randn(count, 1, 4)
    sign = (-1.0) ** torch.arange(8)[None, :, None]
    return level + fake[:, None, None] * sign, fake
