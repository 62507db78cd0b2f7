"""OS-2: of sixteen committers at once each version has one winner; the others go on top of it, and no commit is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from counterfake.records import Dataset
from tests.chaos import pictures

WRITERS = 16


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("kind", "rounds"),
    [
        ("file", 2),
        ("s3", 1),
        pytest.param("file", 20, marks=pytest.mark.full),
        pytest.param("s3", 20, marks=pytest.mark.full),
    ],
)
@pytest.mark.timeout(900)
def test_sixteen_committers_lose_nothing(kind: str, rounds: int, request: pytest.FixtureRequest) -> None:
    root = (
        request.getfixturevalue("tmp_path").as_uri() if kind == "file" else request.getfixturevalue("s3").uri
    )
    for number in range(rounds):
        uri = f"{root}/{number}"
        with ThreadPoolExecutor(WRITERS) as pool:
            numbers = [v.number for v in pool.map(lambda n: pictures.store(uri, n, n + 1), range(WRITERS))]  # noqa: B023
        assert sorted(numbers) == list(range(1, WRITERS + 1)), "each version has one winner"
        dataset = Dataset.open(uri)
        assert [version.rows() for version in dataset.history()] == list(range(1, WRITERS + 1))
        assert dataset.verify()["problems"] == []
