"""What all backbones share: public weights by name, refusals that name both shapes, the mirror mean, batch independence."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from counterfake.config import from_dict, to_dict
from counterfake.errors import CheckpointError, ConfigError
from counterfake.nets import NetConfig
from counterfake.nets.backbone import BackboneConfig, ImageNetInput, StochasticDepth
from counterfake.nets.convnext import ConvNextConfig
from counterfake.nets.efficientnet import EfficientNetConfig
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.nets.resnet import ResNetConfig
from counterfake.nets.xception import XceptionConfig

KINDS = [MobileNetV2Config, ResNetConfig, EfficientNetConfig, ConvNextConfig, XceptionConfig]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@every_kind
def test_features_load_from_a_file_with_public_names(kind: type[BackboneConfig], tmp_path: Path) -> None:
    config, (path, given) = kind.tiny(), public_file(kind.tiny(), tmp_path / "w.pth")
    net = replace(config, weights=str(path)).build()
    own = net.features.state_dict()
    assert own
    for name, tensor in own.items():
        public = dict(config.PUBLIC)["features."] + name
        assert torch.equal(tensor, given[public].to(tensor.dtype)), name


@every_kind
def test_the_stored_config_needs_no_file_and_keeps_its_digest(
    kind: type[BackboneConfig], tmp_path: Path
) -> None:
    path, _ = public_file(kind.tiny(), tmp_path / "w.pth")
    config = replace(kind.tiny(), weights=str(path))
    net, stored = config.build(), config.without_weights()
    path.unlink()
    assert stored.weights is None
    assert len(stored.weights_sha256) == 64
    stored.build().load_state_dict(net.state_dict())
    assert from_dict(NetConfig, to_dict(stored)) == stored


@every_kind
def test_a_picture_scores_the_same_whatever_its_batch_mates(kind: type[BackboneConfig]) -> None:
    net = seeded(kind.tiny())
    batch = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        together, alone = net(batch), torch.cat([net(row[None]) for row in batch])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@every_kind
def test_the_mirror_mean_does_not_see_which_way_a_picture_faces(kind: type[BackboneConfig]) -> None:
    net = seeded(replace(kind.tiny(), mirror=True))
    batch = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(net(batch), net(batch.flip(3)))
        plain = (net.head(net.pooled(batch)) + net.head(net.pooled(batch.flip(3)))).squeeze(1) / 2
        torch.testing.assert_close(net(batch), plain)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    path, _ = public_file(ResNetConfig(blocks=(1, 1), width=16, small=True), tmp_path / "w.pth")
    says = r"w\.pth do not fit.*first conv1\.weight: expected \(8, 3, 3, 3\), it has shape \(16, 3, 3, 3\)"
    with pytest.raises(CheckpointError, match=says):
        replace(ResNetConfig.tiny(), weights=str(path)).build()
    with pytest.raises(CheckpointError, match="is not in the file"):
        replace(EfficientNetConfig.tiny(), weights=str(path)).build()


def test_a_file_that_is_no_weights_or_another_one_is_refused(tmp_path: Path) -> None:
    config, (path, _) = ResNetConfig.tiny(), public_file(ResNetConfig.tiny(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"have SHA-256 .*, expected abc"):
        replace(config, weights=str(path), weights_sha256="abc").build()
    with pytest.raises(CheckpointError, match="cannot be read"):
        replace(config, weights=str(tmp_path / "none.pth")).build()
    for name, says in (("text.pth", "no PyTorch file"), ("text.safetensors", "no safetensors file")):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(CheckpointError, match=says):
            replace(config, weights=str(tmp_path / name)).build()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="hold a list"):
        replace(config, weights=str(tmp_path / "list.pth")).build()


def test_safetensors_half_precision_and_matrices_for_1x1_kernels_are_read(tmp_path: Path) -> None:
    config = XceptionConfig.tiny()
    _, given = public_file(config, tmp_path / "w.pth")
    odd = {
        name: (value.flatten(1) if "pointwise" in name else value).half().contiguous()
        for name, value in given.items()
        if not name.endswith("num_batches_tracked")  # older files do not have it
    }
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(odd, path)
    found = replace(config, weights=str(path)).build().state_dict()["features.block1.rep.0.pointwise.weight"]
    assert torch.equal(found, given["block1.rep.0.pointwise.weight"].half().float())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert replace(config, weights=str(path)).without_weights().weights_sha256 == digest


def test_imagenet_input_is_the_published_mean_and_deviation() -> None:
    unit = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = (unit - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(ImageNetInput()(unit * 2 - 1), want)
    assert not ImageNetInput().state_dict()


def test_stochastic_depth_keeps_the_mean_and_rests_outside_training() -> None:
    torch.manual_seed(0)
    layer, ones = StochasticDepth(0.25), torch.ones(20_000, 1, 1, 1)
    assert layer(ones).mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(layer.eval()(ones), ones)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ResNetConfig, {"blocks": ()}),
        (EfficientNetConfig, {"stem_stride": 3}),
        (ConvNextConfig, {"depths": (1,)}),
        (XceptionConfig, {"width_mult": 0.0}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_sizes_that_cannot_be_are_refused(kind: type[BackboneConfig], wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        kind(**wrong)


def public_file(config: BackboneConfig, path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as a public one would be: random weights of the 1,000-class network under its public names."""
    torch.manual_seed(1)
    names = {ours: theirs for ours, theirs in config.PUBLIC if not ours.startswith("head")}
    tensors = {}
    for name, value in config.classifier().state_dict().items():
        ours = next(prefix for prefix in names if name.startswith(prefix))
        tensors[names[ours] + name.removeprefix(ours)] = torch.rand_like(value.float()).to(value.dtype)
    torch.save(tensors, path)
    return path, tensors


def seeded(config: BackboneConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return config.build().eval()
