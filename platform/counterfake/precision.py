"""How torch multiplies fp32 matrices: exactly, or in a way that is faster on some processors and less exact on others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Matmul = Literal["auto", "highest", "high", "medium"]

FP32_ERROR = 1e-5  # of a product, in units of its own scale; more is another precision
SIDE = 512  # of the matrices that are tried


def set_matmul(wanted: Matmul, device: torch.device) -> Literal["highest", "high", "medium"]:
    """Set torch.set_float32_matmul_precision for this process and return what was set.

    "auto" takes the lowest setting whose products on `device` are still those of fp32, by trying one; it looks at errors, never at
    the clock, so that a device always gets the same. On AMD processors "medium" leads to oneDNN, with twice MKL's speed
    (https://docs.pytorch.org/docs/stable/generated/torch.set_float32_matmul_precision.html says what each allows)."""
    if wanted != "auto":
        torch.set_float32_matmul_precision(wanted)
        return wanted
    for setting in ("medium", "high"):
        torch.set_float32_matmul_precision(setting)
        if matmul_error(device) <= FP32_ERROR:
            return setting
    torch.set_float32_matmul_precision("highest")
    return "highest"


@contextmanager
def restored() -> Iterator[None]:
    """What is set inside ends with it: what this process computes afterwards does not depend on what it trained before."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matmul_error(device: torch.device) -> float:
    """Largest error of a product at the set precision, in units of its own scale: 1e-6 is fp32, 1e-3 TF32, 1e-2 bf16."""
    a, b = (torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    exact = a.double() @ b.double()
    product = (a.to(device) @ b.to(device)).cpu()
    return float((product - exact).abs().max() / exact.abs().max())
