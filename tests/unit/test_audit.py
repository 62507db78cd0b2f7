"""audit.py and the split rule: what belongs together stays together, and where it does not it is found and refused."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from counterfake import audit, media, provenance
from counterfake.data import DataConfig
from counterfake.errors import ConfigError, CorruptError, DataError
from counterfake.records import Dataset, Sample, SplitRule, Version, write_version
from counterfake.workspace import Workspace

SOURCES = {"made": {"licence": "CC0-1.0", "consent": "synthetic"}}
HALVES = SplitRule(fractions={"train": 0.5, "test": 0.5})


def sample(number: int, **changes: Any) -> Sample:
    facts = {"image": b"picture %d" % number, "path": f"{number}.png", "fake": number % 2, "source": "made"}
    return Sample(**{**facts, **changes})


def hashed(number: int, turned: int = 0, **changes: Any) -> Sample:
    """A picture whose hash is that of `number`, but for `turned` bits."""
    base = int(random.Random(number).getrandbits(256)) ^ ((1 << turned) - 1)
    name = f"{number}-{turned}"
    facts = {"image": name.encode(), "path": name, "attributes": {"phash": f"{base:064x}"}}
    return sample(number, **{**facts, **changes})


def jpeg(number: int, quality: int) -> bytes:
    buffer = io.BytesIO()
    blobs = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(blobs).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return (tmp_path / "faces").as_uri()


def write(uri: str, rows: Sequence[Sample], **options: Any) -> Version:
    return write_version(uri, rows, **{"sources": SOURCES, "splits": HALVES, **options})


def where(uri: str, version: Version | None = None) -> dict[str, str]:
    """Path of each row -> its split."""
    dataset = Dataset.open(uri)
    version = version or dataset.version()
    return {s.path: split for split in version.splits for s in dataset.samples(version, split)}


def found(uri: str, level: str = "leak") -> dict[str, audit.Finding]:
    dataset = Dataset.open(uri)
    return {f.kind: f for f in audit.audit(dataset).findings if f.level == level}


# -- splits ---------------------------------------------------------------------------------------------------------


def linked() -> list[list[Sample]]:
    """Groups of rows that must not be torn apart, of every kind."""
    people = [[sample(10 * p + n, identity=f"p{p}") for n in range(3)] for p in range(20)]
    videos = [[sample(1000 + 10 * v + n, video=f"v{v}") for n in range(3)] for v in range(20)]
    both = [
        [
            sample(2000 + g, identity=f"a{g}", video=f"w{g}"),
            sample(2100 + g, identity=f"b{g}", video=f"w{g}"),
            sample(2200 + g, identity=f"b{g}"),
        ]
        for g in range(20)
    ]
    copies = [[hashed(3000 + g), hashed(3000 + g, 20), hashed(3000 + g, 45)] for g in range(20)]
    swaps = [
        [
            sample(4000 + g, identity=f"d{g}"),
            sample(4100 + g, identity=f"e{g}", attributes={"also": [f"identity:d{g}"]}),
        ]
        for g in range(20)
    ]
    return [*people, *videos, *both, *copies, *swaps]


def test_rows_linked_in_any_way_stay_on_one_side(uri: str) -> None:
    groups = linked()
    write(uri, [row for group in groups for row in group])
    split = where(uri)
    sides = [{split[row.path] for row in group} for group in groups]
    assert all(len(side) == 1 for side in sides)
    assert sides.count({"train"}) > 20 < sides.count({"test"})
    assert found(uri) == {}


def test_splits_do_not_depend_on_the_order_of_reading(tmp_path: Path) -> None:
    rows = [row for group in linked() for row in group]
    one = write((tmp_path / "a").as_uri(), rows)
    random.Random(1).shuffle(rows)
    assert write((tmp_path / "b").as_uri(), rows).digest == one.digest


def test_a_prescribed_split_takes_along_what_is_linked(uri: str) -> None:
    rows = [row for group in linked() for row in group]
    chosen = [dataclasses.replace(row, split="held-out") if row.identity == "b3" else row for row in rows]
    write(uri, chosen)
    split = where(uri)
    assert {split[row.path] for row in linked()[43]} == {"held-out"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"identity": "x"}, {"identity": "x"}),
        ({"video": "v"}, {"identity": "z", "video": "v"}),
        ({"identity": "x"}, {"identity": "y", "attributes": {"also": ["identity:x"]}}),
        ({"attributes": {"phash": "0f" * 32}}, {"attributes": {"phash": "0f" * 31 + "00"}}),
    ],
    ids=["person", "video", "donor", "near-copy"],
)
@pytest.mark.parametrize("side", ["train", "test"])
def test_what_is_added_joins_the_split_it_is_linked_with(
    uri: str, old: dict[str, Any], new: dict[str, Any], side: str
) -> None:
    write(uri, [sample(n, split=side, **old) if n == 0 else sample(n) for n in range(4)])
    write(uri, [sample(10, **new), *(sample(n) for n in range(11, 15))], parent="append")
    assert where(uri)["10.png"] == side
    assert found(uri) == {}


def test_a_link_between_two_splits_goes_to_the_first_and_is_reported(uri: str) -> None:
    write(uri, [sample(0, split="test", identity="a"), sample(1, split="train", video="v")])
    write(uri, [sample(2, identity="a", video="v")], parent="append")
    assert where(uri)["2.png"] == "train"
    assert set(found(uri)) == {"identity"}


def test_every_picture_by_itself_if_so_asked(uri: str) -> None:
    rows = [hashed(n // 8, identity=f"p{n // 8}", image=b"%d" % n) for n in range(64)]
    write(uri, rows, splits=SplitRule(by="id", fractions=HALVES.fractions))
    assert set(found(uri)) == {"identity", "near-copy"}


def test_near_copies_may_be_told_apart_and_how_near_is_a_setting(tmp_path: Path) -> None:
    rows = [hashed(g, turned) for g in range(30) for turned in (0, 40)]
    rules = {"off": {"near_copies": False}, "default": {}, "wide": {"near_bits": 40}}
    torn = {}
    for name, settings in rules.items():
        target = (tmp_path / name).as_uri()
        write(target, rows, splits=dataclasses.replace(HALVES, **settings))
        split = where(target)
        torn[name] = sum(split[f"{g}-0"] != split[f"{g}-40"] for g in range(30))
    assert torn["off"] == torn["default"] > 5
    assert torn["wide"] == 0
    with pytest.raises(ConfigError, match="near_bits must lie in 0-255"):
        SplitRule(near_bits=256)


# -- findings -------------------------------------------------------------------------------------------------------


def torn() -> list[Sample]:
    """One leak of each kind."""
    return [
        sample(0, split="train", identity="anna"),
        sample(1, split="test", identity="anna"),
        sample(2, split="train", video="v/1"),
        sample(3, split="test", video="v/1"),
        hashed(4, 0, split="train"),
        hashed(4, 9, split="test"),
        sample(5, split="train", identity="bert"),
    ]


def test_each_leak_is_found_and_shown(uri: str) -> None:
    write(uri, torn())
    leaks = found(uri)
    assert set(leaks) == {"identity", "video", "near-copy"}
    assert leaks["identity"].examples == ("anna in train and test",)
    assert leaks["video"].examples == ("v/1 in train and test",)
    assert leaks["near-copy"].examples[0] in (
        "train/4-0 and test/4-9: 9 bits",
        "test/4-9 and train/4-0: 9 bits",
    )
    assert "not looked for in 5 rows" in found(uri, "note")["near-copy"].text


def test_the_same_picture_twice_is_found(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our writer never does it; a version made from several may."""
    version = write(uri, [sample(n, split="train") for n in range(6)])
    shard = version.shards("train")[0]
    twice = dataclasses.replace(version, splits={"train": (shard, shard), "test": (shard,)})
    found_ = {(f.level, f.kind): f for f in audit.audit(Dataset.open(uri), twice).findings}
    assert "6 pictures are there twice, to the byte, in one split" in found_["warning", "duplicate"].text
    assert "6 pictures" in found_["leak", "duplicate"].text
    assert "train/" in found_["leak", "duplicate"].examples[0]


def test_labels_faces_and_rows_without_a_label_are_told(uri: str) -> None:
    seen = {"face_method": "cascade"}
    box = (0.0, 0.0, 4.0, 4.0)
    rows = [sample(n, split="train", fake=0, face_box=box, **seen) for n in range(80)]
    rows += [
        sample(n, split="train", fake=1, maker="gan", face_box=box if n % 2 else None, **seen)
        for n in range(100, 180)
    ]
    rows += [sample(n, split="test", fake=1, maker="gan") for n in range(200, 205)]
    rows += [sample(n, split="train", fake=None, maker="unknown") for n in range(300, 303)]
    write(uri, rows)
    warned = found(uri, "warning")
    assert warned["unlabelled"].text.startswith("3 rows")
    assert "train 50%, test 100%" in warned["balance"].text
    assert "found in 75% of 160 rows (cascade), real 100%, fake 50%" in warned["faces"].text
    kept = audit.stored(Dataset.open(uri))
    assert kept is not None
    assert kept.balance["train"]["gan"] == {"real": 0, "fake": 80, "unknown": 0}


def test_the_file_format_that_tells_the_label_is_a_warning(uri: str) -> None:
    write(uri, [sample(n, image=jpeg(n, 80 if n % 2 else 90)) for n in range(120)])
    warning = found(uri, "warning")["metadata"]
    assert "JPEG quantisation tables" in warning.text
    assert "--set encode=jpeg:90" in warning.text


def test_the_mark_of_generated_files_is_no_shortcut(uri: str) -> None:
    plain = [sample(n, image=jpeg(n, 80)) for n in range(120)]
    marked = [
        dataclasses.replace(s, id="", image=provenance.mark(s.media, maker="gan")) if s.fake else s
        for s in plain
    ]
    write(uri, marked)
    assert "metadata" not in found(uri, "warning")
    other = [
        dataclasses.replace(s, id="", image=media.embed_xmp(s.media, b"of a camera")) if s.fake else s
        for s in plain
    ]
    write(f"{uri}-other", other)
    assert "metadata segments" in found(f"{uri}-other", "warning")["metadata"].text


def test_raw_pixels_are_audited_as_far_as_that_goes(uri: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    rows = [
        Sample(pixels=p, source="made", class_id=n % 2, identity=f"p{n % 3}") for n, p in enumerate(pixels)
    ]
    write(uri, rows, splits=SplitRule(by="id", fractions=HALVES.fractions))
    assert set(found(uri)) == {"identity"}
    notes = found(uri, "note")
    assert "raw pixels" in notes["near-copy"].text
    assert "raw pixels" in notes["metadata"].text
    assert "unlabelled" not in found(uri, "warning")


def test_an_audit_reads_every_row_once_and_says_so(uri: str) -> None:
    write(uri, [sample(n) for n in range(150)], rows_per_batch=16)
    steps: list[int] = []
    made = audit.audit(Dataset.open(uri), progress=steps.append)
    assert sum(steps) == made.rows == 150


# -- kept with the dataset ------------------------------------------------------------------------------------------


def test_an_audit_is_kept_by_the_digest_of_its_version(uri: str) -> None:
    version = write(uri, torn())
    dataset = Dataset.open(uri)
    assert audit.stored(dataset) is None
    made = audit.audit(dataset)
    assert audit.stored(Dataset.open(uri), version) == made
    assert dataset.store.exists(f"audits/{version.digest}.json")
    assert json.loads(json.dumps(made.to_dict()))["version"] == 1
    write(uri, [sample(99)], parent="append")
    assert audit.stored(Dataset.open(uri)) is None


def test_an_unreadable_audit_says_what_to_do(uri: str) -> None:
    version = write(uri, torn())
    dataset = Dataset.open(uri)
    made = audit.audit(dataset).to_dict()
    dataset.store.put(f"audits/{version.digest}.json", b"{")
    with pytest.raises(CorruptError, match="data audit"):
        audit.stored(dataset)
    dataset.store.put(f"audits/{version.digest}.json", json.dumps({**made, "schema_version": 2}).encode())
    with pytest.raises(DataError, match="newer counterfake"):
        audit.stored(dataset)


def test_an_audit_reads_like_a_report_worst_first(uri: str) -> None:
    write(uri, torn())
    heading, first, *rest = audit.audit(Dataset.open(uri)).lines()
    assert "7 rows, 3 leaks" in heading
    assert first.startswith("leak")
    assert any("e.g. anna in train and test" in line for line in rest)


# -- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaking(workspace: Workspace) -> Workspace:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 28, 28, 1), dtype=np.uint8)
    rows = [Sample(pixels=p, source="made", identity=f"p{n % 4}") for n, p in enumerate(pixels)]
    write(workspace.dataset("leaking"), rows, splits=SplitRule(by="id", fractions=HALVES.fractions))
    return workspace


def training_job(**data: Any) -> Any:
    from counterfake.images import Preprocess
    from counterfake.learners.gan import GanConfig
    from counterfake.loop import LoopConfig, TrainJob
    from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator

    return TrainJob(
        name="leaky",
        task="gan",
        data=DataConfig(
            uri="leaking", batch_size=8, preprocess=Preprocess(size=28, channels=1), threads=1, **data
        ),
        learner=GanConfig(generator=DcganGenerator.tiny(), discriminator=DcganDiscriminator.tiny()),
        loop=LoopConfig(steps=1, tick_steps=1, threads=1),
        workers=0,
    )


def test_training_refuses_a_leak_and_says_both_ways_out(leaking: Workspace) -> None:
    from counterfake.cluster.train import fit

    audit.audit(Dataset.open(leaking.dataset("leaking")))
    with pytest.raises(
        DataError, match=r"found a leak \(identity.*ingest it again.*--set data.allow_leaks=true"
    ) as error:
        fit(training_job(), leaking)
    assert "\n" not in str(error.value)
    assert not Path(leaking.training.removeprefix("file://")).exists()  # nothing was begun


def test_an_allowed_leak_is_on_the_record(leaking: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from counterfake.cluster import train

    class Begun(Exception):
        pass

    recorded: dict[str, Any] = {}

    def start(tracker: object, task: str, name: str, **facts: Any) -> None:
        recorded.update(facts)
        raise Begun  # MLflow's own database would take longer than all other tests of this file

    monkeypatch.setattr(train.Tracker, "start", start)
    audit.audit(Dataset.open(leaking.dataset("leaking")))
    with pytest.raises(Begun):
        train.fit(training_job(allow_leaks=True), leaking)
    assert recorded["tags"]["counterfake.allowed_leaks"] == "identity"
    assert recorded["params"]["data"]["allow_leaks"] is True


def test_a_version_that_was_never_audited_is_let_through_with_a_warning(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    version = write(uri, torn())
    with caplog.at_level(logging.WARNING):
        assert audit.admit(Dataset.open(uri), version, allow_leaks=False) == []
    assert f"counterfake data audit {uri}@1" in caplog.text


# -- real data ------------------------------------------------------------------------------------------------------


def test_one_encoder_for_both_classes_silences_real_pictures(shared_data: Path, uri: str) -> None:
    """CIPLAB, 24 % of fakes with another table, then through the encoder of ingest."""
    import tarfile

    rows: dict[str, list[Sample]] = {"leak": [], "encoded": []}
    with tarfile.open(shared_data / "ciplab" / "images.tar.gz") as archive:
        members = [m for m in archive if m.isreg()]
        for number, member in enumerate(members[::3]):
            file = archive.extractfile(member)
            assert file is not None
            pixels, fake = media.decode(file.read()), int("fake" in member.name)
            data = media.encode(pixels, "jpeg", 95 if fake and number % 25 < 6 else 90)
            again = media.encode(media.decode(data), "jpeg", 90)
            rows["leak"].append(sample(number, image=data, fake=fake, path=member.name))
            rows["encoded"].append(sample(number, image=again, fake=fake, path=member.name))
    write(f"{uri}-leak", rows["leak"])
    write(f"{uri}-encoded", rows["encoded"])
    assert "quantisation tables" in found(f"{uri}-leak", "warning")["metadata"].text
    assert "metadata" not in found(f"{uri}-encoded", "warning")
