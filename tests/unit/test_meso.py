"""MesoNet: the authors' weights reproduce the authors' answers on their own sample pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from counterfake import bundle, images, media, predictor
from counterfake.config import override
from counterfake.errors import CheckpointError, ConfigError
from counterfake.nets.meso import FlattenLikeKeras, MesoConfig
from counterfake.workspace import Workspace
from jobs import import_detector

PUBLISHED = {"df00204": 0.041, "df01254": 0.049, "real00240": 0.990, "real00772": 0.998}


@pytest.mark.parametrize("name", PUBLISHED)
def test_meso4_gives_the_published_probabilities(shared_data: Path, name: str) -> None:
    net = MesoConfig(weights=str(weights(shared_data, "Meso4_DF"))).build().eval()
    with torch.inference_mode():
        real = 1 - float(net(sample(shared_data, name)).sigmoid())  # 1 = real there, 1 = fake here
    assert real == pytest.approx(PUBLISHED[name], abs=6e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_mesoinception_is_right_about_the_same_pictures(shared_data: Path, name: str) -> None:
    path = weights(shared_data, "MesoInception_DF")
    net = MesoConfig(variant="inception", weights=str(path)).build().eval()
    with torch.inference_mode():
        fake = float(net(sample(shared_data, name)).sigmoid())
    assert (fake > 0.95) if name.startswith("df") else (fake < 0.05)


@pytest.mark.parametrize(("variant", "count"), [("meso4", 27_977), ("inception", 28_615)])
def test_parameter_counts_are_the_papers(variant: str, count: int) -> None:
    assert sum(p.numel() for p in MesoConfig(variant=variant).build().parameters()) == count


def test_maps_are_flattened_channels_fastest() -> None:
    maps = torch.arange(12.0).view(1, 3, 2, 2)
    want = torch.tensor([0.0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    assert torch.equal(FlattenLikeKeras()(maps).flatten(), want)


def test_weights_of_another_variant_size_or_file_are_refused(shared_data: Path, tmp_path: Path) -> None:
    path = str(weights(shared_data, "Meso4_DF"))
    with pytest.raises(CheckpointError, match="have 4 conv2d layers, the net has 16"):
        MesoConfig(variant="inception", weights=path).build()
    with pytest.raises(CheckpointError, match=r"has shape \(16, 1024\), the net needs \(16, 256\)"):
        MesoConfig(size=128, weights=path).build()
    with pytest.raises(CheckpointError, match="expected abc"):
        MesoConfig(weights=path, weights_sha256="abc").build()
    (tmp_path / "no.npz").write_text("no archive")
    with pytest.raises(CheckpointError, match=r"no \.npz of arrays"):
        MesoConfig(weights=str(tmp_path / "no.npz")).build()
    with pytest.raises(ConfigError, match="multiple of 32"):
        MesoConfig(size=100)


def test_the_imported_bundle_answers_as_the_network_does(shared_data: Path, workspace: Workspace) -> None:
    path = weights(shared_data, "Meso4_DF")
    changes = {"weights": str(path), "preprocess.crop": "none", "register_as": ""}
    done = import_detector.run(override(import_detector.meso4_df(), changes), workspace)
    loaded = predictor.load(done["bundle"])
    data = existing(shared_data / "mesonet_samples" / "df00204.jpg").read_bytes()
    assert loaded.predict_bytes([data])[0] == pytest.approx(0.9487, abs=1e-3)  # pixels averaged, not dropped
    assert bundle.load_nets(bundle.read(Path(done["bundle"])))["detector"].training is False
    assert loaded.bundle.config["detector"]["weights"] is None
    assert len(loaded.bundle.config["detector"]["weights_sha256"]) == 64
    heat = loaded.heatmap(loaded.decode(data))
    assert heat.shape == (32, 32)


def test_an_import_without_weights_says_what_to_set(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="weights is not set"):
        import_detector.run(import_detector.meso4_df(), workspace)


def sample(folder: Path, name: str) -> torch.Tensor:
    """(1, 3, 256, 256) in [-1, 1], resized by dropping pixels as the authors' loader did."""
    pixels = media.decode(existing(folder / "mesonet_samples" / f"{name}.jpg").read_bytes())
    rows, columns = (((np.arange(256) + 0.5) * side / 256).astype(int) for side in pixels.shape[:2])
    square = pixels[rows][:, columns]
    return images.to_float(torch.from_numpy(square.copy()).permute(2, 0, 1)[None])


def weights(folder: Path, name: str) -> Path:
    return existing(folder / "weights" / "mesonet" / f"meso_{name}.npz")


def existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is not in the test data")
    return path
