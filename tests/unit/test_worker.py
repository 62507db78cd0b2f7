"""A training worker looks first whether it sees the driver's storage and tracking; on another machine it may not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from counterfake.cluster.worker import Order, _check_shared
from counterfake.errors import ConfigError, TrackingError
from counterfake.storage import open_store
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs import train_gan


@pytest.fixture
def order(workspace: Workspace) -> Order:
    run = Tracker.at(workspace).start("gan", "shared")
    open_store(f"{workspace.training}/shared").put("run.json", b"{}")
    run.close()
    job = train_gan.dcgan_mnist_smoke()
    return Order(job=job, workspace=workspace, name="shared", run_id=run.id, dataset={}, commit="")


def test_a_worker_that_sees_what_the_driver_wrote_goes_on(order: Order) -> None:
    _check_shared(order)


def test_a_worker_without_the_drivers_storage_is_refused(order: Order, tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(order.workspace, storage=(tmp_path / "another-disk").as_uri())
    with pytest.raises(ConfigError, match=r"does not see .*run\.json.*use s3://"):
        _check_shared(dataclasses.replace(order, workspace=elsewhere))


def test_a_worker_with_a_tracking_file_of_its_own_is_refused(order: Order, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/own.db"
    elsewhere = dataclasses.replace(order.workspace, tracking_uri=database)
    with pytest.raises(TrackingError, match=r"does not find run .*use an MLflow server"):
        _check_shared(dataclasses.replace(order, workspace=elsewhere))
