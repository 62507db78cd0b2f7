"""Random changes to a batch on its own device: geometry, light, and what sharing does to pictures.

Everything draws from torch's default generator, which the loop seeds by (seed, step, rank); nothing synchronises.
JPEG is done here as its lossy part only (8×8 DCT, quantisation with the standard tables, 4:4:4): the entropy coding
changes no pixel, so a batch of 256 costs one matrix product per colour plane instead of 256 encoder calls. That speed is
what these are kept for beside images.degrade, which is the robustness grid's own damage (4:2:0, resize, share chain, any
sigma) and runs in the loader's threads where data.degradation asks for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from counterfake.errors import ConfigError

# ITU-T T.81 annex K.1, luma; the one table here serves all planes, because chroma is not subsampled
_LUMA = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)
MOST_SIGMA = 2.0  # that a kernel of 9 holds
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Strengths of the changes; each kind of degradation happens to `probability` of the pictures, independently."""

    flip: float = 0.5  # probability of a horizontal mirror
    zoom: float = 0.1  # scale factor is uniform in [1 - zoom, 1 + zoom]
    shift: float = 0.05  # translation, share of the side, each axis
    geometry: float = (
        1.0  # share of pictures that are zoomed and shifted (and so interpolated); the rest only flip
    )
    jitter: int = (
        0  # translation by up to so many whole pixels, each axis, border reflected; nothing is interpolated
    )
    crop: int = 0  # pixels of a side of the random window that is learned from; 0 = the whole picture
    brightness: float = 0.1  # added, of the full range [-1, 1] halved
    contrast: float = 0.2  # factor in [1 - c, 1 + c] about the picture's mean
    colour: float = 0.05  # factor per channel in [1 - c, 1 + c]
    probability: float = 0.3  # of each of jpeg, blur, noise
    jpeg: tuple[int, int] | None = (50, 100)  # quality
    blur: tuple[float, float] | None = (0.1, 1.5)  # sigma, pixels
    noise: tuple[float, float] | None = (0.0, 0.03)  # standard deviation, in units of [-1, 1]

    def __post_init__(self) -> None:
        shares = (self.flip, self.geometry, self.probability)
        if not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"flip, geometry and probability must lie in [0, 1], got {shares}")
        if min(self.jitter, self.crop) < 0:
            raise ConfigError(f"jitter and crop must be at least 0 pixels, got {self.jitter} and {self.crop}")
        if self.blur and self.blur[1] > MOST_SIGMA:
            raise ConfigError(
                f"augmentation.blur reaches sigma {MOST_SIGMA:g}, got {self.blur[1]:g}; "
                "data.degradation.blur blurs more"
            )

    @classmethod
    def off(cls) -> AugmentationConfig:
        return cls(flip=0, zoom=0, shift=0, geometry=0, brightness=0, contrast=0, colour=0, probability=0)


def augment(images: Tensor, config: AugmentationConfig) -> Tensor:
    """images (N, C, H, W) in [-1, 1] -> (N, C, H, W), or (N, C, crop, crop), each picture changed on its own."""
    images = cropped(jittered(_move(images, config), config.jitter), config.crop)
    images = _relight(images, config)
    images = _degrade(images, config)
    return images.clamp(-1, 1)


def _move(images: Tensor, config: AugmentationConfig) -> Tensor:
    n, device = len(images), images.device
    sign = 1 - 2 * (torch.rand(n, device=device) < config.flip).float()
    if config.geometry == 0 or config.zoom == config.shift == 0:
        return torch.where((sign < 0)[:, None, None, None], images.flip(3), images)
    moved = (torch.rand(n, device=device) < config.geometry).float()
    scale = 1 + config.zoom * moved * _uniform(n, device)
    matrix = torch.zeros(n, 2, 3, device=device)
    matrix[:, 0, 0], matrix[:, 1, 1] = sign * scale, scale
    matrix[:, :, 2] = (
        2 * config.shift * moved[:, None] * torch.stack([_uniform(n, device), _uniform(n, device)], 1)
    )
    places = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="reflection", align_corners=False)


def _relight(images: Tensor, config: AugmentationConfig) -> Tensor:
    n, channels, device = len(images), images.shape[1], images.device
    contrast = 1 + config.contrast * _uniform(n, device)[:, None, None, None]
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * contrast + mean + config.brightness * _uniform(n, device)[:, None, None, None]
    colour = 1 + config.colour * _uniform(n * channels, device).view(n, channels, 1, 1)
    return (images + 1) * colour - 1  # black stays black


def _degrade(images: Tensor, config: AugmentationConfig) -> Tensor:
    """Blur, then noise, then JPEG: the order in which lens, sensor and file do it."""
    n, device = len(images), images.device
    if config.probability == 0:
        return images
    if config.blur:
        images = _some(images, blur(images, _between(config.blur, n, device)), config.probability)
    if config.noise:
        std = _between(config.noise, n, device)[:, None, None, None]
        images = _some(images, images + std * torch.randn_like(images), config.probability)
    if config.jpeg:
        images = _some(images, jpeg(images, _between(config.jpeg, n, device)), config.probability)
    return images


def jittered(images: Tensor, most: int) -> Tensor:
    """Each picture (N, C, H, W) moved by up to `most` whole pixels along both axes; the border is reflected."""
    if most == 0:
        return images
    n, _, height, width = images.shape
    rows, columns = (_reflected(n, side, most, images.device) for side in (height, width))
    return _taken(images, rows, columns)


def cropped(images: Tensor, side: int) -> Tensor:
    """A random window of each picture (N, C, H, W) -> (N, C, side, side); 0 = all of it."""
    if side == 0:
        return images
    n, _, *sides = images.shape
    device = images.device
    starts = (torch.randint(whole - side + 1, (n, 1), device=device) for whole in sides)
    rows, columns = (start + torch.arange(side, device=device) for start in starts)  # (N, side) each
    return _taken(images, rows, columns)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each picture (N, C, H, W) with its own sigma (N,) in pixels, up to 2.0 (kernel of 9)."""
    n, channels, height, width = images.shape
    taps = torch.arange(-4, 5, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(taps**2) / (2 * sigma[:, None].clamp(min=1e-3) ** 2))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, 0)  # (N·C, 9)
    flat = F.pad(images.reshape(1, n * channels, height, width), (4, 4, 4, 4), mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * channels)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
    return flat.view_as(images)


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """What JPEG at each picture's quality (N,) in [1, 100] leaves of images (N, C, H, W) in [-1, 1]; 4:4:4."""
    channels, height, width = images.shape[1:]
    padded = F.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate") * 127.5 + 127.5
    planes = _mix(padded, _TO_YCC) if channels == 3 else padded
    centre = torch.tensor([128.0, 0.0, 0.0][:channels], device=images.device)[:, None, None]
    rows, columns = planes.shape[2] // 8, planes.shape[3] // 8
    blocks = (
        (planes - centre).reshape(-1, channels, rows, 8, columns, 8).transpose(3, 4)
    )  # (N, C, h, w, 8, 8)
    basis = _dct(images.device)
    step = _steps(quality)[:, None, None, None]  # (N, 1, 1, 1, 8, 8)
    levels = basis @ blocks @ basis.T / step
    kept = levels.sign() * (levels.abs() + 0.5).floor() * step  # libjpeg rounds halves away from zero
    planes = (basis.T @ kept @ basis).transpose(3, 4).flatten(4, 5).flatten(2, 3) + centre
    pixels = _mix(planes, _TO_RGB) if channels == 3 else planes
    return (pixels[:, :, :height, :width].round().clamp(0, 255) - 127.5) / 127.5


def _steps(quality: Tensor) -> Tensor:
    """Quantisation tables (N, 8, 8) by libjpeg's rule for `quality`."""
    table = torch.tensor([float(v) for v in _LUMA.split()], device=quality.device).view(8, 8)
    scale = torch.where(quality < 50, 5000 / quality.clamp(min=1), 200 - 2 * quality)
    return ((table * scale[:, None, None] + 50) / 100).floor().clamp(1, 255)


def _dct(device: torch.device) -> Tensor:
    """Orthonormal DCT-II matrix (8, 8)."""
    k = torch.arange(8, device=device, dtype=torch.float32)
    basis = torch.cos(math.pi * (2 * k[None, :] + 1) * k[:, None] / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis


def _mix(planes: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """(N, 3, H, W) with `matrix` applied to the channels."""
    return torch.einsum("ij,njhw->nihw", torch.tensor(matrix, device=planes.device), planes)


def _some(images: Tensor, changed: Tensor, probability: float) -> Tensor:
    chosen = torch.rand(len(images), device=images.device) < probability
    return torch.where(chosen[:, None, None, None], changed, images)


def _taken(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of each picture (N, C, H, W) its own rows (N, h) and columns (N, w) -> (N, C, h, w)."""
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflected(n: int, side: int, most: int, device: torch.device) -> Tensor:
    """(n, side): the pixel that each place takes after a random move of each of n pictures."""
    moved = torch.arange(side, device=device) + torch.randint(-most, most + 1, (n, 1), device=device)
    return (side - 1) - ((side - 1) - moved.abs()).abs()


def _uniform(n: int, device: torch.device) -> Tensor:
    """(N,) uniform in [-1, 1]."""
    return 2 * torch.rand(n, device=device) - 1


def _between(bounds: tuple[float, float] | tuple[int, int], n: int, device: torch.device) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(n, device=device)
