"""Training a detector through the platform against its steps alone, on batches that are decoded and ready: what decoding JPEG
pictures, Ray Train, checkpoints and MLflow cost. Otherwise as training.py. MobileNetV2 with the learner's augmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks import training
from jobs.benchmarks.harness import Contestant, Spec

UNIT = "images/s"
LIMIT = "bare"
NEEDS: dict[str, tuple[str, ...]] = {}
QUALITY = 90  # of the JPEG files


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """JPEG pictures of smooth noise as a dataset, every other one called fake."""
    uri = (folder / f"dataset-{job.size}-{job.pictures}").as_uri()
    rng = np.random.default_rng(0)
    training.store(uri, ({"image": _picture(rng, job.size)} for _ in range(job.pictures)))
    return {"dataset": uri}


def train_job(spec: Spec, workers: int) -> Any:
    from counterfake.data import DataConfig
    from counterfake.images import Preprocess
    from counterfake.learners.detector import DetectorConfig
    from counterfake.loop import LoopConfig, TrainJob

    job = TrainJob(
        name="benchmark-detector",
        task="detector",
        data=DataConfig(
            uri=spec.inputs["dataset"], batch_size=spec.batch_size, preprocess=Preprocess(size=spec.size)
        ),
        learner=DetectorConfig(),
        loop=LoopConfig(steps=1),
        workers=workers,
    )
    return training.with_loop(job, spec)


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "counterfake": lambda spec: training.through_platform(train_job(spec, 1), spec),
    "bare": lambda spec: training.bare(train_job(spec, 0), spec),
}


# -- private --------------------------------------------------------------------------------------------------------


def _picture(rng: np.random.Generator, size: int) -> bytes:
    import cv2
    import simplejpeg

    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(smooth), quality=QUALITY))
