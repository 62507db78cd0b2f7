"""What one GPU does with the training and inference steps of gpu_cases.py, each replayed as one CUDA graph, in bf16.

    counterfake run benchmark gan --gpu          also swap, detector; about a minute each
    python -m jobs.benchmarks.gpu gan            the same from a source tree, with PYTHONPATH=platform:. and nothing but torch
    python -m jobs.benchmarks.gpu detector --only xception-299-training --seconds 10

Each case: images/s, achieved TFLOP/s (matrix products and convolutions, forward and backward, as torch.utils.flop_counter
counts them) and its share of the bf16 peak, the bytes that the step's kernels read and write and their share of the memory
bandwidth. Both limits are measured in the same run, by one large matrix product and one large copy. Bytes are counted per
operator as if no cache held anything, so their share may pass 1. `goal` is for one H200. Knows neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from counterfake.errors import ConfigError
from jobs.benchmarks.gpu_cases import SUITES, Case, Ready

WARMUP = 5  # steps before the capture: cuDNN chooses its kernels, Adam makes its moments
MATRIX = 8192  # side of the product that measures the peak
COPIED = 2**32  # bytes of the copy that measures the bandwidth


def run(
    suite: str,
    device: str = "cuda",
    *,
    only: str = "",
    seconds: float = 3.0,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every case of the suite -> figures by name. On "cpu" the tiny cases without graphs: that the code runs, nothing more.

    Raises ConfigError where there is no such suite, case or device."""
    cases, place = _cases(suite, only), _device(device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    peak, bandwidth = matrix_peak(place), copy_bandwidth(place)
    tell(f"{_name(place)}: bf16 products {peak / 1e12:.4g} TFLOP/s, copies {bandwidth / 1e12:.4g} TB/s")
    table = {}
    for name, case in cases.items():
        table[name] = figures(case, place, seconds, peak, bandwidth)
        tell(
            f"{name}: {table[name]['images_per_second']:,} images/s, {table[name]['share_of_peak']:.1%} of the peak"
        )
    return {
        "name": f"{suite} --gpu",
        "device": _name(place),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "matrix_tflops": _round(peak / 1e12),
        "copy_tb_per_second": _round(bandwidth / 1e12),
        "cases": table,
    }


def figures(
    case: Case, device: torch.device, seconds: float, peak: float, bandwidth: float
) -> dict[str, Any]:
    """One case: built, counted, captured, timed. peak in FLOP/s, bandwidth in bytes/s."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        gc.collect()  # the graph of the case before, and its memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ready = (case.build if on_gpu else case.tiny)(device)
    flops, moved = counted(ready)
    step = captured(ready.step) if on_gpu else ready.step
    each = seconds_per_call(step, seconds, device)
    rate = ready.images / each
    return {
        "images_per_second": round(rate) if on_gpu else _round(rate),
        "images_per_step": ready.images,
        "milliseconds_per_step": _round(each * 1e3),
        "gflop_per_image": _round(flops / ready.images / 1e9),
        "tflops": _round(flops / each / 1e12),
        "share_of_peak": _round(flops / each / peak),
        "mb_per_image": _round(moved / ready.images / 1e6),
        "share_of_bandwidth": _round(moved / each / bandwidth),
        "memory_gib": _round(torch.cuda.max_memory_allocated(device) / 2**30) if on_gpu else None,
        "goal": case.goal or None,
        "ratio_to_goal": _round(rate / case.goal) if case.goal and on_gpu else None,
    }


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as one CUDA graph, after WARMUP steps on another stream."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def counted(ready: Ready) -> tuple[int, int]:
    """(FLOPs, bytes read and written) of one step; the first step, which also makes Adam's moments, is not counted."""
    ready.step()
    flops, traffic = FlopCounterMode(display=False), Traffic()
    with flops:
        ready.step()
    with traffic:
        ready.step()
    return flops.get_total_flops(), traffic.bytes


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every operator's tensors, read and written; views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments):
            # rows drawn from a pool: as many are read as are written
            touched = (out, out) if func is torch.ops.aten.index.Tensor else (args, kwargs, out)
            for tensor in tree_leaves(touched):
                if isinstance(tensor, torch.Tensor):
                    self.bytes += tensor.numel() * tensor.element_size()
        return out


def matrix_peak(device: torch.device) -> float:
    """FLOP/s of a bf16 product of random matrices."""
    side = MATRIX if device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / seconds_per_call(lambda: torch.mm(a, b, out=out), 0.5, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy on the device."""
    source = torch.empty(COPIED if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_per_call(lambda: target.copy_(source), 0.5, device)


def seconds_per_call(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Mean over about `seconds`, at least three calls, after three that are not counted; the device is waited for at the end."""
    for _ in range(3):
        call()
    once = _timed(call, 3, device)
    times = max(3, min(100_000, round(seconds / once))) if device.type == "cuda" else 3
    return _timed(call, times, device)


def main(arguments: list[str] | None = None) -> int:
    """The command line: a table on standard output, progress on standard error; 2 and one line for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmarks.gpu", description=__doc__.splitlines()[0]
    )  # type: ignore[union-attr]
    parser.add_argument("suite", help=", ".join(SUITES))
    parser.add_argument("--only", default="", help="one case by its name")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured per case")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run of tiny cases")
    given = parser.parse_args(arguments)
    try:
        result = run(
            given.suite,
            given.device,
            only=given.only,
            seconds=given.seconds,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    return 0


# -- private --------------------------------------------------------------------------------------------------------


def _cases(suite: str, only: str) -> dict[str, Case]:
    if suite not in SUITES:
        raise ConfigError(f"{suite!r} has no part for a GPU; those that have are {', '.join(SUITES)}")
    cases = SUITES[suite]
    if only and only not in cases:
        raise ConfigError(f"{suite} has no case {only!r}; it has {', '.join(cases)}")
    return {only: cases[only]} if only else cases


def _device(name: str) -> torch.device:
    if name not in ("cuda", "cpu"):
        raise ConfigError(f"device must be cuda, or cpu for a dry run, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "there is no CUDA device here; run this where torch.cuda.is_available(), or dry with "
            "`python -m jobs.benchmarks.gpu SUITE --device cpu`"
        )
    return torch.device(name)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (dry run)"


def _timed(call: Callable[[], Any], times: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
