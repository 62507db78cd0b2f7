"""Can a generator be taught the first digits of photographs, and does the Benford detector fall for it? (article S1)

    counterfake run study-benford benford-gan              128 px, 3 seeds; wants a GPU
    counterfake run study-benford benford-gan-64           64 px, 3 seeds
    counterfake run study-benford benford-gan-smoke        64 px, narrow networks, few steps: 25 s on 2 busy cores

The same GAN is trained with and without a penalty on the first digits of its pictures' DCT coefficients
(learners/soft_benford.py); the law comes from the real pictures that it trains on. A Benford detector learns real pictures
against fakes of the GAN without penalty, and is asked about held-out real pictures and fresh fakes of each GAN: how far its
AUC falls is the answer. A second detector, trained on fakes of the GAN it is asked about, says whether they can be told at all.
Every GAN is an ordinary training job, nested below the study's run: a study that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterfake import arrays, images
from counterfake import bundle as bundles
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection, report
from counterfake.forensics.benford import BenfordConfig, features_of
from counterfake.forensics.forest import BenfordForest, ForestConfig
from counterfake.images import Preprocess
from counterfake.learners.soft_benford import BenfordGanConfig, Law, SoftBenford, measure
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.studies import study

BATCH = 128  # pictures at a time
LEAST = 20  # real pictures per split below which an AUC says nothing
Pixels = NDArray[np.uint8]  # (N, H, W, C)
Features = NDArray[np.float32]  # (N, F)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenfordStudyJob:
    """One GAN, trained again for every weight of the penalty and every seed."""

    base: TrainJob  # a BenfordGanConfig; the study sets law, weight, seed and name. Its rows are the real pictures
    weights: tuple[float, ...] = (0.0, 1.0, 10.0)  # of the penalty; 0, the GAN without, must be among them
    seeds: tuple[int, ...] = (0, 1, 2)
    test_split: str = "test"  # real pictures that neither GAN nor detector sees in training
    pictures: int = (
        1_000  # fakes to train the detector, as many to test it, and at most so many real ones for each
    )
    features: BenfordConfig = dataclasses.field(default_factory=BenfordConfig)
    forest: ForestConfig = dataclasses.field(default_factory=ForestConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.base.learner, BenfordGanConfig):
            raise ConfigError(
                f"base.learner must be a BenfordGanConfig, got {type(self.base.learner).__name__}"
            )
        if 0.0 not in self.weights or len(set(self.weights)) < 2 or not self.seeds:
            raise ConfigError(
                f"a study needs weight 0, another weight and a seed; got {self.weights} and {self.seeds}"
            )
        if self.test_split in (self.base.data.split, "*") or self.pictures < LEAST:
            raise ConfigError(
                f"test_split must not be a split that the GAN sees, and pictures at least {LEAST}"
            )


@dataclasses.dataclass(frozen=True)
class Real:
    """What is known of the real pictures."""

    law: Law
    train: Features
    test: Features


def run(job: BenfordStudyJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train every GAN, ask the detectors; prints the table and returns it with the figures of each run."""
    console = console or Console(quiet=True)
    real = _real(job, workspace, console)
    with study(job, job.base.name, workspace) as kept:
        rows = [
            row for seed in job.seeds for row in _of_seed(job, seed, real, workspace, kept.run_id, console)
        ]
        lines = table(rows)
        found = kept.keep({"table": lines, "runs": rows, "law": real.law}, {"benford": plot(lines)})
    if not console.as_json:
        console.table("Benford detector on fakes", list(lines[0]), [list(line.values()) for line in lines])
    return found


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is printed below the table."""
    return {name: result[name] for name in ("run_id", "file")}


def train_job(job: BenfordStudyJob, weight: float, seed: int, law: Law) -> TrainJob:
    """The GAN of one weight and seed; with weight 0 it knows no law."""
    learner = job.base.learner
    assert isinstance(learner, BenfordGanConfig), "checked when the study was made"
    penalty = dataclasses.replace(learner.benford, law=law if weight else (), weight=weight)
    return dataclasses.replace(
        job.base,
        name=f"{job.base.name}-w{weight:g}-seed{seed}",
        learner=dataclasses.replace(learner, benford=penalty),
        loop=dataclasses.replace(job.base.loop, seed=seed),
        register_as="",
    )


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per weight, means over seeds. `fall` is the AUC lost against the GAN without penalty."""
    plain = {row["seed"]: row["auc"] for row in rows if row["weight"] == 0.0}
    lines = []
    for weight in dict.fromkeys(row["weight"] for row in rows):
        runs = [row for row in rows if row["weight"] == weight]
        means = {
            name: statistics.fmean(run[name] for run in runs) for name in ("divergence", "auc", "retrained")
        }
        lines.append(
            {
                "weight": weight, "divergence, nats": means["divergence"], "AUC": means["auc"],
                "fall": statistics.fmean(plain[run["seed"]] - run["auc"] for run in runs),
                "AUC retrained": means["retrained"], "seeds": len(runs),
            }
        )  # fmt: skip
    return lines


def plot(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """AUC of both detectors against the weight of the penalty; PNG."""
    curves = {
        "trained on the GAN without penalty": [(line["weight"], line["AUC"]) for line in lines],
        "trained on this GAN": [(line["weight"], line["AUC retrained"]) for line in lines],
    }
    return report.curves_plot(curves, x="weight of the penalty", y="AUC", title="Benford detector on fakes")


# -- presets --------------------------------------------------------------------------------------------------------


def benford_gan() -> BenfordStudyJob:
    """128 px faces of CIPLAB: 256 blocks a picture."""
    return BenfordStudyJob(base=_base("benford-gan", size=128, width=64, steps=20_000))


def benford_gan_64() -> BenfordStudyJob:
    """64 px: 64 blocks a picture, which is little for a detector that judges one picture alone."""
    return BenfordStudyJob(base=_base("benford-gan-64", size=64, width=32, steps=4_000))


def benford_gan_smoke() -> BenfordStudyJob:
    """Procedural faces, one seed, 40 steps of narrow networks: the table has no meaning."""
    base = _base("benford-gan-smoke", size=64, width=8, steps=40)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, uri="faces-demo", batch_size=32))
    small = BenfordConfig(qualities=(90,), bases=(10,))
    return BenfordStudyJob(base=base, seeds=(0,), pictures=100, features=small, forest=ForestConfig(trees=20))


PRESETS: dict[str, Callable[[], BenfordStudyJob]] = {
    "benford-gan": benford_gan,
    "benford-gan-64": benford_gan_64,
    "benford-gan-smoke": benford_gan_smoke,
}


# -- private --------------------------------------------------------------------------------------------------------


def _base(name: str, *, size: int, width: int, steps: int) -> TrainJob:
    preprocess = Preprocess(size=size, crop="center")
    return TrainJob(
        name=name,
        task="gan",
        data=DataConfig(uri="ciplab", batch_size=64, preprocess=preprocess, where={"fake": 0}),
        learner=BenfordGanConfig(
            generator=DcganGenerator(size=size, channels=3, width=width, slope=0.2, bn_momentum=0.1),
            discriminator=DcganDiscriminator(
                size=size, channels=3, width=width, slope=0.2, dropout=0.0, spectral_norm=True
            ),
            g_lr=2e-4,
            d_lr=2e-4,
            g_betas=(0.5, 0.999),
            d_betas=(0.5, 0.999),
            ema_halflife_images=10_000,
        ),
        loop=LoopConfig(steps=steps, tick_steps=max(1, steps // 20), preview_every_ticks=5, precision="bf16"),
    )


def _real(job: BenfordStudyJob, workspace: Workspace, console: Console) -> Real:
    """The law and the features of the real pictures."""
    learner = job.base.learner
    assert isinstance(learner, BenfordGanConfig), "checked when the study was made"
    parts: dict[str, Pixels] = {}
    for split, limit in ((job.base.data.split, 0), (job.test_split, job.pictures)):
        data = dataclasses.replace(job.base.data, uri=workspace.dataset(job.base.data.uri), split=split)
        with console.progress(f"real pictures of {split}", total=None) as advance:
            parts[split] = arrays.load(data, limit=limit, cache=workspace.cache, progress=advance).pixels
        if len(parts[split]) < LEAST:
            raise DataError(
                f"{job.base.data.uri} split {split} has {len(parts[split])} real pictures; {LEAST} are needed"
            )
    train = parts[job.base.data.split]
    law = measure(_tensors(train), learner.benford)
    return Real(
        law, _features(job, train[: job.pictures], console), _features(job, parts[job.test_split], console)
    )


def _of_seed(
    job: BenfordStudyJob, seed: int, real: Real, workspace: Workspace, parent: str, console: Console
) -> Iterator[dict[str, Any]]:
    """The figures of every weight; the GAN without penalty comes first, its fakes are what the detector knows."""
    from counterfake.cluster.train import fit

    known: BenfordForest | None = None
    for weight in sorted(job.weights):
        console.stage(f"seed {seed}, weight {weight:g}")
        result = fit(train_job(job, weight, seed, real.law), workspace, parent_run=parent)
        assert result.bundle is not None, "a finished run has a bundle"
        fakes = drawn(result.bundle, 2 * job.pictures, seed)
        seen, fresh = (
            _features(job, part, console) for part in (fakes[: job.pictures], fakes[job.pictures :])
        )
        own = _detector(job, real.train, seen)
        known = known or own
        yield {
            "weight": weight,
            "seed": seed,
            "divergence": _divergence(job, fakes, real.law),
            "auc": _auc(known, real.test, fresh),
            "retrained": _auc(own, real.test, fresh),
            "run_id": result.run_id,
        }


@torch.inference_mode()
def drawn(bundle: Path, count: int, seed: int) -> Pixels:
    """(count, H, W, C) of a generator, from the same noise for every generator of a seed."""
    generator: Any = bundles.load_nets(bundles.read(bundle))["generator"]
    noise = torch.randn(
        count, int(generator.config.noise_size), generator=torch.Generator().manual_seed(seed)
    )
    parts = [images.to_uint8(generator(part)) for part in torch.split(noise, BATCH)]
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def _tensors(pixels: Pixels) -> Iterator[torch.Tensor]:
    """Batches (N, C, H, W) in [-1, 1]."""
    for start in range(0, len(pixels), BATCH):
        yield images.to_float(torch.from_numpy(pixels[start : start + BATCH]).permute(0, 3, 1, 2))


def _features(job: BenfordStudyJob, pixels: Pixels, console: Console) -> Features:
    parts = []
    with console.progress("first digits", total=len(pixels)) as advance:
        for start in range(0, len(pixels), BATCH):
            parts.append(features_of(list(pixels[start : start + BATCH]), job.features))
            advance(len(parts[-1]))
    return np.concatenate(parts)


def _divergence(job: BenfordStudyJob, pixels: Pixels, law: Law) -> float:
    """KL of the pictures' digits to the law in nats, a histogram per batch as in training."""
    assert isinstance(job.base.learner, BenfordGanConfig), "checked when the study was made"
    penalty = SoftBenford(dataclasses.replace(job.base.learner.benford, law=law), torch.device("cpu"))
    with torch.no_grad():
        return statistics.fmean(float(penalty(batch)) for batch in _tensors(pixels))


def _detector(job: BenfordStudyJob, real: Features, fakes: Features) -> BenfordForest:
    return BenfordForest.fit(np.concatenate([real, fakes]), _labels(real, fakes), job.forest)


def _auc(detector: BenfordForest, real: Features, fakes: Features) -> float:
    scores = detector.predict(np.concatenate([real, fakes]))
    fpr, tpr, _ = detection.roc(_labels(real, fakes), scores)
    return float(np.trapezoid(tpr, fpr))


def _labels(real: Features, fakes: Features) -> NDArray[np.int64]:
    return np.repeat(np.array([0, 1]), [len(real), len(fakes)])
