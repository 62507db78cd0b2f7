"""A bundle that answers: bytes -> pixels -> probability -> verdict. The same object in bulk scoring, in MLflow and in serving.

A picture's probability does not depend on what else is in its batch: at most runtime.BATCH pictures make one pass, for
which torch's convolutions take the same kernels as for one, and linear layers always see BATCH rows; another runtime is
only recorded in a bundle after it was seen to agree with itself alone and in company. NaN stands for "cannot answer" and
comes with a reason; 0.5 never does.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake import bundle as bundles
from counterfake import config as settings
from counterfake import media, provenance, runtime
from counterfake.bundle import Bundle
from counterfake.ensemble import Ensemble
from counterfake.errors import CheckpointError, MediaError
from counterfake.faces import Face, FaceDetector
from counterfake.forensics.benford import BenfordConfig
from counterfake.forensics.error_level import ErrorLevelConfig
from counterfake.forensics.forest import BenfordForest
from counterfake.images import Finder, Preprocess, overlay, to_float
from counterfake.samples import Sample

logger = logging.getLogger(__name__)

BATCH = runtime.BATCH  # pictures in one pass
FORESTS: dict[str, type[BenfordConfig] | type[ErrorLevelConfig]] = {
    "benford": BenfordConfig,
    "error_level": ErrorLevelConfig,
}  # kind of the bundle -> settings of its features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """One picture, ready for every detector. `faces` is None where nobody asked for faces."""

    pixels: NDArray[np.uint8]  # (H, W, C)
    faces: tuple[Face, ...] | None = None
    found_by: Mapping[str, tuple[Face, ...]] = dataclasses.field(
        default_factory=dict
    )  # finder -> its faces, where several searched
    seconds: float = 0.0  # spent decoding

    @classmethod
    def of(cls, sample: Sample) -> Decoded:
        """A stored sample: its recorded face box is used, no face is searched."""
        pixels = sample.pixels if sample.pixels is not None else media.decode_trusted(sample.media)
        if not sample.face_box:
            return cls(pixels=pixels, faces=())
        flat = sample.landmarks or []
        marks = list(zip(flat[::2], flat[1::2], strict=True)) or None
        return cls(pixels=pixels, faces=(Face(sample.face_box, 1.0, marks),))

    def searched(self, finders: Sequence[Finder], eyes: bool = False) -> Decoded:
        """The same with the faces that each finder finds; `faces` are those of the first. Without finders unchanged."""
        found: dict[str, tuple[Face, ...]] = {
            finder: find_faces(self.pixels, eyes, finder) for finder in finders
        }
        return dataclasses.replace(self, faces=found[finders[0]], found_by=found) if finders else self

    def faces_by(self, finder: str) -> tuple[Face, ...]:
        """Faces as this finder found them; where it did not search, those that are known."""
        return self.found_by.get(finder, self.faces or ())


class Predictor(Protocol):
    """What every kind of detector offers."""

    name: str
    bundle: Bundle

    def decode(self, data: bytes, limits: media.Limits = media.DEFAULT_LIMITS) -> Decoded:
        """Untrusted bytes to pixels, and faces if this detector crops to them. Raises MediaError."""

    def refusal(self, picture: Decoded) -> str | None:
        """Why this picture cannot be answered ("no_face", "too_small"), or None."""

    def predict(self, pictures: Sequence[Decoded]) -> NDArray[np.float64]:
        """Probability of being fake (N,); NaN where `refusal` gives a reason."""

    def predict_bytes(self, pictures: Sequence[bytes]) -> list[float]:
        """`decode` and `predict`."""


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", eager: bool = False
) -> NetPredictor | ForestPredictor | EnsemblePredictor:
    """The detector or ensemble in a bundle folder, every digest verified. CheckpointError for other kinds.

    Nets run as their bundle records for this device, and in torch where it records nothing or `eager` is set. CPU threads
    are torch's at the time of loading."""
    bundle = bundles.read(Path(folder))
    if bundle.kind == "ensemble":
        return EnsemblePredictor(bundle, device, eager=eager)
    if bundle.kind in FORESTS:
        return ForestPredictor(bundle)
    if bundle.kind == "detector":
        return NetPredictor(bundle, device, eager=eager)
    raise CheckpointError(
        f"{folder} holds a {bundle.kind}; give a detector, a forensic forest or an ensemble"
    )


def find_faces(pixels: NDArray[np.uint8], eyes: bool = False, finder: Finder = "cascade") -> tuple[Face, ...]:
    """Faces, the largest first, with `eyes` where they are seen. Callable from any thread."""
    if not hasattr(_threads, "detectors"):  # OpenCV's cascade keeps state: one per thread
        _threads.detectors = {}
    known: dict[tuple[Finder, bool], FaceDetector] = _threads.detectors
    if (finder, eyes) not in known:
        known[finder, eyes] = FaceDetector(finder, eyes=eyes)
    return tuple(known[finder, eyes].detect(pixels))


class _Answers:
    """The part of Predictor that follows from `refusal` and `_scores`."""

    name: str
    finders: tuple[Finder, ...] = ()  # by which `decode` looks for faces; () = it does not
    finds_eyes = False  # and for their eyes, which takes half as long again

    def decode(self, data: bytes, limits: media.Limits = media.DEFAULT_LIMITS) -> Decoded:
        start = time.perf_counter()
        picture = Decoded(pixels=media.decode(data, limits)).searched(self.finders, self.finds_eyes)
        return dataclasses.replace(picture, seconds=time.perf_counter() - start)

    def refusal(self, picture: Decoded) -> str | None:
        return None

    def predict(self, pictures: Sequence[Decoded]) -> NDArray[np.float64]:
        result = np.full(len(pictures), np.nan)
        able = [i for i, picture in enumerate(pictures) if self.refusal(picture) is None]
        if able:
            result[able] = self._scores([pictures[i] for i in able])
        return result

    def predict_bytes(self, pictures: Sequence[bytes]) -> list[float]:
        return [float(p) for p in self.predict([self.decode(data) for data in pictures])]

    def _scores(self, pictures: Sequence[Decoded]) -> NDArray[np.float64]:
        raise NotImplementedError


class NetPredictor(_Answers):
    """One network with its preprocessing. `runtime`: the name of what runs it, like "openvino-bf16"."""

    def __init__(self, bundle: Bundle, device: str | torch.device = "cpu", *, eager: bool = False) -> None:
        nets = bundles.load_nets(bundle)
        if len(nets) != 1:
            raise CheckpointError(
                f"detector bundle {bundle.folder} must hold one net, it holds {sorted(nets)}"
            )
        self.bundle, self.name, self.device = bundle, bundle.name, torch.device(device)
        self.preprocess = settings.from_dict(Preprocess, bundle.info["preprocess"])
        self.finders = (self.preprocess.finder,) if self.preprocess.needs_face else ()
        self.finds_eyes = self.preprocess.crop == "aligned"
        if self.finders and self.preprocess.boxes not in ("", self.preprocess.finder):
            told = (self.name, self.preprocess.boxes, self.preprocess.finder)
            logger.info("%s was trained on face boxes of %s; %s looks for faces without a box", *told)
        net = _fix_rows(next(iter(nets.values())))
        self.net = net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.runtime, self.engine = self._started(runtime.TORCH if eager else self._chosen())

    def refusal(self, picture: Decoded) -> str | None:
        return "no_face" if self.finders and not self._faces(picture) else None

    def prepare(self, picture: Decoded) -> NDArray[np.uint8]:
        """(size, size, C) uint8: exactly what training saw."""
        faces = self._faces(picture)
        if not (self.finders and faces):
            return self.preprocess.apply(picture.pixels)
        return self.preprocess.apply(picture.pixels, faces[0].box, faces[0].landmarks)

    def _faces(self, picture: Decoded) -> tuple[Face, ...]:
        return picture.faces_by(self.preprocess.finder)

    def predict_prepared(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """images (N, size, size, C) -> probability of being fake (N,)."""
        return runtime.probabilities(self.engine, images)

    def heatmap(self, picture: Decoded) -> NDArray[np.float32] | None:
        """Grad-CAM (https://arxiv.org/abs/1610.02391) of the fake logit: (h, w) in [0, 1] over the prepared picture; None for
        a net without convolutions. Always by torch."""
        seen: list[Tensor] = []
        convolutions = [m for m in self.net.modules() if isinstance(m, nn.Conv2d)]
        if not convolutions:
            return None
        hook = convolutions[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            images = self._input(self.prepare(picture)[None]).requires_grad_()
            logit = self.net(images).sum()
            (slope,) = torch.autograd.grad(logit, seen[0])
        finally:
            hook.remove()
        heat = (slope.mean(dim=(2, 3), keepdim=True) * seen[0]).sum(dim=1)[0].relu()
        return np.asarray((heat / heat.max().clamp_min(1e-12)).detach().cpu(), np.float32)

    def _scores(self, pictures: Sequence[Decoded]) -> NDArray[np.float64]:
        return self.predict_prepared(np.stack([self.prepare(picture) for picture in pictures]))

    def _chosen(self) -> runtime.Candidate:
        chosen, why = runtime.select(self.bundle.info, self.device.type)
        logger.info("%s runs in %s: %s", self.name, chosen.name, why)
        return chosen

    def _started(self, chosen: runtime.Candidate) -> tuple[str, runtime.Engine]:
        if chosen == runtime.TORCH:
            return chosen.name, self._logits
        return chosen.name, runtime.opened(chosen, self.bundle.folder / chosen.file, torch.get_num_threads())

    def _logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(self.net(self._input(images)).float().cpu())

    def _input(self, images: NDArray[np.uint8]) -> Tensor:
        batch = runtime.as_tensor(images).to(self.device)
        return to_float(batch).contiguous(memory_format=torch.channels_last)


class ForestPredictor(_Answers):
    """Features of a forensic family and trees, on the picture at its own size."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.name = bundle, bundle.name
        self.config = settings.from_dict(FORESTS[bundle.kind], bundle.config[bundle.kind])
        self.forest = BenfordForest.from_tensors(bundle.arrays())
        if self.forest.inputs != len(self.config.names()):
            raise CheckpointError(
                f"bundle {bundle.folder}: the forest takes {self.forest.inputs} features, its settings give {len(self.config.names())}"
            )

    def refusal(self, picture: Decoded) -> str | None:
        return "too_small" if min(picture.pixels.shape[:2]) < self.config.min_side else None

    def _scores(self, pictures: Sequence[Decoded]) -> NDArray[np.float64]:
        return self.forest.predict(self.config.features_of([picture.pixels for picture in pictures]))


class Judge:
    """The ensemble without its members: composes the verdict from probabilities that came from elsewhere."""

    def __init__(self, bundle: Bundle, *, version: str | None = None) -> None:
        self.bundle, self.version = bundle, version
        self.ensemble = Ensemble.from_dict(bundle.config["ensemble"])
        self.infos = {name: bundles.read(folder) for name, folder in bundle.members.items()}
        if set(self.infos) != set(self.ensemble.members):
            raise CheckpointError(f"bundle {bundle.folder} was calibrated for other members than it holds")
        prepared = [b.info["preprocess"] for b in self.infos.values() if b.info["preprocess"]]
        asked = [settings.from_dict(Preprocess, tree) for tree in prepared]
        self.finders = tuple(dict.fromkeys(one.finder for one in asked if one.needs_face))
        self.finds_eyes = any(preprocess.crop == "aligned" for preprocess in asked)

    def combine(self, probabilities: Mapping[str, float]) -> float:
        """Members' probabilities -> one; NaN members are left out, NaN if none is left or too many are missing."""
        present = {name: p for name, p in probabilities.items() if name in self.infos and math.isfinite(p)}
        if len(self.infos) - len(present) > min(2, len(self.infos) - 1):
            return math.nan
        ensemble = self.ensemble.only(list(present))
        return float(ensemble.probability([[present[name] for name in ensemble.members]])[0])

    def answer(
        self,
        probabilities: Mapping[str, float],
        *,
        reasons: Mapping[str, str] | None = None,
        faces: Sequence[Face] | None = None,
        origin: Mapping[str, Any] | None = None,
        timings: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """The verdict of DESIGN "Verdict", JSON-able. reasons: why a member did not answer."""
        present = [name for name, p in probabilities.items() if name in self.infos and math.isfinite(p)]
        probability = self.combine(probabilities)
        word, reason = "no_verdict", next(iter((reasons or {}).values()), "no_detector")
        used: Ensemble | None = None
        if math.isfinite(probability):
            used = self.ensemble.only(present)
            word = used.verdict(probability)
            word, reason = ("no_verdict", word) if word == "out_of_domain" else (word, "")
        return {
            **self._frame(word, reason or None),
            "probability_fake": probability if math.isfinite(probability) else None,
            "detectors": [
                self._detector(name, probabilities, used, reasons or {}) for name in self.ensemble.members
            ],
            "faces": [_face(face) for face in faces or ()],
            "provenance": dict(origin or {}),
            "heatmap": None,
            "timings": dict(timings or {}),
        }

    def refuse(self, reason: str, detail: str = "") -> dict[str, Any]:
        """A verdict without figures, for bytes that are no usable picture."""
        empty: dict[str, Any] = {
            "probability_fake": None,
            "detectors": [],
            "faces": [],
            "provenance": {},
            "heatmap": None,
            "timings": {},
        }
        return {**self._frame("no_verdict", reason), **empty, "detail": detail}

    def _frame(self, word: str, reason: str | None) -> dict[str, Any]:
        info = self.bundle.info
        return {
            "verdict": word,
            "reason": reason,
            "error_rate": self.ensemble.alpha,
            "model": {
                "name": self.bundle.name, "version": self.version, "digest": self.bundle.digest,
                "calibration_id": self.ensemble.calibration_id, "dataset_version": (info.get("dataset") or {}).get("version"),
            },
        }  # fmt: skip

    def _detector(
        self, name: str, probabilities: Mapping[str, float], used: Ensemble | None, reasons: Mapping[str, str]
    ) -> dict[str, Any]:
        answered = math.isfinite(probabilities.get(name, math.nan))
        weights = dict(zip(used.members, used.weights, strict=True)) if used else {}
        return {
            "name": name, "kind": self.infos[name].kind, "version": self.infos[name].digest[:12],
            "probability": probabilities[name] if answered else None,
            "weight": weights.get(name, 0.0), "reason": None if answered else reasons.get(name, "no_answer"),
        }  # fmt: skip


class EnsemblePredictor(_Answers):
    """The judge with its members loaded."""

    def __init__(self, bundle: Bundle, device: str | torch.device = "cpu", *, eager: bool = False) -> None:
        self.bundle, self.name, self.judge = bundle, bundle.name, Judge(bundle)
        self.ensemble = self.judge.ensemble
        self.finders, self.finds_eyes = self.judge.finders, self.judge.finds_eyes
        self.members: dict[str, Predictor] = {
            n: load(bundle.members[n], device=device, eager=eager) for n in self.ensemble.members
        }

    def refusal(self, picture: Decoded) -> str | None:
        reasons = [member.refusal(picture) for member in self.members.values()]
        return None if None in reasons else reasons[0]

    def member_probabilities(self, pictures: Sequence[Decoded]) -> dict[str, NDArray[np.float64]]:
        """Every member's own probability (N,), by name."""
        return {name: member.predict(pictures) for name, member in self.members.items()}

    def verdict(self, data: bytes, *, heatmap: bool = False) -> dict[str, Any]:
        """Everything about one picture. Unusable bytes give no_verdict with the reason, not an error.

        heatmap: also where the first network looked, as a PNG data URI; costs one backward pass."""
        start = time.perf_counter()
        try:
            picture = self.decode(data)
        except MediaError as error:
            return self.judge.refuse(error.reason, str(error))
        found = {name: float(p[0]) for name, p in self.member_probabilities([picture]).items()}
        reasons = {name: why for name, member in self.members.items() if (why := member.refusal(picture))}
        spent = {"decode_ms": 1e3 * picture.seconds, "total_ms": 1e3 * (time.perf_counter() - start)}
        origin = settings.to_dict(provenance.read(data))
        answer = self.judge.answer(found, reasons=reasons, faces=picture.faces, origin=origin, timings=spent)
        return {**answer, "heatmap": self.heatmap(picture) if heatmap else None}

    def heatmap(self, picture: Decoded) -> str | None:
        """Grad-CAM of the first network that can answer, over its picture, as a PNG data URI; None if there is none."""
        for member in self.members.values():
            if not isinstance(member, NetPredictor) or member.refusal(picture) is not None:
                continue
            if (heat := member.heatmap(picture)) is not None:
                png = media.encode(overlay(member.prepare(picture), heat), "png")
                return f"data:image/png;base64,{base64.b64encode(png).decode()}"
        return None

    def _scores(self, pictures: Sequence[Decoded]) -> NDArray[np.float64]:
        columns = self.member_probabilities(pictures)
        rows = ({name: float(column[i]) for name, column in columns.items()} for i in range(len(pictures)))
        return np.array([self.judge.combine(row) for row in rows])


# -- private --------------------------------------------------------------------------------------------------------

_threads = threading.local()


class _FixedRows(nn.Module):
    """A linear layer that always multiplies BATCH rows: BLAS sums in another order for one row than for many."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """(N, F) -> (N, out), N up to BATCH; other shapes go through as they are."""
        if x.ndim != 2 or len(x) >= BATCH:
            return self.linear(x)
        rows = x.new_zeros(BATCH - len(x), x.shape[1])
        return self.linear(torch.cat([x, rows]))[: len(x)]


def _fix_rows(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _FixedRows(child) if isinstance(child, nn.Linear) else _fix_rows(child))
    return module


def _face(face: Face) -> dict[str, Any]:
    return {"box": [float(v) for v in face.box], "score": float(face.score)}
