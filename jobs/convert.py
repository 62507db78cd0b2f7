"""Swap faces in pictures and videos: files in, marked files out, and rows of a dataset if asked.

    counterfake run generate swap-video --set input=talk.mp4 --set model=swap-faces --set identity=anna \\
        --set into=out/talk.mp4 --set consent=subjects
    counterfake run generate swap-video --set input=clips --set model=swap-faces@champion --set identity=anna \\
        --set into=out --set consent=research --set purpose=detector-training --set into_dataset=swaps --set licence=…

`run convert` is the same job. `input` is a picture, a video or a folder of them. Whatever is written says that it was generated: words in the picture
(`label=false` leaves them out, which is recorded) and always an XMP mark; with a key (`sign.certificate`, `sign.key`, see
signing.py) also a C2PA manifest. Beside each file lies FILE.json with settings,
digests and figures; a finished file is not made again. What has no face, or cannot be read, is named and gives no file.
Consent is that of the people in the input; those of the model are checked too. See EXPERIMENTS for frames/s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from counterfake import conversion, faces, media, provenance, video
from counterfake.config import digest, to_dict
from counterfake.conversion import ConversionConfig, Film, Painter
from counterfake.errors import ConfigError, CounterfakeError, DataError, MediaError, NotFoundError
from counterfake.fingerprint import perceptual_hash
from counterfake.records import Report, Sample, write_version
from counterfake.samples import Skipped
from counterfake.sources import Consent
from counterfake.sources.video import FaceCut, below
from counterfake.storage import write_atomic
from counterfake.workspace import Workspace
from jobs import consent, generate, signing
from jobs.auditing import audited
from jobs.console import Console

SUFFIXES: dict[str, Literal["jpeg", "png", "webp"]] = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".png": "png",
    ".webp": "webp",
}
QUALITY = 95  # of a JPEG made from a picture that was none
FORMAT = 1  # of FILE.json
LABELLED = "label in the cut"  # why a frame gave no row


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertJob(ConversionConfig):
    """One person's face into one file, or into every file of a folder."""

    input: str = ""  # a picture, a video, or a folder of them
    into: str = ""  # the file to write, .mp4 for a video; a folder for a folder
    model: str = ""  # registry reference or bundle folder of a face-swap model
    identity: str = ""  # whose face is painted; one of the model's people
    consent: Consent = "none"  # of the people in the input: subjects, synthetic, or research with a purpose
    purpose: Literal["", "detector-training"] = ""  # allows consent research; what is made is never exported
    into_dataset: str = ""  # also add rows to this dataset: cuts of the written videos, and the pictures
    licence: str = ""  # of the input; needed for a dataset
    source: str = ""  # of the rows; the name the originals were ingested under keeps both in one split. "" = input's name
    subject: str = ""  # who is in the input, as `identity` of the rows; "" = unknown
    rows: FaceCut = dataclasses.field(default_factory=FaceCut)  # which frames of a video become rows, and how
    sign: provenance.Signing = dataclasses.field(
        default_factory=provenance.Signing
    )  # C2PA key for every file
    audit: bool = True  # of a dataset: look for leaks and shortcuts in the version afterwards

    def required(self) -> None:
        """Raises ConfigError for what cannot be left out."""
        missing = [name for name in ("input", "model", "identity", "into") if not getattr(self, name)]
        if missing:
            raise ConfigError(f"swap-video needs {', '.join(f'--set {name}=…' for name in missing)}")
        if self.into_dataset and not self.licence:
            raise ConfigError("into_dataset needs --set licence=…, the licence of the input")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """What is the same for every file."""

    job: ConvertJob
    model: generate.Model
    painter: Painter
    detector: faces.FaceDetector
    terms: str  # what the files may be used for; "" = no limits
    console: Console
    followed: dict[Path, conversion.Followed] = dataclasses.field(
        default_factory=dict
    )  # videos looked at already

    def follow(self, source: Path) -> conversion.Followed:
        """Where the faces of a video are, found once."""
        if source not in self.followed:
            frames = video.probe(source, video.LOCAL).frames
            with self.console.progress(f"finding faces in {source.name}", frames, rate="frames/s") as advance:
                self.followed[source] = conversion.follow(source, self.detector, self.job, advance)
        return self.followed[source]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how a file looks."""
        tree = to_dict(self.job)
        other = {
            "input",
            "into",
            "model",
            "into_dataset",
            "licence",
            "source",
            "subject",
            "rows",
            "sign",
            "audit",
        }
        signed = {"signer": self.model.signer.fingerprint} if self.model.signer else {}
        return {"format": FORMAT, "model": self.model.bundle.digest, "terms": self.terms, **signed} | {
            name: value for name, value in tree.items() if name not in other
        }


def run(job: ConvertJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Convert every file -> {"made", "refused", …}. Raises DataError or MediaError where a single file, or all, fail."""
    job.required()
    console, started = console or Console(quiet=True), time.monotonic()
    todo = list(_files(job))
    work = _prepared(job, workspace, console)
    made, refused = [], []
    for source, target in todo:
        try:
            made.append(_one(work, source, target))
        except (DataError, MediaError, NotFoundError) as error:
            if len(todo) == 1:
                raise _named(error, source) from error
            refused.append({"file": str(source), "reason": str(error)})
            console.event(f"refused {source.name}: {error}")
    if not made:
        raise DataError(f"none of the {len(todo)} files of {job.input} was converted; {refused[0]['reason']}")
    result = {"maker": work.model.maker, "identity": job.identity, "label": job.label, "terms": work.terms,
              "made": made, "refused": refused}  # fmt: skip
    if job.into_dataset:
        result |= _dataset(work, made, workspace)
    return result | {"seconds": round(time.monotonic() - started, 2)}


def swap_video() -> ConvertJob:
    """Name input, model, identity, into and consent."""
    return ConvertJob()


PRESETS: dict[str, Callable[[], ConvertJob]] = {"swap-video": swap_video}


# -- before ---------------------------------------------------------------------------------------------------------


def _files(job: ConvertJob) -> Iterator[tuple[Path, Path]]:
    """(source, target) of everything that is to be converted. Raises ConfigError, NotFoundError."""
    given, into = Path(job.input).expanduser(), Path(job.into).expanduser()
    if not given.exists():
        raise NotFoundError(f"input={job.input} does not exist; name a picture, a video or a folder")
    if given.is_file():
        yield given, into / given.name if into.is_dir() else into
        return
    if into.is_file() or into.resolve() == given.resolve():
        raise ConfigError(f"input is a folder, so into={job.into} must be another folder")
    names = below(given)
    if not names:
        raise NotFoundError(f"input={job.input} is an empty folder")
    for name in names:
        is_picture = Path(name).suffix.lower() in SUFFIXES
        yield given / name, into / (name if is_picture else str(Path(name).with_suffix(".mp4")))


def _prepared(job: ConvertJob, workspace: Workspace, console: Console) -> _Work:
    """Everything loaded. Raises DataError where people have not agreed, ConfigError for another kind of model."""
    _check_consent(job)
    signer = signing.signer(job.sign)
    model = generate.load(job.model, workspace)._replace(signer=signer)
    if model.bundle.kind != "faceswap":
        raise ConfigError(f"{job.model} is a {model.bundle.kind}; swap-video needs a face-swap model")
    info = model.bundle.info
    consent.require(info.get("sources") or {}, job.purpose)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    painter = Painter(model.net, model.swap_config, model.preprocess, job.identity, device)
    detector = conversion.find_with(job, model.preprocess)
    console.stage(f"{job.input} as {job.identity} by {model.maker}, on {device}")
    return _Work(
        job=job,
        model=model,
        painter=painter,
        detector=detector,
        terms=consent.TERMS if consent.bound({"consent": job.consent}, model=info) else "",
        console=console,
    )


def _check_consent(job: ConvertJob) -> None:
    if job.consent in consent.FREE or (job.consent == "research" and job.purpose == consent.PURPOSE):
        return
    remedy = (
        f"add --set purpose={consent.PURPOSE}: what is made may then not be exported"
        if job.consent == "research"
        else "say --set consent=subjects if the people shown agreed, consent=synthetic if they are nobody"
    )
    raise DataError(
        f"face swaps need the consent of the people shown; {job.input} has consent {job.consent}; {remedy}"
    )


# -- one file -------------------------------------------------------------------------------------------------------


def _one(work: _Work, source: Path, target: Path) -> dict[str, Any]:
    """Convert a file, or find it done -> what FILE.json says of it."""
    if target.exists() and target.samefile(source):
        raise ConfigError(f"{target} is the input itself; name another file")
    receipt = target.with_name(f"{target.name}.json")
    identity = digest({**work.settings, "input": _sha256(source), "format_of": target.suffix.lower()})
    if target.exists():
        known = _receipt(receipt)
        if known is None:
            raise ConfigError(f"{target} exists and was not made here; delete it or choose another name")
        if known["digest"] == identity and known["sha256"] == _sha256(target):
            return {**known["made"], "reused": True}
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file:
        kind = media.sniff(file.read(64))
    receipt.unlink(missing_ok=True)
    made = _picture(work, source, target) if kind in media.PICTURES else _video(work, source, target)
    made = {"file": str(target), "input": str(source), **made, "label": work.job.label, "maker": work.model.maker,
            "identity": work.job.identity, "terms": work.terms, "reused": False}  # fmt: skip
    body = {"digest": identity, "sha256": _sha256(target), "settings": work.settings, "made": made}
    write_atomic(receipt, json.dumps(body, indent=1).encode())
    return made


def _picture(work: _Work, source: Path, target: Path) -> dict[str, Any]:
    data = source.read_bytes()
    made = conversion.convert_picture(work.painter, media.decode(data), work.detector, work.job)
    shown = provenance.label(made.pixels) if work.job.label else made.pixels
    write_atomic(target, _encoded(work, shown, data, target))
    work.console.event(f"{source.name} -> {target}: {len(made.faces)} faces")
    return {"kind": "picture", "faces": len(made.faces), "face_box": list(made.faces[0].box)}


def _encoded(work: _Work, pixels: media.Pixels, original: bytes, target: Path) -> bytes:
    """In the format of the target's name, a JPEG in the quality of the original, marked."""
    if target.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{target.name} is no name of a picture; write {', '.join(SUFFIXES)}")
    before = generate.encoding(original)
    quality = before.quality if before.format == "jpeg" else QUALITY
    chosen = SUFFIXES[target.suffix.lower()]
    data = media.encode(pixels, chosen, 100 if chosen == "webp" else quality)
    return _signed(work, data)


def _video(work: _Work, source: Path, target: Path) -> dict[str, Any]:
    if target.suffix.lower() not in (".mp4", ".m4v"):
        raise ConfigError(f"a video is written as MP4; call it {target.with_suffix('.mp4').name}")
    started = time.monotonic()
    followed = work.follow(source)
    found = time.monotonic()
    with work.console.progress(f"swapping {source.name}", followed.info.frames, rate="frames/s") as advance:
        film = conversion.convert_video(
            work.painter,
            followed,
            target,
            work.job,
            maker=work.model.maker,
            terms=work.terms,
            signer=work.model.signer,
            progress=advance,
        )
    done = time.monotonic()
    speed = {"finding": film.frames / (found - started), "swapping": film.frames / (done - found),
             "both": film.frames / (done - started)}  # fmt: skip
    _say(work.console, source, target, film, speed["both"])
    return {
        "kind": "video",
        **dataclasses.asdict(film),
        "frames_per_second": {k: round(v, 2) for k, v in speed.items()},
    }


def _say(console: Console, source: Path, target: Path, film: Film, speed: float) -> None:
    notes = [f"{film.damaged} damaged frames left out"] * bool(film.damaged)
    notes += ["no sound"] * (not film.audio)
    extra = f" ({', '.join(notes)})" if notes else ""
    console.event(
        f"{source.name} -> {target}: {film.swapped} of {film.frames} frames swapped at {speed:.1f} frames/s{extra}"
    )


def _receipt(path: Path) -> dict[str, Any] | None:
    """What FILE.json says; None if there is none of ours."""
    try:
        known = json.loads(path.read_bytes())
        return known if {"digest", "sha256", "made"} <= known.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _named(error: CounterfakeError, source: Path) -> CounterfakeError:
    text = f"{source.name}: {error}"
    return MediaError(error.reason, text) if isinstance(error, MediaError) else type(error)(text)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- rows -----------------------------------------------------------------------------------------------------------


def _dataset(work: _Work, made: list[dict[str, Any]], workspace: Workspace) -> dict[str, Any]:
    """Rows of what was made as a new version of `into_dataset`."""
    job, report = work.job, Report()
    origin = job.source or Path(job.input).stem
    source = f"{origin} swapped by {work.model.maker}"
    facts = consent.marked({"licence": job.licence, "consent": job.consent}, model=work.model.bundle.info)
    try:
        version = write_version(
            workspace.dataset(job.into_dataset),
            (item for one in made for item in _rows(work, one, source, origin)),
            sources={source: facts},
            parent="append",
            report=report,
            writer={
                "job": "convert",
                "settings": to_dict(job),
                "job_digest": digest(job),
                "model": work.model.bundle.digest,
            },
            cache=workspace.cache,
        )
    except DataError as error:
        if report.partly[LABELLED] and not report.rows:
            raise DataError(
                f"no rows for {job.into_dataset}: every cut holds a part of the label; add --set label=false"
            ) from error
        raise
    uri = workspace.dataset(job.into_dataset)
    result = {"dataset": f"{uri}@{version.number}", "report": report.to_dict()}
    work.console.event(f"{report.rows} rows -> {result['dataset']}")
    if job.audit:
        result["audit"] = audited(uri, version, workspace, work.console)
    return result


def _rows(work: _Work, made: dict[str, Any], source: str, origin: str) -> Iterator[Sample | Skipped]:
    """Cuts of a written video, where its faces are known to be; or the picture, without the label."""
    job, name = work.job, Path(made["input"])
    base = Path(job.input)
    inside = name.relative_to(base) if base.is_dir() else Path(name.name)
    facts = Sample(
        image=b"",
        path=f"{work.model.maker}/{inside.as_posix()}",
        fake=1,
        maker=work.model.maker,
        identity=job.subject or None,
        source=source,
        video=f"{origin}/{inside.with_suffix('').as_posix()}" if made["kind"] == "video" else None,
        attributes={
            "swapped_from": inside.as_posix(),
            "target_identity": job.identity,
            "labelled": job.label,
        },
    )
    if made["kind"] == "picture":
        yield _picture_row(work, facts, name, Path(made["file"]))
        return
    frames = job.rows.frames_of(Path(made["file"]))
    for item in job.rows.cut(frames, facts, work.follow(name).tracks(), work.detector.method):
        if isinstance(item, Sample) and _shows_label(job, item):
            yield Skipped(facts.path, LABELLED, whole=False)
        else:
            yield _marked(work, item) if isinstance(item, Sample) else item


def _picture_row(work: _Work, facts: Sample, source: Path, target: Path) -> Sample:
    """Made again without the label, which a detector would learn instead of the face."""
    data = source.read_bytes()
    pixels = media.decode(data)
    made = conversion.convert_picture(work.painter, pixels, work.detector, work.job)
    return dataclasses.replace(
        facts,
        id="",
        image=_encoded(work, made.pixels, data, target),
        face_box=made.faces[0].box,
        face_method=work.detector.method,
        face_margin=1.0,
        attributes={**facts.attributes, "labelled": False} | _phash(pixels),
    )


def _phash(pixels: media.Pixels) -> dict[str, str]:
    """That of the original, which the swap must share a split with."""
    found = perceptual_hash(pixels)
    return {"phash": found} if found else {}


def _marked(work: _Work, row: Sample) -> Sample:
    return dataclasses.replace(row, id="", image=_signed(work, row.media))


def _signed(work: _Work, data: bytes) -> bytes:
    """The file with its mark, and its manifest where there is a key."""
    kind, model = conversion.SOURCE_TYPE, work.model
    return provenance.mark(data, maker=model.maker, source_type=kind, terms=work.terms, signer=model.signer)


def _shows_label(job: ConvertJob, row: Sample) -> bool:
    """Whether the cut of a frame holds a part of the label."""
    if not job.label:
        return False
    width, height = row.attributes["frame_size"]
    x, y, w, h = row.attributes["box_in_frame"]
    whole = (0, 0, width, height)
    cut = (
        whole if job.rows.keep == "frame" else faces.crop_box((x, y, w, h), job.rows.margin, (width, height))
    )
    left, top, right, _ = provenance.label_box((width, height))
    return cut[0] < right and cut[2] > left and cut[3] > top
