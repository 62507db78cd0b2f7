"""OS-2: of sixteen committers at once each version has one winner; the others go on top of it, and no commit is lost."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from counterfake.records import Dataset
from tests.chaos import pictures
from tests.chaos.writer import Writers

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
WRITERS = 16
FULL = [pytest.param(kind, 20, marks=pytest.mark.full) for kind in ("file", "s3")]


@pytest.fixture
def root(kind: str, request: pytest.FixtureRequest) -> str:
    return (
        request.getfixturevalue("tmp_path").as_uri() if kind == "file" else request.getfixturevalue("s3").uri
    )


def check(uri: str) -> None:
    """Sixteen versions, each of which adds the row of one committer."""
    dataset = Dataset.open(uri)
    assert [version.rows() for version in dataset.history()] == list(range(1, WRITERS + 1))
    assert len({row.path for row in dataset.samples(None, "train")}) == WRITERS
    assert dataset.verify()["problems"] == []


@pytest.mark.parametrize(("kind", "rounds"), [("file", 2), ("s3", 1), *FULL])
def test_sixteen_committers_in_threads_lose_nothing(kind: str, rounds: int, root: str) -> None:
    begun = time.monotonic()
    for number in range(rounds):
        uri = f"{root}/{number}"
        with ThreadPoolExecutor(WRITERS) as pool:
            numbers = [v.number for v in pool.map(lambda n: pictures.store(uri, n, n + 1), range(WRITERS))]  # noqa: B023
        assert sorted(numbers) == list(range(1, WRITERS + 1)), "each version has one winner"
        check(uri)
    print(f"{rounds} rounds of {WRITERS} threads on {kind}: {time.monotonic() - begun:.0f} s")


@pytest.mark.parametrize(("kind", "rounds"), [("file", 1), *FULL])
def test_sixteen_committing_processes_lose_nothing(
    kind: str, rounds: int, root: str, writers: Writers, request: pytest.FixtureRequest
) -> None:
    endpoint = "none" if kind == "file" else request.getfixturevalue("s3").endpoint
    begun = time.monotonic()
    for number in range(rounds):
        uri, at = f"{root}/{number}", time.time() + 0.5  # sixteen forks take less
        pids = [writers.start(uri, n, n + 1, endpoint, at) for n in range(WRITERS)]
        assert [writers.wait(pid) for pid in pids] == [0] * WRITERS
        check(uri)
    print(f"{rounds} rounds of {WRITERS} processes on {kind}: {time.monotonic() - begun:.0f} s")
