"""Which class a picture shows: cross-entropy, AdamW with one cycle of the learning rate, small shifts as augmentation.

What is exported is the network after the last step: no weights are chosen on the rows that are held out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from counterfake import dist, images
from counterfake.errors import ConfigError, DataError
from counterfake.learners import LearnerConfig, LearnerContext, load_optimizer, load_weights
from counterfake.nets import NetConfig
from counterfake.nets.classifier import Classifier, SmallClassifier

if TYPE_CHECKING:
    from counterfake.data import Batch

UNKNOWN = -1  # class_id of a row without a class


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(LearnerConfig):
    """Schedules are counted in images, so they do not change with the batch size."""

    compiles: ClassVar[bool] = True
    net: SmallClassifier = field(default_factory=SmallClassifier)
    lr: float = 3e-3  # at the top of the cycle
    warmup: float = 0.2  # share of the run until the top; then half a cosine to 0
    weight_decay: float = 1e-2  # decoupled
    shift: int = 2  # pixels; each batch is moved by up to so many, both ways

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.warmup < 1 or self.shift < 0:
            raise ConfigError(
                f"learner needs lr > 0, warmup in [0, 1), shift >= 0; got {self.lr}, {self.warmup}, {self.shift}"
            )

    def build(self, *, device: torch.device, context: LearnerContext) -> ClassifierLearner:
        read, given = (self.net.size, self.net.channels), (context.size, context.channels)
        if read != given:
            raise ConfigError(
                f"the data gives {given[0]} px pictures of {given[1]} channels but the classifier reads {read[0]} px of "
                f"{read[1]}; set data.preprocess.size and channels, or learner.net.size and channels"
            )
        return ClassifierLearner(self, device, context)

    def admit(self, counts: Sequence[Mapping[str, Any]], where: str) -> None:
        """At least one row has a class, and none has one that the network does not know."""
        found = {row["class_id"] for row in counts} - {None, UNKNOWN}
        if not found:
            raise DataError(
                f"a classifier needs class_id, but no picture of {where} has one; choose a dataset with classes"
            )
        if not 0 <= min(found) <= max(found) < self.net.classes:
            raise DataError(
                f"{where} has classes {min(found)} to {max(found)} but the classifier knows 0 to {self.net.classes - 1}; "
                f"set learner.net.classes={max(found) + 1}"
            )


class ClassifierLearner:
    """A classifier in training."""

    def __init__(self, config: ClassifierConfig, device: torch.device, context: LearnerContext) -> None:
        self.config, self.device, self.context = config, device, context
        self.steps = self.images = 0
        self.net: Classifier = config.net.build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._parallel = dist.data_parallel(context.compiled(self.net))
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self._checked = False

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update. Raises DataError where the first batch has no class, or one the network does not have."""
        self._check_classes(batch.class_id)
        rate = self.config.lr * one_cycle(self.images / self.context.total_images, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pictures = _shifted(images.to_float(batch.images), self.config.shift)
        self.net.train()
        with self.context.autocast(self.device):
            logits = self._parallel(pictures.contiguous(memory_format=torch.channels_last))
        loss = _cross_entropy(logits, batch.class_id)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps += 1
        self.images += len(batch) * dist.world_size()
        return {"loss": loss.detach(), "accuracy": _accuracy(logits, batch.class_id)}

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Cross-entropy and accuracy over all rows that have a class."""
        self.net.eval()
        logits, classes = [], []
        with torch.inference_mode():
            for batch in batches:
                batch = batch.to(self.device)
                logits.append(self.net(images.to_float(batch.images)).float())
                classes.append(batch.class_id)
        if not logits:
            raise DataError("validation has no pictures; set validation.split to one that has rows")
        guess, truth = torch.cat(logits), torch.cat(classes)
        return {"loss": float(_cross_entropy(guess, truth)), "accuracy": float(_accuracy(guess, truth))}

    @torch.inference_mode()
    def preview(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        """Sixteen pictures, sorted by the class they are taken for."""
        pictures = batch.to(self.device).images[:16]
        guess = self.net.eval()(images.to_float(pictures)).argmax(dim=1)
        return {"by_class": images.grid(pictures[guess.argsort(stable=True)], columns=8)}

    def export(self) -> dict[str, tuple[NetConfig, dict[str, Tensor]]]:
        return {"classifier": (self.config.net, self.net.state_dict())}

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError if the weights are those of another network."""
        load_weights(self.net, state["net"], "classifier")
        load_optimizer(self.optimizer, state["optimizer"])
        self.steps, self.images = state["steps"], state["images"]

    def _check_classes(self, class_id: Tensor) -> None:
        """One synchronisation per process, at its first step."""
        if self._checked or not len(class_id):
            return
        self._checked = True
        low, high = int(class_id.min()), int(class_id.max())
        if high == UNKNOWN:
            raise DataError(
                "a classifier needs class_id, but no row of the first batch has one; choose a dataset with classes"
            )
        if low < UNKNOWN or high >= self.config.net.classes:
            raise DataError(
                f"the data has class {high} but the classifier knows {self.config.net.classes}; set learner.net.classes"
            )


def one_cycle(share: float, warmup: float) -> float:
    """Factor on the learning rate after `share` of the run: a line from 0 to 1, then half a cosine to 0."""
    if share < warmup:
        return (share + 1e-3) / (warmup + 1e-3)  # never exactly 0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warmup) / (1 - warmup))))


# -- private --------------------------------------------------------------------------------------------------------


def _shifted(pictures: Tensor, most: int) -> Tensor:
    """The batch moved by up to `most` pixels each way; the edges that appear are -1, which is black."""
    if not most:
        return pictures
    down, right = (int(v) for v in torch.randint(0, 2 * most + 1, (2,)))
    padded = F.pad(pictures, (most, most, most, most), value=-1.0)
    height, width = pictures.shape[2:]
    return padded[:, :, down : down + height, right : right + width]


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean over the rows with a class; 0 where there are none, which is what a rank may get of an epoch's last batch."""
    total = F.cross_entropy(logits.float(), classes, ignore_index=UNKNOWN, reduction="sum")
    return total / (classes != UNKNOWN).sum().clamp(min=1)


def _accuracy(logits: Tensor, classes: Tensor) -> Tensor:
    """Share of the rows with a class that are right."""
    known = classes != UNKNOWN
    return ((logits.argmax(dim=1) == classes) & known).sum() / known.sum().clamp(min=1)
