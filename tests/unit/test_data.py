"""data.py: every row once, the same global batches for every world size, any step without the steps before it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from counterfake import data, labels, media
from counterfake.data import DataConfig, Loader
from counterfake.errors import ConfigError, CorruptError, DataError, NotFoundError
from counterfake.images import Preprocess
from counterfake.order import Order
from counterfake.records import Dataset, Sample, SplitRule, write_version
from counterfake.versions import Shard, Version, commit

SOURCES = {"made": {"licence": "CC0-1.0", "consent": "synthetic"}}
TRAIN = SplitRule(fractions={"train": 1.0})
SIDE = 16


def write(uri: str, rows: Any, **options: Any) -> Any:
    return write_version(uri, rows, **{"sources": SOURCES, "splits": TRAIN, **options})


def pictures(count: int) -> list[Sample]:
    """PNG pictures whose colour tells which one it is."""
    return [
        Sample(
            image=media.encode(np.full((SIDE, SIDE, 3), (n, 255 - n, n // 2), np.uint8), "png"),
            source="made",
            fake=(None, 0, 1)[n % 3],
            class_id=n,
            identity=f"p{n % 5}" if n % 2 else None,
            maker="camera" if n % 3 < 2 else "dcgan@1",
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = (tmp_path_factory.mktemp("data") / "faces").as_uri()
    write(uri, pictures(100), rows_per_shard=20, rows_per_batch=6)
    return uri


def config(uri: str, **changes: Any) -> DataConfig:
    return DataConfig(**{"uri": uri, "batch_size": 8, "preprocess": Preprocess(size=SIDE), **changes})


# -- the order, as arithmetic ---------------------------------------------------------------------------------------

SHAPES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=7)
ORDERS = st.fixed_dictionaries(
    {
        "lanes": st.sampled_from([1, 2, 3, 4, 6]),
        "share": st.integers(1, 5),
        "window": st.integers(1, 5),
        "mix_shards": st.integers(1, 3),
        "seed": st.integers(0, 5),
        "drop_last": st.booleans(),
    }
)


def order(shape: list[list[int]], options: dict[str, Any]) -> tuple[Order, int]:
    """The order and its batch size."""
    options = dict(options)
    batch = options.pop("share") * options["lanes"]
    return Order(shape, batch_size=batch, **options), batch


def epoch_rows(found: Order, epoch: int, step: int) -> list[tuple[int, ...]]:
    slices = [found.slice(epoch, step, lane) for lane in range(found.lanes)]
    return [tuple(row) for part in slices for row in part.tolist()]


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, options=ORDERS, epoch=st.integers(0, 3))
def test_an_epoch_delivers_each_row_exactly_once(
    shape: list[list[int]], options: dict[str, Any], epoch: int
) -> None:
    found, batch_size = order(shape, options)
    batches = [epoch_rows(found, epoch, step) for step in range(found.steps)]
    seen = Counter(row for batch in batches for row in batch)
    every = {
        (s, b, r) for s, blocks in enumerate(shape) for b, size in enumerate(blocks) for r in range(size)
    }
    assert set(seen) <= every
    assert all(count == 1 for count in seen.values())
    left_out = len(every) - len(seen)
    if options["drop_last"]:
        assert left_out == len(every) % batch_size
        assert all(len(batch) == batch_size for batch in batches)
    else:
        assert left_out == 0
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert not batches or batches[-1]


@settings(max_examples=80, deadline=None)
@given(shape=SHAPES, options=ORDERS, epoch=st.integers(0, 3), at=st.floats(0, 1))
def test_a_step_does_not_depend_on_the_steps_before_it(
    shape: list[list[int]], options: dict[str, Any], epoch: int, at: float
) -> None:
    walked, _ = order(shape, options)
    if not walked.steps:
        return
    step = min(int(at * walked.steps), walked.steps - 1)
    batches = [epoch_rows(walked, epoch, s) for s in range(walked.steps)]
    fresh, _ = order(shape, options)
    assert epoch_rows(fresh, epoch, step) == batches[step]


def manifest(folder: str, shape: list[list[int]]) -> str:
    """URI of a dataset with a manifest and no shards: an order needs no more."""
    dataset = Dataset.open(Path(folder, "counted").as_uri())
    shards = tuple(
        Shard(f"{number:064x}", 1, sum(sizes), tuple((size, 1) for size in sizes))
        for number, sizes in enumerate(shape)
    )
    made = Version(
        number=1, digest="0" * 64, kind="image", shape=None, splits={"train": shards}, parent=None,
        sources={}, counts=(), report={}, writer={}, created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    assert commit(dataset.store, made)
    return dataset.store.uri


def global_batch(options: DataConfig, world: int, step: int) -> list[list[int]]:
    """What workers that have just started read together at a step: (shard, record batch, row) of each row, in order."""
    return [
        row for rank in range(world) for row in Loader(options, rank=rank, world=world).plan(step).tolist()
    ]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=6),
    options=ORDERS,
    stays=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=5),
)
def test_workers_that_come_and_go_read_the_same_batches_and_each_row_once(
    shape: list[list[int]], options: dict[str, Any], stays: list[tuple[int, int]]
) -> None:
    """stays: (which of the world sizes that divide lanes, for how many steps); each begins with fresh workers."""
    batch_size = options["share"] * options["lanes"]
    rows = sum(map(sum, shape))
    assume(rows >= batch_size or not options["drop_last"])
    worlds = [world for world in range(1, options["lanes"] + 1) if options["lanes"] % world == 0]
    with tempfile.TemporaryDirectory() as folder:
        changes = {name: value for name, value in options.items() if name != "share"}
        fitting = config(manifest(folder, shape), batch_size=batch_size, **changes)
        alone = Loader(fitting)
        steps = alone.steps_per_epoch
        reference = [alone.plan(step).tolist() for step in range(2 * steps)]
        found: list[list[list[int]]] = []
        for choice, length in itertools.cycle(stays):
            world = worlds[choice % len(worlds)]
            ranks = [Loader(fitting, rank=rank, world=world) for rank in range(world)]
            found += [
                [row for rank in ranks for row in rank.plan(step).tolist()]
                for step in range(len(found), min(len(found) + length, 2 * steps))
            ]
            if len(found) == 2 * steps:
                break
        assert found == reference
        for world in worlds:  # from any step on: here from the second epoch's last
            assert global_batch(fitting, world, 2 * steps - 1) == reference[-1]
    for epoch in range(2):
        seen = [tuple(row) for batch in reference[epoch * steps : (epoch + 1) * steps] for row in batch]
        assert len(set(seen)) == len(seen) == rows - (rows % batch_size if options["drop_last"] else 0)


def test_epochs_seeds_and_neighbours_differ() -> None:
    shape = [[16] * 8] * 6
    options = {"lanes": 4, "share": 4, "window": 4, "mix_shards": 3, "seed": 0, "drop_last": True}
    found, _ = order(shape, options)
    first, second = ([epoch_rows(found, e, s) for s in range(found.steps)] for e in (0, 1))
    other, _ = order(shape, options | {"seed": 1})
    assert first != second
    assert first[0] != epoch_rows(other, 0, 0)
    blocks = [len({row[:2] for row in batch}) for batch in first]
    assert np.mean(blocks) > 8  # a batch of 16 draws from many record batches
    shards = [len({row[0] for row in batch}) for batch in first]
    assert np.mean(shards) > 3


def test_rows_are_shuffled_evenly() -> None:
    """Over many epochs, where a row comes in the epoch is uniform: mean 1/2, standard deviation 1/sqrt(12)."""
    found, _ = order(
        [[5, 5], [5, 3]],
        {"lanes": 2, "share": 1, "window": 2, "mix_shards": 2, "seed": 0, "drop_last": False},
    )
    places: dict[tuple[int, ...], list[float]] = {}
    for epoch in range(400):
        rows = [row for step in range(found.steps) for row in epoch_rows(found, epoch, step)]
        for place, row in enumerate(rows):
            places.setdefault(row, []).append(place / (len(rows) - 1))
    means = [float(np.mean(found_places)) for found_places in places.values()]
    assert len(places) == 18
    assert max(abs(mean - 0.5) for mean in means) < 5 * math.sqrt(1 / 12 / 400)


def test_a_lane_reads_its_share_of_the_shards_only() -> None:
    found, _ = order(
        [[8] * 4] * 16, {"lanes": 4, "share": 2, "window": 4, "mix_shards": 2, "seed": 3, "drop_last": True}
    )
    touched = [
        {row[0] for step in range(found.steps) for row in found.slice(0, step, lane).tolist()}
        for lane in range(4)
    ]
    assert [len(shards) for shards in touched] == [4, 4, 4, 4]
    assert set().union(*touched) == set(range(16))


def test_the_order_is_pinned() -> None:
    """Resuming an old run with a newer version must see the same rows: this list may never change."""
    found, _ = order(
        [[4, 4, 2], [5]],
        {"lanes": 2, "share": 2, "window": 2, "mix_shards": 2, "seed": 7, "drop_last": False},
    )
    assert [epoch_rows(found, 1, step) for step in range(found.steps)] == PINNED


PINNED = [
    [(0, 1, 1), (0, 1, 0), (0, 2, 1), (1, 0, 0)],
    [(0, 0, 3), (0, 1, 2), (1, 0, 1), (1, 0, 4)],
    [(0, 1, 3), (0, 0, 1), (1, 0, 3), (0, 2, 0)],
    [(0, 0, 2), (0, 0, 0), (1, 0, 2)],
]


# -- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_holds_the_pictures_and_labels_of_its_ids(faces: str) -> None:
    loader = Loader(config(faces))
    rows = {sample.id: sample for sample in Dataset.open(faces).samples(None, "train")}
    assert loader.identities == [f"p{n}" for n in range(5)]
    assert loader.makers == ["camera", "dcgan@1"]
    for batch in loader.batches(epochs=1):
        assert batch.images.shape == (8, 3, SIDE, SIDE)
        assert batch.images.dtype == torch.uint8
        for slot, identifier in enumerate(batch.ids):
            sample = rows[identifier]
            n = sample.class_id or 0
            assert batch.class_id[slot] == n
            assert batch.fake[slot] == (-1 if sample.fake is None else sample.fake)
            assert batch.identity[slot] == (
                -1 if sample.identity is None else loader.identities.index(sample.identity)
            )
            assert loader.makers[int(batch.maker[slot])] == sample.maker
            assert batch.images[slot, :, 3, 5].tolist() == [n, 255 - n, n // 2]


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_global_batch_is_the_same_for_every_world_size(faces: str, drop_last: bool) -> None:
    options = config(faces, batch_size=12, lanes=12, drop_last=drop_last)
    reference = [batch.ids for batch in Loader(options).batches(epochs=2)]
    for world in (2, 3, 4, 6, 12):
        ranks = [Loader(options, rank=rank, world=world).batches(epochs=2) for rank in range(world)]
        joined = [[i for batch in parts for i in batch.ids] for parts in zip(*ranks, strict=True)]
        assert joined == reference
    assert len({i for ids in reference[: len(reference) // 2] for i in ids}) == (96 if drop_last else 100)


def test_a_change_of_world_size_in_the_middle_sees_the_same_samples(faces: str) -> None:
    """Two ranks for 5 steps, one for 6, two again: as if nothing had happened."""
    options = config(faces)
    expected = [batch.ids for _, batch in zip(range(15), Loader(options).batches(), strict=False)]
    found: list[list[str]] = []
    for world, steps in ((2, 5), (1, 6), (2, 4)):
        ranks = [Loader(options, rank=r, world=world).batches(start_step=len(found)) for r in range(world)]
        found += [[i for rank in ranks for i in next(rank).ids] for _ in range(steps)]
        for rank in ranks:
            rank.close()
    assert found == expected


def test_resuming_decodes_nothing_before_the_step(faces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(faces)
    loader = Loader(options)
    steps = loader.steps_per_epoch
    expected = list(loader.batches(epochs=2))
    decoded: list[bytes] = []
    real = media.decode_trusted
    monkeypatch.setattr(media, "decode_trusted", lambda raw: (decoded.append(raw), real(raw))[1])
    resumed = list(Loader(options).batches(start_step=steps + 5, epochs=2))
    assert [b.step for b in resumed] == list(range(steps + 5, 2 * steps))
    assert {b.epoch for b in resumed} == {1}
    assert [b.ids for b in resumed] == [b.ids for b in expected[steps + 5 :]]
    for one, two in zip(resumed, expected[steps + 5 :], strict=True):
        assert torch.equal(one.images, two.images)
    assert len(decoded) == sum(len(b) for b in resumed)


def test_batches_are_endless_without_epochs(faces: str) -> None:
    batches = Loader(config(faces)).batches()
    assert [next(batches).epoch for _ in range(30)] == [step // 12 for step in range(30)]
    batches.close()


def test_ten_rows_are_enough(tmp_path: Path) -> None:
    uri = (tmp_path / "tiny").as_uri()
    write(uri, pictures(10))
    loader = Loader(config(uri, batch_size=4, drop_last=False))
    assert sorted(len(b) for b in loader.batches(epochs=1)) == [2, 4, 4]
    epochs = [
        {tuple(b.ids) for b in Loader(config(uri, batch_size=4)).batches(e * 2, e + 1)} for e in range(8)
    ]
    assert len({i for ids in epochs for batch in ids for i in batch}) == 10  # the tail left out changes
    ranks = [list(Loader(config(uri, drop_last=False), rank=r, world=4).batches(epochs=1)) for r in range(4)]
    assert [[len(b) for b in rank] for rank in ranks] == [
        [2, 1],
        [2, 1],
        [2, 0],
        [2, 0],
    ]  # all ranks step alike


def test_raw_pixels_come_without_decoding(tmp_path: Path) -> None:
    uri = (tmp_path / "digits").as_uri()
    pixels = np.random.default_rng(0).integers(0, 255, (50, 28, 28, 1), dtype=np.uint8)
    write(uri, [Sample(pixels=p, source="made", class_id=n) for n, p in enumerate(pixels)], rows_per_batch=8)
    loader = Loader(config(uri, batch_size=10, preprocess=Preprocess(size=28, channels=1)))
    for batch in loader.batches(epochs=1):
        assert batch.images.shape == (10, 1, 28, 28)
        expected = pixels[batch.class_id.numpy()].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(batch.images.numpy(), expected)


def test_face_crops_use_the_box(tmp_path: Path) -> None:
    uri = (tmp_path / "boxed").as_uri()
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:30, 10:30] = 200
    encoded = media.encode(pixels, "png")
    write(uri, [Sample(image=encoded, source="made", face_box=(10.0, 10.0, 20.0, 20.0))])
    crop = Preprocess(size=SIDE, crop="face", margin=1.0)
    batch = next(Loader(config(uri, batch_size=1, preprocess=crop)).batches())
    assert (batch.images == 200).all()


def test_where_chooses_rows_and_nothing_else(faces: str) -> None:
    rows = list(Dataset.open(faces).samples(None, "train"))
    for where, keep in (
        ({"fake": 0}, lambda s: s.fake == 0),
        ({"identity": ["p1", "p3"]}, lambda s: s.identity in ("p1", "p3")),
        ({"fake": [0, 1], "maker": "camera"}, lambda s: s.fake in (0, 1) and s.maker == "camera"),
        ({"fake": None}, lambda s: s.fake is None),
    ):
        loader = Loader(config(faces, where=where, drop_last=False))
        expected = {s.id for s in rows if keep(s)}
        found = [i for batch in loader.batches(epochs=1) for i in batch.ids]
        assert set(found) == expected
        assert len(found) == loader.rows == len(expected)
    assert Loader(config(faces, where={"identity": ["p1", "p3"]})).identities == ["p1", "p3"]


def test_it_reads_from_s3_through_the_cache(s3, tmp_path: Path) -> None:
    uri = f"{s3.uri}/faces"
    write(uri, pictures(60), rows_per_shard=12, rows_per_batch=4)
    local = (tmp_path / "faces").as_uri()
    write(local, pictures(60), rows_per_shard=12, rows_per_batch=4)
    there = [b.ids for b in Loader(config(uri), cache=tmp_path / "cache").batches(epochs=2)]
    assert there == [b.ids for b in Loader(config(local)).batches(epochs=2)]
    balanced = [
        b.ids for b in Loader(config(uri, balance="fake"), cache=tmp_path / "cache").batches(epochs=2)
    ]
    assert balanced == [b.ids for b in Loader(config(local, balance="fake")).batches(epochs=2)]
    cached = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len([p for p in cached if p.parent.name != "labels"]) == 5


# -- balance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["fake", "maker", "class"])
def test_a_balanced_batch_is_the_same_for_every_world_size(faces: str, balance: str) -> None:
    options = config(faces, batch_size=12, lanes=4, balance=balance)
    reference = [batch.ids for batch in Loader(options).batches(epochs=2)]
    for world in (2, 4):
        ranks = [Loader(options, rank=rank, world=world).batches(epochs=2) for rank in range(world)]
        assert [[i for batch in parts for i in batch.ids] for parts in zip(*ranks, strict=True)] == reference
    resumed = Loader(options).batches(start_step=len(reference) - 3, epochs=2)
    assert [batch.ids for batch in resumed] == reference[-3:]


def test_balance_gives_every_label_its_share_on_every_rank(faces: str) -> None:
    """A third of the rows has no label and is left out; fakes and reals are equally many in each rank's part."""
    loaders = [Loader(config(faces, balance="fake"), rank=rank, world=2) for rank in range(2)]
    assert loaders[0].rows == 66
    for loader in loaders:
        for batch in loader.batches(epochs=3):
            assert sorted(batch.fake.tolist()) == [0, 0, 1, 1]


def test_a_small_maker_comes_as_often_as_a_large_one(tmp_path: Path) -> None:
    uri = (tmp_path / "uneven").as_uri()
    rows = [dataclasses.replace(s, maker="rare@1" if n < 5 else "camera") for n, s in enumerate(pictures(50))]
    write(uri, rows, rows_per_shard=20, rows_per_batch=6)
    loader = Loader(config(uri, balance="maker"))
    seen = Counter(i for batch in loader.batches(epochs=5) for i in batch.ids)
    steps = 5 * loader.steps_per_epoch
    assert sum(seen.values()) == 8 * steps
    rare = [seen[row.id] for row in rows[:5]]
    assert sum(rare) == 4 * steps
    assert max(rare) - min(rare) <= 1
    common = [seen[row.id] for row in rows[5:]]
    assert max(common) - min(common) <= 1


def test_balance_and_where_work_together(faces: str) -> None:
    loader = Loader(config(faces, balance="maker", where={"fake": [0, 1], "identity": ["p1", "p2", None]}))
    kept = {s.id for s in Dataset.open(faces).samples(None, "train") if s.fake is not None}
    assert all(i in kept for batch in loader.batches(epochs=2) for i in batch.ids)


def test_labels_are_read_from_the_shards_once(
    faces: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(faces, balance="maker", where={"fake": [0, 1]})
    first = Loader(options, cache=tmp_path)
    monkeypatch.setattr(Dataset, "reader", lambda *_: pytest.fail("a shard was opened"))
    second = Loader(options, cache=tmp_path)
    np.testing.assert_array_equal(first.plan(3), second.plan(3))


@pytest.mark.parametrize("column", ["fake", "class_id", "identity", "maker", "id"])
@pytest.mark.parametrize("split", ["train", "*", "empty"])
def test_labels_of_many_shards_are_those_of_the_rows(
    faces: str, tmp_path: Path, split: str, column: str
) -> None:
    dataset = Dataset.open(faces, cache=tmp_path)
    version = dataset.version()
    version = dataclasses.replace(version, splits={**version.splits, "empty": ()})
    found = labels.read(dataset, version, split, column)
    assert len(version.shards(split)) == (0 if split == "empty" else 6)
    expected = dataset.read(version, split, [column])[column].to_pylist()
    assert [found.values[code] if code >= 0 else None for code in found.codes] == expected
    assert len(set(found.values)) == len(found.values)


def test_a_broken_label_cache_is_read_again(faces: str, tmp_path: Path) -> None:
    options = config(faces, balance="fake")
    expected = Loader(options, cache=tmp_path).plan(0)
    for path, content in zip((tmp_path / "labels").iterdir(), (b"", b"junk"), strict=False):
        path.write_bytes(content)
    np.testing.assert_array_equal(Loader(options, cache=tmp_path).plan(0), expected)


# -- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"batch_size": 9}, 2, "cannot be shared by 2 workers; set data.batch_size=12 and data.lanes=4"),
        ({"batch_size": 64}, 3, "data.batch_size=72 and data.lanes=12"),
        ({"batch_size": 64}, 8, "data.batch_size=64 and data.lanes=8"),
        ({"threads": 0}, 1, "data.threads must be at least 1"),
        ({"where": {"label": 1}}, 1, "no column 'label'"),
    ],
)
def test_settings_that_do_not_fit_say_what_would(
    faces: str, changes: dict[str, Any], world: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Loader(config(faces, **changes), world=world)


def test_a_dataset_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.uri is not set"):
        Loader(DataConfig())


def test_the_advice_on_workers_works(faces: str) -> None:
    Loader(config(faces, batch_size=12, lanes=4), world=2)
    Loader(config(faces, batch_size=72, lanes=12), world=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 128}, "100 rows, fewer than data.batch_size=128"),
        ({"where": {"identity": "nobody"}}, "no rows where"),
        (
            {"where": {"maker": "camera"}, "balance": "maker"},
            "1 values of maker where .*, nothing to balance",
        ),
        ({"split": "dev"}, "no split 'dev'; it has train"),
    ],
)
def test_a_dataset_that_cannot_serve_is_refused_at_once(
    faces: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Loader(config(faces, **changes))


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no dataset at"):
        Loader(config((tmp_path / "none").as_uri()))


def test_a_picture_that_does_not_decode_is_named_with_its_shard(tmp_path: Path) -> None:
    uri = (tmp_path / "bad").as_uri()
    version = write(uri, [*pictures(15), Sample(image=b"\xff\xd8\xff not a picture", source="made")])
    bad = Sample(image=b"\xff\xd8\xff not a picture", source="made").id
    with pytest.raises(DataError, match=rf"{version.shards('train')[0].key}, id {bad}: "):
        list(Loader(config(uri)).batches(epochs=1))


def test_an_altered_shard_is_found_before_use(tmp_path: Path) -> None:
    uri = (tmp_path / "altered").as_uri()
    version = write(uri, pictures(16))
    path = tmp_path / "altered" / version.shards("train")[0].key
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.unlink()
    path.write_bytes(bytes(changed))
    with pytest.raises(CorruptError, match="bytes were altered"):
        list(Loader(config(uri)).batches(epochs=1))


def _decoders() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(("decode", "fetch"))}


def test_closing_stops_the_threads(faces: str) -> None:
    others = _decoders()  # of tests before, whose loaders a traceback may still hold
    batches = Loader(config(faces)).batches()
    next(batches)
    assert _decoders() - others
    batches.close()
    assert not _decoders() - others
    abandoned = Loader(config(faces)).batches()
    next(abandoned)
    del abandoned
    gc.collect()
    assert not _decoders() - others


def test_only_a_few_batches_are_decoded_ahead(faces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Counter[str]()
    real = media.decode_trusted
    monkeypatch.setattr(media, "decode_trusted", lambda raw: (count.update(["decoded"]), real(raw))[1])
    batches = Loader(config(faces, prefetch=2)).batches()
    next(batches)
    time.sleep(0.3)
    assert count["decoded"] <= 8 * 4
    batches.close()


def test_a_million_rows_in_a_thousand_shards_open_at_once() -> None:
    shape = [[64] * 15 + [40]] * 1000
    start = time.perf_counter()
    found = Order(shape, batch_size=256, lanes=4, window=16, mix_shards=4, seed=0, drop_last=True)
    rows = [found.slice(3, found.steps // 2, lane) for lane in range(4)]
    assert time.perf_counter() - start < 10  # a hundredth of a second: no list of the rows
    assert sum(len(part) for part in rows) == 256
    assert found.rows == 1_000_000


def test_streams_are_the_common_divisor() -> None:
    assert DataConfig(batch_size=64).streams == 4
    assert DataConfig(batch_size=50).streams == 2
    assert DataConfig(batch_size=7).streams == 1
    assert data.DataConfig(batch_size=8, lanes=3).streams == 1


def test_batch_memory_is_used_again_only_when_nobody_holds_it() -> None:
    buffers = data._Buffers(pinned=False)
    first = buffers.take((2, 4, 4, 3))
    view = first.permute(0, 3, 1, 2)[1:]
    address = first.data_ptr()
    del first
    second = buffers.take((2, 4, 4, 3))
    assert second.data_ptr() != address  # the view still shows the first
    del view
    assert buffers.take((2, 4, 4, 3)).data_ptr() == address
    array = buffers.take((2, 4, 4, 3)).numpy()
    assert buffers.take((2, 4, 4, 3)).data_ptr() not in (array.ctypes.data, second.data_ptr())
    assert buffers.take((1, 4, 4, 3)).shape == (1, 4, 4, 3)
