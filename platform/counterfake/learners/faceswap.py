"""Face swapping: rebuild everyone's bent face, so that a network learns to paint each person in any pose.

Recipe `swap-shared`, the code of December 2017: mean absolute error, Adam 5e-5 with beta1 0.5, warped inputs. Differences:
a batch mixes the identities and makes one update, where the original alternates sides; and `match_colour` moves each
identity's mean colour to the mean of the batch, where the original moves A to the mean of all of B before training.
faceswap-GAN has a critic per person; here one critic judges everyone's faces.
The same step trains every design of nets/swap*.py: which losses count is `SwapLosses`, when they do is `phases`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake import dist, images
from counterfake.errors import CheckpointError, ConfigError, DataError
from counterfake.learners import LearnerConfig, LearnerContext, Paints, load_optimizer, regions
from counterfake.learners import swap_losses as losses
from counterfake.learners.phases import Phase, check, current
from counterfake.learners.swap_guard import Guard
from counterfake.learners.swap_losses import SwapLosses
from counterfake.learners.warp import WarpConfig, centre, pairs
from counterfake.nets import NetConfig
from counterfake.nets.swap import SwapConfig
from counterfake.nets.swap_discriminator import SwapDiscriminatorConfig
from counterfake.nets.swap_family import Painted, SwapFamily, standardise

if TYPE_CHECKING:
    from counterfake.data import Batch

logger = logging.getLogger(__name__)

MIN_PICTURES = 8  # per identity; with fewer a decoder only repeats them
MAX_IDENTITIES = 64  # one decoder each
PREVIEW_FACES = 8
LEAST_PERCEPTUAL = 32  # pixels; a perceptual network halves them five times
PART_SHARE = 0.35  # side of an eye's or mouth's crop / side of the face
PART_PIXELS = 24  # side of such a crop


@dataclass(frozen=True, kw_only=True)
class FaceSwapConfig(LearnerConfig):
    """One network for the identities of the data, and how it is taught."""

    paints: ClassVar[Paints] = "compositeWithTrainedAlgorithmicMedia"
    net: SwapFamily = field(default_factory=SwapConfig)
    critic: SwapDiscriminatorConfig = field(
        default_factory=SwapDiscriminatorConfig
    )  # built if a phase wants it
    warp: WarpConfig = field(default_factory=WarpConfig)
    losses: SwapLosses = field(default_factory=SwapLosses)
    phases: tuple[Phase, ...] = (Phase(),)
    lr: float = 5e-5
    beta1: float = 0.5
    adam_eps: float = 1e-8
    critic_lr: float = 2e-4
    final_lr_factor: float = 1.0  # lr at the end / lr, linear; the original keeps it constant
    people: int = (
        0  # the train_swap job chooses so many when data.where names no identity: the best pictured; 0 = all
    )
    match_colour: bool = (
        True  # give all identities the same mean colour while training; not with net.normalise
    )
    margin: float = 1.4  # of the face crops, for points that are not known; data.preprocess.margin
    rollbacks: int = (
        2  # times a run that became NaN or collapsed goes back to its last checkpoint; 0 = it ends
    )
    rollback_lr: float = 0.5  # factor on the learning rates at each of them

    def __post_init__(self) -> None:
        check(self.phases)
        if self.rollbacks < 0 or not 0 < self.rollback_lr <= 1:
            raise ConfigError(
                f"rollbacks must be >= 0 and rollback_lr in (0, 1], got {self.rollbacks}, {self.rollback_lr}"
            )
        if self.adversarial and not self.losses.adversarial:
            raise ConfigError("a phase has an adversary but losses.adversarial is 0; set it, like 0.1")
        if self.losses.perceptual and not any(phase.perceptual for phase in self.phases):
            raise ConfigError(
                "losses.perceptual is set but no phase uses it; set phases[…].perceptual, like 1.0"
            )
        if self.losses.perceptual and self.net.size < LEAST_PERCEPTUAL:
            raise ConfigError(
                f"losses.perceptual reads faces of {LEAST_PERCEPTUAL} px and more, net.size is {self.net.size}"
            )
        if self.losses.parts and self.net.MASKS != "parts":
            raise ConfigError(
                f"losses.parts needs a network that paints parts, not a {type(self.net).__name__}"
            )

    @property
    def adversarial(self) -> bool:
        """Whether a critic is needed at all."""
        return any(phase.adversarial for phase in self.phases)

    def build(self, *, device: torch.device, context: LearnerContext) -> FaceSwapLearner:
        names = context.identities
        if len(names) < 2:
            raise DataError(
                f"face swapping needs at least two identities, the data has {len(names)}; widen data.where.identity"
            )
        if len(names) > MAX_IDENTITIES:
            raise DataError(
                f"the data has {len(names)} identities and each gets its own decoder; choose at most {MAX_IDENTITIES}"
                f' with data.where, e.g. {{"identity": ["{names[0]}", "{names[1]}"]}}'
            )
        if self.net.identities not in ((), tuple(names)):
            raise ConfigError(
                f"net.identities are {self.net.identities} but the data has {tuple(names)}; leave them empty"
            )
        self._check_pictures(context)
        return FaceSwapLearner(self, device, context)

    def _check_pictures(self, context: LearnerContext) -> None:
        """Raises ConfigError for pictures that the network cannot learn from."""
        if context.channels != 3:
            raise ConfigError(
                f"swap networks read 3 channels, the data gives {context.channels}; set data.preprocess.channels=3"
            )
        least = math.ceil(self.net.size / self.net.coverage / 2)
        if context.size < least:
            raise ConfigError(
                f"the network paints {self.net.size} px from {self.net.coverage:.0%} of a crop, the data gives crops of "
                f"{context.size} px; set data.preprocess.size to {2 * least} (at least {least}), or learner.net.size lower"
            )


class _Lesson(NamedTuple):
    """What one step teaches."""

    warped: Tensor  # (N, 3, S, S) in [0, 1]: what is read
    target: Tensor  # (N, 3, S, S) in [0, 1]: what is to be painted
    identity: Tensor  # (N,)
    regions: Tensor | None  # (N, 4, S, S) in [0, 1]: face, left eye, right eye, mouth of the target

    @property
    def face(self) -> Tensor:
        return self._regions[:, :1]

    @property
    def eyes(self) -> Tensor:
        return self._regions[:, 1:3].amax(dim=1, keepdim=True)

    @property
    def mouth(self) -> Tensor:
        return self._regions[:, 3:]

    @property
    def _regions(self) -> Tensor:
        assert self.regions is not None, (
            "a loss asks for regions that SwapLosses.needs_points does not know of"
        )
        return self.regions


class FaceSwapLearner:
    """The network in training; `steps` counts its updates."""

    def __init__(self, config: FaceSwapConfig, device: torch.device, context: LearnerContext) -> None:
        self.config, self.context, self.device = config, context, device
        self.net_config = config.net.with_identities(tuple(context.identities))
        # 344 instead of 310 images per CPU-second of swap-shared-small in bf16
        self.net: nn.Module = self.net_config.build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._parallel = dist.data_parallel(self.net)
        self.optimizer = _adam(self.net, config.lr, config)
        self.critic = config.critic.build().to(device) if config.adversarial else None
        if self.critic:
            self._parallel_critic = dist.data_parallel(self.critic)
            self.critic_optimizer = _adam(self.critic, config.critic_lr, config)
        wanted = config.losses
        self.perceptual = (
            losses.Perceptual(wanted.perceptual, wanted.perceptual_weights, device, wanted.perceptual_net)
            if wanted.perceptual
            else None
        )
        self.guard = Guard(context.identities, device)
        self.max_rollbacks = config.rollbacks
        self.lr_factor = 1.0  # what rollbacks left of the learning rates
        self.steps = self.images = 0

    @property
    def phase(self) -> Phase:
        """What holds for the next step."""
        return self.config.phases[current(self.config.phases, self.images)]

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the network and, where the phase has an adversary, one of the critic."""
        phase = self._enter_phase()
        lesson = self._lesson(batch, phase)
        self.net.train()  # a preview may have left it at rest
        with self.context.autocast(self.device):
            painted = _exact(self._parallel(lesson.warped, lesson.identity))
        terms = self._terms(lesson, painted, phase)
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._update(phase.lr_dropout)
        metrics = self._metrics(lesson, painted, loss, terms)
        if phase.adversarial:
            metrics["critic_loss"] = self._update_critic(lesson, painted)
        self.steps += 1
        self.images += len(batch) * dist.world_size()
        return metrics

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """{}: held-out pictures are of other people, who have no decoder."""
        return {}

    def check(self) -> None:
        """Raises CollapseError if what was seen since the last call is no learning any more."""
        self.guard.check()

    def slow_down(self, rollbacks: int) -> float:
        """Lower every learning rate for after so many rollbacks -> the factor on them."""
        self.guard.forgive()
        self.lr_factor = self.config.rollback_lr**rollbacks
        return self.lr_factor

    def preview(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        """swaps: a row per face, the face and then it as each identity (at most eight); masks: the same of each identity, for a
        design that has them; reconstructions: the faces in one row, below each what the model makes of it as itself."""
        rows = _spread(batch, PREVIEW_FACES)
        faces, own = batch.images[rows].to(self.device), batch.identity[rows].to(self.device)
        reads = (centre(faces.float() / 255, self.net_config.size, self.net_config.coverage) * 255).round()
        people = range(min(PREVIEW_FACES, len(self.net_config.identities)))
        made = [self._as(faces, torch.full_like(own, who), own) for who in people]
        found = {
            "swaps": [reads.to(torch.uint8), *(face for face, _ in made)],
            "masks": [
                (mask * 255).to(torch.uint8).expand(-1, 3, -1, -1) for _, mask in made if mask is not None
            ],
        }
        itself = torch.cat([reads.to(torch.uint8), self._as(faces, own, own)[0]])
        tables = {name: _table(columns) for name, columns in found.items() if columns}
        return {**tables, "reconstructions": images.grid(itself, columns=len(rows))}

    def export(self) -> dict[str, tuple[NetConfig, dict[str, Tensor]]]:
        return {"faceswap": (self.net_config, self.net.state_dict())}

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict() if self.critic else {},
            "critic_optimizer": self.critic_optimizer.state_dict() if self.critic else {},
            "guard": self.guard.state_dict(),
            "lr_factor": self.lr_factor,
            "identities": list(self.net_config.identities),
            "steps": self.steps,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["identities"] != list(self.net_config.identities):
            raise DataError(
                f"the checkpoint swaps {state['identities']}, the data has {list(self.net_config.identities)};"
                " train on the dataset version the checkpoint names"
            )
        _load(self.net, state["net"], type(self.net_config).__name__)
        load_optimizer(self.optimizer, state["optimizer"])
        if self.critic:
            _load(self.critic, state["critic"], "critic")
            load_optimizer(self.critic_optimizer, state["critic_optimizer"])
        self.guard.load_state_dict(state["guard"])
        self.lr_factor = state["lr_factor"]
        self.steps, self.images = state["steps"], state["images"]

    # -- one step ---------------------------------------------------------------------------------------------------

    def _enter_phase(self) -> Phase:
        """The phase of this step, with its learning rates set."""
        config, number = self.config, current(self.config.phases, self.images)
        phase = config.phases[number]
        before = self.images - self.context.batch_size * dist.world_size()
        if dist.is_main() and (not self.images or current(config.phases, before) != number):
            logger.info(
                "phase %d of %d from image %d: %s", number + 1, len(config.phases), self.images, phase
            )
        share = min(1.0, self.images / max(1, self.context.total_images))
        factor = (1 + (config.final_lr_factor - 1) * share) * phase.lr_scale * self.lr_factor
        _set_lr(self.optimizer, config.lr * factor)
        if self.critic:
            _set_lr(self.critic_optimizer, config.critic_lr * factor)
        return phase

    def _update(self, share: float) -> None:
        """One update of Adam, of which a random share of the weights takes part: the same on every rank."""
        if share == 1.0:
            self.optimizer.step()
            return
        weights = list(self.net.parameters())
        before = [weight.detach().clone() for weight in weights]
        self.optimizer.step()
        draw = torch.Generator(self.device).manual_seed(self.steps)
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                still = torch.rand(weight.shape, generator=draw, device=self.device) >= share
                weight.copy_(torch.where(still, old, weight))

    def _lesson(self, batch: Batch, phase: Phase) -> _Lesson:
        faces, config = batch.images.float() / 255, self.net_config
        if config.normalise:
            faces = standardise(faces)[0]
        elif self.config.match_colour:
            faces = _match_colour(faces, batch.identity, len(config.identities))
        settings = self.config.warp if phase.warp else self.config.warp.straight()
        where = self._where(batch)
        warped, target = pairs(faces, config.size, config.coverage, settings, where)
        maps = None if where is None else target[:, 3:]
        return _Lesson(
            warped.contiguous(memory_format=torch.channels_last), target[:, :3], batch.identity, maps
        )

    def _where(self, batch: Batch) -> Tensor | None:
        """(N, 4, S, S) maps of face, eyes and mouth in the crops; None where no loss asks. The face is exact in the rows
        that know their mask."""
        if not self.config.losses.needs_points:
            return None
        side = batch.images.shape[-1]
        points = batch.landmarks
        if points is None:
            points = torch.full((len(batch), regions.POINTS, 2), torch.nan, device=batch.images.device)
        maps = regions.maps(points, side, self.config.margin)
        if batch.mask is not None:
            maps[:, :1] = torch.where(batch.mask.isnan(), maps[:, :1], batch.mask)
        return maps

    def _terms(self, lesson: _Lesson, painted: Painted, phase: Phase) -> dict[str, Tensor]:
        """Every term of the loss that counts now, times its weight."""
        terms = self._picture_terms(lesson, painted) | self._mask_terms(lesson, painted, phase)
        config = self.config.losses
        with self.context.autocast(self.device):  # networks only: the other losses are exact
            if phase.perceptual and self.perceptual:
                terms["perceptual"] = phase.perceptual * self.perceptual(painted.face, lesson.target)
            if phase.adversarial:
                terms["adversarial"] = phase.adversarial * config.adversarial * self._judged(lesson, painted)
        return terms

    def _picture_terms(self, lesson: _Lesson, painted: Painted) -> dict[str, Tensor]:
        config, target = self.config.losses, lesson.target
        # a face that is composed through its own mask is taught before: the mask must not hide errors
        face = painted.raw if self.net_config.MASKS == "face" and painted.raw is not None else painted.face
        errors, weights = face - target, self._weights(lesson)
        terms: dict[str, Callable[[], Tensor]] = {
            "mae": lambda: losses.weighted_mean(errors.abs(), weights),
            "mse": lambda: losses.weighted_mean(errors.square(), weights),
            "dssim": lambda: self._dssim(face, lesson),
            "edge": lambda: losses.edge(face, target),
            "eyes": lambda: losses.weighted_mean(errors.abs(), lesson.eyes),
            "mouth": lambda: losses.weighted_mean(errors.abs(), lesson.mouth),
            "parts": lambda: self._parts(lesson, painted),
            "tv": lambda: losses.total_variation(face),
        }
        return {name: getattr(config, name) * term() for name, term in terms.items() if getattr(config, name)}

    def _mask_terms(self, lesson: _Lesson, painted: Painted, phase: Phase) -> dict[str, Tensor]:
        """Of the mask; without any, a term of 0, so that its weights have gradients on every rank."""
        config, mask = self.config.losses, painted.mask
        if mask is None:
            return {}
        terms = {"mask_l1": config.mask_l1 * losses.mask_size(mask, phase.mask_hinge)}
        if config.mask:
            truth = (
                lesson.face if self.net_config.MASKS == "face" else torch.maximum(lesson.eyes, lesson.mouth)
            )
            terms["mask"] = config.mask * (mask - truth).square().mean()
        if config.mask_tv:
            terms["mask_tv"] = config.mask_tv * losses.total_variation(mask)
        return terms

    def _weights(self, lesson: _Lesson) -> Tensor | None:
        """(N, 1, S, S): how much each pixel counts; None where all do alike."""
        config = self.config.losses
        if (config.eye_factor, config.mouth_factor, config.background) == (1.0, 1.0, 1.0):
            return None
        weights = 1 + (config.eye_factor - 1) * lesson.eyes + (config.mouth_factor - 1) * lesson.mouth
        return weights * self._seen(lesson)

    def _seen(self, lesson: _Lesson) -> Tensor:
        """(N, 1, S, S): 1 over the face, `background` elsewhere."""
        return lesson.face + self.config.losses.background * (1 - lesson.face)

    def _dssim(self, face: Tensor, lesson: _Lesson) -> Tensor:
        target = lesson.target
        if self.config.losses.background != 1.0:
            face, target = (picture * self._seen(lesson) for picture in (face, target))
        windows = [
            losses.window(self.net_config.size, divisor) for divisor in self.config.losses.dssim_windows
        ]
        return torch.stack([losses.dssim(face, target, window) for window in windows]).mean()

    def _parts(self, lesson: _Lesson, painted: Painted) -> Tensor:
        """Mean errors of eye and mouth crops of the second head's picture, weighted."""
        assert painted.raw is not None, "FaceSwapConfig allows losses.parts with a parts network only"
        assert lesson.regions is not None, "SwapLosses.needs_points knows of losses.parts"
        config, both = self.config.losses, torch.cat([painted.raw, lesson.target], dim=1)
        total = both.new_zeros(())
        for factor, where in zip(
            (config.eye_factor, config.eye_factor, config.mouth_factor), (1, 2, 3), strict=True
        ):
            made, wanted = regions.crops(both, lesson.regions[:, where], PART_SHARE, PART_PIXELS).chunk(
                2, dim=1
            )
            total = total + factor * (made - wanted).abs().mean()
        return total

    # -- the critic -------------------------------------------------------------------------------------------------

    def _judged(self, lesson: _Lesson, painted: Painted) -> Tensor:
        """What the critic, at rest, thinks of the composed face and of the bare one."""
        assert self.critic is not None, "built where a phase has an adversary"
        self.critic.requires_grad_(False)
        verdicts = [
            losses.painter_loss(self.critic, torch.cat([face, lesson.warped], dim=1))
            for face in _shown(painted)
        ]
        self.critic.requires_grad_(True)
        return torch.stack(verdicts).sum()

    def _update_critic(self, lesson: _Lesson, painted: Painted) -> Tensor:
        faces = _shown(painted)
        fake = torch.cat([torch.cat([face.detach(), lesson.warped], dim=1) for face in faces])
        real = torch.cat([lesson.target, lesson.warped], dim=1).repeat(len(faces), 1, 1, 1)
        with self.context.autocast(self.device):
            loss = losses.critic_loss(self._parallel_critic, real, fake, self.config.losses.mixup)
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.critic_optimizer.step()
        return loss.detach()

    # -- private ----------------------------------------------------------------------------------------------------

    def _metrics(
        self, lesson: _Lesson, painted: Painted, loss: Tensor, terms: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        face = painted.face.detach()
        errors = (face - lesson.target).abs().mean(dim=(1, 2, 3))  # (N,)
        self.guard.observe(face, lesson.target, errors, lesson.identity)
        people = len(self.net_config.identities)
        metrics = {
            "loss": loss.detach(),
            "mae_worst_identity": _means(errors[:, None], lesson.identity, people).max(),
            "phase": loss.new_tensor(float(current(self.config.phases, self.images))),
        }
        if len(terms) > 1:
            metrics |= {f"loss_{name}": value.detach() for name, value in terms.items()}
        if painted.mask is not None:
            metrics["mask_mean"] = painted.mask.detach().mean()
        return metrics

    def _as(self, faces: Tensor, who: Tensor, own: Tensor) -> tuple[Tensor, Tensor | None]:
        """Crops as other people: (N, 3, s, s) uint8, and any mask (N, 1, s, s) in [0, 1]."""
        painted, light = _painted(self.net, self.net_config, faces, who, own)
        return _to_uint8(painted.face, light), painted.mask


def swap(
    net: nn.Module, config: SwapFamily, crops: Tensor, identity: Tensor, source: Tensor | None = None
) -> Tensor:
    """Face crops (N, 3, S, S) uint8 -> the region `coverage` in their middle as `identity` (N,), uint8 (N, 3, s, s).

    source (N,): whose faces the crops show, where that is known: a shared code is moved from their place to the target's."""
    return swap_with_mask(net, config, crops, identity, source)[0]


def swap_with_mask(
    net: nn.Module, config: SwapFamily, crops: Tensor, identity: Tensor, source: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`swap`, and where the face is: (N, 1, s, s) in [0, 1], None for a design that paints no mask of the face."""
    painted, light = _painted(net, config, crops, identity, source)
    return _to_uint8(painted.face, light), painted.mask if config.MASKS == "face" else None


# -- private --------------------------------------------------------------------------------------------------------


def _painted(
    net: nn.Module, config: SwapFamily, crops: Tensor, identity: Tensor, source: Tensor | None
) -> tuple[Painted, tuple[Tensor, Tensor]]:
    """What the network gives for crops (uint8), and the light (mean, deviation) they had."""
    faces = crops.float() / 255
    mean, deviation = torch.tensor(0.5, device=crops.device), torch.tensor(0.2, device=crops.device)
    if config.normalise:
        faces, mean, deviation = standardise(faces)
    middle = centre(faces, config.size, config.coverage)
    who = None if source is None else source.to(crops.device)
    with torch.inference_mode():
        return net.eval()(middle, identity.to(crops.device), who), (mean, deviation)


def _to_uint8(faces: Tensor, light: tuple[Tensor, Tensor]) -> Tensor:
    mean, deviation = light
    back = (faces - 0.5) / 0.2 * deviation + mean  # the light of the picture it came from
    return (back * 255).round().clamp(0, 255).to(torch.uint8)


def _exact(painted: Painted) -> Painted:
    """In fp32: losses are not taken in bf16."""
    return Painted(*(None if part is None else part.float() for part in painted))  # type: ignore[arg-type]


def _shown(painted: Painted) -> list[Tensor]:
    """The faces a critic judges: as composed and, where that differs, as painted."""
    return [painted.face] if painted.raw is None else [painted.face, painted.raw]


def _load(net: nn.Module, weights: dict[str, Tensor], role: str) -> None:
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint is of another {role} (size, widths or design): {' '.join(str(error).split())[:160]}; give the "
            "job another name, or its network the settings of the checkpoint"
        ) from error


def _adam(module: nn.Module, lr: float, config: FaceSwapConfig) -> torch.optim.Adam:
    return torch.optim.Adam(
        module.parameters(), lr=lr, betas=(config.beta1, 0.999), eps=config.adam_eps, fused=True
    )


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _match_colour(faces: Tensor, identity: Tensor, count: int) -> Tensor:
    """Every identity's mean colour moved to the mean of the global batch, of all ranks."""
    means = faces.mean(dim=(2, 3))  # (N, 3)
    member = torch.nn.functional.one_hot(identity.clamp(min=0), count).to(means.dtype)  # (N, count)
    sums = dist.sum_over_ranks(torch.cat([member.T @ means, member.sum(dim=0)[:, None]], dim=1))  # (count, 4)
    own = sums[:, :3] / sums[:, 3:].clamp(min=1)
    everyone = sums[:, :3].sum(dim=0) / sums[:, 3].sum().clamp(min=1)
    return (faces + (everyone - own[identity])[:, :, None, None]).clamp(0, 1)


def _means(values: Tensor, identity: Tensor, count: int) -> Tensor:
    """Mean of values (N, K) per identity -> (count, K); 0 for an identity without rows."""
    member = torch.nn.functional.one_hot(identity.clamp(min=0), count).to(values.dtype)  # (N, count)
    return member.T @ values / member.sum(dim=0).clamp(min=1)[:, None]


def _spread(batch: Batch, count: int) -> list[int]:
    """Up to `count` rows, as many identities as possible before a second picture of one."""
    seen: dict[int, int] = {}
    turns = []
    for who in batch.identity.tolist():
        turns.append(seen.get(who, 0))
        seen[who] = turns[-1] + 1
    return sorted(range(len(turns)), key=lambda row: (turns[row], row))[:count]


def _table(columns: list[Tensor]) -> NDArray[np.uint8]:
    """Columns of pictures (N, 3, s, s) uint8 -> one picture with a row per N."""
    rows = torch.stack(columns, dim=1)  # (N, columns, 3, s, s)
    return images.grid(rows.flatten(0, 1), columns=len(columns))
