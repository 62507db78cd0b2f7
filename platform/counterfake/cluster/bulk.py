"""Many independent pieces of work on a cluster, as one Ray Data pipeline: ingest goes through here.

What a piece makes is large and goes to storage from where it is made; only small receipts come back to the driver.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from counterfake import errors
from counterfake.cluster import session
from counterfake.errors import ClusterError, CounterfakeError
from counterfake.workspace import Workspace

logger = logging.getLogger(__name__)

Row = dict[str, Any]  # that JSON can hold


def each(
    function: Callable[..., Row],
    rows: Sequence[Row],
    *,
    workers: int,
    workspace: Workspace | None = None,
    **settings: Any,
) -> Iterator[Row]:
    """`function(row, **settings)` of every row, at most `workers` at a time with one CPU each; results as they come.

    The function must be importable on every node. A worker that dies is replaced and its row done again; an error of
    the function's that a user can act on ends everything and comes out as itself. Raises ClusterError."""
    with session.session(workspace) as cluster:
        if cluster.cpus < 1:
            raise ClusterError(f"the cluster at {cluster.address} has no CPU to work on; add a node")
        if workers > cluster.cpus:
            logger.warning("%d workers asked for, %g CPUs found: fewer run at a time", workers, cluster.cpus)
        for outcome in _outcomes(function, rows, min(workers, len(rows)), settings):
            if "failed" in outcome:
                raise getattr(errors, outcome["failed"])(outcome["message"])
            yield outcome["done"]


# -- private --------------------------------------------------------------------------------------------------------


def _outcomes(
    function: Callable[..., Row], rows: Sequence[Row], workers: int, settings: Row
) -> Iterator[Row]:
    import ray.data
    from ray.exceptions import RayError, RayTaskError, UserCodeException

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the driver shows its own
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    blocks = ray.data.from_items(
        [{"row": json.dumps(row)} for row in rows], override_num_blocks=len(rows)
    )  # as JSON: Arrow's text takes no file name that is not UTF-8
    done = blocks.map(
        _outcome,
        fn_kwargs={"function": function, "settings": settings},
        compute=ray.data.TaskPoolStrategy(size=workers),
        num_cpus=1,
    )
    try:
        yield from (json.loads(row["outcome"]) for row in done.iter_rows())
    except (RayTaskError, UserCodeException):
        raise  # a mistake of ours, with its traceback
    except RayError as error:
        raise ClusterError(f"the work on the cluster failed: {str(error).strip().splitlines()[0]}") from error


def _outcome(item: Row, *, function: Callable[..., Row], settings: Row) -> Row:
    """On a worker: the result, or an error as a value, because Ray would bury it in its own."""
    try:
        outcome: Row = {"done": function(json.loads(item["row"]), **settings)}
    except CounterfakeError as error:
        outcome = {"failed": type(error).__name__, "message": str(error)}
    return {"outcome": json.dumps(outcome)}
