"""Make fakes with a registered model and store them as a new dataset version.

    counterfake run generate gan-faces-demo                           1,000 faces from the newest dcgan-faces, 2 cores: 10 s
    counterfake run generate swap-faces-demo                          500 swapped faces, 2 cores: 15 s
    counterfake run generate gan-samples --set model=mnist-gan/2 --set into=mnist-fakes --set count=10000
    counterfake run generate swap-video --set input=talk.mp4                              files instead of rows: see convert.py

A generator is sampled; a face-swap model puts another person's face into pictures of `faces`. Every row says what made
it (`maker`, e.g. dcgan-faces@3) and every file is marked as generated (IPTC DigitalSourceType). Files are encoded in the
formats and JPEG qualities of the real ones, so that a detector cannot tell them apart by that: a swap exactly like the
picture it was made from. A swap stays in the split of that picture. The same job makes the same bytes; only files that are
also signed (`sign.certificate`, `sign.key`, see signing.py) differ, by their manifests. The version is audited like an
ingested one; its terms are those of what the model learned from, and of the pictures that were swapped (see consent.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from counterfake import bundle as bundles
from counterfake import images, media, provenance
from counterfake.blending import Blending
from counterfake.config import digest, from_dict, to_dict
from counterfake.conversion import SOURCE_TYPE, Painter
from counterfake.errors import ConfigError, DataError
from counterfake.faces import Face
from counterfake.forensics.benford import quantisation_table
from counterfake.images import Preprocess
from counterfake.nets import NetConfig
from counterfake.nets.swap_family import SwapFamily
from counterfake.records import Dataset, Report, Sample, Version, write_version
from counterfake.registry import Registry
from counterfake.workspace import Workspace
from jobs import consent, signing
from jobs.auditing import audited
from jobs.console import Console

if TYPE_CHECKING:
    from jobs.convert import ConvertJob

LIKE_ROWS = 512  # real files whose encoding is looked at


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """One model into one new version of one dataset."""

    model: str  # registry reference (dcgan-faces, dcgan-faces@champion, dcgan-faces/3) or a bundle's folder
    into: str  # dataset to add to: a name in this workspace, or a file:// or s3:// URI
    count: int = 1000  # pictures; of a swap at most the pictures there are
    faces: str = ""  # dataset of real faces to swap; only for face-swap models
    fraction: float = 1.0  # of the real faces, at most so many are swapped
    purpose: Literal["", "detector-training"] = (
        ""  # of swaps: allows faces of consent research, never exported
    )
    blending: Blending = dataclasses.field(default_factory=Blending)  # how swapped faces are pasted
    like: str = ""  # dataset whose formats and qualities are copied; "" = the one the model was trained on
    size: int = 0  # side of generated pictures, pixels; 0 = as the generator makes them
    truncation: float = 0.0  # noise beyond so many standard deviations is drawn again; 0 = never
    batch: int = 64  # pictures at a time
    seed: int = 0
    sign: provenance.Signing = dataclasses.field(
        default_factory=provenance.Signing
    )  # C2PA key for every file
    audit: bool = True  # look for leaks and shortcuts in the version afterwards

    def __post_init__(self) -> None:
        if not self.model or not self.into:
            raise ConfigError("generate needs --set model=NAME and --set into=DATASET")
        if (
            self.count < 1
            or self.batch < 1
            or not 0 < self.fraction <= 1
            or self.truncation < 0
            or self.size < 0
        ):
            raise ConfigError(
                "generate needs count and batch >= 1, fraction in (0, 1], truncation and size >= 0"
            )


class Model(NamedTuple):
    """A loaded bundle and the name its pictures carry."""

    bundle: bundles.Bundle
    net: Any
    maker: str
    signer: provenance.Signer | None = None  # of the files it makes

    @property
    def preprocess(self) -> Preprocess:
        return from_dict(Preprocess, self.bundle.info["preprocess"])

    @property
    def swap_config(self) -> SwapFamily:
        config = from_dict(NetConfig, self.bundle.config["faceswap"])  # type: ignore[type-abstract]
        assert isinstance(config, SwapFamily), f"bundle {self.maker} holds a {type(config).__name__}"
        return config


class Encoding(NamedTuple):
    """How a file is written."""

    format: Literal["jpeg", "png", "webp"]
    quality: int


def run(
    job: GenerateJob | ConvertJob, workspace: Workspace, *, console: Console | None = None
) -> dict[str, Any]:
    """Generate, encode, mark and store; returns the version and what went into it, of a conversion what was made."""
    console = console or Console(quiet=True)
    if not isinstance(job, GenerateJob):
        converted: dict[str, Any] = _convert().run(job, workspace, console=console)
        return converted
    started, report = time.monotonic(), Report()
    signer = signing.signer(job.sign)
    model = load(job.model, workspace)._replace(signer=signer)
    make = {"generator": generated, "faceswap": swapped}.get(model.bundle.kind)
    if make is None:
        raise ConfigError(
            f"{job.model} is a {model.bundle.kind}; only generators and face-swap models make pictures"
        )
    uri = workspace.dataset(job.into)
    console.stage(f"{model.maker} into {uri}")
    samples, sources = make(job, model, workspace)
    with console.progress("pictures", job.count) as advance:
        version = write_version(
            uri,
            _counted(samples, advance),
            sources=sources,
            parent="append",
            report=report,
            writer={
                "job": "generate",
                "settings": to_dict(job),
                "job_digest": digest(job),
                "model": model.bundle.digest,
            },
            cache=workspace.cache,
        )
    result = _summary(uri, version, model, report, time.monotonic() - started)
    console.event(
        f"{report.rows} new pictures by {model.maker} -> {result['dataset']} ({result['seconds']:.1f} s)"
    )
    if job.audit:
        result["audit"] = audited(uri, version, workspace, console)
    return result


def load(reference: str, workspace: Workspace) -> Model:
    """The model that a registry reference or a bundle's folder names, verified."""
    if Path(reference).is_dir():
        bundle = bundles.read(Path(reference))
        maker = f"{bundle.name}@{bundle.digest[:8]}"
    else:
        registry = Registry.at(workspace)
        found = registry.get(reference.removesuffix("@latest"))
        bundle = bundles.read(registry.fetch_digest(found.digest, workspace.cache))
        maker = f"{found.name}@{found.version}"
    nets = bundles.load_nets(bundle) if bundle.kind in ("generator", "faceswap") else {}
    return Model(bundle, nets.get(bundle.kind), maker)


# -- generators -----------------------------------------------------------------------------------------------------


def generated(
    job: GenerateJob, model: Model, workspace: Workspace
) -> tuple[Iterator[Sample], dict[str, Any]]:
    """Samples of a generator, and their terms: those of what it learned from, whatever `like` their files are written."""
    like, version = _like(job, model, workspace)
    source = f"generated by {model.maker}"
    facts = {source: consent.learned(model.bundle.info)}
    return _from_noise(job, model, like, version, source), facts


def _from_noise(
    job: GenerateJob, model: Model, like: Dataset, version: Version, source: str
) -> Iterator[Sample]:
    rows = list(_first_rows(like, version))
    encodings = [encoding(row.media) for row in rows if row.image is not None]
    noise = draw_noise(job, int(model.bundle.config["generator"]["noise_size"]))
    index = 0
    for chunk in torch.split(noise, job.batch):
        asked = _asked(model, index, len(chunk))
        with torch.inference_mode():
            batch = images.to_uint8(model.net(chunk, *asked)).permute(0, 2, 3, 1).numpy()
        for place, pixels in enumerate(batch):
            pixels = images.resize(pixels, job.size, job.size) if job.size else np.ascontiguousarray(pixels)
            made: dict[str, Any] = {
                "fake": 1,
                "maker": model.maker,
                "source": source,
                "path": f"{model.maker}/{job.seed}/{index:06d}",
                "class_id": int(asked[0][place]) if asked else None,
            }
            if not encodings:
                yield Sample(pixels=pixels, **made)
            else:
                chosen = encodings[int(np.random.default_rng([job.seed, index]).integers(len(encodings)))]
                box = face_box(len(pixels), model.preprocess, rows)
                method = "generator" if box else None
                data = _write(pixels, chosen, model, "trainedAlgorithmicMedia")
                attributes = {
                    "format": chosen.format,
                    "quality": chosen.quality,
                    "seed": job.seed,
                    "index": index,
                }
                yield Sample(image=data, face_box=box, face_method=method, attributes=attributes, **made)
            index += 1


def _asked(model: Model, start: int, count: int) -> tuple[torch.Tensor, ...]:
    """What a conditional generator is told, (count,) int64: its classes in turn; () for one without."""
    classes = getattr(model.net, "classes", 0)
    return (torch.arange(start, start + count) % classes,) if classes else ()


def draw_noise(job: GenerateJob, width: int) -> torch.Tensor:
    """(count, Z) standard normal, beyond `truncation` drawn again; the same for every batch size."""
    noise = torch.empty(job.count, width)
    generator = torch.Generator().manual_seed(job.seed)
    if job.truncation:
        return torch.nn.init.trunc_normal_(noise, a=-job.truncation, b=job.truncation, generator=generator)
    return noise.normal_(generator=generator)


def face_box(
    side: int, preprocess: Preprocess, rows: list[Sample]
) -> tuple[float, float, float, float] | None:
    """Where the face of a generated picture is: what the training crops were made from, None if nobody knows.

    A generator of face crops repeats their margin; one of whole pictures has its face where the real ones have it.
    """
    if preprocess.needs_face:
        box = side / preprocess.margin
        return ((side - box) / 2, (side - box) / 2, box, box)
    known = [_relative_box(row) for row in rows if row.face_box is not None and row.image is not None]
    if not known:
        return None
    x, y, width, height = (float(v) * side for v in np.median(known, axis=0))
    return (x, y, width, height)


def _relative_box(row: Sample) -> list[float]:
    assert row.face_box is not None
    width, height = media.header_size(row.media, media.sniff(row.media))
    return [value / edge for value, edge in zip(row.face_box, (width, height, width, height), strict=True)]


# -- face swaps -----------------------------------------------------------------------------------------------------


def swapped(job: GenerateJob, model: Model, workspace: Workspace) -> tuple[Iterator[Sample], dict[str, Any]]:
    """Pictures of `faces` with someone else's face, and their terms: those of each picture and of the model.

    Raises DataError for pictures of people, or a model of people, who have not agreed; see consent.py."""
    if not job.faces:
        raise ConfigError(f"{model.maker} swaps faces: name the real ones with --set faces=DATASET")
    dataset = Dataset.open(workspace.dataset(job.faces), cache=workspace.cache)
    version = dataset.version(dataset.pinned)
    cast = Cast(model.swap_config.identities, version)
    chosen = choose(job, dataset, version, cast)
    used = consent.named(version.sources, set(chosen.values()))
    info = model.bundle.info
    consent.require({**used, **(info.get("sources") or {})}, job.purpose)
    facts = {_swap_source(model, name): consent.marked(known, model=info) for name, known in used.items()}
    config = model.swap_config
    painters = [Painter(model.net, config, model.preprocess, name) for name in config.identities]
    return _swaps(_Swapping(job, model, cast, painters, facts), dataset, version, set(chosen)), facts


class Cast:
    """Whose face a picture may wear: people the model knows, of the picture's own split, else of any."""

    def __init__(self, identities: tuple[str, ...], version: Version) -> None:
        homes = {row["identity"]: row["split"] for row in version.counts if row["fake"] != 1}
        self.identities = identities
        self.by_split = {
            split: [name for name in identities if homes.get(name) == split] for split in version.splits
        }

    def targets(self, split: str, own: str | None) -> list[int]:
        """Indices of the faces for a picture of `own` in `split`; [] if nobody but itself is left."""
        known = self.by_split.get(split) or self.identities
        return [index for index, name in enumerate(self.identities) if name in known and name != own]

    def index(self, own: str | None, otherwise: int) -> int:
        """The index of a person; `otherwise` of one whom the model does not know."""
        return self.identities.index(own) if own in self.identities else otherwise

    def choose(self, split: str, sample: Sample, seed: int) -> int:
        """One of the targets, by hash."""
        others = self.targets(split, sample.identity)
        return others[_hash(seed, f"target/{sample.id}") % len(others)]


def choose(job: GenerateJob, dataset: Dataset, version: Version, cast: Cast) -> dict[str, str]:
    """{id: source} of the real faces to swap: those whose hash with the seed is smallest. DataError if there are none."""
    eligible: dict[str, str] = {}
    for split in version.splits:
        table = dataset.read(version, split, columns=["id", "fake", "face_box", "identity", "source"])
        eligible |= {
            row["id"]: row["source"]
            for row in table.to_pylist()
            if row["fake"] == 0 and row["face_box"] is not None and cast.targets(split, row["identity"])
        }
    if not eligible:
        raise DataError(
            f"{job.faces} has no real picture with a face_box; ingest it with --set faces=cascade"
        )
    ordered = sorted(eligible, key=lambda identifier: _hash(job.seed, identifier))
    wanted = min(job.count, max(1, round(job.fraction * len(eligible))))
    return {identifier: eligible[identifier] for identifier in ordered[:wanted]}


class _Swapping(NamedTuple):
    """What every swap of a job needs."""

    job: GenerateJob
    model: Model
    cast: Cast
    painters: list[Painter]  # of each person
    facts: Mapping[str, Mapping[str, Any]]  # of each source of swaps


def _swaps(how: _Swapping, dataset: Dataset, version: Version, chosen: set[str]) -> Iterator[Sample]:
    pending: list[Sample] = []
    for split in version.splits:
        for sample in dataset.samples(version, split):
            if sample.id in chosen:
                pending.append(dataclasses.replace(sample, split=split))
            if len(pending) == how.job.batch:
                yield from _swap_batch(how, pending)
                pending = []
    yield from _swap_batch(how, pending) if pending else ()


def _swap_batch(how: _Swapping, samples: list[Sample]) -> Iterator[Sample]:
    """Cut, painted, masked and blended as `convert` does it, by the points of a face where they are known."""
    wearers = [how.cast.choose(str(sample.split), sample, how.job.seed) for sample in samples]
    given = [(media.decode_trusted(sample.media), [_face(sample)]) for sample in samples]
    made: dict[int, NDArray[np.uint8]] = {}
    for wearer in sorted(set(wearers)):
        rows = [row for row, who in enumerate(wearers) if who == wearer]
        shown = [how.cast.index(samples[row].identity, wearer) for row in rows]
        painted = how.painters[wearer].convert([given[row] for row in rows], how.job.blending, shown)
        made |= dict(zip(rows, painted, strict=True))
    for row, (sample, wearer) in enumerate(zip(samples, wearers, strict=True)):
        yield _composed(how, sample, made[row], how.cast.identities[wearer])


def _face(sample: Sample) -> Face:
    assert sample.face_box is not None, "`choose` takes rows with a face_box only"
    flat = sample.landmarks or []
    return Face(sample.face_box, 1.0, list(zip(flat[::2], flat[1::2], strict=True)) or None)


def _composed(how: _Swapping, sample: Sample, pixels: NDArray[np.uint8], target: str) -> Sample:
    """One swap as a row, encoded like the picture it was made from."""
    model, source = how.model, _swap_source(how.model, sample.source)
    terms = consent.TERMS if how.facts[source].get("export") is False else ""
    return dataclasses.replace(
        sample,
        id="",
        image=_write(pixels, encoding(sample.media), model, SOURCE_TYPE, terms),
        pixels=None,
        path=f"{model.maker}/{sample.path}",
        fake=1,
        maker=model.maker,
        source=source,
        attributes={**sample.attributes, "swapped_from": sample.id, "target_identity": target},
    )


def _swap_source(model: Model, source: str) -> str:
    return f"{source} swapped by {model.maker}"


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "big")


# -- files ----------------------------------------------------------------------------------------------------------


def encoding(data: bytes) -> Encoding:
    """Format of a file and its JPEG quality: the one whose standard luma table has the same sum as the file's first."""
    kind = media.sniff(data)
    if kind != "jpeg":
        return Encoding("png" if kind == "png" else "webp", 100)
    at = data.find(b"\xff\xdb")  # the first table is luma's
    total = sum(data[at + 5 : at + 69])
    sums = [abs(int(quantisation_table(quality).sum()) - total) for quality in range(1, 101)]
    return Encoding("jpeg", 1 + int(np.argmin(sums)))


def _write(
    pixels: NDArray[np.uint8],
    chosen: Encoding,
    model: Model,
    source_type: provenance.SourceType,
    terms: str = "",
) -> bytes:
    data = media.encode(pixels, chosen.format, chosen.quality)
    return provenance.mark(data, maker=model.maker, source_type=source_type, terms=terms, signer=model.signer)


def _like(job: GenerateJob, model: Model, workspace: Workspace) -> tuple[Dataset, Version]:
    """The dataset whose files are copied in kind: `like`, or what the model was trained on."""
    trained = model.bundle.info["dataset"] or {}
    if not job.like and not trained:
        raise ConfigError(
            f"{model.maker} does not say what it was trained on; name a dataset with --set like=DATASET"
        )
    uri = workspace.dataset(job.like) if job.like else f"{trained['uri']}@{trained['version']}"
    dataset = Dataset.open(uri, cache=workspace.cache)
    return dataset, dataset.version(dataset.pinned)


def _first_rows(dataset: Dataset, version: Version) -> Iterator[Sample]:
    """Real rows of the largest split; ids are hashes, so the first ones are a random sample."""
    split = max(version.splits, key=version.rows)
    found = 0
    for sample in dataset.samples(version, split):
        if sample.fake != 1:
            yield sample
            found += 1
        if found == LIKE_ROWS:
            return


def _counted(samples: Iterator[Sample], advance: Callable[[int], None]) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        advance(1)


def _summary(uri: str, version: Version, model: Model, report: Report, seconds: float) -> dict[str, Any]:
    mine = [row for row in version.counts if row["maker"] == model.maker]
    return {
        "dataset": f"{uri}@{version.number}",
        "version": version.number,
        "digest": version.digest,
        "maker": model.maker,
        "splits": {name: sum(row["rows"] for row in mine if row["split"] == name) for name in version.splits},
        "rows": version.rows(),
        "report": report.to_dict(),
        "seconds": round(seconds, 2),
        "pictures_per_second": round(report.seen / max(seconds, 1e-9), 1),
    }


# -- presets --------------------------------------------------------------------------------------------------------


def gan_faces_demo() -> GenerateJob:
    """1,000 faces of the demo's GAN beside the real ones."""
    return GenerateJob(model="dcgan-faces", into="faces-demo")


def swap_faces_demo() -> GenerateJob:
    """500 of the demo's faces with someone else's face."""
    return GenerateJob(model="swap-faces", into="faces-demo", faces="faces-demo", count=500)


def gan_samples() -> GenerateJob:
    """10,000 samples of any generator as a dataset of their own."""
    return GenerateJob(model="dcgan-mnist", into="gan-samples", count=10_000)


def swap_video() -> ConvertJob:
    """Faces in pictures and videos of your own, from file to file."""
    job: ConvertJob = _convert().swap_video()
    return job


PRESETS: dict[str, Callable[[], GenerateJob | ConvertJob]] = {
    "gan-faces-demo": gan_faces_demo,
    "swap-faces-demo": swap_faces_demo,
    "gan-samples": gan_samples,
    "swap-video": swap_video,
}


def _convert() -> ModuleType:
    """The job that converts files; it loads models by this module's `load`, so it is not imported at the top."""
    from jobs import convert

    return convert
