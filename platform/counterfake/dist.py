"""Ranks as seen from inside a training process: no-ops when there is only one. Knows torch.distributed, never Ray."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
import torch.distributed as collective
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """This process's place among the ranks, 0 when alone."""
    return collective.get_rank() if _grouped() else 0


def world_size() -> int:
    """How many processes train together, 1 when alone."""
    return collective.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this is the rank that writes and logs."""
    return rank() == 0


def device() -> torch.device:
    """The current CUDA device where there is one and the ranks do not talk over gloo, else the CPU."""
    if torch.cuda.is_available() and not (_grouped() and collective.get_backend() == "gloo"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def data_parallel(module: nn.Module) -> nn.Module:
    """`module` with its gradients averaged over ranks; the module itself when alone or when nothing in it learns.

    Buffers (batch-norm statistics) stay each rank's own, and rank 0's are stored: broadcasting them in place between
    two forward passes of one step would break the backward pass of a GAN."""
    if world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    here = next(module.parameters()).device
    return DistributedDataParallel(
        module,
        device_ids=[here.index] if here.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        # Otherwise gradients lie in another order after the first step, so a restart would repeat that step with another
        # order of summation; sums of two ranks have only one, and runs on GPUs do not promise bits.
        find_unused_parameters=here.type == "cpu" and world_size() > 2,
    )


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside `data_parallel`: its state-dict names are those of checkpoints."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def mean(values: dict[str, Tensor]) -> dict[str, float]:
    """Mean over ranks of scalars, with one all-reduce. Every rank must pass the same names."""
    if not values:
        return {}
    names = sorted(values)
    packed = torch.stack([values[name].detach().double().reshape(()) for name in names])
    if world_size() > 1:
        collective.all_reduce(packed)
        packed /= world_size()
    return dict(zip(names, packed.tolist(), strict=True))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over ranks, on its device; the tensor itself when alone."""
    if world_size() == 1:
        return values
    total = values.clone()
    collective.all_reduce(total)
    return total


def average_gradients(module: nn.Module) -> None:
    """Gradients of an unwrapped module averaged over ranks with one all-reduce: for losses with second derivatives, which
    DistributedDataParallel does not support. Every rank must have gradients of the same parameters."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if world_size() == 1 or not grads:
        return
    total = sum_over_ranks(torch.cat([grad.flatten() for grad in grads])) / world_size()
    for grad, part in zip(grads, torch.split(total, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def barrier() -> None:
    """Wait until every rank is here; nothing when alone."""
    if world_size() > 1:
        collective.barrier()


def seed_step(seed: int, step: int) -> int:
    """Seed torch, numpy and random from (seed, step, rank): a resumed run draws what the uninterrupted one drew."""
    return _seed(f"{seed}/{step}/{rank()}")


def seed_build(seed: int) -> int:
    """The same for building networks: equal on every rank, so that all start from the same weights."""
    return _seed(f"{seed}/build")


# -- private --------------------------------------------------------------------------------------------------------


def _grouped() -> bool:
    return collective.is_available() and collective.is_initialized()


def _seed(text: str) -> int:
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1  # torch takes 63 bits
    # not torch.manual_seed, which asks every backend: 0.1 ms, a sixth of a small step
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - libraries below us read the global state
    return value
