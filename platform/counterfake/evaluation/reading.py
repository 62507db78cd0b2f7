"""Nets that judge swaps, trained on the real pictures of the people at hand: who is shown, and in which pose and expression.

`recogniser` learns a direction per person by softmax over scaled cosines (NormFace, Wang et al. 2017,
https://doi.org/10.1145/3123266.3123359, eq. 6, with the scale fixed); `regressor` learns known parameters by least
squares. Training pictures are moved, recoloured and made coarse, so that a painted face, which is smooth, is judged by
what it shows. Every reader carries the SHA-256 of its weights: figures of two readers are not the same figures. The same
seed and pictures give the same reader on the same machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake.errors import ConfigError, DataError
from counterfake.images import resize
from counterfake.nets.face_reader import FaceReaderConfig

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

SCALE = 16.0  # of the cosines
AT_ONCE = 256  # pictures read at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How a reader is built and taught."""

    net: FaceReaderConfig = dataclasses.field(default_factory=FaceReaderConfig)
    steps: int = 600  # updates
    batch_size: int = 64
    lr: float = 2e-3  # at the start; falls to 0 along a cosine
    shift: float = 0.06  # largest move, share of the side
    colour: float = 0.2  # largest change of each channel's gain
    coarse: float = 3.0  # pictures are shrunk by up to this factor, and enlarged again
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or self.coarse < 1:
            raise ConfigError("reading needs steps >= 1, batch_size >= 2 and coarse >= 1")


class Reader:
    """A trained net and what became of its outputs: features, or parameters in their own units."""

    def __init__(
        self, net: nn.Module, size: int, mean: Tensor | None = None, spread: Tensor | None = None
    ) -> None:
        self.net, self.size = net.eval().requires_grad_(False), size
        self.mean, self.spread = mean, spread

    @property
    def sha256(self) -> str:
        """Of the weights in the order of their names."""
        found = hashlib.sha256()
        for name, value in sorted(self.net.state_dict().items()):
            found.update(name.encode() + np.ascontiguousarray(value.numpy()).tobytes())
        return found.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """What `of` makes the same reader from."""
        return {"net": self.net.state_dict(), "mean": self.mean, "spread": self.spread}

    @classmethod
    def of(cls, net: FaceReaderConfig, state: Mapping[str, Any]) -> Reader:
        """A reader that was kept; `net` is its ReadingConfig's."""
        features = net.features if state["mean"] is None else len(state["mean"])
        built = dataclasses.replace(net, features=features).build()
        built.load_state_dict(state["net"])
        return cls(built, net.size, state["mean"], state["spread"])

    def read(self, faces: Pixels) -> Floats:
        """faces (N, H, W, 3) uint8 -> (N, D) features or (N, K) parameters."""
        rows = _rows(faces, self.size)
        with torch.inference_mode():
            made = torch.cat([self.net(_unit(rows[i : i + AT_ONCE])) for i in range(0, len(rows), AT_ONCE)])
        if self.mean is not None and self.spread is not None:
            made = made * self.spread + self.mean
        return made.double().numpy()


def recogniser(faces: Pixels, identity: NDArray[np.int64], people: int, config: ReadingConfig) -> Reader:
    """A net whose features (N, D) point where the person is; faces (N, H, W, 3) uint8, identity (N,) in [0, people).

    Raises DataError for fewer than two people."""
    if people < 2 or len(faces) < people:
        raise DataError(f"a recogniser needs pictures of at least two people, got {len(faces)} of {people}")
    who = torch.from_numpy(np.asarray(identity, np.int64))
    with _seeded(config.seed):
        net = config.net.build()
        directions = nn.Parameter(torch.randn(people, config.net.features))

        def loss(features: Tensor, rows: Tensor) -> Tensor:
            cosines = F.normalize(features) @ F.normalize(directions).T  # (N, I)
            return F.cross_entropy(SCALE * cosines, who[rows], label_smoothing=0.05)

        _train(net, [directions], faces, loss, config, mirror=True)
    return Reader(net, config.net.size)


def regressor(faces: Pixels, values: Floats, config: ReadingConfig) -> Reader:
    """A net that reads the parameters `values` (N, K) off faces (N, H, W, 3) uint8. Raises DataError without rows."""
    if not len(faces) or values.shape[:1] != faces.shape[:1]:
        raise DataError(f"{len(faces)} faces need as many rows of parameters, got {values.shape}")
    known = torch.from_numpy(values).float()
    mean, spread = known.mean(dim=0), known.std(dim=0, correction=0).clamp(min=1e-6)
    wanted = (known - mean) / spread
    with _seeded(config.seed):
        net = dataclasses.replace(config.net, features=values.shape[1]).build()

        def loss(read: Tensor, rows: Tensor) -> Tensor:
            return F.mse_loss(read, wanted[rows])

        _train(net, [], faces, loss, config, mirror=False)  # a mirrored face looks the other way
    return Reader(net, config.net.size, mean, spread)


# -- private --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's default generator seeded inside, afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _train(
    net: nn.Module,
    others: list[nn.Parameter],
    faces: Pixels,
    loss: Callable[[Tensor, Tensor], Tensor],
    config: ReadingConfig,
    *,
    mirror: bool,
) -> None:
    pixels = torch.from_numpy(_rows(faces, config.net.size))
    optimizer = torch.optim.AdamW([*net.parameters(), *others], lr=config.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    net.train()
    for _ in range(config.steps):
        rows = torch.randint(len(pixels), (min(config.batch_size, max(2, len(pixels))),))
        value = loss(net(_disturbed(_unit(pixels[rows].numpy()), config, mirror)), rows)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _disturbed(faces: Tensor, config: ReadingConfig, mirror: bool) -> Tensor:
    """faces (N, 3, S, S) in [0, 1], each moved, mirrored and recoloured on its own, all made coarse alike."""
    n, side = len(faces), faces.shape[-1]
    move = torch.zeros(n, 2, 3)
    move[:, 0, 0] = torch.where(torch.rand(n) < 0.5, -1.0, 1.0) if mirror else 1.0
    move[:, 1, 1] = 1.0
    move[:, :, 2] = 2 * config.shift * (2 * torch.rand(n, 2) - 1)
    grid = F.affine_grid(move, [n, 3, side, side], align_corners=False)
    out = F.grid_sample(faces, grid, padding_mode="border", align_corners=False)
    gain = 1 + config.colour * (2 * torch.rand(n, 3, 1, 1) - 1)
    small = max(4, round(side / (1 + (config.coarse - 1) * float(torch.rand(())))))
    coarse = F.interpolate(out * gain, (small, small), mode="bilinear", antialias=True)
    return F.interpolate(coarse, (side, side), mode="bilinear")


def _rows(faces: Pixels, size: int) -> Pixels:
    return np.stack([resize(face, size, size) for face in faces])


def _unit(faces: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(faces)).permute(0, 3, 1, 2).float() / 255
