"""Training steps of the article's DCGAN on 28-pixel digits, from memory: learners/gan.py against the step written plainly.

`torch-eager` is the recipe in torch as one writes it (nn.Dropout, Adam as it comes, D on real and on fake pictures, two
backward passes); `tensorflow` is the article's own tf.function, in fp32, `tensorflow-bf16` under mixed_bfloat16. Same
pictures, batch and threads; a round is one step. Losses of the first steps are compared over the repeats, each with a
seed of its own, because a step that learns something else may be as fast as it likes. Pictures are scikit-learn's
digits, enlarged: what they show does not change the time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.harness import Contestant, Spec

UNIT = "images/s"
LIMIT = ""
NEEDS = {"tensorflow": ("tensorflow-cpu",), "tensorflow-bf16": ("tensorflow-cpu",)}
LOSS_STEPS = 20  # steps whose losses are compared, the warm-up among them
NOISE = 100


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """(N, 28, 28, 1) uint8 in one file."""
    import cv2
    from sklearn.datasets import load_digits

    path = folder / f"digits-{job.pictures}-{job.size}.npy"
    if not path.exists():
        digits = np.resize(load_digits().images, (job.pictures, 8, 8)) * (255 / 16)
        side = (job.size, job.size)
        large = [cv2.resize(digit.astype(np.uint8), side, interpolation=cv2.INTER_CUBIC) for digit in digits]
        np.save(path, np.stack(large)[..., None])
    return {"pictures": str(path)}


def conclusions(facts: dict[str, Any]) -> dict[str, Any]:
    """Losses after LOSS_STEPS by contestant, one per seed, and whether those of each peer agree with ours."""
    losses = {name: [run["losses"] for run in runs] for name, runs in facts.items()}
    ours = losses.pop("counterfake", [])
    matmul = [run["matmul_error"] for run in facts.get("counterfake", [])]
    return {
        "losses": {"steps": LOSS_STEPS, "counterfake": ours, **losses},
        "losses_agree": {name: agree(ours, theirs) for name, theirs in losses.items()},
        "matmul_error": max(matmul, default=None),
    }


def agree(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> bool:
    """Whether the means over the seeds differ by no more than three standard deviations between seeds, or a tenth.

    Between seeds d_loss and g_loss of these steps differ by 3 to 6 % (one standard deviation), whoever computes them."""
    for name in ours[0] if ours else ():
        a, b = (np.array([run[name] for run in runs]) for runs in (ours, theirs))
        if abs(a.mean() - b.mean()) > max(3 * max(a.std(), b.std()), 0.1 * abs(b.mean())):
            return False
    return True


# -- ours -----------------------------------------------------------------------------------------------------------


def _counterfake(spec: Spec) -> Contestant:
    from counterfake.learners.gan import GanConfig

    return learner_step(GanConfig(), spec)


def learner_step(config: Any, spec: Spec) -> Contestant:
    """Steps of our learner with these networks and losses, on the benchmark's pictures."""
    import torch

    from counterfake import dist, memory, precision
    from counterfake.data import Batch
    from counterfake.learners import LearnerContext

    torch.set_num_threads(spec.threads)
    cpu = torch.device("cpu")
    precision.set_matmul(spec.matmul, cpu)
    memory.keep()  # as every training process of ours does
    dist.seed_build(spec.seed)
    pictures = torch.from_numpy(pictures_of(spec)).permute(0, 3, 1, 2)
    context = LearnerContext(
        batch_size=spec.batch_size,
        images_per_epoch=len(pictures),
        total_images=10**6,
        channels=1,
        size=spec.size,
        precision=spec.precision,
    )
    learner = config.build(device=torch.device("cpu"), context=context)
    losses = Losses()
    unknown = torch.full((spec.batch_size,), -1)
    ids = [""] * spec.batch_size

    def step() -> int:
        rows = rows_of(len(pictures), learner.steps, spec)
        batch = Batch(
            images=pictures[rows],
            fake=unknown,
            class_id=unknown,
            identity=unknown,
            maker=unknown,
            ids=ids,
            step=learner.steps,
            epoch=0,
        )
        dist.seed_step(spec.seed, learner.steps)
        metrics = learner.step(batch)
        losses.add(metrics["d_loss"], metrics["g_loss"])
        return spec.batch_size

    return Contestant(
        step,
        warmup=3,
        facts=lambda: {"losses": losses.mean(step), "matmul_error": precision.matmul_error(cpu)},
    )


# -- peers ----------------------------------------------------------------------------------------------------------


def _torch_eager(spec: Spec) -> Contestant:
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    generator = nn.Sequential(
        nn.Linear(NOISE, 12544, bias=False),
        nn.BatchNorm1d(12544, 1e-3, 0.01),
        nn.LeakyReLU(0.3),
        nn.Unflatten(1, (256, 7, 7)),
        nn.ConvTranspose2d(256, 128, 5, 1, 2, bias=False),
        nn.BatchNorm2d(128, 1e-3, 0.01),
        nn.LeakyReLU(0.3),
        nn.ConvTranspose2d(128, 64, 5, 2, 2, 1, bias=False),
        nn.BatchNorm2d(64, 1e-3, 0.01),
        nn.LeakyReLU(0.3),
        nn.ConvTranspose2d(64, 1, 5, 2, 2, 1, bias=False),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.ZeroPad2d((1, 2, 1, 2)),
        nn.Conv2d(1, 64, 5, 2),
        nn.LeakyReLU(0.3),
        nn.Dropout(0.3),
        nn.ZeroPad2d((1, 2, 1, 2)),
        nn.Conv2d(64, 128, 5, 2),
        nn.LeakyReLU(0.3),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(6272, 1),
    )
    for layer in (*generator, *discriminator):
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    g_weights, d_weights = list(generator.parameters()), list(discriminator.parameters())
    g_adam, d_adam = (torch.optim.Adam(weights, lr=1e-4, eps=1e-7) for weights in (g_weights, d_weights))
    pictures = torch.from_numpy(pictures_of(spec)).permute(0, 3, 1, 2)
    losses = Losses()

    def step() -> int:
        real = (pictures[rows_of(len(pictures), losses.steps, spec)].float() - 127.5) / 127.5
        fake = generator(torch.randn(spec.batch_size, NOISE))
        real_logits, fake_logits = discriminator(real), discriminator(fake)
        g_loss = F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))
        d_loss = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
        d_loss = d_loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
        g_gradients = torch.autograd.grad(g_loss, g_weights, retain_graph=True)
        d_gradients = torch.autograd.grad(d_loss, d_weights)
        for weights, gradients in ((g_weights, g_gradients), (d_weights, d_gradients)):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
        g_adam.step()
        d_adam.step()
        losses.add(d_loss.detach(), g_loss.detach())
        return spec.batch_size

    return Contestant(step, warmup=3, facts=lambda: {"losses": losses.mean(step)})


def _tensorflow(spec: Spec, policy: str = "float32") -> Contestant:
    """The article's code: https://www.tensorflow.org/tutorials/generative/dcgan."""
    import tensorflow as tf  # type: ignore[import-untyped,import-not-found,unused-ignore]

    tf.config.threading.set_intra_op_parallelism_threads(spec.threads)
    tf.config.threading.set_inter_op_parallelism_threads(spec.threads)
    tf.keras.mixed_precision.set_global_policy(policy)
    tf.keras.utils.set_random_seed(spec.seed)
    layers = tf.keras.layers
    generator = tf.keras.Sequential(
        [
            layers.Input((NOISE,)),
            layers.Dense(12544, use_bias=False),
            layers.BatchNormalization(),
            layers.LeakyReLU(),
            layers.Reshape((7, 7, 256)),
            layers.Conv2DTranspose(128, 5, 1, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.LeakyReLU(),
            layers.Conv2DTranspose(64, 5, 2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.LeakyReLU(),
            layers.Conv2DTranspose(
                1, 5, 2, padding="same", use_bias=False, activation="tanh", dtype="float32"
            ),
        ]
    )
    discriminator = tf.keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(64, 5, 2, padding="same"),
            layers.LeakyReLU(),
            layers.Dropout(0.3),
            layers.Conv2D(128, 5, 2, padding="same"),
            layers.LeakyReLU(),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(1, dtype="float32"),
        ]
    )
    entropy = tf.keras.losses.BinaryCrossentropy(from_logits=True)
    g_adam, d_adam = tf.keras.optimizers.Adam(1e-4), tf.keras.optimizers.Adam(1e-4)
    pictures, losses = pictures_of(spec), Losses()

    @tf.function  # type: ignore[untyped-decorator]
    def train(images: Any) -> Any:
        noise = tf.random.normal([spec.batch_size, NOISE])
        with tf.GradientTape() as g_tape, tf.GradientTape() as d_tape:
            fake = generator(noise, training=True)
            real_logits, fake_logits = (
                discriminator(images, training=True),
                discriminator(fake, training=True),
            )
            g_loss = entropy(tf.ones_like(fake_logits), fake_logits)
            d_loss = entropy(tf.ones_like(real_logits), real_logits)
            d_loss += entropy(tf.zeros_like(fake_logits), fake_logits)
        g_gradients = g_tape.gradient(g_loss, generator.trainable_variables)
        d_gradients = d_tape.gradient(d_loss, discriminator.trainable_variables)
        g_adam.apply_gradients(zip(g_gradients, generator.trainable_variables, strict=True))
        d_adam.apply_gradients(zip(d_gradients, discriminator.trainable_variables, strict=True))
        return d_loss, g_loss

    def step() -> int:
        rows = rows_of(len(pictures), losses.steps, spec)
        losses.add(*train(tf.constant((pictures[rows].astype(np.float32) - 127.5) / 127.5)))
        return spec.batch_size

    return Contestant(step, warmup=3, facts=lambda: {"losses": losses.mean(step)})


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "counterfake": _counterfake,
    "torch-eager": _torch_eager,
    "tensorflow": _tensorflow,
    "tensorflow-bf16": lambda spec: _tensorflow(spec, "mixed_bfloat16"),
}


# -- shared with the dense GAN --------------------------------------------------------------------------------------


def pictures_of(spec: Spec) -> np.ndarray[Any, Any]:
    return np.asarray(np.load(spec.inputs["pictures"], allow_pickle=False))


def rows_of(count: int, step: int, spec: Spec) -> Any:
    """The rows of a step: the same for every contestant."""
    return np.random.default_rng([spec.seed, step]).integers(0, count, spec.batch_size)


class Losses:
    """Losses of every step as they come, turned into numbers at the end so that no step waits."""

    def __init__(self) -> None:
        self.steps = 0
        self._values: list[tuple[Any, Any]] = []

    def add(self, d_loss: Any, g_loss: Any) -> None:
        self.steps += 1
        if len(self._values) < LOSS_STEPS:
            self._values.append((d_loss, g_loss))

    def mean(self, step: Callable[[], int]) -> dict[str, float]:
        """Over the second half of the first LOSS_STEPS; steps that the time did not allow are made up for."""
        while len(self._values) < LOSS_STEPS:
            step()
        half = [(float(d), float(g)) for d, g in self._values[LOSS_STEPS // 2 :]]
        d_loss, g_loss = np.mean(half, axis=0)
        return {"d_loss": round(float(d_loss), 4), "g_loss": round(float(g_loss), 4)}
