"""A video detector: a picture backbone on every frame, a bidirectional GRU over the frames, one logit.

Sabir et al. 2019, https://arxiv.org/abs/1905.00582, section 3.2: aligned faces, features of each frame, a bidirectional
recurrent layer, trained end to end. Different here: the GRU's states are averaged over the frames, and features are standardised
before it. With `recurrent=False` the answer is the mean of the frames' own logits: the control without which a gain of the GRU
means nothing. A single picture is a clip of one frame.
Letters: N clips, T frames, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets import NetConfig
from counterfake.nets.backbone import BackboneConfig
from counterfake.nets.mobilenetv2 import MobileNetV2Config


@dataclass(frozen=True, kw_only=True)
class TemporalConfig(NetConfig):
    """Clips (N, T, 3, H, W) in [-1, 1] -> fakeness logits (N,), for any T >= 1."""

    backbone: BackboneConfig = field(default_factory=MobileNetV2Config)
    recurrent: bool = True  # False = the control: the mean of the frames' logits
    hidden: int = 128  # units of the GRU, each direction
    dropout: float = 0.3  # probability, on the features and before the logit

    def __post_init__(self) -> None:
        if self.hidden < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"hidden must be at least 1 and dropout in [0, 1), got {self.hidden} and {self.dropout}"
            )

    def build(self) -> TemporalDetector:
        """Raises CheckpointError if the backbone's weights do not fit."""
        features = self.backbone.build().features
        with torch.no_grad():
            channels = features.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        return TemporalDetector(features.train(), FrameHead(channels, self))

    def without_weights(self) -> Self:
        return replace(self, backbone=self.backbone.without_weights())

    @classmethod
    def tiny(cls) -> Self:
        return cls(backbone=MobileNetV2Config.tiny(), hidden=8, dropout=0.0)


class TemporalDetector(nn.Module):
    """`features` of every frame, then `head` over the clip."""

    def __init__(self, features: nn.Module, head: FrameHead) -> None:
        super().__init__()
        self.features, self.head = features, head

    def pooled(self, clips: Tensor) -> Tensor:
        """clips (N, T, 3, H, W) in [-1, 1] -> features (N, T, C)."""
        maps = self.features(clips.flatten(0, 1))  # (N·T, C, h, w)
        return maps.mean(dim=(2, 3)).unflatten(0, clips.shape[:2])

    def forward(self, clips: Tensor) -> Tensor:
        """clips (N, T, 3, H, W), or pictures (N, 3, H, W), in [-1, 1] -> fakeness logits (N,)."""
        return self.head(self.pooled(clips if clips.ndim == 5 else clips[:, None]))


class FrameHead(nn.Module):
    """Features of frames (N, T, C) -> logits of clips (N,)."""

    def __init__(self, channels: int, config: TemporalConfig) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False)
        self.gru = (
            nn.GRU(channels, config.hidden, batch_first=True, bidirectional=True)
            if config.recurrent
            else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.last = nn.Linear(2 * config.hidden if config.recurrent else channels, 1)

    def forward(self, frames: Tensor) -> Tensor:
        frames = self.norm(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        if self.gru is None:
            return self.last(self.dropout(frames)).squeeze(2).mean(dim=1)
        states, _ = self.gru(self.dropout(frames))  # (N, T, 2 hidden)
        return self.last(self.dropout(states.mean(dim=1))).squeeze(1)
