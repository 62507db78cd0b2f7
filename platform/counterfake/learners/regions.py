"""Where face, eyes and mouth are in a face crop, as soft maps, from five points or from where they usually are.

Points are left eye, right eye, nose tip, left and right corner of the mouth, as seen. Letters: N crops, S side in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = 5
# Mean places in the square around the face box (shares of its side) over 160 procedural faces, rounded and made symmetric.
USUAL = ((0.32, 0.37), (0.68, 0.37), (0.50, 0.59), (0.33, 0.75), (0.67, 0.75))
EYE_RADIUS = 0.24, 0.32  # half axes of the ellipse around an eye and its brow / distance of the eyes
MOUTH_RADIUS = 0.46, 0.26  # of the mouth's
# Of the face's, / side of the square around its box, whose middle is its own. IoU with the exact masks of 160 procedural faces:
# 0.86; ellipses placed and sized by eyes and mouth reached 0.76, because a turned head brings the eyes together.
FACE_RADIUS = 0.42, 0.53
SOFT = 0.15  # share of an ellipse's radius over which its map falls from 1 to 0


def maps(points: Tensor, side: int, margin: float) -> Tensor:
    """points (N, 5, 2) in pixels of the crop, NaN where unknown -> (N, 4, S, S) in [0, 1]: face, left eye, right eye, mouth.

    `margin` is the crop's side / the face box's; crops without points get the usual ones."""
    points = torch.where(
        torch.isfinite(points).all(dim=(1, 2), keepdim=True), points, usual(points, side, margin)
    )
    left, right, _, *corners = points.unbind(1)
    mouth, across = (corners[0] + corners[1]) / 2, right - left
    wide = across.norm(dim=1).clamp(min=1.0)
    middle, box = torch.full_like(left, side / 2), torch.full_like(wide, side / margin)
    face = _ellipse(middle, across, FACE_RADIUS[0] * box, FACE_RADIUS[1] * box, side)
    eye = [
        _ellipse(place, across, EYE_RADIUS[0] * wide, EYE_RADIUS[1] * wide, side) for place in (left, right)
    ]
    lips = _ellipse(mouth, across, MOUTH_RADIUS[0] * wide, MOUTH_RADIUS[1] * wide, side)
    return torch.stack([face, *eye, lips], dim=1)


def usual(like: Tensor, side: int, margin: float) -> Tensor:
    """The usual points (5, 2) in pixels of a crop."""
    return ((like.new_tensor(USUAL) - 0.5) / margin + 0.5) * side


def crops(pictures: Tensor, where: Tensor, share: float, size: int) -> Tensor:
    """The square of `share` of the side around the centre of each map: pictures (N, C, S, S), where (N, S, S) -> (N, C, size, size).

    What lies outside repeats the border."""
    side = pictures.shape[-1]
    line = torch.linspace(-1, 1, side, device=where.device, dtype=where.dtype)
    mass = where.sum(dim=(1, 2)).clamp(min=1e-6)
    centre = torch.stack(
        [(where.sum(dim=1) @ line) / mass, (where.sum(dim=2) @ line) / mass], dim=1
    )  # (N, 2) x, y
    offsets = share * torch.linspace(-1, 1, size, device=where.device, dtype=where.dtype)
    grid = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), dim=-1)  # (size, size, 2)
    places = grid + centre[:, None, None]
    return torch.nn.functional.grid_sample(pictures, places, padding_mode="border", align_corners=True)


def _ellipse(centre: Tensor, axis: Tensor, radius_x: Tensor, radius_y: Tensor, side: int) -> Tensor:
    """centre, axis (N, 2), half axes (N,) along and across `axis` -> (N, S, S): 1 inside, 0 outside, soft between."""
    pixels = torch.arange(side, device=centre.device, dtype=centre.dtype) + 0.5
    grid = torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), dim=-1)  # (S, S, 2)
    away = grid - centre[:, None, None]
    along = (axis / axis.norm(dim=1, keepdim=True).clamp(min=1e-6))[:, None, None]
    x = (away * along).sum(-1) / radius_x[:, None, None]
    y = (away[..., 1] * along[..., 0] - away[..., 0] * along[..., 1]) / radius_y[:, None, None]
    return ((1 + SOFT / 2 - torch.hypot(x, y)) / SOFT).clamp(0, 1)
