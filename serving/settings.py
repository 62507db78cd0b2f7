"""Every setting of the detection service, typed. `counterfake serve --set detectors.max_replicas=8` reaches all of them."""

from __future__ import annotations

import dataclasses

from counterfake.errors import ConfigError
from counterfake.media import Limits

APPLICATION = "counterfake"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoscale:
    """How many replicas of a deployment there are, and what moves that number."""

    min_replicas: int = 1  # never 0: the first request after a pause must not wait for a model to load
    max_replicas: int = 4
    target_ongoing_requests: float = 4.0  # per replica; more than this on average adds one
    max_ongoing_requests: int = 32  # per replica; the rest waits in the caller's queue
    max_queued_requests: int = 64  # per caller; beyond it a request is refused with 503 and Retry-After
    upscale_delay_seconds: float = 5.0
    downscale_delay_seconds: float = 120.0  # longer than the way up, so that bursts do not make it swing
    cpus: float = 0.5  # reserved per replica; may be a part of a core

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas={self.min_replicas} and max_replicas={self.max_replicas}: need 1 <= min <= max"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One running service: which model, where it listens, how it scales."""

    model: str = "ensemble@champion"  # registered ensemble; an alias is followed, `ensemble/3` stays
    host: str = "127.0.0.1"  # 0.0.0.0 to be reached from other machines
    port: int = 8000
    limits: Limits = dataclasses.field(default_factory=Limits)
    detectors: Autoscale = dataclasses.field(default_factory=Autoscale)  # each member of the ensemble
    gateway: Autoscale = dataclasses.field(
        default_factory=lambda: Autoscale(
            target_ongoing_requests=16.0, max_ongoing_requests=128, max_queued_requests=-1, cpus=0.1
        )
    )
    batch_size: int = 8  # pictures per forward pass, at most
    batch_wait_seconds: float = (
        0.0  # 0: a batch is what has queued up meanwhile; an idle detector never waits
    )
    threads: int = 1  # torch threads per detector replica
    decode_threads: int = 2  # pictures decoded at once per gateway replica
    upload_seconds: float = 15.0  # for the whole body of a request
    answer_seconds: float = 30.0  # for all detectors together; then 504
    poll_seconds: float = 5.0  # between two looks at the followed alias
    heartbeat_seconds: float = 1.0  # between two reports of a replica
    switch_seconds: float = 60.0  # for all replicas to load a candidate; then it is refused
    ready_seconds: float = 180.0  # for the application to come up

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= 1024:
            raise ConfigError(f"batch_size={self.batch_size} must be between 1 and 1024")
        if not 0 < self.port < 65536:
            raise ConfigError(f"port={self.port} is no TCP port; choose one between 1 and 65535")
