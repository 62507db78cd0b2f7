"""Reconstruction through a narrow code: binary cross-entropy of every pixel, Adam; with `noise`, denoising.

Vincent et al. 2008 (https://doi.org/10.1145/1390156.1390294) for the denoising form; the plain one is the article's.
Pixels are in [0, 1] here, not in [-1, 1]: they are the targets of the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake import dist, images
from counterfake.errors import ConfigError, DataError
from counterfake.learners import LearnerConfig, LearnerContext, Paints, load_optimizer, load_weights
from counterfake.nets import NetConfig
from counterfake.nets.autoencoder import Autoencoder, DenseAutoencoder

if TYPE_CHECKING:
    from counterfake.data import Batch

PREVIEW_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(LearnerConfig):
    """The article's settings: Keras' Adam, no noise."""

    paints: ClassVar[Paints] = "compositeWithTrainedAlgorithmicMedia"
    net: DenseAutoencoder = field(default_factory=DenseAutoencoder)
    lr: float = 1e-3
    adam_eps: float = 1e-7  # Keras' default, torch's is 1e-8
    noise: float = 0.0  # standard deviation of the Gaussian added to the input, of 1; the target stays clean

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.noise < 0:
            raise ConfigError(f"learner.lr must be > 0 and noise >= 0, got {self.lr}, {self.noise}")

    def build(self, *, device: torch.device, context: LearnerContext) -> AutoencoderLearner:
        made, given = (self.net.size, self.net.channels), (context.size, context.channels)
        if made != given:
            raise ConfigError(
                f"the data gives {given[0]} px pictures of {given[1]} channels but the autoencoder reads {made[0]} px "
                f"of {made[1]}; set data.preprocess.size and channels, or learner.net.size and channels"
            )
        return AutoencoderLearner(self, device, context)


class AutoencoderLearner:
    """An autoencoder in training."""

    def __init__(self, config: AutoencoderConfig, device: torch.device, context: LearnerContext) -> None:
        self.config, self.device, self.context = config, device, context
        self.steps = self.images = 0
        self.net: Autoencoder = config.net.build().to(device)
        self._logits = dist.data_parallel(_Logits(self.net))
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=config.lr, eps=config.adam_eps, fused=True
        )

    def step(self, batch: Batch) -> dict[str, Tensor]:
        clean = to_unit(batch.images)
        with self.context.autocast(self.device):
            logits = self._logits(corrupt(clean, self.config.noise))
        total = F.binary_cross_entropy_with_logits(logits.float(), clean.flatten(1), reduction="sum")
        loss = total / max(clean.numel(), 1)  # a rank may get no row of an epoch's last batch
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps += 1
        self.images += len(batch) * dist.world_size()
        return {"bce": loss.detach()}

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Cross-entropy and squared error per pixel, and how many units of the code are never above 0."""
        sums, rows = torch.zeros(2, dtype=torch.float64), 0
        alive = torch.zeros(self.config.net.code_size, dtype=torch.bool)
        with torch.inference_mode():
            for batch in batches:
                clean = to_unit(batch.to(self.device).images)
                codes = self.net.encode(corrupt(clean, self.config.noise))
                sums += torch.stack(errors(self.net.decoder(codes), clean)).cpu()
                alive |= (codes > 0).any(dim=0).cpu()
                rows += len(clean)
        if not rows:
            raise DataError("validation has no pictures; set validation.split to one that has rows")
        bce, mse = (sums / (rows * self.config.net.pixels)).tolist()
        return {"bce": bce, "mse": mse, "dead_units": float((~alive).sum())}

    @torch.inference_mode()
    def preview(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        """What goes in above what comes out."""
        clean = to_unit(batch.to(self.device).images[:PREVIEW_ROWS])
        seen = corrupt(clean, self.config.noise, torch.Generator().manual_seed(0))
        sheet = torch.cat([seen, self.net(seen)]).mul(2).sub(1)
        return {"reconstructions": images.grid(sheet, columns=len(clean))}

    def export(self) -> dict[str, tuple[NetConfig, dict[str, Tensor]]]:
        return {"autoencoder": (self.config.net, self.net.state_dict())}

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError if the weights are those of another network."""
        load_weights(self.net, state["net"], "autoencoder")
        load_optimizer(self.optimizer, state["optimizer"])
        self.steps, self.images = state["steps"], state["images"]


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32 in [0, 1], contiguous."""
    return pixels.contiguous().float().div_(255)


def corrupt(clean: Tensor, std: float, source: torch.Generator | None = None) -> Tensor:
    """clean in [0, 1] plus Gaussian noise of `std`, clipped to [0, 1]; itself where std is 0."""
    if not std:
        return clean
    noise = torch.randn(clean.shape, generator=source).to(
        clean.device
    )  # on the CPU: the same on every device
    return (clean + std * noise).clamp_(0, 1)


def errors(logits: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, squared error) of a reconstruction, each summed over all pixels, in float64."""
    target = clean.flatten(1)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return bce.double().sum(), (logits.sigmoid() - target).double().square().sum()


# -- private --------------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """The forward pass of a step, as data_parallel wants it: one module called as a whole."""

    def __init__(self, net: Autoencoder) -> None:
        super().__init__()
        self.net = net

    def forward(self, pictures: Tensor) -> Tensor:
        return self.net.logits(pictures)
