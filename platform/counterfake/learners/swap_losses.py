"""Losses of painted faces, each a function of pictures in [0, 1] with its formula.

x the painted face, y the face that was wanted, w weights of its pixels. Letters: N rows, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets.backbone import ImageNetInput, load_weights
from counterfake.nets.mobilenetv2 import HalfTurned, MobileNetV2Config
from counterfake.nets.resnet import resnet50

SSIM_SIGMA = 1.5  # pixels, of the Gaussian window
PerceptualNet = Literal["resnet50", "mobilenetv2"]
C1, C2 = 0.01**2, 0.03**2  # of SSIM, for a range of 1


@dataclass(frozen=True, kw_only=True)
class SwapLosses:
    """Weights of the terms; 0 leaves a term out. Pixels and masks in [0, 1], means over rows and pixels."""

    mae: float = 1.0  # |x - y|
    mse: float = 0.0  # (x - y)²
    dssim: float = 0.0  # (1 - SSIM) / 2, split evenly over the windows
    dssim_windows: tuple[float, ...] = (
        11.6,
    )  # side of the face / window, each; windows are rounded to odd pixels
    edge: float = 0.0  # |dx - dy| of neighbouring pixels
    eyes: float = (
        0.0  # |x - y| over the eyes, beside the other terms; a mean over the whole picture, as originally
    )
    mouth: float = 0.0  # the same over the mouth
    eye_factor: float = 1.0  # weight of the eyes' pixels in mae and mse; others have 1
    mouth_factor: float = 1.0  # of the mouth's
    background: float = 1.0  # of what is not face, in dssim too; below 1 the training is masked
    parts: float = (
        0.0  # |x - y| of eye and mouth crops of what a second head painted, × eye_factor, × mouth_factor
    )
    mask: float = 0.0  # (mask - truth)²; truth is the row's own mask, else an ellipse by its points
    mask_l1: float = 0.0  # |mask|, or max(0, hinge - mask) where the phase has a hinge
    mask_tv: float = 0.0  # total variation of the mask
    tv: float = 0.0  # total variation of the painted face
    adversarial: float = 0.0  # of the critic's verdict, × the phase's factor
    mixup: float = 0.2  # Beta(mixup, mixup) mixes real and fake for the critic; 0 = they stay apart
    perceptual: tuple[float, ...] = ()  # weight of each stage of the perceptual network, × the phase's factor
    perceptual_weights: str = (
        ""  # .safetensors or .pth of perceptual_net in torchvision's names; "" = no such loss
    )
    perceptual_net: PerceptualNet = "resnet50"  # mobilenetv2: weights trained by TensorFlow

    def __post_init__(self) -> None:
        for name in (
            "mae",
            "mse",
            "dssim",
            "edge",
            "eyes",
            "mouth",
            "parts",
            "mask",
            "mask_l1",
            "mask_tv",
            "tv",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"losses.{name} must not be negative, got {getattr(self, name)}")
        if bool(self.perceptual) != bool(self.perceptual_weights):
            raise ConfigError(
                "losses.perceptual and losses.perceptual_weights belong together; set both, or neither"
            )
        if not self.mae + self.mse + self.dssim:
            raise ConfigError("losses needs at least one of mae, mse and dssim above 0")

    @property
    def needs_points(self) -> bool:
        """Whether a term asks where face, eyes or mouth are."""
        weighted = (self.eye_factor, self.mouth_factor, self.background) != (1.0, 1.0, 1.0)
        return weighted or max(self.eyes, self.mouth, self.parts, self.mask) > 0


def weighted_mean(errors: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of w · errors over everything, errors (N, C, H, W), w (N, 1, H, W); not divided by the sum of w."""
    return errors.mean() if weights is None else (errors * weights).mean()


def ssim(x: Tensor, y: Tensor, window: int = 11) -> Tensor:
    """Structural similarity of x and y (N, C, H, W) -> (N,) in [-1, 1]. Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861,
    eq. 13, Gaussian window of `window` pixels with SSIM_SIGMA; only windows that lie in the picture count."""
    channels = x.shape[1]
    kernel = gaussian(window).to(x)
    stack = torch.cat([x, y, x * x, y * y, x * y], dim=1)
    column = kernel.view(1, 1, -1, 1).expand(5 * channels, 1, -1, 1)
    blurred = F.conv2d(F.conv2d(stack, column, groups=5 * channels), column.mT, groups=5 * channels)
    mx, my, xx, yy, xy = torch.split(blurred, channels, dim=1)
    likeness = (2 * mx * my + C1) / (mx * mx + my * my + C1)
    contrast = (2 * (xy - mx * my) + C2) / (xx - mx * mx + yy - my * my + C2)
    return (likeness * contrast).mean(dim=(1, 2, 3))


def dssim(x: Tensor, y: Tensor, window: int = 11) -> Tensor:
    """(1 - SSIM) / 2, mean over rows -> scalar."""
    return (1 - ssim(x, y, window).mean()) / 2


def window(side: int, divisor: float) -> int:
    """Pixels of an SSIM window: side / divisor, odd, at least 3."""
    return max(3, 2 * (int(side / divisor) // 2) + 1)


def gaussian(size: int) -> Tensor:
    """(size,) Gaussian weights of SSIM_SIGMA that sum to 1."""
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-places.square() / (2 * SSIM_SIGMA**2))
    return (weights / weights.sum()).float()


def edge(x: Tensor, y: Tensor) -> Tensor:
    """Mean |dx - dy| of horizontal and of vertical neighbours, added."""
    return sum(((a - b).abs().mean() for a, b in zip(_slopes(x), _slopes(y), strict=True)), x.new_zeros(()))


def total_variation(x: Tensor) -> Tensor:
    """Mean |dx| of horizontal and of vertical neighbours, added."""
    return sum((slope.abs().mean() for slope in _slopes(x)), x.new_zeros(()))


def mask_size(mask: Tensor, hinge: float) -> Tensor:
    """Mean |mask|; with a hinge max(0, hinge - mask), the mean as well, which keeps a mask from vanishing."""
    return (hinge - mask).clamp(min=0).mean() if hinge else mask.abs().mean()


def mixed(real: Tensor, fake: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Pictures between real and fake (N, C, H, W), and how real they are, λ ~ Beta(alpha, alpha) of each row (N, 1, 1, 1).

    Zhang et al. 2017, https://arxiv.org/abs/1710.09412. Draws from torch's default generator on the CPU."""
    share = torch.distributions.Beta(alpha, alpha).sample((len(real), 1, 1, 1)).to(real)
    return share * real + (1 - share) * fake, share


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """LSGAN, (D - λ)²: of mixed pictures with their share λ of real, or of real (1) and fake (0) for alpha = 0."""
    if alpha:
        pictures, wanted = mixed(real, fake, alpha)
        return (critic(pictures).float() - wanted).square().mean()
    logits = critic(torch.cat([real, fake])).float()
    return ((logits[: len(real)] - 1).square().mean() + logits[len(real) :].square().mean()) / 2


def painter_loss(critic: nn.Module, fake: Tensor) -> Tensor:
    """(D - 1)² of painted pictures."""
    return (critic(fake).float() - 1).square().mean()


class Perceptual:
    """Distance between features of a fixed network: Σ w · |f(x) - f(y)| over its four stages, each a mean.

    The network of the original, a ResNet-50 trained on faces, has no free weights we know of; which one is given here is
    the user's choice and part of the job. Stages are where the side is 1/4, 1/8, 1/16 and 1/32, last layer of each."""

    def __init__(
        self, weights: tuple[float, ...], path: str, device: torch.device, kind: PerceptualNet = "resnet50"
    ) -> None:
        """Raises CheckpointError if the file's weights do not fit."""
        self.net, self.stages, public = _perceptual_net(kind)
        if len(weights) != len(self.stages):
            raise ConfigError(f"losses.perceptual needs {len(self.stages)} weights, got {len(weights)}")
        self.weights = weights
        load_weights(self.net, path, names=(("", public),))
        self.net.to(device).eval().requires_grad_(False)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x and y (N, 3, S, S) in [0, 1] -> scalar."""
        pairs = zip(self._stages(x), self._stages(y.detach()), strict=True)
        terms = [w * (a - b).abs().mean() for w, (a, b) in zip(self.weights, pairs, strict=True)]
        return torch.stack(terms).sum()

    def _stages(self, pictures: Tensor) -> list[Tensor]:
        features, found = 2 * pictures - 1, []
        if isinstance(self.net, ImageNetInput):
            features = features * self.net.scale + self.net.shift
        if isinstance(self.net, HalfTurned):  # one layer alone turns nothing; both pictures stay turned
            features = features.flip(2, 3)
        for name, layer in self.net.named_children():
            features = layer(features)
            if name in self.stages:
                found.append(features.float())
        return found


def _perceptual_net(kind: PerceptualNet) -> tuple[nn.Sequential, tuple[str, ...], str]:
    """(layers that take pictures in [-1, 1], names of those whose features count, prefix of their names in files)."""
    if kind == "resnet50":
        return ImageNetInput(resnet50().layers(inputs=3)[0]), ("layer1", "layer2", "layer3", "layer4"), ""
    layers, _ = MobileNetV2Config().features()
    assert isinstance(layers, nn.Sequential), "MobileNetV2 is a row of layers"
    return HalfTurned(*list(layers)[:18]), ("3", "6", "13", "17"), "features."


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
