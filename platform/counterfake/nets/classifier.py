"""A small convolutional classifier of small pictures; what it computes before its last layer judges generators.

Three convolutions with batch norm and 2x2 pooling, a dense embedding, a linear layer. The embedding is taken before its
ReLU: half of the values would otherwise be exactly 0, and Fréchet distances assume something closer to a Gaussian.
Letters: N batch, C channels, H W pixels, K classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets import NetConfig

SMALLEST = 8  # pixels: three poolings leave one


@dataclass(frozen=True, kw_only=True)
class SmallClassifier(NetConfig):
    """Pictures (N, C, size, size) in [-1, 1] -> class logits (N, K)."""

    size: int = 28  # pixels, at least SMALLEST
    channels: int = 1
    classes: int = 10  # K
    width: int = 32  # channels after the first convolution; doubles with each
    features: int = 128  # D
    dropout: float = 0.3  # of the embedding, before the last layer

    def __post_init__(self) -> None:
        if self.size < SMALLEST or self.classes < 2 or min(self.channels, self.width, self.features) < 1:
            raise ConfigError(
                f"a classifier needs size >= {SMALLEST} and classes >= 2, got {self.size} and {self.classes}"
            )

    def build(self) -> Classifier:
        return Classifier(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(width=4, features=8)


class Classifier(nn.Module):
    """`pooled` gives the features, `head` the logits."""

    def __init__(self, config: SmallClassifier) -> None:
        super().__init__()
        self.config = config
        widths = (config.channels, config.width, 2 * config.width, 4 * config.width)
        self.convs = nn.Sequential(*(_block(widths[i], widths[i + 1]) for i in range(3)))
        side = config.size // 8
        self.embedding = nn.Linear(widths[-1] * side * side, config.features)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.features, config.classes)

    def pooled(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) in [-1, 1] -> features (N, D)."""
        return self.embedding(self.convs(images).flatten(1))

    def classify(self, features: Tensor) -> Tensor:
        """features (N, D) -> logits (N, K)."""
        return self.head(self.dropout(F.relu(features)))

    def forward(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) in [-1, 1] -> logits (N, K)."""
        return self.classify(self.pooled(images))


# -- private --------------------------------------------------------------------------------------------------------


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU, half the side."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2))
