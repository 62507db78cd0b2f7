"""Do pictures of a GAN help a classifier that has few real ones? (article S0: a larger set, a better classifier)

    counterfake run study-augment augment-gan              MNIST, 25, 50, 100, 250 real pictures per class, 5 seeds
    counterfake run study-augment augment-gan-smoke        two sizes, two seeds, few steps: 24 s on 2 busy cores

For every number of real pictures and every seed: a conditional GAN is trained on that subset only, then the same classifier
on the subset with 0, 1 or 5 synthetic pictures per real one, without and with the standard augmentation (random shifts). All
classifiers of a study make equally many updates, so that more pictures do not also mean more training, and are measured on
the test split, which no GAN sees. A smaller subset of a seed is part of its larger ones. Gains are differences between
classifiers of one subset and one seed; the interval is Student's, 95 %, over the seeds. Every cell is an ordinary training
job, nested below the study's run: a study that was killed goes on where it was.
Reference: Frid-Adar et al. 2018 (https://arxiv.org/abs/1801.02385), 182 liver lesions: sensitivity 78.6 to 85.7 %.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from counterfake import arrays, images
from counterfake import bundle as bundles
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import report
from counterfake.images import Preprocess
from counterfake.learners.classifier import ClassifierConfig
from counterfake.learners.diffaugment import DiffAugment
from counterfake.learners.gan import GanConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.classifier import SmallClassifier
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.records import Dataset, Sample, write_version
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.studies import study

Augmentation = Literal["none", "standard"]
BATCH = 256  # pictures drawn at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentStudyJob:
    """One GAN and one classifier, trained again for every subset of `gan.data`."""

    gan: TrainJob  # a conditional GanConfig; rows, seed and name are set by the study
    classifier: (
        TrainJob  # a ClassifierConfig with a validation split: the rows that every accuracy is measured on
    )
    sizes: tuple[int, ...] = (25, 50, 100, 250)  # real pictures per class
    multiples: tuple[int, ...] = (1, 5)  # synthetic pictures per real one
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    shift: int = 2  # pixels, both ways: the standard augmentation

    def __post_init__(self) -> None:
        if not isinstance(self.gan.learner, GanConfig) or not getattr(
            self.gan.learner.generator, "classes", 0
        ):
            raise ConfigError(
                "gan.learner must be a GanConfig whose networks know classes, or its pictures have none"
            )
        if not isinstance(self.classifier.learner, ClassifierConfig) or self.classifier.validation is None:
            raise ConfigError(
                "classifier must be a training job of a ClassifierConfig with a validation split"
            )
        if self.classifier.validation.split in (self.gan.data.split, "*"):
            raise ConfigError("classifier.validation must not be a split that the GAN sees; set it to test")
        if len(set(self.seeds)) < 2 or not self.sizes or min(*self.sizes, *self.multiples, self.shift) < 1:
            raise ConfigError("a study needs two seeds or more, and sizes, multiples and shift of 1 or more")


class Cell(NamedTuple):
    """One classifier of the study."""

    size: int
    seed: int
    augmentation: Augmentation
    multiple: int  # 0 = real pictures only


def run(job: AugmentStudyJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train every GAN and classifier; prints the table and returns it with the accuracy of each cell."""
    console = console or Console(quiet=True)
    with study(job, job.gan.name, workspace) as kept:
        rows = _measured(job, workspace, kept.run_id, console)
        lines = table(rows)
        found = kept.keep({"table": lines, "runs": rows}, {"augment": plot(lines)})
    if not console.as_json:
        console.table(
            "accuracy on held-out pictures", list(lines[0]), [list(line.values()) for line in lines]
        )
    return found


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is printed below the table."""
    return {name: result[name] for name in ("run_id", "file")}


def cells(job: AugmentStudyJob, size: int, seed: int) -> Iterator[Cell]:
    """The classifiers of one subset."""
    for augmentation in ("none", "standard"):
        yield from (Cell(size, seed, augmentation, multiple) for multiple in (0, *job.multiples))


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per size, augmentation and multiple: mean accuracy over seeds, and two paired gains with their intervals.

    `gain` is over the same augmentation without synthetic pictures, `over standard` over the standard augmentation alone."""
    accuracy = {(r["size"], r["augmentation"], r["multiple"], r["seed"]): float(r["accuracy"]) for r in rows}
    seeds = sorted({row["seed"] for row in rows})

    def of(size: int, augmentation: str, multiple: int) -> list[float]:
        return [accuracy[size, augmentation, multiple, seed] for seed in seeds]

    lines = []
    for size, augmentation, multiple in dict.fromkeys(
        (r["size"], r["augmentation"], r["multiple"]) for r in rows
    ):
        values = of(size, augmentation, multiple)
        lines.append(
            {
                "real per class": size, "augmentation": augmentation, "synthetic per real": multiple,
                "accuracy": statistics.fmean(values), "sd": statistics.stdev(values),
                **_gain("gain", values, of(size, augmentation, 0)),
                **_gain("over standard", values, of(size, "standard", 0)), "seeds": len(seeds),
            }
        )  # fmt: skip
    return lines


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences: Student's 95 % interval with n - 1 degrees of freedom."""
    from scipy.special import stdtrit

    mean = statistics.fmean(differences)
    reach = (
        float(stdtrit(len(differences) - 1, 0.975)) * statistics.stdev(differences) / len(differences) ** 0.5
    )
    return mean, mean - reach, mean + reach


def plot(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Accuracy against real pictures per class, a line for each augmentation and multiple; PNG."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        name = f"{line['augmentation']}, {line['synthetic per real']}× synthetic"
        curves.setdefault(name, []).append((line["real per class"], line["accuracy"]))
    return report.curves_plot(
        curves, x="real pictures per class", y="accuracy", title="GAN pictures as training data"
    )


# -- the data of a cell ---------------------------------------------------------------------------------------------


def chosen(class_id: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Indices of `size` pictures of every class; those of a smaller size are among those of a larger one.

    Raises DataError where a class has too few."""
    picked = []
    for label in np.unique(class_id[class_id >= 0]):
        places = np.flatnonzero(class_id == label)
        if len(places) < size:
            raise DataError(
                f"class {label} has {len(places)} pictures but the study wants {size}; set sizes lower"
            )
        picked.append(np.random.default_rng([seed, int(label)]).permutation(places)[:size])
    if not picked:
        raise DataError("no picture has a class; choose a dataset with classes")
    return np.concatenate(picked)


@torch.inference_mode()
def drawn(bundle: Path, count: int, seed: int) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """`count` pictures (H, W, C) of a conditional generator with their classes, which come in turn."""
    generator: Any = bundles.load_nets(bundles.read(bundle))["generator"]
    noise = torch.randn(
        count, int(generator.config.noise_size), generator=torch.Generator().manual_seed(seed)
    )
    classes = torch.arange(count) % generator.classes
    for part, asked in zip(torch.split(noise, BATCH), torch.split(classes, BATCH), strict=True):
        made = images.to_uint8(generator(part, asked)).permute(0, 2, 3, 1).numpy()
        yield from zip(made, asked.tolist(), strict=True)


# -- presets --------------------------------------------------------------------------------------------------------


def augment_gan() -> AugmentStudyJob:
    """Digits: 20 GANs of 3,000 steps and 120 classifiers of 1,000."""
    data = DataConfig(uri="mnist", batch_size=64, preprocess=Preprocess(size=28, channels=1))
    rates: dict[str, Any] = {"g_lr": 2e-4, "d_lr": 2e-4, "g_betas": (0.5, 0.999), "d_betas": (0.5, 0.999)}
    return AugmentStudyJob(
        gan=TrainJob(
            name="augment-gan",
            task="gan",
            data=data,
            learner=GanConfig(
                generator=DcganGenerator(classes=10, width=32),
                discriminator=DcganDiscriminator(classes=10, width=32),
                augment=DiffAugment(translation=0.125),  # the colour of a digit and a hole in it are no noise
                ema_halflife_images=5_000,
                **rates,
            ),
            loop=LoopConfig(steps=3_000, tick_steps=500, preview_every_ticks=0, precision="bf16"),
        ),
        classifier=TrainJob(
            name="augment-gan-classifier",
            task="classifier",
            data=data,
            validation=dataclasses.replace(data, split="test", batch_size=500),
            learner=ClassifierConfig(),
            loop=LoopConfig(steps=1_000, tick_steps=1_000, preview_every_ticks=0),
        ),
    )


def augment_gan_smoke() -> AugmentStudyJob:
    """Two sizes, one multiple, two seeds: 4 GANs of 60 steps and 16 classifiers of 40; the table has no meaning."""
    job = augment_gan()
    small = GanConfig(
        generator=DcganGenerator(classes=10, width=8), discriminator=DcganDiscriminator(classes=10, width=8)
    )
    gan = dataclasses.replace(
        job.gan,
        name="augment-gan-smoke",
        learner=small,
        loop=LoopConfig(steps=60, tick_steps=60, preview_every_ticks=0),
    )
    classifier = dataclasses.replace(
        job.classifier,
        name="augment-gan-smoke-classifier",
        learner=ClassifierConfig(net=SmallClassifier(width=8, features=32)),
        loop=LoopConfig(steps=40, tick_steps=40, preview_every_ticks=0),
    )
    return dataclasses.replace(
        job, gan=gan, classifier=classifier, sizes=(10, 20), multiples=(1,), seeds=(0, 1)
    )


PRESETS: dict[str, Callable[[], AugmentStudyJob]] = {
    "augment-gan": augment_gan,
    "augment-gan-smoke": augment_gan_smoke,
}


# -- private --------------------------------------------------------------------------------------------------------


def _gain(name: str, values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    mean, low, high = interval([a - b for a, b in zip(values, reference, strict=True)])
    return {name: mean, f"{name}, low": low, f"{name}, high": high}


def _measured(
    job: AugmentStudyJob, workspace: Workspace, parent: str, console: Console
) -> list[dict[str, Any]]:
    """The accuracy of every cell."""
    pool = _Pool(job, workspace)
    subsets = [(size, seed) for size in job.sizes for seed in job.seeds]
    rows = []
    with console.progress("subsets", total=len(subsets)) as advance:
        for number, (size, seed) in enumerate(subsets, start=1):
            console.stage(f"{number}/{len(subsets)}: {size} real pictures per class, seed {seed}")
            rows += _subset(job, pool, size, seed, parent)
            advance(1)
    return rows


def _subset(job: AugmentStudyJob, pool: _Pool, size: int, seed: int, parent: str) -> list[dict[str, Any]]:
    """Train the GAN of one subset and all its classifiers."""
    from counterfake.cluster.train import fit

    real = pool.real(size, seed)
    name = f"{job.gan.name}-n{size}-seed{seed}"
    gan = fit(_seeded(job.gan, name, real, seed), pool.workspace, parent_run=parent)
    assert gan.bundle is not None, "a finished run has a bundle"
    data = {0: real} | {m: pool.mixed(size, seed, m, gan.bundle, gan.name) for m in job.multiples}
    rows = []
    for cell in cells(job, size, seed):
        result = fit(_classifier(job, cell, data[cell.multiple]), pool.workspace, parent_run=parent)
        rows.append({**cell._asdict(), "accuracy": result.metrics["val_accuracy"], "run_id": result.run_id})
    return rows


def _classifier(job: AugmentStudyJob, cell: Cell, uri: str) -> TrainJob:
    """The training job of a cell."""
    base = job.classifier
    assert isinstance(base.learner, ClassifierConfig), "checked when the study was made"
    shift = job.shift if cell.augmentation == "standard" else 0
    learner = dataclasses.replace(base.learner, shift=shift)
    name = f"{base.name}-n{cell.size}-{cell.augmentation}-x{cell.multiple}-seed{cell.seed}"
    return dataclasses.replace(_seeded(base, name, uri, cell.seed), learner=learner)


def _seeded(base: TrainJob, name: str, uri: str, seed: int) -> TrainJob:
    data = dataclasses.replace(base.data, uri=uri, split="train", where={}, seed=seed)
    loop = dataclasses.replace(base.loop, seed=seed)
    return dataclasses.replace(base, name=name, data=data, loop=loop, register_as="")


class _Pool:
    """The real pictures, and the datasets of the cells made from them; one that is there is used as it is."""

    def __init__(self, job: AugmentStudyJob, workspace: Workspace) -> None:
        data = dataclasses.replace(job.gan.data, uri=workspace.dataset(job.gan.data.uri))
        self.workspace, self._name = workspace, job.gan.name
        self._pictures = arrays.load(data, cache=workspace.cache)
        self._licences = sorted({s["licence"] for s in self._pictures.rows.version.sources.values()})
        self._consents = {s["consent"] for s in self._pictures.rows.version.sources.values()}

    def real(self, size: int, seed: int) -> str:
        """URI of the subset of one size and seed."""
        return self._stored(f"n{size}-seed{seed}", lambda: self._real(size, seed))

    def mixed(self, size: int, seed: int, multiple: int, bundle: Path, maker: str) -> str:
        """URI of the subset with `multiple` synthetic pictures per real one."""
        name = f"{maker}-x{multiple}"
        return self._stored(name, lambda: self._mixed(size, seed, multiple, bundle, maker))

    def _real(self, size: int, seed: int) -> Iterator[Sample]:
        for place in chosen(self._pictures.class_id, size, seed):
            yield Sample(
                pixels=self._pictures.pixels[place],
                path=self._pictures.rows.ids[place],
                fake=0,
                class_id=int(self._pictures.class_id[place]),
                source="real",
                split="train",
            )

    def _mixed(self, size: int, seed: int, multiple: int, bundle: Path, maker: str) -> Iterator[Sample]:
        real = list(self._real(size, seed))
        yield from real
        for index, (pixels, label) in enumerate(drawn(bundle, multiple * len(real), seed)):
            path = f"{maker}/{index:06d}"
            yield Sample(
                pixels=pixels,
                path=path,
                fake=1,
                maker=maker,
                class_id=label,
                source="synthetic",
                split="train",
            )

    def _stored(self, name: str, make: Callable[[], Iterator[Sample]]) -> str:
        source = self._pictures.rows.sha256[:8]
        uri = self.workspace.dataset(f"{self._name}-{source}-{name}")
        if not Dataset.open(uri).versions():
            write_version(uri, make(), sources=self._sources(), cache=self.workspace.cache)
        return uri

    def _sources(self) -> dict[str, dict[str, str]]:
        licence = ", ".join(self._licences)
        consent = self._consents.copy().pop() if len(self._consents) == 1 else "research"  # the strictest
        return {
            "real": {"licence": licence, "consent": consent},
            "synthetic": {"licence": f"model output; trained on {licence}", "consent": "synthetic"},
        }
