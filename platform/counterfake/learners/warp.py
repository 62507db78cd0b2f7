"""Training pairs for face swapping: a randomly bent face and the same face straight, as in the code of December 2017.

A 5×5 grid over the middle of the face is shaken; the picture read through the shaken grid is the input, the picture
under the similarity that best undoes the shaking is the target, so that only the bending is left to learn.
Differences from the original: any picture size; a whole batch at once; rotation, zoom, shift and mirror are folded into
the same coordinates, so a pixel is interpolated once instead of twice; and `legacy_half_pixel` is a choice. The original
resizes the grid with cv2.resize, whose half-pixel centres move the input half an output pixel against its target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from counterfake.errors import ConfigError

NODES = 5  # of the grid, per side


@dataclass(frozen=True, kw_only=True)
class WarpConfig:
    """Shares are of the input side (S pixels); the original is S = 256, output 64."""

    noise: float = 5 / 256  # standard deviation of a node's shake; 0 = no bending
    rotation: float = 10.0  # degrees, uniform in ±
    zoom: float = 0.05  # scale uniform in 1 ±
    shift: float = 0.05  # translation uniform in ±
    flip: float = 0.4  # probability of a mirror
    legacy_half_pixel: bool = False  # True: input and target half an output pixel apart, as originally

    def __post_init__(self) -> None:
        if self.noise < 0 or not 0 <= self.flip <= 1:
            raise ConfigError(f"noise must be >= 0 and flip in [0, 1], got {self.noise}, {self.flip}")

    def straight(self) -> WarpConfig:
        """The same moves without bending."""
        return replace(self, noise=0.0)


def pairs(
    faces: Tensor, size: int, coverage: float, config: WarpConfig, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """faces (N, 3, S, S) float -> (warped, target), both (N, 3, size, size). Draws from torch's default generator.

    `coverage` is the side of the region that is learned, as a share of S; 160 / 256 originally. Maps `extra` (N, K, S, S) of
    the faces come with the target, as its last K channels."""
    n, side, device = len(faces), faces.shape[-1], faces.device
    shake = torch.randn(n, NODES, NODES, 2, device=device) * (config.noise * side)
    warped, target = coordinates(shake, side, size, coverage, config.legacy_half_pixel)
    move = _Move(n, side, config, device)
    wanted = faces if extra is None else torch.cat([faces, extra], dim=1)
    return sample(faces, move(warped)), sample(wanted, move(target))


def centre(faces: Tensor, size: int, coverage: float) -> Tensor:
    """The learned region without any randomness: faces (N, 3, S, S) -> (N, 3, size, size)."""
    shake = torch.zeros(len(faces), NODES, NODES, 2, device=faces.device)
    return sample(faces, coordinates(shake, faces.shape[-1], size, coverage, False)[1])


def coordinates(shake: Tensor, side: int, size: int, coverage: float, legacy: bool) -> tuple[Tensor, Tensor]:
    """shake (N, 5, 5, 2) pixels (x, y) -> where input and target read: two (N, size, size, 2) in pixels of the face."""
    start = (1 - coverage) / 2 * side
    line = torch.linspace(start, side - start, NODES, device=shake.device)
    nodes = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1) + shake  # (N, 5, 5, 2)
    return _interpolated(nodes, size, legacy), _similar(nodes, size)


def sample(faces: Tensor, places: Tensor) -> Tensor:
    """Bilinear reading of faces (N, C, S, S) at places (N, h, w, 2) in pixels (x, y); outside, the border's pixels."""
    normalised = 2 * places / (faces.shape[-1] - 1) - 1
    return F.grid_sample(faces, normalised, padding_mode="border", align_corners=True)


def _interpolated(nodes: Tensor, size: int, legacy: bool) -> Tensor:
    """The 5×5 nodes at `size` × `size` output pixels."""
    grid = nodes.permute(0, 3, 1, 2)
    if legacy:  # cv2.resize to 5/4 of the size, then the middle
        margin = size // 8
        dense = F.interpolate(grid, size=(size + 2 * margin,) * 2, mode="bilinear", align_corners=False)
        dense = dense[:, :, margin : margin + size, margin : margin + size]
    else:  # output pixel i is grid place 4·i/size, where the target has it too
        dense = F.interpolate(grid, size=(size + 1,) * 2, mode="bilinear", align_corners=True)[
            :, :, :size, :size
        ]
    return dense.permute(0, 2, 3, 1)


def _similar(nodes: Tensor, size: int) -> Tensor:
    """Output pixels under the least-squares similarity (Umeyama 1991, proper rotations) of the nodes.

    With points as complex numbers it is dst = a·src + b, a = Σ conj(src′)·dst′ / Σ |src′|², primes from the mean.
    """
    src = torch.view_as_complex(nodes.flatten(1, 2).contiguous())  # (N, 25)
    line = torch.linspace(0, size, NODES, device=nodes.device)
    dst = torch.view_as_complex(torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).view(-1, 2))
    src_mean, dst_mean = src.mean(dim=1, keepdim=True), dst.mean()
    centred = src - src_mean
    a = (centred.conj() * (dst - dst_mean)).sum(1, keepdim=True) / centred.abs().square().sum(1, keepdim=True)
    pixels = torch.arange(size, device=nodes.device, dtype=nodes.dtype)
    out = torch.view_as_complex(
        torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), dim=-1).view(-1, 2)
    )
    return torch.view_as_real((out - dst_mean) / a + src_mean).view(-1, size, size, 2)


class _Move:
    """Coordinates of the changed picture -> of the given one: mirror, then the inverse of rotation, zoom and shift."""

    def __init__(self, n: int, side: int, config: WarpConfig, device: torch.device) -> None:
        angle = math.radians(config.rotation) * _uniform(n, device)
        scale = 1 + config.zoom * _uniform(n, device)
        self.factor = torch.polar(
            1 / scale, angle
        )  # inverse of cv2.getRotationMatrix2D(centre, angle, scale)
        self.shift = config.shift * side * torch.complex(_uniform(n, device), _uniform(n, device))
        self.mirrored = torch.rand(n, device=device) < config.flip
        self.side = side

    def __call__(self, places: Tensor) -> Tensor:
        x, y = places.unbind(-1)
        x = torch.where(self.mirrored[:, None, None], self.side - 1 - x, x)
        middle = complex(self.side // 2, self.side // 2)
        point = torch.complex(x, y) - middle - self.shift[:, None, None]
        return torch.view_as_real(point * self.factor[:, None, None] + middle)


def _uniform(n: int, device: torch.device) -> Tensor:
    """(N,) uniform in [-1, 1]."""
    return 2 * torch.rand(n, device=device) - 1
