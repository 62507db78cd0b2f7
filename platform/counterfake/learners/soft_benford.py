"""A GAN whose generator is also asked for natural first digits: the opposite of article S1's detector.

The penalty is the Kullback-Leibler divergence from the first digits of the fakes' quantised DCT coefficients to the generalised
Benford law of the real pictures, k log_b(1 + 1 / (a + d^m)), fitted as in forensics/benford.py (Bonettini et al., ICPR 2020,
https://arxiv.org/abs/2004.07682). Digits are counted softly: a magnitude v lies at log_b(v + 1/2) mod 1 (half a step inside
its digit, never on a border) and belongs to digit d by the difference of two logistic functions at its borders. Rounding to
pixels and to quantisation steps passes gradients straight through (Bengio et al. 2013, https://arxiv.org/abs/1308.3432).
Histograms are taken over the whole batch, the detector's over one picture: at 64 px one picture has 64 blocks.
Letters: N batch, C channels, H W pixels, B blocks of the batch, Q qualities, K coefficients, D digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from counterfake.errors import ConfigError
from counterfake.forensics import benford
from counterfake.learners import LearnerContext
from counterfake.learners.gan import Gan, GanConfig

if TYPE_CHECKING:
    from counterfake.data import Batch

Law = tuple[tuple[float, float, float], ...]  # (k, a, m) of every quality and coefficient, quality by quality
COEFFICIENTS = benford.COEFFICIENTS["true_zigzag"]
K = len(COEFFICIENTS)
LUMA = (0.299, 0.587, 0.114)  # BT.601
FLOOR = 1e-6  # share that an empty digit counts as


@dataclass(frozen=True, kw_only=True)
class SoftBenfordConfig:
    """Which digits are looked at, and the law they should follow."""

    law: Law = ()  # of the real pictures, from `measure`; () = no penalty
    weight: float = 1.0  # of the divergence in the generator's loss
    qualities: tuple[int, ...] = (80, 90, 100)  # JPEG quality factors
    base: int = 10
    temperature: float = 0.01  # width of a digit's border in log_base(magnitude); to 0 = hard counting

    def __post_init__(self) -> None:
        if self.weight < 0 or self.temperature <= 0 or self.base < 4 or not self.qualities:
            raise ConfigError(
                f"benford needs weight >= 0, temperature > 0, base >= 4 and a quality; got {self.weight}, "
                f"{self.temperature}, {self.base} and {self.qualities}"
            )
        if self.law and len(self.law) != len(self.qualities) * K:
            raise ConfigError(
                f"benford.law has {len(self.law)} rows but {len(self.qualities)} qualities need {len(self.qualities) * K}; "
                "measure it again with these qualities"
            )


@dataclass(frozen=True, kw_only=True)
class BenfordGanConfig(GanConfig):
    """A GAN with the penalty on every update of its generator."""

    benford: SoftBenfordConfig = field(default_factory=SoftBenfordConfig)

    def build(self, *, device: torch.device, context: LearnerContext) -> BenfordGan:
        if context.size < 64:
            raise ConfigError(
                f"first digits need pictures of 64 px or more, got {context.size}; set data.preprocess.size"
            )
        return BenfordGan(self, device, context)


class BenfordGan(Gan):
    """As `Gan`; the metric `benford` is the divergence of the generator's last fakes, in nats."""

    def __init__(self, config: BenfordGanConfig, device: torch.device, context: LearnerContext) -> None:
        super().__init__(config, device, context)
        self.penalty = SoftBenford(config.benford, device)
        self._divergence: dict[str, Tensor] = {}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        metrics = super().step(batch)
        return {**metrics, **self._divergence}

    def _fakes(self, turn: Any) -> Tensor:
        """Fakes whose gradient has the penalty's added on its way back, so that one pass through G serves both."""
        fakes = super()._fakes(turn)
        if not self.penalty.config.law:
            return fakes
        leaf = fakes.detach().float().requires_grad_()
        divergence = self.penalty(leaf)
        (slope,) = torch.autograd.grad(self.penalty.config.weight * divergence, leaf)
        fakes.register_hook(lambda gradient: gradient + slope.to(gradient.dtype))  # type: ignore[no-untyped-call]
        self._divergence = {"benford": divergence.detach()}
        return fakes


class SoftBenford:
    """Mean divergence of a batch's digit histograms from the law, over qualities and coefficients; differentiable."""

    def __init__(self, config: SoftBenfordConfig, device: torch.device) -> None:
        self.config = config
        steps = [benford.quantisation_table(q).ravel()[list(COEFFICIENTS)] for q in config.qualities]
        self._steps = torch.tensor(np.stack(steps), dtype=torch.float32, device=device)  # (Q, K)
        self._dct = torch.from_numpy(benford._dct(COEFFICIENTS)).to(device)  # (64, K)
        borders = torch.arange(1, config.base + 1, device=device).double().log() / np.log(config.base)
        self._borders = borders.float()  # (D + 1,), from 0 to 1
        if config.law:
            self.law = curves(config.law, config.base).view(-1, K, config.base - 1).to(device)  # (Q, K, D)

    def __call__(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) in [-1, 1] -> KL(histogram || law) in nats, a scalar."""
        found = self.histograms(images).clamp(min=FLOOR)
        return (found * (found / self.law).log()).sum(dim=2).mean()

    def histograms(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) in [-1, 1] -> shares of first digits over the batch (Q, K, D), each row sums to 1."""
        counts = self.counts(images)
        return counts / counts.sum(dim=2, keepdim=True).clamp(min=FLOOR)

    def counts(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) in [-1, 1] -> soft counts of first digits (Q, K, D); zero coefficients count nowhere."""
        levels = self._magnitudes(images)  # (B, Q, K)
        seen = levels >= 0.5
        place = (levels + 0.5).clamp(min=0.5).log() / float(np.log(self.config.base))
        place = (place - place.detach().floor())[..., None]  # (B, Q, K, 1) in [0, 1)
        share = torch.zeros_like(place)
        for turn in (-1.0, 0.0, 1.0):  # the border between the last digit and 1 goes round
            edges = torch.sigmoid(
                (place + turn - self._borders) / self.config.temperature
            )  # (B, Q, K, D + 1)
            share = share + edges[..., :-1] - edges[..., 1:]
        return (share * seen[..., None]).sum(dim=0)

    def _magnitudes(self, images: Tensor) -> Tensor:
        """|quantised DCT coefficients| (B, Q, K) of the luma of images that were rounded to 8 bits."""
        blocks = F.unfold(_luma(images) - 128, kernel_size=8, stride=8)  # (N, 64, blocks)
        coefficients = blocks.transpose(1, 2).reshape(-1, 64) @ self._dct  # (B, K)
        return _straight_round(coefficients[:, None] / self._steps).abs()


def measure(batches: Iterable[Tensor], config: SoftBenfordConfig) -> Law:
    """The law of pictures, batches of (N, C, H, W) in [-1, 1]: fits to their hard digit histograms over all batches."""
    counter = SoftBenford(
        SoftBenfordConfig(qualities=config.qualities, base=config.base, temperature=1e-5), torch.device("cpu")
    )
    with torch.no_grad():
        counts = sum((counter.counts(batch) for batch in batches), torch.zeros(()))
    if counts.dim() == 0:
        raise ConfigError(
            "the law of first digits needs pictures, but there are none; choose another split or filter"
        )
    shares = (counts / counts.sum(dim=2, keepdim=True).clamp(min=1)).double().numpy()
    parameters, _, _ = benford.fit(shares.reshape(-1, config.base - 1), config.base)
    return tuple((float(k), float(a), float(m)) for k, a, m in parameters)


def curves(law: Law, base: int) -> Tensor:
    """Parameters (k, a, m) -> shares of the digits 1 to base - 1, (len(law), D) float32; each row sums to 1."""
    k, a, m = torch.tensor(law, dtype=torch.float64).T[:, :, None]
    digits = torch.arange(1, base, dtype=torch.float64)
    shares = (k * torch.log1p(1 / (a + digits**m))).clamp(min=FLOOR)
    return (shares / shares.sum(dim=1, keepdim=True)).float()


# -- private --------------------------------------------------------------------------------------------------------


def _luma(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> (N, 1, H, W) in 0 to 255, rounded before and after the sum as files are."""
    pixels = _straight_round((images.float() + 1) * 127.5)
    if pixels.shape[1] == 1:
        return pixels
    weights = torch.tensor(LUMA, device=images.device)[:, None, None]
    return _straight_round((pixels * weights).sum(dim=1, keepdim=True))


def _straight_round(values: Tensor) -> Tensor:
    """Rounded forward, the identity backward."""
    return values + (values.round() - values).detach()
