"""Face swapping: rebuild everyone's bent face through one shared encoder and each person's own decoder.

Recipe `swap-shared`, the code of December 2017: mean absolute error, Adam 5e-5 with beta1 0.5, warped inputs. Differences:
a batch mixes the identities and makes one update, where the original alternates sides; and `match_colour` moves each
identity's mean colour to the mean of the batch, where the original moves A to the mean of all of B before training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterfake import dist, images
from counterfake.errors import ConfigError, DataError
from counterfake.learners import LearnerConfig, LearnerContext, load_optimizer
from counterfake.learners.warp import WarpConfig, centre, pairs
from counterfake.nets import NetConfig
from counterfake.nets.swap import SwapConfig, SwapNet, standardise

if TYPE_CHECKING:
    from counterfake.data import Batch

MIN_PICTURES = 8  # per identity; with fewer a decoder only repeats them
MAX_IDENTITIES = 64  # one decoder each
PREVIEW_FACES = 8


@dataclass(frozen=True, kw_only=True)
class FaceSwapConfig(LearnerConfig):
    """One shared encoder, a decoder per identity of the data."""

    net: SwapConfig = field(default_factory=SwapConfig)
    warp: WarpConfig = field(default_factory=WarpConfig)
    lr: float = 5e-5
    beta1: float = 0.5
    final_lr_factor: float = 1.0  # lr at the end / lr, linear; the original keeps it constant
    straight_images: int = 0  # the last so many images are not bent: sharper once the features exist
    people: int = (
        0  # the train_swap job chooses so many when data.where names no identity: the best pictured; 0 = all
    )
    match_colour: bool = (
        True  # give all identities the same mean colour while training; not with net.normalise
    )

    def build(self, *, device: torch.device, context: LearnerContext) -> FaceSwapLearner:
        names = context.identities
        if len(names) < 2:
            raise DataError(
                f"face swapping needs at least two identities, the data has {len(names)}; widen data.where.identity"
            )
        if len(names) > MAX_IDENTITIES:
            raise DataError(
                f"the data has {len(names)} identities and each gets its own decoder; choose at most {MAX_IDENTITIES}"
                f' with data.where, e.g. {{"identity": ["{names[0]}", "{names[1]}"]}}'
            )
        if self.net.identities not in ((), tuple(names)):
            raise ConfigError(
                f"net.identities are {self.net.identities} but the data has {tuple(names)}; leave them empty"
            )
        return FaceSwapLearner(self, device, context)


class FaceSwapLearner:
    """The autoencoder in training; `steps` counts updates of the shared encoder."""

    def __init__(self, config: FaceSwapConfig, device: torch.device, context: LearnerContext) -> None:
        self.config, self.context, self.device = config, context, device
        self.net_config = config.net.with_identities(tuple(context.identities))
        self.net: SwapNet = self.net_config.build().to(device)
        self._parallel = dist.data_parallel(self.net)
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=config.lr, betas=(config.beta1, 0.999), fused=True
        )
        self.steps = self.images = 0

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update on the mean absolute error of all faces of the batch."""
        warped, target = self._pairs(batch)
        with self.context.autocast(self.device):
            painted = self._parallel(warped, batch.identity)
        errors = (painted.float() - target).abs().mean(dim=(1, 2, 3))  # (N,)
        loss = errors.mean()
        self._set_lr()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        self.images += len(batch) * dist.world_size()
        return {"loss": loss.detach(), "loss_worst_identity": self._worst(errors.detach(), batch.identity)}

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """{}: held-out pictures are of other people, who have no decoder."""
        return {}

    def preview(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        """A row per face: the face, then the face as each identity (at most eight)."""
        faces = _spread(batch, PREVIEW_FACES).to(self.device)
        reads = centre(faces.float() / 255, self.net_config.size, self.net_config.coverage)
        people = range(min(PREVIEW_FACES, len(self.net_config.identities)))
        everyone = [swap(self.net, self.net_config, faces, torch.full((len(faces),), who)) for who in people]
        rows = torch.stack([(reads * 255).round().to(torch.uint8), *everyone], dim=1)  # (N, 1 + I, 3, S, S)
        return {"swaps": images.grid(rows.flatten(0, 1), columns=rows.shape[1])}

    def export(self) -> dict[str, tuple[NetConfig, dict[str, Tensor]]]:
        return {"faceswap": (self.net_config, self.net.state_dict())}

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "identities": list(self.net_config.identities),
            "steps": self.steps,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["identities"] != list(self.net_config.identities):
            raise DataError(
                f"the checkpoint swaps {state['identities']}, the data has {list(self.net_config.identities)};"
                " train on the dataset version the checkpoint names"
            )
        self.net.load_state_dict(state["net"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.steps, self.images = state["steps"], state["images"]

    # -- private ----------------------------------------------------------------------------------------------------

    def _pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        faces = batch.images.float() / 255
        if self.net_config.normalise:
            faces = standardise(faces)[0]
        elif self.config.match_colour:
            faces = _match_colour(faces, batch.identity, len(self.net_config.identities))
        straight = self.images >= self.context.total_images - self.config.straight_images
        settings = self.config.warp.straight() if straight else self.config.warp
        return pairs(faces, self.net_config.size, self.net_config.coverage, settings)

    def _set_lr(self) -> None:
        share = min(1.0, self.images / max(1, self.context.total_images))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (1 + (self.config.final_lr_factor - 1) * share)

    def _worst(self, errors: Tensor, identity: Tensor) -> Tensor:
        """Largest mean error of an identity that is in this batch."""
        return _means(errors[:, None], identity, len(self.net_config.identities)).max()


def swap(net: SwapNet, config: SwapConfig, crops: Tensor, identity: Tensor) -> Tensor:
    """Face crops (N, 3, S, S) uint8 -> the region `coverage` in their middle as `identity` (N,), uint8 (N, 3, s, s)."""
    faces = crops.float() / 255
    mean, deviation = torch.tensor(0.5), torch.tensor(0.2)
    if config.normalise:
        faces, mean, deviation = standardise(faces)
    with torch.inference_mode():
        painted = net.eval()(centre(faces, config.size, config.coverage), identity.to(crops.device))
    painted = (painted - 0.5) / 0.2 * deviation + mean  # the light of the picture it came from
    return (painted * 255).round().clamp(0, 255).to(torch.uint8)


def _match_colour(faces: Tensor, identity: Tensor, count: int) -> Tensor:
    means = faces.mean(dim=(2, 3))  # (N, 3)
    shift = means.mean(dim=0) - _means(means, identity, count)[identity]
    return (faces + shift[:, :, None, None]).clamp(0, 1)


def _means(values: Tensor, identity: Tensor, count: int) -> Tensor:
    """Mean of values (N, K) per identity -> (count, K); 0 for an identity without rows."""
    member = torch.nn.functional.one_hot(identity.clamp(min=0), count).to(values.dtype)  # (N, count)
    return member.T @ values / member.sum(dim=0).clamp(min=1)[:, None]


def _spread(batch: Batch, count: int) -> Tensor:
    """Up to `count` pictures (uint8), as many identities as possible before a second picture of one."""
    seen: dict[int, int] = {}
    turns = []
    for who in batch.identity.tolist():
        turns.append(seen.get(who, 0))
        seen[who] = turns[-1] + 1
    rows = sorted(range(len(turns)), key=lambda row: (turns[row], row))[:count]
    return batch.images[rows]
