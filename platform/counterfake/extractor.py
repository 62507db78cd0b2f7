"""Named and hashed feature extractors: pictures -> features (N, D) and, where the network classifies, probabilities (N, K).

Every extractor resizes alike (bicubic, antialiased, rounded to uint8, after Parmar et al. 2022,
https://arxiv.org/abs/2104.11222) and is known by the SHA-256 of its weights; figures taken with another one are refused.
Letters: N pictures, H W pixels, C channels, D features, K classes.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake import bundle as bundles
from counterfake import config as settings
from counterfake.config import Family
from counterfake.errors import CheckpointError, ConfigError
from counterfake.images import Preprocess
from counterfake.nets.autoencoder import Autoencoder
from counterfake.nets.inception import SIZE as INCEPTION_SIZE
from counterfake.nets.inception import InceptionV3
from counterfake.nets.mobilenetv2 import MobileNetV2Config, Origin
from counterfake.storage import file_sha256

BATCH = 128  # pictures in one pass
LUMA = (0.299, 0.587, 0.114)

Find = Callable[[str], Path]  # a bundle's folder from a registry reference or a path


@dataclasses.dataclass(frozen=True)
class Features:
    """What an extractor says of N pictures."""

    values: NDArray[np.float32]  # (N, D)
    probabilities: NDArray[np.float64] | None = None  # (N, K); None = the network does not classify


class Net(Protocol):
    """A network that gives features; where it has `classify`, features (N, D) -> logits (N, K)."""

    def pooled(self, images: Tensor) -> Tensor: ...


class ExtractorConfig(Family, abc.ABC):
    """Which network judges; subclasses are frozen keyword-only dataclasses."""

    sha256: str  # expected digest of the weights, or its first digits; "" = not checked

    @abc.abstractmethod
    def load(self, find: Find, device: torch.device) -> Extractor:
        """The network, verified. Raises CheckpointError for a wrong digest or weights that do not fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleExtractor(ExtractorConfig):
    """A bundle of ours: a classifier, a detector's backbone, an autoencoder's code."""

    model: str = "mnist-classifier"  # registry reference or a bundle's folder
    sha256: str = ""  # of the bundle

    def load(self, find: Find, device: torch.device) -> Extractor:
        bundle = bundles.read(find(self.model))
        _check(f"bundle {bundle.name}", bundle.digest, self.sha256)
        if bundle.kind not in ("classifier", "detector", "autoencoder"):
            raise ConfigError(
                f"{self.model} is a {bundle.kind}, which gives no features; name a classifier, a detector or an autoencoder"
            )
        net = bundles.load_nets(bundle)[bundle.kind]
        read = settings.from_dict(Preprocess, bundle.info["preprocess"])
        if isinstance(net, Autoencoder):
            return Extractor(
                bundle.name, bundle.digest, _Codes(net), read.size, read.channels, device, mean=0.0, std=255.0
            )
        return Extractor(bundle.name, bundle.digest, net, read.size, read.channels, device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionExtractor(ExtractorConfig):
    """The FID's own network, from a given file: weights with the names of pt_inception-2015-12-05 (.pth, .safetensors)."""

    weights: str  # path
    sha256: str = ""  # of the file

    def load(self, find: Find, device: torch.device) -> Extractor:
        state, digest = _read_weights(self.weights, self.sha256)
        net = InceptionV3(classes=len(state.get("fc.bias", ())) or 1008).build()
        known = {name: value for name, value in state.items() if not name.startswith("AuxLogits.")}
        _fill(net, known, self.weights)
        # as TensorFlow's graph reads bytes: (x - 128) / 128
        return Extractor(
            "inception-v3-2015-12-05", digest, net, INCEPTION_SIZE, 3, device, mean=128.0, std=128.0
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobileNetExtractor(ExtractorConfig):
    """MobileNetV2's ImageNet features, averaged over the picture (D = 1,280), from a given file: weights with torchvision's
    names (.pth, .safetensors). For faces where Inception's file is not at hand; its figures are no FID of the papers."""

    weights: str  # path
    sha256: str = ""  # of the file
    origin: Origin = "tensorflow"  # padding and BatchNorm epsilon the weights were trained with
    size: int = 224  # side of the pictures it reads, pixels

    def load(self, find: Find, device: torch.device) -> Extractor:
        _, digest = _read_weights(self.weights, self.sha256)
        net = MobileNetV2Config(weights=str(Path(self.weights).expanduser()), origin=self.origin).classifier()
        # its convention is [-1, 1], not ImageNet's mean and deviation
        return Extractor(f"mobilenet-v2-{self.origin}", digest, _Pooled(net.features), self.size, 3, device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoryExtractor(ExtractorConfig):
    """Any torch network: a callable by its dotted path, which is imported and run, and a file of weights.

    factory=timm.create_model arguments={"model_name": "resnet18", "num_classes": 0}; what it gives for (N, 3, H, W) must
    be (N, D), or maps (N, D, h, w), which are averaged."""

    factory: str  # dotted path of a callable that returns a torch.nn.Module
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of the callable
    weights: str  # path of a state dict; only tensors are read
    sha256: str = ""  # of that file
    size: int = 224  # side of the pictures it reads, pixels
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of its input, of 1; ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def load(self, find: Find, device: torch.device) -> Extractor:
        state, digest = _read_weights(self.weights, self.sha256)
        net = _call(self.factory, self.arguments)
        _fill(net, state, self.weights)
        mean, std = (np.array(values) * 255 for values in (self.mean, self.std))
        return Extractor(self.factory, digest, _Pooled(net), self.size, 3, device, mean=mean, std=std)


class Extractor:
    """A network in eval mode with its preparation."""

    def __init__(
        self,
        name: str,
        sha256: str,
        net: nn.Module,
        size: int,
        channels: int,
        device: torch.device,
        *,
        mean: Any = 127.5,
        std: Any = 127.5,
    ) -> None:
        """Pixels of 0 … 255 enter the network as (x - mean) / std; mean and std are numbers, or one per channel."""
        self.name, self.sha256, self.size, self.channels, self.device = name, sha256, size, channels, device
        self._net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = (
            torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1).to(device) for v in (mean, std)
        )

    @torch.inference_mode()
    def __call__(
        self, pictures: NDArray[np.uint8], progress: Callable[[int], None] | None = None
    ) -> Features:
        """pictures (N, H, W, C) uint8. progress(pictures) is called after each pass."""
        values, probabilities = [], []
        for start in range(0, len(pictures), BATCH):
            part = torch.from_numpy(np.ascontiguousarray(pictures[start : start + BATCH])).permute(0, 3, 1, 2)
            found = self._net.pooled(self._prepared(part.to(self.device)))
            values.append(found.float().cpu().numpy())
            if hasattr(self._net, "classify"):
                logits = self._net.classify(found)
                probabilities.append(logits.double().softmax(dim=1).cpu().numpy())
            if progress:
                progress(len(part))
        return Features(np.concatenate(values), np.concatenate(probabilities) if probabilities else None)

    def _prepared(self, pictures: Tensor) -> Tensor:
        pixels = resized(channels(pictures.float(), self.channels), self.size)
        return ((pixels - self._mean) / self._std).contiguous(memory_format=torch.channels_last)


def resized(pixels: Tensor, size: int) -> Tensor:
    """(N, C, H, W) of 0 … 255 -> (N, C, size, size), bicubic with antialiasing, rounded to whole numbers in 0 … 255."""
    if pixels.shape[2:] == (size, size):
        return pixels
    out = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return out.round_().clamp_(0, 255)


def channels(pixels: Tensor, wanted: int) -> Tensor:
    """Grey (N, 1, H, W) or RGB (N, 3, H, W) of 0 … 255 -> `wanted` channels; luma is rounded."""
    if pixels.shape[1] == wanted:
        return pixels
    if wanted == 3:
        return pixels.expand(-1, 3, -1, -1)
    weights = torch.tensor(LUMA, device=pixels.device).view(1, 3, 1, 1)
    return (pixels * weights).sum(dim=1, keepdim=True).round()


# -- private --------------------------------------------------------------------------------------------------------


class _Codes(nn.Module):
    """An autoencoder's code as features."""

    def __init__(self, net: Autoencoder) -> None:
        super().__init__()
        self.net = net

    def pooled(self, images: Tensor) -> Tensor:
        return self.net.encode(images)


class _Pooled(nn.Module):
    """Whatever a foreign network gives, as (N, D)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def pooled(self, images: Tensor) -> Tensor:
        out = self.net(images)
        if not isinstance(out, Tensor) or out.ndim not in (2, 4):
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ConfigError(f"the extractor's network gives {found}; expected (N, D) or (N, D, h, w)")
        return out.mean(dim=(2, 3)) if out.ndim == 4 else out


def _check(name: str, found: str, expected: str) -> None:
    if not found.startswith(expected.lower()):
        raise CheckpointError(
            f"extractor {name} has SHA-256 {found[:16]}…, but extractor.sha256 is {expected[:16]}; figures taken with "
            "another extractor cannot be compared: give the weights that are named, or name these"
        )


def _read_weights(path: str, expected: str) -> tuple[dict[str, Tensor], str]:
    """(state dict, SHA-256) of a file of tensors; nothing in it is executed."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"extractor.weights {file} is not there; give a file of weights")
    digest = file_sha256(file)
    _check(file.name, digest, expected)
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file), digest
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise half a dozen kinds for a bad file
        raise CheckpointError(f"{file} is no file of tensors: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} holds something else than a state dict of tensors")
    return dict(state), digest


def _fill(net: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Load weights that must all fit; counters of batch norm may be missing, as in converted files."""
    try:
        missing, extra = net.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit the network: {' '.join(str(error).split())[:200]}"
        ) from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit the network: {len(missing)} weights are missing ({', '.join(missing[:3])}) and "
            f"{len(extra)} are unknown ({', '.join(extra[:3])})"
        )


def _call(path: str, arguments: Mapping[str, Any]) -> nn.Module:
    module, _, name = path.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"extractor.factory {path!r} cannot be imported: {error}") from error
    net = factory(**arguments)
    if not isinstance(net, nn.Module):
        raise ConfigError(f"extractor.factory {path!r} returned a {type(net).__name__}, not a torch network")
    return net
