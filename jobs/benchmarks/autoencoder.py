"""Training steps of the article's autoencoder at Keras' default batch of 32, from memory: learners/autoencoder.py against
`Model.fit` of Keras, and against the step written plainly in torch.

`keras-fit` is the article's own code (dense layers, `adam`, `binary_crossentropy`), a round of it one call of `fit` over all
pictures; `keras-tf-function` the same step in a tf.function without `fit`. Same pictures, batch and threads. The losses after
LOSS_STEPS are compared over the repeats, each with a seed of its own. Pictures are scikit-learn's digits, enlarged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.harness import Contestant, Spec

UNIT = "images/s"
LIMIT = ""
NEEDS = {"keras-fit": ("tensorflow-cpu",), "keras-tf-function": ("tensorflow-cpu",)}
LOSS_STEPS = 480  # steps after which the losses are compared: ten epochs of 1,536 pictures
ROUND_STEPS = 50  # of a round of ours: clock and round cost nothing beside it
CODE, HIDDEN = 32, 128


def setting_up(job: Any, folder: Path, console: Any) -> dict[str, Any]:
    """(N, 28, 28, 1) uint8 in one file: those of the `gan` benchmark."""
    from jobs.benchmarks import gan

    return gan.setting_up(job, folder, console)


def conclusions(facts: dict[str, Any]) -> dict[str, Any]:
    """Cross-entropy after LOSS_STEPS by contestant, one per seed, and whether that of each peer agrees with ours."""
    from jobs.benchmarks.gan import agree

    losses = {name: [run["losses"] for run in runs] for name, runs in facts.items()}
    ours = losses.pop("counterfake", [])
    return {
        "losses": {"steps": LOSS_STEPS, "counterfake": ours, **losses},
        "losses_agree": {name: agree(ours, theirs) for name, theirs in losses.items()},
    }


def _counterfake(spec: Spec) -> Contestant:
    import torch

    from counterfake import dist, memory, precision
    from counterfake.data import Batch
    from counterfake.learners import LearnerContext
    from counterfake.learners.autoencoder import AutoencoderConfig

    torch.set_num_threads(spec.threads)
    precision.set_matmul(spec.matmul, torch.device("cpu"))
    memory.keep()  # as every training process of ours does
    dist.seed_build(spec.seed)
    pictures = torch.from_numpy(_pictures(spec)).permute(0, 3, 1, 2)
    context = LearnerContext(
        batch_size=spec.batch_size,
        images_per_epoch=len(pictures),
        total_images=10**6,
        channels=1,
        size=spec.size,
        precision=spec.precision,
    )
    learner = AutoencoderConfig().build(device=torch.device("cpu"), context=context)
    unknown, ids = torch.full((spec.batch_size,), -1), [""] * spec.batch_size
    losses = _Losses()

    def step() -> int:
        rows = torch.from_numpy(_rows(len(pictures), learner.steps, spec))
        batch = Batch(images=pictures[rows], fake=unknown, class_id=unknown, identity=unknown, maker=unknown, ids=ids,
                      step=learner.steps, epoch=0)  # fmt: skip
        dist.seed_step(spec.seed, learner.steps)
        losses.add(learner.step(batch)["bce"])
        return spec.batch_size

    return _in_rounds(step, losses)


def _torch_eager(spec: Spec) -> Contestant:
    """The recipe as one writes it: nn.Sequential with a sigmoid, BCELoss, Adam as it comes."""
    import torch
    from torch import nn

    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    pictures = torch.from_numpy(_pictures(spec)).flatten(1).float() / 255
    pixels = pictures.shape[1]
    net = nn.Sequential(
        *(nn.Linear(pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CODE), nn.ReLU()),
        *(nn.Linear(CODE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, pixels), nn.Sigmoid()),
    )
    for layer in (m for m in net if isinstance(m, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    adam, entropy, losses = torch.optim.Adam(net.parameters(), eps=1e-7), nn.BCELoss(), _Losses()

    def step() -> int:
        rows = pictures[torch.from_numpy(_rows(len(pictures), losses.steps, spec))]
        loss = entropy(net(rows), rows)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.add(loss.detach())
        return spec.batch_size

    return _in_rounds(step, losses)


def _keras_model(spec: Spec) -> tuple[Any, Any, Any]:
    """(tensorflow, compiled model, pictures (N, P) in [0, 1]): the article's code."""
    import tensorflow as tf  # type: ignore[import-untyped,import-not-found,unused-ignore]

    tf.config.threading.set_intra_op_parallelism_threads(spec.threads)
    tf.config.threading.set_inter_op_parallelism_threads(spec.threads)
    tf.keras.utils.set_random_seed(spec.seed)
    pictures = _pictures(spec).reshape(len(_pictures(spec)), -1).astype(np.float32) / 255
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            layers.Input((pictures.shape[1],)),
            layers.Dense(HIDDEN, activation="relu"),
            layers.Dense(CODE, activation="relu"),
            layers.Dense(HIDDEN, activation="relu"),
            layers.Dense(pictures.shape[1], activation="sigmoid"),
        ]
    )
    model.compile(optimizer="adam", loss="binary_crossentropy")
    return tf, model, pictures


def _keras_fit(spec: Spec) -> Contestant:
    _, model, pictures = _keras_model(spec)
    per_epoch = -(-len(pictures) // spec.batch_size)
    seen: list[float] = []

    def epoch() -> int:
        history = model.fit(pictures, pictures, batch_size=spec.batch_size, epochs=1, shuffle=True, verbose=0)
        seen.append(float(history.history["loss"][0]))
        return len(pictures)

    def facts() -> dict[str, Any]:
        wanted = -(-LOSS_STEPS // per_epoch)
        while len(seen) < wanted:
            epoch()
        return {"losses": {"bce": round(seen[wanted - 1], 4)}}  # mean over the epoch that ends at LOSS_STEPS

    return Contestant(epoch, warmup=1, facts=facts)


def _keras_function(spec: Spec) -> Contestant:
    tf, model, pictures = _keras_model(spec)
    adam, entropy, losses = tf.keras.optimizers.Adam(), tf.keras.losses.BinaryCrossentropy(), _Losses()

    @tf.function  # type: ignore[untyped-decorator]
    def train(rows: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = entropy(rows, model(rows, training=True))
        adam.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
        return loss

    def step() -> int:
        losses.add(train(tf.constant(pictures[_rows(len(pictures), losses.steps, spec)])))
        return spec.batch_size

    return _in_rounds(step, losses)


CONTESTANTS: dict[str, Callable[[Spec], Contestant]] = {
    "counterfake": _counterfake,
    "torch-eager": _torch_eager,
    "keras-fit": _keras_fit,
    "keras-tf-function": _keras_function,
}


# -- private --------------------------------------------------------------------------------------------------------


def _pictures(spec: Spec) -> np.ndarray[Any, Any]:
    return np.asarray(np.load(spec.inputs["pictures"], allow_pickle=False))


def _rows(count: int, step: int, spec: Spec) -> np.ndarray[Any, Any]:
    """The rows of a step, the same for every contestant: epochs in a fixed order, starting somewhere by seed."""
    return (np.arange(spec.batch_size) + (step + 7 * spec.seed) * spec.batch_size) % count


def _in_rounds(step: Callable[[], int], losses: _Losses) -> Contestant:
    def several() -> int:
        return sum(step() for _ in range(ROUND_STEPS))

    return Contestant(several, warmup=2, facts=lambda: {"losses": losses.mean(step)})


class _Losses:
    """Losses of every step as they come, turned into numbers at the end so that no step waits."""

    def __init__(self) -> None:
        self.steps = 0
        self._values: list[Any] = []

    def add(self, loss: Any) -> None:
        self.steps += 1
        if len(self._values) < LOSS_STEPS:
            self._values.append(loss)

    def mean(self, step: Callable[[], int]) -> dict[str, float]:
        """Over the last tenth of the first LOSS_STEPS; steps that the time did not allow are made up for."""
        while len(self._values) < LOSS_STEPS:
            step()
        return {"bce": round(float(np.mean([float(v) for v in self._values[-(LOSS_STEPS // 10) :]])), 4)}
