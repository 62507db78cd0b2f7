"""What every picture detector has in common: features, global average pooling, a head with one logit, and public weights.

An architecture's file says how its features are built and under which names public files keep them; loading, digests,
error messages, input scaling and the two heads (one logit; 1,000 classes to check given weights) are here.
Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from counterfake.errors import CheckpointError
from counterfake.nets import NetConfig

EVERY = (("", ""),)  # for `load_weights`: all tensors, under their own names
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(NetConfig):
    """Images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,)."""

    dropout: float = 0.2  # probability, before the logit
    mirror: bool = (
        False  # outside training: the mean logit of the picture and its mirror image; twice the work
    )
    weights: str | None = (
        None  # file of ImageNet weights (.pth or .safetensors); None = random initialisation
    )
    weights_sha256: str = ""  # digest of that file: checked when `weights` is set, a record when not

    # (our prefix, prefix in public files) of the tensors to load; what matches none keeps its initialisation
    PUBLIC: ClassVar[tuple[tuple[str, str], ...]] = (
        ("features.", "features."),
        ("classifier.", "classifier."),
    )

    @abc.abstractmethod
    def features(self) -> tuple[nn.Module, int]:
        """(N, 3, H, W) in [-1, 1] -> maps (N, C, h, w), and C."""

    def head(self, channels: int) -> nn.Module:
        """Pooled features (N, C) -> logits (N, 1)."""
        return nn.Sequential(nn.Dropout(self.dropout), nn.Linear(channels, 1))

    def public_head(self, channels: int) -> nn.Module:
        """Pooled features (N, C) -> logits of the 1,000 ImageNet classes, named as in public files."""
        return nn.Sequential(nn.Dropout(self.dropout), nn.Linear(channels, 1000))

    def build(self) -> Detector:
        """The detector, with ImageNet features when `weights` is set. Raises CheckpointError if they do not fit."""
        features, channels = self.features()
        net = Detector(features, self.head(channels), mirror=self.mirror)
        net.apply(initialise)
        if self.weights is not None:
            load_weights(net, self.weights, self.weights_sha256, names=self.PUBLIC)
        return net

    def classifier(self) -> ImageNetClassifier:
        """The network under its original 1,000-class layer, with `weights` where set; to check given weights."""
        features, channels = self.features()
        net = ImageNetClassifier(features, self.public_head(channels))
        if self.weights is not None:
            load_weights(net, self.weights, self.weights_sha256, names=self.PUBLIC)
        return net

    def without_weights(self) -> Self:
        """The config to store beside trained weights: needs no file, keeps the digest of where it started."""
        digest = file_sha256(self.weights) if self.weights is not None else self.weights_sha256
        return replace(self, weights=None, weights_sha256=digest)


class Detector(nn.Module):
    """`features`, the mean over height and width, `head` with one logit."""

    def __init__(self, features: nn.Module, head: nn.Module, *, mirror: bool = False) -> None:
        super().__init__()
        self.features, self.head, self.mirror = features, head, mirror

    def pooled(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> features (N, C)."""
        return self.features(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> fakeness logits (N,)."""
        logits = self.head(self.pooled(images)).squeeze(1)
        if not self.mirror or self.training:
            return logits
        mirrored = self.head(self.pooled(images.flip(3))).squeeze(
            1
        )  # a pass of its own: the batch stays as small
        return (logits + mirrored) / 2


class ImageNetClassifier(nn.Module):
    """The same features under the original 1,000-class layer."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> class logits (N, 1000)."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class ImageNetInput(nn.Sequential):
    """Layers whose weights expect ImageNet's mean and deviation; takes [-1, 1] and rescales first."""

    scale: Tensor
    shift: Tensor

    def __init__(self, *layers: Any) -> None:
        super().__init__(*layers)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 0.5 / std, persistent=False)  # constants, in no state dict
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images * self.scale + self.shift
        for layer in self:
            images = layer(images)
        return images


class StochasticDepth(nn.Module):
    """Drops a residual branch of a picture with `probability` in training (Huang et al. 2016, 1603.09382)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """branch (N, C, H, W), to be added to its input."""
        if not self.training or self.probability == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= self.probability
        return branch * (kept / (1 - self.probability)).to(branch.dtype)


def load_weights(
    net: nn.Module, path: str | Path, sha256: str = "", *, names: tuple[tuple[str, str], ...]
) -> str:
    """Load the tensors of `net` that `names` (our prefix, the file's prefix) covers; returns the file's SHA-256.

    Half precision is widened. Raises CheckpointError if the file has another digest, or lacks or mis-shapes a tensor.
    """
    digest = file_sha256(path)
    if sha256 and digest != sha256:
        raise CheckpointError(
            f"weights {path} have SHA-256 {digest[:12]}…, expected {sha256[:12]}…; get the right file"
        )
    own, given = net.state_dict(), read_tensors(path)
    pairs = {name: public for name in own if (public := _public(name, names)) is not None}
    wanted = {n: p for n, p in pairs.items() if p in given or not n.endswith("num_batches_tracked")}
    chosen = {name: _shaped(given.get(public), own[name]) for name, public in wanted.items()}
    unfit = [name for name, tensor in chosen.items() if tensor is None]
    if unfit:
        raise CheckpointError(_misfit(path, unfit, wanted, own, given))
    net.load_state_dict({n: t.to(own[n].dtype) for n, t in chosen.items() if t is not None}, strict=False)
    return digest


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a state dict file, .safetensors or PyTorch's. Raises CheckpointError for anything else."""
    import safetensors.torch  # here: networks are built where there is only torch, too
    from safetensors import SafetensorError

    try:
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        given = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"weights {path} are no safetensors file; get the right file") from error
    except (
        Exception
    ) as error:  # torch.load has none of its own: pickle's, zipfile's, RuntimeError, KeyError, …
        raise CheckpointError(f"weights {path} are no PyTorch file of tensors; get the right file") from error
    if not isinstance(given, Mapping):
        raise CheckpointError(f"weights {path} hold a {type(given).__name__}, not tensors by name")
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a weights file. Raises CheckpointError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"weights {path} cannot be read: {error.strerror}; set weights=none to start from random"
        ) from error


def rounded(channels: float) -> int:
    """Nearest multiple of 8, never more than 10 % down; MobileNet's and EfficientNet's rule for scaled widths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def initialise(module: nn.Module) -> None:
    """For `Module.apply`: He for convolutions, torch's own uniform ±1/√inputs for dense layers, zero biases.

    Glorot's weights are more than twice as large in each layer of a head, and drown what fine-tuning starts from
    (EXPERIMENTS 2026-11-28)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        module.reset_parameters()
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# -- private --------------------------------------------------------------------------------------------------------


def _public(name: str, names: tuple[tuple[str, str], ...]) -> str | None:
    return next((theirs + name.removeprefix(ours) for ours, theirs in names if name.startswith(ours)), None)


def _shaped(given: Tensor | None, own: Tensor) -> Tensor | None:
    """`given` if it has our shape, perhaps without the trailing ones of a 1×1 kernel; None if it does not fit."""
    if given is None:
        return None
    bare = own.ndim == 4 and own.shape[2:] == (1, 1) and given.shape == own.shape[:2]
    return given if given.shape == own.shape else given.reshape(own.shape) if bare else None


def _misfit(
    path: str | Path,
    unfit: list[str],
    wanted: Mapping[str, str],
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> str:
    first = wanted[unfit[0]]
    found = f"has shape {tuple(given[first].shape)}" if first in given else "is not in the file"
    return (
        f"weights {path} do not fit: {len(unfit)} of {len(wanted)} tensors missing or of another shape, first {first}: "
        f"expected {tuple(own[unfit[0]].shape)}, it {found}; set the net's sizes to the file's, or get the right file"
    )
