"""Training steps of the face swap of December 2017, from memory: learners/faceswap.py against the original written plainly.

`original` is its step in torch as one writes it: for each of the two people in turn the faces are turned, bent and aligned one by
one with OpenCV, go through encoder and decoder in fp32, and Adam updates both. Same layers, faces per update of the encoder's
inputs, and threads; a round is `batch_size` faces, half of them of each person: two updates of the original, one of ours. Errors of
the first rounds are compared over the repeats: a step that learns nothing may be as fast as it likes. Faces are procedural.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.harness import Contestant, Spec

UNIT = "images/s"
LIMIT = ""
NEEDS: dict[str, tuple[str, ...]] = {}
SIDE = 160  # pixels of a face crop; the original's is 256, of which it reads the middle 160
LOSS_ROUNDS = 3  # rounds whose errors are compared, the warm-up among them
SLOPE = 0.1


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """(2, N / 2, SIDE, SIDE, 3) uint8 in one file: two people."""
    from counterfake.images import Preprocess
    from counterfake.sources.synthetic import portrait

    path = folder / f"faces-{job.pictures}-{SIDE}.npy"
    if not path.exists():
        crop = Preprocess(size=SIDE, crop="face", margin=1.75)
        drawn = [[portrait(0, who, i, 192) for i in range(job.pictures // 2)] for who in (0, 1)]
        faces = [[crop.apply(face.pixels, face.face_box) for face in person] for person in drawn]
        np.save(path, np.array(faces))
    return {"faces": str(path)}


def conclusions(facts: dict[str, Any]) -> dict[str, Any]:
    """Mean absolute errors of each round, by contestant, one list per seed."""
    return {"errors": {name: [run["errors"] for run in runs] for name, runs in facts.items()}}


# -- ours -----------------------------------------------------------------------------------------------------------


def _counterfake(spec: Spec) -> Contestant:
    import torch

    from counterfake import dist, memory, precision
    from counterfake.data import Batch
    from counterfake.learners import LearnerContext
    from counterfake.learners.faceswap import FaceSwapConfig

    torch.set_num_threads(spec.threads)
    precision.set_matmul(spec.matmul, torch.device("cpu"))
    memory.keep()  # as every training process of ours does
    dist.seed_build(spec.seed)
    faces = torch.from_numpy(_faces(spec)).permute(0, 1, 4, 2, 3)
    context = LearnerContext(
        batch_size=spec.batch_size,
        images_per_epoch=faces.shape[0] * faces.shape[1],
        total_images=10**6,
        size=SIDE,
        identities=("a", "b"),
        precision=spec.precision,
    )
    learner = FaceSwapConfig().build(device=torch.device("cpu"), context=context)
    errors: list[Any] = []
    unknown = torch.full((spec.batch_size,), -1)
    identity = torch.arange(2).repeat_interleave(spec.batch_size // 2)

    def step() -> int:
        rows = [_rows(faces.shape[1], learner.steps, who, spec) for who in (0, 1)]
        batch = Batch(
            images=torch.cat([faces[who, chosen] for who, chosen in enumerate(rows)]),
            fake=unknown,
            class_id=unknown,
            identity=identity,
            maker=unknown,
            ids=[""] * spec.batch_size,
            step=learner.steps,
            epoch=0,
        )
        dist.seed_step(spec.seed, learner.steps)
        errors.append(learner.step(batch)["loss"])
        return spec.batch_size

    return Contestant(step, warmup=1, facts=lambda: {"errors": _first(errors, step)})


# -- the original ---------------------------------------------------------------------------------------------------


def _original(spec: Spec) -> Contestant:
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Half(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(inputs, outputs, 5, stride=2)

        def forward(self, x: Any) -> Any:
            return F.leaky_relu(self.conv(F.pad(x, (1, 2, 1, 2))), SLOPE)

    def double(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, 4 * outputs, 3, padding=1), nn.LeakyReLU(SLOPE), nn.PixelShuffle(2)
        )

    def decoder() -> nn.Module:
        ups = (double(512, 256), double(256, 128), double(128, 64))
        return nn.Sequential(*ups, nn.Conv2d(64, 3, 5, padding=2), nn.Sigmoid())

    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    rng = np.random.default_rng(spec.seed)
    encoder = nn.Sequential(
        *(Half(3, 128), Half(128, 256), Half(256, 512), Half(512, 1024)),
        nn.Flatten(),
        nn.Linear(1024 * 16, 1024),
        nn.Linear(1024, 1024 * 16),
        nn.Unflatten(1, (1024, 4, 4)),
        double(1024, 512),
    )
    decoders = [decoder() for _ in range(2)]
    for layer in (m for net in (encoder, *decoders) for m in net.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    adams = [
        torch.optim.Adam([*encoder.parameters(), *d.parameters()], lr=5e-5, betas=(0.5, 0.999))
        for d in decoders
    ]
    faces = _faces(spec).astype(np.float32) / 255
    faces[0] += faces[1].mean(axis=(0, 1, 2)) - faces[0].mean(axis=(0, 1, 2))
    errors: list[float] = []

    def step() -> int:
        found = []
        for who in (0, 1):
            chosen = _rows(faces.shape[1], len(errors), who, spec)
            pairs = [_bent(_moved(faces[who, row], rng), rng) for row in chosen]
            warped, target = (
                torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2) for part in zip(*pairs, strict=True)
            )
            loss = F.l1_loss(decoders[who](encoder(warped)), target)
            adams[who].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adams[who].step()
            found.append(loss.item())
        errors.append(float(np.mean(found)))
        return spec.batch_size

    return Contestant(step, warmup=1, facts=lambda: {"errors": _first(errors, step)})


def _moved(face: Any, rng: Any) -> Any:
    """Turned by ±10°, zoomed and shifted by ±5 %, mirrored two times in five."""
    import cv2

    side = face.shape[0]
    matrix = cv2.getRotationMatrix2D((side // 2, side // 2), rng.uniform(-10, 10), rng.uniform(0.95, 1.05))
    matrix[:, 2] += rng.uniform(-0.05, 0.05, 2) * side
    out = cv2.warpAffine(face, matrix, (side, side), borderMode=cv2.BORDER_REPLICATE)
    return out[:, ::-1] if rng.random() < 0.4 else out


def _bent(face: Any, rng: Any) -> tuple[Any, Any]:
    """The bent face and the aligned one, 64 pixels each."""
    import cv2

    side = face.shape[0]
    line = np.linspace(side * 48 / 256, side * 208 / 256, 5)
    mapx = np.broadcast_to(line, (5, 5)) + rng.normal(scale=side * 5 / 256, size=(5, 5))
    mapy = np.broadcast_to(line, (5, 5)).T + rng.normal(scale=side * 5 / 256, size=(5, 5))
    dense = [cv2.resize(m, (80, 80))[8:72, 8:72].astype(np.float32) for m in (mapx, mapy)]
    warped = cv2.remap(face, dense[0], dense[1], cv2.INTER_LINEAR)
    nodes = np.stack([mapx.ravel(), mapy.ravel()], axis=-1)
    matrix = _similarity(nodes, np.mgrid[0:65:16, 0:65:16].T.reshape(-1, 2).astype(float))
    return warped, cv2.warpAffine(face, matrix, (64, 64))


def _similarity(src: Any, dst: Any) -> Any:
    """(2, 3) least-squares similarity from src to dst (K, 2): Umeyama 1991."""
    src_mean, dst_mean = src.mean(0), dst.mean(0)
    a, b = src - src_mean, dst - dst_mean
    u, d, vt = np.linalg.svd(b.T @ a / len(src))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    scaled = (d @ sign) / a.var(0).sum() * (u @ np.diag(sign) @ vt)
    return np.column_stack([scaled, dst_mean - scaled @ src_mean])


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {"counterfake": _counterfake, "original": _original}


# -- private --------------------------------------------------------------------------------------------------------


def _faces(spec: Spec) -> np.ndarray[Any, Any]:
    return np.asarray(np.load(spec.inputs["faces"], allow_pickle=False))


def _rows(count: int, step: int, who: int, spec: Spec) -> Any:
    """The rows of a person at a step: the same for every contestant."""
    return np.random.default_rng([spec.seed, step, who]).integers(0, count, spec.batch_size // 2)


def _first(errors: list[Any], step: Callable[[], int]) -> list[float]:
    """The errors of the first LOSS_ROUNDS; rounds that the time did not allow are made up for."""
    while len(errors) < LOSS_ROUNDS:
        step()
    return [round(float(error), 4) for error in errors[:LOSS_ROUNDS]]
