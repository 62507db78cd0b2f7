"""Ultra-Light-Fast-Generic-Face-Detector, version "slim 320": an SSD with 4,420 priors and 260,188 weights.

https://github.com/Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB (MIT). Written anew from the published description
and the shapes of its state dict, whose names are kept, so that the public weights load by name. SSD: Liu et al. 2016,
https://arxiv.org/abs/1512.02325; a box is coded against its prior as in their section 2.2, variances 0.1 and 0.2.
The network is not trained here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from counterfake.nets import NetConfig
from counterfake.nets.backbone import EVERY, load_weights

WIDTH, HEIGHT = 320, 240  # of the input the priors are laid over
STRIDES = (8, 16, 32, 64)
PRIOR_SIDES = ((10, 16, 24), (32, 48), (64, 96), (128, 192, 256))  # pixels, for each stride
# (channels, stride) of the blocks after the first convolution; a head reads the output of blocks 7, 10 and 12
BLOCKS = (
    (32, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 1), (64, 1),
    (128, 2), (128, 1), (128, 1), (256, 2), (256, 1),
)  # fmt: skip
HEADS = (7, 10, 12)


@dataclass(frozen=True, kw_only=True)
class UltralightConfig(NetConfig):
    """Images (N, 3, 240, 320), RGB minus 127 over 128 -> face scores (N, 4420) in [0, 1], boxes (N, 4420, 4)."""

    weights: str = ""  # file of public weights (ultralight_face_slim_320.pth); "" = random, for tests

    def build(self) -> Ultralight:
        """The network in evaluation mode. Raises CheckpointError if the weights cannot be used."""
        net = Ultralight()
        if self.weights:
            load_weights(net, self.weights, names=EVERY)
        return net.eval()

    @classmethod
    def tiny(cls) -> UltralightConfig:
        return cls()  # it is tiny


class Ultralight(nn.Module):
    """State-dict names as published: base_net, extras, classification_headers, regression_headers."""

    priors: Tensor

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_stem(3, 16)]
        width = 16
        for channels, stride in BLOCKS:
            blocks.append(_depthwise_block(width, channels, stride))
            width = channels
        self.base_net = nn.Sequential(*blocks)
        extra = nn.Sequential(nn.Conv2d(256, 64, 1), nn.ReLU(), _separable(64, 256, stride=2), nn.ReLU())
        self.extras = nn.ModuleList([extra])
        self.classification_headers = nn.ModuleList(_heads(2))  # background, face
        self.regression_headers = nn.ModuleList(_heads(4))
        self.register_buffer("priors", priors(), persistent=False)  # (4420, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, 3, 240, 320) -> scores (N, P), boxes (N, P, 4): left, top, right, bottom in shares of the picture."""
        maps, x = [], images
        for number, block in enumerate(self.base_net):
            x = block(x)
            if number in HEADS:
                maps.append(x)
        maps.append(self.extras[0](x))
        logits = [_flat(h(m), 2) for h, m in zip(self.classification_headers, maps, strict=True)]
        codes = [_flat(h(m), 4) for h, m in zip(self.regression_headers, maps, strict=True)]
        return torch.cat(logits, 1).softmax(2)[..., 1], decode(torch.cat(codes, 1), self.priors)


def priors() -> Tensor:
    """(4420, 4): centre x, centre y, width, height in shares of the picture, clipped to it; row by row, stride by stride."""
    rows = [
        ((i + 0.5) * stride / WIDTH, (j + 0.5) * stride / HEIGHT, side / WIDTH, side / HEIGHT)
        for stride, sides in zip(STRIDES, PRIOR_SIDES, strict=True)
        for j in range(math.ceil(HEIGHT / stride))
        for i in range(math.ceil(WIDTH / stride))
        for side in sides
    ]
    return torch.tensor(rows).clamp(0, 1)


def decode(codes: Tensor, priors: Tensor) -> Tensor:
    """SSD: centre = prior centre + 0.1 code x prior size, size = prior size x exp(0.2 code). (N, P, 4) -> corners."""
    centres = priors[:, :2] + 0.1 * codes[..., :2] * priors[:, 2:]
    half = priors[:, 2:] * (0.2 * codes[..., 2:]).exp() / 2
    return torch.cat([centres - half, centres + half], 2)


# -- private --------------------------------------------------------------------------------------------------------


def _stem(width: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(width, channels, 3, 2, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _depthwise_block(width: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def _separable(width: int, channels: int, stride: int = 1) -> nn.Sequential:
    depthwise = nn.Conv2d(width, width, 3, stride, 1, groups=width)
    return nn.Sequential(depthwise, nn.ReLU(), nn.Conv2d(width, channels, 1))


def _heads(values: int) -> list[nn.Module]:
    a, b, c, d = (len(sides) * values for sides in PRIOR_SIDES)
    return [_separable(64, a), _separable(128, b), _separable(256, c), nn.Conv2d(256, d, 3, padding=1)]


def _flat(maps: Tensor, values: int) -> Tensor:
    """(N, priors x values, h, w) -> (N, h x w x priors, values), the order of `priors`."""
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, values)
