"""Training steps of the dense GAN of the articles on 28-pixel digits, from memory: D on reals and fakes, then G through the D
that has just moved, from new noise; learners/gan.py with the networks of the preset `gan-dense-mnist`.

`keras-train-on-batch` is the form of the articles (`predict`, `train_on_batch` of D on both halves, `train_on_batch` of the two
stacked with D at rest), `tensorflow` the same updates in one tf.function, `torch-eager` the recipe in torch as one writes it.
The limit, `one-pass`, is ours with both players moving at once (`learner.alternate=false`): a sixth less arithmetic, another
algorithm. Same pictures, batch and threads; a round is one step. Losses of the first steps are compared over the repeats,
each with a seed of its own; that of D is the sum over its two halves, for Keras twice the mean over both.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks import gan
from jobs.benchmarks.gan import Losses, conclusions, learner_step, pictures_of, rows_of
from jobs.benchmarks.harness import Contestant, Spec

__all__ = ["CONTESTANTS", "LIMIT", "NEEDS", "UNIT", "conclusions", "setting_up"]

UNIT = "images/s"
LIMIT = "one-pass"
NEEDS = {"tensorflow": ("tensorflow-cpu",), "keras-train-on-batch": ("tensorflow-cpu",)}
NOISE, PIXELS = 100, 784
G_WIDTHS, D_WIDTHS = (256, 512, 1024), (1024, 512, 256)
SLOPE, DROPOUT, RATE, BETA1 = 0.2, 0.3, 2e-4, 0.5


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """(N, 28, 28, 1) uint8 in one file: those of the `gan` benchmark."""
    return gan.setting_up(job, folder, console)


def _counterfake(spec: Spec) -> Contestant:
    from jobs.train_gan import gan_dense_mnist

    return learner_step(gan_dense_mnist().learner, spec)


def _one_pass(spec: Spec) -> Contestant:
    from jobs.train_gan import gan_dense_mnist

    learner: Any = gan_dense_mnist().learner
    return learner_step(dataclasses.replace(learner, alternate=False), spec)


def _torch_eager(spec: Spec) -> Contestant:
    import torch
    import torch.nn.functional as F
    from torch import nn

    def layers(widths: tuple[int, ...], *, dropout: bool, last: list[nn.Module]) -> nn.Module:
        made: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths[:-1]):
            made += [nn.Linear(inputs, outputs), nn.LeakyReLU(SLOPE)]
            made += [nn.Dropout(DROPOUT)] if dropout else []
        return nn.Sequential(*made, nn.Linear(widths[-2], widths[-1]), *last)

    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    generator = layers((NOISE, *G_WIDTHS, PIXELS), dropout=False, last=[nn.Tanh()])
    discriminator = layers((PIXELS, *D_WIDTHS, 1), dropout=True, last=[])
    for layer in (*generator.modules(), *discriminator.modules()):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    g_adam, d_adam = (
        torch.optim.Adam(net.parameters(), lr=RATE, betas=(BETA1, 0.999), eps=1e-7)
        for net in (generator, discriminator)
    )
    pictures, losses = torch.from_numpy(pictures_of(spec)).flatten(1), Losses()
    entropy, ones = F.binary_cross_entropy_with_logits, torch.ones(spec.batch_size, 1)

    def step() -> int:
        real = (pictures[rows_of(len(pictures), losses.steps, spec)].float() - 127.5) / 127.5
        fake = generator(torch.randn(spec.batch_size, NOISE)).detach()
        d_loss = entropy(discriminator(real), ones) + entropy(discriminator(fake), torch.zeros_like(ones))
        d_adam.zero_grad()
        d_loss.backward()  # type: ignore[no-untyped-call]
        d_adam.step()
        g_loss = entropy(discriminator(generator(torch.randn(spec.batch_size, NOISE))), ones)
        g_adam.zero_grad()
        g_loss.backward()  # type: ignore[no-untyped-call]
        g_adam.step()
        losses.add(d_loss.detach(), g_loss.detach())
        return spec.batch_size

    return Contestant(step, warmup=10, facts=lambda: {"losses": losses.mean(step)})


def _keras(spec: Spec, *, sigmoid: bool) -> tuple[Any, Any, Any, Any]:
    """(tensorflow, generator, discriminator, pictures (N, 784) in [-1, 1])."""
    import tensorflow as tf  # type: ignore[import-untyped,import-not-found,unused-ignore]

    tf.config.threading.set_intra_op_parallelism_threads(spec.threads)
    tf.config.threading.set_inter_op_parallelism_threads(spec.threads)
    tf.keras.utils.set_random_seed(spec.seed)
    layers = tf.keras.layers

    def stack(inputs: int, widths: tuple[int, ...], *, dropout: bool, last: Any) -> Any:
        made = [layers.Input((inputs,))]
        for width in widths:
            made += [layers.Dense(width), layers.LeakyReLU(SLOPE)]
            made += [layers.Dropout(DROPOUT)] if dropout else []
        return tf.keras.Sequential([*made, last])

    generator = stack(NOISE, G_WIDTHS, dropout=False, last=layers.Dense(PIXELS, activation="tanh"))
    end = layers.Dense(1, activation="sigmoid" if sigmoid else None)
    discriminator = stack(PIXELS, D_WIDTHS, dropout=True, last=end)
    pictures = (pictures_of(spec).reshape(-1, PIXELS).astype(np.float32) - 127.5) / 127.5
    return tf, generator, discriminator, pictures


def _tensorflow(spec: Spec) -> Contestant:
    tf, generator, discriminator, pictures = _keras(spec, sigmoid=False)
    entropy = tf.keras.losses.BinaryCrossentropy(from_logits=True)
    g_adam, d_adam = (tf.keras.optimizers.Adam(RATE, BETA1) for _ in range(2))
    losses = Losses()

    @tf.function  # type: ignore[untyped-decorator]
    def train(real: Any) -> Any:
        fake = generator(tf.random.normal([spec.batch_size, NOISE]), training=True)
        with tf.GradientTape() as tape:
            real_logits, fake_logits = discriminator(real, training=True), discriminator(fake, training=True)
            d_loss = entropy(tf.ones_like(real_logits), real_logits)
            d_loss += entropy(tf.zeros_like(fake_logits), fake_logits)
        weights = discriminator.trainable_variables
        d_adam.apply_gradients(zip(tape.gradient(d_loss, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            made = generator(tf.random.normal([spec.batch_size, NOISE]), training=True)
            logits = discriminator(made, training=True)
            g_loss = entropy(tf.ones_like(logits), logits)
        weights = generator.trainable_variables
        g_adam.apply_gradients(zip(tape.gradient(g_loss, weights), weights, strict=True))
        return d_loss, g_loss

    def step() -> int:
        losses.add(*train(tf.constant(pictures[rows_of(len(pictures), losses.steps, spec)])))
        return spec.batch_size

    return Contestant(step, warmup=10, facts=lambda: {"losses": losses.mean(step)})


def _keras_train_on_batch(spec: Spec) -> Contestant:
    tf, generator, discriminator, pictures = _keras(spec, sigmoid=True)
    discriminator.compile(optimizer=tf.keras.optimizers.Adam(RATE, BETA1), loss="binary_crossentropy")
    discriminator.trainable = False
    noise = tf.keras.layers.Input((NOISE,))
    both = tf.keras.Model(noise, discriminator(generator(noise)))
    both.compile(optimizer=tf.keras.optimizers.Adam(RATE, BETA1), loss="binary_crossentropy")
    n, rng, losses = spec.batch_size, np.random.default_rng(spec.seed), Losses()
    answers = np.concatenate([np.ones((n, 1)), np.zeros((n, 1))]).astype(np.float32)

    def draw() -> Any:
        return rng.normal(size=(n, NOISE)).astype(np.float32)

    def step() -> int:
        fake = generator.predict(draw(), verbose=0)
        real = pictures[rows_of(len(pictures), losses.steps, spec)]
        for model in (discriminator, both):  # else the returned losses are means over all steps so far
            model.reset_metrics()
        discriminator.trainable = True
        d_loss = discriminator.train_on_batch(np.concatenate([real, fake]), answers)
        discriminator.trainable = False
        losses.add(2 * d_loss, both.train_on_batch(draw(), answers[:n]))
        return n

    return Contestant(step, warmup=10, facts=lambda: {"losses": losses.mean(step)})


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "counterfake": _counterfake,
    "one-pass": _one_pass,
    "torch-eager": _torch_eager,
    "tensorflow": _tensorflow,
    "keras-train-on-batch": _keras_train_on_batch,
}
