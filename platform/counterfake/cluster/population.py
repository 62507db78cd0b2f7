"""Population-based training: a trial that lags goes on from a better one's checkpoint, with that one's settings a little changed.

Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846, by Ray Tune's scheduler. Between two exchanges a trial is an ordinary
training run; an exchange begins a new one, `<trial>-from-<donor>-<step>-<digest of the settings>`, whose folder holds the
donor's checkpoint before it starts, so that it resumes as any run resumes. Tune carries the checkpoints and beside each says
whose it is. Different from the paper: every setting stays inside the search space. Exchanges depend on which trial reports
first, so that a second search with the same seed is another one, and so is what a killed search does again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from counterfake import config
from counterfake.cluster.space import SearchSpace
from counterfake.cluster.train import run_folder
from counterfake.data import Loader
from counterfake.errors import ConfigError
from counterfake.learners.detector import DetectorConfig
from counterfake.loop import Tick, TrainJob
from counterfake.temporary import temporary_folder
from counterfake.workspace import Workspace

LINEAGE = "lineage.json"
QUANTILE = 0.25  # so large a share of the population lags, so large a share is copied


def check(base: TrainJob, space: SearchSpace, trials: int, concurrent: int) -> None:
    """Raises ConfigError for what a trial cannot change, or share, in the middle of its training."""
    if not isinstance(base.learner, DetectorConfig) or base.workers:
        raise ConfigError(
            "scheduler pbt hands checkpoints from trial to trial, which detectors in one process each can; "
            "set train.workers=0, or choose scheduler=asha"
        )
    if trials < 2 or concurrent:
        raise ConfigError(
            f"scheduler pbt takes turns with a population of at least 2 trials, got {trials}; set concurrent=0"
        )
    if strange := [path for path in space.settings if not path.startswith("learner.")]:
        raise ConfigError(
            f"scheduler pbt changes settings while a trial trains, which {strange[0]} does not allow; only learner.… does"
        )
    shapes = {_shapes(corner) for corner in space.corners(base)}
    if len(shapes) > 1:
        raise ConfigError(
            "scheduler pbt copies weights from trial to trial, but the space holds networks of different shapes; "
            "leave those paths out, or choose scheduler=asha"
        )


def begin(job: TrainJob, settings: Mapping[str, Any], trial: str, workspace: Workspace) -> TrainJob:
    """The job of this stretch of a trial: as it was, or one that starts from the checkpoint that Tune gives it."""
    from ray import tune

    found = tune.get_checkpoint()
    if found is None:
        return job
    with found.as_directory() as folder:
        donor = json.loads((Path(folder) / LINEAGE).read_text())
        if donor["trial"] == trial and donor["settings"] == json.loads(json.dumps(settings)):
            return dataclasses.replace(job, name=donor["run"])  # its own: it only waited
        origin = f"{donor['trial'].rpartition('_')[2]}-{donor['step']}-{config.digest(settings)[:6]}"
        job = dataclasses.replace(job, name=f"{job.name}-from-{origin}")
        store = run_folder(job, workspace)
        if not any(True for _ in store.list("checkpoints/")):
            store.publish(Path(folder) / "checkpoint", f"checkpoints/step-{donor['step']:08d}")
    return job


def report(
    tick: Tick,
    figures: dict[str, Any],
    job: TrainJob,
    settings: Mapping[str, Any],
    trial: str,
    workspace: Workspace,
) -> None:
    """Tell Tune a tick together with a copy of its checkpoint, for whoever may go on from it."""
    from ray import tune

    with temporary_folder() as folder:
        run_folder(job, workspace).download(f"checkpoints/step-{tick.step:08d}", folder / "checkpoint")
        lineage = {"trial": trial, "settings": dict(settings), "run": job.name, "step": tick.step}
        (folder / LINEAGE).write_text(json.dumps(lineage))
        tune.report(figures, checkpoint=tune.Checkpoint.from_directory(folder))


def mutations(space: SearchSpace, domains: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray perturbs: numbers by a factor, choices to a neighbour in their list."""
    kinds = {path: space.kind(path) for path in space.settings}
    return {path: values if kind == "choice" else domains[path] for path, (kind, values) in kinds.items()}


def kept_checkpoints(job: TrainJob, interval: float, cache: Path) -> int:
    """Copies of each trial to keep: a lagging trial may ask for one of two intervals ago."""
    loader = Loader(job.data, cache=cache)
    steps = job.loop.total_steps(loader.steps_per_epoch, job.data.batch_size)
    ticks = math.ceil(interval * steps / (job.loop.tick_steps or loader.steps_per_epoch))
    return 2 * ticks + 2


# -- private --------------------------------------------------------------------------------------------------------


def _shapes(job: TrainJob) -> str:
    """A digest of the names and shapes of the net's weights."""
    assert isinstance(job.learner, DetectorConfig), "checked before"
    net = job.learner.net.without_weights().build()
    return config.digest({name: list(value.shape) for name, value in net.state_dict().items()})
