"""Composites: parts of one real face put into another, as a forger with an image editor does. Pseudo-fakes for detectors.

Self-blended images (learners/blending.py) teach the edge of a face; here eyes, nose and mouth come from another real picture of
the same batch, the one most alike in colour and pose, brought into place by the landmarks, matched in colour or melted into
its surroundings, under an edge as soft as a brush. Everything happens on the batch's own device, drawn from torch's default
generator, which the loop seeds by (seed, step, rank); nothing waits for the device.
Colour: Reinhard et al. 2001, https://doi.org/10.1109/38.946629, mean and deviation, here in RGB. Melting: the difference of target
and donor around the part, carried smoothly inwards, is added to the donor; the membrane of Pérez et al. 2003,
https://doi.org/10.1145/882262.882269, approximated by a normalised blur. Similarity: least squares in complex numbers.
Letters: N batch, K composites, P parts, H W pixels. Points are pixels from the picture's left and upper edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from counterfake.errors import ConfigError

# eyes, nose tip, corners of the mouth of the mirrored picture; left to right as seen
MIRRORED = (1, 0, 2, 4, 3)
EYES_TO_NOSE, EYES_TO_MOUTH, MOUTH = 0.6, 1.05, 0.42  # of a frontal face, in distances of the eyes
# half axes of each part, in distances of the eyes: left eye, right eye, nose, mouth, the whole inner face
AXES = ((0.40, 0.30), (0.40, 0.30), (0.30, 0.45), (0.52, 0.36), (0.95, 1.05))
ALIKE = 2  # the donor is one of so many that look most alike
EAGER = 1.0  # smaller: rows with a good donor are chosen more surely; unit: deviations of colour and pose among faces
GAIN = (0.7, 1.4)  # limits of the factor on a part's deviation
COARSE = 8  # melting works on pictures smaller by this


@dataclass(frozen=True, kw_only=True)
class CompositesConfig:
    """How many composites, and how well they are made."""

    share: float = 0.0  # of a batch's rows that become composites, fakes before real ones; 0 = none
    whole: float = 0.35  # share of composites with all four parts; the others draw each part with one half
    joined: float = 0.5  # share whose parts come in one piece, not each by itself
    melted: float = (
        0.4  # share whose parts are melted in; the others match colours, one in seven not even that
    )
    mirror: float = 0.5  # share whose donor is mirrored
    scale: float = 0.06  # standard deviation of a part's size about 1
    shift: float = 0.015  # of its place, in distances of the eyes
    grow: tuple[float, float] = (0.9, 1.4)  # factor on AXES
    feather: tuple[float, float] = (0.03, 0.25)  # width of the soft edge, in distances of the eyes
    opaque: tuple[float, float] = (0.7, 1.0)  # opacity of one composite in five; 1 of the others

    def __post_init__(self) -> None:
        shares = (self.share, self.whole, self.joined, self.melted, self.mirror)
        if not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"composites: every share must lie in [0, 1], got {shares}")
        for name in ("grow", "feather", "opaque"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(
                    f"composites.{name} must be two rising numbers above 0, got {low:g} and {high:g}"
                )


def with_composites(
    images: Tensor, fake: Tensor, landmarks: Tensor, config: CompositesConfig
) -> tuple[Tensor, Tensor]:
    """images (N, 3, H, W) in [-1, 1], labels (N,), landmarks (N, 5, 2), NaN unknown -> images and labels with composites of the
    batch's real rows in place of fakes, and of real rows where there are not enough fakes.

    So a picture and its composite are in one batch, and the classes keep their shares. Rows of unknown label stay; real rows
    without eyes neither change nor give; a batch with fewer than two that can stays as it is."""
    count = min(round(config.share * len(images)), len(images))
    if not count:
        return images, fake
    points = completed(landmarks)
    usable = (fake == 0) & points.isfinite().flatten(1).all(1)
    points = torch.view_as_complex(torch.where(usable[:, None, None], points, _SAFE.to(points)).contiguous())
    target, donor, found = _pairs(images, points, usable, count)
    made = composed(images[target], images[donor], points[target], points[donor], config)
    # the best pairs come first, and so do the fakes: a batch of few pairs fills few places
    places = ((fake == 1).float() + (fake >= 0).float() + torch.rand_like(fake, dtype=images.dtype)).topk(
        count
    )
    filled = found & (places.values >= 1)
    made = torch.where(_rows(filled), made, images[places.indices])
    labels = torch.where(filled, torch.ones_like(fake[places.indices]), fake[places.indices])
    return images.index_copy(0, places.indices, made), fake.index_copy(0, places.indices, labels)


def composed(target: Tensor, donor: Tensor, to: Tensor, of: Tensor, config: CompositesConfig) -> Tensor:
    """target and donor (K, 3, H, W), their points `to` and `of` (K, 5) complex -> composites (K, 3, H, W)."""
    k, device = len(target), target.device
    donor, of = _mirrored(donor, of, torch.rand(k, device=device) < config.mirror)
    chosen, joined = _parts(k, config, device)  # (K, P), (K,)
    eyes = to[:, 1] - to[:, 0]
    apart = eyes.abs().clamp(min=1)  # (K,)
    turn = eyes / apart
    grow = _between(config.grow, k, device)
    feather = _between(config.feather, k, device) * apart
    opacity = torch.where(torch.rand(k, device=device) < 0.2, _between(config.opaque, k, device), 1.0)
    melted = torch.rand(k, device=device) < config.melted
    matched = torch.rand(k, device=device) < 6 / 7
    places, sources = centres(to), centres(of)  # (K, P)
    ratio = similarity(of, to) * (1 + config.scale * torch.randn(k, device=device))
    middle = _weighted(places, chosen), _weighted(sources, chosen)
    grid = _grid(target)  # (H, W) complex
    out = target
    for part, axes in enumerate(AXES):
        loose = torch.complex(*torch.randn(2, k, device=device)) * config.shift * apart
        here = torch.where(joined, middle[0], places[:, part]) + loose
        there = torch.where(joined, middle[1], sources[:, part])
        warped = _sampled(donor, (grid - here[:, None, None]) / ratio[:, None, None] + there[:, None, None])
        half = [axis * grow * apart * (1 + 0.2 * _uniform(k, device)) for axis in axes]
        away = (grid - places[:, part, None, None]) * turn.conj()[:, None, None]
        mask = _ellipse(away, half[0], half[1], feather)
        mask = mask * chosen[:, part, None, None, None]
        coloured = torch.where(_rows(matched), _matched(warped, out, mask), warped)
        piece = torch.where(_rows(melted), _melted(warped, out, mask), coloured)
        out = out + mask * opacity[:, None, None, None] * (piece - out)
    return out.clamp(-1, 1)


def completed(landmarks: Tensor) -> Tensor:
    """(N, 5, 2) with nose and mouth where a frontal face has them, for rows that know their eyes only."""
    left, right = torch.view_as_complex(landmarks[:, :2].contiguous()).unbind(1)
    middle, across = (left + right) / 2, right - left
    down = across * 1j
    nose, mouth = middle + EYES_TO_NOSE * down, middle + EYES_TO_MOUTH * down
    usual = torch.stack([left, right, nose, mouth - MOUTH * across, mouth + MOUTH * across], dim=1)
    return torch.where(landmarks.isfinite(), landmarks, torch.view_as_real(usual))


def similarity(of: Tensor, to: Tensor) -> Tensor:
    """(K,) complex: the factor a with a (of - its mean) nearest to (to - its mean), both (K, 5); a turn and a size."""
    u, v = (points - points.mean(dim=1, keepdim=True) for points in (of, to))
    return (u.conj() * v).sum(1) / u.abs().square().sum(1).clamp(min=1e-6)


def centres(points: Tensor) -> Tensor:
    """(K, 5) complex -> (K, P): where the parts of AXES lie."""
    left, right, nose, *corners = points.unbind(1)
    eyes, mouth = (left + right) / 2, (corners[0] + corners[1]) / 2
    brow = 0.08j * (right - left)  # an eye's part takes in some of its brow
    return torch.stack([left - brow, right - brow, 0.7 * nose + 0.3 * eyes, mouth, (eyes + mouth) / 2], dim=1)


# -- private --------------------------------------------------------------------------------------------------------

_SAFE = torch.tensor(
    [[0.0, 0.0], [1.0, 0.0], [0.5, 0.6], [0.1, 1.0], [0.9, 1.0]]
)  # points of rows that have none


def _pairs(images: Tensor, points: Tensor, usable: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(K,) rows that change, rather those that have a good donor; (K,) their donors; (K,) whether both can be used."""
    look = torch.cat([_skin(images, points) / 0.15, _pose(points) / 0.06], dim=1)
    cost = torch.cdist(look, look)
    itself = torch.eye(len(images), dtype=torch.bool, device=images.device)
    cost = cost.masked_fill(itself | ~usable | ~usable[:, None], torch.inf)
    near = cost.topk(min(ALIKE, len(images)), largest=False)
    gumbel = -torch.rand(len(images), device=images.device).clamp(1e-6, 1 - 1e-6).log().neg().log()
    target = (gumbel - near.values[:, 0] / EAGER).topk(count).indices
    costs, rows = near.values[target], near.indices[target]
    pick = (torch.rand_like(costs) + costs.isinf()).argmin(1, keepdim=True)
    return target, rows.gather(1, pick).squeeze(1), costs.gather(1, pick).squeeze(1).isfinite()


def _skin(images: Tensor, points: Tensor) -> Tensor:
    """(N, 3) mean colour of the inner face."""
    small = F.avg_pool2d(images, COARSE) if min(images.shape[2:]) >= 2 * COARSE else images
    scale = images.shape[3] / small.shape[3]
    apart = ((points[:, 1] - points[:, 0]).abs() / scale).clamp(min=1)
    away = (_grid(small) - (centres(points)[:, -1] / scale)[:, None, None]).abs()
    weight = (away < apart[:, None, None]).float()[:, None]
    return (small * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1)


def _pose(points: Tensor) -> Tensor:
    """(N, 10): where nose, mouth and eyes lie when size, turn and place are taken out; tells a turned head from a frontal one."""
    away = points - points.mean(dim=1, keepdim=True)
    eyes = points[:, 1] - points[:, 0]
    unit = torch.where(eyes == 0, torch.ones_like(eyes), eyes)
    return torch.view_as_real(away / unit[:, None]).flatten(1)


def _parts(k: int, config: CompositesConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(K, P) which parts are taken, as 0 and 1; (K,) whether in one piece."""
    joined = torch.rand(k, device=device) < config.joined
    some = torch.rand(k, 4, device=device) < 0.5
    some[:, 3] |= ~some.any(1)  # at least the mouth
    whole = torch.rand(k, device=device) < config.whole
    inner = whole & joined & (torch.rand(k, device=device) < 0.6)
    return torch.cat([some | whole[:, None], inner[:, None]], dim=1).float(), joined


def _mirrored(images: Tensor, points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    flipped = torch.complex(images.shape[3] - points.real, points.imag)[:, list(MIRRORED)]
    return torch.where(_rows(which), images.flip(3), images), torch.where(which[:, None], flipped, points)


def _weighted(places: Tensor, chosen: Tensor) -> Tensor:
    return (places * chosen).sum(1) / chosen.sum(1).clamp(min=1)


def _grid(images: Tensor) -> Tensor:
    """(H, W) complex: the middle of each pixel."""
    y, x = (torch.arange(side, device=images.device) + 0.5 for side in images.shape[2:])
    return torch.complex(x[None, :].expand(len(y), -1), y[:, None].expand(-1, len(x)))


def _sampled(images: Tensor, places: Tensor) -> Tensor:
    """images (K, 3, H, W) at places (K, H, W) complex; bicubic, the border reflected."""
    size = torch.tensor([images.shape[3], images.shape[2]], device=images.device)
    grid = 2 * torch.view_as_real(places) / size - 1
    return F.grid_sample(images, grid.to(images.dtype), "bicubic", "reflection", align_corners=False)


def _ellipse(away: Tensor, across: Tensor, down: Tensor, feather: Tensor) -> Tensor:
    """(K, 1, H, W) in [0, 1]: 1 inside, falling over `feather` pixels around the rim. away (K, H, W) complex, from the centre."""
    radius = torch.hypot(away.real / across[:, None, None], away.imag / down[:, None, None])
    inside = (1 - radius) * torch.minimum(across, down)[:, None, None] / feather[:, None, None] + 0.5
    return _smooth(inside)[:, None]


def _smooth(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _matched(donor: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The donor (K, 3, H, W) with the target's mean and deviation under the mask (K, 1, H, W)."""
    weight = mask / mask.sum((2, 3), keepdim=True).clamp(min=1e-6)
    (given, spread), (wanted, theirs) = (_moments(pixels, weight) for pixels in (donor, target))
    return (donor - given) * (theirs / spread.clamp(min=1e-2)).clamp(*GAIN) + wanted


def _moments(pixels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    mean = (pixels * weight).sum((2, 3), keepdim=True)
    return mean, ((pixels - mean).square() * weight).sum((2, 3), keepdim=True).sqrt()


def _melted(donor: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The donor plus what the target differs from it outside the mask, carried inwards by ever wider blurs."""
    weight = 1 - mask
    small, coarse = (F.avg_pool2d(v, COARSE, ceil_mode=True) for v in ((target - donor) * weight, weight))
    carried, known = small, coarse
    for _ in range(6):  # each reaches one coarse pixel further; what is known stays known
        blurred = [F.avg_pool2d(v, 3, 1, 1) for v in (carried, known)]
        carried, known = small + (1 - coarse) * blurred[0], coarse + (1 - coarse) * blurred[1]
    membrane = carried / known.clamp(min=1e-3)
    return donor + F.interpolate(membrane, donor.shape[2:], mode="bilinear")


def _rows(which: Tensor) -> Tensor:
    return which[:, None, None, None]


def _between(bounds: tuple[float, float], k: int, device: torch.device) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(k, device=device)


def _uniform(k: int, device: torch.device) -> Tensor:
    return 2 * torch.rand(k, device=device) - 1
