"""Decoded pictures through one MobileNetV2: a bundle's Predictor against the same network in other runtimes. No HTTP.

Every contestant takes the same (H, W, 3) uint8 arrays and gives probabilities, so scaling to [-1, 1] and the sigmoid are
part of it. A round is one call of `batch_size` pictures; one picture per call is measured right after it. ONNX Runtime
and OpenVINO take part where they are installed. Probabilities are compared with those of the eager network in fp32.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.harness import Contestant, ContestantFailed, Spec

UNIT = "pictures/s"
LIMIT = ""
NEEDS: dict[str, tuple[str, ...]] = {}
Predict = Callable[[list[Any]], Any]  # (H, W, 3) uint8 arrays -> probabilities (N,)


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """A detector bundle with the real network's shape, the same net as ONNX where it can be exported, and pictures."""
    import torch

    from counterfake.bundle import write_nets
    from counterfake.images import Preprocess
    from counterfake.nets.mobilenetv2 import MobileNetV2Config
    from counterfake.sources.synthetic import portrait

    torch.manual_seed(0)
    config = MobileNetV2Config()
    pictures = np.stack([portrait(0, i, 0, job.size).pixels for i in range(job.pictures)])
    np.save(folder / "pictures.npy", pictures)
    net = _settled(config.build(), torch.from_numpy(pictures))
    bundle = folder / f"bundle-{job.size}"
    write_nets(
        bundle,
        kind="detector",
        name="benchmark",
        nets={"detector": (config, net.state_dict())},
        preprocess=Preprocess(size=job.size),
        provenance={"notes": "random weights, for the benchmark of speed"},
    )
    onnx = folder / f"net-{job.size}.onnx"
    if importlib.util.find_spec("onnx"):
        _export(net, job.size, onnx)
    return {"bundle": str(bundle), "pictures": str(folder / "pictures.npy"), "onnx": str(onnx)}


def conclusions(facts: dict[str, Any]) -> dict[str, Any]:
    """Pictures/s one by one, and how far each runtime's probabilities are from eager's."""
    single = {
        name: round(statistics.median(run["single"] for run in runs), 2) for name, runs in facts.items()
    }
    probabilities = {name: np.array(runs[0]["probabilities"]) for name, runs in facts.items()}
    eager = probabilities.get("torch-eager")
    errors = {} if eager is None else {n: float(np.abs(p - eager).max()) for n, p in probabilities.items()}
    ours = single.get("counterfake")
    return {
        "batch_of_1": {
            "pictures_per_second": single,
            "ratios": {n: round(ours / rate, 3) for n, rate in single.items() if ours and n != "counterfake"},
        },
        "probability_differences": errors,
    }


# -- contestants ----------------------------------------------------------------------------------------------------


def _counterfake(spec: Spec) -> Contestant:
    import torch

    from counterfake.predictor import Decoded, load

    torch.set_num_threads(spec.threads)
    predictor = load(Path(spec.inputs["bundle"]))
    return _contestant(spec, lambda pictures: predictor.predict([Decoded(pixels=p) for p in pictures]))


def _torch_eager(spec: Spec) -> Contestant:
    import torch

    from counterfake.bundle import load_nets, read

    torch.set_num_threads(spec.threads)
    net = load_nets(read(Path(spec.inputs["bundle"])))["detector"].eval()

    def predict(pictures: list[Any]) -> Any:
        with torch.inference_mode():
            batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
            return torch.sigmoid(net(batch)).numpy()

    return _contestant(spec, predict)


def _onnxruntime(spec: Spec) -> Contestant:
    runtime = _module("onnxruntime", spec)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = spec.threads
    session = runtime.InferenceSession(spec.inputs["onnx"], options, providers=["CPUExecutionProvider"])
    return _contestant(spec, lambda pictures: _sigmoid(session.run(None, {"images": _scaled(pictures)})[0]))


def _openvino(spec: Spec, precision: str = "f32") -> Contestant:
    runtime = _module("openvino", spec)
    settings = {"INFERENCE_NUM_THREADS": spec.threads, "INFERENCE_PRECISION_HINT": precision}
    model = runtime.Core().compile_model(spec.inputs["onnx"], "CPU", settings)
    return _contestant(spec, lambda pictures: _sigmoid(model({"images": _scaled(pictures)})[0]))


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "counterfake": _counterfake,
    "torch-eager": _torch_eager,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "openvino-bf16": lambda spec: _openvino(spec, "bf16"),
}


# -- private --------------------------------------------------------------------------------------------------------


def _contestant(spec: Spec, predict: Predict) -> Contestant:
    pictures = list(np.load(spec.inputs["pictures"], allow_pickle=False))

    def batch() -> int:
        predict(pictures[: spec.batch_size])
        return spec.batch_size

    def facts() -> dict[str, Any]:
        return {
            "single": _single(predict, pictures, spec.seconds),
            "probabilities": np.ravel(predict(pictures)).tolist(),
        }

    return Contestant(batch, warmup=5, facts=facts)


def _single(predict: Predict, pictures: list[Any], seconds: float) -> float:
    for picture in pictures[:5]:
        predict([picture])
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not done:
        predict([pictures[done % len(pictures)]])
        done += 1
    return done / elapsed


def _settled(net: Any, pictures: Any) -> Any:
    """Batch statistics of these pictures, so that random weights give probabilities that differ."""
    import torch

    for layer in net.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.momentum = None  # the mean over all passes
    with torch.no_grad():
        net.train()(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
    return net.eval()


def _export(net: Any, size: int, path: Path) -> None:
    import torch

    images = torch.zeros(2, 3, size, size)
    names = {
        "input_names": ["images"],
        "output_names": ["logits"],
        "dynamic_axes": {"images": {0: "n"}, "logits": {0: "n"}},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constants it does not fold, and that there is a newer exporter
        torch.onnx.export(net, (images,), str(path), dynamo=False, **names)  # type: ignore[arg-type]


def _module(name: str, spec: Spec) -> Any:
    if not Path(spec.inputs["onnx"]).exists():
        raise ContestantFailed("onnx is not installed, so the network cannot be exported")
    if not importlib.util.find_spec(name):
        raise ContestantFailed(f"{name} is not installed")
    return importlib.import_module(name)


def _scaled(pictures: list[Any]) -> Any:
    batch = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32)
    return np.ascontiguousarray(batch / np.float32(127.5) - 1)


def _sigmoid(logits: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
