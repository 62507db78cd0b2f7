"""Residual networks with one fakeness logit: ResNet-18 and -50, and their form for small pictures.

He et al. 2015, https://arxiv.org/abs/1512.03385, table 1; bottlenecks stride in their 3×3 convolution as the public weights
do. State-dict names are torchvision's. `small=True` is the paper's CIFAR stem (section 4.2): one 3×3 convolution at full
resolution and no pooling, because the traces of a generator in a 32 px picture do not survive a stride of 4.
Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets.backbone import BackboneConfig, ImageNetInput


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(BackboneConfig):
    """Images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,). Defaults: ResNet-18; ResNet-50 is `resnet50()`."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)  # of each stage; a stage after the first halves the side
    width: int = 64  # channels of the first stage; doubles with each
    bottleneck: bool = False  # 1×1, 3×3, 1×1 blocks that end with four times the channels
    small: bool = False  # stem for pictures of 32 to 96 px
    dropout: float = 0.0

    PUBLIC: ClassVar = (("features.", ""), ("classifier.", "fc."))

    def __post_init__(self) -> None:
        if not self.blocks or min(self.blocks) < 1 or self.width < 1:
            raise ConfigError(f"blocks and width must be at least 1, got {self.blocks} and {self.width}")

    def features(self) -> tuple[nn.Module, int]:
        layers, channels = self.layers(inputs=3)
        return ImageNetInput(layers), channels

    def layers(self, inputs: int) -> tuple[OrderedDict[str, nn.Module], int]:
        """The features by name, for pictures of `inputs` channels, and the number of channels they end with."""
        layers: OrderedDict[str, nn.Module] = OrderedDict(_stem(inputs, self.width, self.small))
        channels = self.width
        for number, count in enumerate(self.blocks):
            inner = self.width * 2**number
            stage = []
            for index in range(count):
                stride = 2 if number and not index else 1
                block = Bottleneck if self.bottleneck else BasicBlock
                stage.append(block(channels, inner, stride))
                channels = inner * block.GROWTH
            layers[f"layer{number + 1}"] = nn.Sequential(*stage)
        return layers, channels

    def public_head(self, channels: int) -> nn.Module:
        return nn.Linear(channels, 1000)

    @classmethod
    def tiny(cls) -> Self:
        return cls(blocks=(1, 1), width=8, small=True)


def resnet50() -> ResNetConfig:
    """ResNet-50: 25,557,032 parameters under 1,000 classes."""
    return ResNetConfig(blocks=(3, 4, 6, 3), bottleneck=True)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the input."""

    GROWTH = 1

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.downsample = _shortcut(inputs, inner, stride)  # first: heat maps read the last convolution
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, inner, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1×1 to fewer channels, 3×3, 1×1 to four times as many, and the input."""

    GROWTH = 4

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.downsample = _shortcut(inputs, self.GROWTH * inner, stride)
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, self.GROWTH * inner, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.GROWTH * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4 inner, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


# -- private --------------------------------------------------------------------------------------------------------


def _stem(inputs: int, width: int, small: bool) -> dict[str, nn.Module]:
    kernel, stride = (3, 1) if small else (7, 2)
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(inputs, width, kernel, stride, kernel // 2, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(inplace=True),
    }
    return layers if small else {**layers, "maxpool": nn.MaxPool2d(3, 2, 1)}


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """1×1 projection where the shape changes, else nothing."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
