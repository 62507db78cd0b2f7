"""Options that several commands share, and the workspace they name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from counterfake.workspace import Workspace

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output.")]
Storage = Annotated[
    str | None, typer.Option(help="Root of datasets, checkpoints, bundles: file:///… or s3://…")
]
Home = Annotated[Path | None, typer.Option(help="Local folder [default: $COUNTERFAKE_HOME or runs].")]
Tracking = Annotated[
    str | None, typer.Option(help="MLflow [default: $MLFLOW_TRACKING_URI or SQLite in the home].")
]


def open_workspace(
    home: Path | None = None, storage: str | None = None, tracking: str | None = None
) -> Workspace:
    """The workspace of this call; the only place that reads these environment variables."""
    root = home or Path(os.environ.get("COUNTERFAKE_HOME", "runs"))
    storage = storage or os.environ.get("COUNTERFAKE_STORAGE")
    if storage and "://" not in storage:
        storage = Path(storage).expanduser().resolve().as_uri()
    return Workspace.at(root, storage, tracking or os.environ.get("MLFLOW_TRACKING_URI"))
