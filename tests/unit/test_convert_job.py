"""The job that swaps faces in files: what is made, marked and recorded, and what is refused in one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterfake import audit, config, media, provenance, video
from counterfake import bundle as bundles
from counterfake.errors import ConfigError, DataError, MediaError, NotFoundError
from counterfake.images import Preprocess
from counterfake.nets.dcgan import DcganGenerator
from counterfake.nets.swap import SwapConfig
from counterfake.records import Dataset, SplitRule
from counterfake.sources.folder import FolderSource
from counterfake.sources.synthetic import portrait
from counterfake.workspace import Workspace
from jobs import consent, convert, generate, ingest, preset
from jobs.convert import ConvertJob

HALVES = SplitRule(fractions={"train": 0.5, "test": 0.5})
FREE = {"faces": {"licence": "CC0-1.0", "consent": "synthetic"}}


@pytest.fixture
def swapper(tmp_path: Path) -> Path:
    return bundle(tmp_path / "models" / "swap")


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """A film of one procedural face, 12 frames."""
    path = tmp_path / "in" / "talk.mp4"
    path.parent.mkdir(exist_ok=True)
    frame = np.full((200, 360, 3), 60, np.uint8)
    frame[20:180, 160:320] = portrait(0, 3, 0, 160).pixels
    video.write(path, [frame] * 12)
    return path


def bundle(folder: Path, sources: dict[str, dict[str, str]] = FREE, **known: object) -> Path:
    torch.manual_seed(0)
    net = dataclasses.replace(SwapConfig.tiny(), identities=("anna", "ben"), coverage=0.8)
    return bundles.write_nets(
        folder,
        kind="faceswap",
        name="tiny-swap",
        nets={"faceswap": (net, net.build().state_dict())},
        preprocess=Preprocess(size=20, crop="face", margin=1.4),
        provenance={"sources": sources, **known},
    ).folder


def job(source: Path, model: Path, into: Path, /, **settings: object) -> ConvertJob:
    tree = {
        "input": str(source),
        "model": str(model),
        "identity": "anna",
        "into": str(into),
        "consent": "subjects",
    }
    return config.override(ConvertJob(), tree | settings)


def test_the_preset_of_generate_makes_a_marked_film_and_says_what_it_did(
    talk: Path, swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    target = tmp_path / "out" / "talk.mp4"
    asked = config.override(
        preset(generate, "swap-video"),
        dataclasses.asdict(job(talk, swapper, target)) | {"rows": {}, "blending": {}},
    )
    result = generate.run(asked, workspace)
    made = result["made"][0]
    assert (made["frames"], made["swapped"], made["label"]) == (12, 12, True)
    assert made["frames_per_second"]["both"] > 0
    claims = provenance.read_video(target)
    assert claims.claims_synthetic
    assert claims.maker == result["maker"]
    assert json.loads((tmp_path / "out" / "talk.mp4.json").read_text())["made"]["label"] is True


def test_a_finished_file_is_not_made_again_and_another_setting_makes_it_anew(
    talk: Path, swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    target = tmp_path / "talk.mp4"
    first = convert.run(job(talk, swapper, target), workspace)
    stamp = target.stat().st_mtime_ns
    again = convert.run(job(talk, swapper, target), workspace)
    assert (first["made"][0]["reused"], again["made"][0]["reused"]) == (False, True)
    assert target.stat().st_mtime_ns == stamp
    plain = convert.run(job(talk, swapper, target, label=False), workspace)
    assert not plain["made"][0]["reused"]
    assert json.loads(target.with_name("talk.mp4.json").read_text())["settings"]["label"] is False


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_becomes_a_picture(
    suffix: str, swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    source, target = tmp_path / "face.jpg", tmp_path / f"out.{suffix}"
    before = portrait(0, 3, 0, 160).pixels
    source.write_bytes(media.encode(before, "jpeg", 80))
    convert.run(job(source, swapper, target), workspace)
    data = target.read_bytes()
    assert media.decode(data).shape == before.shape
    assert media.sniff(data) == convert.SUFFIXES[f".{suffix}"]
    assert provenance.read(data).claims_synthetic
    if suffix == "jpg":
        assert generate.encoding(data).quality == 80


def test_with_a_key_films_pictures_and_rows_are_signed_and_unsigned_ones_made_anew(
    talk: Path, swapper: Path, tmp_path: Path, workspace: Workspace, credentials: Callable[..., Any]
) -> None:
    files = credentials("ed25519")
    made = job(talk, swapper, tmp_path / "out.mp4", into_dataset="swaps", licence="CC0-1.0", label=False)
    convert.run(dataclasses.replace(made, into_dataset=""), workspace)
    signed = config.override(made, {"sign.certificate": files.certificate, "sign.key": files.key})
    assert not convert.run(signed, workspace)["made"][0]["reused"]
    assert provenance.read((tmp_path / "out.mp4").read_bytes()).c2pa_state == "Valid"
    dataset = Dataset.open(workspace.dataset("swaps"))
    rows = [s for split in dataset.version().splits for s in dataset.samples(None, split)]
    assert rows
    assert {provenance.read(row.media).c2pa_state for row in rows} == {"Valid"}
    assert convert.run(dataclasses.replace(signed, into_dataset=""), workspace)["made"][0]["reused"]


def test_a_folder_is_converted_and_what_has_no_face_is_named(
    talk: Path, swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    video.write(talk.with_name("wall.mp4"), [np.full((96, 96, 3), 90, np.uint8)] * 4)
    talk.with_name("notes.txt").write_text("no media at all, only words about them")
    result = convert.run(job(talk.parent, swapper, tmp_path / "out"), workspace)
    assert [Path(m["file"]).name for m in result["made"]] == ["talk.mp4"]
    reasons = {Path(r["file"]).name: r["reason"] for r in result["refused"]}
    assert set(reasons) == {"notes.txt", "wall.mp4"}
    assert "no face was found" in reasons["wall.mp4"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["talk.mp4", "talk.mp4.json"]


def test_rows_know_the_film_the_people_and_the_model(
    talk: Path, swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    settings = {
        "into_dataset": "swaps",
        "licence": "CC0-1.0",
        "source": "talks",
        "subject": "carl",
        "rows.frames": 4,
    }
    result = convert.run(job(talk, swapper, tmp_path / "out.mp4", **settings), workspace)
    dataset = Dataset.open(workspace.dataset("swaps"))
    version = dataset.version()
    rows = [s for split in version.splits for s in dataset.samples(version, split)]
    assert len(rows) == result["report"]["rows"] > 0
    row = rows[0]
    assert (row.fake, row.maker, row.identity, row.video) == (1, result["maker"], "carl", "talks/talk")
    assert row.attributes["target_identity"] == "anna"
    assert row.attributes["swapped_from"] == "talk.mp4"
    assert row.attributes["labelled"] is True
    assert provenance.read(row.media).maker == result["maker"]
    assert version.sources[row.source] == {"licence": "CC0-1.0", "consent": "subjects"}
    assert result["audit"]["leaks"] == []
    assert audit.stored(dataset, version) is not None
    unaudited = convert.run(job(talk, swapper, tmp_path / "out.mp4", audit=False, **settings), workspace)
    assert unaudited["made"][0]["reused"], "what an audit is asked for does not change a film"


def test_rows_of_a_picture_lie_in_the_split_of_the_original(
    swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    folder, into = tmp_path / "faces", workspace.dataset("faces")
    folder.mkdir()
    for number in range(8):
        data = media.encode(portrait(0, number, 0, 160).pixels, "jpeg", 90)
        (folder / f"{number}.jpg").write_bytes(data)
    source = FolderSource(path=str(folder), layout="flat", fake=0, licence="CC0-1.0", consent="synthetic")
    ingest.run(ingest.IngestJob(source=source, into="faces", splits=HALVES), workspace)
    settings = {"into_dataset": "faces", "licence": "CC0-1.0", "label": False}
    result = convert.run(job(folder, swapper, tmp_path / "out", **settings), workspace)
    assert result["audit"]["leaks"] == []
    dataset = Dataset.open(into)
    rows = [(s, split) for split in dataset.version().splits for s in dataset.samples(None, split)]
    homes = {Path(s.path).name: split for s, split in rows if not s.fake}
    swaps = {Path(s.path).name: split for s, split in rows if s.fake}
    assert len(set(homes.values())) == 2
    assert swaps.items() <= homes.items()
    assert swaps


def test_cuts_that_show_the_label_become_no_rows(
    talk: Path, swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    settings = {"into_dataset": "swaps", "licence": "CC0-1.0", "rows.frames": 3, "rows.keep": "frame"}
    with pytest.raises(DataError, match="every cut holds a part of the label; add --set label=false"):
        convert.run(job(talk, swapper, tmp_path / "out.mp4", **settings), workspace)
    settings |= {"label": False}
    assert convert.run(job(talk, swapper, tmp_path / "out.mp4", **settings), workspace)["report"]["rows"] > 0


# -- consent --------------------------------------------------------------------------------------------------------


def test_without_consent_nothing_is_converted(
    talk: Path, swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    with pytest.raises(DataError, match=r"talk\.mp4 has consent none; say --set consent=subjects"):
        convert.run(job(talk, swapper, tmp_path / "out.mp4", consent="none"), workspace)
    with pytest.raises(DataError, match="add --set purpose=detector-training"):
        convert.run(job(talk, swapper, tmp_path / "out.mp4", consent="research"), workspace)
    assert not (tmp_path / "out.mp4").exists()


def test_research_data_is_marked_and_never_exported(
    talk: Path, swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    settings = {
        "consent": "research",
        "purpose": "detector-training",
        "into_dataset": "s",
        "licence": "own terms",
    }
    result = convert.run(job(talk, swapper, tmp_path / "out.mp4", **settings), workspace)
    assert b"not for export" in (tmp_path / "out.mp4").read_bytes()
    assert result["terms"] == consent.TERMS
    assert [f["export"] for f in Dataset.open(workspace.dataset("s")).version().sources.values()] == [False]


def test_a_model_of_research_data_needs_the_purpose_and_binds_what_it_makes(
    talk: Path, tmp_path: Path, workspace: Workspace
) -> None:
    sources = {"lab": {"licence": "terms", "consent": "research"}}
    model = bundle(tmp_path / "models" / "lab", sources, export=False)
    with pytest.raises(DataError, match="lab"):
        convert.run(job(talk, model, tmp_path / "out.mp4"), workspace)
    made = convert.run(job(talk, model, tmp_path / "out.mp4", purpose="detector-training"), workspace)
    assert made["terms"] == consent.TERMS


# -- refusals -------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_each(talk: Path, swapper: Path, tmp_path: Path, workspace: Workspace) -> None:
    out = tmp_path / "out.mp4"
    with pytest.raises(ConfigError, match="needs --set input=…, --set model=…"):
        convert.run(ConvertJob(), workspace)
    with pytest.raises(ConfigError, match="does not know 'carl'; it knows anna, ben"):
        convert.run(job(talk, swapper, out, identity="carl"), workspace)
    with pytest.raises(ConfigError, match=r"written as MP4; call it out\.mp4"):
        convert.run(job(talk, swapper, tmp_path / "out.avi"), workspace)
    with pytest.raises(NotFoundError, match="does not exist"):
        convert.run(job(tmp_path / "nowhere.mp4", swapper, out), workspace)
    with pytest.raises(ConfigError, match="is the input itself"):
        convert.run(job(talk, swapper, talk), workspace)
    with pytest.raises(ConfigError, match="the licence of the input"):
        convert.run(job(talk, swapper, out, into_dataset="x"), workspace)
    (tmp_path / "mine.mp4").write_bytes(b"holiday")
    with pytest.raises(ConfigError, match="was not made here"):
        convert.run(job(talk, swapper, tmp_path / "mine.mp4"), workspace)
    assert (tmp_path / "mine.mp4").read_bytes() == b"holiday"


def test_a_single_file_that_cannot_be_converted_is_an_error_that_names_it(
    swapper: Path, tmp_path: Path, workspace: Workspace
) -> None:
    wall, junk = tmp_path / "wall.mp4", tmp_path / "junk.mp4"
    video.write(wall, [np.full((96, 96, 3), 90, np.uint8)] * 4)
    junk.write_bytes(b"x" * 400)
    with pytest.raises(DataError, match=r"^wall\.mp4: no face was found"):
        convert.run(job(wall, swapper, tmp_path / "out.mp4"), workspace)
    with pytest.raises(MediaError, match=r"^junk\.mp4: "):
        convert.run(job(junk, swapper, tmp_path / "out.mp4"), workspace)
    assert not list(tmp_path.glob("out*"))


def test_another_kind_of_model_is_refused(talk: Path, tmp_path: Path, workspace: Workspace) -> None:
    net = DcganGenerator.tiny()
    folder = bundles.write_nets(
        tmp_path / "gan", kind="generator", name="g", nets={"generator": (net, net.build().state_dict())},
        preprocess=Preprocess(size=28), provenance={},
    ).folder  # fmt: skip
    with pytest.raises(ConfigError, match="is a generator; swap-video needs a face-swap model"):
        convert.run(job(talk, folder, tmp_path / "out.mp4"), workspace)
