"""Studies of adversarial training: the same networks under several settings, judged alike.

    counterfake run train-classifier mnist              once: the network that judges
    counterfake run study-gan gan-minimax-k             minimax and non-saturating, k = 1, 2, 5 discriminator steps, 3 seeds
    counterfake run study-gan gan-minimax-k-dcgan       the same with the DCGAN of the articles: for a GPU
    counterfake run study-gan gan-minimax-k-smoke       one seed, few steps, to see that it runs

`gan-minimax-k` asks whether several discriminator steps per generator step are better, as article S2 says. k steps cost k
times as much, so there are two tables: after equally many generator updates, and after equal work. Work is counted in
pictures that pass the discriminator: 2 k batches for its own updates and one for the generator's, so 2 k + 1 per generator
update. The judge is a classifier trained by the platform: FID of its features against the test split, how sure it is of the
samples, how many classes it finds. Every run is an ordinary training job, nested in MLflow below the study's run, which has
the tables and a picture; they lie in `runs/studies/` too. The study killed and started again goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from counterfake import arrays, images
from counterfake import bundle as bundles
from counterfake.errors import ConfigError
from counterfake.evaluation import generation, report
from counterfake.extractor import BundleExtractor, Extractor, ExtractorConfig
from counterfake.learners.gan import GanConfig
from counterfake.learners.gan_losses import Loss
from counterfake.loop import LoopConfig, TrainJob
from counterfake.workspace import Workspace
from jobs import evaluate
from jobs.console import Console
from jobs.studies import study
from jobs.train_gan import dcgan_mnist_s4, gan_dense_mnist

Budget = Literal["equal generator updates", "equal work"]
BUDGETS: tuple[Budget, ...] = ("equal generator updates", "equal work")
BATCH = 256  # samples drawn at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class GanStudyJob:
    """One training job, repeated for every loss, number of discriminator steps, seed and budget."""

    base: TrainJob  # its learner must be a GanConfig; loss, d_steps, seed and duration are set by the study
    losses: tuple[Loss, ...] = ("minimax", "non_saturating")
    d_steps: tuple[int, ...] = (1, 2, 5)
    seeds: tuple[int, ...] = (0, 1, 2)
    generator_updates: int = 5_000  # of the runs with k = 1, and of all in the first table
    samples: int = 10_000
    reference_split: str = "test"
    extractor: ExtractorConfig = dataclasses.field(default_factory=BundleExtractor)

    def __post_init__(self) -> None:
        if not isinstance(self.base.learner, GanConfig):
            raise ConfigError(f"base.learner must be a GanConfig, got {type(self.base.learner).__name__}")
        if classes := getattr(self.base.learner.generator, "classes", 0):
            raise ConfigError(
                f"the study judges samples drawn from noise alone, but base's networks are told one of {classes} classes; "
                "set classes=0 in base.learner.generator and base.learner.discriminator"
            )
        if not (self.losses and self.seeds and self.d_steps) or min(self.d_steps) < 1:
            raise ConfigError("a study needs at least one loss, one seed, and d_steps of 1 or more")
        if self.generator_updates < 1 or self.samples < 2:
            raise ConfigError("a study needs generator_updates >= 1 and samples >= 2")


class Cell(NamedTuple):
    """One run of the study."""

    budget: Budget
    loss: Loss
    k: int
    seed: int


def run(job: GanStudyJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train and judge every cell; prints both tables and returns them with the figures of each run."""
    console = console or Console(quiet=True)
    judge = _Judge(job, workspace, console)  # a judge that is missing is told before anything is trained
    with study(job, job.base.name, workspace) as kept:
        rows = _measured(job, judge, workspace, kept.run_id, console)
        tables = {budget: table(rows, budget) for budget in BUDGETS}
        found = {
            "tables": tables, "runs": rows, "extractor": judge.extractor.name, "sha256": judge.extractor.sha256,
        }  # fmt: skip
        result = kept.keep(
            found, {f"fid-{name.replace(' ', '-')}": plot(lines, name) for name, lines in tables.items()}
        )
    for budget, lines in tables.items():
        if not console.as_json:
            console.table(budget, list(lines[0]), [list(line.values()) for line in lines])
    return result


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is printed below the tables."""
    return {name: result[name] for name in ("extractor", "run_id", "file")}


def cells(job: GanStudyJob) -> Iterator[Cell]:
    """Every run; those with k = 1 stand in both tables and are trained once."""
    for seed in job.seeds:
        for budget in BUDGETS:
            for loss in job.losses:
                yield from (Cell(budget, loss, k, seed) for k in job.d_steps)


def updates(job: GanStudyJob, cell: Cell) -> int:
    """Generator updates of a run. Equal work: as many pictures pass D as with k = 1, at 2 k + 1 batches per update."""
    if cell.budget == "equal generator updates":
        return job.generator_updates
    return max(1, round(job.generator_updates * 3 / (2 * cell.k + 1)))


def train_job(job: GanStudyJob, cell: Cell) -> TrainJob:
    """The training job of a cell; a step is one update of D."""
    assert isinstance(job.base.learner, GanConfig), "checked when the study was made"
    steps = updates(job, cell) * cell.k
    return dataclasses.replace(
        job.base,
        name=f"{job.base.name}-{cell.loss}-k{cell.k}".replace("_", "-"),
        learner=dataclasses.replace(job.base.learner, loss=cell.loss, d_steps=cell.k, alternate=True),
        loop=dataclasses.replace(
            job.base.loop,
            steps=steps,
            epochs=0.0,
            images=0,
            tick_steps=max(1, steps // 10),
            seed=cell.seed,
            checkpoint_every_ticks=5,
            preview_every_ticks=0,
        ),
        register_as="",
    )


def table(rows: Sequence[dict[str, Any]], budget: Budget) -> list[dict[str, Any]]:
    """One line per loss and k: means over seeds, and the spread of the FID."""
    lines = []
    for loss, k in dict.fromkeys((row["loss"], row["k"]) for row in rows):
        runs = [row for row in rows if (row["budget"], row["loss"], row["k"]) == (budget, loss, k)]
        fids = [row["fid"] for row in runs]
        lines.append(
            {
                "loss": loss,
                "k": k,
                "seeds": len(runs),
                "generator updates": runs[0]["generator_updates"],
                "work, million pictures": runs[0]["pictures_through_d"] / 1e6,
                "FID": statistics.mean(fids),
                "FID, deviation": statistics.stdev(fids) if len(fids) > 1 else 0.0,
                **_of_classes(runs),
            }
        )
    return lines


def _of_classes(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the runs of what only a judge that classifies says; {} for another."""
    columns = {"confidence": "mean_confidence", "classes": "classes_found"}
    return {
        column: statistics.mean(row[name] for row in runs)
        for column, name in columns.items()
        if name in runs[0]
    }


def plot(lines: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """FID against k, a line for each loss; PNG."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        curves.setdefault(line["loss"], []).append((line["k"], line["FID"]))
    return report.curves_plot(curves, x="discriminator steps per generator step", y="FID", title=title)


# -- presets --------------------------------------------------------------------------------------------------------


def gan_minimax_k() -> GanStudyJob:
    """The dense GAN of the articles, k = 1, 2, 5."""
    return GanStudyJob(base=_named(gan_dense_mnist()))


def gan_minimax_k_dcgan() -> GanStudyJob:
    """The DCGAN of the articles, 2,000 generator updates of 256 digits: 5.6 million pictures through D where k = 5."""
    return GanStudyJob(base=_named(dcgan_mnist_s4(), "gan-minimax-k-dcgan"), generator_updates=2_000)


def gan_minimax_k_smoke() -> GanStudyJob:
    """One seed and 60 generator updates: the tables, with no meaning in them."""
    return GanStudyJob(base=_named(gan_dense_mnist()), seeds=(0,), generator_updates=60, samples=1_000)


PRESETS: dict[str, Callable[[], GanStudyJob]] = {
    "gan-minimax-k": gan_minimax_k,
    "gan-minimax-k-dcgan": gan_minimax_k_dcgan,
    "gan-minimax-k-smoke": gan_minimax_k_smoke,
}


# -- private --------------------------------------------------------------------------------------------------------


def _named(base: TrainJob, name: str = "gan-minimax-k") -> TrainJob:
    return dataclasses.replace(base, name=name, loop=LoopConfig(steps=1, precision="bf16"))


def _measured(
    job: GanStudyJob, judge: _Judge, workspace: Workspace, parent: str, console: Console
) -> list[dict[str, Any]]:
    """The figures of every cell."""
    plan, rows = list(cells(job)), []
    with console.progress("runs", total=len(plan)) as advance:
        for number, cell in enumerate(plan, start=1):
            console.stage(f"{number}/{len(plan)}: {cell.loss}, k = {cell.k}, seed {cell.seed}, {cell.budget}")
            rows.append({**cell._asdict(), **_trained_and_judged(job, cell, judge, workspace, parent)})
            advance(1)
    return rows


class _Judge:
    """The extractor and the moments of the reference, made once."""

    def __init__(self, job: GanStudyJob, workspace: Workspace, console: Console) -> None:
        self.job = job
        find = functools.partial(evaluate.resolve, workspace=workspace)
        self.extractor: Extractor = job.extractor.load(find, torch.device("cpu"))
        self._known: dict[Path, dict[str, float]] = {}  # a run with k = 1 stands in both tables
        data = dataclasses.replace(
            job.base.data, uri=workspace.dataset(job.base.data.uri), split=job.reference_split
        )
        with console.progress(f"reference: {job.reference_split}", total=None) as advance:
            pictures = arrays.load(data, cache=workspace.cache, progress=advance)
            self._reference = generation.moments(self.extractor(pictures.pixels).values)

    def __call__(self, bundle: Path) -> dict[str, float]:
        """FID, mean confidence and classes found of the generator in a bundle."""
        if bundle not in self._known:
            self._known[bundle] = self._judged(bundle)
        return self._known[bundle]

    def _judged(self, bundle: Path) -> dict[str, float]:
        found = self.extractor(_samples(bundle, self.job.samples))
        figures = {"fid": generation.frechet_distance(generation.moments(found.values), self._reference)}
        if found.probabilities is None:
            return figures
        labels = generation.label_figures(found.probabilities)
        return {**figures, **{name: labels[name] for name in ("mean_confidence", "classes_found")}}


def _trained_and_judged(
    job: GanStudyJob, cell: Cell, judge: _Judge, workspace: Workspace, parent: str
) -> dict[str, Any]:
    from counterfake.cluster.train import fit  # not at import: a preset must not load MLflow

    result = fit(train_job(job, cell), workspace, parent_run=parent)
    assert result.bundle is not None, "a finished run has a bundle"
    passes = updates(job, cell) * (2 * cell.k + 1)
    return {
        "generator_updates": updates(job, cell),
        "pictures_through_d": passes * job.base.data.batch_size,
        "seconds": round(result.seconds, 1),
        "run_id": result.run_id,
        **judge(result.bundle),
    }


@torch.inference_mode()
def _samples(bundle: Path, count: int) -> NDArray[np.uint8]:
    """(count, H, W, C) from noise that is the same for every generator."""
    generator = bundles.load_nets(bundles.read(bundle))["generator"]
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(count, int(generator.config.noise_size), generator=source)  # type: ignore[union-attr, arg-type]
    parts = [images.to_uint8(generator(part)) for part in torch.split(noise, BATCH)]
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()
