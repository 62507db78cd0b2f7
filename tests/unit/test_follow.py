"""Following an alias: a candidate goes live only when every replica holds it, and what is broken changes nothing."""

from __future__ import annotations

import asyncio
import json

from counterfake.errors import CheckpointError, StorageError, TrackingError
from counterfake.storage import open_store
from counterfake.telemetry import Telemetry, Totals
from counterfake.workspace import Workspace
from serving import control
from serving.follow import Follower, Holding
from serving.schemas import Member, Model
from serving.settings import Settings


def model(version: int, *members: str) -> Model:
    return Model(
        name="ensemble", alias="champion", version=version, digest=f"d{version}", uri="", ensemble={},
        members=tuple(Member(name=m, kind="detector", version="1", digest=f"{m}{version}") for m in members or ("cnn", "digits")),
    )  # fmt: skip


class FakeSource:
    def __init__(self) -> None:
        self.version, self.staged = 1, 0
        self.away: Exception | None = None
        self.broken: Exception | None = None
        self.members: tuple[str, ...] = ()

    def newest(self) -> tuple[int, str]:
        if self.away:
            raise self.away
        return self.version, f"d{self.version}"

    def stage(self, version: int, digest: str) -> Model:
        self.staged += 1
        if self.broken:
            raise self.broken
        return model(version, *self.members)


class Scene:
    """A follower with a source, a clock and two detector replicas, all in hand."""

    def __init__(self) -> None:
        self.source, self.telemetry, self.now = FakeSource(), Telemetry(), 0.0
        self.new_members: list[Model] = []
        self.follower = Follower(
            "ensemble@champion", model(1), self.source, self.telemetry,
            switch_seconds=60, deploy_seconds=180, on_new_members=self.new_members.append, clock=lambda: self.now,
        )  # fmt: skip

    def holding(
        self, *digests: str, members: tuple[str, ...] = ("cnn", "digits"), **failed: str
    ) -> list[Holding]:
        return [Holding(member=m, digests=frozenset(digests), failed=failed) for m in members]

    def poll(self) -> None:
        asyncio.run(self.follower.poll(self.holding("d1")))

    def count(self, name: str, **labels: str) -> float:
        totals = Totals()
        totals.add("p", 0, self.telemetry.snapshot(), now=0.0)
        return totals.value(name, **labels)


def test_a_moved_alias_goes_live_when_every_replica_holds_it() -> None:
    scene = Scene()
    scene.source.version = 2
    scene.poll()
    assert scene.follower.status.state == "switching"
    assert [m.version for m in scene.follower.hold] == [1, 2]
    one_late = [
        Holding(member="cnn", digests=frozenset({"d1", "d2"})),
        Holding(member="digits", digests=frozenset({"d1"})),
    ]
    scene.follower.advance(one_late)
    assert scene.follower.live.version == 1
    scene.follower.advance(scene.holding("d1", "d2"))
    assert scene.follower.live.version == 2
    assert [m.version for m in scene.follower.hold] == [2, 1]
    assert scene.count("counterfake_model_swaps_total", outcome="live") == 1


def test_only_detectors_of_the_live_ensemble_are_in_use() -> None:
    scene = Scene()
    scene.source.version, scene.source.members = 2, ("cnn", "third")
    scene.poll()
    scene.follower.advance(scene.holding("d1", "d2", members=("cnn", "digits", "third")))
    assert scene.follower.live.version == 2
    rows = [row for row in scene.telemetry.snapshot() if row[0] == "counterfake_detector_in_use"]
    assert sorted(labels for _, _, labels, _ in rows) == [("cnn",), ("third",)]


def test_nothing_is_live_without_a_replica_of_every_member() -> None:
    scene = Scene()
    scene.source.version = 2
    scene.poll()
    scene.follower.advance(scene.holding("d1", "d2", members=("cnn",)))
    scene.follower.advance([])
    assert scene.follower.live.version == 1


def test_a_broken_bundle_is_refused_once_and_before_any_replica_hears_of_it() -> None:
    scene = Scene()
    scene.source.version, scene.source.broken = 2, CheckpointError("weights.safetensors was altered")
    scene.poll()
    scene.poll()
    assert scene.source.staged == 1
    assert [m.version for m in scene.follower.hold] == [1]
    assert scene.follower.status.state == "refused"
    assert "altered" in scene.follower.status.detail
    assert scene.count("counterfake_model_swaps_total", outcome="refused") == 1


def test_any_exception_of_a_trial_refuses_the_bundle_and_following_goes_on() -> None:
    scene = Scene()
    scene.source.version, scene.source.broken = 2, ZeroDivisionError("odd")
    scene.poll()
    assert scene.follower.status.state == "refused"
    scene.source.version, scene.source.broken = 3, None
    scene.poll()
    scene.follower.advance(scene.holding("d1", "d3"))
    assert scene.follower.live.version == 3


def test_a_replica_that_cannot_load_it_refuses_it_for_all() -> None:
    scene = Scene()
    scene.source.version = 2
    scene.poll()
    scene.follower.advance(
        [
            *scene.holding("d1", "d2"),
            Holding(member="cnn", digests=frozenset({"d1"}), failed={"d2": "out of memory"}),
        ]
    )
    assert scene.follower.live.version == 1
    assert "out of memory" in scene.follower.status.detail


def test_a_candidate_that_is_not_held_in_time_is_refused() -> None:
    scene = Scene()
    scene.source.version = 2
    scene.poll()
    scene.now = 61.0
    scene.follower.advance(scene.holding("d1"))
    assert scene.follower.status.state == "refused"
    assert [m.version for m in scene.follower.hold] == [1]


def test_mlflow_or_storage_away_changes_nothing_and_is_tried_again() -> None:
    scene = Scene()
    scene.source.away = TrackingError("MLflow does not answer")
    scene.poll()
    assert (scene.follower.status.state, scene.follower.live.version) == ("unreachable", 1)
    scene.source.away, scene.source.version, scene.source.broken = None, 2, StorageError("timed out")
    scene.poll()
    assert scene.follower.status.state == "unreachable"
    scene.source.broken = None
    scene.poll()
    assert scene.follower.status.state == "switching"
    assert scene.count("counterfake_follow_errors_total") == 2


def test_moving_back_before_the_switch_drops_the_candidate() -> None:
    scene = Scene()
    scene.source.version = 2
    scene.poll()
    scene.source.version = 1
    scene.poll()
    assert (scene.follower.candidate, scene.follower.status.state) == (None, "live")


def test_promoting_a_refused_version_again_after_another_one_tries_it_again() -> None:
    scene = Scene()
    scene.source.version, scene.source.broken = 2, CheckpointError("no")
    scene.poll()
    scene.source.version, scene.source.broken = 1, None
    scene.poll()
    scene.source.version = 2
    scene.poll()
    assert scene.follower.status.state == "switching"


def test_new_members_are_deployed_first_and_get_more_time() -> None:
    scene = Scene()
    scene.source.version, scene.source.members = 2, ("cnn", "digits", "third")
    scene.poll()
    assert [m.version for m in scene.new_members] == [2]
    scene.now = 100.0
    scene.follower.advance(scene.holding("d1", "d2"))
    assert scene.follower.live.version == 1
    scene.follower.advance(scene.holding("d1", "d2", members=("cnn", "digits", "third")))
    assert scene.follower.live.version == 2


def test_two_services_on_one_storage_do_not_share_what_they_keep(workspace: Workspace) -> None:
    first, second = Settings(port=8000), Settings(port=8001)
    control.write_start(first, workspace, model(1))
    control.write_start(second, workspace, model(2))
    store = open_store(workspace.storage)
    begun = [json.loads(store.read(control.place(s, "start")))["live"]["version"] for s in (first, second)]
    assert begun == [1, 2]
