"""Self-blended images: fakes made from a real picture and a changed copy of itself, for detectors that must not know a generator.

Shiohara and Yamasaki 2022, https://arxiv.org/abs/2204.08376, section 3.2: one of two copies is changed in colour or frequency, the
source copy is scaled and moved a little, a mask inside the face is deformed and softened, and the source is blended into the target.
Different here: rows need no landmarks, the mask is a random half or whole of an ellipse where a face crop has its face, not a
hull of landmarks; colours change by gain and offset per channel instead of in HSV; everything happens on the batch's own
device, drawn from torch's default generator, which the loop seeds by (seed, step, rank). Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from counterfake.errors import ConfigError

RATIOS = (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)  # of the source inside the mask; the paper's section 3.2
CENTRE, RADII = (0.5, 0.55), (0.34, 0.44)  # of the ellipse in a face crop, shares of width and height


@dataclass(frozen=True, kw_only=True)
class BlendingConfig:
    """How many pseudo-fakes, and how strong their traces."""

    share: float = 0.0  # of the real pictures of a batch that become pseudo-fakes; 0 = none
    colour: float = 0.1  # largest change of a channel's gain and offset, of the full range [-1, 1] halved
    contrast: float = 0.1  # largest change of contrast about the picture's mean
    shrink: tuple[float, float] = (
        0.25,
        0.6,
    )  # side of the down-sampled copy / side; the other half is sharpened
    scale: float = 0.05  # the source is scaled by a factor in [1 - s, 1 + s] …
    shift: float = 0.03  # … and moved by up to this share of the side
    elastic: float = 0.08  # largest displacement of the mask's edge, share of the side

    def __post_init__(self) -> None:
        low, high = self.shrink
        if not 0 <= self.share <= 1 or not 0 < low <= high <= 1:
            raise ConfigError(
                f"blending.share must lie in [0, 1] and blending.shrink in (0, 1], got {self.share} and {self.shrink}"
            )


def blend_real_rows(images: Tensor, fake: Tensor, config: BlendingConfig) -> tuple[Tensor, Tensor]:
    """images (N, C, H, W) in [-1, 1] and labels (N,) -> both with `share` of the real rows turned into pseudo-fakes.

    Fakes and rows of unknown label stay as they are."""
    if config.share == 0:
        return images, fake
    chosen = (fake == 0) & (torch.rand(len(images), device=images.device) < config.share)
    blended = self_blend(images, config)  # of every row: picking rows would wait for the device
    return torch.where(chosen[:, None, None, None], blended, images), torch.where(chosen, 1, fake)


def self_blend(images: Tensor, config: BlendingConfig) -> Tensor:
    """Pseudo-fakes of images (N, C, H, W) in [-1, 1]: source ⊙ mask + target ⊙ (1 - mask). The paper's equation 1."""
    n, device = len(images), images.device
    changed = disturb(images, config)
    first = (torch.rand(n, device=device) < 0.5)[:, None, None, None]  # which copy is changed
    source = move(torch.where(first, changed, images), config)
    target = torch.where(first, images, changed)
    mask = soft_mask(n, images.shape[2], images.shape[3], config, device)
    return (target + mask * (source - target)).clamp(-1, 1)


def disturb(images: Tensor, config: BlendingConfig) -> Tensor:
    """Other colours, then either fewer or stronger details; each picture (N, C, H, W) on its own."""
    n, channels = images.shape[:2]
    gain, offset = (
        config.colour * _uniform(n * channels, images.device).view(n, channels, 1, 1) for _ in "go"
    )
    contrast = 1 + config.contrast * _uniform(n, images.device)[:, None, None, None]
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean) * (1 + gain) + offset
    soft = _downsampled(images, config)
    half = (torch.rand(n, device=images.device) < 0.5)[:, None, None, None]
    return torch.where(half, soft, 2 * images - soft).clamp(-1, 1)  # sharpened by what down-sampling loses


def move(images: Tensor, config: BlendingConfig) -> Tensor:
    """Scaled and moved a little, so that edges of source and target do not meet; the border is reflected."""
    n, device = len(images), images.device
    matrix = torch.zeros(n, 2, 3, device=device)
    scale = 1 + config.scale * _uniform(n, device)
    matrix[:, 0, 0], matrix[:, 1, 1] = scale, scale
    matrix[:, :, 2] = 2 * config.shift * torch.stack([_uniform(n, device), _uniform(n, device)], dim=1)
    places = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="reflection", align_corners=False)


def soft_mask(
    n: int, height: int, width: int, config: BlendingConfig, device: torch.device | str = "cpu"
) -> Tensor:
    """(n, 1, height, width) in [0, 1]: a deformed piece of a face, softened inwards, times a blending ratio."""
    hard = _deformed_ellipse(n, height, width, config, device)
    side = min(height, width)
    # sigmas, pixels; the first stays small, or little pieces vanish and a picture that did not change is called fake
    first, second = (side * (0.005 + most * torch.rand(n, device=device)) for most in (0.015, 0.045))
    # After the first blur only the pixels that are still 1 stay: the edge lies inside when the first sigma is the larger.
    inner = (_blurred(hard, first) >= 0.999).float()
    ratio = torch.tensor(RATIOS, device=device)[torch.randint(len(RATIOS), (n,), device=device)]
    return (_blurred(inner, second) * ratio[:, None, None, None]).clamp(0, 1)


# -- private --------------------------------------------------------------------------------------------------------


def _deformed_ellipse(
    n: int, height: int, width: int, config: BlendingConfig, device: torch.device | str
) -> Tensor:
    """(n, 1, H, W) of 0 and 1: an ellipse of random size, elastically deformed, whole or one half of it."""
    y, x = torch.meshgrid(
        (torch.arange(height, device=device) + 0.5) / height,
        (torch.arange(width, device=device) + 0.5) / width,
        indexing="ij",
    )
    waves = 2 * torch.rand(n, 2, 6, 6, device=device) - 1  # a coarse field of displacements, made smooth
    smooth = config.elastic * F.interpolate(waves, (height, width), mode="bicubic", align_corners=False)
    dx, dy = x + smooth[:, 0] - CENTRE[0], y + smooth[:, 1] - CENTRE[1]  # (n, H, W)
    size = 1 + 0.2 * _uniform(n, device)[:, None, None]
    inside = (dx / (size * RADII[0])).square() + (dy / (size * RADII[1])).square() < 1
    part = torch.randint(4, (n, 1, 1), device=device)  # whole, whole, lower half, upper half
    kept = (part < 2) | ((part == 2) & (dy > 0)) | ((part == 3) & (dy <= 0))
    return (inside & kept).float()[:, None]


def _blurred(masks: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each mask (n, 1, H, W) with its own sigma (n,) in pixels; outside the picture is 0."""
    n, reach = len(masks), max(1, round(0.15 * min(masks.shape[2:])))  # three of the largest sigma
    taps = torch.arange(-reach, reach + 1, device=masks.device, dtype=masks.dtype)
    kernel = torch.exp(-(taps**2) / (2 * sigma[:, None].clamp(min=0.3) ** 2))
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (n, 2 reach + 1)
    flat = masks.transpose(0, 1)  # (1, n, H, W)
    flat = F.conv2d(flat, kernel[:, None, None, :], padding=(0, reach), groups=n)
    flat = F.conv2d(flat, kernel[:, None, :, None], padding=(reach, 0), groups=n)
    return flat.transpose(0, 1)


def _downsampled(images: Tensor, config: BlendingConfig) -> Tensor:
    """Shrunk and grown again by one factor for the batch: a factor per picture would need a size per picture."""
    low, high = config.shrink
    factor = low + (high - low) * float(torch.rand(()))  # from the CPU's generator: nothing waits
    small = F.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[2:], mode="bilinear")


def _uniform(n: int, device: torch.device | str) -> Tensor:
    """(n,) uniform in [-1, 1]."""
    return 2 * torch.rand(n, device=device) - 1
