"""Generative adversarial training: generator and discriminator, each with its optimizer and its own data parallelism.

One discriminator update per `step`; the generator is updated every `d_steps`-th of them: from the same fakes, with both
gradients taken before either is applied (the article's way), or with `alternate` from new fakes judged by the updated
discriminator (Goodfellow et al. 2014, algorithm 1). With networks that know classes both players are told the class.
G generator, D discriminator, x real, z noise, l = D(G(z)); D's logits are higher for real (the GAN convention).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake import dist, images
from counterfake.errors import ConfigError, DataError
from counterfake.learners import LearnerConfig, LearnerContext, Paints, load_optimizer, load_weights
from counterfake.learners.diffaugment import Ada, AdaConfig, DiffAugment, diff_augment
from counterfake.learners.gan_losses import (
    GRADIENT_RATIOS,
    Loss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    mean,
    r1_penalty,
)
from counterfake.nets import NetConfig
from counterfake.nets.conditioning import check_classes
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator

if TYPE_CHECKING:
    from counterfake.data import Batch

PREVIEW_SEED = 4  # of the fixed noise behind every preview
PREVIEW_ROWS = 16  # a 4 x 4 grid; with classes 4 rows of up to 10 columns, one class each
STANDING_ROWS = 128  # noise rows per batch of `standing_statistics`
WON = 0.995  # share of reals, and of fakes, judged rightly above which a batch leaves G nothing to win
FLAT = 0.02  # spread over samples, of the range [-1, 1], below which they are all one picture


@dataclass(frozen=True, kw_only=True)
class GanConfig(LearnerConfig):
    """Two players, one loss. The defaults are the article's DCGAN on MNIST."""

    compiles: ClassVar[bool] = True
    paints: ClassVar[Paints] = "trainedAlgorithmicMedia"
    generator: NetConfig = field(default_factory=DcganGenerator)
    discriminator: NetConfig = field(default_factory=DcganDiscriminator)
    loss: Loss = "non_saturating"
    d_steps: int = 1  # discriminator updates per generator update, each on a batch of its own
    alternate: bool = False  # G answers the updated D with new fakes; False = both move at once
    g_lr: float = 1e-4
    d_lr: float = 1e-4
    g_betas: tuple[float, float] = (0.9, 0.999)
    d_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-7  # Keras' default, torch's is 1e-8
    lr_decay: Literal["none", "linear"] = "none"  # linear: both rates fall to 0 at the end of the run
    gp_weight: float = 0.0  # of WGAN-GP's penalty; the paper's is 10
    r1_gamma: float = 0.0  # weight of the R1 penalty; scales with resolution squared
    r1_every: int = 16  # D updates between R1 penalties, each weighted as many times
    augment: DiffAugment = field(default_factory=DiffAugment)  # of everything D sees
    ada: AdaConfig | None = None  # augmentation as strong as D overfits; on top of `augment`
    embeddings: str = (
        ""  # .npy (classes, embedding) float32, the vector of each class; "" = fixed random ones
    )
    ema_halflife_images: int = (
        0  # of the averaged generator that is shown and exported; 0 = the generator itself
    )
    ema_rampup: float = 0.05  # the half-life is at most this share of the images seen so far
    standing_batches: int = 8  # see `standing_statistics`; 0 = the running statistics of training

    def __post_init__(self) -> None:
        if self.d_steps < 1 or self.r1_every < 1:
            raise ConfigError(
                f"learner.d_steps and r1_every must be at least 1, got {self.d_steps} and {self.r1_every}"
            )
        if min(self.gp_weight, self.r1_gamma, self.standing_batches) < 0:
            raise ConfigError("learner.gp_weight, r1_gamma and standing_batches must not be negative")
        made, read = _shape(self.generator), _shape(self.discriminator)
        if made != read:
            raise ConfigError(
                f"generator makes {_say(made)} but the discriminator reads {_say(read)}; set size and channels of both alike"
            )
        told, judged = _condition(self.generator), _condition(self.discriminator)
        if told != judged:
            raise ConfigError(
                f"generator knows {told[0]} classes with embeddings of {told[1]} but the discriminator {judged[0]} of "
                f"{judged[1]}; set classes and embedding of both alike"
            )

    def build(self, *, device: torch.device, context: LearnerContext) -> Gan:
        return Gan(self, device, context)

    def admit(self, counts: Sequence[Mapping[str, Any]], where: str) -> None:
        """With classes: every row has one, and one that the networks know."""
        known, _ = _condition(self.generator)
        if not known:
            return
        unknown = sum(row["rows"] for row in counts if row["class_id"] is None or row["class_id"] < 0)
        if unknown:
            raise DataError(
                f"{unknown} of {sum(row['rows'] for row in counts)} pictures of {where} have no class, but the networks are "
                "told one for each; ingest a set with classes, or take a preset without"
            )
        most = max((row["class_id"] for row in counts), default=0)
        if most >= known:
            raise DataError(
                f"{where} has class {most} but the networks know 0 to {known - 1}; "
                f"set learner.generator.classes={most + 1} and learner.discriminator.classes={most + 1}"
            )


class _Turn(NamedTuple):
    """What one step plays with. Classes are int64, None where the networks know none."""

    real: Tensor  # (N, C, H, W) in [-1, 1]
    real_class: Tensor | None  # (N,)
    noise: Tensor  # (M, Z)
    fake_class: Tensor | None  # (M,)


class Gan:
    """A generator and a discriminator in training."""

    def __init__(self, config: GanConfig, device: torch.device, context: LearnerContext) -> None:
        made = _shape(config.generator)
        if made != (context.size, context.channels):
            raise ConfigError(
                f"the data gives {_say((context.size, context.channels))} but the generator makes {_say(made)}; "
                "set data.preprocess.size and channels, or learner.generator and learner.discriminator"
            )
        self.config, self.device, self.context = config, device, context
        self.steps = self.images = 0
        self.classes = _condition(config.generator)[0]
        generator, discriminator = (
            _built(net, config.embeddings, device) for net in (config.generator, config.discriminator)
        )
        self._shared = config.loss in GRADIENT_RATIOS and not _mixes_rows(discriminator)
        self._penalised = config.gp_weight > 0 or config.r1_gamma > 0
        if self._penalised and _mixes_rows(discriminator):
            raise ConfigError(
                "a gradient penalty needs a discriminator whose answers do not depend on the rest of the batch; "
                "use one without batch norm, or set learner.gp_weight=0 and learner.r1_gamma=0"
            )
        if self._penalised and context.compile:
            raise ConfigError(
                "gradient penalties have second derivatives, which torch.compile lacks; set loop.compile=false"
            )
        generator, discriminator = context.compiled(generator), context.compiled(discriminator)
        self.average = (
            copy.deepcopy(generator).requires_grad_(False).eval() if config.ema_halflife_images else None
        )
        self.ada = Ada(config.ada, device) if config.ada else None
        self.generator = dist.data_parallel(generator)
        # DistributedDataParallel knows no second derivatives: then the gradients are averaged by hand
        self.discriminator = discriminator if self._penalised else dist.data_parallel(discriminator)
        self.g_optimizer = _adam(generator, config.g_lr, config.g_betas, config.adam_eps)
        self.d_optimizer = _adam(discriminator, config.d_lr, config.d_betas, config.adam_eps)
        self._classes_checked = False

    def step(self, batch: Batch) -> dict[str, Tensor]:
        turn = self._turn(batch)
        self._set_rates()
        if (self.steps + 1) % self.config.d_steps:
            metrics = self._update_discriminator(turn)
        elif self.config.alternate:
            metrics = {**self._update_discriminator(turn), **self._update_generator(turn)}
        elif self._shared:
            metrics = self._update_both_in_one_pass(turn)
        else:
            metrics = self._update_both(turn)
        self.steps += 1
        self.images += len(batch) * dist.world_size()
        self._update_average()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": dist.unwrap(self.generator).state_dict(),
            "discriminator": dist.unwrap(self.discriminator).state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "ada": self.ada.state_dict() if self.ada else {},
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "steps": self.steps,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError if the weights are those of other networks."""
        load_weights(dist.unwrap(self.generator), state["generator"], "generator")
        load_weights(dist.unwrap(self.discriminator), state["discriminator"], "discriminator")
        if self.average:
            load_weights(self.average, state["average"] or state["generator"], "averaged generator")
        if self.ada and state.get("ada"):
            self.ada.load_state_dict(state["ada"])
        load_optimizer(self.g_optimizer, state["g_optimizer"])
        load_optimizer(self.d_optimizer, state["d_optimizer"])
        self.steps, self.images = state["steps"], state["images"]

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        """A grid from noise that is the same in every run; with classes, one column each."""
        columns = min(self.classes, 10) or 4
        rows = 4 * columns
        noise = self._noise(rows, torch.Generator().manual_seed(PREVIEW_SEED))
        classes = torch.arange(rows, device=self.device) % columns if self.classes else None
        fakes = self._shown()(noise, *_given(classes))
        return {"samples": images.grid(images.to_uint8(fakes), columns=columns)}

    def export(self) -> dict[str, tuple[NetConfig, dict[str, Tensor]]]:
        return {"generator": (self.config.generator, self._shown().state_dict())}

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """{}: the loss on held-out pictures says nothing about a generator; evaluation does."""
        return {}

    # -- one step ---------------------------------------------------------------------------------------------------

    def _turn(self, batch: Batch) -> _Turn:
        """A full batch of fakes also beside the last, smaller reals; their classes are drawn evenly."""
        real = images.to_float(batch.images).contiguous(memory_format=torch.channels_last)
        rows = self.context.batch_size
        if not self.classes:
            return _Turn(real, None, self._noise(rows), None)
        if self.device.type == "cpu" or not self._classes_checked:  # elsewhere once: it waits for the device
            check_classes(batch.class_id, self.classes)
            self._classes_checked = True
        return _Turn(real, batch.class_id, self._noise(rows), self._drawn_classes(rows))

    def _update_both_in_one_pass(self, turn: _Turn) -> dict[str, Tensor]:
        """One forward and one backward pass of D for both players.

        dL_G/dG(z) = dL_D/dG(z) * (dL_G/dl) / (dL_D/dl), sample by sample: exact where no layer of D mixes rows."""
        fake = self._fakes(turn)
        leaf = fake.detach().requires_grad_()
        real_logits, fake_logits = self._judge_both(turn, leaf)
        d_loss = discriminator_loss(self.config.loss, real_logits, fake_logits)
        self.d_optimizer.zero_grad()
        d_loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        ratio = GRADIENT_RATIOS[self.config.loss](fake_logits.detach())  # (N,)
        self.g_optimizer.zero_grad()
        fake.backward(leaf.grad * ratio[:, None, None, None].to(leaf.grad.dtype))  # type: ignore[no-untyped-call]
        penalties = self._penalise(turn, fake)
        self.d_optimizer.step()
        self.g_optimizer.step()
        g_loss = generator_loss(self.config.loss, fake_logits)
        return {
            **self._metrics(d_loss, real_logits, fake_logits, fake),
            **penalties,
            "g_loss": g_loss.detach(),
        }

    def _update_both(self, turn: _Turn) -> dict[str, Tensor]:
        """Both players' gradients from the same fakes, then both updates; any loss, any D."""
        fake = self._fakes(turn)
        metrics = self._discriminator_gradient(turn, fake)
        metrics |= self._generator_gradient(turn, fake)
        self.d_optimizer.step()
        self.g_optimizer.step()
        return metrics

    def _update_discriminator(self, turn: _Turn) -> dict[str, Tensor]:
        with torch.no_grad(), self._autocast():
            fake = dist.unwrap(self.generator)(turn.noise, *_given(turn.fake_class))
        metrics = self._discriminator_gradient(turn, fake)
        self.d_optimizer.step()
        return metrics

    def _update_generator(self, turn: _Turn) -> dict[str, Tensor]:
        """G's update against D as it is now, from new noise."""
        rows = len(turn.noise)
        fresh = turn._replace(
            noise=self._noise(rows), fake_class=self._drawn_classes(rows) if self.classes else None
        )
        metrics = self._generator_gradient(fresh, self._fakes(fresh))
        self.g_optimizer.step()
        return metrics

    def _discriminator_gradient(self, turn: _Turn, fake: Tensor) -> dict[str, Tensor]:
        real_logits, fake_logits = self._judge_both(turn, fake.detach())
        d_loss = discriminator_loss(self.config.loss, real_logits, fake_logits)
        self.d_optimizer.zero_grad()
        d_loss.backward()  # type: ignore[no-untyped-call]
        return {**self._metrics(d_loss, real_logits, fake_logits, fake), **self._penalise(turn, fake)}

    def _generator_gradient(self, turn: _Turn, fake: Tensor) -> dict[str, Tensor]:
        critic = dist.unwrap(self.discriminator).requires_grad_(False)
        g_loss = generator_loss(self.config.loss, self._judge(critic, fake, turn.fake_class))
        self.g_optimizer.zero_grad()
        g_loss.backward()  # type: ignore[no-untyped-call]
        critic.requires_grad_(True)
        return {"g_loss": g_loss.detach()}

    def _penalise(self, turn: _Turn, fake: Tensor) -> dict[str, Tensor]:
        """Add the gradients of the penalties that are due to D's, then average them over ranks; full precision."""
        if not self._penalised:
            return {}
        config, found = self.config, {}
        critic = dist.unwrap(self.discriminator)
        if config.gp_weight:
            n = min(len(turn.real), len(fake))
            judge = partial(self._judge_exactly, critic, classes=_first(turn.real_class, n))
            pair = turn.real[:n], fake.detach().to(turn.real.dtype)[:n]
            found["gradient_penalty"] = gradient_penalty(judge, *pair, self._mix(n), config.gp_weight)
        if config.r1_gamma and self.steps % config.r1_every == 0:
            judge = partial(self._judge_exactly, critic, classes=turn.real_class)
            # weighted by the interval: it makes up for the updates without
            found["r1"] = config.r1_every * r1_penalty(judge, turn.real, config.r1_gamma)
        for penalty in found.values():
            penalty.backward()  # type: ignore[no-untyped-call]
        dist.average_gradients(critic)
        return {name: value.detach() for name, value in found.items()}

    # -- what the players see ---------------------------------------------------------------------------------------

    def _fakes(self, turn: _Turn) -> Tensor:
        with self._autocast():
            return self.generator(turn.noise, *_given(turn.fake_class))

    def _judge_both(self, turn: _Turn, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the reals (N,) and of the fakes (M,), from one pass."""
        both = torch.cat([turn.real, fake.to(turn.real.dtype)])
        classes = None
        if turn.real_class is not None and turn.fake_class is not None:
            classes = torch.cat([turn.real_class, turn.fake_class])
        logits = self._judge(self.discriminator, both, classes)
        if self.ada:
            self.ada.observe(logits[: len(turn.real)])
        return logits[: len(turn.real)], logits[len(turn.real) :]

    def _judge(self, critic: nn.Module, pictures: Tensor, classes: Tensor | None) -> Tensor:
        pictures = self._augmented(pictures.float())
        with self._autocast():
            return critic(pictures, *_given(classes)).float()

    def _judge_exactly(self, critic: nn.Module, pictures: Tensor, classes: Tensor | None) -> Tensor:
        return critic(self._augmented(pictures), *_given(classes))

    def _augmented(self, pictures: Tensor) -> Tensor:
        pictures = diff_augment(pictures, self.config.augment)
        return self.ada(pictures) if self.ada else pictures

    # -- around the step --------------------------------------------------------------------------------------------

    def _metrics(self, d_loss: Tensor, real: Tensor, fake: Tensor, pictures: Tensor) -> dict[str, Tensor]:
        """`d_won` and `g_flat` are 0 or 1: over a tick, the share of steps with a sign of collapse."""
        # a Wasserstein critic has no zero of its own, and separates both sides by intent
        wasserstein = self.config.loss == "wasserstein"
        edge = (mean(real) + mean(fake)) / 2 if wasserstein else 0.0
        right, caught = mean((real > edge).float()), mean((fake < edge).float())
        few = pictures.detach()[:PREVIEW_ROWS].float()
        spread = (few - few.mean(dim=0)).square_().mean(dim=0).sqrt_().mean()  # std() is 5 times as slow
        values = {
            "d_loss": d_loss,
            "d_real_accuracy": right,
            "d_fake_accuracy": caught,
            "d_won": (torch.minimum(right, caught) > WON).float() * (not wasserstein),
            "g_sample_std": spread,
            "g_flat": (spread < FLAT).float(),
        }
        if self.ada:
            values["ada_probability"] = self.ada.probability
        return {name: value.detach() for name, value in values.items()}

    @torch.no_grad()
    def _update_average(self) -> None:
        """weights <- lerp(weights, G, 1 - 0.5 ** (images / half-life)); batch statistics are copied."""
        if self.average is None or self.steps % self.config.d_steps:
            return
        images_per_update = self.context.batch_size * dist.world_size() * self.config.d_steps
        halflife = max(1.0, min(self.config.ema_halflife_images, self.images * self.config.ema_rampup))
        generator = dist.unwrap(self.generator)
        for weight, value in zip(self.average.parameters(), generator.parameters(), strict=True):
            weight.lerp_(value, 1 - 0.5 ** (images_per_update / halflife))
        for statistic, seen in zip(self.average.buffers(), generator.buffers(), strict=True):
            statistic.copy_(seen)

    def _set_rates(self) -> None:
        if self.config.lr_decay == "none":
            return
        left = max(0.0, 1 - self.images / self.context.total_images)
        for optimizer, rate in ((self.g_optimizer, self.config.g_lr), (self.d_optimizer, self.config.d_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate * left

    def _shown(self) -> nn.Module:
        """A copy, in evaluation mode, of the generator that people see: averaged, with standing statistics."""
        generator = copy.deepcopy(self.average or dist.unwrap(self.generator)).eval()
        return standing_statistics(generator, self.config.standing_batches, self.classes)

    def _noise(self, rows: int, source: torch.Generator | None = None) -> Tensor:
        """z ~ N(0, 1) (rows, Z), drawn on the CPU so that a GPU run sees the same noise."""
        return torch.randn(rows, self.config.generator.noise_size, generator=source).to(self.device)  # type: ignore[attr-defined]

    def _drawn_classes(self, rows: int) -> Tensor:
        return torch.randint(0, self.classes, (rows,)).to(self.device)

    def _mix(self, rows: int) -> Tensor:
        """Where between a real and a fake picture WGAN-GP looks, (rows,) in [0, 1]."""
        return torch.rand(rows).to(self.device)

    def _autocast(self) -> Any:
        return self.context.autocast(self.device)


@torch.no_grad()
def standing_statistics(generator: nn.Module, batches: int, classes: int = 0) -> nn.Module:
    """`generator`, its batch-norm statistics replaced by the means over `batches` batches of fixed noise; the same module.

    Running statistics follow the weights with a lag (Keras' momentum .99: 100 steps) and start from variance 1, which the
    first layer's true variance of .016 meets only after hundreds of steps. Brock et al. 2019 (https://arxiv.org/abs/1809.11096),
    appendix D. Nothing happens where `batches` is 0 or there is no batch norm."""
    norms = [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms or not batches:
        return generator
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: the plain mean over the batches
        norm.train()
    source = torch.Generator().manual_seed(PREVIEW_SEED + 1)
    device = next(generator.parameters()).device
    width = int(generator.config.noise_size)  # type: ignore[union-attr, arg-type]
    for _ in range(batches):
        noise = torch.randn(STANDING_ROWS, width, generator=source)
        drawn = torch.randint(0, classes, (STANDING_ROWS,), generator=source).to(device) if classes else None
        generator(noise.to(device), *_given(drawn))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return generator


def symptoms(metrics: Mapping[str, float]) -> list[str]:
    """What is wrong with a run, from the metrics of a tick; [] if nothing is known to be."""
    found = []
    if metrics.get("d_won", 0.0) > 0.5:
        found.append(
            f"the discriminator was right about every picture in {metrics['d_won']:.0%} of the last steps: the generator "
            "learns little; lower learner.d_lr or d_steps, or add spectral norm, R1 or augmentation"
        )
    if metrics.get("g_flat", 0.0) > 0.5:
        found.append(
            f"the samples are nearly all the same (spread {metrics.get('g_sample_std', 0.0):.3f}): the generator collapsed; "
            "go back to an older checkpoint, with a lower learner.g_lr or another loss"
        )
    return found


# -- private --------------------------------------------------------------------------------------------------------


def _adam(module: nn.Module, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=lr, betas=betas, eps=eps, fused=True)


def _built(config: NetConfig, embeddings: str, device: torch.device) -> nn.Module:
    """The network on its device, with the given embeddings of classes in its table."""
    net = config.build()
    if embeddings:
        table = net.get_buffer("condition.table") if _condition(config)[1] else None
        if table is None:
            raise ConfigError(
                "learner.embeddings is set but the networks read none; set embedding in both, to the vectors' length"
            )
        table.copy_(_read_embeddings(embeddings, tuple(table.shape)))
    # channels last: 5 % faster on CPUs, more on GPUs
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _read_embeddings(path: str, shape: tuple[int, ...]) -> Tensor:
    try:
        array = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"learner.embeddings {path} is no readable .npy file of numbers") from error
    if array.shape != shape:
        raise ConfigError(f"learner.embeddings {path} has shape {array.shape}, the networks need {shape}")
    return torch.from_numpy(array.astype(np.float32))


def _mixes_rows(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def _shape(net: NetConfig) -> tuple[int, int]:
    """(size, channels) of the pictures a network makes or reads."""
    return int(net.size), int(net.channels)  # type: ignore[attr-defined]


def _say(shape: tuple[int, int]) -> str:
    return f"{shape[0]} px pictures of {shape[1]} channel{'s' if shape[1] != 1 else ''}"


def _condition(net: NetConfig) -> tuple[int, int]:
    """(classes, length of their embeddings) a network is told; 0 = none."""
    return int(getattr(net, "classes", 0)), int(getattr(net, "embedding", 0))


def _given(classes: Tensor | None) -> tuple[Tensor, ...]:
    """The second argument of a network that knows classes."""
    return () if classes is None else (classes,)


def _first(classes: Tensor | None, n: int) -> Tensor | None:
    return None if classes is None else classes[:n]
