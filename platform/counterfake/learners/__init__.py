"""Learning problems: one file each, pure torch. A learner owns networks, losses and optimizers; it knows no files, no Ray.

A file added to this folder is imported here by itself, so that `config.from_dict(LearnerConfig, ...)` finds its members.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake.config import Family
from counterfake.errors import CheckpointError
from counterfake.nets import NetConfig

if TYPE_CHECKING:
    from counterfake.data import Batch

Net = TypeVar("Net", bound=nn.Module)
Paints = Literal["", "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]


@dataclass(frozen=True, kw_only=True)
class LearnerContext:
    """What a learner may know of the data and the run. Sizes are those of the pictures that reach `step`."""

    batch_size: int  # rows per rank of a full batch; the last batch of an epoch may hold fewer
    images_per_epoch: int  # rows of the split
    total_images: int  # rows the whole run will see: what schedules are counted in
    channels: int = 3
    size: int = 64  # pixels, square
    identities: tuple[str, ...] = ()  # index space of Batch.identity
    makers: tuple[str, ...] = ()  # index space of Batch.maker
    precision: str = "fp32"  # "fp32" or "bf16"
    compile: bool = False  # whether `compiled` compiles

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around forward passes and losses: bf16 where the run asks for it, else nothing changes."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def compiled(self, net: Net) -> Net:
        """The same net, in place, through torch.compile where the run asks for it; its state dict keeps its names.

        Before `dist.data_parallel`; a copy.deepcopy of it runs uncompiled. Inductor knows no second derivatives."""
        if self.compile:
            net.compile()
        return net


class Learner(Protocol):
    """One learning problem in progress."""

    steps: int  # optimizer steps done; `step` adds 1
    images: int  # pictures seen by all ranks; `step` adds len(batch) * world size

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step on this rank's share, already on the device -> detached scalars, never synchronised here.

        The loop has seeded torch's global generator by (seed, step, rank)."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and JSON scalars: unwrapped weights, optimizers, averages, counters."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; afterwards training goes on as if it had never stopped."""

    def preview(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        """Pictures (H, W, 3) by name, for people; from fixed noise or from the rows of `batch`."""

    def export(self) -> dict[str, tuple[NetConfig, dict[str, Tensor]]]:
        """The networks of a bundle by name, with the weights to use for inference."""

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures on held-out batches; {} where there is nothing to hold out."""


@runtime_checkable
class Recoverable(Protocol):
    """A learner that notices its own collapse and can go on from its last good checkpoint, slower."""

    max_rollbacks: int  # times a run may go back

    def check(self) -> None:
        """Called on every rank at each tick, before its checkpoint. Raises CollapseError, on all ranks alike."""

    def slow_down(self, rollbacks: int) -> float:
        """Set the learning rate for after so many rollbacks -> the factor on it, which is part of the state."""


class LearnerConfig(Family, abc.ABC):
    """Settings of one learning problem; subclasses are frozen keyword-only dataclasses."""

    compiles: ClassVar[bool] = False  # whether its learner passes its nets through `LearnerContext.compiled`
    # IPTC's digital source type of its previews, where they show what its nets have made; "" = they show data only
    paints: ClassVar[Paints] = ""

    @abc.abstractmethod
    def build(self, *, device: torch.device, context: LearnerContext) -> Learner:
        """A new learner on `device`, initialised from torch's global random state (the same on every rank)."""

    def admit(self, counts: Sequence[Mapping[str, Any]], where: str) -> None:
        """Look at the counts of the rows of a run, each {fake, class_id, maker, identity, rows}, before anything starts.

        Raises DataError, which calls the rows `where`, for what would fail in the middle of the run."""


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], role: str) -> None:
    """`net.load_state_dict` that calls the weights of another architecture so, in one line. Raises CheckpointError."""
    own = net.state_dict()
    unfit = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if unfit:
        raise CheckpointError(
            f"the checkpoint is of another {role}: {len(unfit)} of {len(own)} tensors differ, first {unfit[0]}; "
            "give the job another name, or its networks the settings of the checkpoint"
        )
    net.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` that also gives each moment the memory layout of its parameter.

    A checkpoint stores plain contiguous tensors; fused Adam walks raw memory, so that moments of channels_last
    weights would otherwise be matched with the wrong elements, silently."""
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
