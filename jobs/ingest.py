"""Pictures, videos, or procedural faces, into a versioned dataset.

    counterfake run ingest synthetic-faces-demo                    800 faces: 4-7 s on 2 busy cores, audit included
    counterfake run ingest synthetic-faces                         20,000 faces, at 70-200 a second
    counterfake run ingest folder --set source.path=~/pictures --set source.licence=CC0-1.0 --set source.consent=none
    counterfake run ingest ciplab --set source.path=ciplab --set source.licence=unstated --set source.consent=research
        [--set faces=ultralight --set faces_model=ultralight_face_slim_320.pth --set landmarks_model=onet.pt]
    counterfake run ingest ffpp --workers 2 --set source.path=/data/ffpp --set source.licence=research --set source.consent=research

Every picture is decoded once by the decoder that serving uses; every input ends as ok or skipped with its reason, and
above `max_skipped_fraction` nothing is written. Hidden files, those of operating systems, and lists, masks and what the
source's settings leave out are counted as skipped too, but not towards that fraction. Inputs are prepared in parts, by threads here or by Ray workers (which
must see `source.path` on every node), and staged beside the dataset: a killed ingest run again goes on where it was.
The same pictures again add no row. `faces` finds the largest face and its eyes; with `landmarks_model` (MTCNN's O-Net) five
points, by which detectors are taught composites. Sets of other people's pictures need their own `source.path`, `source.licence` and
`source.consent`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from counterfake import parts
from counterfake.config import digest, to_dict
from counterfake.errors import ConfigError, DataError
from counterfake.fingerprint import NEAR_BITS
from counterfake.parts import Part, Receipt, Staging
from counterfake.prepare import Recipe
from counterfake.records import Dataset, Report, Sample, Skipped, SplitRule, Version, write_version
from counterfake.samples import Tally
from counterfake.sources import SourceConfig
from counterfake.sources.celebdf import CelebdfSource
from counterfake.sources.ciplab import CiplabSource
from counterfake.sources.dfdc import DfdcSource
from counterfake.sources.ffpp import FfppSource
from counterfake.sources.folder import FolderSource
from counterfake.sources.idx import IdxSource
from counterfake.sources.listing import is_aside
from counterfake.sources.npz import NpzSource
from counterfake.sources.parquet import ParquetSource
from counterfake.sources.synthetic import SyntheticSource
from counterfake.sources.synthetic_video import SyntheticVideoSource
from counterfake.sources.video import VideoSource
from counterfake.storage import open_store, probe
from counterfake.temporary import temporary_folder
from counterfake.workspace import Workspace
from jobs.auditing import audited
from jobs.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestJob:
    """One source into one new version of one dataset."""

    source: SourceConfig
    into: str  # name in this workspace, or a file:// or s3:// URI
    splits: SplitRule = dataclasses.field(default_factory=SplitRule)
    append: bool = True  # add to the newest version; false: the version holds this source alone
    encode: str = (
        ""  # "jpeg:90", "png", "webp:100": every picture through one encoder; "" = stored as it came
    )
    faces: Literal["", "cascade", "cascade-default", "yunet", "ultralight"] = (
        ""  # find the largest face of pictures that come without a box
    )
    faces_model: str = ""  # file of yunet or ultralight
    landmarks_model: str = ""  # file of MTCNN's O-Net (onet.pt): five points of each face; "" = its eyes
    max_skipped_fraction: float = 0.01  # of the inputs not set aside; above it nothing is written
    threads: int = 2  # that prepare pictures here; of no effect with workers
    workers: int = 0  # Ray workers, one CPU each; 0 = this process
    part_inputs: int = 0  # inputs in a part, the unit of sharing and resuming; 0 = as the source suggests
    audit: bool = True  # look for leaks and shortcuts in the version afterwards

    def __post_init__(self) -> None:
        if not self.into:
            raise ConfigError("ingest needs a dataset to write into: --set into=NAME")
        if not 0 <= self.max_skipped_fraction <= 1 or self.threads < 1:
            raise ConfigError("max_skipped_fraction lies in 0-1 and threads is at least 1")
        if self.workers < 0 or self.part_inputs < 0:
            raise ConfigError("workers and part_inputs are at least 0")
        _recipe(self)


def run(job: IngestJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Read, check and store; returns the version and what became of every input."""
    console, started = console or Console(quiet=True), time.monotonic()
    _check_rights(job.source)
    uri = _writable(workspace.dataset(job.into))
    console.stage(f"ingest {job.source.label} into {uri}")
    ingest = _Ingest(job, workspace, console, uri, _plan(job))
    with ingest.staging() as staging:
        reused = ingest.stage(staging)
        receipts = [staging.receipt(part.number) for part in ingest.plan.parts]
        report = _report(receipts)
        _tell_skipped(receipts, console)
        _refuse_unlabelled(job, receipts)
        ingest.list_skipped(receipts, report)
        _refuse_skipped(job, receipts, f"{uri}/{ingest.list_key}")
        version = ingest.commit(staging, receipts, report)
    result = _summary(uri, version, report, time.monotonic() - started)
    result["parts"] = {"all": len(receipts), "reused": reused}
    _tell(result, version, console)
    if job.audit:
        result["audit"] = audited(uri, version, workspace, console)
    return result


# -- presets --------------------------------------------------------------------------------------------------------


def idx() -> IngestJob:
    """Any set in MNIST's file format: raw grey pixels with a class, split as its files are."""
    return IngestJob(source=IdxSource(), into="idx")


def npz() -> IngestJob:
    """One NumPy archive of JPEG bytes with offsets, or of uint8 images; set source.fake where it holds no labels."""
    return IngestJob(source=NpzSource(), into="npz")


def synthetic_faces() -> IngestJob:
    """20,000 pictures of 1,000 people who do not exist."""
    return IngestJob(source=SyntheticSource(identities=1000, per_identity=20), into="faces")


def synthetic_faces_demo() -> IngestJob:
    """800 pictures of 40 people, enough to see everything work on a laptop."""
    return IngestJob(source=SyntheticSource(identities=40, per_identity=20, size=96), into="faces-demo")


def swap_people() -> IngestJob:
    """2,000 pictures of 4 people, all for training: what the NAME-small presets of train-swap are measured on."""
    source = SyntheticSource(identities=4, per_identity=500)
    return IngestJob(source=source, into="swap-people", splits=SplitRule(fractions={"train": 1.0}))


def synthetic_videos() -> IngestJob:
    """800 clips of 80 people, half of them swaps that flicker: what a GRU over frames is compared with their mean on."""
    return IngestJob(source=SyntheticVideoSource(identities=80, clips=5), into="clips", splits=_thirds())


def synthetic_videos_demo() -> IngestJob:
    """96 short clips of 24 people."""
    source = SyntheticVideoSource(identities=24, clips=2, frames=8, size=64)
    return IngestJob(source=source, into="clips-demo", splits=_thirds())


def mnist() -> IngestJob:
    """MNIST: 70,000 digits as raw pixels, split as published."""
    return IngestJob(source=IdxSource(name="mnist"), into="mnist")


def fashion_mnist() -> IngestJob:
    """Fashion-MNIST: 70,000 articles of clothing as raw pixels, split as published."""
    return IngestJob(source=IdxSource(name="fashion-mnist"), into="fashion-mnist")


def ciplab() -> IngestJob:
    """Real and Fake Face Detection, 2,041 faces: fakes are expert Photoshop composites.

    Many were made from a photograph of the set: 43 pairs of 1,631 pictures differ in at most 68 bits, 3 in at most 31.
    The cascade finds a face in 84 % of them and eyes in 64 %; with faces=ultralight and a landmarks_model all but one.
    """
    splits = _thirds(near_bits=68)
    return IngestJob(source=CiplabSource(), into="ciplab", splits=splits, encode="jpeg:90", faces="cascade")


def stylegan_ffhq() -> IngestJob:
    """FFHQ photographs and StyleGAN faces, folders or an archive with real/ and fake/."""
    source = FolderSource(name="stylegan-ffhq", layout="labels", maker="stylegan")
    return IngestJob(source=source, into="stylegan-ffhq", splits=_thirds())


def cifake() -> IngestJob:
    """CIFAKE: CIFAR-10 against Stable Diffusion 1.4, 32 pixels; files under test/ stay the test split."""
    source = NpzSource(name="cifake", maker="stable-diffusion-1.4")
    splits = SplitRule(fractions={"train": 0.8, "validation": 0.08, "calibration": 0.07, "test": 0.05})
    return IngestJob(source=source, into="cifake", splits=splits)


def orl_faces() -> IngestJob:
    """AT&T/ORL faces: 40 people, 10 grey pictures each; people never cross splits."""
    return IngestJob(source=NpzSource(name="orl", fake=0), into="orl-faces", faces="cascade")


def anime_faces() -> IngestJob:
    """Anime faces, 64 pixels: material for a GAN on little data."""
    return IngestJob(source=NpzSource(name="anime-faces", fake=0), into="anime-faces")


def folder() -> IngestJob:
    """Your own pictures: real/ and fake/, or one folder per person, or a flat folder with source.fake set."""
    return IngestJob(source=FolderSource(), into="pictures")


def video() -> IngestJob:
    """Videos in a folder, or one: crops of the face that is followed through 32 frames of each."""
    return IngestJob(source=VideoSource(), into="videos", max_skipped_fraction=0.1)


def ffpp() -> IngestJob:
    """FaceForensics++ as its script lays it out, c23, split as published where its splits are there."""
    return IngestJob(source=FfppSource(), into="ffpp", max_skipped_fraction=0.1)


def celebdf() -> IngestJob:
    """Celeb-DF v1 or v2; the official test videos stay the test split."""
    return IngestJob(source=CelebdfSource(), into="celebdf", max_skipped_fraction=0.1)


def dfdc() -> IngestJob:
    """Parts of the DFDC training set, labelled by their metadata.json."""
    return IngestJob(source=DfdcSource(), into="dfdc", max_skipped_fraction=0.1)


def parquet() -> IngestJob:
    """Hugging Face image data sets: set source.label_column, or source.fake."""
    return IngestJob(source=ParquetSource(), into="pictures")


PRESETS: dict[str, Callable[[], IngestJob]] = {
    "synthetic-faces-demo": synthetic_faces_demo,
    "swap-people": swap_people,
    "synthetic-videos": synthetic_videos,
    "synthetic-videos-demo": synthetic_videos_demo,
    "synthetic-faces": synthetic_faces,
    "synthetic": synthetic_faces,
    "folder": folder,
    "parquet": parquet,
    "video": video,
    "ffpp": ffpp,
    "celebdf": celebdf,
    "dfdc": dfdc,
    "idx": idx,
    "npz": npz,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "ciplab": ciplab,
    "stylegan-ffhq": stylegan_ffhq,
    "cifake": cifake,
    "orl-faces": orl_faces,
    "anime-faces": anime_faces,
}


# -- private --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    recipe: Recipe
    parts: Sequence[Part]
    digest: str  # of the recipe and the inputs

    @property
    def inputs(self) -> int:
        return sum(len(part.names) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class _Ingest:
    """One ingest under way: stage every part, then commit all of them as one version."""

    job: IngestJob
    workspace: Workspace
    console: Console
    uri: str
    plan: _Plan

    @property
    def scratch(self) -> Path:
        """Where this process keeps media for a while."""
        return parts.scratch(self.workspace.home)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Staging]:
        """Where parts are staged: beside the dataset, until the version is there, also after an error or a kill.

        A single part, which is quickly done again, lies in the scratch folder."""
        if len(self.plan.parts) == 1:
            with temporary_folder(self.scratch) as folder:
                yield Staging(open_store(folder.as_uri()), "staging", self.scratch)
        else:
            staging = Staging(open_store(self.uri), f"staging/{self.plan.digest[:32]}", self.scratch)
            yield staging
            staging.clear()

    def stage(self, staging: Staging) -> int:
        """Stage the parts that are not staged yet -> how many were."""
        done = staging.done()
        missing = [part for part in self.plan.parts if part.number not in done]
        if done:
            self.console.event(f"{len(done)} of {len(self.plan.parts)} parts are there already; going on")
        with self.console.progress("inputs", self.plan.inputs) as advance:
            advance(self.plan.inputs - sum(len(part.names) for part in missing))
            if self._is_shared(missing):
                for row in self._on_workers(missing, staging):
                    advance(row["inputs"])
            else:
                for receipt in parts.stage_here(self.plan.recipe, missing, staging, self.job.threads):
                    advance(receipt.inputs)
        return len(self.plan.parts) - len(missing)

    def _is_shared(self, missing: Sequence[Part]) -> bool:
        """Whether Ray workers do it, not this process."""
        if not self.job.workers or len(self.plan.parts) == 1 or not missing:
            return False
        if not self.plan.recipe.source.divisible:
            self.console.event(
                f"{self.job.source.path} can only be read from front to back, so it is read here; "
                "unpacked, or as a .zip, workers could share it"
            )
            return False
        return True

    def _on_workers(self, missing: Sequence[Part], staging: Staging) -> Iterator[dict[str, Any]]:
        from counterfake.cluster import bulk

        return bulk.each(
            parts.stage_one,
            [{"number": part.number, "names": part.names} for part in missing],
            workers=self.job.workers,
            workspace=self.workspace,
            recipe=to_dict(self.plan.recipe),
            uri=self.uri,
            prefix=staging.prefix,
        )

    @property
    def list_key(self) -> str:
        """Where the dataset keeps the list of inputs that this ingest skipped."""
        return f"ingests/{self.plan.digest[:32]}.json"

    def list_skipped(self, receipts: Sequence[Receipt], report: Report) -> None:
        """Every input that was skipped, wholly or in part, and why, as JSON beside the versions."""
        assert report.inputs is not None
        listed = {
            "source": to_dict(self.job.source),
            "inputs": report.inputs.to_dict(),
            "skipped": [entry for receipt in receipts for entry in receipt.skipped],  # (input, reason)
            "partly": [entry for receipt in receipts for entry in receipt.partly],  # (input, reason, count)
        }
        open_store(self.uri).put(self.list_key, json.dumps(listed, indent=1).encode())

    def commit(self, staging: Staging, receipts: Sequence[Receipt], report: Report) -> Version:
        """One version with the rows of all parts."""
        source = self.job.source
        facts = {"job": "ingest", "source": to_dict(source), "job_digest": digest(self.job)}
        items = sum(receipt.rows + len(receipt.skipped) for receipt in receipts)
        with self.console.progress("writing", items) as advance:
            return write_version(
                self.uri,
                _items(staging, receipts, self.workspace.cache),
                sources={source.label: {"licence": source.licence, "consent": source.consent}},
                splits=self.job.splits,
                parent="append" if self.job.append else None,
                report=report,
                writer={**facts, "inputs": self.list_key},
                progress=_steps(advance),
                scratch=self.scratch,
                cache=self.workspace.cache,
            )


def _recipe(job: IngestJob) -> Recipe:
    return Recipe(
        source=job.source,
        encode=job.encode,
        faces=job.faces,
        faces_model=job.faces_model,
        landmarks_model=job.landmarks_model,
    )


def _plan(job: IngestJob) -> _Plan:
    names = list(job.source.names())
    if not names:
        raise DataError(f"{job.source.path or job.source.label} holds no files; check source.path")
    recipe = dataclasses.replace(_recipe(job), source=job.source.settled(names))
    size = job.part_inputs or job.source.part_inputs
    return _Plan(recipe, parts.cut(names, size), parts.digest(recipe, names, size))


def _items(staging: Staging, receipts: Sequence[Receipt], cache: Path) -> Iterator[Sample | Skipped]:
    """All rows in the order of the source, and the inputs without any."""
    for receipt in receipts:
        yield from staging.samples(receipt, cache)
        yield from (Skipped(name, reason) for name, reason in receipt.skipped)


def _report(receipts: Sequence[Receipt]) -> Report:
    """What the receipts say of inputs; rows and what was skipped are counted as they are written."""
    skipped = sum(len(receipt.skipped) for receipt in receipts)
    report = Report(inputs=Tally(ok=sum(r.inputs for r in receipts) - skipped, skipped=skipped))
    for receipt in receipts:
        for name, reason, count in receipt.partly:
            report.skip(name, reason, count, whole=False)
    return report


def _thirds(near_bits: int = NEAR_BITS) -> SplitRule:
    """More calibration and test than usual: for sets of about 2,000 pictures."""
    fractions = {"train": 0.6, "validation": 0.1, "calibration": 0.1, "test": 0.2}
    return SplitRule(fractions=fractions, near_bits=near_bits)


def _check_rights(source: SourceConfig) -> None:
    missing = [name for name in ("licence", "consent") if not getattr(source, name)]
    if missing:
        values = {"licence": '"CC-BY-4.0"', "consent": "research|subjects|synthetic|none"}
        flags = " ".join(f"--set source.{name}={values[name]}" for name in missing)
        raise ConfigError(
            f"say under which licence and with whose consent {source.label} may be used: {flags}"
        )


def _writable(uri: str) -> str:
    """The dataset's URI, after a look at whether it can be written to at all."""
    dataset = Dataset.open(uri)
    if dataset.pinned is not None:
        raise ConfigError(f"{uri} names a version, which never changes; write to the dataset, without @N")
    if not dataset.store.is_local:
        probe(dataset.store).require(uri)
    return uri


def _refuse_skipped(job: IngestJob, receipts: Sequence[Receipt], listed: str) -> None:
    """Raises DataError if too many inputs are of no use; those that are set aside (listing.ASIDE) do not count."""
    all_skipped = [entry for receipt in receipts for entry in receipt.skipped]
    skipped = [(name, reason) for name, reason in all_skipped if not is_aside(reason)]
    seen = sum(receipt.inputs for receipt in receipts) - (len(all_skipped) - len(skipped))
    if len(skipped) > job.max_skipped_fraction * seen:
        named = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise DataError(
            f"{len(skipped)} of {seen} files cannot be used, more than max_skipped_fraction={job.max_skipped_fraction:g} "
            f"allows; nothing was written. First: {named}; all: {listed}"
        )


def _refuse_unlabelled(job: IngestJob, receipts: Sequence[Receipt]) -> None:
    unlabelled = sum(receipt.unlabelled for receipt in receipts)
    if unlabelled and isinstance(job.source, FolderSource) and job.source.layout == "auto":
        raise DataError(
            f"{unlabelled} pictures of {job.source.path} lie in no folder called real or fake, so they have no label; "
            "nothing was written. --set source.fake=0 (real) or 1 (fake), or keep them without: --set source.layout=flat"
        )


def _tell(result: Mapping[str, Any], version: Version, console: Console) -> None:
    console.event(_sentence(result))
    if conflicts := result["report"]["conflicts"]:
        console.event(
            f"{conflicts} pictures are there with the opposite label, which stays; find out which one is right"
        )
    if unlabelled := sum(row["rows"] for row in version.counts if _says_nothing(row)):
        console.event(
            f"{unlabelled} of its pictures have no label, detectors cannot learn from them; "
            "--set append=false with source.fake=0 (real) or 1 (fake) writes them with one"
        )


def _tell_skipped(receipts: Sequence[Receipt], console: Console) -> None:
    """A line for each reason, the most frequent first."""
    whole, partly = collections.Counter[str](), collections.Counter[str]()
    examples: dict[str, str] = {}
    for name, reason in (entry for receipt in receipts for entry in receipt.skipped):
        whole[reason] += 1
        examples.setdefault(reason, name)
    for name, reason, count in (entry for receipt in receipts for entry in receipt.partly):
        partly[f"{reason} (part of an input)"] += count
        examples.setdefault(f"{reason} (part of an input)", name)
    for reason, count in [*whole.most_common(), *partly.most_common()]:
        console.event(f"{count:>8,}  {reason:<36} such as {examples[reason]}")


def _says_nothing(row: Mapping[str, Any]) -> bool:
    return row["fake"] is None and row["class_id"] is None


def _steps(advance: Callable[[int], None]) -> Callable[[int], None]:
    """`advance(how many more)` from `progress(how many in all)`."""
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        advance(count - done)
        done = count

    return progress


def _summary(uri: str, version: Version, report: Report, seconds: float) -> dict[str, Any]:
    return {
        "dataset": f"{uri}@{version.number}",
        "version": version.number,
        "digest": version.digest,
        "kind": version.kind,
        "splits": {name: version.rows(name) for name in version.splits},
        "rows": version.rows(),
        "report": report.to_dict(),
        "seconds": round(seconds, 2),
        "pictures_per_second": round(report.seen / max(seconds, 1e-9), 1),
    }


def _sentence(result: Mapping[str, Any]) -> str:
    report, inputs = result["report"], result["report"]["inputs"]
    return (
        f"{inputs['seen']} inputs = {inputs['ok']} ok + {inputs['skipped']} skipped; rows: {report['rows']} new + "
        f"{report['duplicates']} already there + {report['conflicts']} contradicting, in {result['seconds']:.1f} s "
        f"-> {result['dataset']}"
    )
