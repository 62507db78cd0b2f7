"""Train the article's dense autoencoder and hold it against principal components and against data it has never seen.

    counterfake run ingest mnist --set source.path=FOLDER            once
    counterfake run ingest fashion-mnist --set source.path=FOLDER    optional: pictures of another kind
    counterfake run train-autoencoder ae-mnist-s3                    784-128-32-128-784, batch 32, 3 epochs
    counterfake run train-autoencoder ae-mnist-denoise               Gaussian noise of 0.5 on the input
    counterfake run train-autoencoder ae-mnist-copy                  a code as wide as the picture: does it learn to copy?
    counterfake run train-autoencoder ae-mnist-smoke                 300 steps

One thread: ae-mnist-s3 took 25 s on 2 busy cores. Expected of it on the test split: cross-entropy 0.0934, squared error
0.0104, 31 % under that of 32 principal components (0.0152), and ten times as much on Fashion-MNIST; ae-mnist-copy: 0.0031,
and 30 times as much there, so 3 epochs teach it digits and not the identity. `counterfake run autoencoder` uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterfake import arrays, bundle
from counterfake.data import DataConfig
from counterfake.errors import CheckpointError, NotFoundError
from counterfake.evaluation import autoencoding
from counterfake.evaluation.autoencoding import Principal
from counterfake.images import Preprocess
from counterfake.learners.autoencoder import AutoencoderConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.autoencoder import Autoencoder, DenseAutoencoder
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs.console import Console
from jobs.training import train

ELSEWHERE = "fashion-mnist"  # pictures of another kind, where the workspace has them


def run(job: TrainJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Train, then judge on the held-out split; returns the figures of both."""
    console = console or Console(quiet=True)
    result = train(job, workspace, console)
    if job.validation is None or (isinstance(job.learner, AutoencoderConfig) and job.learner.noise):
        return result  # with noise the target is not the input: `counterfake run autoencoder denoise` judges that
    judged = judge(Path(result["bundle"]), job.data, job.validation, workspace, console)
    with Tracker.at(workspace).resume(result["run_id"]) as log:
        log.metrics({f"test_{name}": value for name, value in judged.items()}, result["steps"])
    for line in said(judged):
        console.event(line)
    return {**result, "judged": judged}


def judge(
    folder: Path, training: DataConfig, test: DataConfig, workspace: Workspace, console: Console
) -> dict[str, float]:
    """Errors on the test split beside those of as many principal components of the training split, and elsewhere."""
    net = load(folder)
    size = net.config.code_size
    seen, held_out = (flat(pictures(data, workspace, console)) for data in (training, test))
    codes, made = through(net, held_out)
    figures = {
        "bce": autoencoding.cross_entropy(made, held_out),
        "mse": autoencoding.squared_error(made, held_out),
        "code_size": float(size),
        "dead_units": float((codes <= 0).all(axis=0).sum()),
        "mean_picture_mse": autoencoding.squared_error(seen.mean(axis=0), held_out),
    }
    if size < net.config.pixels:  # as many components as pixels lose nothing
        components = Principal.fit(seen, size)
        linear = components.decode(components.encode(held_out))
        figures["pca_mse"] = autoencoding.squared_error(linear, held_out)
        figures["mse_under_pca"] = 1 - figures["mse"] / figures["pca_mse"]
    return figures | _elsewhere(net, test, workspace, console)


def said(judged: dict[str, float]) -> list[str]:
    """The judgement in a few lines."""
    lines = [f"test cross-entropy {judged['bce']:.4f}, squared error {judged['mse']:.5f}"]
    if "pca_mse" in judged:
        lines[0] += (
            f", {100 * judged['mse_under_pca']:.0f} % under that of {judged['code_size']:.0f} principal components "
            f"({judged['pca_mse']:.5f})"
        )
    if "elsewhere_mse" in judged:
        lines.append(
            f"on {ELSEWHERE}: cross-entropy {judged['elsewhere_bce']:.4f}, squared error {judged['elsewhere_mse']:.5f}, "
            f"{judged['elsewhere_mse'] / judged['mse']:.1f} times as much"
        )
    return lines


def load(folder: Path) -> Autoencoder:
    """The network of an autoencoder's bundle, verified. Raises CheckpointError for another kind."""
    net = bundle.load_nets(bundle.read(folder)).get("autoencoder")
    if not isinstance(net, Autoencoder):
        raise CheckpointError(f"{folder} holds no autoencoder; train one with train-autoencoder")
    return net


def pictures(data: DataConfig, workspace: Workspace, console: Console, limit: int = 0) -> arrays.Pictures:
    """A split in memory."""
    data = dataclasses.replace(data, uri=workspace.dataset(data.uri))
    with console.progress(f"reading {data.uri.rpartition('/')[2]} {data.split}", None) as advance:
        return arrays.load(data, limit=limit, cache=workspace.cache, progress=advance)


def flat(found: arrays.Pictures) -> NDArray[np.float32]:
    """(N, P) in [0, 1], in the order the network flattens: channel, row, column."""
    rows = found.pixels.transpose(0, 3, 1, 2).reshape(len(found.pixels), -1)
    return np.asarray(rows, np.float32) / np.float32(255)


def through(net: Autoencoder, rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """rows (N, P) -> codes (N, K) and reconstructions (N, P)."""
    import torch

    with torch.inference_mode():
        codes = net.encoder(torch.from_numpy(rows))
        return codes.numpy(), net.decode(codes).flatten(1).numpy()


# -- presets --------------------------------------------------------------------------------------------------------


def ae_mnist_s3() -> TrainJob:
    """The article's code: 209,968 parameters, Adam, binary cross-entropy, Keras' batch of 32, 3 epochs."""
    data = DataConfig(uri="mnist", batch_size=32, preprocess=Preprocess(size=28, channels=1))
    return TrainJob(
        name="ae-mnist-s3",
        task="autoencoder",
        data=data,
        validation=dataclasses.replace(data, split="test", batch_size=500),
        learner=AutoencoderConfig(),
        # steps of 32 rows: a second thread gains a fifth on an idle machine and waits for ever on a busy one
        loop=LoopConfig(epochs=3, tick_steps=0, threads=1),
        register_as="ae-mnist",
    )


def ae_mnist_denoise() -> TrainJob:
    """The same network, taught to take away Gaussian noise of 0.5."""
    job = ae_mnist_s3()
    return dataclasses.replace(
        job, name="ae-mnist-denoise", learner=AutoencoderConfig(noise=0.5), register_as="ae-mnist-denoise"
    )


def ae_mnist_copy() -> TrainJob:
    """The article's warning that a code of 784 numbers learns the identity: then clothes would be reconstructed too."""
    net = DenseAutoencoder(hidden=(784,), code_size=784)
    return dataclasses.replace(
        ae_mnist_s3(), name="ae-mnist-copy", learner=AutoencoderConfig(net=net), register_as=""
    )


def ae_mnist_smoke() -> TrainJob:
    """300 steps of 32 digits."""
    return dataclasses.replace(
        ae_mnist_s3(),
        name="ae-mnist-smoke",
        loop=LoopConfig(steps=300, tick_steps=100, threads=1),
        register_as="",
    )


PRESETS: dict[str, Callable[[], TrainJob]] = {
    "ae-mnist-s3": ae_mnist_s3,
    "ae-mnist-denoise": ae_mnist_denoise,
    "ae-mnist-copy": ae_mnist_copy,
    "ae-mnist-smoke": ae_mnist_smoke,
}


# -- private --------------------------------------------------------------------------------------------------------


def _elsewhere(
    net: Autoencoder, test: DataConfig, workspace: Workspace, console: Console
) -> dict[str, float]:
    """The errors on pictures of another kind, where the workspace has any of the same size."""
    data = dataclasses.replace(test, uri=ELSEWHERE, split="test", where={})
    try:
        rows = flat(pictures(data, workspace, console))
    except NotFoundError:
        console.event(
            f"this workspace has no {ELSEWHERE}: ingest it to see how badly other pictures are reconstructed"
        )
        return {}
    _, made = through(net, rows)
    return {
        "elsewhere_bce": autoencoding.cross_entropy(made, rows),
        "elsewhere_mse": autoencoding.squared_error(made, rows),
    }
