"""Xception with one fakeness logit: the detector of FaceForensics++.

Chollet 2016, https://arxiv.org/abs/1610.02357, figure 5. State-dict names are those of the widely used PyTorch port (conv1,
block1.rep.0.conv1, …, bn4, fc), so that its ImageNet files load; some keep 1×1 kernels as matrices, which is read too.
Convolutions are padded on both sides as in that port; Keras pads the far side of strided ones. Input: [-1, 1], 299 px in the
paper, from 64 px up. Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets.backbone import BackboneConfig


@dataclass(frozen=True, kw_only=True)
class XceptionConfig(BackboneConfig):
    """Images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,)."""

    width_mult: float = 1.0  # factor on all channel counts
    middle: int = 8  # blocks of the middle flow
    dropout: float = 0.5  # as FaceForensics++ puts before its logits

    PUBLIC: ClassVar = (("features.", ""), ("classifier.", "fc."))

    def __post_init__(self) -> None:
        if self.width_mult <= 0 or self.middle < 0:
            raise ConfigError(
                f"width_mult must be > 0 and middle >= 0, got {self.width_mult} and {self.middle}"
            )

    def features(self) -> tuple[nn.Module, int]:
        stem, second, one, two, body, out, late, last = (
            max(1, round(c * self.width_mult)) for c in (32, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        blocks = [
            Block(second, (one, one), 2, start_with_relu=False),
            Block(one, (two, two), 2),
            Block(two, (body, body), 2),
            *(Block(body, (body, body, body), 1) for _ in range(self.middle)),
            Block(body, (body, out), 2),
        ]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers.update(_conv("1", nn.Conv2d(3, stem, 3, 2, bias=False), stem))
        layers.update(_conv("2", nn.Conv2d(stem, second, 3, bias=False), second))
        layers.update((f"block{number}", block) for number, block in enumerate(blocks, 1))
        layers.update(_conv("3", SeparableConv(out, late), late))
        layers.update(_conv("4", SeparableConv(late, last), last))
        return nn.Sequential(layers), last

    def public_head(self, channels: int) -> nn.Module:
        return nn.Linear(channels, 1000)

    @classmethod
    def tiny(cls) -> Self:
        return cls(width_mult=1 / 16, middle=1, dropout=0.0)


class SeparableConv(nn.Module):
    """Depthwise 3×3 (`conv1`), then 1×1 (`pointwise`); no biases."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.conv1(x))


class Block(nn.Module):
    """ReLU and separable convolutions to `widths`, pooled by `stride`; added to the input or its 1×1 projection."""

    def __init__(
        self, inputs: int, widths: tuple[int, ...], stride: int, start_with_relu: bool = True
    ) -> None:
        super().__init__()
        layers = list(_separables(inputs, widths))
        layers = layers if start_with_relu else layers[1:]
        self.rep = nn.Sequential(*layers, *([nn.MaxPool2d(3, stride, 1)] if stride > 1 else []))
        self.projects = stride > 1 or inputs != widths[-1]
        if self.projects:
            self.skip = nn.Conv2d(inputs, widths[-1], 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, widths[-1], H / stride, W / stride), sides rounded up."""
        return self.rep(x) + (self.skipbn(self.skip(x)) if self.projects else x)


# -- private --------------------------------------------------------------------------------------------------------


def _conv(number: str, conv: nn.Module, channels: int) -> dict[str, nn.Module]:
    return {
        f"conv{number}": conv,
        f"bn{number}": nn.BatchNorm2d(channels),
        f"relu{number}": nn.ReLU(inplace=True),
    }


def _separables(inputs: int, widths: tuple[int, ...]) -> Iterator[nn.Module]:
    for outputs in widths:
        yield nn.ReLU()  # never in place: the shortcut reads the block's input
        yield SeparableConv(inputs, outputs)
        yield nn.BatchNorm2d(outputs)
        inputs = outputs
