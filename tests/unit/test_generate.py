"""Generated and swapped pictures: labels, marks, encodings like the real ones, splits, and the same bytes every time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterfake import audit, media, provenance
from counterfake import bundle as bundles
from counterfake.blending import Blending
from counterfake.conversion import Painter
from counterfake.errors import ConfigError, DataError
from counterfake.faces import Face
from counterfake.images import Preprocess
from counterfake.nets.dcgan import DcganGenerator
from counterfake.nets.swap import SwapConfig, SwapMaskConfig
from counterfake.records import Dataset, Sample, SplitRule, write_version
from counterfake.sources.synthetic import SyntheticSource
from counterfake.workspace import Workspace
from jobs import consent, generate
from jobs.generate import GenerateJob, draw_noise, encoding, face_box

PEOPLE, EACH = 8, 3
RULE = SplitRule(fractions={"train": 0.5, "validation": 0.25, "test": 0.25})


@pytest.fixture
def faces(workspace: Workspace) -> Dataset:
    source = SyntheticSource(identities=PEOPLE, per_identity=EACH, size=64)
    facts = {source.label: {"licence": source.licence, "consent": source.consent}}
    write_version(workspace.dataset("faces"), source.samples(), sources=facts, splits=RULE)
    return Dataset.open(workspace.dataset("faces"))


@pytest.fixture
def gan(workspace: Workspace, faces: Dataset, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = DcganGenerator(size=32, channels=3, noise_size=8, width=2)
    return _bundle(tmp_path / "gan", "generator", "tiny-gan", config, Preprocess(size=32), faces)


@pytest.fixture
def swapper(workspace: Workspace, faces: Dataset, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    people = faces.version().names("identity")[:2]
    config = dataclasses.replace(SwapConfig.tiny(), identities=tuple(people), coverage=0.8)
    preprocess = Preprocess(size=20, crop="face", margin=1.4)
    return _bundle(tmp_path / "swap", "faceswap", "tiny-swap", config, preprocess, faces)


# -- generators -----------------------------------------------------------------------------------------------------


def test_a_generators_samples_are_labelled_marked_and_in_every_split(workspace: Workspace, gan: Path) -> None:
    result = generate.run(GenerateJob(model=str(gan), into="fakes", count=24, batch=7), workspace)
    dataset = Dataset.open(workspace.dataset("fakes"))
    samples = [s for split in dataset.version().splits for s in dataset.samples(None, split)]
    assert len(samples) == result["rows"] == 24
    assert {(s.fake, s.maker, s.identity) for s in samples} == {(1, result["maker"], None)}
    marks = [provenance.read(s.media) for s in samples]
    assert {(m.digital_source_type, m.maker) for m in marks} == {("trainedAlgorithmicMedia", result["maker"])}
    assert all(count > 0 for count in result["splits"].values())
    assert all(media.decode(s.media).shape == (32, 32, 3) for s in samples)


def test_their_files_are_written_like_the_real_ones(workspace: Workspace, gan: Path, faces: Dataset) -> None:
    generate.run(GenerateJob(model=str(gan), into="fakes", count=60, size=64), workspace)
    real, fake = _encodings(faces), _encodings(Dataset.open(workspace.dataset("fakes")))
    assert set(fake) <= set(real)
    assert len(set(fake)) > 3


def test_the_same_job_makes_the_same_bytes_whatever_its_batch_size(workspace: Workspace, gan: Path) -> None:
    job = GenerateJob(model=str(gan), into="fakes", count=10, batch=10)
    first = generate.run(job, workspace)
    again = generate.run(job, workspace)
    assert again["version"] == first["version"]
    assert again["report"]["duplicates"] == 10
    other = generate.run(dataclasses.replace(job, into="others", batch=5), workspace)
    assert Dataset.open(workspace.dataset("others")).version(other["version"]).rows() == 10
    seeded = generate.run(dataclasses.replace(job, seed=1), workspace)
    assert seeded["rows"] == 20


def test_with_a_key_every_file_is_signed_too(
    workspace: Workspace,
    gan: Path,
    swapper: Path,
    credentials: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = credentials()
    sign = provenance.Signing(certificate=files.certificate, key=files.key)
    generate.run(GenerateJob(model=str(gan), into="fakes", count=6, sign=sign), workspace)
    monkeypatch.setenv("COUNTERFAKE_C2PA_CERT", files.certificate)
    monkeypatch.setenv("COUNTERFAKE_C2PA_KEY", files.key)
    generate.run(GenerateJob(model=str(swapper), into="swaps", faces="faces", count=4), workspace)
    for name, kind in (
        ("fakes", "trainedAlgorithmicMedia"),
        ("swaps", "compositeWithTrainedAlgorithmicMedia"),
    ):
        dataset = Dataset.open(workspace.dataset(name))
        rows = [s for split in dataset.version().splits for s in dataset.samples(None, split)]
        found = [provenance.read(row.media) for row in rows]
        assert {(mark.c2pa_state, mark.digital_source_type) for mark in found} == {("Valid", kind)}, name


def test_a_key_that_is_not_there_is_refused_before_anything_is_made(
    workspace: Workspace, gan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERFAKE_C2PA_CERT", "/nowhere/chain.pem")
    monkeypatch.setenv("COUNTERFAKE_C2PA_KEY", "/nowhere/key.pem")
    with pytest.raises(ConfigError, match=r"sign\.certificate /nowhere/chain\.pem cannot be read"):
        generate.run(GenerateJob(model=str(gan), into="fakes", count=6), workspace)
    assert not Dataset.open(workspace.dataset("fakes")).versions()


def test_a_new_version_is_audited_so_that_training_has_nothing_to_warn_of(
    workspace: Workspace, gan: Path, swapper: Path, faces: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    made = generate.run(GenerateJob(model=str(gan), into="faces", count=30, size=64), workspace)
    swaps = GenerateJob(model=str(swapper), into="faces", faces="faces@1", count=12)
    again = generate.run(swaps, workspace)
    assert made["audit"]["leaks"] == again["audit"]["leaks"] == []
    for number in (2, 3):
        assert audit.admit(faces, faces.version(number), allow_leaks=False) == []
    assert "never audited" not in caplog.text
    stored = audit.stored(faces, 3)
    assert stored is not None
    assert stored.probe is not None, "headers are probed as those of an ingest"
    generate.run(dataclasses.replace(swaps, into="swaps", audit=False), workspace)
    dataset = Dataset.open(workspace.dataset("swaps"))
    assert audit.stored(dataset) is None


def test_terms_of_samples_are_those_of_the_training_data_whatever_their_files_are_like(
    workspace: Workspace, gan: Path
) -> None:
    rows = SyntheticSource(identities=4, per_identity=4, size=64).samples()
    album = [dataclasses.replace(row, source="album") for row in rows]
    other = {"album": {"licence": "all rights reserved", "consent": "research"}}
    write_version(workspace.dataset("album"), album, sources=other)
    generate.run(GenerateJob(model=str(gan), into="fakes", like="album", count=4, audit=False), workspace)
    (made,) = Dataset.open(workspace.dataset("fakes")).version().sources.values()
    assert made == {"licence": "model output; trained on Apache-2.0", "consent": "synthetic"}


def test_terms_of_swaps_are_those_of_the_picture_and_of_the_model(
    workspace: Workspace, faces: Dataset, tmp_path: Path
) -> None:
    lab = {"lab": {"licence": "lab terms", "consent": "research"}}
    people = tuple(faces.version().names("identity")[:2])
    config = dataclasses.replace(SwapConfig.tiny(), identities=people, coverage=0.8)
    preprocess = Preprocess(size=20, crop="face", margin=1.4)
    model = _bundle(tmp_path / "lab", "faceswap", "lab-swap", config, preprocess, faces, sources=lab)
    job = GenerateJob(model=str(model), into="swaps", faces="faces", count=4, audit=False)
    with pytest.raises(DataError, match=r"refused: lab \(consent research\)"):
        generate.run(job, workspace)
    generate.run(dataclasses.replace(job, purpose="detector-training"), workspace)
    (made,) = Dataset.open(workspace.dataset("swaps")).version().sources.values()
    licence = "Apache-2.0; faces by a model trained on lab terms"
    assert made == {"licence": licence, "consent": "research", "export": False}


def test_fakes_are_added_to_the_real_ones_as_a_new_version(
    workspace: Workspace, gan: Path, faces: Dataset
) -> None:
    result = generate.run(GenerateJob(model=str(gan), into="faces", count=12), workspace)
    assert result["version"] == 2
    assert result["rows"] == PEOPLE * EACH + 12
    assert faces.version(1).rows() == PEOPLE * EACH


def test_raw_pixel_datasets_get_raw_pixels(workspace: Workspace, tmp_path: Path) -> None:
    digits = (
        Sample(pixels=np.full((28, 28, 1), i, np.uint8), source="digits", fake=0, class_id=i % 2)
        for i in range(20)
    )
    rights = {"digits": {"licence": "CC0-1.0", "consent": "none"}}
    write_version(workspace.dataset("digits"), digits, sources=rights)
    dataset = Dataset.open(workspace.dataset("digits"))
    bundle = _bundle(
        tmp_path / "digits", "generator", "g", DcganGenerator.tiny(), Preprocess(size=28, channels=1), dataset
    )
    result = generate.run(GenerateJob(model=str(bundle), into="digits", count=8), workspace)
    assert result["rows"] == 28


def test_a_conditional_generator_is_asked_for_its_classes_in_turn(
    workspace: Workspace, faces: Dataset, tmp_path: Path
) -> None:
    config = dataclasses.replace(DcganGenerator.tiny(), size=32, channels=3, classes=3)
    folder = _bundle(tmp_path / "asked", "generator", "g", config, Preprocess(size=32), faces)
    generate.run(GenerateJob(model=str(folder), into="asked", count=7, batch=4), workspace)
    dataset = Dataset.open(workspace.dataset("asked"))
    version = dataset.version()
    found = [s.class_id for split in version.splits for s in dataset.samples(version, split)]
    assert sorted(found) == [0, 0, 0, 1, 1, 2, 2]


def test_truncated_noise_stays_within_its_bound() -> None:
    job = GenerateJob(model="m", into="d", count=500, truncation=0.7)
    assert draw_noise(job, 16).abs().max() <= 0.7
    assert draw_noise(dataclasses.replace(job, truncation=0), 16).abs().max() > 2


def test_the_face_of_a_generated_picture_is_where_training_had_it(faces: Dataset) -> None:
    assert face_box(60, Preprocess(crop="face", margin=1.5), []) == (10, 10, 40, 40)
    rows = list(faces.samples(None, "train"))
    x, y, width, height = face_box(128, Preprocess(), rows) or (0, 0, 0, 0)
    assert [x, y, width, height] == pytest.approx(2 * np.median([r.face_box for r in rows], axis=0), abs=1e-3)
    assert face_box(64, Preprocess(), []) is None


# -- swaps ----------------------------------------------------------------------------------------------------------


def test_a_swap_stays_in_the_split_and_the_file_format_of_its_picture(
    workspace: Workspace, swapper: Path, faces: Dataset
) -> None:
    result = generate.run(
        GenerateJob(model=str(swapper), into="faces", faces="faces@1", count=12, batch=5), workspace
    )
    originals = {s.id: s for split in RULE.fractions for s in faces.samples(1, split)}
    swaps = [s for split in RULE.fractions for s in faces.samples(2, split) if s.fake == 1]
    assert len(swaps) == 12
    assert sum(result["splits"].values()) == 12
    for made in swaps:
        original = originals[made.attributes["swapped_from"]]
        assert (made.split, made.identity) == (original.split, original.identity)
        assert made.attributes["target_identity"] != made.identity
        assert encoding(made.media) == encoding(original.media)
        assert provenance.read(made.media).digital_source_type == "compositeWithTrainedAlgorithmicMedia"


def test_a_swap_changes_the_face_and_nothing_outside_the_crop(
    workspace: Workspace, swapper: Path, faces: Dataset
) -> None:
    generate.run(GenerateJob(model=str(swapper), into="swaps", faces="faces", count=PEOPLE * EACH), workspace)
    dataset = Dataset.open(workspace.dataset("swaps"))
    originals = {s.id: s for split in RULE.fractions for s in faces.samples(None, split)}
    pngs = 0
    for made in (s for split in dataset.version().splits for s in dataset.samples(None, split)):
        before = originals[made.attributes["swapped_from"]]
        if encoding(before.media).format != "png":
            continue  # JPEG would change the rest a little
        pngs += 1
        changed = np.abs(media.decode(made.media).astype(int) - media.decode(before.media)).sum(axis=2) > 0
        x, y, width, height = (round(v) for v in before.face_box or (0, 0, 0, 0))
        assert changed[y : y + height, x : x + width].mean() > 0.5
        assert not changed[:2].any()
        assert not changed[:, :2].any()
    assert pngs


@pytest.mark.parametrize("crop", ["face", "aligned"])
def test_rows_and_files_are_swapped_alike(
    workspace: Workspace, tmp_path: Path, faces: Dataset, crop: str
) -> None:
    """By the design's own mask, the blending asked for, and the points of the face: as `convert` does it."""
    people = tuple(faces.version().names("identity")[:2])
    net = dataclasses.replace(SwapMaskConfig.tiny(), identities=people, coverage=0.8)
    preprocess = Preprocess(size=20, crop=crop, margin=1.4)  # type: ignore[arg-type]
    bundle = _bundle(tmp_path / "mask", "faceswap", "mask-swap", net, preprocess, faces)
    blending = Blending(colour="none", blend="poisson")
    made = GenerateJob(model=str(bundle), into="swaps", faces="faces", count=99, blending=blending)
    generate.run(made, workspace)
    model, swaps = generate.load(str(bundle), workspace), Dataset.open(workspace.dataset("swaps"))
    originals = {s.id: s for split in RULE.fractions for s in faces.samples(None, split)}
    pngs = 0
    for row in (row for split in swaps.version().splits for row in swaps.samples(None, split)):
        original = originals[row.attributes["swapped_from"]]
        if encoding(original.media).format != "png":
            continue
        pngs += 1
        assert original.face_box is not None
        assert original.landmarks is not None
        points = list(zip(original.landmarks[::2], original.landmarks[1::2], strict=True))
        painter = Painter(model.net, net, preprocess, row.attributes["target_identity"])
        given = (media.decode(original.media), [Face(original.face_box, 1.0, points)])
        (wanted,) = painter.convert([given], blending)
        assert np.abs(media.decode(row.media).astype(int) - wanted).max() <= 1  # another batch
        assert (wanted != given[0]).any()
    assert pngs


@pytest.mark.parametrize("agreed", ["none", "research"])
def test_pictures_of_people_who_did_not_agree_are_not_swapped(
    workspace: Workspace, swapper: Path, faces: Dataset, agreed: str
) -> None:
    rows = [dataclasses.replace(s, source="album") for s in faces.samples(1, "train")]
    facts = {"album": {"licence": "CC0-1.0", "consent": agreed}}
    write_version(workspace.dataset("album"), rows, sources=facts)
    job = GenerateJob(model=str(swapper), into="swaps", faces="album")
    with pytest.raises(DataError, match=rf"refused: album \(consent {agreed}\)"):
        generate.run(job, workspace)
    if agreed == "research":
        generate.run(dataclasses.replace(job, purpose="detector-training"), workspace)
        swaps = Dataset.open(workspace.dataset("swaps"))
        (made,) = swaps.version().sources.values()
        assert (made["consent"], made["export"]) == ("research", False)
        files = [row.media for split in swaps.version().splits for row in swaps.samples(None, split)]
        assert files
        assert all(consent.TERMS.encode() in data for data in files)


def test_fraction_limits_how_many_are_swapped_and_choice_repeats(
    workspace: Workspace, swapper: Path, faces: Dataset
) -> None:
    job = GenerateJob(model=str(swapper), into="swaps", faces="faces", fraction=0.25)
    cast = generate.Cast(tuple(faces.version().names("identity")), faces.version())
    cast.by_split = {}  # anyone may wear anyone's face
    chosen = generate.choose(job, faces, faces.version(), cast)
    assert len(chosen) == PEOPLE * EACH // 4
    assert chosen == generate.choose(job, faces, faces.version(), cast)
    assert chosen != generate.choose(dataclasses.replace(job, seed=1), faces, faces.version(), cast)


def test_a_swap_wears_a_face_of_its_own_split_where_the_model_knows_one(faces: Dataset) -> None:
    version = faces.version()
    people = tuple(version.names("identity"))
    home = {row["identity"]: row["split"] for row in version.counts}
    cast = generate.Cast(people, version)
    for own in people:
        wearable = {home[people[index]] for index in cast.targets(home[own], own)}
        assert wearable <= {home[own]}
    only = generate.Cast((people[0],), version)
    stranger = next(name for name in people if home[name] != home[people[0]])
    assert only.targets(home[stranger], stranger) == [0]  # the model knows nobody of that split
    assert only.targets(home[people[0]], people[0]) == []


def test_what_cannot_be_generated_is_refused_in_one_line(
    workspace: Workspace, swapper: Path, faces: Dataset
) -> None:
    with pytest.raises(ConfigError, match="name the real ones"):
        generate.run(GenerateJob(model=str(swapper), into="x"), workspace)
    with pytest.raises(ConfigError, match="needs --set model"):
        GenerateJob(model="", into="x")
    blank = Sample(image=media.encode(np.zeros((32, 32, 3), np.uint8), "png"), source="s", fake=0)
    write_version(
        workspace.dataset("blank"), [blank], sources={"s": {"licence": "CC0-1.0", "consent": "none"}}
    )
    with pytest.raises(DataError, match="no real picture with a face_box"):
        generate.run(GenerateJob(model=str(swapper), into="x", faces="blank"), workspace)


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [40, 72, 90, 96, 100])
def test_the_jpeg_quality_of_a_file_is_read_from_its_table(quality: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert encoding(media.encode(pixels, "jpeg", quality)) == ("jpeg", quality)
    assert encoding(media.encode(pixels, "png")) == ("png", 100)


def _bundle(
    folder: Path,
    kind: str,
    name: str,
    config: object,
    preprocess: Preprocess,
    data: Dataset,
    sources: dict[str, dict[str, str]] | None = None,
) -> Path:
    version = data.version()
    dataset = {"uri": data.store.uri, "version": version.number, "digest": version.digest}
    nets = {kind: (config, config.build().state_dict())}
    provenance_ = {"dataset": dataset, "sources": sources or version.sources}
    return bundles.write_nets(
        folder, kind=kind, name=name, nets=nets, preprocess=preprocess, provenance=provenance_
    ).folder


def _encodings(dataset: Dataset) -> list[tuple[str, int]]:
    version = dataset.version()
    return [tuple(encoding(s.media)) for split in version.splits for s in dataset.samples(version, split)]
