"""Make a detector that was trained elsewhere a bundle of this platform: to be evaluated, to join an ensemble, to be served.

    counterfake run import-detector meso4-df --set weights=FOLDER/meso_Meso4_DF.npz            a second
    counterfake run import-detector mesoinception-df --set weights=FOLDER/meso_MesoInception_DF.npz
    counterfake run import-detector gan-discriminator --set checkpoint=FOLDER                  of a train-gan run

MesoNet: the authors' weights for deepfakes (df) and Face2Face (f2f), Apache-2.0, as arrays (.npz). Expected of meso4-df on the
authors' own four sample crops at 256 px, nearest-neighbour: probability of fake 0.959, 0.951 and 0.010, 0.002. The bundle averages
pixels when it shrinks, and says 0.949, 0.976 and 0.010, 0.003 (with --set preprocess.crop=none: they are crops already). `gan-discriminator` turns the sign of a discriminator:
it knows one generator at one moment, and stands in the reports for what it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from counterfake import bundle, checkpoint, config
from counterfake.errors import CheckpointError, ConfigError
from counterfake.images import Preprocess
from counterfake.learners.gan import GanConfig
from counterfake.loop import TrainJob
from counterfake.nets import NetConfig
from counterfake.nets.gan_discriminator import GanDiscriminatorConfig
from counterfake.nets.meso import MesoConfig
from counterfake.registry import Registry
from counterfake.storage import open_store
from counterfake.temporary import temporary_folder
from counterfake.workspace import Workspace
from jobs.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportJob:
    """One detector from one file or checkpoint."""

    name: str
    kind: Literal["mesonet", "gan-discriminator"]
    weights: str = ""  # .npz of MesoNet
    checkpoint: str = ""  # folder or URI of a GAN's checkpoint, as train-gan reports it
    net: MesoConfig = dataclasses.field(default_factory=MesoConfig)  # of MesoNet
    preprocess: Preprocess = dataclasses.field(
        default_factory=lambda: Preprocess(size=256, crop="face")
    )  # of MesoNet; a discriminator takes its GAN's
    register_as: str = ""  # name in the registry; "" = not registered

    def __post_init__(self) -> None:
        if self.kind == "mesonet" and self.preprocess.size != self.net.size:
            raise ConfigError(
                f"preprocess.size is {self.preprocess.size} but net.size is {self.net.size}; set both alike"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """What becomes the bundle."""

    net: NetConfig
    state: dict[str, Tensor]
    preprocess: Preprocess
    provenance: dict[str, Any]


def run(job: ImportJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Read, write the bundle, register it; returns where it is."""
    console = console or Console(quiet=True)
    found = _mesonet(job) if job.kind == "mesonet" else _discriminator(job, workspace)
    folder = workspace.home / "models" / f"{job.name}-{checkpoint.weights_digest(found.state)[:12]}"
    written = bundle.write_nets(
        folder,
        kind="detector",
        name=job.name,
        nets={"detector": (found.net, found.state)},
        preprocess=found.preprocess,
        provenance={"commit": bundle.source_commit(), "job": config.to_dict(job), **found.provenance},
    )
    registered = ""
    if job.register_as:
        registered = Registry.at(workspace).register(folder, job.register_as).reference
    console.event(f"{job.name}: bundle {written.digest[:12]} in {folder}")
    return {"bundle": str(folder), "digest": written.digest, "registered": registered}


def meso4_df() -> ImportJob:
    """Meso4, deepfakes."""
    return _meso("meso4-df", "meso4")


def meso4_f2f() -> ImportJob:
    """Meso4, Face2Face."""
    return _meso("meso4-f2f", "meso4")


def mesoinception_df() -> ImportJob:
    """MesoInception4, deepfakes."""
    return _meso("mesoinception-df", "inception")


def mesoinception_f2f() -> ImportJob:
    """MesoInception4, Face2Face."""
    return _meso("mesoinception-f2f", "inception")


def gan_discriminator() -> ImportJob:
    """The discriminator of a train-gan run."""
    return ImportJob(name="gan-discriminator", kind="gan-discriminator", register_as="gan-discriminator")


PRESETS: dict[str, Callable[[], ImportJob]] = {
    "meso4-df": meso4_df,
    "meso4-f2f": meso4_f2f,
    "mesoinception-df": mesoinception_df,
    "mesoinception-f2f": mesoinception_f2f,
    "gan-discriminator": gan_discriminator,
}


# -- private --------------------------------------------------------------------------------------------------------


def _meso(name: str, variant: Literal["meso4", "inception"]) -> ImportJob:
    return ImportJob(name=name, kind="mesonet", net=MesoConfig(variant=variant), register_as=name)


def _mesonet(job: ImportJob) -> Imported:
    if not job.weights:
        raise ConfigError(
            "weights is not set; name the .npz of MesoNet, like --set weights=meso_Meso4_DF.npz"
        )
    net = dataclasses.replace(job.net, weights=job.weights)
    notes = "Weights of the authors of MesoNet, https://github.com/DariusAf/MesoNet, Apache-2.0; sign turned to 1 = fake."
    sources = {"mesonet-training-set": {"licence": "unstated", "consent": "unknown"}}
    return Imported(
        net=net.without_weights(), state=net.build().state_dict(), preprocess=job.preprocess,
        provenance={"notes": notes, "sources": sources},
    )  # fmt: skip


def _discriminator(job: ImportJob, workspace: Workspace) -> Imported:
    if not job.checkpoint:
        raise ConfigError(
            "checkpoint is not set; name the one that train-gan reported, like --set checkpoint=FOLDER"
        )
    state, meta = _read(job.checkpoint)
    trained = config.from_dict(TrainJob, meta["job"])
    if not isinstance(trained.learner, GanConfig):
        raise CheckpointError(
            f"checkpoint {job.checkpoint} is of a {trained.task} job; give one of train-gan"
        )
    net = GanDiscriminatorConfig(discriminator=trained.learner.discriminator)
    weights = {f"discriminator.{name}": value for name, value in state["discriminator"].items()}
    facts = {key: meta["dataset"].get(key) for key in ("uri", "version", "digest")}
    notes = f"The discriminator of {trained.name} after {meta['step']} steps; it knows this one generator."
    return Imported(
        net=net, state=weights, preprocess=trained.data.preprocess,
        provenance={
            "notes": notes, "dataset": facts, "sources": meta["dataset"].get("sources", {}), "run_id": meta["run_id"],
        },
    )  # fmt: skip


def _read(where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint in a folder, or at a URI that is copied first."""
    if "://" not in where:
        return checkpoint.load(Path(where).expanduser())
    parent, _, name = where.rstrip("/").rpartition("/")
    with temporary_folder() as temporary:
        return checkpoint.load(open_store(parent).download(name, temporary / name))
