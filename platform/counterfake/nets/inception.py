"""Inception-v3 as the Fréchet Inception Distance uses it: the network of 5 December 2015 with 1,008 classes.

Architecture: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567. State-dict names are those of the file
"pt_inception-2015-12-05" (TensorFlow's graph converted for torch), which are torchvision's. Differences of that graph from
torchvision's network, all of which move the FID: average pooling does not count the padding, and the last block's pooling
branch takes the maximum. Without the auxiliary classifier, which only training needs.
Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.nets import NetConfig

SIZE = 299  # pixels
FEATURES = 2048
_Pool = Callable[[Tensor], Tensor]  # 3x3, stride 1


@dataclass(frozen=True, kw_only=True)
class InceptionV3(NetConfig):
    """Pictures (N, 3, 299, 299) in [-1, 1] -> class logits (N, classes)."""

    classes: int = 1008
    fid: bool = True  # the pooling of the 2015 graph; False = torchvision's

    def build(self) -> Inception:
        return Inception(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(classes=2)  # its widths are fixed; 75 px are the smallest pictures it reads


class Inception(nn.Module):
    """`pooled` gives the 2,048 features of the FID."""

    def __init__(self, config: InceptionV3) -> None:
        super().__init__()
        average = _average if config.fid else _average_with_padding
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _A(192, 32, average)
        self.Mixed_5c = _A(256, 64, average)
        self.Mixed_5d = _A(288, 64, average)
        self.Mixed_6a = _B(288)
        self.Mixed_6b = _C(128, average)
        self.Mixed_6c = _C(160, average)
        self.Mixed_6d = _C(160, average)
        self.Mixed_6e = _C(192, average)
        self.Mixed_7a = _D(768)
        self.Mixed_7b = _E(1280, average)
        self.Mixed_7c = _E(2048, _maximum if config.fid else average)
        self.fc = nn.Linear(FEATURES, config.classes)

    def pooled(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1], H and W from 75 up, 299 as trained -> features (N, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))  # (N, 64, 147, 147) of 299
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (N, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))  # (N, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (N, 2048, 8, 8)
        return x.mean(dim=(2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """features (N, 2048) -> logits without bias, as the inception score of Salimans et al. 2016 takes them."""
        return features @ self.fc.weight.T

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> logits (N, classes)."""
        return self.fc(self.pooled(images))


# -- private: torchvision's blocks, by its names --------------------------------------------------------------------


class _Conv(nn.Module):
    """Convolution, batch norm with TensorFlow's epsilon, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _A(nn.Module):
    """35 px: 1x1, 5x5, two 3x3, pooling."""

    def __init__(self, inputs: int, pool_features: int, pool: _Pool) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(self.pool(x))], 1)


class _B(nn.Module):
    """35 px -> 17 px."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _C(nn.Module):
    """17 px: 1x1, 7x7 and two 7x7 as rows and columns, pooling."""

    def __init__(self, width: int, pool: _Pool) -> None:
        super().__init__()
        self.pool = pool
        across: Any = {"kernel": (1, 7), "padding": (0, 3)}
        along: Any = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, width, 1)
        self.branch7x7_2 = _Conv(width, width, **across)
        self.branch7x7_3 = _Conv(width, 192, **along)
        self.branch7x7dbl_1 = _Conv(768, width, 1)
        self.branch7x7dbl_2 = _Conv(width, width, **along)
        self.branch7x7dbl_3 = _Conv(width, width, **across)
        self.branch7x7dbl_4 = _Conv(width, width, **along)
        self.branch7x7dbl_5 = _Conv(width, 192, **across)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(self.pool(x))], 1)


class _D(nn.Module):
    """17 px -> 8 px."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(inputs, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class _E(nn.Module):
    """8 px: 1x1, 3x3 and two 3x3 that end in a row and a column side by side, pooling."""

    def __init__(self, inputs: int, pool: _Pool) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([*parts, self.branch_pool(self.pool(x))], 1)  # (N, 2048, H, W)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _average_with_padding(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)
