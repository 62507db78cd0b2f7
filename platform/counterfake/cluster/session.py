"""The one home of `ray.init` and `ray.shutdown`, with the settings that Ray reads from the environment.

Without an address a new cluster is started for this process alone, never a running one joined by accident; inside a
job submitted to a cluster RAY_ADDRESS names that cluster. Token authentication is on unless RAY_AUTH_MODE says otherwise.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterfake.errors import ClusterError
from counterfake.workspace import Workspace

logger = logging.getLogger(__name__)

# Set before Ray is imported; a value that is already in the environment wins.
FLAGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for one poll of the controller: 2 s by default
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # a rank that never reports; Ray's default is none
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # a hung rank never answers; Ray waits 30 s before it is killed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # small machines
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints twice otherwise
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # read_parquet is 4-7 times slower with it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default, without its warning
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster this process is connected to."""

    address: str  # GCS address
    dashboard: str  # URL, "" without a dashboard
    cpus: float
    gpus: float
    nodes: int


def start(
    workspace: Workspace | None = None,
    *,
    address: str | None = None,
    cpus: int | None = None,
    gpus: int | None = None,
    worker_logs: bool = False,
    **options: Any,
) -> Cluster:
    """Connect to `address` (or RAY_ADDRESS), or start a local cluster with `cpus` CPUs (default: all of the machine).

    Objects that do not fit into memory are spilled under `workspace.home`. `worker_logs` shows the workers' output here. `options` go to `ray.init`. Raises ClusterError."""
    for name, value in FLAGS.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    if local:
        _secure()
        options |= {"num_cpus": cpus, "num_gpus": gpus}
        if workspace:
            spill = workspace.home / "ray-spill"
            spill.mkdir(parents=True, exist_ok=True)
            options.setdefault("object_spilling_directory", str(spill))
    import ray
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")  # Ray reads its settings when it is imported, which may have been before this call
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=worker_logs, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        way = (
            "check that it runs and that RAY_AUTH_TOKEN_PATH names its token"
            if not local
            else "try `ray stop` first"
        )
        raise ClusterError(f"no Ray cluster at {address}: {reason}; {way}") from error
    found = current()
    logger.info("Ray at %s: %g CPUs, %g GPUs, %d nodes", found.address, found.cpus, found.gpus, found.nodes)
    return found


def stop() -> None:
    """Disconnect; a local cluster started by `start` ends. Harmless when there is none."""
    import ray

    ray.shutdown()


@contextmanager
def session(
    workspace: Workspace | None = None, *, address: str | None = None, cpus: int | None = None, **options: Any
) -> Iterator[Cluster]:
    """`start` and `stop` around a block; inside another session (or a Ray task) the block uses that one."""
    import sys

    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            yield current()
            return
    found = start(workspace, address=address, cpus=cpus, **options)
    try:
        yield found
    finally:
        stop()


def current() -> Cluster:
    """The cluster this process is connected to now."""
    import ray

    resources = ray.cluster_resources()
    context = ray.get_runtime_context()
    dashboard = ray._private.worker.get_dashboard_url()
    return Cluster(
        address=context.gcs_address,
        dashboard=f"http://{dashboard}" if dashboard else "",
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        nodes=sum(1 for node in ray.nodes() if node["Alive"]),
    )


# -- private --------------------------------------------------------------------------------------------------------


def _secure() -> None:
    """Token mode, said explicitly so that child processes know it too, with a token that only its owner can read."""
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode != "token" or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass  # another process was faster; its token is as good
