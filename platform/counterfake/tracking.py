"""Runs, their numbers, pictures and datasets, kept in MLflow. With registry.py the only importer of mlflow.

A `Run` never makes training wait: what it is given goes into a bounded buffer that one thread sends, so that a slow
or absent server costs nothing and everything arrives once it is back. Only `Tracker.start` (a run needs its id) and
`Run.finish` (the buffer must empty) wait, both with a deadline. No fluent global state: every call names its run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import getpass
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from counterfake.config import flatten, to_dict
from counterfake.errors import TrackingError
from counterfake.outbox import Outbox
from counterfake.temporary import temporary_folder
from counterfake.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from counterfake.provenance import SourceType

logger = logging.getLogger(__name__)

MAX_KEY, MAX_PARAM, MAX_TAG = 250, 6000, 5000  # characters MLflow stores
REACH_SECONDS = 8.0  # an unreachable server is reported within this

# MLflow reads these from the environment only; a user's own value wins.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # our buffer retries; the default blocks a caller for minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output belongs to results
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Tracker:
    """One MLflow store. Holds two strings and no connection, so it can be sent to workers."""

    def __init__(self, uri: str, artifacts: str | None = None) -> None:
        """`artifacts`: URI for artefacts of experiments made here; a server (http) keeps them where it decides."""
        self.uri = uri
        self.artifacts = artifacts

    @classmethod
    def at(cls, workspace: Workspace) -> Tracker:
        """The tracker of a workspace."""
        return cls(workspace.tracking_uri, workspace.artifacts)

    def experiment(self, task: str) -> str:
        """Id of the experiment of a task, created once however many callers ask at the same time."""
        with errors(self.uri):
            client = connect(self.uri)
            found = client.get_experiment_by_name(task) or self._create(client, task)
            if found.lifecycle_stage != "active":
                raise TrackingError(
                    f"experiment {task!r} was deleted in MLflow at {self.uri}; restore it with "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
                )
            return str(found.experiment_id)

    def start(
        self,
        task: str,
        name: str,
        *,
        parent: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Run:
        """A new run of the experiment `task`; `parent` (a run id) nests it. Raises TrackingError if MLflow is away."""
        experiment = self.experiment(task)
        labels = {
            "mlflow.user": _user(),
            **({"mlflow.parentRunId": parent} if parent else {}),
            **(tags or {}),
        }
        with errors(self.uri):
            created = connect(self.uri).create_run(experiment, tags=_tags(labels), run_name=name)
        run = Run(self.uri, created.info.run_id)
        if params:
            run.params(params)
        return run

    def resume(self, run_id: str) -> Run:
        """A run made earlier, to go on with. Returns at once; MLflow is asked only when something is sent."""
        run = Run(self.uri, run_id)
        run.status("RUNNING")
        return run

    def find(self, task: str, tags: Mapping[str, str]) -> list[str]:
        """Ids of the runs of a task that carry all these tags, newest first."""
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        experiment = self.experiment(task)
        with errors(self.uri):
            return [run.info.run_id for run in connect(self.uri).search_runs([experiment], wanted)]

    def read(self, run_id: str) -> dict[str, Any]:
        """What MLflow holds of a run: name, status, params, tags, last metrics, datasets, artefact URI."""
        with errors(self.uri):
            run = connect(self.uri).get_run(run_id)
        return {
            "run_id": run_id,
            "name": run.info.run_name,
            "experiment_id": run.info.experiment_id,
            "status": run.info.status,
            "params": dict(run.data.params),
            "metrics": dict(run.data.metrics),
            "tags": dict(run.data.tags),
            "datasets": [
                {
                    "name": i.dataset.name,
                    "digest": i.dataset.digest,
                    "context": i.tags[0].value if i.tags else "",
                }
                for i in run.inputs.dataset_inputs
            ],
            "artifact_uri": run.info.artifact_uri,
        }

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every point of a metric, by step; of points sent twice after a restart the last counts."""
        with errors(self.uri):
            points = connect(self.uri).get_metric_history(run_id, _key(metric))
        return sorted({p.step: p.value for p in sorted(points, key=lambda p: p.timestamp)}.items())

    def files(self, run_id: str, folder: str = "") -> list[str]:
        """Paths of all artefacts of a run below `folder`."""
        with errors(self.uri):
            client = connect(self.uri)
            found: list[str] = []
            todo = [folder]
            while todo:
                for entry in client.list_artifacts(run_id, todo.pop() or None):
                    (todo if entry.is_dir else found).append(entry.path)
        return sorted(found)

    def load(self, run_id: str, path: str) -> bytes:
        """An artefact of a run, as `files` names it."""
        with errors(self.uri), temporary_folder() as folder:
            return Path(connect(self.uri).download_artifacts(run_id, path, str(folder))).read_bytes()

    def _create(self, client: MlflowClient, task: str) -> Any:
        from mlflow.exceptions import MlflowException

        served = self.uri.startswith(("http://", "https://"))
        location = None if served or self.artifacts is None else f"{self.artifacts}/{task}"
        with contextlib.suppress(MlflowException):  # another caller was faster; the lookup below tells
            client.create_experiment(task, artifact_location=location)
        found = client.get_experiment_by_name(task)
        if found is None:
            raise TrackingError(
                f"MLflow at {self.uri} did not create experiment {task!r}; check its permissions"
            )
        return found


class Run:
    """One run. Every method returns at once and sends later; `finish` waits until all of it has arrived."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.id = run_id
        self.uri = uri
        self._outbox = Outbox(f"run {run_id} at {uri}", permanent=_permanent)

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings, flattened to dotted names. Text beyond MLflow's limit ends in "…" and its SHA-256."""
        pairs = [(_key(k), _clip(_text(v), MAX_PARAM)) for k, v in flatten(_tree(values)).items()]
        for i in range(0, len(pairs), 100):
            self._send(functools.partial(_log_params, pairs=pairs[i : i + 100]), f"{len(pairs)} params")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step. Buffered points travel together, up to 1,000 per call."""
        now = int(time.time() * 1000)
        self._outbox.points(
            [(_key(k), float(v), now, int(step)) for k, v in values.items()], self._send_points
        )

    def tags(self, values: Mapping[str, Any]) -> None:
        """Text by name; setting one again replaces it."""
        pairs = list(_tags(values).items())
        for i in range(0, len(pairs), 100):
            self._send(functools.partial(_log_tags, pairs=pairs[i : i + 100]), f"{len(pairs)} tags")

    def picture(
        self,
        name: str,
        picture: bytes | NDArray[np.uint8],
        step: int | None = None,
        *,
        maker: str = "",
        source_type: SourceType = "trainedAlgorithmicMedia",
    ) -> None:
        """An encoded picture, or uint8 pixels (H, W, 3) kept as PNG: pictures/NAME.png, with a step previews/NAME/STEP.png.

        maker: what made it, or a part of it; the picture is then marked as generated."""
        if not isinstance(picture, bytes | bytearray):
            from counterfake import media

            picture = media.encode(np.ascontiguousarray(picture), "png")
        if maker:
            from counterfake import provenance

            picture = provenance.mark(bytes(picture), maker=maker, source_type=source_type)
        stem, dot, ending = name.rpartition(".")
        stem, ending = (stem, ending) if dot and ending in ("png", "jpg", "jpeg", "webp") else (name, "png")
        path = f"pictures/{stem}.{ending}" if step is None else f"previews/{stem}/{step:08d}.{ending}"
        self._bytes(path, bytes(picture))

    def text(self, name: str, text: str) -> None:
        """A text file of the run."""
        self._bytes(name, text.encode())

    def json(self, name: str, value: Any) -> None:
        """A JSON file of the run."""
        self._bytes(name, json.dumps(value, indent=2, default=str).encode())

    def file(self, path: str | Path, folder: str = "") -> None:
        """A copy of a local file, taken now: the caller may delete it afterwards."""
        path = Path(path)
        copy = self._outbox.spool(path.name)
        shutil.copyfile(path, copy)
        self._send_file(copy, folder, path.name)

    def dataset(self, uri: str, version: int, digest: str, context: str) -> None:
        """The dataset version this run read, as a logged input; `context` is training, validation or test."""
        name = uri.rstrip("/").rpartition("/")[2].partition("@")[0]
        source = {"uri": uri, "version": version, "digest": digest}
        self._send(
            functools.partial(_log_dataset, name=name, source=source, context=context), f"dataset {name}"
        )
        self.tags(
            {f"dataset.{context}": f"{uri.partition('@')[0]}@{version}", f"dataset.{context}.digest": digest}
        )

    def status(self, status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]) -> None:
        """Set the state shown in MLflow, after everything given before."""
        self._send(functools.partial(_set_status, status=status), f"status {status}")

    def flush(self, seconds: float = 60.0) -> None:
        """Wait until everything has arrived. Raises TrackingError naming what has not."""
        self._outbox.flush(seconds)

    def finish(
        self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", seconds: float = 60.0
    ) -> None:
        """End the run and wait until everything has arrived, `seconds` at most; TrackingError names what has not."""
        self.status(status)
        self.close(seconds)

    def close(self, seconds: float = 60.0) -> None:
        """As `finish`, but leave the run's state alone: what a worker does with a run that its driver ends."""
        try:
            self.flush(seconds)
        finally:
            self._outbox.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
            return
        failed = isinstance(error, Exception)  # SystemExit, KeyboardInterrupt: somebody stopped it
        if failed:
            self.tags({"error": _clip(f"{type(error).__name__}: {error}", 500)})
        with contextlib.suppress(TrackingError):  # the first error is the one to report
            self.finish("FAILED" if failed else "KILLED", seconds=10.0)

    def _send(self, call: Any, what: str) -> None:
        self._outbox.put(lambda: call(connect(self.uri), self.id), what)

    def _send_points(self, points: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        connect(self.uri).log_batch(self.id, metrics=[Metric(*point) for point in points])

    def _bytes(self, name: str, data: bytes) -> None:
        folder, _, leaf = name.rpartition("/")
        copy = self._outbox.spool(leaf)
        copy.write_bytes(data)
        self._send_file(copy, folder, name)

    def _send_file(self, copy: Path, folder: str, name: str) -> None:
        self._outbox.put(
            lambda: connect(self.uri).log_artifact(self.id, str(copy), folder or None),
            f"file {name}",
            spooled=copy,
        )


def connect(uri: str) -> MlflowClient:
    """A client of a store that answers; SQLite's tables exist once this returns. Raises TrackingError."""
    with _connecting:
        if uri not in _clients:
            _clients[uri] = _reach(uri)
        return _clients[uri]


@contextlib.contextmanager
def errors(uri: str) -> Iterator[None]:
    """MLflow's exceptions as one line with what to do."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        line = str(error).strip().splitlines()[0][:300]
        raise TrackingError(f"MLflow at {uri} refused: {line}") from error


# -- private --------------------------------------------------------------------------------------------------------

_clients: dict[str, Any] = {}  # by uri; per process
_connecting = threading.Lock()


def _reach(uri: str) -> MlflowClient:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if not re.match(r"(sqlite|postgresql|mysql|mssql|https?|databricks)[+:\w]*", uri):
        raise TrackingError(
            f"tracking URI {uri!r} is not usable: MLflow no longer keeps runs in plain folders; "
            "use sqlite:////absolute/path/mlflow.db or http://host:port"
        )
    if uri.startswith(("http://", "https://")):
        _ask(uri)
    with _alone(uri), errors(uri):
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # makes the tables of a new database
        return client


def _ask(uri: str) -> None:
    """Any HTTP answer means that a server is there; silence is reported, within REACH_SECONDS."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACH_SECONDS):
            return
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"MLflow at {uri} does not answer ({reason}); start it with `mlflow server`, correct --tracking, "
            "or leave it out to use the local SQLite file"
        ) from error


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """For SQLite: only one process at a time creates or checks the tables."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        handle = open(f"{database}.lock", "w")  # noqa: SIM115 - held for the length of the block
    except OSError as error:
        raise TrackingError(
            f"MLflow store {uri} cannot be made: {error.strerror} ({database.parent})"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _permanent(error: Exception) -> bool:
    """Whether sending the same thing again cannot help."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        code = getattr(error, "error_code", "")
        return code in (
            "INVALID_PARAMETER_VALUE",
            "RESOURCE_DOES_NOT_EXIST",
            "BAD_REQUEST",
            "PERMISSION_DENIED",
        )
    return isinstance(error, ValueError | TypeError | KeyError | FileNotFoundError)


def _log_params(client: MlflowClient, run_id: str, pairs: list[tuple[str, str]]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(k, v) for k, v in pairs])


def _log_tags(client: MlflowClient, run_id: str, pairs: list[tuple[str, str]]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(k, v) for k, v in pairs])


def _log_dataset(client: MlflowClient, run_id: str, name: str, source: dict[str, Any], context: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(
        name=f"{name}@{source['version']}",
        digest=str(source["digest"])[:36],
        source_type="counterfake",
        source=json.dumps(source),
        profile=json.dumps({"version": source["version"], "digest": source["digest"]}),
    )
    client.log_inputs(run_id, datasets=[DatasetInput(data, tags=[InputTag("mlflow.data.context", context)])])


def _set_status(client: MlflowClient, run_id: str, status: str) -> None:
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status)


def _tree(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return to_dict(values) if dataclasses.is_dataclass(values) else values


def _tags(values: Mapping[str, Any]) -> dict[str, str]:
    return {_key(k): _clip(_text(v), MAX_TAG) for k, v in values.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str) if value is not None else ""


def _key(name: str) -> str:
    """Characters that MLflow takes in a name; two long names stay two names."""
    clean = re.sub(r"[^\w\-. :/]", "_", name) or "_"
    return (
        clean
        if len(clean) <= MAX_KEY
        else f"{clean[: MAX_KEY - 13]}-{hashlib.sha256(clean.encode()).hexdigest()[:12]}"
    )


def _clip(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit - 73]}… sha256={hashlib.sha256(text.encode()).hexdigest()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container user without a name
        return str(os.getuid())
