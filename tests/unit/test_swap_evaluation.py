"""evaluation/swap.py and reading.py: figures in closed form, and readers that learn who a person is and how they look."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterfake import bundle as bundles
from counterfake import config, media, provenance, video
from counterfake.blending import soft_mask
from counterfake.ensemble import Ensemble
from counterfake.errors import ConfigError, DataError
from counterfake.evaluation import reading, swap
from counterfake.evaluation.reading import ReadingConfig
from counterfake.images import Preprocess
from counterfake.nets.face_reader import FaceReaderConfig
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.nets.swap import SwapConfig
from counterfake.records import Dataset, Sample, write_version
from counterfake.sources.portrait import people
from counterfake.sources.synthetic import SyntheticSource, portrait
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace
from jobs import evaluate_swap, generate
from jobs.console import Console
from jobs.evaluate_swap import EvaluateSwapJob
from jobs.swap_readers import Readers
from jobs.swap_studio import Photo, Studio, Swap, pictures

RNG = np.random.default_rng(3)
NOISE = RNG.integers(0, 256, (5, 24, 24, 3)).astype(np.uint8)


def test_a_perfect_reconstruction_has_ssim_1_and_no_error() -> None:
    assert swap.reconstruction(NOISE, NOISE) == {"ssim": pytest.approx(1), "mae": 0}


def test_the_error_is_a_share_of_the_range_and_the_ssim_that_of_constant_pictures() -> None:
    """For constants only the first factor of eq. 13 is left: (2ab + c) / (a² + b² + c)."""
    a, b = (np.full((2, 16, 16, 3), value, np.uint8) for value in (51, 102))
    found = swap.reconstruction(a, b)
    assert found["mae"] == pytest.approx(0.2)
    assert found["ssim"] == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.04 + 0.16 + 1e-4), abs=1e-4)


def test_pictures_of_other_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be compared"):
        swap.reconstruction(NOISE, NOISE[:, :12])


# -- identity -------------------------------------------------------------------------------------------------------


def test_the_nearest_direction_names_the_person_whatever_the_length() -> None:
    embeddings, identity = np.array([[1.0, 0.1], [2, -0.1], [0.1, 3], [0, 1]]), [0, 0, 1, 1]
    gallery = swap.centroids(embeddings, identity, 2)
    assert gallery == pytest.approx(np.eye(2), abs=0.06)
    assert swap.nearest([[50, 1], [0.001, 0.2]], gallery).tolist() == [0, 1]
    with pytest.raises(DataError, match="person 2 has no picture"):
        swap.centroids(embeddings, identity, 3)


def test_retrieval_counts_target_source_and_others() -> None:
    found = swap.retrieval([1, 1, 0, 2], target=[1, 1, 1, 1], source=[0, 0, 0, -1], people=4)
    assert found == {"target": 0.5, "source": 0.25, "other": 0.25, "chance": 0.25, "n": 4}


def test_the_face_alone_says_nothing_of_what_lies_outside_and_of_its_colours() -> None:
    mask = np.zeros((24, 24), np.float32)
    mask[6:18, 6:18] = 1
    recoloured = np.where(mask[None, :, :, None] > 0, NOISE // 4 * 2 + 30, 255 - NOISE).astype(np.uint8)
    seen = swap.face_only(NOISE // 4 * 4, mask)
    assert (seen == swap.face_only(recoloured, mask)).all()
    assert (seen[:, mask == 0] == swap.GREY).all()
    inside = seen[:, 6:18, 6:18].astype(float)
    assert inside.mean(axis=(1, 2)) == pytest.approx(np.full((5, 3), swap.GREY), abs=0.5)
    assert inside.std(axis=(1, 2)) == pytest.approx(np.full((5, 3), swap.SPREAD), abs=0.5)


# -- pose and expression --------------------------------------------------------------------------------------------


def test_agreement_is_pearsons_r_and_leaves_out_what_never_changes() -> None:
    truth = np.stack([np.arange(8.0), np.arange(8.0) ** 2, np.ones(8)], axis=1)
    read = np.stack([5 - 2 * truth[:, 0], truth[:, 1] * 3 + 1, np.arange(8.0)], axis=1)
    found = swap.agreement(read, truth, ["yaw", "smile", "roll"])
    assert found == {"yaw": pytest.approx(-1), "smile": pytest.approx(1), "mean": pytest.approx(0)}
    noisy = RNG.normal(size=(8, 3))
    expected = np.corrcoef(noisy[:, 1], truth[:, 1])[0, 1]
    assert swap.agreement(noisy, truth, ["yaw", "smile", "roll"])["smile"] == pytest.approx(expected)


def test_the_error_of_points_is_measured_in_distances_of_the_eyes() -> None:
    source = np.array([[[0.0, 0], [10, 0], [5, 8]]])
    moved = np.add(source, [3, 4])
    assert swap.landmark_error(moved, source) == pytest.approx(0.5)
    assert swap.landmark_error(10 * moved, 10 * source) == pytest.approx(0.5)


def test_mask_iou_is_the_mean_over_pictures() -> None:
    a, b = np.zeros((2, 4, 4)), np.zeros((2, 4, 4))
    a[0, :, :2] = b[0, :, 1:3] = 1  # shares 4 of 12 pixels; the second pair is empty
    assert swap.mask_iou(a, b) == pytest.approx((1 / 3 + 1) / 2)


# -- time and detectors ---------------------------------------------------------------------------------------------


def test_a_swap_that_changes_as_its_original_has_ratio_1_and_one_that_trembles_more() -> None:
    still, trembling = swap.Flicker(), swap.Flicker()
    for i in range(6):
        frame = np.full((8, 8, 3), 10 * i, np.uint8)
        still.add(frame, frame + 20)
        trembling.add(frame, frame + np.uint8(30 * (i % 2)))
    assert still.figures() == {
        "original": pytest.approx(10 / 255),
        "made": pytest.approx(10 / 255),
        "ratio": 1,
    }
    assert trembling.figures()["ratio"] == pytest.approx((40 + 20 + 40 + 20 + 40) / 50)


def test_flicker_is_not_measured_across_a_gap() -> None:
    flicker = swap.Flicker()
    flicker.add(NOISE[0], NOISE[0])
    flicker.cut()
    flicker.add(NOISE[1], NOISE[1])
    assert flicker.figures() == {"original": None, "made": None, "ratio": None}


def test_evasion_is_the_share_below_the_threshold_of_what_was_answered() -> None:
    found = swap.evasion([0.1, 0.4, 0.6, 0.9, math.nan], 0.5)
    assert (found["value"], found["n"], found["unanswered"]) == (0.5, 4, 1)
    assert (found["low"], found["high"]) == (pytest.approx(0.15, abs=1e-3), pytest.approx(0.85, abs=1e-3))
    with pytest.raises(DataError, match="answered for none"):
        swap.evasion([math.nan], 0.5)


def test_what_is_served_counts_uncertain_and_unanswered_swaps_as_not_called_fake() -> None:
    found = swap.served_evasion(["fake", "uncertain", "real", "fake", "no_verdict"])
    assert (found["value"], found["n"], found["uncertain"], found["no_verdict"]) == (
        pytest.approx(0.6),
        5,
        1,
        1,
    )
    assert (found["low"], found["high"]) == (pytest.approx(0.2307, abs=1e-3), pytest.approx(0.8824, abs=1e-3))
    with pytest.raises(DataError, match="no swap"):
        swap.served_evasion([])


# -- readers --------------------------------------------------------------------------------------------------------


def faces_of(people_: range, pictures: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(faces, who, yaw) of procedural people."""
    keys = [(person, picture) for person in people_ for picture in pictures]
    made = [portrait(0, *key, 48) for key in keys]
    crop = Preprocess(size=32, crop="face", margin=1.1)
    pixels = np.stack([crop.apply(m.pixels, m.face_box) for m in made])
    yaw = np.array([[people.shot(0, *key).yaw] for key in keys])
    return pixels, np.array([person for person, _ in keys]), yaw


def test_a_recogniser_names_people_in_pictures_it_has_not_seen() -> None:
    known, who, _ = faces_of(range(3), range(12))
    new, truth, _ = faces_of(range(3), range(50, 58))
    config = ReadingConfig(net=FaceReaderConfig.tiny(), steps=80, batch_size=32, lr=5e-3, coarse=1.5)
    reader = reading.recogniser(known, who, 3, config)
    named = swap.nearest(reader.read(new), swap.centroids(reader.read(known), who, 3))
    assert (named == truth).mean() > 0.7  # chance is 0.33


def test_a_regressor_reads_which_way_strangers_look() -> None:
    known, _, yaw = faces_of(range(20, 120), range(1))
    new, _, truth = faces_of(range(24), range(50, 51))
    config = ReadingConfig(net=FaceReaderConfig.tiny(), steps=120, batch_size=32, lr=5e-3, coarse=1.0)
    reader = reading.regressor(known, yaw, config)
    assert swap.agreement(reader.read(new), truth, ["yaw"])["yaw"] > 0.5


def test_a_reader_is_named_by_its_weights_and_repeats_by_its_seed() -> None:
    known, who, yaw = faces_of(range(2), range(4))
    config = ReadingConfig(net=FaceReaderConfig.tiny(), steps=3, batch_size=4)
    state = torch.random.get_rng_state()
    names = {
        reading.recogniser(known, who, 2, config).sha256,
        reading.recogniser(known, who, 2, config).sha256,
        reading.recogniser(known, who, 2, replace(config, seed=1)).sha256,
        reading.regressor(known, yaw, config).sha256,
    }
    assert len(names) == 3
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(DataError, match="at least two people"):
        reading.recogniser(known, 0 * who, 1, config)


def test_readers_are_taught_once_and_kept(workspace: Workspace, swapper: Path) -> None:
    studio = Studio(generate.load(str(swapper), workspace))
    known, who, _ = faces_of(range(2), range(4))
    config = ReadingConfig(net=FaceReaderConfig.tiny(), steps=3, batch_size=4)
    readers = Readers(workspace.cache / "readers", config)
    first, named = readers.people(known, who, 2)
    poses = readers.poses(studio, 10, 48, 0)
    kept = sorted(readers.folder.iterdir())
    again = Readers(readers.folder, config)
    read, named_again = again.people(known, who, 2)
    assert (read.sha256, again.poses(studio, 10, 48, 0).sha256) == (first.sha256, poses.sha256)
    assert (named(known) == named_again(known)).all()
    assert (again.poses(studio, 10, 48, 0).read(known) == poses.read(known)).all()
    assert len(kept) == 2
    assert sorted(readers.folder.iterdir()) == kept
    again.poses(studio, 10, 48, 1)  # other strangers
    again.people(known[:-1], who[:-1], 2)
    Readers(readers.folder, replace(config, seed=1)).people(known, who, 2)
    assert len(list(readers.folder.iterdir())) == 5


# -- the job --------------------------------------------------------------------------------------------------------

TINY = {
    "pictures": 3, "gallery": 6, "strangers": 12, "reading.steps": 4, "reading.batch_size": 8,
    "reading.net.size": 32, "reading.net.width": 4,
}  # fmt: skip


def model_of(folder: Path, count: int, side: int, **provenance: Any) -> Path:
    """A bundle that swaps procedural people, untrained."""
    torch.manual_seed(0)
    names = tuple(SyntheticSource().person(number) for number in range(count))
    net = replace(SwapConfig.tiny(), identities=names, coverage=0.8, size=side)
    return bundles.write_nets(
        folder / "swap", kind="faceswap", name="tiny-swap", nets={"faceswap": (net, net.build().state_dict())},
        preprocess=Preprocess(size=side * 5 // 4, crop="face", margin=1.4), provenance=provenance,
    ).folder  # fmt: skip


@pytest.fixture
def swapper(workspace: Workspace, tmp_path: Path) -> Path:
    """A bundle of two procedural people, untrained, and the dataset it says it was trained on."""
    source = SyntheticSource(identities=2, per_identity=8, size=64)
    facts = {source.label: {"licence": source.licence, "consent": source.consent}}
    version = write_version(workspace.dataset("faces"), source.samples(), sources=facts)
    dataset = {"uri": workspace.dataset("faces"), "version": version.number, "digest": version.digest}
    return model_of(tmp_path, 2, 16, dataset=dataset, sources=facts)


def test_the_job_judges_swaps_of_pictures_nobody_has_seen(workspace: Workspace, swapper: Path) -> None:
    result = evaluate_swap.run(config.override(EvaluateSwapJob(), {"model": str(swapper), **TINY}), workspace)
    figures = result["figures"]
    assert set(figures) == {"reconstruction", "identity", "pose", "expression", "true_swap", "mask_iou"}
    assert figures["identity"]["painted"]["n"] == 2 * 3  # each picture as the other person
    assert figures["identity"]["painted"]["chance"] == 0.5
    assert 0 < figures["mask_iou"] < 1  # the usual ellipse against the true face
    target = Path(result["report"]).parent
    assert json.loads((target / "swap.json").read_text())["figures"] == json.loads(json.dumps(figures))
    assert media.decode((target / "matrix.png").read_bytes()).shape[1] > 3 * evaluate_swap.TILE
    assert provenance.read((target / "matrix.png").read_bytes()).claims_synthetic
    assert "Taken for the target" in (target / "report.html").read_text()
    logged = Tracker.at(workspace).read(result["run_id"])["metrics"]
    assert logged["swap_reconstruction_ssim"] == pytest.approx(figures["reconstruction"]["ssim"])


def test_real_people_are_judged_by_their_eyes_and_a_third_is_held_out(
    workspace: Workspace, swapper: Path
) -> None:
    model = generate.load(str(swapper), workspace)
    studio = Studio(model)
    studio.numbers = []  # as if nobody knew that they are procedural
    job = config.override(EvaluateSwapJob(), {"model": str(swapper), **TINY})
    gallery, sources = pictures(studio, Dataset.open(workspace.dataset("faces")), job.gallery, job.pictures)
    assert {id(p) for p in gallery}.isdisjoint(id(p) for p in sources)
    assert (len(gallery), len(sources)) == (2 * 5, 2 * 3)
    readers = Readers(workspace.cache / "readers", job.reading)
    figures = evaluate_swap.measure(
        job, studio, gallery, sources, studio.swaps(sources, job.conversion), readers, Console(quiet=True)
    )
    assert set(figures) == {"reconstruction", "identity", "landmarks"}


def test_pictures_without_a_face_are_no_photos(workspace: Workspace, swapper: Path) -> None:
    source = SyntheticSource(identities=2, per_identity=4, size=64)
    rows = [replace(s, face_box=None) if n % 4 == 0 else s for n, s in enumerate(source.samples())]
    facts = {source.label: {"licence": source.licence, "consent": source.consent}}
    write_version(workspace.dataset("some"), rows, sources=facts)
    studio = Studio(generate.load(str(swapper), workspace))
    gallery, _ = pictures(studio, Dataset.open(workspace.dataset("some")), 6, 1)
    assert len(gallery) == 6
    write_version(workspace.dataset("none"), (replace(row, face_box=None) for row in rows), sources=facts)
    with pytest.raises(DataError, match=r"a face of synthetic-0-000000, synthetic-0-000001 \(8 rows have no"):
        pictures(studio, Dataset.open(workspace.dataset("none")), 6, 1)


def perfect(studio: Studio, photos: list[Photo], targets: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What a network gives that paints the true swap and the true mask."""
    blank = np.zeros((16, 16), np.float32)
    swaps = [
        Swap(source=p, target=t, painted=blank, mask=blank, picture=blank)
        for p, t in zip(photos, targets, strict=True)
    ]
    return [(studio.true_swap(s), studio.true_mask(s.source).astype(np.float32)) for s in swaps]


def test_a_perfect_swap_network_would_get_the_best_figures(
    workspace: Workspace, swapper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is replaced by the painter of the procedural people: true swaps and true masks."""
    studio = Studio(generate.load(str(swapper), workspace))
    photos = [studio.new(who, i, 64) for who in range(2) for i in range(3)]

    monkeypatch.setattr(studio, "paint", lambda photos, targets: perfect(studio, photos, targets))
    own = studio.paint(photos, [p.who for p in photos])
    found = evaluate_swap._truths(studio, photos, own, studio.swaps(photos, EvaluateSwapJob().conversion))
    assert found["true_swap"] == {"ssim": pytest.approx(1), "mae": 0}
    assert found["mask_iou"] == 1
    # the true swap of a person into themselves is their own picture, up to its JPEG
    rebuilt, wanted = np.stack([face for face, _ in own]), studio.middle([p.crop for p in photos])
    assert swap.reconstruction(rebuilt, wanted)["mae"] < 0.02


def test_a_perfect_swap_is_named_as_its_target_by_the_face_but_not_by_the_whole_crop(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Pasted back it keeps the source's hair, ears and background, as every swap does."""
    studio = Studio(generate.load(str(model_of(tmp_path, 3, 32)), workspace))
    studio.paint = lambda photos, targets: [  # type: ignore[method-assign]
        (face, soft_mask(32)) for face, _ in perfect(studio, photos, targets)
    ]
    gallery = [studio.new(who, 100 + i, 64) for who in range(3) for i in range(20)]
    sources = [studio.new(who, i, 64) for who in range(3) for i in range(6)]
    teach = ReadingConfig(net=FaceReaderConfig.tiny(), steps=80, batch_size=32, lr=5e-3, coarse=1.5)
    job = EvaluateSwapJob(model="perfect", reading=teach)
    readers = Readers(workspace.cache / "readers", teach)
    swaps = studio.swaps(sources, job.conversion)
    found = evaluate_swap._identity(job, studio, gallery, sources, swaps, readers)
    assert min(found["real"], found["painted"]["target"]) >= 0.9
    assert found["pasted"] == found["pasted_true"]  # it is the true swap
    assert found["pasted"]["target"] >= 0.8
    assert found["whole"]["pasted"]["target"] <= 0.4


def detector_of(folder: Path, bias: float, quantiles: dict[str, float]) -> Path:
    """An ensemble of one small net whose probability is that of `bias` alone."""
    torch.manual_seed(0)
    net = MobileNetV2Config.tiny()
    member = bundles.write_nets(
        folder / "net", kind="detector", name="net", nets={"detector": (net, net.build().state_dict())},
        preprocess=Preprocess(size=32), provenance={},
    ).folder  # fmt: skip
    fit = Ensemble(
        members=("net",), temperatures=(1.0,), weights=(0.0,), bias=bias, quantiles=quantiles, alpha=0.05,
        n={"real": 99, "fake": 99},
    )  # fmt: skip
    return bundles.write(
        folder / "both", kind="ensemble", name="judge", config={"ensemble": fit.to_dict()}, tensors={},
        preprocess=None, provenance={}, members={"net": member},
    ).folder  # fmt: skip


@pytest.mark.parametrize(
    ("bias", "quantiles", "plain", "served", "word"),
    [
        (3.0, {"real": 1.0, "fake": 1.0}, 0.0, 1.0, "uncertain"),
        (3.0, {"real": 0.5, "fake": 0.5}, 0.0, 0.0, "fake"),
        (-3.0, {"real": 0.5, "fake": 0.5}, 1.0, 1.0, "real"),
        (3.0, {"real": 0.01, "fake": 0.01}, 0.0, 1.0, "no_verdict"),
    ],
    ids=["unsure", "caught", "fooled", "strange"],
)
def test_evasion_is_of_the_probability_and_of_the_verdict_that_is_served(
    workspace: Workspace, swapper: Path, tmp_path: Path, bias: float, quantiles: dict[str, float],
    plain: float, served: float, word: str,
) -> None:  # fmt: skip
    studio = Studio(generate.load(str(swapper), workspace))
    job = EvaluateSwapJob(model=str(swapper), detector=str(detector_of(tmp_path / "judge", bias, quantiles)))
    swaps = studio.swaps([studio.new(who, 0, 64) for who in range(2)], job.conversion)
    found = evaluate_swap._evasion(job, swaps, workspace)["evasion"]
    assert (found["value"], found["n"], found["detector"]) == (plain, 2, "judge")
    assert (found["served"]["value"], found["served"][word]) == (served, 2)
    alone = replace(job, detector=str(tmp_path / "judge" / "net"))
    assert "served" not in evaluate_swap._evasion(alone, swaps, workspace)["evasion"]
    assert evaluate_swap._evasion(replace(job, detector=""), swaps, workspace) == {}


def test_flicker_is_that_of_the_converted_video(workspace: Workspace, swapper: Path, tmp_path: Path) -> None:
    """A still face is painted alike in every frame: neither it nor its swap changes but by the codec."""
    model = generate.load(str(swapper), workspace)
    frame = np.full((120, 160, 3), 60, np.uint8)
    frame[:, 20:140] = portrait(0, 3, 0, 120).pixels
    video.write(tmp_path / "still.mp4", [frame] * 6)
    job = EvaluateSwapJob(model=str(swapper), video=str(tmp_path / "still.mp4"))
    found = evaluate_swap._flicker(job, Studio(model), model)["flicker"]
    assert found["original"] is not None
    assert found["made"] < 0.02
    assert evaluate_swap._flicker(replace(job, video=""), Studio(model), model) == {}


def test_what_cannot_be_judged_is_refused_in_one_line(workspace: Workspace, swapper: Path) -> None:
    with pytest.raises(ConfigError, match="model is not set"):
        evaluate_swap.run(EvaluateSwapJob(), workspace)
    blank = Sample(image=media.encode(np.zeros((32, 32, 3), np.uint8)), source="s", fake=0)
    rights = {"s": {"licence": "CC0-1.0", "consent": "none"}}
    write_version(workspace.dataset("blank"), [blank], sources=rights)
    with pytest.raises(DataError, match="fewer than two real pictures with a face of synthetic-0-000000"):
        evaluate_swap.run(EvaluateSwapJob(model=str(swapper), faces="blank"), workspace)
