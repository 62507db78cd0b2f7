"""What a search has spent: seconds of its trials times their CPUs and GPUs, kept on storage so that a restart goes on.

Counted at every report of a trial, from the start of its process or its last report; a bundle written after the last
report is not. Knows Ray only inside `stopper`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

from counterfake.config import canonical_json
from counterfake.errors import ConfigError, NotFoundError
from counterfake.loop import TrainJob
from counterfake.storage import open_store

KEY = "spent.json"
ENDING_SECONDS = 60  # a trial that has trained to its end may still write its bundle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What all trials of a search together may use; 0 = no limit."""

    cpu_hours: float = 0.0
    gpu_hours: float = 0.0

    def check(self, job: TrainJob) -> None:
        """Raises ConfigError for a limit that can never be reached."""
        if min(self.cpu_hours, self.gpu_hours) < 0:
            raise ConfigError(
                f"a budget must not be negative, got {self.cpu_hours:g} CPU-hours, {self.gpu_hours:g} GPU-hours"
            )
        for kind, hours, each in (
            ("cpu", self.cpu_hours, job.cpus_per_worker),
            ("gpu", self.gpu_hours, job.gpus_per_worker),
        ):
            if hours and not each:
                raise ConfigError(
                    f"a budget of {hours:g} {kind.upper()}-hours limits nothing: a trial has train.{kind}s_per_worker=0; "
                    "budget what the trials use"
                )


NO_LIMIT = Budget()


class Spending:
    """Seconds that trials ran, under `uri`. Every report is written down before anything is decided by it."""

    def __init__(self, uri: str, budget: Budget, *, cpus: float, gpus: float) -> None:
        """cpus, gpus: of one trial, all its workers together."""
        self._uri, self._budget, self._cpus, self._gpus = uri, budget, cpus, gpus
        self._seconds: float | None = None  # of trials; None = not read yet

    @classmethod
    def of(cls, uri: str, budget: Budget, job: TrainJob) -> Spending:
        workers = max(1, job.workers)
        return cls(uri, budget, cpus=workers * job.cpus_per_worker, gpus=workers * job.gpus_per_worker)

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of its stopper in its state, which may be older than the file
        return {**self.__dict__, "_seconds": None}

    @property
    def seconds(self) -> float:
        """Of all trials together, also before a restart."""
        if self._seconds is None:
            try:
                self._seconds = float(json.loads(open_store(self._uri).read(KEY))["trial_seconds"])
            except NotFoundError:
                self._seconds = 0.0
        return self._seconds

    @property
    def cpu_hours(self) -> float:
        return self.seconds * self._cpus / 3600

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self._gpus / 3600

    @property
    def exhausted(self) -> bool:
        """Whether a limit is reached."""
        pairs = ((self.cpu_hours, self._budget.cpu_hours), (self.gpu_hours, self._budget.gpu_hours))
        return any(0 < limit <= spent for spent, limit in pairs)

    def add(self, seconds: float) -> None:
        """Some more seconds of one trial."""
        self._seconds = self.seconds + seconds
        open_store(self._uri).put(KEY, canonical_json({"trial_seconds": self._seconds}))


def stopper(spending: Spending) -> Any:
    """Tune's end of a search whose budget is spent: each trial at its next report, none begun after it."""
    from ray.tune import Stopper

    class Spent(Stopper):
        """Trials that reported their last tick are left the time to write their bundle."""

        def __init__(self) -> None:
            self._ending = 0.0  # when a trial last reached its end

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            if result.get("done"):  # the last report once more
                return False
            spending.add(float(result.get("time_this_iter_s", 0.0)))
            if result.get("last"):
                self._ending = time.time()
                return False
            return spending.exhausted

        def stop_all(self) -> bool:
            return spending.exhausted and time.time() - self._ending > ENDING_SECONDS

    return Spent()
