"""Meso4 and MesoInception4, the small detectors of face forgeries, and their published weights.

Afchar et al. 2018, https://arxiv.org/abs/1809.00888, figures 4 and 5. The weights are the authors' Keras files as arrays by
name (.npz). What Keras means by them: pictures in [0, 1], kernels (H, W, in, out), 'same' padding, ReLU before batch norm,
batch-norm epsilon 1e-3, LeakyReLU slope 0.1, and the maps flattened as (H, W, C). Their output is the probability of *real*;
ours is of fake, so the sign of the last layer is turned around when the file is read.
Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake.errors import CheckpointError, ConfigError
from counterfake.nets import NetConfig
from counterfake.nets.backbone import file_sha256

BN_EPS, BN_MOMENTUM = 1e-3, 0.01  # Keras' defaults, in torch's convention
SHRINK = 32  # side of the picture / side of the last maps
INCEPTIONS = ((1, 4, 4, 2), (2, 4, 4, 2))  # channels of the four branches of each module; section 3.2


@dataclass(frozen=True, kw_only=True)
class MesoConfig(NetConfig):
    """Images (N, 3, size, size) in [-1, 1] -> fakeness logits (N,)."""

    variant: Literal["meso4", "inception"] = "meso4"
    size: int = 256  # pixels; a multiple of SHRINK
    dropout: float = 0.5  # before each of the two dense layers
    weights: str | None = None  # .npz of the authors' arrays, for size 256; None = random initialisation
    weights_sha256: str = ""  # digest of that file: checked when `weights` is set, a record when not

    def __post_init__(self) -> None:
        if self.size < SHRINK or self.size % SHRINK:
            raise ConfigError(f"net.size must be a multiple of {SHRINK}, got {self.size}; set it to 256")

    def build(self) -> MesoNet:
        """Raises CheckpointError if `weights` do not fit."""
        net = MesoNet(self)
        if self.weights is not None:
            load_keras(net, self.weights, self.weights_sha256)
        return net

    def without_weights(self) -> Self:
        """The config to store beside trained weights: needs no file, keeps the digest of where it started."""
        digest = file_sha256(self.weights) if self.weights is not None else self.weights_sha256
        return replace(self, weights=None, weights_sha256=digest)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=SHRINK)


class MesoNet(nn.Module):
    """`features` ends with the flattened maps as (N, F, 1, 1), so that pooling leaves them as they are."""

    def __init__(self, config: MesoConfig) -> None:
        super().__init__()
        first = _inception_stages() if config.variant == "inception" else _plain_stages()
        self.features = nn.Sequential(UnitInput(), *first, FlattenLikeKeras())
        inputs = 16 * (config.size // SHRINK) ** 2
        self.head = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(inputs, 16),
            nn.LeakyReLU(0.1),
            nn.Dropout(config.dropout),
            nn.Linear(16, 1),
        )

    def pooled(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> features (N, F)."""
        return self.features(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,)."""
        return self.head(self.pooled(images)).squeeze(1)


class UnitInput(nn.Module):
    """[-1, 1] -> [0, 1], what the authors trained on."""

    def forward(self, images: Tensor) -> Tensor:
        return (images + 1) / 2


class FlattenLikeKeras(nn.Module):
    """(N, C, h, w) -> (N, h·w·C, 1, 1), channels fastest."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]


class Inception(nn.Module):
    """Four branches side by side: 1×1; 1×1 then 3×3 with dilation 1, 2 and 3; ReLU after every convolution."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        plain, *dilated = widths
        self.plain = _conv(inputs, plain, 1)
        self.dilated = nn.ModuleList(
            nn.Sequential(*_conv(inputs, width, 1), *_conv(width, width, 3, dilation))
            for dilation, width in enumerate(dilated, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, sum of widths, H, W)."""
        return torch.cat([self.plain(x), *(branch(x) for branch in self.dilated)], dim=1)


def load_keras(net: MesoNet, path: str | Path, sha256: str = "") -> str:
    """Copy the authors' arrays into `net`, layer by layer in the order in which Keras numbered them; the file's SHA-256.

    Raises CheckpointError if the file is another one, or its layers have other shapes."""
    digest = file_sha256(path)
    if sha256 and digest != sha256:
        raise CheckpointError(
            f"weights {path} have SHA-256 {digest[:12]}…, expected {sha256[:12]}…; get the right file"
        )
    arrays = _read(path)
    for kind, types in (("conv2d", nn.Conv2d), ("batch_normalization", nn.BatchNorm2d), ("dense", nn.Linear)):
        _copy(kind, [m for m in net.modules() if isinstance(m, types)], arrays, path)
    last = net.head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.neg_()  # 1 = real there, 1 = fake here
        last.bias.neg_()
    return digest


# -- private --------------------------------------------------------------------------------------------------------


def _plain_stages() -> Iterable[nn.Module]:
    for inputs, outputs, kernel, pool in ((3, 8, 3, 2), (8, 8, 5, 2), (8, 16, 5, 2), (16, 16, 5, 4)):
        yield from (*_conv(inputs, outputs, kernel), _norm(outputs), nn.MaxPool2d(pool))


def _inception_stages() -> Iterable[nn.Module]:
    channels = 3
    for widths in INCEPTIONS:
        yield from (Inception(channels, widths), _norm(sum(widths)), nn.MaxPool2d(2))
        channels = sum(widths)
    for inputs, pool in ((channels, 2), (16, 4)):
        yield from (*_conv(inputs, 16, 5), _norm(16), nn.MaxPool2d(pool))


def _conv(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation)
    return nn.Sequential(conv, nn.ReLU(inplace=True))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, BN_EPS, BN_MOMENTUM)


def _read(path: str | Path) -> dict[str, NDArray[np.float32]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"weights {path} are no .npz of arrays; get the right file") from error


def _copy(
    kind: str, modules: list[nn.Module], arrays: dict[str, NDArray[np.float32]], path: str | Path
) -> None:
    """Layers of one kind, by the number at the end of Keras' name for them."""
    found = {int(m[1]) for name in arrays if (m := re.match(rf"{kind}_(\d+)\.", name))}
    if len(found) != len(modules):
        raise CheckpointError(
            f"weights {path} have {len(found)} {kind} layers, the net has {len(modules)}; set net.variant to the file's"
        )
    for number, module in zip(sorted(found), modules, strict=True):
        prefix = f"{kind}_{number}..{kind}_{number}."
        with torch.no_grad():
            for theirs, tensor in _tensors(module).items():
                _fill(tensor, arrays.get(f"{prefix}{theirs}:0"), f"{prefix}{theirs}", path)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Our tensors by Keras' names."""
    if isinstance(module, nn.BatchNorm2d):
        assert module.running_mean is not None
        assert module.running_var is not None
        return {
            "gamma": module.weight, "beta": module.bias,
            "moving_mean": module.running_mean, "moving_variance": module.running_var,
        }  # fmt: skip
    assert isinstance(module, nn.Conv2d | nn.Linear)
    assert module.bias is not None
    return {"kernel": module.weight, "bias": module.bias}


def _fill(ours: Tensor, theirs: NDArray[np.float32] | None, name: str, path: str | Path) -> None:
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}  # (H, W, in, out) -> (out, in, H, W); (in, out) -> (out, in)
    if theirs is None:
        raise CheckpointError(f"weights {path} lack {name}; get the right file")
    array = theirs.transpose(axes[theirs.ndim]) if theirs.ndim in axes else theirs
    if array.shape != tuple(ours.shape):
        raise CheckpointError(
            f"weights {path} do not fit: {name} has shape {array.shape}, the net needs {tuple(ours.shape)}; set"
            " net.size and net.variant to the file's"
        )
    ours.copy_(torch.from_numpy(np.ascontiguousarray(array)))
