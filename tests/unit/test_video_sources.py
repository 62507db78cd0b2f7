"""sources/video, ffpp, celebdf, dfdc: every video becomes rows of one face or one named skip; people and originals are known."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from counterfake import config, media, video
from counterfake.errors import ConfigError, DataError
from counterfake.faces import overlap
from counterfake.sources import Sample, Skipped, SourceConfig, listing
from counterfake.sources.celebdf import CelebdfSource
from counterfake.sources.dfdc import DfdcSource
from counterfake.sources.ffpp import FfppSource
from counterfake.sources.synthetic import portrait
from counterfake.sources.video import FaceCut, VideoSource

CUT = FaceCut(frames=4, eyes=False)
PERSON = 2  # one that the cascade finds


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Eight frames in which a portrait of 128 pixels walks to the right."""
    made, frames = portrait(5, PERSON, 0, 128).pixels, []
    for step in range(8):
        frame = np.full((160, 240, 3), 120, np.uint8)
        frame[16:144, 20 + 8 * step : 148 + 8 * step] = made
        frames.append(frame)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    video.write(path, frames, crf=5)
    return path.read_bytes()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "empty.mp4"
    video.write(path, [np.full((64, 96, 3), 120, np.uint8)] * 4)
    return path.read_bytes()


def lay(root: Path, content: bytes, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def rows(source: SourceConfig) -> dict[str, Sample]:
    """The first row of each video; nothing may be skipped whole but what is no video."""
    found = list(source.samples())
    assert not whole(found), found
    samples = [item for item in found if isinstance(item, Sample)]
    return {sample.path: sample for sample in reversed(samples)}


def whole(items: Sequence[Sample | Skipped]) -> list[tuple[str, str]]:
    """(input, reason) of each that gave no row, and was not set aside."""
    lost = (item for item in items if isinstance(item, Skipped) and item.whole)
    return [(item.path, item.reason) for item in lost if not listing.is_aside(item.reason)]


def aside(items: Sequence[Sample | Skipped]) -> dict[str, str]:
    """{input: reason} of each that was set aside."""
    return {i.path: i.reason for i in items if isinstance(i, Skipped) and listing.is_aside(i.reason)}


# -- any folder ------------------------------------------------------------------------------------------------------


def test_a_video_becomes_crops_of_its_face_with_their_times(clip: bytes, tmp_path: Path) -> None:
    lay(tmp_path, clip, "real/anna.mp4")
    found = [item for item in VideoSource(path=str(tmp_path), cut=CUT).samples() if isinstance(item, Sample)]
    assert [sample.frame for sample in found] == [1, 3, 5, 7]
    assert [sample.time_s for sample in found] == pytest.approx([0.04, 0.12, 0.2, 0.28])
    for sample in found:
        picture = media.decode(sample.media)
        assert picture.shape[0] == picture.shape[1]
        x, y, w, h = sample.face_box or (0, 0, 0, 0)
        assert max(w, h) * 1.3 == pytest.approx(picture.shape[0], abs=1)
        assert (x + w / 2, y + h / 2) == pytest.approx((picture.shape[1] / 2, picture.shape[0] / 2), abs=1)
        assert (sample.fake, sample.maker, sample.video) == (0, "camera", "video/real/anna")
        assert (sample.face_method, sample.face_margin) == ("cascade", 1.3)
        assert (sample.attributes["track"], sample.attributes["frame_size"]) == (0, [240, 160])
    steps = np.diff([sample.attributes["box_in_frame"][0] for sample in found])
    assert steps == pytest.approx([16, 16, 16], abs=3)  # the face walks 8 pixels a frame
    assert len({sample.id for sample in found}) == 4


def test_whole_frames_keep_the_box_where_it_is(clip: bytes, tmp_path: Path) -> None:
    lay(tmp_path, clip, "a.mp4")
    cut = FaceCut(frames=2, keep="frame", quality=0, eyes=True)
    found = list(VideoSource(path=str(tmp_path), fake=1, maker="mine", cut=cut).samples())
    assert len(found) == 2
    for sample in found:
        assert isinstance(sample, Sample)
        assert media.sniff(sample.media) == "png"
        assert media.decode(sample.media).shape == (160, 240, 3)
        assert sample.frame is not None
        x, y, w, h = portrait(5, PERSON, 0, 128).face_box
        assert overlap(sample.face_box or (0, 0, 1, 1), (x + 20 + 8 * sample.frame, y + 16, w, h)) > 0.4
        assert sample.attributes["box_in_frame"] == pytest.approx(sample.face_box, abs=0.01)
        assert len(sample.landmarks or []) == 4
        assert (sample.fake, sample.maker) == (1, "mine")


def test_every_kth_frame_and_videos_decoded_twice_give_the_same_rows(
    clip: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = VideoSource(path=str(lay(tmp_path, clip, "a.mp4")), cut=FaceCut(every=3, eyes=False))
    held = list(source.samples())
    assert [item.frame for item in held if isinstance(item, Sample)] == [0, 3, 6]
    monkeypatch.setattr("counterfake.sources.video.HELD_BYTES", 0)
    assert list(source.samples()) == held


def test_every_file_is_accounted_for(clip: bytes, empty: bytes, tmp_path: Path) -> None:
    lay(tmp_path, clip, "a.mp4", "train/fake/swapper/b.mp4")
    lay(tmp_path, empty, "nobody.mp4")
    lay(tmp_path, b"", "nothing.mp4")
    lay(tmp_path, b"ffconcat version 1.0\nfile a.mp4\n", "list.mp4")
    lay(tmp_path, clip[:400], "cut.mp4")
    lay(tmp_path, media.encode(np.zeros((32, 32, 3), np.uint8)), "picture.jpg")
    source = VideoSource(path=str(tmp_path), cut=CUT)
    found = list(source.samples())
    assert list(source.names()) == sorted({item.path for item in found})
    assert sorted(whole(found)) == [
        ("cut.mp4", "unsupported"), ("list.mp4", "unsupported"), ("nobody.mp4", "no_face"), ("nothing.mp4", "empty"),
        ("picture.jpg", "unsupported"),
    ]  # fmt: skip
    forged = next(item for item in found if isinstance(item, Sample) and item.fake == 1)
    assert (forged.maker, forged.split, forged.video) == ("swapper", "train", "video/train/fake/swapper/b")


def test_pipes_broken_links_and_linked_folders_are_accounted_for(clip: bytes, tmp_path: Path) -> None:
    lay(tmp_path / "in", clip, "real/a.mp4", "real/.b.mp4", ".hidden/c.mp4")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "in" / "real", target_is_directory=True)
    (tmp_path / "in" / "gone.mp4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in" / "pipe.mp4")
    source = VideoSource(path=str(tmp_path / "in"), cut=CUT)
    found = list(source.samples())
    assert whole(found) == [
        ("gone.mp4", "cannot be read"), ("linked/", listing.LINKED), ("pipe.mp4", "unsupported"),
    ]  # fmt: skip
    assert aside(found) == {"real/.b.mp4": listing.HIDDEN, ".hidden/": listing.HIDDEN}
    assert list(source.names()) == list(dict.fromkeys(item.path for item in found))


def test_a_decoder_that_crashes_costs_its_own_video_alone(
    clip: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, clip, "a.mp4")
    crash = "import os; os.kill(os.getpid(), 11)"
    monkeypatch.setattr("counterfake.video.isolated.CHILD", crash)
    assert list(VideoSource(path=str(tmp_path), cut=CUT).samples()) == [Skipped("a.mp4", "undecodable")]


def test_a_process_of_its_own_changes_no_row(clip: bytes, tmp_path: Path) -> None:
    lay(tmp_path, clip, "a.mp4")
    own, here = (
        list(VideoSource(path=str(tmp_path), cut=dataclasses.replace(CUT, isolated=isolated)).samples())
        for isolated in (True, False)
    )
    assert own == here
    assert len(own) == 4


def test_a_frame_without_the_face_is_a_part_that_gave_no_row(tmp_path: Path) -> None:
    made = portrait(5, PERSON, 0, 128).pixels
    video.write(tmp_path / "a.mp4", [made] * 6 + [np.full_like(made, 120)] * 4, crf=5)
    found = list(VideoSource(path=str(tmp_path), cut=FaceCut(every=1, eyes=False)).samples())
    assert [isinstance(item, Sample) for item in found] == [True] * 6 + [False] * 4
    assert {(item.reason, item.whole) for item in found[6:] if isinstance(item, Skipped)} == {
        ("no_face", False)
    }


def test_a_gap_is_filled_and_says_so(tmp_path: Path) -> None:
    made = portrait(5, PERSON, 0, 128).pixels
    video.write(tmp_path / "a.mp4", [made] * 4 + [np.full_like(made, 120)] * 2 + [made] * 4, crf=5)
    found = list(VideoSource(path=str(tmp_path), cut=FaceCut(every=1, eyes=False)).samples())
    filled = [isinstance(item, Sample) and item.attributes.get("interpolated", False) for item in found]
    assert filled == [False] * 4 + [True] * 2 + [False] * 4


def test_two_faces_are_two_tracks_when_asked_for(tmp_path: Path) -> None:
    frame = np.full((160, 400, 3), 120, np.uint8)
    frame[16:144, 20:148] = portrait(5, PERSON, 0, 128).pixels
    frame[16:144, 240:368] = portrait(5, 6, 0, 128).pixels
    video.write(tmp_path / "a.mp4", [frame] * 4, crf=5)
    for tracks, expected in ((1, [0] * 4), (0, [0, 1] * 4)):
        cut = FaceCut(every=1, tracks=tracks, eyes=False)
        found = list(VideoSource(path=str(tmp_path), cut=cut).samples())
        assert [item.attributes["track"] for item in found if isinstance(item, Sample)] == expected


def test_one_file_is_a_source_too(clip: bytes, tmp_path: Path) -> None:
    source = VideoSource(path=str(lay(tmp_path, clip, "a.mp4") / "a.mp4"), name="news", fake=0, cut=CUT)
    assert list(source.names()) == ["a.mp4"]
    assert rows(source)["a.mp4"].video == "news/a"


def test_settings_are_checked_and_travel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="frames >= 1"):
        FaceCut(frames=0)
    with pytest.raises(ConfigError, match="memory_bytes >= 100,000,000"):
        FaceCut(memory_bytes=1)
    source = config.override(VideoSource(path=str(tmp_path)), {"cut.frames": 16, "cut.method": "yunet"})
    assert config.from_dict(SourceConfig, config.to_dict(source)) == source  # type: ignore[type-abstract]
    with pytest.raises(ConfigError, match="yunet needs a model file"):
        list(source.read([]))


# -- FaceForensics++ -------------------------------------------------------------------------------------------------


@pytest.fixture
def ffpp(clip: bytes, tmp_path: Path) -> Path:
    lay(
        tmp_path, clip,
        "original_sequences/youtube/c23/videos/519.mp4", "original_sequences/youtube/c23/videos/515.mp4",
        "original_sequences/youtube/c40/videos/519.mp4", "original_sequences/actors/c23/videos/01__hugging_happy.mp4",
        "manipulated_sequences/Deepfakes/c23/videos/519_515.mp4", "manipulated_sequences/Deepfakes/masks/videos/519_515.mp4",
        "manipulated_sequences/Face2Face/c23/videos/515_519.mp4",
        "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__hugging_happy__YVGY8LOK.mp4",
    )  # fmt: skip
    lay(tmp_path, b'[["519", "515"]]', "splits/val.json")
    lay(tmp_path, b'[["071", "054"]]', "splits/train.json")
    return tmp_path


def test_ffpp_knows_both_people_of_a_forgery(ffpp: Path) -> None:
    found = rows(FfppSource(path=str(ffpp), cut=CUT))
    facts = {
        "/".join(path.split("/")[1::3]): (
            row.fake,
            row.maker,
            row.identity,
            row.attributes.get("donor"),
            row.split,
        )
        for path, row in found.items()
    }
    assert facts == {
        "youtube/519.mp4": (0, "camera", "ffpp/519", None, "validation"),
        "youtube/515.mp4": (0, "camera", "ffpp/515", None, "validation"),
        "actors/01__hugging_happy.mp4": (0, "camera", "ffpp/actor-01", None, None),
        "Deepfakes/519_515.mp4": (1, "Deepfakes", "ffpp/519", "ffpp/515", "validation"),
        "Face2Face/515_519.mp4": (1, "Face2Face", "ffpp/515", "ffpp/519", "validation"),
        "DeepFakeDetection/01_02__hugging_happy__YVGY8LOK.mp4": (
            1, "DeepFakeDetection", "ffpp/actor-01", "ffpp/actor-02", None,
        ),
    }  # fmt: skip
    forged = found["manipulated_sequences/Deepfakes/c23/videos/519_515.mp4"]
    assert forged.attributes["also"] == ["identity:ffpp/515"]
    assert forged.video == "ffpp/manipulated_sequences/Deepfakes/c23/videos/519_515"
    assert len({row.video for row in found.values()}) == len(found)


def test_ffpp_can_be_read_in_part(ffpp: Path) -> None:
    found = list(FfppSource(path=str(ffpp), cut=CUT, compression="", methods=("Face2Face",)).samples())
    names = list(dict.fromkeys(item.path for item in found if isinstance(item, Sample)))
    assert [name.split("/")[1:3] for name in names] == [
        ["actors", "c23"], ["youtube", "c23"], ["youtube", "c23"], ["youtube", "c40"], ["Face2Face", "c23"],
    ]  # fmt: skip
    assert aside(found) == {
        "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__hugging_happy__YVGY8LOK.mp4": listing.UNWANTED,
        "manipulated_sequences/Deepfakes/c23/videos/519_515.mp4": listing.UNWANTED,
        "manipulated_sequences/Deepfakes/masks/videos/519_515.mp4": listing.BESIDE,
        "splits/train.json": listing.BESIDE, "splits/val.json": listing.BESIDE,
    }  # fmt: skip
    assert {item.path for item in found} == set(listing.listed(ffpp))
    (one,) = {item.path for item in FfppSource(path=str(ffpp), cut=CUT).read(names[-1:])}
    assert one == names[-1]
    free = rows(FfppSource(path=str(ffpp), cut=CUT, official_split=False))
    assert {row.split for row in free.values()} == {None}


def test_ffpp_names_what_it_cannot_place(ffpp: Path, clip: bytes) -> None:
    lay(
        ffpp,
        clip,
        "manipulated_sequences/Deepfakes/c23/videos/519.mp4",
        "original_sequences/youtube/c23/videos/x.mp4",
        "elsewhere.mp4",
    )
    found = whole(list(FfppSource(path=str(ffpp), cut=CUT).samples()))
    assert [path.split("/")[-1] for path, _ in found] == ["x.mp4", "519.mp4", "elsewhere.mp4"]
    lay(ffpp, b"{broken", "splits/test.json")
    with pytest.raises(DataError, match=r"test\.json is no list"):
        list(FfppSource(path=str(ffpp), cut=CUT).samples())


@pytest.mark.parametrize("source", [FfppSource, CelebdfSource, DfdcSource])
def test_a_folder_of_another_layout_is_said_to_be_one(source: type[SourceConfig], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set source\.path"):
        list(source(path=str(tmp_path)).samples())


# -- Celeb-DF --------------------------------------------------------------------------------------------------------


def test_celebdf_knows_both_people_and_the_test_list(clip: bytes, tmp_path: Path) -> None:
    lay(
        tmp_path, clip, "Celeb-real/id0_0000.mp4", "Celeb-real/id1_0003.mp4", "YouTube-real/00012.mp4",
        "Celeb-synthesis/id0_id1_0000.mp4",
    )  # fmt: skip
    lay(
        tmp_path,
        b"1 Celeb-real/id1_0003.mp4\n0 Celeb-synthesis/id0_id1_0000.mp4\n",
        "List_of_testing_videos.txt",
    )
    found = rows(CelebdfSource(path=str(tmp_path), cut=CUT))
    facts = {path.split("/")[1]: (row.fake, row.identity, row.split) for path, row in found.items()}
    assert facts == {
        "id0_0000.mp4": (0, "celebdf/id0", None), "id1_0003.mp4": (0, "celebdf/id1", "test"),
        "00012.mp4": (0, None, None), "id0_id1_0000.mp4": (1, "celebdf/id0", "test"),
    }  # fmt: skip
    forged = found["Celeb-synthesis/id0_id1_0000.mp4"]
    assert (forged.maker, forged.attributes["donor"]) == ("Celeb-synthesis", "celebdf/id1")
    assert forged.attributes["also"] == ["identity:celebdf/id1"]
    lay(tmp_path, clip, "Celeb-real/someone.mp4")
    lay(tmp_path, b"", ".DS_Store", "Celeb-real/notes.txt", "Else/id0_0000.mp4")
    items = list(CelebdfSource(path=str(tmp_path), cut=CUT).samples())
    assert [path for path, _ in whole(items)] == ["Celeb-real/someone.mp4", "Else/id0_0000.mp4"]
    assert aside(items) == {
        "List_of_testing_videos.txt": listing.BESIDE, "Celeb-real/notes.txt": listing.BESIDE,
        ".DS_Store": listing.HIDDEN,
    }  # fmt: skip
    assert {item.path for item in items} == set(listing.listed(tmp_path))


# -- DFDC ------------------------------------------------------------------------------------------------------------


def dfdc(root: Path, clip: bytes, split: str = "train") -> DfdcSource:
    lay(root, clip, "dfdc_train_part_0/real.mp4", "dfdc_train_part_0/fake.mp4", "dfdc_train_part_1/extra.mp4")
    metadata = {
        "real.mp4": {"label": "REAL", "split": "train"},
        "fake.mp4": {"label": "FAKE", "split": split, "original": "real.mp4"},
        "gone.mp4": {"label": "FAKE", "split": "train", "original": "real.mp4"},
        "../../outside.mp4": {"label": "REAL", "split": "train"},
    }
    lay(root, json.dumps(metadata).encode(), "dfdc_train_part_0/metadata.json")
    return DfdcSource(path=str(root), cut=CUT)


def test_dfdc_ties_a_forgery_to_its_original(clip: bytes, tmp_path: Path) -> None:
    source = dfdc(tmp_path, clip)
    found = list(source.samples())
    first = {item.path.split("/")[1]: item for item in reversed(found) if isinstance(item, Sample)}
    assert {name: (row.fake, row.maker, row.split) for name, row in first.items()} == {
        "real.mp4": (0, "camera", None), "fake.mp4": (1, "dfdc", None),
    }  # fmt: skip
    assert first["fake.mp4"].attributes["also"] == [f"video:{first['real.mp4'].video}"]
    assert whole(found) == [
        ("dfdc_train_part_0/gone.mp4", "is in metadata.json but not there"),
        ("dfdc_train_part_1/extra.mp4", "is not in metadata.json"),
    ]
    assert aside(found) == {"dfdc_train_part_0/metadata.json": listing.BESIDE}
    assert list(source.names()) == sorted({item.path for item in found})


def test_dfdc_uses_splits_only_where_there_are_several(clip: bytes, tmp_path: Path) -> None:
    found = list(dfdc(tmp_path, clip, split="test").samples())
    assert {i.path.split("/")[1]: i.split for i in found if isinstance(i, Sample)} == {
        "real.mp4": "train", "fake.mp4": "test",
    }  # fmt: skip
    lay(tmp_path, b"[]", "dfdc_train_part_1/metadata.json")
    with pytest.raises(DataError, match="is no list of videos"):
        list(DfdcSource(path=str(tmp_path), cut=CUT).samples())


# -- real videos -----------------------------------------------------------------------------------------------------


def test_real_videos_give_steady_crops_of_one_face(shared_data: Path) -> None:
    source = VideoSource(path=str(shared_data / "videos"), cut=FaceCut(frames=8, eyes=False))
    found = list(source.samples())
    assert not whole(found)
    by_video: dict[str, list[Sample]] = {}
    for item in found:
        if isinstance(item, Sample):
            by_video.setdefault(item.path, []).append(item)
    assert len(by_video) == 4
    for name in ("fake_ffpp_Deepfakes_519_515.mp4", "real_ffpp_004.mp4", "real_ffpp_519.mp4"):
        sides = [sample.attributes["box_in_frame"][2] for sample in by_video[name]]
        assert len(sides) == 8, name
        assert max(sides) / min(sides) < 1.5, name
