"""Judge a face-swap model: who the swaps are taken for, whether they move like their source, how well faces are painted.

    counterfake run evaluate-swap --set model=swap-faces                            people of the dataset it was trained on
    counterfake run evaluate-swap --set model=swap-faces --set faces=faces@3 --set detector=ensemble@champion
    counterfake run evaluate-swap --set model=swap-faces --set video=clip.mp4       also the flicker in this video

Nets are trained first on real pictures of the model's people (reading.py): one tells them apart by the face alone, without
hair, background and colour of the skin, which a swap leaves to its source by design; one by the whole crop, for
comparison; one reads pose and expression. They are kept under `cache/readers` and used again for models of the same
people. Their own figures on held-out real pictures stand beside those of the swaps: they bound what can be measured.
Procedural people are photographed anew, so that neither model nor readers have seen the pictures, and the true swap, mask,
pose and expression are known; of others every third picture is held out from the readers, not from the model.
Leaves `runs/evaluations/<model>-<digest>-swap/` with swap.json, report.html and matrix.png, and the same in MLflow
(experiment "evaluation").
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake import config, conversion, faces, images, media, predictor, provenance, verdicts
from counterfake.blending import soft_mask
from counterfake.conversion import ConversionConfig
from counterfake.errors import ConfigError
from counterfake.evaluation import report, swap
from counterfake.evaluation.reading import Reader, ReadingConfig
from counterfake.evaluation.report import Json, KeyFigures, Pictures, Section, Table, Text
from counterfake.faces import Box, FaceDetector
from counterfake.predictor import EnsemblePredictor
from counterfake.records import Dataset
from counterfake.storage import write_atomic
from counterfake.temporary import temporary_folder
from counterfake.tracking import Run, Tracker
from counterfake.workspace import Workspace
from jobs import evaluate, generate
from jobs.console import Console
from jobs.swap_readers import Readers
from jobs.swap_studio import EXPRESSION, PARAMETERS, POSE, Photo, Studio, Swap, pictures

Pixels = NDArray[np.uint8]

READABLE = (
    0.5  # r on real pictures from which a parameter is judged: a reader that cannot see it says nothing
)
MATRIX, TILE = 8, 96  # most people in the picture matrix; pixels of a face there


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSwapJob:
    """One face-swap model against the real pictures of its people."""

    model: str = ""  # registry reference or bundle folder
    faces: str = ""  # dataset with real pictures of the model's people; "" = the one it was trained on
    pictures: int = 16  # held-out pictures of each person that are swapped
    gallery: int = 100  # real pictures of each person that the readers learn from, at most
    strangers: int = (
        1500  # procedural people whose faces teach to read pose and expression; two pictures of each
    )
    reading: ReadingConfig = dataclasses.field(default_factory=ReadingConfig)
    conversion: ConversionConfig = dataclasses.field(
        default_factory=ConversionConfig
    )  # how faces are pasted back
    detector: str = ""  # detector or ensemble that the swaps try to evade; "" = none
    threshold: float = 0.5  # probability from which it calls a picture fake
    video: str = ""  # a video with a face, for the flicker; "" = none
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.gallery < 2 or self.strangers < 10 or not 0 < self.threshold < 1:
            raise ConfigError(
                "pictures >= 1, gallery >= 2, strangers >= 10 and threshold in (0, 1) are needed"
            )


PRESETS: dict[str, Callable[[], EvaluateSwapJob]] = {"swap": EvaluateSwapJob}


def run(job: EvaluateSwapJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Read, swap, measure, draw, log; returns the figures and where they lie."""
    console = console or Console(quiet=True)
    if not job.model:
        raise ConfigError("model is not set; name a face-swap model, like --set model=swap-faces")
    model = generate.load(job.model, workspace)
    if model.bundle.kind != "faceswap":
        raise ConfigError(f"{job.model} is a {model.bundle.kind}; evaluate-swap judges face-swap models")
    studio = Studio(model)
    console.stage(f"judge {model.maker} by {job.pictures} pictures of each of {len(studio.names)} people")
    gallery, sources = pictures(studio, _dataset(job, model, workspace), job.gallery, job.pictures)
    swaps = studio.swaps(sources, job.conversion)
    console.event(
        f"{len(gallery)} real pictures for the readers, {len(sources)} held out, {len(swaps)} swaps"
    )
    readers = Readers(workspace.cache / "readers", job.reading)
    figures = measure(job, studio, gallery, sources, swaps, readers, console)
    figures |= _evasion(job, swaps, workspace) | _flicker(job, studio, model)
    matrix = _matrix(sources, swaps, len(studio.names))
    target = workspace.home / "evaluations" / f"{model.bundle.name}-{model.bundle.digest[:8]}-swap"
    with Tracker.at(workspace).start("evaluation", model.bundle.name, params=config.to_dict(job)) as log:
        tree = {"model": model.maker, "digest": model.bundle.digest, "people": list(studio.names), "figures": figures,
                "job": config.to_dict(job)}  # fmt: skip
        _publish(log, target, tree, matrix, _page(job, model, tree, matrix))
    for line in said(figures):
        console.event(line)
    return {**tree, "run_id": log.id, "report": str(target / "report.html")}


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures, without settings."""
    return {**result["figures"], "run_id": result["run_id"], "report": result["report"]}


def _dataset(job: EvaluateSwapJob, model: generate.Model, workspace: Workspace) -> Dataset:
    trained = model.bundle.info["dataset"] or {}
    if not job.faces and not trained:
        raise ConfigError(
            f"{model.maker} does not say what it was trained on; name its people with --set faces=DATASET"
        )
    uri = workspace.dataset(job.faces) if job.faces else f"{trained['uri']}@{trained['version']}"
    return Dataset.open(uri, cache=workspace.cache)


# -- figures --------------------------------------------------------------------------------------------------------


def measure(
    job: EvaluateSwapJob,
    studio: Studio,
    gallery: Sequence[Photo],
    sources: Sequence[Photo],
    swaps: Sequence[Swap],
    readers: Readers,
    console: Console,
) -> dict[str, Any]:
    """Every figure by name. Those of pose, true swap and mask need procedural people."""
    own = studio.paint(sources, [photo.who for photo in sources])
    rebuilt, wanted = np.stack([face for face, _ in own]), studio.middle([photo.crop for photo in sources])
    figures: dict[str, Any] = {"reconstruction": swap.reconstruction(rebuilt, wanted)}
    console.event("teach two nets to tell the people apart, one of them by the face alone")
    figures["identity"] = _identity(job, studio, gallery, sources, swaps, readers)
    if studio.numbers:
        console.event("teach a net to read pose and expression")
        figures |= _moves(job, studio, sources, rebuilt, swaps, readers)
        figures |= _truths(studio, sources, own, swaps)
    else:
        figures |= _points(swaps)
    return figures


def _identity(
    job: EvaluateSwapJob,
    studio: Studio,
    gallery: Sequence[Photo],
    sources: Sequence[Photo],
    swaps: Sequence[Swap],
    readers: Readers,
) -> dict[str, Any]:
    """Top-1 of painted and of pasted faces, by the face alone; beside it what the whole crop says.

    `pasted_true` (procedural people) is the true swap put back in the same way, `real` held-out pictures: the most that
    can be found."""
    shown = _shown(job, studio, swaps)
    known, real = (studio.middle([photo.crop for photo in photos]) for photos in (gallery, sources))
    views: dict[str, Callable[[Pixels], Pixels]] = {
        "face": lambda faces_: swap.face_only(faces_, soft_mask(studio.net_config.size)),
        "whole": lambda faces_: faces_,
    }
    found, who = {}, np.array([photo.who for photo in gallery])
    for view, seen in views.items():
        reader, named = readers.people(seen(known), who, len(studio.names))
        right_names = named(seen(real)) == [photo.who for photo in sources]
        found[view] = {
            **{kind: _retrieved(studio, named(seen(rows)), swaps) for kind, rows in shown.items()},
            "real": float(right_names.mean()),
            "reader_sha256": reader.sha256,
        }
    return {**found["face"], "whole": found["whole"]}


def _shown(job: EvaluateSwapJob, studio: Studio, swaps: Sequence[Swap]) -> dict[str, Pixels]:
    """(N, s, s, 3) of every swap as painted, as pasted back, and of the true swap pasted back."""
    pasted = {"pasted": [s.picture for s in swaps]}
    if studio.numbers:
        pasted["pasted_true"] = [studio.pasted_true(s, job.conversion) for s in swaps]
    cut = {
        kind: [studio.cut(p, s.source.face) for p, s in zip(made, swaps, strict=True)]
        for kind, made in pasted.items()
    }
    painted = np.stack([s.painted for s in swaps])
    return {"painted": painted, **{kind: studio.middle(crops) for kind, crops in cut.items()}}


def _retrieved(studio: Studio, named: NDArray[np.int64], swaps: Sequence[Swap]) -> dict[str, float]:
    target, source = [s.target for s in swaps], [s.source.who for s in swaps]
    return swap.retrieval(named, target, source, len(studio.names))


def _moves(
    job: EvaluateSwapJob,
    studio: Studio,
    sources: Sequence[Photo],
    rebuilt: Pixels,
    swaps: Sequence[Swap],
    readers: Readers,
) -> dict[str, Any]:
    """r of what is read off real pictures, reconstructions and swaps with the truth; ratios of swaps to reconstructions."""
    reader = readers.poses(studio, job.strangers, sources[0].pixels.shape[0], job.seed)
    truth = np.array([photo.parameters for photo in sources])
    shown = {
        "real": (studio.middle([photo.crop for photo in sources]), truth),
        "reconstruction": (rebuilt, truth),
        "swap": (np.stack([s.painted for s in swaps]), np.array([s.source.parameters for s in swaps])),
    }
    found = {
        kind: swap.agreement(reader.read(seen), known, PARAMETERS) for kind, (seen, known) in shown.items()
    }
    judged = {
        "pose": [name for name in POSE if found["real"].get(name, 0) >= READABLE],
        "expression": [name for name in EXPRESSION if found["real"].get(name, 0) >= READABLE],
    }
    return {kind: _compared(found, names, reader) for kind, names in judged.items()}


def _compared(
    found: Mapping[str, Mapping[str, float]], names: Sequence[str], reader: Reader
) -> dict[str, Any]:
    means = {
        kind: float(np.mean([r[name] for name in names])) if names else None for kind, r in found.items()
    }
    made, most = means["swap"], means["reconstruction"]
    ratio = made / most if made is not None and most else None
    each = {kind: {name: r[name] for name in names} for kind, r in found.items()}
    return {**means, "ratio": ratio, "judged": list(names), "each": each, "reader_sha256": reader.sha256}


def _truths(
    studio: Studio,
    sources: Sequence[Photo],
    own: Sequence[tuple[Pixels, NDArray[np.float32]]],
    swaps: Sequence[Swap],
) -> dict[str, Any]:
    """Against what is known exactly: the swap that would be right, and where the face is."""
    right = [studio.true_swap(s) for s in swaps]
    masks = [studio.true_mask(photo) for photo in sources]
    return {
        "true_swap": swap.reconstruction(np.stack([s.painted for s in swaps]), np.stack(right)),
        "mask_iou": swap.mask_iou(np.stack([mask for _, mask in own]), np.stack(masks)),
    }


def _points(swaps: Sequence[Swap]) -> dict[str, Any]:
    """Of real people: distance of the eyes found in the swap from those found in the source, where both are found."""
    detector = FaceDetector(eyes=True)
    pairs = []
    for made in swaps:
        before, after = (detector.largest(p) for p in (made.source.pixels, made.picture))
        if before and after and before.landmarks and after.landmarks:
            pairs.append((after.landmarks[:2], before.landmarks[:2]))
    if not pairs:
        return {"landmarks": {"error": None, "n": 0}}
    ours, theirs = (np.array(points) for points in zip(*pairs, strict=True))
    return {"landmarks": {"error": swap.landmark_error(ours, theirs), "n": len(pairs)}}


def _evasion(job: EvaluateSwapJob, swaps: Sequence[Swap], workspace: Workspace) -> dict[str, Any]:
    """Share of the pasted swaps, encoded like their sources, that the detector does not call fake: by `threshold`, and of
    an ensemble also by the verdict that it serves, which may be uncertain."""
    if not job.detector:
        return {}
    judge = predictor.load(evaluate.resolve(job.detector, workspace))
    files = [media.encode(s.picture, s.source.format.format, s.source.format.quality) for s in swaps]
    scores = np.concatenate(
        [judge.predict([judge.decode(data) for data in files[i : i + 32]]) for i in range(0, len(files), 32)]
    )
    found = {**swap.evasion(scores, job.threshold), "detector": judge.name, "digest": judge.bundle.digest}
    if isinstance(judge, EnsemblePredictor):
        shown = [verdicts.Picture(id="", path=str(number), data=data) for number, data in enumerate(files)]
        with ThreadPoolExecutor(thread_name_prefix="judge") as pool:
            words = [answer["verdict"] for answer in verdicts.judge(judge, shown, pool)]
        found["served"] = swap.served_evasion(words)
    return {"evasion": found}


def _flicker(job: EvaluateSwapJob, studio: Studio, model: generate.Model) -> dict[str, Any]:
    """Of the first person in the video, which is converted for it and thrown away."""
    if not job.video:
        return {}
    detector = conversion.find_with(job.conversion, studio.preprocess)
    followed = conversion.follow(Path(job.video).expanduser(), detector, job.conversion)
    with temporary_folder() as folder:
        film = conversion.convert_video(
            studio.painters[0], followed, folder / "swap.mp4", job.conversion, maker=model.maker
        )
    return {"flicker": film.flicker}


def said(figures: Mapping[str, Any]) -> list[str]:
    """The figures in a few lines."""
    who, rebuilt = figures["identity"], figures["reconstruction"]
    lines = [
        f"taken for the target by the face: {who['painted']['target']:.1%} as painted, {who['pasted']['target']:.1%} pasted"
        f" back (chance {who['painted']['chance']:.1%}, {_most(who)}); for the source: {who['painted']['source']:.1%}",
        f"by the whole crop, which shows the source's hair and background: {who['whole']['painted']['target']:.1%} as painted,"
        f" {who['whole']['pasted']['target']:.1%} pasted back",
        f"reconstruction: SSIM {rebuilt['ssim']:.3f}, mean error {rebuilt['mae']:.4f}",
    ]
    for kind in ("pose", "expression"):
        if figures.get(kind) and figures[kind]["ratio"] is not None:
            found = figures[kind]
            lines.append(
                f"{kind}: r {found['swap']:.2f} in swaps, {found['ratio']:.0%} of the reconstructions' {found['reconstruction']:.2f}"
            )
    if "mask_iou" in figures:
        lines.append(
            f"mask IoU {figures['mask_iou']:.3f}; against the true swap SSIM {figures['true_swap']['ssim']:.3f}"
        )
    if "evasion" in figures:
        lines.append(
            f"{figures['evasion']['value']:.1%} are not called fake by {figures['evasion']['detector']}{_served(figures)}"
        )
    return lines


def _served(figures: Mapping[str, Any]) -> str:
    served = figures["evasion"].get("served")
    return (
        f" at {figures['evasion']['threshold']:g}; served verdicts: {served['value']:.1%} are not fake, {served['uncertain']} of {served['n']} uncertain"
        if served
        else ""
    )


def _most(who: Mapping[str, Any]) -> str:
    """What a perfect network would get, as far as that is known."""
    real = f"real pictures {who['real']:.1%}"
    return (
        f"{real}, true swaps pasted back {who['pasted_true']['target']:.1%}" if "pasted_true" in who else real
    )


# -- report ---------------------------------------------------------------------------------------------------------


def _matrix(sources: Sequence[Photo], swaps: Sequence[Swap], count: int) -> bytes:
    """A row per person: a picture of theirs, then that picture as each of the others; on the diagonal, as it is."""
    shown = min(MATRIX, count)
    firsts = {who: next(photo for photo in sources if photo.who == who) for who in range(shown)}
    made = {(id(s.source), s.target): s.picture for s in swaps}
    tiles = []
    for photo in firsts.values():
        row = [photo.pixels, *(made.get((id(photo), target), photo.pixels) for target in range(shown))]
        tiles += [_tile(pixels, photo.face.box) for pixels in row]
    return media.encode(images.grid(tiles, columns=shown + 1), "png")


def _tile(pixels: Pixels, box: Box) -> Pixels:
    return images.resize(faces.crop(pixels, box, 1.5), TILE, TILE)


def _publish(log: Run, target: Path, tree: Mapping[str, Any], matrix: bytes, page: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    marked = provenance.mark(matrix, maker=tree["model"], source_type="compositeWithTrainedAlgorithmicMedia")
    write_atomic(target / "swap.json", json.dumps(tree, indent=2).encode())
    write_atomic(target / "report.html", page.encode())
    write_atomic(target / "matrix.png", marked)
    log.json("swap.json", tree)
    log.text("report.html", page)
    log.picture("matrix.png", marked)
    log.metrics(scalars(tree["figures"]), 0)


def scalars(figures: Mapping[str, Any], prefix: str = "swap") -> dict[str, float]:
    """Every number by its path, joined by underscores."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}_{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}_{name}"] = float(value)
    return found


def _page(job: EvaluateSwapJob, model: generate.Model, tree: Mapping[str, Any], matrix: bytes) -> str:
    figures = tree["figures"]
    who = figures["identity"]
    rows = [[name.strip("_"), value] for name, value in scalars(figures, "").items()]
    key = [
        ("Taken for the target", f"{who['painted']['target']:.1%}", f"chance {who['painted']['chance']:.1%}"),
        ("Pasted back", f"{who['pasted']['target']:.1%}", "taken for the target"),
        ("Taken for the source", f"{who['painted']['source']:.1%}", "identity that leaks through"),
        ("Reader on real pictures", f"{who['real']:.1%}", "the most that can be measured"),
        ("Reconstruction", f"{figures['reconstruction']['ssim']:.3f}", "SSIM"),
    ]
    note = "First column: the picture. Then the same picture as each person, the faces pasted back. Generated pictures."
    sections = [
        Section("Figures", [KeyFigures(key), Text("\n\n".join(said(figures)))]),
        Section(
            "Everybody as everybody",
            [Text(note), Pictures([(", ".join(tree["people"][:MATRIX]), matrix)], size="full")],
        ),
        Section("Every figure", [Table(["figure", "value"], rows)]),
        Section("Everything", [Json("swap.json", tree)]),
    ]
    return report.html(
        f"Swaps by {model.maker}", sections, subtitle=f"{job.pictures} held-out pictures of each person"
    )
