"""The detection service on Ray Serve: settings -> deployments, and start and stop for the command and the demo.

    counterfake serve --model ensemble@champion --port 8000          on this machine
    serve run serving.app:application model=ensemble@champion        on a cluster; see serve.yaml

One autoscaling deployment per detector of the ensemble, one autoscaling FastAPI gateway, one Control. An idle service of
two detectors takes four processes of 0.2 to 0.5 GB.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException

from counterfake import config
from counterfake.errors import ServiceError
from counterfake.telemetry import Telemetry
from counterfake.workspace import Workspace
from serving import opinions
from serving.gateway import Unavailable, create_app
from serving.heart import Heart
from serving.schemas import Following, Model
from serving.settings import APPLICATION, Autoscale, Settings
from serving.verdicts import Score

__all__ = ["APPLICATION", "Autoscale", "Settings", "application", "build", "start", "stop"]

logger = logging.getLogger(__name__)


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """What `serve.yaml` and `serve run serving.app:application key=value` name. Every setting by its dotted path; home,
    storage and tracking_uri, else from COUNTERFAKE_HOME, COUNTERFAKE_STORAGE and MLFLOW_TRACKING_URI."""
    changes = dict(arguments)
    workspace = Workspace.at(
        changes.pop("home", None) or os.environ.get("COUNTERFAKE_HOME", "runs"),
        changes.pop("storage", None) or os.environ.get("COUNTERFAKE_STORAGE"),
        changes.pop("tracking_uri", None) or os.environ.get("MLFLOW_TRACKING_URI"),
    )
    settings = config.override(Settings(), config.flatten(changes))
    return build(settings, workspace, *begin(settings, workspace))


def begin(settings: Settings, workspace: Workspace) -> tuple[tuple[str, ...], str]:
    """Resolve, verify and try the model, and record it as the one to begin with. Its detectors' names, and the build's id."""
    from serving import control, models  # torch and mlflow; gateways do without

    model = models.RegistrySource(settings.model, workspace).start()
    started = control.write_start(settings, workspace, model)
    return tuple(member.name for member in model.members), started


def build(
    settings: Settings, workspace: Workspace, members: tuple[str, ...], version: str
) -> serve.Application:
    """The application graph: gateway -> detectors, everyone -> control. Deployed again with the same version, what is there
    stays; only the gateway is rolled when its detectors are others."""
    from serving.control import Control
    from serving.detector import Detector

    control = _versioned(
        serve.deployment(
            Control,
            name="control",
            num_replicas=1,
            max_ongoing_requests=1000,
            ray_actor_options={"num_cpus": 0},
        ),
        version,
    ).bind(settings, workspace)
    user_config = {
        "batch_size": settings.batch_size,
        "batch_wait_seconds": settings.batch_wait_seconds,
        "threads": settings.threads,
    }
    seconds = settings.answer_seconds + 5
    detectors = {}
    for name in members:
        made = _deployment(
            Detector, deployment_name(name), settings.detectors, seconds, user_config=user_config
        )
        detectors[name] = _versioned(made, version).bind(name, settings, workspace, control)
    gateway = _deployment(Gateway, "gateway", settings.gateway, settings.upload_seconds + seconds)
    return _versioned(gateway, f"{version} {' '.join(members)}").bind(settings, control, detectors)


def deployment_name(member: str) -> str:
    """Name of a detector's deployment, as in Ray's dashboard and its own metrics."""
    return f"detector-{member}"


def start(
    settings: Settings,
    workspace: Workspace,
    *,
    blocking: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> str:
    """Serve until stopped; returns the address once pictures are judged. Blocking: until SIGINT or SIGTERM.

    Raises ServiceError for a port in use or an application that does not come up, RegistryError where there is no model.
    """
    url = f"http://{'127.0.0.1' if settings.host == '0.0.0.0' else settings.host}:{settings.port}"
    if not (
        ray.is_initialized() and APPLICATION in _applications()
    ):  # else it is ours, and is updated in place
        _require_free(settings.host, settings.port)
    members, version = begin(settings, workspace)
    if not ray.is_initialized():
        from counterfake.cluster import session

        session.start(workspace)
    timeout = settings.upload_seconds + settings.answer_seconds + 5
    options = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=timeout)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=options, logging_config={"log_level": "WARNING", "enable_access_log": False})
    try:
        _deploy(build(settings, workspace, members, version))
        _wait_until_ready(url, settings.ready_seconds)
    except BaseException:
        stop()
        raise
    logger.info("serving %s at %s", settings.model, url)
    if on_ready is not None:
        on_ready(url)
    if blocking:
        _wait_for_signal()
        stop()
    return url


def stop() -> None:
    """End the application; requests under way finish first. The Ray session and other applications stay."""
    if not ray.is_initialized():
        return
    if set(_applications()) - {APPLICATION}:
        serve.delete(APPLICATION)
    else:
        serve.shutdown()


def redeploy(settings: Settings, workspace: Workspace, members: tuple[str, ...], version: str) -> None:
    """The running application with these detectors. Control and the detectors that were there stay as they are."""
    _deploy(build(settings, workspace, members, version))


class Gateway:
    """The ingress deployment: FastAPI over handles to the detectors. A `gateway.Backend`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, control: Any, detectors: dict[str, Any]
    ) -> None:
        self._settings, self._control, self._detectors = settings, control, detectors
        self._telemetry = Telemetry()
        opinions.begin(self._telemetry, detectors)
        self._heart = Heart(control, "gateway", self._telemetry, settings.heartbeat_seconds)
        await self._heart.start()

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve once this object exists."""
        return create_app(self, self._settings, self._telemetry)

    def model(self) -> Model | None:
        """The live ensemble; the previous one while this replica does not reach a detector that is new in the live one."""
        directive = self._heart.directive
        candidates = (directive.live, directive.previous) if directive else ()
        return next((model for model in candidates if model and self._reaches(model)), None)

    def following(self) -> Following | None:
        """As Control said last."""
        return self._heart.directive.following if self._heart.directive else None

    async def score(self, model: Model, data: bytes) -> dict[str, Score]:
        """All members at once. One that cannot be reached or breaks is left out; a picture that one finds unsound is refused."""
        names = [member.name for member in model.members]
        return await opinions.gather(self._detectors, names, model.digest, data, self._telemetry)

    async def metrics(self) -> bytes:
        """From Control, with this replica's newest counts in it."""
        try:
            page: bytes = await asyncio.wait_for(self._control.metrics.remote(self._heart.report()), 10.0)
        except (RayError, RayServeException, TimeoutError) as error:
            raise Unavailable("the collector of metrics is restarting; scrape again") from error
        return page

    async def __del__(self) -> None:
        await self._heart.last()

    def _reaches(self, model: Model) -> bool:
        return all(member.name in self._detectors for member in model.members)


Gateway = serve.ingress()(Gateway)  # type: ignore[misc]  # late: the ASGI application is made by the replica


# -- private --------------------------------------------------------------------------------------------------------


def _deploy(graph: serve.Application) -> None:
    target = serve.RunTarget(graph, name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def _versioned(deployment: Any, version: str) -> Any:
    """Serve replaces every replica of an application that is deployed again, unless the version is the one that runs. It
    makes versions up itself where none is given, and its option for giving one is an internal one."""
    return deployment.options(version=version, _internal=True)


def _deployment(cls: type[Any], name: str, scale: Autoscale, seconds: float, **more: Any) -> Any:
    """seconds: that a replica which ends may take to finish what it has begun."""
    return serve.deployment(
        cls,
        name=name,
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "initial_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_ongoing_requests,
            "upscale_delay_s": scale.upscale_delay_seconds,
            "downscale_delay_s": scale.downscale_delay_seconds,
        },
        max_ongoing_requests=scale.max_ongoing_requests,
        max_queued_requests=scale.max_queued_requests,
        ray_actor_options={"num_cpus": scale.cpus},
        graceful_shutdown_timeout_s=seconds,
        health_check_period_s=5.0,
        **more,
    )


def _applications() -> Mapping[str, Any]:
    try:
        return dict(serve.status().applications)
    except (RayError, RayServeException):
        return {}


def _require_free(host: str, port: int) -> None:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose another one with --port, for "
                f"example --port {port + 1}"
            ) from error


def _wait_until_ready(url: str, seconds: float) -> None:
    deadline, last = time.monotonic() + seconds, "no answer yet"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            last = f"HTTP {error.code}"
        except OSError as error:
            last = str(error)
        state = _applications().get(APPLICATION)
        if state is not None and state.status == "DEPLOY_FAILED":
            raise ServiceError(f"the service did not start: {_first_line(state.message)}")
        time.sleep(0.2)
    raise ServiceError(
        f"the service was not ready after {seconds:g} seconds ({last}); the logs are under "
        f"{Path('/tmp/ray/session_latest/logs/serve')}, and it needs CPUs for every detector"
    )


def _first_line(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given")[:300]


def _wait_for_signal() -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(1.0):
        pass
