"""Verdicts of an ensemble on every picture of a dataset split or a folder, as Parquet.

    counterfake run score --set model=ensemble@champion --set path=~/pictures
    counterfake run score --set data.uri=faces@4 --set data.split=test --workers 8

Columns: id, path, fake (the label, where there is one), verdict, reason, detail, probability_fake, probability_<detector>. The
numbers are those that serving answers for the same bytes, bit for bit. Without `into` they go to
`<storage>/scores/<model>-<digest of model and inputs>/`; the same command again goes on with the parts that are missing,
whether threads here or Ray workers do them. A locked split is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from counterfake import config, verdicts
from counterfake.bundle import Bundle
from counterfake.data import DataConfig
from counterfake.errors import ConfigError
from counterfake.records import Dataset
from counterfake.storage import open_store
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.evaluate import resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """One ensemble over one split or one folder."""

    model: str = "ensemble@champion"  # "name@alias", "name/3", "name", or a bundle folder
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(split="*"))  # uri and split count
    path: str = ""  # folder or archive of pictures, in the place of data.uri; workers must see it
    into: str = ""  # file:// or s3:// folder of the verdicts; "" = under the workspace's storage
    workers: int = 0  # Ray workers, one CPU each; 0 = this process
    threads: int = 2  # that decode, here or in each worker
    part_rows: int = 512  # pictures of a part, the unit of sharing and resuming

    def __post_init__(self) -> None:
        if self.workers < 0 or self.threads < 1 or self.part_rows < 1:
            raise ConfigError("workers is at least 0; threads and part_rows are at least 1")
        if self.data.where:
            raise ConfigError("score takes whole splits; choose rows first: counterfake data derive")


PRESETS: dict[str, Callable[[], ScoreJob]] = {"ensemble": ScoreJob}


def run(job: ScoreJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Judge every part that is missing; returns counts by verdict and where the Parquet files lie."""
    console = console or Console(quiet=True)
    inputs, loaded = _inputs(job, workspace), verdicts.load(resolve(job.model, workspace))
    parts, key = (
        inputs.cut(workspace.cache),
        config.digest([loaded.bundle.digest, inputs.digest(workspace.cache)]),
    )
    uri = job.into or f"{workspace.storage}/scores/{loaded.name}-{key[:16]}"
    output = verdicts.Output(open_store(uri))
    said = {"model": loaded.bundle.digest, "inputs": inputs.digest(workspace.cache), "parts": len(parts)}
    output.begin(said)
    done = output.done()
    missing = [part for part in parts if part["number"] not in done]
    if done:
        console.event(f"{len(done)} of {len(parts)} parts are there already; going on")
    started, rows = time.monotonic(), 0
    with console.progress("pictures", sum(part["rows"] for part in parts)) as advance:
        advance(sum(part["rows"] for part in parts if part["number"] in done))
        for receipt in _scored(job, workspace, loaded.bundle, inputs, missing, uri):
            advance(receipt["rows"])
            rows += receipt["rows"]
    seconds = time.monotonic() - started
    speed = round(rows / seconds, 1) if rows else None
    counts = sum(
        (collections.Counter(output.counts(part["number"])) for part in parts), collections.Counter()
    )
    console.event(f"{rows} pictures judged" + (f", {speed} a second" if speed else ": nothing was missing"))
    return {
        "model": job.model, "digest": loaded.bundle.digest, "input": job.path or dataclasses.asdict(inputs)["uri"],
        "verdicts": uri, "pictures": sum(counts.values()), "counts": dict(counts), "images_per_second": speed,
        "parts": {"all": len(parts), "reused": len(parts) - len(missing)},
    }  # fmt: skip


# -- private --------------------------------------------------------------------------------------------------------


def _inputs(job: ScoreJob, workspace: Workspace) -> verdicts.Parts:
    if bool(job.path) == bool(job.data.uri):
        raise ConfigError("name either pictures, --set path=FOLDER, or a dataset, --set data.uri=faces@3")
    if job.path:
        return verdicts.FolderParts(path=str(Path(job.path).expanduser().absolute()), rows=job.part_rows)
    dataset = Dataset.open(workspace.dataset(job.data.uri), cache=workspace.cache)
    pinned = f"{dataset.store.uri}@{dataset.version().number}"
    return verdicts.DatasetParts(uri=pinned, split=job.data.split, rows=job.part_rows)


def _scored(
    job: ScoreJob,
    workspace: Workspace,
    model: Bundle,
    inputs: verdicts.Parts,
    missing: Sequence[dict[str, Any]],
    uri: str,
) -> Iterator[dict[str, Any]]:
    """Receipts of the missing parts as they are done."""
    settings: dict[str, Any] = {
        "inputs": dataclasses.asdict(inputs),
        "bundle": {"folder": str(model.folder), "digest": model.digest, "bundles": workspace.bundles},
        "uri": uri,
        "cache": str(workspace.cache),
        "threads": job.threads,
    }
    if job.workers and len(missing) > 1:
        from counterfake.cluster import bulk

        yield from bulk.each(
            verdicts.score_part, missing, workers=job.workers, workspace=workspace, **settings
        )
    else:
        yield from (verdicts.score_part(part, **settings) for part in missing)
