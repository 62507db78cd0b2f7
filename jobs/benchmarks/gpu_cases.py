"""Training and inference steps that a CUDA graph can hold, from the platform's networks and torch alone.

A graph replays what was launched once, so nothing here waits for the device or draws on the host: pictures lie on the device
as uint8, rows, noise and warps are drawn there, Adam counts its steps there (`capturable`). Losses and order of updates are
those of learners/gan.py, faceswap.py and detector.py, whose own step draws its noise on the CPU so that a run is the same
everywhere; tests/unit/test_benchmark_gpu.py holds the weights after a step against theirs. Without metrics, EMA and augmentation.
Letters: N batch, Z noise, S side of a picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.nets import NetConfig
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from counterfake.nets.efficientnet import efficientnet_b4
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.nets.sngan import SnganDiscriminator, SnganGenerator
from counterfake.nets.swap import SwapConfig
from counterfake.nets.xception import XceptionConfig

POOL = 4096  # pictures on the device to draw batches from, at most 256 MiB
NODES = 5  # of the grid that bends a face, per side
PEOPLE = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Ready:
    """A case on its device."""

    step: Callable[[], None]
    images: int  # per step
    nets: tuple[nn.Module, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    build: Callable[[torch.device], Ready]
    tiny: Callable[[torch.device], Ready]  # the same step, small enough for a CPU and a unit test
    goal: int = 0  # images/s on one H200; 0 = none


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    # its cache of cast weights would outlive the graph's capture
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


# -- GANs -----------------------------------------------------------------------------------------------------------


def shared_pass_gan(
    generator: NetConfig,
    discriminator: NetConfig,
    batch: int,
    device: torch.device,
    given: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> Ready:
    """Both players move at once, from one pass through D (learners/gan.py, `_update_both_in_one_pass`); no batch norm in D.

    given: reals (N, C, S, S) in [-1, 1] and noise (N, Z) of a step in fp32, so that it can be held against the learner's."""
    g, d = _on(device, generator), _on(device, discriminator)
    g_adam, d_adam = (_adam(net.parameters(), 1e-4, (0.9, 0.999), 1e-7) for net in (g, d))
    drawn = _pictures(generator, batch, device)
    width = int(generator.noise_size)  # type: ignore[attr-defined]

    def step() -> None:
        x, noise = given() if given else (drawn(), torch.randn(batch, width, device=device))
        with torch.autocast(device.type, enabled=False) if given else autocast(device):
            fake = g(noise)
            leaf = fake.detach().float().requires_grad_()
            logits = d(torch.cat([x, leaf])).float()
        d_loss = F.softplus(-logits[:batch]).mean() + F.softplus(logits[batch:]).mean()
        d_adam.zero_grad()
        d_loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        ratio = -torch.exp(-logits[batch:].detach().clamp(min=-50.0))  # (dL_G/dl) / (dL_D/dl)
        g_adam.zero_grad()
        fake.backward((leaf.grad * ratio[:, None, None, None]).to(fake.dtype))  # type: ignore[no-untyped-call]
        d_adam.step()
        g_adam.step()

    return Ready(step, batch, (g, d))


def alternating_gan(
    generator: NetConfig, discriminator: NetConfig, batch: int, d_steps: int, device: torch.device
) -> Ready:
    """Hinge loss; `d_steps` updates of D, each on new reals and fakes, then one of G. Images are the reals that D sees."""
    g, d = _on(device, generator), _on(device, discriminator)
    g_adam = _adam(g.parameters(), 2e-4, (0.0, 0.9), 1e-7)
    d_adam = _adam(d.parameters(), 4e-4, (0.0, 0.9), 1e-7)
    real, width = _pictures(generator, batch, device), int(generator.noise_size)  # type: ignore[attr-defined]

    def fakes() -> Tensor:
        made: Tensor = g(torch.randn(batch, width, device=device))
        return made

    def step() -> None:
        for _ in range(d_steps):
            with autocast(device):
                with torch.no_grad():
                    fake = fakes()
                logits = d(torch.cat([real(), fake.float()])).float()
            loss = F.relu(1 - logits[:batch]).mean() + F.relu(1 + logits[batch:]).mean()
            d_adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            d_adam.step()
        d.requires_grad_(False)
        with autocast(device):
            g_loss = -d(fakes().float()).float().mean()
        g_adam.zero_grad()
        g_loss.backward()  # type: ignore[no-untyped-call]
        g_adam.step()
        d.requires_grad_(True)

    return Ready(step, batch * d_steps, (g, d))


def _dcgan(size: int, channels: int, batch: int, **shape: Any) -> Callable[[torch.device], Ready]:
    """At 28 px the article's; above, as the presets `dcgan-faces`: spectral norm instead of dropout."""
    faces: dict[str, Any] = {"spectral_norm": True, "dropout": 0.0} if size > 28 else {}
    made = DcganGenerator(size=size, channels=channels, **shape)
    read = DcganDiscriminator(size=size, channels=channels, **shape, **faces)
    return lambda device: shared_pass_gan(made, read, batch, device)


def _sngan(size: int, batch: int, d_steps: int, **shape: Any) -> Callable[[torch.device], Ready]:
    made, read = SnganGenerator(size=size, **shape), SnganDiscriminator(size=size, **shape)
    return lambda device: alternating_gan(made, read, batch, d_steps, device)


# -- face swap ------------------------------------------------------------------------------------------------------


def _swap(config: SwapConfig, batch: int) -> Callable[[torch.device], Ready]:
    """swap-shared of two people: bent faces in, straight faces out, mean absolute error."""
    return lambda device: swap(config, batch, device)


def swap(config: SwapConfig, batch: int, device: torch.device) -> Ready:
    """Half of the batch of each person, in a fixed order: choosing rows by identity would wait for the device."""
    named: Any = config.with_identities(PEOPLE)
    net: Any = _on(device, named)
    adam = _adam(net.parameters(), 5e-5, (0.5, 0.999), 1e-8)
    draw = _pool(3, round(config.size / config.coverage), device)

    def step() -> None:
        warped, target = bent(draw(batch).float() / 255, config.size, config.coverage)
        with autocast(device):
            codes = net.encoder(warped.contiguous(memory_format=torch.channels_last)).chunk(2)
            made = torch.cat([decoder(c) for decoder, c in zip(net.decoders, codes, strict=True)])
        loss = (made.float() - target).abs().mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()

    return Ready(step, batch, (net,))


def bent(faces: Tensor, size: int, coverage: float) -> tuple[Tensor, Tensor]:
    """faces (N, 3, S, S) -> (bent, straight), both (N, 3, size, size): learners/warp.py without its moves of the whole face."""
    line = torch.linspace(-coverage, coverage, NODES, device=faces.device)
    nodes = torch.stack(torch.meshgrid(line, line, indexing="xy")).expand(len(faces), -1, -1, -1)
    shaken = nodes + torch.randn(len(faces), 2, NODES, NODES, device=faces.device) * (10 / 256)
    both = torch.stack([shaken, nodes])  # (2, N, 2, 5, 5)
    places = F.interpolate(both.flatten(0, 1), size=size, mode="bilinear", align_corners=True)
    where = places.permute(0, 2, 3, 1).view(2, -1, size, size, 2)
    read = [F.grid_sample(faces, grid, padding_mode="border", align_corners=True) for grid in where]
    return read[0], read[1]


# -- detectors ------------------------------------------------------------------------------------------------------


def detector_training(config: NetConfig, size: int, batch: int, device: torch.device) -> Ready:
    """Binary cross-entropy, gradients clipped, AdamW: learners/detector.py without augmentation."""
    net = _on(device, config)
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True, capturable=device.type == "cuda")
    draw = _pool(3, size, device)
    fake = (torch.arange(batch, device=device) % 2).float()

    def step() -> None:
        with autocast(device):
            logits = net(_scaled(draw(batch))).float()
        loss = F.binary_cross_entropy_with_logits(logits, fake)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        adam.step()

    return Ready(step, batch, (net,))


def detector_inference(config: NetConfig, size: int, batch: int, device: torch.device) -> Ready:
    """Probabilities in bf16, weights included."""
    net = _on(device, config).eval().bfloat16()
    draw = _pool(3, size, device)

    @torch.inference_mode()
    def step() -> None:
        net(_scaled(draw(batch)).bfloat16()).float().sigmoid()

    return Ready(step, batch, (net,))


def _detector(
    kind: Callable[..., Ready], config: NetConfig, size: int, batch: int
) -> Callable[[torch.device], Ready]:
    return lambda device: kind(config, size, batch, device)


# -- private --------------------------------------------------------------------------------------------------------


def _on(device: torch.device, config: NetConfig) -> nn.Module:
    return config.build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _adam(weights: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> Any:
    weights = list(weights)
    on_gpu = weights[0].is_cuda
    return torch.optim.Adam(weights, lr=lr, betas=betas, eps=eps, fused=True, capturable=on_gpu)


def _pool(channels: int, size: int, device: torch.device) -> Callable[[int], Tensor]:
    """Draws batches (N, C, S, S) uint8, with repetition, from random pictures on the device."""
    count = max(1, min(POOL, 2**28 // (channels * size * size)))
    made = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, device=device)
    made = made.contiguous(memory_format=torch.channels_last)
    return lambda batch: made[torch.randint(0, count, (batch,), device=device)]


def _pictures(config: Any, batch: int, device: torch.device) -> Callable[[], Tensor]:
    draw = _pool(config.channels, config.size, device)
    return lambda: _scaled(draw(batch))


def _scaled(pixels: Tensor) -> Tensor:
    """(N, C, S, S) uint8 -> [-1, 1]."""
    return ((pixels.float() - 127.5) / 127.5).contiguous(memory_format=torch.channels_last)


# -- the table ------------------------------------------------------------------------------------------------------


def _swap_case(size: int, batch: int, goal: int = 0) -> Case:
    return Case(_swap(SwapConfig(size=size), batch), _swap(SwapConfig.tiny(), 4), goal)


def _detector_cases(
    name: str, config: NetConfig, size: int, training: tuple[int, int], inference: tuple[int, int]
) -> dict[str, Case]:
    """training and inference: (batch, goal)."""
    small, found = type(config).tiny(), {}
    for label, kind, (batch, goal) in (
        ("training", detector_training, training),
        ("inference", detector_inference, inference),
    ):
        tiny = _detector(kind, small, 96, 2)
        found[f"{name}-{size}-{label}"] = Case(_detector(kind, config, size, batch), tiny, goal)
    return found


SUITES: dict[str, dict[str, Case]] = {
    "gan": {
        "dcgan-mnist": Case(_dcgan(28, 1, 256), _dcgan(28, 1, 4, width=2), 300_000),
        "dcgan-128": Case(_dcgan(128, 3, 256), _dcgan(32, 3, 4, width=2), 15_000),
        "sngan-128": Case(_sngan(128, 64, 5), _sngan(32, 4, 2, width=2), 2_600),
    },
    "swap": {
        "swap-64": _swap_case(64, 256, 18_000),
        "swap-128": _swap_case(128, 128),
        "swap-256": _swap_case(256, 32),
    },
    "detector": {
        **_detector_cases("mobilenetv2", MobileNetV2Config(), 224, (256, 10_000), (512, 45_000)),
        **_detector_cases("efficientnet-b4", efficientnet_b4(), 380, (64, 1_100), (128, 4_500)),
        **_detector_cases("xception", XceptionConfig(), 299, (128, 2_200), (256, 10_000)),
    },
}
