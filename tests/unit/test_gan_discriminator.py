"""A GAN's discriminator as a detector: the sign turned, its checkpoint imported, its limits refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from counterfake import checkpoint, media, predictor
from counterfake.config import override, to_dict
from counterfake.errors import CheckpointError, ConfigError
from counterfake.nets.dcgan import DcganDiscriminator
from counterfake.nets.gan_discriminator import GanDiscriminatorConfig
from counterfake.workspace import Workspace
from jobs import import_detector, train_detector, train_gan


def test_what_looks_more_real_is_less_fake() -> None:
    config = GanDiscriminatorConfig.tiny()
    net, pictures = config.build().eval(), torch.randn(3, 1, 28, 28)
    with torch.inference_mode():
        assert torch.equal(net(pictures), -net.discriminator(pictures))


def test_it_has_the_discriminators_parameters_and_none_of_its_own() -> None:
    convolutions = (25 * 1 * 64 + 64) + (25 * 64 * 128 + 128)
    counted = sum(p.numel() for p in GanDiscriminatorConfig().build().parameters())
    assert counted == convolutions + 7 * 7 * 128 + 1 == 212_865


def test_a_checkpoint_of_a_gan_becomes_a_detector(tmp_path: Path, workspace: Workspace) -> None:
    job = train_gan.dcgan_mnist_s4()
    job = replace(job, learner=replace(job.learner, discriminator=DcganDiscriminator.tiny()))
    folder, net = tmp_path / "run" / "step-00000010", DcganDiscriminator.tiny().build()
    checkpoint.save(folder, {"discriminator": net.state_dict()}, meta(job))
    changes = {"checkpoint": folder.as_uri(), "register_as": ""}
    done = import_detector.run(override(import_detector.gan_discriminator(), changes), workspace)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    loaded = predictor.load(done["bundle"])
    picture = loaded.decode(media.encode(pixels, "png"))
    prepared = torch.from_numpy(loaded.prepare(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        real = float(net.eval()(prepared).sigmoid())
    assert loaded.predict([picture])[0] == pytest.approx(1 - real, abs=1e-5)


def test_what_is_no_gan_is_refused(tmp_path: Path, workspace: Workspace) -> None:
    job = train_detector.mobilenetv2_demo()
    folder = tmp_path / "step-00000010"
    checkpoint.save(folder, {"net": {"w": torch.zeros(1)}}, meta(job))
    wrong = override(import_detector.gan_discriminator(), {"checkpoint": str(folder)})
    with pytest.raises(CheckpointError, match="of a detector job"):
        import_detector.run(wrong, workspace)
    with pytest.raises(ConfigError, match="checkpoint is not set"):
        import_detector.run(import_detector.gan_discriminator(), workspace)
    with pytest.raises(ConfigError, match="use a GAN without classes"):
        GanDiscriminatorConfig(discriminator=DcganDiscriminator(classes=10))


def meta(job: object) -> dict[str, object]:
    dataset = {"uri": "file:///d", "version": 1, "digest": "ab", "sources": {}}
    return {"job": to_dict(job), "step": 10, "dataset": dataset, "run_id": "r"}
