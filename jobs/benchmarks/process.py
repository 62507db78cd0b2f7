"""One contestant in a process of its own: `python -m jobs.benchmarks.process ORDER.json ANSWER.json`. Started by harness.py.

The answer goes to a file because the measured libraries write to standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from jobs.benchmarks.harness import Contestant, Spec


def main(order: Path, answer: Path) -> None:
    tree = json.loads(order.read_text())
    action, spec = tree.pop("action"), Spec(**tree)
    module = importlib.import_module(f"jobs.benchmarks.{spec.benchmark}")
    if action == "write":
        module.WRITERS[spec.contestant](spec)
        result: dict[str, Any] = {}
    else:
        result = timed(module.CONTESTANTS[spec.contestant](spec), spec.seconds)
    answer.write_text(json.dumps(result))


def timed(contestant: Contestant, seconds: float) -> dict[str, Any]:
    """Whole rounds until `seconds` have passed, at least one; or what a contestant that measures itself says."""
    if contestant.whole:
        return contestant.whole()
    for _ in range(contestant.warmup):
        contestant.round()
    pictures, cpu, start = 0, cpu_seconds(), time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not pictures:
        pictures += contestant.round()
    used = cpu_seconds() - cpu
    return {
        "rate": pictures / elapsed,
        "per_cpu_second": pictures / used if used > 0 else None,
        "facts": contestant.facts(),
    }


def cpu_seconds() -> float:
    """Processor time of this process and all that it started; 0 where there is no /proc."""
    parents, spent = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        spent[pid] = sum(map(int, fields[11:15]))  # its own and its reaped children's, user and system
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(spent.get(pid, 0) for pid in ours) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # some measured libraries keep threads that do not end
