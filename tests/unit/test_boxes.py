"""boxes.py: whose face boxes a model learned on goes into its preprocessing, and every way to ask it searches alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from counterfake import boxes, media, predictor, scoring, verdicts
from counterfake import bundle as bundles
from counterfake.boxes import Boxes
from counterfake.cluster import worker
from counterfake.data import DataConfig, Loader
from counterfake.ensemble import Ensemble
from counterfake.faces import Face, FaceDetector
from counterfake.images import Preprocess
from counterfake.learners.detector import DetectorConfig
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.predictor import Decoded
from counterfake.records import Dataset, Sample, SplitRule, write_version
from counterfake.sources.synthetic import portrait
from counterfake.workspace import Workspace

FACE = Preprocess(size=64, crop="face")


def person(number: int = 2) -> bytes:
    """A drawn face that both cascades find, each in a box of its own."""
    return media.encode(portrait(5, number, 0, 160).pixels, "png")


def test_boxes_are_read_from_the_rows_that_have_one(tmp_path: Path) -> None:
    rows = [
        Sample(image=b"%d" % n, source="made", face_box=box, face_method=method, face_margin=margin)
        for n, (box, method, margin) in enumerate(
            [
                ((0, 0, 9, 9), "yunet", 1.3),
                (None, "cascade", 1.0),
                ((0, 0, 9, 9), "synthetic", 1.6),
                (None, None, None),
            ]
        )
    ]
    uri, sources = tmp_path.as_uri(), {"made": {"licence": "MIT", "consent": "none"}}
    version = write_version(uri, rows, sources=sources, splits=SplitRule(fractions={"train": 1.0}))
    assert boxes.of(Dataset.open(uri), version, "train") == Boxes(methods=("synthetic", "yunet"), margin=1.3)
    none = write_version(uri, rows[1::2], sources=sources, splits=SplitRule(fractions={"train": 1.0}))
    assert boxes.of(Dataset.open(uri), none, "train") == Boxes()


@pytest.mark.parametrize("method", boxes.FINDERS)
def test_a_finder_that_every_process_has_is_the_one_that_searches(method: str) -> None:
    found, warning = boxes.recorded(FACE, Boxes(methods=(method,), margin=1.0))
    assert (found.boxes, found.finder, found.box_margin, warning) == (method, method, 1.0, "")


@pytest.mark.parametrize("methods", [("ultralight",), ("yunet",), ("synthetic",), ("cascade", "yunet")])
def test_boxes_that_cannot_be_had_again_fall_back_and_say_so(
    methods: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    found, warning = boxes.recorded(FACE, Boxes(methods=methods, margin=1.0))
    assert (found.boxes, found.finder) == ("+".join(methods), "cascade")
    assert (
        warning
        == f"trained on face boxes of {found.boxes}; in pictures without a box cascade looks for the face"
    )
    assert warning in caplog.text
    chosen = dataclasses.replace(FACE, finder="cascade-default")
    assert boxes.recorded(chosen, Boxes(methods=methods))[0].finder == "cascade-default"


def test_pictures_cut_closer_than_the_crop_are_warned_of() -> None:
    wide = dataclasses.replace(FACE, margin=1.6)
    for margin, warns in ((1.0, False), (1.3, True), (1.6, False), (2.0, False)):
        assert bool(boxes.recorded(wide, Boxes(methods=("cascade",), margin=margin))[1]) == warns


def test_whole_pictures_have_no_boxes_to_record_and_the_hash_tells_models_apart() -> None:
    whole = Preprocess(size=64, crop="center")
    assert boxes.recorded(whole, Boxes(methods=("yunet",), margin=1.0)) == (whole, "")
    assert boxes.recorded(FACE, Boxes()) == (FACE, "")
    digests = {
        boxes.recorded(FACE, Boxes(methods=(m,), margin=1.0))[0].digest
        for m in ("cascade", "yunet", "synthetic")
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("boxed", "finder"), [("cascade-default", "cascade-default"), ("ultralight", "cascade")]
)
def test_training_records_the_boxes_it_saw_in_its_bundle(
    boxed: str, finder: str, workspace: Workspace
) -> None:
    rows = [
        Sample(
            image=person(n),
            fake=n % 2,
            source="made",
            face_box=(30, 30, 90, 90),
            face_method=boxed,
            face_margin=1.0,
        )
        for n in range(4)
    ]
    uri, sources = workspace.dataset("made"), {"made": {"licence": "MIT", "consent": "none"}}
    write_version(uri, rows, sources=sources, splits=SplitRule(fractions={"train": 1.0}))
    data = DataConfig(uri=uri, batch_size=4, preprocess=FACE, threads=1)
    job = TrainJob(
        name="small", task="detector", data=data, learner=DetectorConfig(net=MobileNetV2Config.tiny()),
        loop=LoopConfig(steps=1, tick_steps=1, threads=1), workers=0,
    )  # fmt: skip
    loader = Loader(data)
    learner = job.learner.build(device=torch.device("cpu"), context=worker._context(job, loader))
    facts = {"uri": uri, "version": 1, "digest": "x", "sources": sources}
    order = worker.Order(job=job, workspace=workspace, name="small", run_id="", dataset=facts, commit="")
    worker._publish_bundle(order, learner, loader)
    made = bundles.read(Path(workspace.training.removeprefix("file://")) / "small" / "bundle")
    assert (made.info["preprocess"]["boxes"], made.info["preprocess"]["finder"]) == (boxed, finder)
    assert made.info["preprocess_digest"] not in (FACE.digest, "")
    assert made.info.get("warnings", []) == (
        []
        if boxed == finder
        else ["trained on face boxes of ultralight; in pictures without a box cascade looks for the face"]
    )
    loaded = predictor.load(made.folder)
    assert loaded.finders == (finder,)


# -- models that search differently ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> predictor.EnsemblePredictor:
    """Two detectors alike in all but the finder of their faces."""
    folder, config = tmp_path_factory.mktemp("mixed"), MobileNetV2Config.tiny()
    torch.manual_seed(0)
    net = config.build()
    for _ in range(5):
        net(torch.rand(8, 3, 64, 64) * 2 - 1)
    members = {}
    for finder in boxes.FINDERS:
        made, _ = boxes.recorded(FACE, Boxes(methods=(finder,), margin=1.0))
        members[finder] = bundles.write_nets(
            folder / finder, kind="detector", name=finder, nets={"detector": (config, net.state_dict())},
            preprocess=made, provenance={},
        ).folder  # fmt: skip
    rng, fake = np.random.default_rng(0), np.arange(400) % 2
    p = np.clip(0.5 + 0.3 * (fake[:, None] - 0.5) + rng.normal(0, 0.2, (400, 2)), 0.01, 0.99)
    fit = Ensemble.fit(list(members), p, fake)
    bundles.write(
        folder / "e", kind="ensemble", name="both", config={"ensemble": fit.to_dict()}, tensors={}, preprocess=None,
        provenance={}, members=members,
    )  # fmt: skip
    loaded = predictor.load(folder / "e")
    assert isinstance(loaded, predictor.EnsemblePredictor)
    return loaded


def test_each_detector_sees_the_crop_of_its_own_finder(ensemble: predictor.EnsemblePredictor) -> None:
    pixels, crops = media.decode(person()), []
    for finder in boxes.FINDERS:
        face = FaceDetector(finder).largest(pixels)
        assert face is not None
        member = ensemble.members[finder]
        assert isinstance(member, predictor.NetPredictor)
        together, alone = (member.prepare(one.decode(person())) for one in (ensemble, member))
        np.testing.assert_array_equal(together, FACE.apply(pixels, face.box))
        np.testing.assert_array_equal(together, alone)
        crops.append(together)
    assert (crops[0] != crops[1]).any()


def test_a_detector_answers_alike_alone_in_company_and_in_bulk(ensemble: predictor.EnsemblePredictor) -> None:
    data = person()
    served = {name: member.predict_bytes([data])[0] for name, member in ensemble.members.items()}
    together = ensemble.member_probabilities([ensemble.decode(data)])
    assert {name: float(p[0]) for name, p in together.items()} == served
    assert len(set(served.values())) == 2
    raw = verdicts.Picture(id="", path="", pixels=media.decode(data))
    rows = [
        verdicts._decoded(ensemble, raw),
        scoring.decoded(Sample(image=data, source="s"), ensemble.finders),
    ]
    for row in rows:
        assert isinstance(row, Decoded)
        assert {n: float(p[0]) for n, p in ensemble.member_probabilities([row]).items()} == served


def test_a_recorded_box_is_used_by_every_detector(ensemble: predictor.EnsemblePredictor) -> None:
    box = (40.0, 40.0, 80.0, 80.0)
    picture = Decoded(pixels=media.decode(person()), faces=(Face(box, 1.0),))
    for member in ensemble.members.values():
        assert isinstance(member, predictor.NetPredictor)
        np.testing.assert_array_equal(member.prepare(picture), FACE.apply(picture.pixels, box))


def test_a_bundle_without_the_record_searches_as_before(tmp_path: Path) -> None:
    config = MobileNetV2Config.tiny()
    tree = {"size": 64, "channels": 3, "crop": "face", "margin": 1.3}
    made = bundles.write_nets(
        tmp_path / "old", kind="detector", name="old", nets={"detector": (config, config.build().state_dict())},
        preprocess=tree, provenance={},
    )  # fmt: skip
    loaded = predictor.load(made.folder)
    assert (loaded.finders, loaded.finds_eyes) == (("cascade",), False)
