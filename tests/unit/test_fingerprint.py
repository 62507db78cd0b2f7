"""fingerprint.py and grouping.py: near-copies are found, all of them, and nothing else is."""

from __future__ import annotations

import itertools
import json
import time

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterfake import fingerprint, media
from counterfake.fingerprint import NEAR_BITS, clusters, components, near_pairs, perceptual_hash, words
from counterfake.grouping import Links


def scene(seed: int, size: int = 128) -> media.Pixels:
    """Smooth blobs of colour: as much low frequency as a photograph."""
    noise = np.random.default_rng(seed).normal(size=(size, size, 3)).astype(np.float32)
    blobs = sum(cv2.GaussianBlur(noise, (0, 0), s) * s for s in (2, 4, 8, 16))
    return np.clip(128 + 60 * (blobs - blobs.mean()) / blobs.std(), 0, 255).astype(np.uint8)


def distance(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


COPIES = {
    "jpeg 30": lambda p: media.decode(media.encode(p, "jpeg", 30)),
    "quarter size": lambda p: cv2.resize(p, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA),
    "darker": lambda p: (p * 0.75).astype(np.uint8),
    "brighter": lambda p: np.clip(p.astype(int) + 25, 0, 255).astype(np.uint8),
    "without 1 % of each side": lambda p: p[1:-1, 1:-1],
    "grey": lambda p: cv2.cvtColor(p, cv2.COLOR_RGB2GRAY)[:, :, None],
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_near(name: str) -> None:
    for seed in range(20):
        picture = scene(seed)
        assert distance(perceptual_hash(picture), perceptual_hash(COPIES[name](picture))) <= NEAR_BITS


def test_different_pictures_are_far_apart() -> None:
    hashes = [perceptual_hash(scene(seed, 64)) for seed in range(60)]
    assert min(itertools.starmap(distance, itertools.combinations(hashes, 2))) > 2 * NEAR_BITS


def test_faces_of_different_people_are_not_near(shared_data) -> None:
    with np.load(shared_data / "orl_faces" / "orl_faces.npz", allow_pickle=False) as archive:
        images, person = archive["images"], archive["person"]
    pairs = near_pairs([perceptual_hash(image) for image in images])
    assert len(pairs) > 0  # the same person twice, sitting still
    assert (person[pairs[:, 0]] == person[pairs[:, 1]]).all()


@pytest.mark.parametrize("level", [0, 127, 255])
def test_a_picture_of_one_colour_has_no_hash(level: int) -> None:
    flat = np.full((40, 30, 3), level, np.uint8)
    assert perceptual_hash(flat) == ""
    noisy = flat + np.random.default_rng(0).integers(0, 2, flat.shape, dtype=np.uint8) * (
        1 if level < 255 else 0
    )
    assert perceptual_hash(noisy) == ""


def test_a_thumbnail_is_averaged_by_area() -> None:
    """Against OpenCV, for a size that 32 does not divide."""
    grey = cv2.cvtColor(scene(1, 100), cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA)
    rows = fingerprint._frequencies(100)
    np.testing.assert_allclose(rows @ grey @ rows.T, cv2.dct(small)[:16, :16], atol=0.05)


# -- pairs ----------------------------------------------------------------------------------------------------------


def tables(count: int, copies: int, seed: int) -> np.ndarray:
    """Random hashes, then copies of some with up to 40 bits turned."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (count, 256), dtype=np.uint8)
    turned = bits[rng.integers(0, count, copies)]
    for row in turned:
        row[rng.choice(256, rng.integers(0, 41), replace=False)] ^= 1
    return np.packbits(np.concatenate([bits, turned]), axis=1).view(">u8").astype(np.uint64)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 60), copies=st.integers(0, 60), bits=st.integers(0, 60), seed=st.integers(0, 9))
def test_bands_find_exactly_the_pairs_that_comparing_all_finds(
    count: int, copies: int, bits: int, seed: int
) -> None:
    table = tables(count, copies, seed)
    every = np.bitwise_count(table[:, None] ^ table[None]).sum(2)
    expected = np.argwhere(np.triu(every <= bits, 1))
    with pytest.MonkeyPatch.context() as patch:
        for few in (0, 4096):
            patch.setattr(fingerprint, "_FEW", few)
            np.testing.assert_array_equal(near_pairs(table, bits), expected)


def test_twenty_thousand_hashes_take_a_moment() -> None:
    table = tables(20_000, 200, 0)
    started = time.process_time()
    assert len(near_pairs(table)) > 100
    assert time.process_time() - started < 10  # 0.1 s alone; comparing all takes far longer at a million


def test_a_hundred_thousand_equal_hashes_are_one_cluster() -> None:
    table = np.tile(tables(1, 0, 0), (100_000, 1))
    assert not clusters(table).any()
    assert len(clusters([])) == len(near_pairs([])) == 0


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 40), edges=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60)
)
def test_components_are_those_of_union_find(count: int, edges: list[tuple[int, int]]) -> None:
    known = [(a % count, b % count) for a, b in edges]
    parent = list(range(count))

    def find(node: int) -> int:
        return node if parent[node] == node else find(parent[node])

    for a, b in known:
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    ends = np.array(known, np.int64).reshape(-1, 2)
    assert components(count, ends[:, 0], ends[:, 1]).tolist() == [find(node) for node in range(count)]


# -- groups ---------------------------------------------------------------------------------------------------------


def links(*rows: dict[str, object]) -> Links:
    names = {"identity": None, "video": None}
    plain = [{**names, "attributes": json.dumps(row.pop("attributes", None)), **row} for row in rows]
    schema = pa.schema([(name, pa.string()) for name in ("identity", "video", "attributes")])
    found = Links()
    found.add(pa.Table.from_pylist(plain, schema=schema))
    return found


def test_rows_are_linked_by_person_video_donor_and_near_copy_and_through_each_other() -> None:
    one, other = (words_hex(table) for table in tables(2, 0, 3))
    near = f"{int(one, 16) ^ 0b1011:064x}"
    found = links(
        {"identity": "a", "video": "v"},
        {"identity": "b", "video": "v"},
        {"identity": "c", "attributes": {"also": ["identity:b"]}},
        {"attributes": {"phash": one}},
        {"identity": "d", "attributes": {"phash": near}},
        {"attributes": {"phash": other}},
        {"attributes": {"phash": ""}},
        {"attributes": {"phash": ""}},
        {},
    )
    assert found.groups().tolist() == [0, 0, 0, 3, 3, 5, 6, 7, 8]
    assert found.groups(-1).tolist() == [0, 0, 0, 3, 4, 5, 6, 7, 8]


def test_attributes_of_others_are_no_links() -> None:
    found = links(
        {"attributes": {"phash": "abc", "also": "identity:x"}}, {"attributes": {"phash": 7, "also": [1]}}
    )
    assert found.keys == [(), ()]
    assert found.hashes == ["", ""]


def words_hex(row: np.ndarray) -> str:
    return "".join(f"{int(word):016x}" for word in row)


def test_words_are_the_bits_of_the_text() -> None:
    text = perceptual_hash(scene(0))
    assert words_hex(words([text])[0]) == text
