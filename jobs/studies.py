"""What a study leaves: one MLflow run over those of its training jobs, its tables there, and a file on disk.

A study is known by the digest of its settings: started again after it was killed it goes on in the same MLflow run, and its
training jobs, each nested below that, in theirs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from counterfake.config import digest, to_dict
from counterfake.storage import write_atomic
from counterfake.workspace import Workspace


class Study:
    """One study in progress."""

    def __init__(self, name: str, key: str, log: Any, workspace: Workspace) -> None:
        self.run_id: str = log.id
        self._log = log
        self._file = workspace.home / "studies" / f"{name}-{key}.json"

    def keep(self, found: Mapping[str, Any], pictures: Mapping[str, bytes]) -> dict[str, Any]:
        """Figures and pictures into MLflow and `studies/<name>-<digest>.json` -> the figures with run_id and file."""
        result = {**found, "run_id": self.run_id, "file": str(self._file)}
        self._log.json("study.json", result)
        for name, picture in pictures.items():
            self._log.picture(name, picture)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file, json.dumps(result, indent=1).encode())
        return result


def spread(runs: Sequence[Mapping[str, Any]], figures: Sequence[str], what: str) -> list[dict[str, Any]]:
    """For each figure over at least two runs: mean, standard deviation (n - 1), lowest, highest, and under `what` how many."""
    lines = []
    for name in figures:
        values = [float(run[name]) for run in runs]
        lines.append(
            {
                "figure": name, "mean": round(statistics.fmean(values), 4), "sd": round(statistics.stdev(values), 4),
                "min": round(min(values), 4), "max": round(max(values), 4), what: len(values),
            }
        )  # fmt: skip
    return lines


@contextmanager
def study(job: Any, name: str, workspace: Workspace) -> Iterator[Study]:
    """The study of these settings: the one begun before, or a new one; experiment "study"."""
    from counterfake.tracking import Tracker  # not at import: a preset must not load MLflow

    key = digest(job)[:12]
    tracker, tags = Tracker.at(workspace), {"counterfake.study": key}
    known = tracker.find("study", tags)
    log = tracker.resume(known[0]) if known else tracker.start("study", name, tags=tags, params=to_dict(job))
    with log:
        yield Study(name, key, log, workspace)
