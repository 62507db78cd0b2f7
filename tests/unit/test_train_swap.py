"""The swap job: presets that fit together, consent of the people shown, and a run that goes back to its last checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from counterfake import checkpoint, dist, images, loop, media
from counterfake.cluster import worker
from counterfake.cluster.worker import Order, _Reporter, _rolled_back
from counterfake.config import from_dict, override, to_dict
from counterfake.data import DataConfig, Loader, used_sources
from counterfake.errors import CollapseError, DataError, NonFiniteError
from counterfake.images import Preprocess
from counterfake.learners.composites import CompositesConfig, with_composites
from counterfake.learners.faceswap import FaceSwapConfig, FaceSwapLearner
from counterfake.learners.swap_guard import Guard
from counterfake.loop import LoopConfig, TrainJob
from counterfake.nets.swap import SwapConfig, SwapMaskConfig
from counterfake.nets.swap_family import parameters
from counterfake.records import Dataset, Sample, SplitRule, write_version
from counterfake.sources.synthetic import SyntheticSource, portrait
from counterfake.workspace import Workspace
from jobs import consent, train_swap

# -- presets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", train_swap.PRESETS)
def test_every_preset_survives_its_dictionary_and_its_network_can_be_built(name: str) -> None:
    job = train_swap.PRESETS[name]()
    assert from_dict(TrainJob, to_dict(job)) == job
    assert isinstance(job.learner, FaceSwapConfig)
    with torch.device("meta"):
        job.learner.net.with_identities(("a", "b")).build()
    # the crop has about the pixels that the network reads
    assert 0.9 < job.data.preprocess.size * job.learner.net.coverage / job.learner.net.size < 1.7


@pytest.mark.parametrize("name", [n for n in train_swap.PRESETS if n.endswith("-small")])
def test_a_small_preset_sees_each_of_its_phases_and_as_many_images_as_the_others(name: str) -> None:
    job = train_swap.PRESETS[name]()
    assert isinstance(job.learner, FaceSwapConfig)
    assert job.loop.images == train_swap.SMALL_IMAGES
    assert sum(phase.images for phase in job.learner.phases) < job.loop.images
    with torch.device("meta"):
        assert parameters(job.learner.net.with_identities(("a", "b", "c", "d")).build()) < 10e6


def test_losses_are_those_of_the_recipes() -> None:
    gan, parts, dfl = train_swap.MASK_GAN, train_swap.PARTS, train_swap.SAEHD
    assert (gan.mae, gan.edge, gan.eyes, gan.adversarial, gan.mask_l1, gan.mask_tv) == (
        1,
        0.1,
        30,
        0.1,
        0.01,
        0.1,
    )
    assert gan.mixup == 0.2
    assert (parts.eye_factor, parts.mouth_factor) == (3, 2)
    assert (dfl.dssim, dfl.mse, dfl.mask, dfl.eyes, dfl.mouth) == (10, 10, 10, 300, 300)
    assert (dfl.tv, dfl.background, dfl.adversarial, dfl.dssim_windows) == (1e-6, 0.02, 0.1, (11.6,))


def test_saehd_has_its_optimizer_and_the_design_of_2017_saves_every_100_updates() -> None:
    for preset in (train_swap.swap_df, train_swap.swap_liae):
        learner = preset().learner
        assert isinstance(learner, FaceSwapConfig)
        assert (learner.lr, learner.beta1, learner.adam_eps) == (5e-5, 0.5, 1e-7)
        assert [phase.lr_dropout for phase in learner.phases] == [1.0, 0.3, 0.3]
    timing = train_swap.swap_shared().loop
    assert timing.tick_steps * timing.checkpoint_every_ticks == 100


# -- consent --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(workspace: Workspace) -> Callable[[str], TrainJob]:
    """A job on a dataset of two people from a source of a given consent, and two of a synthetic one."""

    def write(agreed: str) -> TrainJob:
        made = [
            dataclasses.replace(SyntheticSource(size=24).sample(person, picture), source=source)
            for person, source in ((0, "drawn"), (1, "drawn"), (2, "album"), (3, "album"))
            for picture in range(8)
        ]
        facts = {
            "drawn": {"licence": "CC0-1.0", "consent": "synthetic"},
            "album": {"licence": "CC0-1.0", "consent": agreed},
        }
        splits = SplitRule(fractions={"train": 1.0})
        write_version(workspace.dataset("faces"), made, sources=facts, splits=splits)
        return tiny_job()

    return write


@pytest.mark.parametrize("agreed", ["subjects", "synthetic"])
def test_people_who_agreed_may_be_swapped(
    workspace: Workspace, stored: Callable[[str], TrainJob], agreed: str
) -> None:
    job = train_swap.prepared(stored(agreed), workspace)
    assert len(job.data.where["identity"]) == 4


def test_people_who_did_not_agree_are_refused_by_source(
    workspace: Workspace, stored: Callable[[str], TrainJob]
) -> None:
    job = stored("none")
    for purpose in ("", "detector-training"):
        with pytest.raises(DataError, match=r"refused: album \(consent none\); choose others"):
            train_swap.prepared(dataclasses.replace(job, purpose=purpose), workspace)
    drawn = override(job, {"data.where": {"fake": 0, "identity": [f"synthetic-0-00000{i}" for i in (0, 1)]}})
    data = train_swap.prepared(drawn, workspace).data
    assert data.where["identity"] == drawn.data.where["identity"]
    dataset = Dataset.open(workspace.dataset("faces"))
    assert set(used_sources(dataset, dataset.version(), data)) == {"drawn"}  # what its bundle will name
    assert set(used_sources(dataset, dataset.version(), job.data)) == {"drawn", "album"}


def test_research_data_need_their_purpose(workspace: Workspace, stored: Callable[[str], TrainJob]) -> None:
    job = stored("research")
    with pytest.raises(DataError, match=r"album \(consent research\); with --set purpose=detector-training"):
        train_swap.prepared(job, workspace)
    allowed = override(job, {"purpose": "detector-training"})
    assert train_swap.prepared(allowed, workspace).purpose == "detector-training"


def test_what_is_made_of_research_data_or_by_its_models_is_not_for_export() -> None:
    free, bound = {"licence": "x", "consent": "subjects"}, {"licence": "x", "consent": "research"}
    assert "export" not in consent.marked(free, model={})
    assert consent.marked(bound, model={})["export"] is False
    assert consent.marked(free, model={"export": False})["export"] is False


def test_what_is_made_carries_the_licences_and_the_least_consent_of_what_the_model_learned_from() -> None:
    model = {
        "sources": {
            "drawn": {"licence": "CC0-1.0", "consent": "synthetic"},
            "album": {"licence": "CC-BY-4.0", "consent": "subjects"},
        }
    }
    licence = "model output; trained on CC-BY-4.0, CC0-1.0"
    assert consent.learned(model) == {"licence": licence, "consent": "subjects"}
    assert consent.learned({**model, "export": False})["export"] is False
    assert consent.learned({}) == {
        "licence": "model output; what it was trained on is not recorded",
        "consent": "none",
    }
    drawn = consent.marked({"licence": "CC0-1.0", "consent": "synthetic"}, model=model)
    assert drawn == {"licence": "CC0-1.0; faces by a model trained on CC-BY-4.0", "consent": "subjects"}
    lab = consent.marked({"licence": "CC0-1.0", "consent": "research"}, model=model)
    assert (lab["consent"], lab["export"]) == ("research", False)
    assert consent.marked({"licence": "x", "consent": "subjects"}, model={}) == {
        "licence": "x",
        "consent": "subjects",
    }


# -- rows without a face --------------------------------------------------------------------------------------------


def with_faceless(workspace: Workspace, faces: int, pictures: int = 9) -> DataConfig:
    """Three people of whose `pictures` only the first `faces` have a face; person 0 has one in all."""
    made = [SyntheticSource(size=24).sample(who, i) for who in range(3) for i in range(pictures)]
    rows = [
        sample if (n < pictures and faces) or n % pictures < faces
        else dataclasses.replace(sample, face_box=None, landmarks=None)
        for n, sample in enumerate(made)
    ]  # fmt: skip
    facts = {rows[0].source: {"licence": "CC0-1.0", "consent": "synthetic"}}
    write_version(workspace.dataset("faces"), rows, sources=facts, splits=SplitRule(fractions={"train": 1.0}))
    return dataclasses.replace(tiny_job().data, uri=workspace.dataset("faces"))


def test_rows_without_a_face_are_left_out_and_counted(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    data = with_faceless(workspace, faces=8)
    assert train_swap.pictures_per_person(data, workspace) == {
        "synthetic-0-000000": 9, "synthetic-0-000001": 8, "synthetic-0-000002": 8,
    }  # fmt: skip
    job = train_swap.prepared(dataclasses.replace(tiny_job(), data=data), workspace)
    loader = Loader(dataclasses.replace(job.data, batch_size=4, drop_last=False))
    assert loader.rows == 25
    assert sum(len(batch) for batch in loader.batches(epochs=1)) == 25
    assert "2 of 27 rows where" in caplog.text
    assert Loader(dataclasses.replace(data, where={})).rows == 25
    assert Loader(dataclasses.replace(data, preprocess=Preprocess(size=24, crop="center"))).rows == 27


def test_a_person_with_too_few_faces_is_not_chosen_and_refused_if_named(workspace: Workspace) -> None:
    data = with_faceless(workspace, faces=7)
    with pytest.raises(DataError, match=r"3 people with 9 pictures at most"):
        train_swap.prepared(dataclasses.replace(tiny_job(), data=data), workspace)
    named = dataclasses.replace(
        data, where={"fake": 0, "identity": ["synthetic-0-000000", "synthetic-0-000001"]}
    )
    with pytest.raises(DataError, match=r"8 pictures with a face; too few of synthetic-0-000001 \(7\)"):
        train_swap.prepared(dataclasses.replace(tiny_job(), data=named), workspace)


def test_a_dataset_without_any_face_is_refused_before_training_with_the_count(workspace: Workspace) -> None:
    data = with_faceless(workspace, faces=0)
    for refuse in (
        lambda: train_swap.prepared(dataclasses.replace(tiny_job(), data=data), workspace),
        lambda: Loader(data),
    ):
        with pytest.raises(DataError, match=r"none of the 27 rows where .* has a face_box"):
            refuse()


# -- points ---------------------------------------------------------------------------------------------------------


def test_a_job_asks_for_points_only_if_a_loss_needs_them(
    workspace: Workspace, stored: Callable[[str], TrainJob]
) -> None:
    job = stored("subjects")
    assert not train_swap.prepared(job, workspace).data.landmarks
    weighted = train_swap.prepared(override(job, {"learner.losses.eyes": 1.0}), workspace)
    assert weighted.data.landmarks
    assert isinstance(weighted.learner, FaceSwapConfig)
    assert weighted.learner.margin == job.data.preprocess.margin


@pytest.mark.parametrize("crop", ["face", "aligned", "none", "center"])
def test_the_loader_gives_points_where_the_crop_moved_them(
    workspace: Workspace, stored: Callable[[str], TrainJob], crop: str
) -> None:
    job = stored("subjects")
    preprocess = Preprocess(size=48, crop=crop, margin=1.4)  # type: ignore[arg-type]
    data = DataConfig(
        uri=workspace.dataset("faces"),
        batch_size=16,
        preprocess=preprocess,
        landmarks=True,
        where=job.data.where,
    )
    batch = next(Loader(data).batches())
    assert batch.landmarks is not None
    assert batch.landmarks.shape == (16, 5, 2)
    eyes, mouth = batch.landmarks[:, :2], batch.landmarks[:, 3:]
    assert ((batch.landmarks > 0) & (batch.landmarks < 48)).all()
    assert (eyes[:, :, 1].amax(dim=1) < mouth[:, :, 1].amin(dim=1)).all()
    if crop == "aligned":
        torch.testing.assert_close(eyes[:, 0, 1], eyes[:, 1, 1], atol=1e-3, rtol=0)
        assert float(eyes.std(dim=0).max()) < 1e-2  # at fixed places


@pytest.mark.parametrize("crop", ["face", "aligned", "none", "center"])
def test_the_loader_cuts_the_mask_as_it_cuts_the_picture(workspace: Workspace, crop: str) -> None:
    """Rows whose picture is their own mask, so that both must agree."""
    made = []
    for person in range(8):
        sample = SyntheticSource(size=96).sample(person, 0)
        white = portrait(0, person, 0, 96).face_mask[:, :, None].repeat(3, axis=2)
        made.append(dataclasses.replace(sample, id="", image=media.encode(white, "png")))
    write(workspace, made)
    preprocess = Preprocess(size=64, crop=crop, margin=1.4)  # type: ignore[arg-type]
    data = DataConfig(uri=workspace.dataset("faces"), batch_size=8, preprocess=preprocess, landmarks=True)
    batch = next(Loader(data).batches())
    assert batch.mask is not None
    assert batch.mask.shape == (8, 1, 64, 64)
    shown, known = batch.images[:, :1] > 127, batch.mask > 0.5
    assert float((shown & known).sum() / (shown | known).sum()) > 0.94


def test_rows_without_a_mask_say_so(workspace: Workspace) -> None:
    made = [SyntheticSource(size=48).sample(person, 0) for person in range(8)]
    bare = [dataclasses.replace(sample, attributes={}) for sample in made]
    write(workspace, [*made[:3], *bare[3:]])
    data = DataConfig(
        uri=workspace.dataset("faces"), batch_size=8, preprocess=Preprocess(size=24), landmarks=True
    )
    batch = next(Loader(data).batches())
    assert batch.mask is not None
    unknown = batch.mask.isnan()
    assert int(unknown.all(dim=(1, 2, 3)).sum()) == 5
    assert int(unknown.any(dim=(1, 2, 3)).sum()) == 5
    assert next(Loader(dataclasses.replace(data, landmarks=False)).batches()).mask is None
    write(workspace, bare)  # as datasets were before rows had masks
    assert next(Loader(data).batches()).mask is None


def write(workspace: Workspace, made: list[Sample]) -> None:
    facts = {made[0].source: {"licence": "CC0-1.0", "consent": "synthetic"}}
    write_version(workspace.dataset("faces"), made, sources=facts, splits=SplitRule(fractions={"train": 1.0}))


# -- going back -----------------------------------------------------------------------------------------------------


def tiny_job(**changes: Any) -> TrainJob:
    return TrainJob(
        name="swap-tiny",
        task="faceswap",
        data=DataConfig(
            uri="faces",
            batch_size=8,
            preprocess=Preprocess(size=24, crop="face", margin=1.4),
            where={"fake": 0},
        ),
        learner=FaceSwapConfig(net=SwapConfig.tiny().with_identities(()), lr=2e-3, **changes),
        loop=LoopConfig(steps=8, tick_steps=2),
    )


class Disk:
    """A host that keeps checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ticks = folder, 0

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        found = sorted(self.folder.glob("step-*"))
        yield found[-1] if found else None

    def report(self, tick: loop.Tick, folder: Path | None) -> None:
        self.ticks += 1
        if folder:
            folder.rename(self.folder / folder.name)


@pytest.fixture
def trained(
    workspace: Workspace, stored: Callable[[str], TrainJob], tmp_path: Path
) -> Callable[..., _Reporter]:
    """A run whose learner fails as `fault` says, up to its end or to the error that it could not mend."""

    def run(fault: Callable[[FaceSwapLearner], None], steps: int = 8, **changes: Any) -> _Reporter:
        job = train_swap.prepared(
            dataclasses.replace(stored("subjects"), learner=tiny_job(**changes).learner), workspace
        )
        job = override(job, {"data.uri": workspace.dataset("faces"), "loop.steps": steps})
        (tmp_path / "checkpoints").mkdir()
        loader = Loader(job.data)
        order = Order(
            job=job, workspace=workspace, name="tiny", run_id="", dataset={"digest": loader.version.digest}, commit=""
        )  # fmt: skip
        host = Disk(tmp_path / "checkpoints")
        learner, summary = worker._begin(order, host, loader, torch.device("cpu"))
        reporter = _Reporter(order, host, learner, loader, torch.device("cpu"), None, summary)
        fault(learner)  # type: ignore[arg-type]
        while not reporter.trained():
            reporter = _rolled_back(reporter)
        return reporter

    return run


def poison(learner: FaceSwapLearner, at: int) -> None:
    """Weights become NaN before step `at`, as after an overflow."""
    step = learner.step

    def poisoned(batch: Any) -> dict[str, torch.Tensor]:
        if learner.steps == at:
            next(learner.net.parameters()).data.fill_(math.nan)
        return step(batch)

    learner.step = poisoned  # type: ignore[method-assign]


def test_a_run_that_became_nan_goes_on_from_its_last_good_checkpoint_at_half_the_rate(
    trained: Callable[..., _Reporter],
) -> None:
    reporter = trained(lambda learner: poison(learner, at=5))
    (event,) = reporter.summary["rollbacks"]
    assert (event["step"], event["to_step"], event["lr_factor"]) == (6, 4, 0.5)
    assert "NaN" in event["reason"]
    assert reporter.learner.steps == 8
    assert isinstance(reporter.learner, FaceSwapLearner)
    assert reporter.learner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert all(torch.isfinite(p).all() for p in reporter.learner.net.parameters())
    _, meta = checkpoint.load(reporter.host.folder / "step-00000008")  # type: ignore[attr-defined]
    assert meta["summary"]["rollbacks"] == [event]


@pytest.mark.parametrize("at", [6, 8])
def test_an_update_that_breaks_the_weights_at_the_end_of_a_tick_is_never_stored(
    trained: Callable[..., _Reporter], at: int
) -> None:
    """The metrics of the tick are fine: they were taken before the update."""

    def broken(learner: FaceSwapLearner) -> None:
        step = learner.step

        def overflown(batch: Any) -> dict[str, torch.Tensor]:
            metrics = step(batch)
            if learner.steps == at:
                next(learner.net.parameters()).data[0].fill_(math.inf)
            return metrics

        learner.step = overflown  # type: ignore[method-assign]

    reporter = trained(broken)
    (event,) = reporter.summary["rollbacks"]
    assert (event["step"], event["to_step"]) == (at, at - 2)
    assert f"NaN or infinite in the update of step {at}" in event["reason"]
    assert reporter.learner.steps == 8
    for folder in reporter.host.folder.glob("step-*"):  # type: ignore[attr-defined]
        loop.check_finite(checkpoint.load(folder)[0], 0)


def test_a_person_left_behind_has_patience_again_after_going_back(
    trained: Callable[..., _Reporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of ticks 2 to 4 leave one person behind; the checkpoint gone back to is of the third, a bad one. The first
    tick after that is bad too, and the run goes on."""
    observe, calls = Guard.observe, []

    def bad_for_a_while(guard: Guard, painted: Any, target: Any, errors: Any, identity: Any) -> None:
        calls.append(len(calls) + 1)
        who = torch.arange(len(errors)) % len(guard.names)
        low = 0.03 if 2 < calls[-1] <= 10 else 0.3
        observe(guard, painted, target, torch.where(who == 1, 0.3, low), who)

    monkeypatch.setattr(Guard, "observe", bad_for_a_while)
    reporter = trained(lambda learner: None, steps=12)
    (event,) = reporter.summary["rollbacks"]
    assert (event["step"], event["to_step"]) == (8, 6)
    assert "synthetic-0-000001 stays at 100% of its first value" in event["reason"]
    assert reporter.learner.steps == 12


def test_without_any_checkpoint_a_run_begins_again(trained: Callable[..., _Reporter]) -> None:
    reporter = trained(lambda learner: poison(learner, at=1))
    assert [event["to_step"] for event in reporter.summary["rollbacks"]] == [0]
    assert reporter.learner.steps == 8


def test_a_run_that_may_not_go_back_says_what_went_wrong(trained: Callable[..., _Reporter]) -> None:
    with pytest.raises(NonFiniteError, match="became NaN or infinite at step 6"):
        trained(lambda learner: poison(learner, at=5), rollbacks=0)


def test_a_run_that_collapses_every_time_ends_with_its_last_error(
    trained: Callable[..., _Reporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(learner: FaceSwapLearner) -> None:
        if learner.steps == 6:
            raise CollapseError(f"grey at a rate of {learner.lr_factor:g}")

    monkeypatch.setattr(FaceSwapLearner, "check", collapsed)
    with pytest.raises(CollapseError, match=r"grey at a rate of 0\.25"):
        trained(lambda learner: None)


def test_a_mask_network_also_goes_back(trained: Callable[..., _Reporter]) -> None:
    """Its critic and both optimizers come from the checkpoint as well."""
    learner = to_dict(train_swap.swap_mask_gan_small().learner)
    config = from_dict(FaceSwapConfig, learner)
    changes = {
        "losses": config.losses,
        "critic": dataclasses.replace(config.critic, widths=(8, 8)),
        "phases": (dataclasses.replace(config.phases[-1], images=0),),
    }
    assert isinstance(config.net, SwapMaskConfig)
    reporter = trained(lambda made: poison(made, at=5), **changes)
    assert isinstance(reporter.learner, FaceSwapLearner)
    assert reporter.learner.critic is not None
    assert reporter.summary["rollbacks"][0]["to_step"] == 4
    assert dist.world_size() == 1


def test_of_faces_that_know_their_eyes_alone_the_loader_gives_the_eyes(workspace: Workspace) -> None:
    """What an ingest finds without a landmarks_model; composites are made of it all the same."""
    made = [SyntheticSource(size=48).sample(person, 0) for person in range(8)]
    eyes = [dataclasses.replace(sample, landmarks=(sample.landmarks or [])[:4], fake=0) for sample in made]
    write(workspace, [dataclasses.replace(eyes[0], landmarks=None), *eyes[1:]])
    data = DataConfig(
        uri=workspace.dataset("faces"), batch_size=8, preprocess=Preprocess(size=24), landmarks=True
    )
    batch = next(Loader(data).batches())
    assert batch.landmarks is not None
    known = batch.landmarks.isfinite().all(dim=2)  # (8, 5)
    assert sorted(known.sum(dim=1).tolist()) == [0, *[2] * 7]
    assert known[:, :2].all(dim=1).sum() == 7
    _, fake = with_composites(
        images.to_float(batch.images), batch.fake, batch.landmarks, CompositesConfig(share=0.5)
    )
    assert int(fake.sum()) == 4
