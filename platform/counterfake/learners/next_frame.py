"""The next frame of moving digits: by mean squared error alone, or with an adversary beside it.

The digits of a batch are set in motion here: two on each canvas, and where one meets a border its new direction is random,
as in stochastic Moving MNIST (Denton & Fergus 2018, https://arxiv.org/abs/1802.07687). At a border many next frames are
possible; squared error is least for their mean, which is blurred, while a discriminator that knows the past tells it from a
frame (Mathieu et al. 2016, https://arxiv.org/abs/1511.05440). Sharpness is the mean length of the picture's gradient.
Letters: N rows, T frames, H W pixels, D digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from counterfake import dist, images
from counterfake.errors import ConfigError, DataError
from counterfake.learners import LearnerConfig, LearnerContext, Paints, load_optimizer, load_weights
from counterfake.learners.gan_losses import discriminator_loss, generator_loss
from counterfake.nets import NetConfig
from counterfake.nets.dcgan import DcganDiscriminator
from counterfake.nets.unet import UNetConfig

if TYPE_CHECKING:
    from counterfake.data import Batch

JUDGED_SEED = 11  # of the motion in `validate` and `preview`
PREVIEW_ROWS = 6


@dataclass(frozen=True, kw_only=True)
class NextFrameConfig(LearnerConfig):
    """A U-Net that reads `net.inputs` frames and paints the next one."""

    paints: ClassVar[Paints] = "compositeWithTrainedAlgorithmicMedia"
    net: UNetConfig = field(default_factory=UNetConfig)
    adversary_weight: float = 0.0  # of -log D(frame | past) beside the squared error; 0 = no adversary
    adversary: DcganDiscriminator = field(
        default_factory=lambda: DcganDiscriminator(
            size=64, channels=5, width=32, dropout=0.0, spectral_norm=True
        )
    )
    digits: int = 2  # on each canvas
    speed: float = 4.0  # pixels per frame
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)

    def __post_init__(self) -> None:
        if self.net.outputs != 1:
            raise ConfigError(f"learner.net.outputs must be 1, one grey frame; got {self.net.outputs}")
        read = (self.adversary.size, self.adversary.channels)
        if self.adversary_weight and read != (self.net.size, self.net.inputs + 1):
            raise ConfigError(
                f"the adversary reads {read[1]} frames of {read[0]} px but judges {self.net.inputs} + 1 of {self.net.size} px; "
                f"set learner.adversary.size={self.net.size} and channels={self.net.inputs + 1}"
            )
        if self.adversary_weight < 0 or self.digits < 1 or self.speed <= 0:
            raise ConfigError("learner needs adversary_weight >= 0, digits >= 1 and speed > 0")

    def build(self, *, device: torch.device, context: LearnerContext) -> NextFrame:
        return NextFrame(self, device, context)


class NextFrame:
    """The painter, and its adversary where there is one."""

    def __init__(self, config: NextFrameConfig, device: torch.device, context: LearnerContext) -> None:
        if context.channels != 1 or context.size >= config.net.size:
            raise ConfigError(
                f"moving pictures need grey pictures smaller than the canvas of {config.net.size} px, got {context.size} px of "
                f"{context.channels} channels; set data.preprocess.size=28 and channels=1"
            )
        self.config, self.device, self.context = config, device, context
        self.steps = self.images = 0
        layout = torch.channels_last
        net = config.net.build().to(device, memory_format=layout)  # type: ignore[call-overload]
        adversary = config.adversary.build().to(device, memory_format=layout)  # type: ignore[call-overload]
        self.net = dist.data_parallel(net)
        self.adversary = dist.data_parallel(adversary) if config.adversary_weight else adversary
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, betas=config.betas, fused=True)
        self.d_optimizer = torch.optim.Adam(
            adversary.parameters(), lr=config.lr, betas=config.betas, fused=True
        )

    def step(self, batch: Batch) -> dict[str, Tensor]:
        past, future = self._film(batch.images)
        with self._autocast():
            painted = self.net(past)
        painted = painted.float()
        error = F.mse_loss(painted, future)
        metrics = {"mse": error.detach(), "sharpness": sharpness(painted.detach()) / sharpness(future)}
        loss = error
        if self.config.adversary_weight:
            metrics |= self._update_adversary(past, painted.detach(), future)
            critic = dist.unwrap(self.adversary).requires_grad_(False)
            deceived = generator_loss("non_saturating", self._judge(critic, past, painted))
            loss = error + self.config.adversary_weight * deceived
            metrics["g_loss"] = deceived.detach()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        dist.unwrap(self.adversary).requires_grad_(True)
        self.steps += 1
        self.images += len(batch) * dist.world_size()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": dist.unwrap(self.net).state_dict(),
            "adversary": dist.unwrap(self.adversary).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "steps": self.steps,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError if the weights are those of other networks."""
        load_weights(dist.unwrap(self.net), state["net"], "painter of frames")
        load_weights(dist.unwrap(self.adversary), state["adversary"], "adversary")
        load_optimizer(self.optimizer, state["optimizer"])
        load_optimizer(self.d_optimizer, state["d_optimizer"])
        self.steps, self.images = state["steps"], state["images"]

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        """Rows of: the last frame read, the true next one, the painted one."""
        past, future = self._film(batch.images[:PREVIEW_ROWS], judged=True)
        painted = dist.unwrap(self.net)(past)
        rows = torch.stack([past[:, -1:], future, painted], dim=1).flatten(0, 1)
        return {"next_frame": images.grid(images.to_uint8(rows), columns=3)}

    def export(self) -> dict[str, tuple[NetConfig, dict[str, Tensor]]]:
        return {"next_frame": (self.config.net, dist.unwrap(self.net).state_dict())}

    @torch.inference_mode()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Squared error and sharpness (painted / true) over held-out digits, whose motion is the same every time."""
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            past, future = self._film(batch.images, judged=True)
            painted = dist.unwrap(self.net)(past)
            n = len(batch)
            sums += torch.tensor(
                [
                    F.mse_loss(painted, future).item() * n,
                    sharpness(painted).item() * n,
                    sharpness(future).item() * n,
                    n,
                ]
            )
        error, ours, true, rows = sums.tolist()
        return {"mse": error / rows, "sharpness": ours / true} if rows else {}

    def _update_adversary(self, past: Tensor, painted: Tensor, future: Tensor) -> dict[str, Tensor]:
        films = torch.cat([past, past]), torch.cat([future, painted])
        real, fake = self._judge(self.adversary, *films).chunk(2)
        loss = discriminator_loss("non_saturating", real, fake)
        self.d_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.d_optimizer.step()
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return {"d_loss": loss.detach(), "d_accuracy": right}

    def _judge(self, critic: torch.nn.Module, past: Tensor, frame: Tensor) -> Tensor:
        with self._autocast():
            return critic(torch.cat([past, frame], dim=1)).float()

    def _film(self, digits: Tensor, *, judged: bool = False) -> tuple[Tensor, Tensor]:
        """The digits of a batch (N, 1, h, w) in motion -> past (N, T - 1, H, W), next frame (N, 1, H, W), in [-1, 1]."""
        source = torch.Generator().manual_seed(JUDGED_SEED) if judged else None
        config = self.config
        film = moving_digits(
            images.to_float(digits),
            frames=config.net.inputs + 1,
            size=config.net.size,
            digits=config.digits,
            speed=config.speed,
            source=source,
        )
        return film[:, :-1].contiguous(memory_format=torch.channels_last), film[:, -1:]

    def _autocast(self) -> Any:
        return self.context.autocast(self.device)


def moving_digits(
    pictures: Tensor,
    *,
    frames: int,
    size: int,
    digits: int = 2,
    speed: float = 4.0,
    source: torch.Generator | None = None,
) -> Tensor:
    """pictures (N, 1, h, w) in [-1, 1] -> films (N, frames, size, size), canvas -1. Film i shows pictures i, i + 1, …

    Places and directions are drawn on the CPU from `source` or torch's default generator; whole pixels."""
    if not len(pictures):
        raise DataError("no pictures to set in motion; a batch is empty")
    shown = torch.stack([pictures.roll(-d, 0) for d in range(digits)], 1).squeeze(2)  # (N, D, h, w)
    tops, lefts = _paths(len(pictures) * digits, frames, size - pictures.shape[2], speed, source)
    film = pictures.new_full((len(pictures), frames, size, size), -1.0)
    height, width = pictures.shape[2:]
    for t in range(frames):
        for d in range(digits):
            rows = tops[t].view(-1, digits)[:, d, None] + torch.arange(height)  # (N, h)
            columns = lefts[t].view(-1, digits)[:, d, None] + torch.arange(width)
            where = (
                torch.arange(len(pictures))[:, None, None].to(pictures.device),
                rows[:, :, None].to(pictures.device),
                columns[:, None, :].to(pictures.device),
            )
            canvas = film[:, t]
            canvas[where] = torch.maximum(canvas[where], shown[:, d])
    return film


def sharpness(pictures: Tensor) -> Tensor:
    """Mean length of the gradient of pictures (N, C, H, W), by forward differences -> scalar."""
    down = pictures[..., 1:, :-1] - pictures[..., :-1, :-1]
    right = pictures[..., :-1, 1:] - pictures[..., :-1, :-1]
    return (down.square() + right.square()).sqrt().mean()


# -- private --------------------------------------------------------------------------------------------------------


def _paths(
    count: int, frames: int, room: int, speed: float, source: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Top and left edges (frames, count) int64 in [0, room]; a new random direction after each meeting with a border."""
    place = torch.rand(count, 2, generator=source) * room
    angle = torch.rand(count, generator=source) * 2 * math.pi
    seen = []
    for _ in range(frames):
        seen.append(place.round().long())
        moved = place + speed * torch.stack([angle.sin(), angle.cos()], dim=1)
        met = ((moved < 0) | (moved > room)).any(dim=1)
        place = moved.clamp(0, room)
        angle = torch.where(met, torch.rand(count, generator=source) * 2 * math.pi, angle)
    path = torch.stack(seen)  # (frames, count, 2)
    return path[..., 0], path[..., 1]
