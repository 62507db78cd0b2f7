"""Face-swap learning: the warp against an OpenCV reference of the 2017 description, and updates that learn."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from counterfake import dist
from counterfake.config import override
from counterfake.data import Batch
from counterfake.errors import ConfigError, DataError
from counterfake.learners import LearnerContext
from counterfake.learners.faceswap import FaceSwapConfig, FaceSwapLearner, swap
from counterfake.learners.warp import WarpConfig, _Move, centre, coordinates, pairs, sample
from counterfake.nets.swap import SwapConfig
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


def test_resuming_equals_not_stopping_bit_for_bit() -> None:
    whole = make_learner()
    run(whole, 0, 6)
    first, second = make_learner(), make_learner()
    run(first, 0, 3)
    second.load_state_dict(first.state_dict())
    run(second, 3, 6)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.net.parameters(), second.net.parameters(), strict=True)
    )


def test_an_update_leaves_the_decoder_of_an_absent_person_almost_untouched() -> None:
    """Adam's first step on a zero gradient is zero."""
    learner = make_learner()
    before = [p.clone() for p in learner.net.decoders[2].parameters()]
    learner.step(make_batch(people=2))
    assert all(torch.equal(a, b) for a, b in zip(before, learner.net.decoders[2].parameters(), strict=True))


def test_the_last_images_are_not_bent() -> None:
    learner = make_learner(straight_images=600)
    learner.images = 2400 - 600
    warped, target = learner._pairs(make_batch())
    torch.testing.assert_close(warped, target, atol=1e-4, rtol=0)
    learner.images -= 1
    assert (learner._pairs(make_batch())[0] - target).abs().max() > 0.01


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
    with pytest.raises(DataError, match=r"needs 8 pictures; too few of synthetic-0-000003 \(3\)"):
        train_swap.with_people(override(job, {"data.where": {"fake": 0, "identity": named}}), workspace)
    with pytest.raises(DataError, match="needs two people"):
        train_swap.with_people(override(job, {"data.where": {"fake": 1}}), workspace)
    with pytest.raises(DataError, match="needs two people"):
        train_swap.with_people(override(job, {"data.where": {"identity": named[:1]}}), workspace)


def _tensor(image: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]
