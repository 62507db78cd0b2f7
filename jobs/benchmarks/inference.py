"""One MobileNetV2 in every runtime a bundle can record: torch eager, ONNX Runtime and OpenVINO at fp32, bf16 and int8.

Ours is the bundle's own Predictor with the fastest of them recorded (OpenVINO at int8 where it is installed, else ONNX Runtime,
else torch); the peers are the bare runtimes on prepared pixels, so that the ratio shows what the Predictor adds. The weights
are random: `probability_differences` says how far each runtime is from eager on a net that has learnt nothing, which is
worst for low precisions; what they cost a trained detector is measured by `counterfake run optimise`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from counterfake import runtime
from counterfake.runtime import CANDIDATES, TORCH, Candidate
from jobs.benchmarks import serving
from jobs.benchmarks.harness import Contestant, ContestantFailed, Spec
from jobs.benchmarks.serving import LIMIT, NEEDS, UNIT, conclusions

__all__ = ["CONTESTANTS", "LIMIT", "NEEDS", "UNIT", "conclusions", "setting_up"]

PREFERRED = (
    "openvino-int8",
    "onnxruntime-int8",
    "onnxruntime-fp32",
)  # for the recorded bundle, as measured on x86


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """The bundle and pictures of the serving benchmark, its exports, and a bundle that records the preferred runtime."""
    from counterfake import bundle as bundles

    inputs = serving.setting_up(job, folder, console)
    plain = bundles.read(Path(inputs["bundle"]))
    pictures = np.load(inputs["pictures"], allow_pickle=False)
    files = {"net.onnx": runtime.export(next(iter(bundles.load_nets(plain).values())), job.size, 3)}
    if not runtime.missing("onnx", "onnxruntime"):
        files["net-int8.onnx"] = runtime.quantised(files["net.onnx"], pictures)
    for name, data in files.items():
        (folder / f"{job.size}-{name}").write_bytes(data)
    usable = [c for c in CANDIDATES if c.file in files and not runtime.missing(c.library)]
    chosen = min(usable, key=_preference, default=TORCH)
    record = {"library": chosen.library, "precision": chosen.precision, "file": chosen.file}
    kept = {} if chosen == TORCH else {chosen.file: files[chosen.file]}
    fast = bundles.with_runtime(plain, folder / f"recorded-{job.size}", {"cpu": record}, kept)
    return {**inputs, "recorded": str(fast.folder), "files": str(folder / f"{job.size}-")}


# -- contestants ----------------------------------------------------------------------------------------------------


def _counterfake(spec: Spec) -> Contestant:
    import torch

    from counterfake.predictor import Decoded, load

    torch.set_num_threads(spec.threads)
    predictor = load(Path(spec.inputs["recorded"]))
    return serving._contestant(
        spec, lambda pictures: predictor.predict([Decoded(pixels=p) for p in pictures])
    )


def _bare(candidate: Candidate) -> Callable[[Spec], Contestant]:
    def contestant(spec: Spec) -> Contestant:
        file = Path(f"{spec.inputs['files']}{candidate.file}")
        if reason := runtime.missing(candidate.library):
            raise ContestantFailed(reason)
        if not file.exists():
            raise ContestantFailed(f"no {candidate.file}: {runtime.missing('onnx', 'onnxruntime')}")
        engine = runtime.opened(candidate, file, spec.threads)
        return serving._contestant(spec, lambda pictures: runtime.probabilities(engine, np.stack(pictures)))

    return contestant


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "counterfake": _counterfake,
    "torch-eager": serving.CONTESTANTS["torch-eager"],
    **{candidate.name: _bare(candidate) for candidate in CANDIDATES},
}


# -- private --------------------------------------------------------------------------------------------------------


def _preference(candidate: Candidate) -> int:
    return PREFERRED.index(candidate.name) if candidate.name in PREFERRED else len(PREFERRED)
