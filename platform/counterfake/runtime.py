"""A network outside torch: one ONNX export, the libraries that run it on a CPU, and which of them a bundle asks for.

The exported graph takes what preprocessing gives, (N, H, W, C) uint8, and gives logits (N,), so that scaling to [-1, 1] is
part of it and every library sees the same numbers. fp32 and bf16 read one file; int8 reads a second one, quantised from it.
ONNX Runtime, OpenVINO and onnx are optional (`pip install counterfake[cpu]`): a bundle that asks for what is not installed
is answered by torch, and `select` says so. The only home of the three.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake.errors import CheckpointError, ConfigError
from counterfake.images import to_float
from counterfake.temporary import temporary_folder

Library = Literal["torch", "onnxruntime", "openvino"]
Precision = Literal["fp32", "bf16", "int8"]
Engine = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # (N, H, W, C), N <= BATCH -> logits (N,)
BATCH = 8  # pictures in one pass; from 16 on oneDNN picks other kernels in torch, whose rounding differs
INPUT, OUTPUT = "images", "logits"
OPSET = 17  # of the export; both libraries read it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A library at a precision."""

    library: Library = "torch"
    precision: Precision = "fp32"

    @property
    def name(self) -> str:
        """As a record, a log and `/v1/models` call it, like "openvino-bf16"."""
        return f"{self.library}-{self.precision}"

    @property
    def file(self) -> str:
        """Its file in the bundle; torch reads the weights themselves."""
        return {"int8": "net-int8.onnx"}.get(self.precision, "net.onnx")


TORCH = Candidate()
CANDIDATES = (
    Candidate(library="onnxruntime"),
    Candidate(library="onnxruntime", precision="int8"),
    Candidate(library="openvino"),
    Candidate(library="openvino", precision="bf16"),
    Candidate(library="openvino", precision="int8"),
)


def missing(*libraries: str) -> str:
    """Why these libraries cannot be used here; "" if they can."""
    absent = [name for name in libraries if name != "torch" and importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed (pip install 'counterfake[cpu]')" if absent else ""


def select(info: Mapping[str, Any], device: str = "cpu") -> tuple[Candidate, str]:
    """What answers for a bundle with this bundle.json on this kind of device, and why. CheckpointError for a record of
    no known form."""
    record = (info.get("runtime") or {}).get(device)
    if record is None:
        return TORCH, f"the bundle records no choice for {device}"
    try:
        library, precision, file = record["library"], record["precision"], record["file"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the runtime record of the bundle is incomplete: {error}") from error
    chosen = Candidate(library=library, precision=precision)
    known = library in get_args(Library) and precision in get_args(Precision)
    if not known or (chosen != TORCH and (file != chosen.file or file not in info["files"])):
        raise CheckpointError(
            f"the bundle asks for {library!r} at {precision!r} from {file!r}; it is unknown"
        )
    if reason := missing(library):
        return TORCH, f"the bundle asks for {chosen.name}, but {reason}"
    return chosen, "as the bundle records"


def opened(candidate: Candidate, model: Path | bytes, threads: int) -> Engine:
    """The exported network, ready to answer with so many threads; from any thread of the caller's."""
    data = model if isinstance(model, bytes) else model.read_bytes()
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[candidate.library](candidate, data, threads)


def probabilities(engine: Engine, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """images (N, H, W, C) -> probability of being fake (N,), BATCH pictures at a time."""
    logits = np.concatenate([engine(chunk) for chunk in _chunks(images)])
    return np.array([_sigmoid(float(logit)) for logit in logits])


def _sigmoid(logit: float) -> float:
    """One by one: torch's rounds a number differently by its place in the array, in the last bit."""
    small = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else small) / (1.0 + small)


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) uint8, on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def export(net: nn.Module, size: int, channels: int) -> bytes:
    """`net` with its input scaling as ONNX, for any number of pictures. ConfigError if an operator has no ONNX form."""
    example = torch.zeros(2, size, size, channels, dtype=torch.uint8)
    out = io.BytesIO()  # which the exporter takes, though its annotation knows paths only
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is a newer exporter, which needs onnxscript
            torch.onnx.export(
                _FromPixels(net).eval(), (example,), cast(Any, out), dynamo=False, opset_version=OPSET,
                input_names=[INPUT], output_names=[OUTPUT], dynamic_axes={INPUT: {0: "n"}, OUTPUT: {0: "n"}},
            )  # fmt: skip
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"this network has no ONNX form: {reason}; it is answered by torch") from error
    return out.getvalue()


def quantised(model: bytes, pictures: NDArray[np.uint8]) -> bytes:
    """An fp32 export in int8: weights per channel, activations by the ranges seen on pictures (N, H, W, C).

    Jacob et al. 2018, https://arxiv.org/abs/1712.05877, eq. 1, after training; written as QuantizeLinear and DequantizeLinear
    around the operators, which both libraries run as integers. ConfigError without onnx and onnxruntime."""
    if reason := missing("onnx", "onnxruntime"):
        raise ConfigError(f"int8 is not to be had: {reason}")
    from onnxruntime import quantization

    feed = _Feed(pictures)
    with temporary_folder() as folder, _quiet():
        source, target = folder / "fp32.onnx", folder / "int8.onnx"
        source.write_bytes(model)
        quantization.quantize_static(
            source, target, feed, quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        return target.read_bytes()


def libraries() -> dict[str, str]:
    """Versions of what is installed here, torch among it."""
    names = [name for name in ("torch", "onnxruntime", "openvino") if not missing(name)]
    return {name: importlib.metadata.version(name) for name in names}


# -- private --------------------------------------------------------------------------------------------------------


def _chunks(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    yield from (images[i : i + BATCH] for i in range(0, len(images), BATCH))


class _FromPixels(nn.Module):
    """A net behind its input scaling."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, C) uint8 -> logits (N,)."""
        return self.net(to_float(images.permute(0, 3, 1, 2)))


class _Feed:
    """Pictures one by one, as the calibration of ONNX Runtime asks for them."""

    def __init__(self, pictures: NDArray[np.uint8]) -> None:
        self._rest = iter(pictures)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        picture = next(self._rest, None)
        return None if picture is None else {INPUT: picture[None]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without ONNX Runtime's advice on models, which it writes to the root logger and to standard error."""
    import onnxruntime

    root = logging.getLogger()
    level = root.level
    onnxruntime.set_default_logger_severity(3)  # errors only
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        onnxruntime.set_default_logger_severity(2)


def _onnxruntime(candidate: Candidate, model: bytes, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run([OUTPUT], {INPUT: images})[0], np.float32)


def _openvino(candidate: Candidate, model: bytes, threads: int) -> Engine:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if candidate.precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",  # all threads on one request; a service batches by itself
        "ENABLE_CPU_PINNING": False,  # two replicas would be pinned to the same cores
    }
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    mine = threading.local()  # a request serves one thread at a time

    def answer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        found = mine.request.infer({INPUT: np.ascontiguousarray(images)})
        return np.array(found[OUTPUT], np.float32)  # a copy: the next request writes over it

    return answer
