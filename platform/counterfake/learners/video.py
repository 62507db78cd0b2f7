"""Real or fake from a clip: a head over the features of its frames, trained with early stopping, beside its controls.

The frames' features come from a picture detector that stays as it is, so one pass over the videos is enough and a run takes
seconds; `nets/temporal.py` is the network of both parts. Whether time helps is a difference: the GRU against the same features
averaged (`recurrent=False`), and against the mean of the detector's own logits. Pure torch; knows no files.
Letters: V clips, T frames, C features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection
from counterfake.nets.temporal import FrameHead, TemporalConfig


@dataclass(frozen=True, kw_only=True)
class VideoHeadConfig:
    """AdamW on the head; training ends when the validation AUC has not improved for `patience` epochs."""

    epochs: int = 60  # at most
    patience: int = 10  # epochs without a better validation AUC
    batch_size: int = 32  # clips
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # largest gradient norm
    seed: int = 0  # of weights, order and dropout

    def __post_init__(self) -> None:
        if min(self.epochs, self.patience) < 1 or self.batch_size < 2 or self.lr <= 0:
            raise ConfigError(
                f"epochs and patience must be at least 1, batch_size 2 and lr > 0, got {self.epochs}, {self.patience}, "
                f"{self.batch_size}, {self.lr}"
            )


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Features of the frames of V clips."""

    features: Tensor  # (V, T, C) float32
    logits: Tensor  # (V, T) of the picture detector itself
    fake: Tensor  # (V,) int64 in {0, 1}
    names: tuple[str, ...]  # of the videos
    people: tuple[str, ...]  # identity of each, else its name: what is not independent shares a name

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A head with the weights of its best validation epoch."""

    head: FrameHead
    auc: float  # on the validation clips
    epochs: int  # trained, of which the last `patience` at most were no better

    def probability(self, clips: Clips) -> Tensor:
        """(V,) of being fake, float64."""
        return _logits(self.head, clips).double().sigmoid()


def fit(clips: Clips, held_out: Clips, net: TemporalConfig, config: VideoHeadConfig) -> Fitted:
    """Train a head on `clips`, choose its epoch on `held_out`. Raises DataError where a class is missing.

    The same seed gives the same head; torch's global generator is set."""
    for name, part in (("training", clips), ("validation", held_out)):
        if int(part.fake.min()) == int(part.fake.max()):
            raise DataError(f"the {name} clips hold one class only; both real and fake videos are needed")
    torch.manual_seed(config.seed)
    head = FrameHead(clips.features.shape[2], net)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    best, best_auc, best_epoch = copy.deepcopy(head.state_dict()), -1.0, 0
    for epoch in range(1, config.epochs + 1):
        for rows in _batches(len(clips), config.batch_size):
            _step(head, optimizer, clips.features[rows], clips.fake[rows], config.clip_norm)
        found = auc(held_out.fake, _logits(head, held_out))
        if found > best_auc:
            best, best_auc, best_epoch = copy.deepcopy(head.state_dict()), found, epoch
        if epoch - best_epoch >= config.patience:
            break
    head.load_state_dict(best)
    return Fitted(head=head.eval(), auc=best_auc, epochs=epoch)


def frame_mean(clips: Clips) -> Tensor:
    """(V,) probability of being fake by the mean of the picture detector's logits, float64: the mandatory control."""
    return clips.logits.double().mean(dim=1).sigmoid()


def auc(fake: Tensor, score: Tensor) -> float:
    fpr, tpr, _ = detection.roc(fake.numpy(), score.numpy())
    return float(np.trapezoid(tpr, fpr))


# -- private --------------------------------------------------------------------------------------------------------


def _batches(count: int, size: int) -> Iterator[Tensor]:
    """A new order of the clips in batches; a last one of a single clip is left out, batch norm cannot use it."""
    order = torch.randperm(count)
    for start in range(0, count - 1, size):
        yield order[start : start + size]


def _step(
    head: FrameHead, optimizer: torch.optim.Optimizer, features: Tensor, fake: Tensor, clip_norm: float
) -> None:
    loss = F.binary_cross_entropy_with_logits(head.train()(features), fake.float())
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(head.parameters(), clip_norm)
    optimizer.step()


def _logits(head: FrameHead, clips: Clips) -> Tensor:
    with torch.inference_mode():
        return head.eval()(clips.features)
