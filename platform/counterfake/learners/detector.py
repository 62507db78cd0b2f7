"""Real or fake from one picture: binary cross-entropy on a fakeness logit, for any net (N, 3, H, W) -> (N,).

What makes small detectors hold up outside their training set is here as settings: augmentation on the device, pseudo-fakes
blended or composed from real pictures, a new head before the whole net (`freeze_images`), a low rate for pre-trained features, averaged
weights, a flat minimum (`sam_rho`), and keeping the weights of the best validation AUC (or of the best AUC of the worst maker's
fakes) instead of the last ones: early stopping as far as the result goes. Schedules count images, so they do not change with
the batch size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake import dist, images
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import detection
from counterfake.learners import LearnerConfig, LearnerContext, load_optimizer
from counterfake.learners.augmentation import AugmentationConfig, augment
from counterfake.learners.blending import BlendingConfig, blend_real_rows
from counterfake.learners.composites import CompositesConfig, with_composites
from counterfake.nets import NetConfig
from counterfake.nets.mobilenetv2 import MobileNetV2Config

if TYPE_CHECKING:
    from counterfake.data import Batch

MOST_MAKERS = 32  # whose own AUC is reported; the worst one always is
CLASS_CHECK_IMAGES = 512  # after so many pictures of one class only, training on them is refused


class DetectorNet(Protocol):
    """What the learner needs of a net: forward is `head(features(images).mean(dim=(2, 3))).squeeze(1)`."""

    features: nn.Module  # (N, 3, H, W) -> (N, C, h, w)
    head: nn.Module  # (N, C) -> (N, 1)


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(LearnerConfig):
    """AdamW or SGD with warm-up and cosine decay, all counted in images over all ranks."""

    compiles: ClassVar[bool] = True
    net: NetConfig = field(default_factory=MobileNetV2Config)
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: Nesterov momentum 0.9
    lr: float = 1e-3  # of the head, after warm-up
    features_lr_factor: float = 1.0  # learning rate of the features / lr; below 1 for pre-trained ones
    weight_decay: float = 0.01  # decoupled; not on biases and batch norm
    warmup_images: int = 0  # linear from 0; for features that were frozen once more when they thaw
    final_lr_factor: float = 0.01  # lr at the end / lr
    freeze_images: int = 0  # train only the head on so many images first; the features keep their statistics
    frozen_norms: bool = False  # the features' batch norm keeps the statistics it was given, always
    select: Literal["auc", "worst_auc"] = "auc"  # validation figure whose best weights are kept and exported
    label_smoothing: float = 0.0  # targets s/2 and 1 - s/2
    balance: bool = True  # both classes weigh the same, whatever their share
    clip_norm: float = 5.0  # largest gradient norm; 0 = no clipping
    sam_rho: float = (
        0.0  # radius of sharpness-aware minimisation, twice the work (2010.01412 uses 0.05); 0 = off
    )
    ema_halflife_images: float = 0.0  # of the averaged weights used for validation and export; 0 = no average
    blending: BlendingConfig = field(default_factory=BlendingConfig)  # real rows into pseudo-fakes
    composites: CompositesConfig = field(
        default_factory=CompositesConfig
    )  # and into composites with others; needs data.landmarks
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.lr <= 0 or self.sam_rho < 0:
            raise ConfigError(
                f"label_smoothing must be in [0, 1), lr > 0 and sam_rho >= 0, got {self.label_smoothing}, {self.lr}, "
                f"{self.sam_rho}"
            )

    @property
    def kept_metric(self) -> str:
        """The metric of a tick that says how good the kept weights are, and so what a search has to compare."""
        return f"val_best_{self.select}"

    def build(self, *, device: torch.device, context: LearnerContext) -> DetectorLearner:
        if context.channels != 3:
            raise ConfigError(
                f"the detector reads RGB but the data has {context.channels} channels; set preprocess.channels=3"
            )
        return DetectorLearner(self, device, context)


class DetectorLearner:
    """A detector in training. `validate` and `export` use the averaged weights where there are any."""

    def __init__(self, config: DetectorConfig, device: torch.device, context: LearnerContext) -> None:
        self.config, self.context, self.device = config, context, device
        # channels_last: 1.5 times the steps/s of MobileNetV2 on a CPU in fp32
        self.net: nn.Module = config.net.build().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        _check_crop(self.net, config.augmentation.crop, context.size)
        features, head = (context.compiled(part) for part in _parts(self.net))
        self._features, self._head = dist.data_parallel(features), dist.data_parallel(head)
        self.average = copy.deepcopy(self.net).requires_grad_(False) if config.ema_halflife_images else None
        self.optimizer = _optimizer(_groups(features, head, config), config)
        self.steps = self.images = 0
        self.best: dict[str, Tensor] = {}  # weights of the best validation so far
        self.best_figure = -1.0  # its config.select
        self._seen = torch.zeros(2, device=device)  # pictures of each class, of this rank; not stored
        self._seen_since = 0  # images before the first of them
        self._composed = torch.zeros((), dtype=torch.int64, device=device)  # steps with composites
        self._checked = False

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update. Raises DataError once CLASS_CHECK_IMAGES pictures held one class only."""
        frozen = self.images < self.config.freeze_images
        self._set_lr()
        pixels, fake = self._with_pseudo_fakes(batch)
        pixels = augment(pixels, self.config.augmentation)
        loss, logits = self._gradients(pixels, fake, frozen)
        if self.config.sam_rho:
            with _climbed(self.net.parameters(), self.config.sam_rho):
                self._gradients(pixels, fake, frozen)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip_norm or math.inf)
        self.optimizer.step()
        self.steps += 1
        self.images += len(batch) * dist.world_size()
        self._update_average(len(batch))
        self._check_classes(fake)
        right = ((logits > 0) == (fake > 0.5)).float().mean()
        return {
            "loss": loss.detach(),
            "accuracy": right,
            "gradient_norm": norm.detach(),
            "lr": self._lr_tensor(),
        }

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss, AUC and accuracy over all rows, AUC of each maker's fakes and the worst of these; keeps a copy of the weights
        when `config.select` is the best so far."""
        net = self._inference_net()
        logits, fake, makers = [], [], []
        names: tuple[str, ...] = ()
        with torch.inference_mode():
            for batch in batches:
                batch = batch.to(self.device)
                logits.append(net(images.to_float(batch.images)).float().cpu())
                fake.append(batch.fake.cpu())
                makers.append(batch.maker.cpu())
                names = batch.makers
        if not logits:
            raise DataError("validation has no pictures; set validation.split to one that has rows")
        metrics = _figures(torch.cat(logits), torch.cat(fake), torch.cat(makers), names)
        if metrics[self.config.select] > self.best_figure:
            self.best_figure = metrics[self.config.select]
            self.best = {name: value.detach().clone() for name, value in net.state_dict().items()}
        return {**metrics, f"best_{self.config.select}": self.best_figure}

    def preview(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        """The batch's first pictures with label and predicted probability: green frame = right, red = wrong."""
        batch = batch.to(self.device)
        with torch.inference_mode():
            probability = self._inference_net()(images.to_float(batch.images[:24])).sigmoid().tolist()
        fake = batch.fake[:24].tolist()
        pixels = batch.images[:24].permute(0, 2, 3, 1).cpu().numpy()
        tiles = [_tile(*row) for row in zip(pixels, fake, probability, strict=True)]
        return {"predictions": images.grid(tiles, columns=8)}

    def export(self) -> dict[str, tuple[NetConfig, dict[str, Tensor]]]:
        """{"detector": ...} with the best validated weights, else the averaged or last ones."""
        weights = self.best or self._inference_net().state_dict()
        return {"detector": (self.config.net.without_weights(), weights)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "best": self.best,
            "best_figure": self.best_figure,
            "steps": self.steps,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        settings = [(g["peak_lr"], g["weight_decay"]) for g in self.optimizer.param_groups]
        load_optimizer(self.optimizer, state["optimizer"])
        for group, (rate, decay) in zip(self.optimizer.param_groups, settings, strict=True):
            # a trial that goes on from another's state has settings of its own
            group.update(peak_lr=rate, weight_decay=decay)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best = {name: value.to(self.device) for name, value in state["best"].items()}
        self.best_figure, self.steps, self.images = state["best_figure"], state["steps"], state["images"]
        self._seen_since = self.images  # the classes are counted anew

    # -- private ----------------------------------------------------------------------------------------------------

    def _with_pseudo_fakes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pixels (N, 3, H, W) in [-1, 1] and labels (N,) of the batch, some of its real rows turned into fakes."""
        pixels, fake = images.to_float(batch.images), batch.fake.float()
        if self.config.composites.share:
            if batch.landmarks is None:
                raise ConfigError("learner.composites needs the points of faces; set data.landmarks=true")
            before = pixels
            pixels, fake = with_composites(pixels, fake, batch.landmarks, self.config.composites)
            if not self._checked:
                self._composed = self._composed + (pixels != before).any()
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return blend_real_rows(pixels, fake, self.config.blending)

    def _gradients(self, pixels: Tensor, fake: Tensor, frozen: bool) -> tuple[Tensor, Tensor]:
        """Loss and logits (N,); the gradients are those of this pass alone."""
        logits = self._logits(pixels, frozen)
        loss = _loss(logits, fake, self.config.label_smoothing, self.config.balance)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, logits

    def _logits(self, pixels: Tensor, frozen: bool) -> Tensor:
        """The net in training mode; while frozen, its features run as in inference, without data-parallel hooks."""
        self.net.train()
        if self.config.frozen_norms:
            for module in self.net.get_submodule("features").modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        with self.context.autocast(self.device):
            if frozen:
                features = dist.unwrap(self._features).eval()
                with torch.no_grad():
                    maps = features(pixels)
            else:
                maps = self._features(pixels)
            return self._head(maps.mean(dim=(2, 3))).squeeze(1).float()

    def _set_lr(self) -> None:
        factor = schedule(self.images, self.context.total_images, self.config)
        thawed = thawing(self.images, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"] * (thawed if group["part"] == "features" else 1.0)

    def _lr_tensor(self) -> Tensor:
        # on the device, where the tick stacks it with the other metrics
        return torch.full((), self.optimizer.param_groups[-1]["lr"], device=self.device)

    def _update_average(self, rows: int) -> None:
        if self.average is None:
            return
        seen = rows * dist.world_size()
        # the ramp forgets the random start: never a half-life longer than a tenth of what was seen
        halflife = min(self.config.ema_halflife_images, self.images * 0.1)
        keep = 0.5 ** (seen / max(halflife, 1e-8))
        with torch.no_grad():
            for old, new in zip(
                self.average.state_dict().values(), self.net.state_dict().values(), strict=True
            ):
                if old.is_floating_point():
                    old.lerp_(new, 1 - keep)
                else:
                    old.copy_(new)

    def _inference_net(self) -> nn.Module:
        return (self.average if self.average is not None else self.net).eval()

    def _check_classes(self, fake: Tensor) -> None:
        """One synchronisation per run, early: a detector of one class would look perfect by its loss."""
        if self._checked:
            return
        self._seen += torch.stack([(fake == 0).sum(), (fake == 1).sum()])
        limit = min(CLASS_CHECK_IMAGES * dist.world_size(), self.context.images_per_epoch)
        if self.images - self._seen_since < limit:
            return
        self._checked = True
        real, fakes = (int(v) for v in self._seen.tolist())
        if not real or not fakes:
            raise DataError(
                f"a detector needs real and fake pictures, but the first {real + fakes + int((fake < 0).sum())} hold"
                f" {real} real and {fakes} fake; check the dataset's labels and data.where"
            )
        if self.config.composites.share and not int(self._composed):
            raise DataError(
                f"learner.composites made none of the first {real + fakes} pictures: no two real ones of a batch know their"
                " eyes; ingest with --set faces=cascade, better also with --set landmarks_model=FILE"
            )


def schedule(seen: int, total: int, config: DetectorConfig) -> float:
    """Factor on the learning rate after `seen` of `total` images: linear warm-up, then half a cosine to the final one."""
    if seen < config.warmup_images:
        return (seen + 1) / config.warmup_images
    share = min(1.0, (seen - config.warmup_images) / max(1, total - config.warmup_images))
    return config.final_lr_factor + (1 - config.final_lr_factor) * 0.5 * (1 + math.cos(math.pi * share))


def thawing(seen: int, config: DetectorConfig) -> float:
    """Factor on the features' rate: 0 while they are frozen, then a second warm-up.

    Adam's first steps are as long as its rate whatever the gradient: at full rate they undo what the features had learned."""
    if seen < config.freeze_images:
        return 0.0
    if not config.freeze_images or not config.warmup_images:
        return 1.0
    return min(1.0, (seen - config.freeze_images + 1) / config.warmup_images)


def _loss(logits: Tensor, fake: Tensor, smoothing: float, balance: bool) -> Tensor:
    """Cross-entropy of the rows with a label; with `balance` a row weighs 1 / (its class's count in the batch)."""
    target = fake.clamp(min=0) * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    weight = (fake >= 0).float()
    if balance:
        fakes, reals = (fake == 1).sum(), (fake == 0).sum()
        weight = weight * torch.where(
            fake > 0.5, 1 / (fakes + 1), 1 / (reals + 1)
        )  # +1 bounds a rare row's weight
    return (losses * weight).sum() / weight.sum().clamp(min=1e-8)


def _figures(logits: Tensor, fake: Tensor, makers: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Of N rows; makers (N,) indexes `names`, -1 = unknown. Rows without a label do not count."""
    known = fake >= 0
    logits, fake, makers = logits[known], fake[known], makers[known]
    loss = F.binary_cross_entropy_with_logits(logits, fake.float())
    accuracy = ((logits > 0) == (fake > 0)).double().mean()
    overall = _auc(logits, fake)  # first: it refuses a missing class
    of_makers = {
        names[code] if 0 <= code < len(names) else "unknown": _auc(logits[rows], fake[rows])
        for code in sorted(set(makers[fake == 1].tolist()))
        for rows in [(fake == 0) | (makers == code)]
    }
    figures = {
        "loss": float(loss),
        "auc": overall,
        "worst_auc": min(of_makers.values()),
        "accuracy": float(accuracy),
        "images": float(len(fake)),
    }
    shown = of_makers if 1 < len(of_makers) <= MOST_MAKERS else {}
    return figures | {f"auc.{name}": value for name, value in shown.items()}


def _auc(logits: Tensor, fake: Tensor) -> float:
    fpr, tpr, _ = detection.roc(fake.numpy(), logits.numpy())
    return float(np.trapezoid(tpr, fpr))


@torch.no_grad()
def _check_crop(net: nn.Module, crop: int, size: int) -> None:
    """Raises ConfigError unless `net` reads windows of `crop` px as it reads pictures of `size`; 0 = there are none."""
    if crop > size:
        raise ConfigError(
            f"learner.augmentation.crop is {crop} px but the pictures have {size}; set it to at most data.preprocess.size"
        )
    if not crop:
        return
    try:
        net.eval()(torch.zeros(1, 3, crop, crop, device=next(net.parameters()).device))
    except (RuntimeError, ConfigError) as error:
        raise ConfigError(
            f"{type(net).__name__} reads pictures of one size, not windows of {crop} px; set learner.augmentation.crop=0"
        ) from error
    finally:
        net.train()


def _parts(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    parts = [getattr(net, name, None) for name in ("features", "head")]
    if not all(isinstance(part, nn.Module) for part in parts):
        raise ConfigError(f"{type(net).__name__} has no `features` and `head`; a detector's net needs both")
    return parts[0], parts[1]  # type: ignore[return-value]


def _groups(features: nn.Module, head: nn.Module, config: DetectorConfig) -> list[dict[str, Any]]:
    """Weights with decay, biases and batch norm without; features and head with their own rates."""
    groups: list[dict[str, Any]] = []
    for part, module, factor in (("features", features, config.features_lr_factor), ("head", head, 1.0)):
        for decay in (True, False):
            chosen = [p for p in module.parameters() if p.requires_grad and _decays(p) == decay]
            rate = config.lr * factor
            groups.append(
                {"params": chosen, "part": part, "peak_lr": rate, "weight_decay": config.weight_decay * decay}
            )
    return groups


def _decays(parameter: Tensor) -> bool:
    """Matrices and kernels; not biases, norms and scales, which have one value per channel."""
    return parameter.ndim > 1 and parameter.shape[1:] != (1, 1)


def _optimizer(groups: list[dict[str, Any]], config: DetectorConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


@contextmanager
def _climbed(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """The weights moved by `rho` along their gradient, where the loss is highest nearby; afterwards as they were, bit for bit.

    Foret et al. 2020, https://arxiv.org/abs/2010.01412, equation 2. The gradients are equal on all ranks, so the step is."""
    moved = [p for p in parameters if p.grad is not None]
    kept = [p.detach().clone() for p in moved]
    norm = torch.stack([p.grad.norm() for p in moved if p.grad is not None]).norm().clamp_min(1e-12)
    with torch.no_grad():
        for parameter in moved:
            assert parameter.grad is not None
            parameter.add_(parameter.grad * (rho / norm))
    yield
    with torch.no_grad():
        for parameter, before in zip(moved, kept, strict=True):
            parameter.copy_(before)


def _tile(pixels: NDArray[np.uint8], fake: int, probability: float) -> NDArray[np.uint8]:
    """A picture at 96 px with a frame and its label and probability of being fake written below."""
    picture = cv2.resize(pixels, (96, 96), interpolation=cv2.INTER_AREA)
    right = (probability > 0.5) == (fake == 1)
    tile = cv2.copyMakeBorder(
        picture, 3, 19, 3, 3, cv2.BORDER_CONSTANT, value=(40, 160, 70) if right else (200, 50, 40)
    )
    text = f"{ {0: 'real', 1: 'fake'}.get(fake, '?') }  p={probability:.2f}"
    return np.asarray(
        cv2.putText(tile, text, (5, 113), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
    )
