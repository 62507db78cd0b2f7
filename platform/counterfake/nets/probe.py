"""A linear probe: the frozen features of any backbone, and one linear layer that learns.

Ojha et al. 2023, https://arxiv.org/abs/2302.10174 (section 4.2): what a network learned for another task separates real from
generated pictures linearly, and holds up on unseen generators better than features trained for it. They read CLIP; here it is
whatever backbone the weights file belongs to. Letters: N batch, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from counterfake.nets import NetConfig
from counterfake.nets.backbone import BackboneConfig, Detector
from counterfake.nets.mobilenetv2 import MobileNetV2Config


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(NetConfig):
    """Images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,). `backbone.weights` should name a file."""

    backbone: BackboneConfig = field(default_factory=MobileNetV2Config)
    mirror: bool = False  # outside training: the mean logit of the picture and its mirror image

    def build(self) -> Detector:
        """Raises CheckpointError if the backbone's weights do not fit."""
        features = self.backbone.build().features
        with torch.no_grad():
            channels = features.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        # Standardised, because the optimizer has one rate for all features; outside training both layers are one linear map.
        head = nn.Sequential(nn.BatchNorm1d(channels, affine=False), nn.Linear(channels, 1))
        return Detector(Frozen(features), head, mirror=self.mirror)

    def without_weights(self) -> Self:
        return replace(self, backbone=self.backbone.without_weights())

    @classmethod
    def tiny(cls) -> Self:
        return cls(backbone=MobileNetV2Config.tiny())


class Frozen(nn.Module):
    """A module that never learns: no gradients to its weights, its statistics as given, also in training."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> maps (N, C, h, w). Outside training gradients pass, for heat maps."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
            return self.module(images)
