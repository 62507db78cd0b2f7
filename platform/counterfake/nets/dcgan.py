"""The article's DCGAN (dense, then transposed 5x5 convolutions; 5x5 strided convolutions back to one logit), for 28 to 128 px.

At 28 px and one channel these are the networks of the article's Keras code, parameter for parameter. Larger sizes
continue the pattern from 4x4, as Radford et al. 2015 (https://arxiv.org/abs/1511.06434) do, but the discriminator has
dropout and no batch norm at any size: that keeps its answer for a picture independent of the rest of the batch.
With `classes` both players are told what to draw: the generator reads a code of the condition beside the noise, and the
discriminator a map of it beside the picture (Mirza & Osindero 2014, https://arxiv.org/abs/1411.1784), or it adds a
projection to its logit (Miyato & Koyama 2018, https://arxiv.org/abs/1802.05637, eq. 4).
Letters: N batch, C channels, H W pixels, Z noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from counterfake.errors import ConfigError
from counterfake.nets import NetConfig
from counterfake.nets.conditioning import Condition

SIZES = (28, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class DcganGenerator(NetConfig):
    """Noise (N, Z) -> pictures (N, C, size, size) in [-1, 1]."""

    size: int = 28  # pixels, one of SIZES
    channels: int = 1
    noise_size: int = 100  # Z
    width: int = 64  # channels before the last layer; doubles towards the noise
    slope: float = 0.3  # of LeakyReLU; Keras' default, torch's is 0.01
    bn_eps: float = 1e-3  # Keras' default
    bn_momentum: float = 0.01  # torch's convention; Keras writes 0.99
    classes: int = 0  # the generator is told one of so many; 0 = none
    embedding: int = 0  # length of the vector that stands for a class; 0 = the class itself
    condition_width: int = 50  # numbers beside the noise that the condition becomes

    def __post_init__(self) -> None:
        _check_size(self.size)

    def build(self) -> Generator:
        return Generator(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(noise_size=8, width=2)


@dataclass(frozen=True, kw_only=True)
class DcganDiscriminator(NetConfig):
    """Pictures (N, C, size, size) in [-1, 1] -> logits (N,), higher = more real (the GAN convention)."""

    size: int = 28  # pixels, one of SIZES
    channels: int = 1
    width: int = 64  # channels after the first layer; doubles with each
    slope: float = 0.3
    dropout: float = 0.3  # after each convolution
    spectral_norm: bool = False  # Miyato et al. 2018; not in the article
    classes: int = 0  # the discriminator is told one of so many; 0 = none
    embedding: int = 0  # length of the vector that stands for a class; 0 = the class itself
    judge: Literal["projection", "map"] = "projection"  # how the condition enters; only with classes

    def __post_init__(self) -> None:
        _check_size(self.size)

    def build(self) -> Discriminator:
        return Discriminator(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(width=2)


class Generator(nn.Module):
    """Dense, batch norm, then transposed convolutions, each but the last with batch norm and LeakyReLU. No biases."""

    def __init__(self, config: DcganGenerator) -> None:
        super().__init__()
        self.config = config
        strides = [1, 2, 2] if config.size == 28 else [2] * _doublings(config.size)
        widths = [config.width * 2**i for i in reversed(range(len(strides)))]
        self.shape = (widths[0], _base(config.size), _base(config.size))
        told = config.condition_width if config.classes else 0
        self.dense = nn.Linear(config.noise_size + told, math.prod(self.shape), bias=False)
        self.dense_norm = nn.BatchNorm1d(math.prod(self.shape), config.bn_eps, config.bn_momentum)
        self.convs = nn.ModuleList(
            _up(i, o, stride)
            for i, o, stride in zip(widths, [*widths[1:], config.channels], strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(w, config.bn_eps, config.bn_momentum) for w in widths[1:])
        self.classes = config.classes
        if told:
            self.condition = Condition(config.classes, config.embedding)
            self.code = nn.Linear(self.condition.width, told, bias=False)
        init_like_keras(self)

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """noise (N, Z), with classes also what to draw (see `Condition`) -> pictures (N, C, H, W) in [-1, 1]."""
        if self.classes:
            noise = torch.cat([noise, self.code(self.condition(condition))], dim=1)
        x = F.leaky_relu(self.dense_norm(self.dense(noise)), self.config.slope)
        x = x.view(-1, *self.shape).contiguous(memory_format=torch.channels_last)  # (N, 4 width, 7, 7)
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = F.leaky_relu(norm(conv(x)), self.config.slope)
        return torch.tanh(_paint(self.convs[-1], x))


class Discriminator(nn.Module):
    """Strided convolutions with LeakyReLU and dropout, then one dense logit."""

    def __init__(self, config: DcganDiscriminator) -> None:
        super().__init__()
        self.config = config
        depth = _doublings(config.size)
        maps = 1 if config.classes and config.judge == "map" else 0
        widths = [config.channels + maps, *(config.width * 2**i for i in range(depth))]
        convs = [nn.Conv2d(widths[i], widths[i + 1], 5, stride=2) for i in range(depth)]
        self.dense = nn.Linear(widths[-1] * _base(config.size) ** 2, 1)
        self.convs = nn.ModuleList(convs)
        self.activation = LeakyDropout(config.slope, config.dropout)
        self.projection = config.classes > 0 and config.judge == "projection"
        told = []
        if config.classes:
            self.condition = Condition(config.classes, config.embedding)
            self.code = nn.Linear(
                self.condition.width, widths[-1] if self.projection else config.size**2, bias=False
            )
            told = [self.code]
        init_like_keras(self)
        if config.spectral_norm:
            for layer in (*self.convs, self.dense, *told):
                spectral_norm(layer)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        """images (N, C, H, W) in [-1, 1], with classes also what they should show -> logits (N,)."""
        x = images
        code = self.code(self.condition(condition)) if self.config.classes else None
        if code is not None and not self.projection:
            x = torch.cat([x, code.view(-1, 1, *x.shape[2:]).to(x.dtype)], dim=1)  # (N, C + 1, H, W)
        # Keras pads an even size by (1, 2). Mirrored, that is (2, 1): what padding=2 does, with no padded copy.
        x = x.flip(2, 3)
        for conv in self.convs:
            x = self.activation(_read(conv, x))  # (N, 2 C, H/2, W/2), mirrored
        logits = self._logit(x).squeeze(1)
        if code is not None and self.projection:
            logits = logits + (code * x.mean(dim=(2, 3))).sum(dim=1)
        return logits

    def _logit(self, x: Tensor) -> Tensor:
        """The dense layer for mirrored maps (N, C, H, W) -> (N, 1); in training it reads them as they lie, channels last."""
        if not self.training:
            return self.dense(x.flip(2, 3).flatten(1))
        weight = self.dense.weight.view(x.shape[1:]).flip(1, 2).permute(1, 2, 0)
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), weight.reshape(1, -1), self.dense.bias)


class LeakyDropout(nn.Module):
    """LeakyReLU, then dropout; in training on a CPU one pass over memory for each direction.

    Masks are bytes of 64-bit draws (nn.Dropout draws a double per element), so one call drops k / 256, where k is drawn as one of
    the two neighbours of 256 `probability` that keep it exact on average; the scale follows k, which keeps the mean."""

    def __init__(self, slope: float, probability: float) -> None:
        super().__init__()
        self.slope, self.probability = slope, probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return F.leaky_relu(x, self.slope)
        if x.device.type != "cpu":
            return F.dropout(F.leaky_relu(x, self.slope), self.probability)
        x = x if _is_dense(x) else x.contiguous()
        return _Scaled.apply(x, self._factors(x.detach()))  # type: ignore[no-any-return, no-untyped-call]

    def _factors(self, x: Tensor) -> Tensor:
        """What each element is multiplied by: 1 or the slope, over the share that is kept; 0 where it is dropped."""
        draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        octets = draws.view(torch.uint8)[: x.numel()].as_strided(x.shape, x.stride())
        dropped = min(math.floor(256 * self.probability + torch.rand(()).item()), 255)
        keep = (octets >= dropped).to(x.dtype).mul_(256 / (256 - dropped))
        return torch.ops.aten.leaky_relu_backward(keep, x, self.slope, False)  # keep * derivative at x

    def extra_repr(self) -> str:
        return f"slope={self.slope}, probability={self.probability}"


def init_like_keras(module: nn.Module) -> None:
    """Glorot uniform kernels, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# -- private --------------------------------------------------------------------------------------------------------


def _check_size(size: int) -> None:
    if size not in SIZES:
        raise ConfigError(f"size is {size} px; a DCGAN is built for one of {', '.join(map(str, SIZES))}")


def _base(size: int) -> int:
    """Side of the smallest feature map."""
    return 7 if size == 28 else 4


def _doublings(size: int) -> int:
    return int(math.log2(size // _base(size)))


def _up(inputs: int, outputs: int, stride: int) -> nn.ConvTranspose2d:
    # Keras pads (1, 2) where this pads (2, 1): the same function of a kernel shifted by one pixel
    return nn.ConvTranspose2d(inputs, outputs, 5, stride, padding=2, output_padding=stride - 1, bias=False)


def _as_patches(channels: int, x: Tensor) -> bool:
    """Whether a convolution with pictures on one side is faster as a product with their patches: in training, on a CPU, of one
    channel. Forward and backward of 512 digits: 21 instead of 43 ms of one core; with three channels 53 instead of 43."""
    exporting = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.is_grad_enabled() and not exporting and channels == 1 and x.device.type == "cpu"


def _read(conv: Any, x: Tensor) -> Tensor:
    """The convolution of mirrored pictures (N, C, H, W) of even size with the mirrored kernel, halved, "same"."""
    kernel, side = conv.weight.flip(2, 3), x.shape[-1] // 2
    if not _as_patches(conv.in_channels, x):
        return F.conv2d(x, kernel, conv.bias, stride=2, padding=2)
    patches = F.unfold(x, 5, padding=2, stride=2).transpose(1, 2).flatten(0, 1)  # (N H/2 W/2, 25)
    maps = F.linear(patches, kernel.flatten(1), conv.bias)  # (N H/2 W/2, C')
    return maps.view(len(x), side, side, conv.out_channels).permute(0, 3, 1, 2)


def _paint(conv: Any, x: Tensor) -> Tensor:
    """`conv(x)` of an nn.ConvTranspose2d for x (N, C, H, W)."""
    if not _as_patches(conv.out_channels, x):
        return conv(x)
    (kernel, _), (stride, _), (padding, _) = conv.kernel_size, conv.stride, conv.padding
    inside, side = x.shape[-1] ** 2, stride * x.shape[-1]
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # (N H W, C)
    patches = (rows @ conv.weight.flatten(1)).view(len(x), inside, kernel**2).transpose(1, 2)  # (N, 25, H W)
    return F.fold(patches, (side, side), kernel, padding=padding, stride=stride)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


class _Scaled(torch.autograd.Function):
    """x * factors, of which only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return x * factors

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0], None
