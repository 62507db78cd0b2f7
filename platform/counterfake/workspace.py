"""Where things live: one local folder, one storage root, one tracking server. A value, passed in; reads no environment."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from counterfake.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
    """Everything local lies under `home`; everything shared by workers lies under the URI `storage`."""

    home: Path  # local folder, absolute: caches, reports, logs
    storage: str  # file:///… or s3://bucket/prefix: datasets, checkpoints, bundles, artefacts
    tracking_uri: str  # sqlite:////… or http://host:port of MLflow

    @classmethod
    def at(cls, home: str | Path, storage: str | None = None, tracking_uri: str | None = None) -> Workspace:
        """The embedded default: files and a SQLite-backed MLflow under one folder."""
        root = Path(home).expanduser().resolve()
        return cls(
            home=root,
            storage=(storage or root.as_uri()).rstrip("/"),
            tracking_uri=tracking_uri or f"sqlite:///{root}/mlflow.db",
        )

    def dataset(self, reference: str) -> str:
        """ "faces@3" -> "file:///…/datasets/faces@3"; a full URI stays as it is. ConfigError for anything else."""
        if "://" in reference:
            return reference
        if not re.fullmatch(r"\w[\w.-]*(@\w*)?", reference):
            raise ConfigError(
                f"{reference!r} names no dataset; write a name like faces or faces@3, or a file:// or s3:// URI"
            )
        return f"{self.storage}/datasets/{reference}"

    @property
    def training(self) -> str:
        """URI under which Ray Train keeps runs and checkpoints."""
        return f"{self.storage}/training"

    @property
    def bundles(self) -> str:
        """URI of digest-addressed model bundles: what serving reads, with or without MLflow."""
        return f"{self.storage}/bundles"

    @property
    def artifacts(self) -> str:
        """URI of MLflow's artefacts when this workspace owns the tracking store (sqlite)."""
        return f"{self.storage}/artifacts"

    @property
    def cache(self) -> Path:
        """Local folder for downloaded shards and bundles; safe to delete."""
        return self.home / "cache"
