"""What a trained autoencoder is good for: five uses, each with its figure beside the plain way of doing it.

    counterfake run autoencoder denoise      squared error of cleaned digits beside that of the noisy ones
    counterfake run autoencoder reduce       nearest-neighbour accuracy of codes beside principal components and pixels
    counterfake run autoencoder features     codes and classes as a Parquet file
    counterfake run autoencoder compress     bits per picture and squared error beside JPEG and gzip
    counterfake run autoencoder generate     pictures decoded between digits, and from codes drawn like those of digits

Each reads `model` (ae-mnist, or ae-mnist-denoise for denoise; any bundle folder) and the dataset it was trained on, prints
its figures and leaves them with a picture in MLflow (experiment "autoencoder") and in `runs/autoencoder/<model>-<digest>-<use>/`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from counterfake import arrays, bundle, config, images, media, provenance
from counterfake.bundle import Bundle
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import autoencoding, generation
from counterfake.evaluation.autoencoding import Principal, Quantiser
from counterfake.images import Preprocess
from counterfake.learners.autoencoder import corrupt
from counterfake.nets.autoencoder import Autoencoder
from counterfake.storage import write_atomic
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs import evaluate
from jobs.console import Console
from jobs.train_autoencoder import flat, load, pictures, through

SHOWN = 10  # pictures in a row
JPEG_QUALITIES = (3, 5, 10, 30, 75)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderJob:
    """One use of one autoencoder on a split."""

    use: Literal["denoise", "reduce", "features", "compress", "generate"]
    model: str = "ae-mnist"  # registry reference or a bundle's folder
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(split="test"))  # "" = trained on
    limit: int = 10_000  # pictures; 0 = all
    noise: float = 0.5  # denoise: standard deviation of the Gaussian, of 1; clipped to [0, 1]
    training: int = 20_000  # reduce, compress, generate: pictures of the training split; 0 = all
    neighbours: int = 5  # reduce: that vote
    bits: int = 6  # compress: of each unit of the code
    seed: int = 0  # of noise and drawn codes

    def __post_init__(self) -> None:
        if (
            self.noise < 0
            or not 1 <= self.bits <= 16
            or self.neighbours < 1
            or min(self.limit, self.training) < 0
        ):
            raise ConfigError(
                "noise >= 0, bits from 1 to 16, neighbours >= 1, limit and training >= 0 are needed"
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """What a use works on."""

    job: AutoencoderJob
    net: Autoencoder
    held_out: arrays.Pictures
    read: Callable[[], arrays.Pictures]  # the training split
    folder: Path  # for files

    @property
    def rows(self) -> NDArray[np.float32]:
        """The held-out pictures (N, P) in [0, 1]."""
        return flat(self.held_out)

    def sheet(self, *lines: NDArray[Any]) -> NDArray[np.uint8]:
        """Rows of pictures, each (M, P) in [0, 1], below each other."""
        shape = (-1, self.net.config.channels, self.net.config.size, self.net.config.size)
        tiles = torch.from_numpy(np.concatenate([line[:SHOWN] for line in lines]).astype(np.float32)).view(
            shape
        )
        return images.grid(tiles.mul(2).sub(1), columns=min(SHOWN, len(lines[0])))


Outcome = tuple[dict[str, Any], NDArray[np.uint8] | None]  # figures, picture


def run(job: AutoencoderJob, workspace: Workspace, *, console: Console | None = None) -> dict[str, Any]:
    """Encode, decode, compare; returns the figures of the use."""
    console = console or Console(quiet=True)
    found = bundle.read(evaluate.resolve(job.model, workspace))
    data, training = _data(job, found, workspace)
    net = load(found.folder)
    console.stage(f"{job.use} with {found.name} on {data.uri.rpartition('/')[2]} {data.split}")
    folder = workspace.home / "autoencoder" / f"{found.name}-{found.digest[:8]}-{job.use}"
    folder.mkdir(parents=True, exist_ok=True)
    held_out = pictures(data, workspace, console, job.limit)
    task = Task(job, net, held_out, lambda: pictures(training, workspace, console, job.training), folder)
    figures, picture = USES[job.use](task)
    result = {
        "use": job.use,
        "model": found.name,
        "digest": found.digest,
        "pictures": len(held_out.pixels),
        **figures,
    }
    with Tracker.at(workspace).start(
        "autoencoder", f"{found.name}-{job.use}", params=config.to_dict(job)
    ) as log:
        log.metrics({k: v for k, v in config.flatten(figures).items() if isinstance(v, int | float)}, 0)
        log.json("figures.json", result)
        if picture is not None:
            sheet = _marked(found, picture)
            log.picture(job.use, sheet)
            write_atomic(folder / f"{job.use}.png", sheet)
    write_atomic(folder / "figures.json", json.dumps(result, indent=2).encode())
    return {**result, "folder": str(folder), "run_id": log.id}


# -- the uses -------------------------------------------------------------------------------------------------------


def denoise(task: Task) -> Outcome:
    """Squared error against the clean pictures: of the noisy ones, of what the network makes of them, and of as many
    principal components fitted on clean pictures."""
    clean, source = task.rows, torch.Generator().manual_seed(task.job.seed)
    noisy = corrupt(torch.from_numpy(clean), task.job.noise, source).numpy()
    _, cleaned = through(task.net, noisy)
    components = Principal.fit(flat(task.read()), task.net.config.code_size)
    figures = {
        "noise": task.job.noise,
        "mse_noisy": autoencoding.squared_error(noisy, clean),
        "mse_denoised": autoencoding.squared_error(cleaned, clean),
        "mse_pca": autoencoding.squared_error(components.decode(components.encode(noisy)), clean),
    }
    return figures, task.sheet(clean, noisy, cleaned)


def reduce(task: Task) -> Outcome:
    """Accuracy of nearest neighbours in the code, in as many principal components, and in the pixels."""
    training = task.read()
    _need_classes(training, task.held_out)
    seen, rows = flat(training), task.rows
    components = Principal.fit(seen, task.net.config.code_size)
    spaces: dict[str, tuple[Any, Any]] = {
        "codes": (through(task.net, seen)[0], through(task.net, rows)[0]),
        "pca": (components.encode(seen), components.encode(rows)),
        "pixels": (seen, rows),
    }
    figures = {
        f"accuracy_{name}": autoencoding.neighbour_accuracy(
            known, training.class_id, queries, task.held_out.class_id, k=task.job.neighbours
        )
        for name, (known, queries) in spaces.items()
    }
    sizes = {"code_size": task.net.config.code_size, "pixels": task.net.config.pixels}
    return {**figures, **sizes, "neighbours": task.job.neighbours, "training_pictures": len(seen)}, None


def features(task: Task) -> Outcome:
    """codes.parquet: id, class_id and the code of every picture of the split."""
    codes, _ = through(task.net, task.rows)
    table = pa.table({
        "id": list(task.held_out.rows.ids),
        "class_id": pa.array(task.held_out.class_id, mask=task.held_out.class_id < 0),
        "code": pa.FixedSizeListArray.from_arrays(pa.array(codes.ravel()), codes.shape[1]),
    })  # fmt: skip
    path = task.folder / "codes.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())
    dead = int((codes <= 0).all(axis=0).sum())
    return {"file": str(path), "rows": len(codes), "code_size": codes.shape[1], "dead_units": dead}, None


def compress(task: Task) -> Outcome:
    """Bits per picture and squared error: the code in whole numbers, JPEG, and gzip, which loses nothing.

    The decoder has to be there on the other side; its size is named, not counted. JPEG's headers weigh on pictures as
    small as these, so it is measured on single pictures and on one sheet of all of them."""
    rows, codes = task.rows, through(task.net, task.rows)[0]
    quantiser = Quantiser.fit(through(task.net, flat(task.read()))[0], task.job.bits)
    packed = quantiser.pack(codes)
    with torch.inference_mode():
        decoded = task.net.decode(torch.from_numpy(quantiser.unpack(packed)).float()).flatten(1).numpy()
    ways: dict[str, dict[str, float]] = {
        "code": {"bits": float(task.job.bits * packed.shape[1]), "mse": autoencoding.squared_error(decoded, rows)},
        "code_ideal_coder": {"bits": autoencoding.entropy_bits(packed), "mse": autoencoding.squared_error(decoded, rows)},
        "raw": {"bits": 8.0 * rows.shape[1], "mse": 0.0},
    }  # fmt: skip
    for quality in JPEG_QUALITIES:
        ways[f"jpeg_{quality}"] = _jpeg(task.held_out.pixels, quality)
        ways[f"jpeg_{quality}_sheet"] = _jpeg(_sheet(task.held_out.pixels)[None], quality, len(rows))
    for name, bits in autoencoding.gzip_bits(task.held_out.pixels).items():
        ways[f"gzip_{name}"] = {"bits": bits, "mse": 0.0}
    decoder = sum(p.numel() * p.element_size() for p in task.net.decoder.parameters())
    return {"ways": ways, "decoder_bytes": decoder}, task.sheet(rows, decoded)


def generate(task: Task) -> Outcome:
    """Between pairs of digits, and from a Gaussian fitted to the training set's codes, cut at 0 as ReLU does.

    `nearness`: median distance of a drawn picture to the nearest training picture over that of a real one; well above 1
    where the codes between those of real pictures mean nothing."""
    rows, seen = task.rows, flat(task.read())
    codes, known = through(task.net, rows)[0], through(task.net, seen)[0]
    steps = np.linspace(0, 1, SHOWN, dtype=np.float32)[:, None]
    between = [_decoded(task.net, (1 - steps) * codes[i] + steps * codes[i + 1]) for i in (0, 2, 4)]
    rng = np.random.default_rng(task.job.seed)
    drawn = rng.multivariate_normal(known.mean(axis=0), np.cov(known, rowvar=False), min(1000, len(rows)))
    made = _decoded(task.net, np.maximum(drawn, 0).astype(np.float32))
    distance = {
        name: float(
            np.median(np.sqrt(generation.nearest(values.astype(np.float64), seen.astype(np.float64))[0]))
        )
        for name, values in (("made", made), ("real", rows[: len(made)]))
    }
    return {"nearness": distance["made"] / max(distance["real"], 1e-12), "drawn": len(made)}, task.sheet(
        *between, made
    )


USES: dict[str, Callable[[Task], Outcome]] = {
    "denoise": denoise,
    "reduce": reduce,
    "features": features,
    "compress": compress,
    "generate": generate,
}
PRESETS: dict[str, Callable[[], AutoencoderJob]] = {
    "denoise": lambda: AutoencoderJob(use="denoise", model="ae-mnist-denoise"),
    "reduce": lambda: AutoencoderJob(use="reduce"),
    "features": lambda: AutoencoderJob(use="features", limit=0),
    "compress": lambda: AutoencoderJob(use="compress"),
    "generate": lambda: AutoencoderJob(use="generate"),
}


# -- private --------------------------------------------------------------------------------------------------------


def _data(job: AutoencoderJob, found: Bundle, workspace: Workspace) -> tuple[DataConfig, DataConfig]:
    """What to look at, and the training split beside it, both as the network reads pictures."""
    trained = found.info["dataset"] or {}
    if not job.data.uri and not trained:
        raise ConfigError(
            f"{found.name} does not say what it was trained on; name a dataset with --set data.uri=mnist"
        )
    uri = workspace.dataset(job.data.uri) if job.data.uri else f"{trained['uri']}@{trained['version']}"
    read = config.from_dict(Preprocess, found.info["preprocess"])
    data = dataclasses.replace(job.data, uri=uri, preprocess=read, batch_size=500)
    return data, dataclasses.replace(data, split="train", where={})


def _marked(found: Bundle, picture: NDArray[np.uint8]) -> bytes:
    """As PNG that says that a part of what it shows is generated."""
    return provenance.mark(
        media.encode(picture, "png"),
        maker=f"{found.name}@{found.digest[:8]}",
        source_type="compositeWithTrainedAlgorithmicMedia",
    )


def _need_classes(*parts: arrays.Pictures) -> None:
    for part in parts:
        if (part.class_id < 0).any():
            raise DataError(
                f"{part.rows.uri} has pictures without class_id; reduce needs a dataset with classes"
            )


def _decoded(net: Autoencoder, codes: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return net.decode(torch.from_numpy(codes)).flatten(1).numpy()


def _jpeg(found: NDArray[np.uint8], quality: int, count: int = 0) -> dict[str, float]:
    """Bits per picture and squared error of pictures (N, H, W, C) as JPEG files; `count` pictures lie on a sheet."""
    files = [media.encode(np.ascontiguousarray(picture), "jpeg", quality) for picture in found]
    back = np.stack([media.decode_trusted(data)[:, :, : found.shape[3]] for data in files])
    mse = autoencoding.squared_error(back / 255.0, found / 255.0)
    return {"bits": 8 * sum(len(data) for data in files) / (count or len(found)), "mse": mse}


def _sheet(found: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, H, W, C) -> one picture without gaps; what is left of the last row is black."""
    count, height, width, channels = found.shape
    columns = int(np.ceil(np.sqrt(count)))
    lines = -(-count // columns)
    padded = np.zeros((lines * columns, height, width, channels), np.uint8)
    padded[:count] = found
    grid = padded.reshape(lines, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid.reshape(lines * height, columns * width, channels))
