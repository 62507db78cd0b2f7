"""Send a job to a Ray cluster through its Jobs API, follow its log, end with its status.

The job is resolved here, so a mistake never reaches the cluster; what differs from the preset travels as `--set`.
Token authentication: with RAY_AUTH_MODE=token the client reads the token as `ray` itself does.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from counterfake import config
from counterfake.errors import ClusterError, ConfigError
from counterfake.workspace import Workspace
from jobs.console import Console

_RAY_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_PASSED_ON = (
    "AWS_",
    "MLFLOW_",
    "COUNTERFAKE_",
)  # environment that the job needs to reach storage and tracking


def entrypoint(job: str, preset: str | None, resolved: Any, base: Any, workspace: Workspace) -> str:
    """The command line that reproduces `resolved` from the preset, on any machine with the package."""
    before, after = config.flatten(config.to_dict(base)), config.flatten(config.to_dict(resolved))
    sets = [f"{path}={_text(value)}" for path, value in after.items() if before.get(path) != value]
    words = ["python", "-m", "jobs", "run", job, *([preset] if preset else [])]
    for assignment in sets:
        words += ["--set", assignment]
    return shlex.join([*words, *_places(workspace), "--json"])


def submit(command: str, *, address: str, follow: bool, working_dir: Path | None, console: Console) -> int:
    """Exit status of the job: 0 succeeded, 1 failed or stopped."""
    if working_dir and not working_dir.is_dir():
        raise ConfigError(f"working directory {working_dir} is no folder; name the source tree to upload")
    client = _client(address)
    runtime_env: dict[str, Any] = {
        "env_vars": {
            k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON) and k != "COUNTERFAKE_HOME"
        },
    }
    if working_dir:
        runtime_env["working_dir"] = str(working_dir)
        runtime_env["excludes"] = [".git", ".venv", "runs"]
        runtime_env["env_vars"]["PYTHONPATH"] = "platform:."
    job_id = client.submit_job(entrypoint=command, runtime_env=runtime_env)
    console.event(f"submitted {job_id} to {address}: {command}")
    if not follow:
        console.result({"job_id": job_id, "address": address})
        return 0
    try:
        _follow_to_the_end(client, job_id, console)
    except KeyboardInterrupt:
        console.event(
            f"{job_id} goes on; `ray job logs {job_id}` follows it, `ray job stop {job_id}` ends it"
        )
        return 130
    return _finish(client, job_id, address, console)


def _places(workspace: Workspace) -> list[str]:
    """Where things live, for the cluster. A folder of this machine is named only where the storage is one too; beside
    shared storage the cluster's own COUNTERFAKE_HOME and MLFLOW_TRACKING_URI hold."""
    local = workspace.storage.startswith("file:")
    words = ["--storage", workspace.storage]
    if local:
        words += ["--home", str(workspace.home)]
    if local or not workspace.tracking_uri.startswith("sqlite:"):
        words += ["--tracking", workspace.tracking_uri]
    return words


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    # Ray lets these win over the address it is given: the job would go to another cluster than the one that was named
    hidden = {name: os.environ.pop(name) for name in _RAY_ADDRESSES if name in os.environ}
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # the client raises ConnectionError, RuntimeError or requests' errors
        text = str(error).strip().splitlines()[0]
        hint = "start one with `ray start --head`, or name it with --address"
        if "token" in text.lower() or "401" in text or "auth" in text.lower():
            hint = "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE as on the head"
        raise ClusterError(f"no Ray cluster answers at {address}: {text}; {hint}") from error
    finally:
        os.environ.update(hidden)


def _follow_to_the_end(client: Any, job_id: str, console: Console) -> None:
    try:
        asyncio.run(_follow(client, job_id, sys.stderr if console.as_json else sys.stdout))
    except (RuntimeError, OSError) as error:  # the connection, not the job
        console.event(f"the log of {job_id} broke off ({str(error)[:120]}); waiting for the job itself")
    while not client.get_job_info(job_id).status.is_terminal():
        time.sleep(0.5)  # the log can end before the job does


async def _follow(client: Any, job_id: str, stream: TextIO) -> None:
    async for text in client.tail_job_logs(job_id):
        print(text, end="", flush=True, file=stream)


def _finish(client: Any, job_id: str, address: str, console: Console) -> int:
    info = client.get_job_info(job_id)
    console.event(f"{job_id} {info.status.value.lower()}" + (f": {info.message}" if info.message else ""))
    status = info.status.value
    if console.as_json:
        console.result({"job_id": job_id, "address": address, "status": status, "message": info.message})
    return 0 if status == "SUCCEEDED" else 1


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
