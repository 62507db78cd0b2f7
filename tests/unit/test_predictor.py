"""Bundles that answer: training's preprocessing, batch independence, verdicts with reasons."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from counterfake import bundle as bundles
from counterfake import media, predictor
from counterfake.ensemble import Ensemble
from counterfake.errors import CheckpointError, MediaError
from counterfake.faces import Face
from counterfake.forensics.benford import BenfordConfig, features_of
from counterfake.forensics.forest import BenfordForest, ForestConfig
from counterfake.images import Preprocess, to_float
from counterfake.nets.dense_gan import DenseDiscriminator
from counterfake.nets.gan_discriminator import GanDiscriminatorConfig
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.predictor import Decoded
from counterfake.samples import Sample
from counterfake.sources.synthetic import portrait

SMALL = BenfordConfig(qualities=(90,), bases=(10,))


def picture(seed: int, side: int = 100) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (side // 4, side // 4, 3)).astype(np.uint8)
    return np.clip(np.kron(coarse, np.ones((4, 4, 1))) + rng.normal(0, 8, (side, side, 3)), 0, 255).astype(
        np.uint8
    )


def net_bundle(folder: Path, name: str = "net", crop: str = "none") -> bundles.Bundle:
    torch.manual_seed(0)
    config = MobileNetV2Config.tiny()
    net = config.build()
    for _ in range(5):  # batch statistics, so that eval mode is not the identity
        net(torch.rand(8, 3, 64, 64) * 2 - 1)
    preprocess = Preprocess(size=64, crop=crop)  # type: ignore[arg-type]
    return bundles.write_nets(
        folder, kind="detector", name=name, nets={"detector": (config, net.state_dict())},
        preprocess=preprocess, provenance={"dataset": {"uri": "d", "version": 5, "digest": "x"}},
    )  # fmt: skip


def benford_bundle(folder: Path) -> bundles.Bundle:
    rows = features_of([picture(i, 96 + 4 * (i % 2)) for i in range(20)], SMALL)
    forest = BenfordForest.fit(rows, np.arange(20) % 2, ForestConfig(trees=5))
    return bundles.write(
        folder, kind="benford", name="digits", config={"benford": SMALL}, tensors=forest.tensors(),
        preprocess=None, provenance={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def ensemble_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    members = {"net": net_bundle(folder / "n").folder, "digits": benford_bundle(folder / "b").folder}
    rng, fake = np.random.default_rng(0), np.arange(400) % 2
    p = np.clip(0.5 + 0.3 * (fake[:, None] - 0.5) + rng.normal(0, 0.2, (400, 2)), 0.01, 0.99)
    fit = Ensemble.fit(list(members), p, fake)
    made = bundles.write(
        folder / "e", kind="ensemble", name="both", config={"ensemble": fit.to_dict()}, tensors={}, preprocess=None,
        provenance={"dataset": {"uri": "d", "version": 6, "digest": "x"}}, members=members,
    )  # fmt: skip
    return made.folder


def test_a_net_answers_what_the_module_itself_answers(tmp_path: Path) -> None:
    made = net_bundle(tmp_path / "n")
    data = media.encode(picture(1), "png")
    net = bundles.load_nets(made)["detector"]
    square = made_preprocess(made).apply(media.decode(data))
    with torch.inference_mode():
        expected = torch.sigmoid(net(to_float(torch.from_numpy(square).permute(2, 0, 1)[None]))).item()
    assert predictor.load(made.folder).predict_bytes([data])[0] == pytest.approx(expected, abs=1e-6)


def made_preprocess(made: bundles.Bundle) -> Preprocess:
    return Preprocess(**made.info["preprocess"])


def test_a_probability_does_not_depend_on_batch_mates(ensemble_folder: Path) -> None:
    loaded = predictor.load(ensemble_folder)
    pictures = [Decoded(pixels=picture(i)) for i in range(19)]
    for one in (loaded, *loaded.members.values()):  # type: ignore[union-attr]
        alone = np.concatenate([one.predict([p]) for p in pictures])
        np.testing.assert_allclose(one.predict(pictures), alone, atol=1e-6, rtol=0)
        np.testing.assert_allclose(one.predict(pictures[::-1])[::-1], alone, atol=1e-6, rtol=0)


def test_a_verdict_has_every_field_and_is_json(ensemble_folder: Path) -> None:
    loaded = predictor.load(ensemble_folder)
    data = media.encode(picture(3), "jpeg")
    verdict = json.loads(json.dumps(loaded.verdict(data), allow_nan=False))  # type: ignore[union-attr]
    assert verdict["verdict"] in ("real", "fake", "uncertain", "no_verdict")
    assert verdict["probability_fake"] == pytest.approx(loaded.predict_bytes([data])[0])
    assert verdict["error_rate"] == 0.05
    assert [d["name"] for d in verdict["detectors"]] == ["net", "digits"]
    assert {"name", "kind", "version", "probability", "weight", "reason"} == set(verdict["detectors"][0])
    assert verdict["model"]["digest"] == bundles.read(ensemble_folder).digest
    assert verdict["model"]["dataset_version"] == 6
    assert verdict["timings"]["total_ms"] > 0
    assert {"faces", "provenance", "reason"} <= set(verdict)


def test_a_small_picture_is_answered_by_the_members_that_can(ensemble_folder: Path) -> None:
    loaded = predictor.load(ensemble_folder)
    verdict = loaded.verdict(media.encode(picture(3, 40), "png"))  # type: ignore[union-attr]
    net, digits = verdict["detectors"]
    assert digits["probability"] is None
    assert digits["reason"] == "too_small"
    assert digits["weight"] == 0
    assert net["weight"] > 0
    assert verdict["probability_fake"] is not None


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"GIF89a" * 9, "unsupported")])
def test_unusable_bytes_give_no_verdict_with_the_reason(
    ensemble_folder: Path, data: bytes, reason: str
) -> None:
    loaded = predictor.load(ensemble_folder)
    verdict = loaded.verdict(data)  # type: ignore[union-attr]
    assert (verdict["verdict"], verdict["reason"]) == ("no_verdict", reason)
    assert verdict["probability_fake"] is None
    with pytest.raises(MediaError):
        loaded.predict_bytes([data])


def test_without_a_face_a_face_detector_says_so_and_not_half(tmp_path: Path) -> None:
    loaded = predictor.load(net_bundle(tmp_path / "n", crop="face").folder)
    data = media.encode(np.full((90, 90, 3), 128, np.uint8), "png")
    assert loaded.decode(data).faces == ()
    assert loaded.refusal(loaded.decode(data)) == "no_face"
    assert math.isnan(loaded.predict_bytes([data])[0])


def test_values_between_the_quantiles_of_both_classes_are_out_of_domain(ensemble_folder: Path) -> None:
    judge = predictor.Judge(bundles.read(ensemble_folder))
    object.__setattr__(judge.ensemble, "quantiles", {"real": 0.0, "fake": 0.0})
    verdict = judge.answer({"net": 0.5, "digits": 0.5})
    assert (verdict["verdict"], verdict["reason"]) == ("no_verdict", "out_of_domain")
    assert verdict["probability_fake"] is not None
    none = judge.answer({"net": math.nan, "digits": math.nan}, reasons={"net": "no_face"})
    assert (none["verdict"], none["reason"], none["probability_fake"]) == ("no_verdict", "no_face", None)


def test_a_heat_map_covers_the_picture(tmp_path: Path) -> None:
    loaded = predictor.load(net_bundle(tmp_path / "n").folder)
    heat = loaded.heatmap(Decoded(pixels=picture(1)))  # type: ignore[union-attr]
    assert heat.ndim == 2
    assert 0 <= heat.min() <= heat.max() <= 1


def test_a_net_without_convolutions_has_no_heat_map_and_still_a_verdict(tmp_path: Path) -> None:
    config = GanDiscriminatorConfig(discriminator=DenseDiscriminator.tiny())
    made = bundles.write_nets(
        tmp_path / "dense", kind="detector", name="dense", nets={"detector": (config, config.build().state_dict())},
        preprocess=Preprocess(size=28, channels=1), provenance={},
    )  # fmt: skip
    loaded = predictor.load(made.folder)
    assert loaded.heatmap(Decoded(pixels=picture(1))) is None  # type: ignore[union-attr]
    fake = np.arange(200) % 2
    fit = Ensemble.fit(["dense"], 0.3 + 0.4 * fake[:, None], fake)
    whole = bundles.write(
        tmp_path / "e", kind="ensemble", name="one", config={"ensemble": fit.to_dict()}, tensors={}, preprocess=None,
        provenance={}, members={"dense": made.folder},
    )  # fmt: skip
    verdict = predictor.EnsemblePredictor(whole).verdict(media.encode(picture(1), "png"), heatmap=True)
    assert verdict["heatmap"] is None
    assert verdict["probability_fake"] is not None


def test_an_aligned_detector_turns_the_face_as_training_did(tmp_path: Path) -> None:
    """The eyes of a stored sample and those found in the same pixels lead through the same crop."""
    loaded = predictor.load(net_bundle(tmp_path / "n", crop="aligned").folder)
    pixels, box, eyes = picture(5), (20.0, 20.0, 60.0, 60.0), [(38.0, 50.0), (62.0, 42.0)]
    stored = Sample(
        image=media.encode(pixels, "png"),
        source="s",
        face_box=box,
        landmarks=[v for eye in eyes for v in eye],
    )
    expected = Preprocess(size=64, crop="aligned").apply(pixels, box, eyes)
    assert isinstance(loaded, predictor.NetPredictor)
    np.testing.assert_array_equal(loaded.prepare(Decoded.of(stored)), expected)
    found = Decoded(pixels=pixels, faces=(Face(box, 1.0, eyes),))
    np.testing.assert_array_equal(loaded.prepare(found), expected)
    level = Decoded(pixels=pixels, faces=(Face(box, 1.0),))
    assert (loaded.prepare(level) != expected).any()
    assert loaded.finds_eyes
    assert loaded.refusal(Decoded(pixels=pixels, faces=())) == "no_face"


def test_eyes_are_looked_for_only_where_a_detector_aligns(tmp_path: Path) -> None:
    data = media.encode(portrait(0, 0, 0, 128).pixels, "png")
    for crop, eyes in (("face", False), ("aligned", True)):
        faces = predictor.load(net_bundle(tmp_path / crop, crop=crop).folder).decode(data).faces
        assert faces
        assert (faces[0].landmarks is not None) == eyes


def test_a_verdict_shows_where_the_network_looked_when_asked(ensemble_folder: Path) -> None:
    loaded = predictor.load(ensemble_folder)
    assert isinstance(loaded, predictor.EnsemblePredictor)
    data = media.encode(picture(3), "jpeg")
    plain, shown = loaded.verdict(data), loaded.verdict(data, heatmap=True)
    assert plain["heatmap"] is None
    overlay = media.decode(base64.b64decode(shown["heatmap"].partition(",")[2]))
    assert overlay.shape == (64, 64, 3)
    assert shown["probability_fake"] == plain["probability_fake"]


def test_other_bundles_are_refused(tmp_path: Path) -> None:
    made = bundles.write(
        tmp_path / "g", kind="generator", name="g", config={}, tensors={}, preprocess=None, provenance={}
    )
    with pytest.raises(CheckpointError, match="holds a generator"):
        predictor.load(made.folder)
