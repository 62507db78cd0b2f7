"""Generative adversarial training: generator and discriminator, each with its optimizer and its own data parallelism.

One discriminator update per `step`; the generator is updated every `d_steps`-th of them. With d_steps = 1 both
players' gradients are taken before either is applied, from the same fakes, as in the article. G generator,
D discriminator, x real, z noise, l = D(G(z)), s the sigmoid; D's logits are higher for real (the GAN convention).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from counterfake import dist, images
from counterfake.errors import ConfigError
from counterfake.learners import LearnerConfig, LearnerContext, load_optimizer
from counterfake.nets import NetConfig
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator

if TYPE_CHECKING:
    from counterfake.data import Batch

PREVIEW_SEED = 4  # of the fixed noise behind every preview
PREVIEW_ROWS = 16  # a 4 x 4 grid


@dataclass(frozen=True, kw_only=True)
class GanConfig(LearnerConfig):
    """Two players, one loss. The defaults are the article's DCGAN on MNIST."""

    generator: NetConfig = field(default_factory=DcganGenerator)
    discriminator: NetConfig = field(default_factory=DcganDiscriminator)
    loss: Literal["non_saturating", "minimax", "lsgan", "hinge"] = "non_saturating"
    d_steps: int = 1  # discriminator updates per generator update, each on a batch of its own
    g_lr: float = 1e-4
    d_lr: float = 1e-4
    g_betas: tuple[float, float] = (0.9, 0.999)
    d_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-7  # Keras' default, torch's is 1e-8
    ema_halflife_images: int = (
        0  # of the averaged generator that is shown and exported; 0 = the generator itself
    )
    ema_rampup: float = 0.05  # the half-life is at most this share of the images seen so far

    def __post_init__(self) -> None:
        if self.d_steps < 1:
            raise ConfigError(f"learner.d_steps must be at least 1, got {self.d_steps}")
        made, read = _shape(self.generator), _shape(self.discriminator)
        if made != read:
            raise ConfigError(
                f"generator makes {_say(made)} but the discriminator reads {_say(read)}; set size and channels of both alike"
            )

    def build(self, *, device: torch.device, context: LearnerContext) -> Gan:
        return Gan(self, device, context)


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
        layout = torch.channels_last  # 5 % faster on CPUs, more on GPUs
        generator = config.generator.build().to(device, memory_format=layout)  # type: ignore[call-overload]
        discriminator = config.discriminator.build().to(device, memory_format=layout)  # type: ignore[call-overload]
        self.average = (
            copy.deepcopy(generator).requires_grad_(False).eval() if config.ema_halflife_images else None
        )
        self.generator = dist.data_parallel(generator)
        self.discriminator = dist.data_parallel(discriminator)
        self.g_optimizer = _adam(generator, config.g_lr, config.g_betas, config.adam_eps)
        self.d_optimizer = _adam(discriminator, config.d_lr, config.d_betas, config.adam_eps)
        self._shared = config.loss in _GRADIENT_RATIOS and not _mixes_rows(discriminator)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        real = images.to_float(batch.images).contiguous(memory_format=torch.channels_last)
        noise = self._noise(
            self.context.batch_size
        )  # a full batch of fakes also beside the last, smaller reals
        if (self.steps + 1) % self.config.d_steps:
            metrics = self._update_discriminator(real, noise)
        elif self.config.d_steps == 1 and self._shared:
            metrics = self._update_both_in_one_pass(real, noise)
        else:
            metrics = self._update_both(real, noise)
        self.steps += 1
        self.images += len(batch) * dist.world_size()
        self._update_average()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": dist.unwrap(self.generator).state_dict(),
            "discriminator": dist.unwrap(self.discriminator).state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "steps": self.steps,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        dist.unwrap(self.generator).load_state_dict(state["generator"])
        dist.unwrap(self.discriminator).load_state_dict(state["discriminator"])
        if self.average:
            self.average.load_state_dict(state["average"] or state["generator"])
        load_optimizer(self.g_optimizer, state["g_optimizer"])
        load_optimizer(self.d_optimizer, state["d_optimizer"])
        self.steps, self.images = state["steps"], state["images"]

    @torch.inference_mode()
    def preview(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        """A 4 x 4 grid from noise that is the same in every run."""
        generator = self._best_generator()
        was_training = generator.training
        fakes = generator.eval()(self._noise(PREVIEW_ROWS, torch.Generator().manual_seed(PREVIEW_SEED)))
        generator.train(was_training)
        return {"samples": images.grid(images.to_uint8(fakes), columns=4)}

    def export(self) -> dict[str, tuple[NetConfig, dict[str, Tensor]]]:
        return {"generator": (self.config.generator, self._best_generator().state_dict())}

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """{}: the loss on held-out pictures says nothing about a generator; evaluation does."""
        return {}

    # -- one step ---------------------------------------------------------------------------------------------------

    def _update_both_in_one_pass(self, real: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One forward and one backward pass of D for both players.

        dL_G/dG(z) = dL_D/dG(z) * (dL_G/dl) / (dL_D/dl), sample by sample: exact where no layer of D mixes rows."""
        with self._autocast():
            fake = self.generator(noise)
        leaf = fake.detach().requires_grad_()
        with self._autocast():
            logits = self.discriminator(torch.cat([real, leaf.to(real.dtype)])).float()
        real_logits, fake_logits = logits[: len(real)], logits[len(real) :]
        d_loss = discriminator_loss(self.config.loss, real_logits, fake_logits)
        self.d_optimizer.zero_grad()
        d_loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        ratio = _GRADIENT_RATIOS[self.config.loss](fake_logits.detach())  # (N,)
        self.g_optimizer.zero_grad()
        fake.backward(leaf.grad * ratio[:, None, None, None].to(leaf.grad.dtype))
        self.d_optimizer.step()
        self.g_optimizer.step()
        return _metrics(d_loss, real_logits, fake_logits, fake, generator_loss(self.config.loss, fake_logits))

    def _update_both(self, real: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Both players' gradients from the same fakes, then both updates; any loss, any D."""
        with self._autocast():
            fake = self.generator(noise)
        metrics = self._discriminator_gradient(real, fake)
        critic = dist.unwrap(self.discriminator).requires_grad_(False)
        with self._autocast():
            logits = critic(fake)
        g_loss = generator_loss(self.config.loss, logits.float())
        self.g_optimizer.zero_grad()
        g_loss.backward()  # type: ignore[no-untyped-call]
        critic.requires_grad_(True)
        self.d_optimizer.step()
        self.g_optimizer.step()
        return {**metrics, "g_loss": g_loss.detach()}

    def _update_discriminator(self, real: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), self._autocast():
            fake = dist.unwrap(self.generator)(noise)
        metrics = self._discriminator_gradient(real, fake)
        self.d_optimizer.step()
        return metrics

    def _discriminator_gradient(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            logits = self.discriminator(torch.cat([real, fake.detach().to(real.dtype)])).float()
        real_logits, fake_logits = logits[: len(real)], logits[len(real) :]
        d_loss = discriminator_loss(self.config.loss, real_logits, fake_logits)
        self.d_optimizer.zero_grad()
        d_loss.backward()  # type: ignore[no-untyped-call]
        return _metrics(d_loss, real_logits, fake_logits, fake)

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

    def _best_generator(self) -> nn.Module:
        return self.average or dist.unwrap(self.generator)

    def _noise(self, rows: int, source: torch.Generator | None = None) -> Tensor:
        """z ~ N(0, 1) (rows, Z), drawn on the CPU so that a GPU run sees the same noise."""
        return torch.randn(rows, self.config.generator.noise_size, generator=source).to(self.device)  # type: ignore[attr-defined]

    def _autocast(self) -> Any:
        return self.context.autocast(self.device)


def discriminator_loss(name: str, real: Tensor, fake: Tensor) -> Tensor:
    """D's loss from logits of real (N,) and fake (M,) pictures -> scalar. Each side is its own mean; the two are added."""
    if name == "lsgan":
        return 0.5 * _mean((real - 1) ** 2) + 0.5 * _mean(fake**2)
    if name == "hinge":
        return _mean(F.relu(1 - real)) + _mean(F.relu(1 + fake))
    return _mean(F.softplus(-real)) + _mean(F.softplus(fake))  # -log s(D(x)) - log(1 - s(l))


def generator_loss(name: str, fake: Tensor) -> Tensor:
    """G's loss from the logits of its pictures (M,) -> scalar."""
    if name == "lsgan":
        return 0.5 * ((fake - 1) ** 2).mean()
    if name == "hinge":
        return -fake.mean()
    if name == "minimax":
        return -F.softplus(fake).mean()  # log(1 - s(l)), Goodfellow et al. 2014, eq. 1
    return F.softplus(-fake).mean()  # -log s(l)


# -- private --------------------------------------------------------------------------------------------------------

# (dL_G/dl) / (dL_D/dl), where it is defined for every logit
_GRADIENT_RATIOS = {
    "non_saturating": lambda logits: -torch.exp(-logits.clamp(min=-50.0)),  # (s - 1) / s
    "minimax": lambda logits: -torch.ones_like(logits),  # -s / s
}


def _adam(module: nn.Module, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=lr, betas=betas, eps=eps, fused=True)


def _mean(values: Tensor) -> Tensor:
    """The mean; 0 of no rows, which is what a rank may get of an epoch's last batch."""
    return values.sum() / max(len(values), 1)


def _metrics(
    d_loss: Tensor, real: Tensor, fake: Tensor, pictures: Tensor, g_loss: Tensor | None = None
) -> dict[str, Tensor]:
    values = {
        "d_loss": d_loss,
        "d_real_accuracy": _mean((real > 0).float()),
        "d_fake_accuracy": _mean((fake < 0).float()),
        "g_sample_std": pictures.detach()[:16].float().std(dim=0).mean(),  # near 0 = mode collapse
    }
    if g_loss is not None:
        values["g_loss"] = g_loss
    return {name: value.detach() for name, value in values.items()}


def _mixes_rows(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def _shape(net: NetConfig) -> tuple[int, int]:
    """(size, channels) of the pictures a network makes or reads."""
    return int(net.size), int(net.channels)  # type: ignore[attr-defined]


def _say(shape: tuple[int, int]) -> str:
    return f"{shape[0]} px pictures of {shape[1]} channel{'s' if shape[1] != 1 else ''}"
