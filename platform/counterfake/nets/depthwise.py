"""Depthwise convolution: one kernel per channel, padded alike on both sides, as mobile networks use it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def depthwise(maps: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """maps (N, C, H, W) and kernel (C, 1, k, k) -> (N, C, H / stride, W / stride), sides rounded up; k is odd.

    A stride in bf16 on a CPU has the derivatives of its maps taken in fp32: oneDNN's in bf16 take 3 to 50 times as long, the
    more channels the longer (EXPERIMENTS 2026-11-28)."""
    if stride > 1 and maps.dtype == torch.bfloat16 and maps.device.type == "cpu" and torch.is_grad_enabled():
        return _Strided.apply(maps, kernel, stride)  # type: ignore[no-any-return, no-untyped-call]
    return F.conv2d(maps, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=len(kernel))


class Depthwise(nn.Conv2d):
    """The same as a layer without bias; the parameters are a Conv2d's."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return depthwise(maps, self.weight, self.stride[0])


# -- private --------------------------------------------------------------------------------------------------------


class _Strided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, kernel: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(maps, kernel)
        ctx.stride = stride
        padding = kernel.shape[-1] // 2
        return F.conv2d(maps, kernel.to(maps.dtype), stride=stride, padding=padding, groups=len(kernel))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        maps, kernel = ctx.saved_tensors
        how = ([ctx.stride] * 2, [kernel.shape[-1] // 2] * 2, [1, 1], False, [0, 0], len(kernel))
        backward = torch.ops.aten.convolution_backward
        of_maps = of_kernel = None
        if ctx.needs_input_grad[0]:
            like = torch.empty_like(maps, dtype=torch.float32)  # only its shape is read
            wide = backward(gradient.float(), like, kernel.float(), None, *how, [True, False, False])
            of_maps = wide[0].to(maps.dtype)
        if ctx.needs_input_grad[1]:
            given = gradient, maps, kernel.to(maps.dtype)
            of_kernel = backward(*given, None, *how, [False, True, False])[1].to(kernel.dtype)
        return of_maps, of_kernel, None
