"""A small convolutional net that turns a face crop into numbers: who it is, or how it looks. It judges swaps.

Each picture is first moved to mean 0 and deviation 1 over all its values, so that light is not taken for the person.
Four convolutions with batch norm and 2x2 pooling, a linear layer. Letters: N batch, S side in pixels, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets import NetConfig

STAGES = 4  # each halves the side


@dataclass(frozen=True, kw_only=True)
class FaceReaderConfig(NetConfig):
    """Faces (N, 3, size, size) -> features (N, features)."""

    size: int = 48  # pixels; a multiple of 16
    width: int = 16  # channels after the first convolution; twice and four times that later
    features: int = 96  # D

    def __post_init__(self) -> None:
        if self.size < 2**STAGES or self.size % 2**STAGES or min(self.width, self.features) < 1:
            raise ConfigError(
                f"a face reader needs a size that is a multiple of {2**STAGES}, got {self.size}"
            )

    def build(self) -> FaceReader:
        return FaceReader(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=32, width=8, features=16)


class FaceReader(nn.Module):
    """The convolutions and the linear layer."""

    def __init__(self, config: FaceReaderConfig) -> None:
        super().__init__()
        self.config = config
        widths = (3, config.width, 2 * config.width, 4 * config.width, 4 * config.width)
        self.convs = nn.Sequential(*(_block(widths[i], widths[i + 1]) for i in range(STAGES)))
        self.features = nn.Linear(widths[-1] * (config.size // 2**STAGES) ** 2, config.features)

    def forward(self, faces: Tensor) -> Tensor:
        """faces (N, 3, S, S) in any range -> (N, D)."""
        mean = faces.mean(dim=(1, 2, 3), keepdim=True)
        spread = faces.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
        x = self.convs((faces - mean) / spread)  # (N, 4 width, S/16, S/16)
        return self.features(F.dropout(x.flatten(1), 0.2, self.training))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))
