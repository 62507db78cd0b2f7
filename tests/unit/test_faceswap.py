"""Face-swap learning: the warp against an OpenCV reference of the 2017 description, and updates that learn."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from counterfake import dist
from counterfake.config import override
from counterfake.data import Batch
from counterfake.errors import CheckpointError, CollapseError, ConfigError, DataError
from counterfake.learners import LearnerContext
from counterfake.learners.faceswap import (
    FaceSwapConfig,
    FaceSwapLearner,
    _match_colour,
    swap,
    swap_with_mask,
)
from counterfake.learners.phases import Phase
from counterfake.learners.swap_guard import Guard
from counterfake.learners.warp import WarpConfig, _Move, centre, coordinates, pairs, sample
from counterfake.nets.swap import (
    SwapConfig,
    SwapMaskConfig,
    SwapPartsConfig,
    SwapTwoEncodersConfig,
    SwapUnetConfig,
)
from counterfake.nets.swap_dfl import SwapDfConfig, SwapLiaeConfig
from counterfake.nets.swap_discriminator import SwapDiscriminatorConfig
from counterfake.records import SplitRule, write_version
from counterfake.sources.synthetic import SyntheticSource
from counterfake.workspace import Workspace
from jobs import train_swap

CPU = torch.device("cpu")
COVERAGE = 160 / 256


# -- the warp -------------------------------------------------------------------------------------------------------


def reference_warp(image: NDArray[np.float32], shake: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
    """The description of 2017, step by step with OpenCV: image (256, 256, 3), shake (5, 5, 2) -> two (64, 64, 3)."""
    line = np.linspace(48, 208, 5)
    mapx = np.broadcast_to(line, (5, 5)) + shake[..., 0]
    mapy = np.broadcast_to(line, (5, 5)).T + shake[..., 1]
    dense = [cv2.resize(m, (80, 80))[8:72, 8:72].astype(np.float32) for m in (mapx, mapy)]
    warped = cv2.remap(image, dense[0], dense[1], cv2.INTER_LINEAR)
    nodes = np.stack([mapx.ravel(), mapy.ravel()], axis=-1)
    matrix = umeyama(nodes, np.mgrid[0:65:16, 0:65:16].T.reshape(-1, 2).astype(float))[:2]
    return warped, cv2.warpAffine(image, matrix, (64, 64))


def umeyama(src: NDArray, dst: NDArray) -> NDArray:
    """Least-squares similarity by singular values: Umeyama 1991, equations 34 to 43."""
    src_mean, dst_mean = src.mean(0), dst.mean(0)
    a, b = src - src_mean, dst - dst_mean
    u, d, vt = np.linalg.svd(b.T @ a / len(src))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = (d @ sign) / a.var(0).sum()
    matrix = np.eye(3)
    matrix[:2, :2] = scale * rotation
    matrix[:2, 2] = dst_mean - scale * rotation @ src_mean
    return matrix


@pytest.fixture(scope="module")
def smooth() -> NDArray[np.float32]:
    """A picture without sharp edges: OpenCV rounds coordinates to 1/32 pixel, which must not matter."""
    rng = np.random.default_rng(0)
    return cv2.GaussianBlur(rng.random((256, 256, 3), np.float32), (0, 0), 12) * 4


@pytest.mark.parametrize("seed", range(4))
def test_the_legacy_warp_is_the_opencv_reference(smooth: NDArray[np.float32], seed: int) -> None:
    shake = np.random.default_rng(seed).normal(scale=5, size=(5, 5, 2)).astype(np.float32)
    expected = reference_warp(smooth, shake)
    places = coordinates(torch.from_numpy(shake)[None], 256, 64, COVERAGE, legacy=True)
    for want, where in zip(expected, places, strict=True):
        got = sample(_tensor(smooth), where)[0].permute(1, 2, 0).numpy()
        assert np.abs(got - want).max() < 4e-3
        assert np.abs(got - want).max() < 0.02 * np.ptp(want)


def test_without_noise_the_warp_is_its_target_unless_legacy() -> None:
    still = torch.zeros(1, 5, 5, 2)
    warped, target = coordinates(still, 256, 64, COVERAGE, legacy=False)
    torch.testing.assert_close(warped, target, atol=1e-4, rtol=0)
    assert target[0, 0, 0].tolist() == pytest.approx([48, 48], abs=1e-3)
    legacy, _ = coordinates(still, 256, 64, COVERAGE, legacy=True)
    torch.testing.assert_close(
        legacy - target, torch.full_like(target, 1.25), atol=1e-4, rtol=0
    )  # half of 2.5 px


def test_the_target_undoes_a_similarity_completely() -> None:
    """Nodes that are only rotated, scaled and moved leave nothing to learn: both readings agree."""
    line = torch.linspace(48, 208, 5)
    nodes = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    turned = torch.view_as_real(
        (torch.view_as_complex(nodes) - (128 + 128j)) * (1.1 * torch.exp(torch.tensor(0.2j)))
    )
    shake = turned + torch.tensor([131.0, 120.0]) - nodes
    warped, target = coordinates(shake[None], 256, 64, COVERAGE, legacy=False)
    torch.testing.assert_close(warped, target, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("flip", "index"), [(0.0, slice(None)), (1.0, slice(None, None, -1))], ids=["straight", "mirror"]
)
def test_moves_are_those_of_opencv(smooth: NDArray[np.float32], flip: float, index: slice) -> None:
    torch.manual_seed(3)
    move = _Move(1, 256, WarpConfig(flip=flip, shift=0.02), CPU)
    degrees, scale = math.degrees(float(move.factor.angle())), 1 / float(move.factor.abs())
    matrix = cv2.getRotationMatrix2D((128, 128), degrees, scale)
    matrix[:, 2] += [float(move.shift.real), float(move.shift.imag)]
    want = cv2.warpAffine(smooth, matrix, (256, 256), borderMode=cv2.BORDER_REPLICATE)[:, index]
    pixels = torch.arange(256.0)
    everywhere = torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), dim=-1)[None]
    got = sample(_tensor(smooth), move(everywhere))[0].permute(1, 2, 0).numpy()
    assert np.abs(got - want)[8:-8, 8:-8].max() < 4e-3


def test_the_centre_is_the_middle_region_at_the_nets_size() -> None:
    faces = torch.arange(80.0).view(1, 1, 1, 80).expand(1, 3, 80, 80)
    middle = centre(faces, 40, 0.5)  # from pixel 20 on, one output pixel per pixel
    assert middle[0, 0, 0].tolist() == pytest.approx([20.0 + i for i in range(40)], abs=1e-3)


def test_pairs_repeat_with_the_seed_and_differ_between_rows() -> None:
    faces = torch.rand(1, 3, 80, 80).expand(4, 3, 80, 80)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(pairs(faces, 64, 0.8, WarpConfig()))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0][0], results[0][0][1])


# -- learning -------------------------------------------------------------------------------------------------------


def make_learner(identities: tuple[str, ...] = ("a", "b", "c"), **changes: object) -> FaceSwapLearner:
    config = FaceSwapConfig(net=SwapConfig.tiny().with_identities(()), lr=2e-3)
    torch.manual_seed(0)
    context = LearnerContext(
        batch_size=12, images_per_epoch=24, total_images=2400, size=20, identities=identities
    )
    return override(config, changes).build(device=CPU, context=context)


TINY_CRITIC = {"critic.widths": [8, 8]}
# nothing is drawn at random
STILL = {
    "warp.noise": 0.0, "warp.rotation": 0.0, "warp.zoom": 0.0, "warp.shift": 0.0, "warp.flip": 0.0, "losses.mixup": 0.0,
    "match_colour": True,
}  # fmt: skip


def make_design(name: str, **changes: object) -> FaceSwapLearner:
    """A tiny learner of another design for three people."""
    settings: dict[str, Any] = {"lr": 2e-3, "match_colour": False, **DESIGNS[name]}
    settings["net"] = settings["net"].with_identities(())
    torch.manual_seed(0)
    context = LearnerContext(
        batch_size=12, images_per_epoch=24, total_images=2400, size=26, identities=("a", "b", "c")
    )
    return override(FaceSwapConfig(**settings), changes).build(device=CPU, context=context)


def make_batch(step: int = 0, people: int = 3) -> Batch:
    """Three people of plain colours with a bright bar whose place is the pose."""
    generator = torch.Generator().manual_seed(step)
    identity = torch.arange(12) % people
    faces = torch.full((12, 3, 20, 20), 40, dtype=torch.uint8)
    for row, who in enumerate(identity.tolist()):
        faces[row, who, 3:17, 3:17] = 180
        faces[row, :, 8:11, int(torch.randint(5, 13, (), generator=generator)) :][:, :, :3] = 250
    unknown = torch.full((12,), -1)
    return Batch(
        images=faces, fake=unknown, class_id=unknown, identity=identity, maker=unknown,
        ids=[f"{i:064x}" for i in range(12)], step=step, epoch=0,
    )  # fmt: skip


def run(learner: FaceSwapLearner, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        dist.seed_step(0, step)
        losses.append(float(learner.step(make_batch(step))["loss"]))
    return losses


def test_the_loss_falls_and_counters_advance() -> None:
    learner = make_learner()
    losses = run(learner, 0, 60)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert (learner.steps, learner.images) == (60, 720)


def test_a_swap_wears_the_other_persons_colour() -> None:
    learner = make_learner(match_colour=False)
    run(learner, 0, 150)
    faces = make_batch(7).images[:1]  # person 0: red
    own, other = (
        swap(learner.net, learner.net_config, faces, torch.tensor([who]))[0].float().mean(dim=(1, 2))
        for who in (0, 2)
    )
    assert own.argmax() == 0
    assert other.argmax() == 2


@pytest.mark.parametrize("stop", [2, 3, 4, 6], ids=["bent", "phase begins", "mid-phase", "adversary"])
def test_resuming_equals_not_stopping_bit_for_bit(stop: int) -> None:
    settings = {"phases": PHASES, "losses.adversarial": 0.1, **TINY_CRITIC}
    whole = make_learner(**settings)
    run(whole, 0, 8)
    first, second = make_learner(**settings), make_learner(**settings)
    run(first, 0, stop)
    second.load_state_dict(first.state_dict())
    run(second, stop, 8)
    for mine, other in ((whole.net, second.net), (whole.critic, second.critic)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_of_another_network_is_refused_in_one_line() -> None:
    state = make_learner().state_dict()
    with pytest.raises(CheckpointError, match=r"of another SwapConfig .* give the job another name") as error:
        make_learner(**{"net.upscaled": 24}).load_state_dict(state)
    assert "\n" not in str(error.value)


def test_pictures_that_do_not_fit_the_network_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"paints 64 px .* crops of 20 px; set data.preprocess.size to"):
        make_learner(**{"net.size": 64})


# -- the designs ----------------------------------------------------------------------------------------------------

DESIGNS = {
    "two-encoders": {"net": SwapTwoEncodersConfig.tiny()},
    "unet": {"net": SwapUnetConfig.tiny()},
    "mask-gan": {
        "net": SwapMaskConfig.tiny(),
        "losses": train_swap.MASK_GAN,
        "critic": SwapDiscriminatorConfig.tiny(),
        "phases": (Phase(adversarial=1.0),),
    },
    "parts": {"net": SwapPartsConfig.tiny(), "losses": train_swap.PARTS},
    "df": {"net": SwapDfConfig.tiny(), "losses": train_swap.SAEHD},
    "liae": {"net": SwapLiaeConfig.tiny(), "losses": train_swap.SAEHD},
}


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_learns_to_rebuild(name: str) -> None:
    learner = make_design(name)
    errors = []
    for step in range(60):
        dist.seed_step(0, step)
        batch = make_batch(step)
        learner.step(batch)
        own = swap(learner.net, learner.net_config, batch.images, batch.identity, batch.identity)
        reads = centre(batch.images.float(), learner.net_config.size, learner.net_config.coverage)
        errors.append(float((own.float() - reads).abs().mean()))
    assert np.mean(errors[-4:]) < 0.75 * errors[0]


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_resumes_bit_for_bit(name: str) -> None:
    whole, first, second = (make_design(name) for _ in range(3))
    run(whole, 0, 4)
    run(first, 0, 2)
    second.load_state_dict(first.state_dict())
    run(second, 2, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.net.parameters(), second.net.parameters(), strict=True)
    )


def test_a_design_with_masks_shows_and_gives_them() -> None:
    learner = make_design("df")
    pictures = learner.preview(make_batch())
    assert set(pictures) == {"swaps", "reconstructions", "masks"}
    face, mask = swap_with_mask(learner.net, learner.net_config, make_batch().images, torch.zeros(12).long())
    assert face.shape == (12, 3, 32, 32)
    assert mask is not None
    assert mask.shape == (12, 1, 32, 32)
    parts = make_design("parts")
    assert swap_with_mask(parts.net, parts.net_config, make_batch().images, torch.zeros(12).long())[1] is None


def test_eyes_and_mouth_count_as_often_as_they_are_told_to() -> None:
    learner = make_learner(**{"losses.eye_factor": 3.0, "losses.mouth_factor": 2.0})
    lesson = learner._lesson(make_batch(), learner.phase)
    weights = learner._weights(lesson)
    assert weights is not None
    torch.testing.assert_close(weights, 1 + 2 * lesson.eyes + lesson.mouth)
    assert float(weights.max()) > 2.9  # an eye
    masked = make_learner(**{"losses.background": 0.02})
    weights, face = masked._weights(lesson), lesson.face
    assert weights is not None
    torch.testing.assert_close(weights, face + 0.02 * (1 - face))


def test_the_face_is_the_rows_own_mask_where_it_has_one() -> None:
    learner = make_learner(**{"losses.mask": 1.0})
    batch = make_batch()
    ellipse = learner._where(batch)
    batch.mask = torch.full((len(batch), 1, *batch.images.shape[2:]), torch.nan)
    batch.mask[:2] = 0.25
    maps = learner._where(batch)
    assert ellipse is not None
    assert maps is not None
    assert (maps[:2, 0] == 0.25).all()
    torch.testing.assert_close(maps[2:, 0], ellipse[2:, 0])
    torch.testing.assert_close(maps[:, 1:], ellipse[:, 1:])


# -- guards ---------------------------------------------------------------------------------------------------------


def test_grey_faces_are_noticed_only_after_there_were_faces() -> None:
    guard, faces = Guard(("a", "b"), CPU), torch.rand(4, 3, 8, 8)
    who, errors = torch.tensor([0, 1, 0, 1]), torch.full((4,), 0.3)
    grey = torch.full_like(faces, 0.5)
    guard.observe(grey, faces, errors, who)
    guard.check()  # every network begins grey
    guard.observe(faces, faces, errors, who)
    guard.check()
    guard.observe(grey, faces, errors, who)
    with pytest.raises(CollapseError, match=r"became grey: they vary 0\.0% as much"):
        guard.check()


def test_a_person_who_stays_behind_is_named_after_three_ticks() -> None:
    guard, faces = Guard(("ada", "bob"), CPU), torch.rand(2, 3, 8, 8)
    for tick, error in enumerate((0.4, 0.1, 0.1, 0.1)):
        guard.observe(faces, faces, torch.tensor([error, 0.4]), torch.tensor([0, 1]))
        if tick < 3:
            guard.check()
    again = Guard(("ada", "bob"), CPU)
    again.load_state_dict(guard.state_dict())  # what it counts survives a checkpoint
    again._sums.copy_(guard._sums)
    for one in (guard, again):
        with pytest.raises(CollapseError, match=r"the error of bob stays at 100% .* others learn"):
            one.check()


def test_people_who_learn_alike_are_no_collapse() -> None:
    learner = make_learner()
    for tick in range(6):
        run(learner, 10 * tick, 10 * tick + 10)
        learner.check()


def test_slowing_down_is_kept_in_the_checkpoint() -> None:
    learner, other = make_learner(), make_learner()
    assert learner.slow_down(2) == 0.25
    other.load_state_dict(learner.state_dict())
    run(other, 0, 1)
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 / 4)


# -- two workers ----------------------------------------------------------------------------------------------------


def _worker(rank: int, port_file: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    learner = make_design("mask-gan", **STILL)
    for step in range(3):
        learner.step(_half(make_batch(step), rank))
    learner.check()
    weights = torch.cat([p.detach().flatten() for m in (learner.net, learner.critic) for p in m.parameters()])
    results.put((rank, learner.images, weights.tolist()))
    torch.distributed.destroy_process_group()


def test_two_workers_have_the_updates_of_one_and_stay_together(tmp_path: Path) -> None:
    """Three steps of painter and critic, faces neither bent nor moved, real and fake unmixed: nothing is drawn at random."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_worker, args=(r, str(tmp_path / "meet"), results)) for r in (0, 1)]
    for process in ranks:
        process.start()
    (_, images, a), (_, _, b) = sorted(results.get(timeout=240) for _ in ranks)
    for process in ranks:
        process.join(30)
    alone = make_design("mask-gan", **STILL)
    for step in range(3):
        alone.step(make_batch(step))
    one = torch.cat([p.detach().flatten() for m in (alone.net, alone.critic) for p in m.parameters()])
    assert images == alone.images == 36
    assert a == b
    # a tenth of one update: where a gradient is almost 0, Adam makes much of the order of a sum
    torch.testing.assert_close(torch.tensor(a), one, atol=2e-4, rtol=1e-3)


def _half(batch: Batch, rank: int) -> Batch:
    """The rows of a rank: the first has other people than the second."""
    rows = batch.identity.argsort(stable=True)[rank * 6 : rank * 6 + 6]
    labels = {n: getattr(batch, n)[rows] for n in ("images", "fake", "class_id", "identity", "maker")}
    return dataclasses.replace(batch, **labels, ids=[batch.ids[i] for i in rows.tolist()])


def test_an_update_leaves_the_decoder_of_an_absent_person_almost_untouched() -> None:
    """Adam's first step on a zero gradient is zero."""
    learner = make_learner()
    before = [p.clone() for p in learner.net.decoders[2].parameters()]
    learner.step(make_batch(people=2))
    assert all(torch.equal(a, b) for a, b in zip(before, learner.net.decoders[2].parameters(), strict=True))


PHASES = [{"images": 36}, {"images": 24, "warp": False, "lr_scale": 0.5}, {"warp": False, "adversarial": 1.0}]


def test_a_phase_decides_bending_rate_and_adversary() -> None:
    learner = make_learner(**{"phases": PHASES, "losses.adversarial": 0.1}, **TINY_CRITIC)
    seen = []
    for step in range(7):
        phase, before = learner.phase, [p.clone() for p in learner.critic.parameters()]
        lesson = learner._lesson(make_batch(step), phase)
        bent = (lesson.warped - lesson.target).abs().max() > 0.01
        run(learner, step, step + 1)
        judged = any(not torch.equal(a, b) for a, b in zip(before, learner.critic.parameters(), strict=True))
        seen.append((bool(bent), learner.optimizer.param_groups[0]["lr"], judged))
    assert seen == [(True, 2e-3, False)] * 3 + [(False, 1e-3, False)] * 2 + [(False, 2e-3, True)] * 2


def test_lr_dropout_lets_a_random_share_of_the_weights_take_part() -> None:
    """Those that do change as without it; which ones follows from the step alone."""
    whole, some, again = (make_learner(phases=[{"lr_dropout": share}]) for share in (1.0, 0.3, 0.3))

    def weights(learner: FaceSwapLearner) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in learner.net.parameters()])

    before = weights(some)
    for learner in (whole, some, again):
        run(learner, 0, 1)
    full, part, twin = (weights(learner) - before for learner in (whole, some, again))
    moved = part != 0
    assert float(moved.sum() / (full != 0).sum()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(part[moved], full[moved])
    assert torch.equal(part, twin)
    run(some, 1, 2)
    assert ((weights(some) != before + part) != moved).any()  # others the next time
    with pytest.raises(ConfigError, match="lr_dropout must lie in"):
        make_learner(phases=[{"lr_dropout": 0.0}])


def test_matching_colours_gives_everyone_the_mean_of_the_batch() -> None:
    """Means .2 (three rows) and .6 (one row): .3 over all rows, so the first move by .1 and the other by -.3."""
    faces = torch.tensor([0.1, 0.2, 0.3, 0.6]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    made = _match_colour(faces, torch.tensor([0, 0, 0, 2]), 3)
    expected = torch.tensor([0.2, 0.3, 0.4, 0.3]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    torch.testing.assert_close(made, expected)


def test_a_phase_turns_the_perceptual_term_of_imagenets_mobilenetv2_on(shared_data: Path) -> None:
    file = shared_data / "weights" / "mobilenet_v2_imagenet_fp16.pth"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    settings = {
        "losses.perceptual": [0.01, 0.1, 0.3, 0.1], "losses.perceptual_weights": str(file),
        "losses.perceptual_net": "mobilenetv2", "phases": [{"images": 12}, {"perceptual": 1.0}],
        "net.size": 32, "net.coverage": 1.0,
    }  # fmt: skip
    learner = make_learner(**settings)
    assert "loss_perceptual" not in learner.step(make_batch(0))
    before = learner.perceptual.net.state_dict()["0.0.weight"].clone()
    metrics = learner.step(make_batch(1))
    assert float(metrics["loss_perceptual"]) > 0
    assert float(metrics["loss"]) == pytest.approx(
        float(metrics["loss_mae"] + metrics["loss_perceptual"]), rel=1e-5
    )
    assert torch.equal(learner.perceptual.net.state_dict()["0.0.weight"], before)


def test_phases_without_a_weight_for_the_adversary_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"losses\.adversarial is 0"):
        make_learner(phases=PHASES)
    perceptual = {"losses.perceptual": [1, 1, 1, 1], "losses.perceptual_weights": "resnet50.pth"}
    with pytest.raises(ConfigError, match=r"losses\.perceptual is set but no phase uses it"):
        make_learner(**perceptual)
    with pytest.raises(ConfigError, match=r"faces of 32 px and more, net\.size is 16"):
        make_learner(**perceptual, phases=[{"perceptual": 1.0}])


def test_the_preview_has_a_row_per_face_and_a_column_per_identity() -> None:
    picture = make_learner().preview(make_batch())["swaps"]
    assert picture.shape == (8 * 16 + 7 * 2, 4 * 16 + 3 * 2, 3)


def test_one_identity_or_too_many_are_refused() -> None:
    with pytest.raises(DataError, match="at least two identities, the data has 1"):
        make_learner(("a",))
    with pytest.raises(DataError, match="at most 64"):
        make_learner(tuple(f"p{i}" for i in range(65)))
    with pytest.raises(ConfigError, match="leave them empty"):
        make_learner(("a", "b"), **{"net.identities": ["x", "y"]})


def test_the_export_names_whose_decoder_is_whose() -> None:
    config, weights = make_learner().export()["faceswap"]
    assert config.identities == ("a", "b", "c")
    config.build().load_state_dict(weights)


# -- the job --------------------------------------------------------------------------------------------------------


@pytest.fixture
def faces(workspace: Workspace) -> str:
    """Four people with 10, 9, 8 and 3 pictures, all in one split."""
    samples = [
        SyntheticSource(size=24).sample(person, picture)
        for person, count in enumerate((10, 9, 8, 3))
        for picture in range(count)
    ]
    facts = {"synthetic-faces": {"licence": "Apache-2.0", "consent": "synthetic"}}
    write_version(
        workspace.dataset("faces"), samples, sources=facts, splits=SplitRule(fractions={"train": 1.0})
    )
    return "faces"


def test_the_job_takes_the_best_pictured_people_with_enough_pictures(
    workspace: Workspace, faces: str
) -> None:
    job = override(train_swap.swap_demo(), {"data.uri": faces, "learner.people": 2})
    chosen = train_swap.with_people(job, workspace).data.where
    assert chosen == {"fake": 0, "identity": ["synthetic-0-000000", "synthetic-0-000001"]}
    everyone = override(job, {"learner.people": 0, "data.split": "*"})
    assert len(train_swap.with_people(everyone, workspace).data.where["identity"]) == 3


def test_people_with_too_few_pictures_are_named(workspace: Workspace, faces: str) -> None:
    job = override(train_swap.swap_demo(), {"data.uri": faces})
    named = ["synthetic-0-000000", "synthetic-0-000003"]
    with pytest.raises(DataError, match=r"needs 8 pictures with a face; too few of synthetic-0-000003 \(3\)"):
        train_swap.with_people(override(job, {"data.where": {"fake": 0, "identity": named}}), workspace)
    with pytest.raises(DataError, match="needs two people"):
        train_swap.with_people(override(job, {"data.where": {"fake": 1}}), workspace)
    with pytest.raises(DataError, match="needs two people"):
        train_swap.with_people(override(job, {"data.where": {"identity": named[:1]}}), workspace)


def _tensor(image: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]
