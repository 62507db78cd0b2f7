"""Pictures, or procedural faces, into a versioned dataset.

    counterfake run ingest synthetic-faces-demo                    800 faces: 11 s on 2 busy cores
    counterfake run ingest synthetic-faces                         20,000 faces, at 70-200 a second
    counterfake run ingest folder --set source.path=~/pictures --set source.licence=CC0-1.0 --set source.consent=none

Every picture is decoded once by the decoder that serving uses; what it refuses is counted and named, and above
`max_skipped_fraction` nothing is written. The same pictures again add no row. Sets of other people's pictures need
their own `source.path`, `source.licence` and `source.consent`.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from counterfake import media
from counterfake.config import digest, to_dict
from counterfake.errors import ConfigError, DataError, MediaError
from counterfake.faces import FaceDetector
from counterfake.records import Report, Sample, Skipped, SplitRule, Version, write_version
from counterfake.sources import SourceConfig
from counterfake.sources.ciplab import CiplabSource
from counterfake.sources.folder import FolderSource
from counterfake.sources.idx import IdxSource
from counterfake.sources.npz import NpzSource
from counterfake.sources.synthetic import SyntheticSource
from counterfake.workspace import Workspace
from jobs.console import Console

CHUNK = 64  # pictures handed to the threads at a time


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
    faces: Literal["", "cascade"] = ""  # find the largest face of pictures that come without a box
    max_skipped_fraction: float = 0.01  # of the files seen; above it nothing is written
    threads: int = 2  # that decode

    def __post_init__(self) -> None:
        if not self.into:
            raise ConfigError("ingest needs a dataset to write into: --set into=NAME")
        if not 0 <= self.max_skipped_fraction <= 1 or self.threads < 1:
            raise ConfigError("max_skipped_fraction lies in 0-1 and threads is at least 1")
        _encoder(self.encode)


def run(job: IngestJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Read, check and store; returns the version and what became of every file."""
    console = console or Console(quiet=True)
    _check_rights(job.source)
    started, report = time.monotonic(), Report()
    uri = workspace.dataset(job.into)
    console.stage(f"ingest {job.source.label} into {uri}")
    with console.progress("pictures", _expected(job.source)) as advance:
        version = write_version(
            uri,
            _checked(job),
            sources={job.source.label: {"licence": job.source.licence, "consent": job.source.consent}},
            splits=job.splits,
            parent="append" if job.append else None,
            report=report,
            writer={"job": "ingest", "source": to_dict(job.source), "job_digest": digest(job)},
            progress=_steps(advance),
            cache=workspace.cache,
        )
    result = _summary(uri, version, report, time.monotonic() - started)
    console.event(_sentence(result))
    if unlabelled := sum(row["rows"] for row in version.counts if _says_nothing(row)):
        console.event(
            f"{unlabelled} of its pictures have no label, detectors cannot learn from them; "
            "--set append=false with source.fake=0 (real) or 1 (fake) writes them with one"
        )
    return result


# -- presets --------------------------------------------------------------------------------------------------------


def synthetic_faces() -> IngestJob:
    """20,000 pictures of 1,000 people who do not exist."""
    return IngestJob(source=SyntheticSource(identities=1000, per_identity=20), into="faces")


def synthetic_faces_demo() -> IngestJob:
    """800 pictures of 40 people, enough to see everything work on a laptop."""
    return IngestJob(source=SyntheticSource(identities=40, per_identity=20, size=96), into="faces-demo")


def mnist() -> IngestJob:
    """MNIST: 70,000 digits as raw pixels, split as published."""
    return IngestJob(source=IdxSource(name="mnist"), into="mnist")


def fashion_mnist() -> IngestJob:
    """Fashion-MNIST: 70,000 articles of clothing as raw pixels, split as published."""
    return IngestJob(source=IdxSource(name="fashion-mnist"), into="fashion-mnist")


def ciplab() -> IngestJob:
    """Real and Fake Face Detection, 2,041 faces: fakes are expert Photoshop composites."""
    return IngestJob(
        source=CiplabSource(), into="ciplab", splits=_thirds(), encode="jpeg:90", faces="cascade"
    )


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


PRESETS: dict[str, Callable[[], IngestJob]] = {
    "synthetic-faces-demo": synthetic_faces_demo,
    "synthetic-faces": synthetic_faces,
    "folder": folder,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "ciplab": ciplab,
    "stylegan-ffhq": stylegan_ffhq,
    "cifake": cifake,
    "orl-faces": orl_faces,
    "anime-faces": anime_faces,
}


# -- private --------------------------------------------------------------------------------------------------------


def _thirds() -> SplitRule:
    """More calibration and test than usual: for sets of about 2,000 pictures."""
    return SplitRule(fractions={"train": 0.6, "validation": 0.1, "calibration": 0.1, "test": 0.2})


def _check_rights(source: SourceConfig) -> None:
    missing = [name for name in ("licence", "consent") if not getattr(source, name)]
    if missing:
        values = {"licence": '"CC-BY-4.0"', "consent": "research|subjects|synthetic|none"}
        flags = " ".join(f"--set source.{name}={values[name]}" for name in missing)
        raise ConfigError(
            f"say under which licence and with whose consent {source.label} may be used: {flags}"
        )


def _checked(job: IngestJob) -> Iterator[Sample | Skipped]:
    """Every picture of the source, decoded; raises DataError at the end when too many were refused."""
    seen, unlabelled, skipped = 0, 0, []
    workers = threading.local()
    with ThreadPoolExecutor(job.threads, thread_name_prefix="decode") as pool:
        for chunk in _chunks(job.source.samples()):
            for item in pool.map(lambda sample: _check(sample, job, workers), chunk):
                seen += 1
                skipped += [item] if isinstance(item, Skipped) else []
                unlabelled += isinstance(item, Sample) and item.fake is None and item.identity is None
                yield item
    if not seen:
        raise DataError(f"{job.source.path or job.source.label} holds no files; check source.path")
    if len(skipped) > job.max_skipped_fraction * seen:
        named = "; ".join(f"{item.path}: {item.reason}" for item in skipped[:5])
        raise DataError(
            f"{len(skipped)} of {seen} files cannot be used, more than max_skipped_fraction={job.max_skipped_fraction:g} "
            f"allows; nothing was written. First: {named}"
        )
    if unlabelled and isinstance(job.source, FolderSource) and job.source.layout == "auto":
        raise DataError(
            f"{unlabelled} pictures of {job.source.path} lie in no folder called real or fake, so they have no label; "
            "nothing was written. --set source.fake=0 (real) or 1 (fake), or keep them without: --set source.layout=flat"
        )


def _says_nothing(row: Mapping[str, Any]) -> bool:
    return row["fake"] is None and row["class_id"] is None


def _chunks(samples: Iterable[Sample | Skipped]) -> Iterator[list[Sample | Skipped]]:
    iterator = iter(samples)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk


def _check(sample: Sample | Skipped, job: IngestJob, workers: threading.local) -> Sample | Skipped:
    if isinstance(sample, Skipped) or sample.image is None:
        return sample
    try:
        pixels = media.decode(sample.image)
    except MediaError as error:
        return Skipped(sample.path, error.reason)
    if job.faces and sample.face_box is None:
        sample = _with_face(sample, pixels, job.faces, workers)
    return _encoded(sample, pixels, job.encode) if job.encode else sample


def _with_face(
    sample: Sample, pixels: media.Pixels, method: Literal["cascade"], workers: threading.local
) -> Sample:
    if not hasattr(workers, "detector"):
        workers.detector = FaceDetector(method)
    face = workers.detector.largest(pixels)
    box = None if face is None else face.box
    return dataclasses.replace(sample, face_box=box, face_method=method, face_margin=1.0)


def _encoded(sample: Sample, pixels: media.Pixels, encode: str) -> Sample:
    """The sample with its picture through the one encoder; the digest of the original is kept."""
    format, quality = _encoder(encode)
    attributes = sample.attributes | {"encoded": encode, "original": sample.id}
    return dataclasses.replace(
        sample, id="", image=media.encode(pixels, format, quality), attributes=attributes
    )


def _encoder(text: str) -> tuple[Literal["jpeg", "png", "webp"], int]:
    """ "jpeg:90" -> ("jpeg", 90)."""
    name, _, quality = text.partition(":")
    level = quality or "90"
    for format in ("jpeg", "png", "webp"):
        if name == format and level.isdigit() and 1 <= int(level) <= 100:
            return format, int(level)
    if text:
        raise ConfigError(
            f"encode is {text!r}; expected png, or jpeg:QUALITY or webp:QUALITY with quality 1-100"
        )
    return "png", 100


def _expected(source: SourceConfig) -> int | None:
    return source.identities * source.per_identity if isinstance(source, SyntheticSource) else None


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


def _sentence(result: dict[str, Any]) -> str:
    report = result["report"]
    skipped = sum(report["skipped"].values())
    return (
        f"{report['seen']} seen = {report['rows']} new + {report['duplicates']} already there + {report['conflicts']} "
        f"contradicting + {skipped} skipped, in {result['seconds']:.1f} s -> {result['dataset']}"
    )
