"""Face swaps on two real Ray Train workers: a killed worker changes no bit, a run that overflows goes back to its checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from counterfake import bundle
from counterfake.cluster import session
from counterfake.cluster.train import fit
from counterfake.config import override
from counterfake.data import DataConfig
from counterfake.images import Preprocess
from counterfake.learners.faceswap import FaceSwapConfig
from counterfake.learners.phases import Phase
from counterfake.loop import LoopConfig, Tick, TrainJob
from counterfake.nets.swap import SwapMaskConfig
from counterfake.nets.swap_discriminator import SwapDiscriminatorConfig
from counterfake.records import SplitRule, write_version
from counterfake.sources.synthetic import SyntheticSource
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs import train_swap

pytestmark = pytest.mark.cluster

STEPS, TICK, BATCH = 30, 3, 8


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with three people of eight pictures."""
    workspace = Workspace.at(tmp_path_factory.mktemp("runs"))
    source = SyntheticSource(identities=3, per_identity=8, size=32)
    facts = {source.label: {"licence": source.licence, "consent": source.consent}}
    splits = SplitRule(fractions={"train": 1.0})
    write_version(workspace.dataset("faces"), source.samples(), sources=facts, splits=splits)
    return workspace


def job(workspace: Workspace, name: str, **learner: Any) -> TrainJob:
    """A mask network on two workers: bent, then straight against its critic."""
    settings: dict[str, Any] = {
        "net": SwapMaskConfig.tiny().with_identities(()),
        "critic": SwapDiscriminatorConfig.tiny(),
        "losses": train_swap.MASK_GAN,
        "phases": (Phase(images=12 * BATCH), Phase(warp=False, adversarial=1.0)),
        "lr": 1e-3,
    }
    made = TrainJob(
        name=name,
        task="faceswap",
        data=DataConfig(
            uri=workspace.dataset("faces"),
            batch_size=BATCH,
            preprocess=Preprocess(size=24, crop="face", margin=1.4),
            where={"fake": 0},
            threads=1,
        ),
        learner=FaceSwapConfig(**{**settings, **learner}),
        loop=LoopConfig(steps=STEPS, tick_steps=TICK, threads=1),
        workers=2,
        cpus_per_worker=0.5,
    )
    return train_swap.prepared(made, workspace)


def test_a_killed_worker_changes_no_bit_of_a_swap(
    ray_local: object, shared: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.state import list_actors

    undisturbed = fit(job(shared, "twins"), shared)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", session.current().dashboard)  # other clusters may run here
    killed: list[int] = []

    def kill(tick: Tick) -> None:
        if tick.step >= 2 * TICK and not killed:
            actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
            killed.append(max(a.pid for a in actors if "TrainWorker" in a.class_name))
            os.kill(killed[0], signal.SIGKILL)

    elsewhere = dataclasses.replace(shared, storage=tmp_path.as_uri())
    disturbed = fit(job(shared, "twins"), elsewhere, on_progress=kill)
    assert len(killed) == 1
    assert disturbed.weights_digest == undisturbed.weights_digest
    assert (disturbed.steps, disturbed.images) == (STEPS, STEPS * BATCH)


def test_two_workers_that_overflow_go_back_to_the_same_checkpoint(
    ray_local: object, shared: Workspace
) -> None:
    """A rate of 1e32 from step 12 on becomes a usable one by going back."""
    phases = (Phase(images=12 * BATCH), Phase(warp=False, adversarial=1.0, lr_scale=1e35))
    result = fit(job(shared, "overflow", phases=phases, rollback_lr=1e-35), shared)
    (event,) = result.rollbacks
    assert (event["step"], event["to_step"]) == (15, 12)
    assert result.steps == STEPS
    tags = Tracker.at(shared).read(result.run_id)["tags"]
    assert json.loads(tags["rollbacks"]) == [event]


def test_a_bundle_of_research_data_says_that_it_may_not_leave(shared: Workspace) -> None:
    made = override(
        job(shared, "research"), {"purpose": "detector-training", "workers": 0, "loop.steps": TICK}
    )
    found = bundle.read(fit(made, shared).bundle or Path())
    assert (found.info["purpose"], found.info["export"]) == ("detector-training", False)
