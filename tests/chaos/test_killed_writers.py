"""OS-1: a writer may be killed after any of its puts and at any moment; readers see a whole version, a re-run converges."""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import threading
import time
from collections import Counter

import pytest

from counterfake.records import Dataset
from counterfake.versions import Version
from tests.chaos import pictures
from tests.chaos.writer import Writers

pytestmark = pytest.mark.chaos
BEFORE, AFTER = 8, 20  # rows of version 1 and of version 2; four rows make a shard


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """What a writer that nobody kills leaves."""
    uri = tmp_path_factory.mktemp("undisturbed").as_uri()
    pictures.store(uri, 0, BEFORE)
    return pictures.store(uri, BEFORE, AFTER)


def check(uri: str, expected: Version) -> int:
    """Whole versions only, and the same job again gives `expected` -> the number of versions the killed writer left."""
    dataset = Dataset.open(uri)
    numbers = dataset.versions()
    assert numbers in ([1], [1, 2])
    for number in numbers:
        assert dataset.verify(number)["problems"] == []
        assert dataset.version(number).rows() == (BEFORE, AFTER)[number - 1]
    again = pictures.store(uri, BEFORE, AFTER)
    assert (again.number, again.digest) == (2, expected.digest)
    assert Dataset.open(uri).verify()["problems"] == []
    return len(numbers)


def undisturbed(uri: str, endpoint: str, writers: Writers) -> float:
    """Seconds of a writer that nobody kills."""
    pictures.store(uri, 0, BEFORE)
    pid, begun = writers.start(uri, BEFORE, AFTER, endpoint), time.monotonic()
    assert writers.wait(pid) == 0
    return time.monotonic() - begun


def test_a_writer_killed_after_any_of_its_puts_leaves_whole_versions(
    s3, faulty_s3, writers: Writers, expected: Version
) -> None:
    left, survived, kill_at = [], False, 1
    while not survived:
        uri = f"{s3.uri}/{kill_at}"
        pictures.store(uri, 0, BEFORE)
        proxy, pid, started, puts = faulty_s3(lambda *_: ""), [0], threading.Event(), []

        def after(method: str, path: str, at: int = kill_at, pid=pid, started=started, puts=puts) -> None:
            if method == "PUT" and "/probe-" not in path:
                puts.append(path)
                if len(puts) == at:
                    started.wait()
                    os.kill(pid[0], signal.SIGKILL)

        proxy.after = after
        pid[0] = writers.start(uri, BEFORE, AFTER, proxy.url)
        started.set()
        status = writers.wait(pid[0])
        assert status in (0, -signal.SIGKILL)
        survived = status == 0
        left.append(check(uri, expected))
        kill_at += 1
    assert left == [1] * (len(left) - 2) + [2, 2], "only the put of the manifest makes the version"
    assert len(left) >= 5, "three shards, a manifest, and a writer that was left alone"


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        ("file", 8),
        ("s3", 4),
        pytest.param("file", 100, marks=pytest.mark.full),
        pytest.param("s3", 100, marks=pytest.mark.full),
    ],
)
@pytest.mark.timeout(1800)
def test_a_writer_killed_at_a_random_moment_leaves_whole_versions(
    kind: str, times: int, writers: Writers, expected: Version, request: pytest.FixtureRequest
) -> None:
    root = (
        request.getfixturevalue("tmp_path").as_uri() if kind == "file" else request.getfixturevalue("s3").uri
    )
    endpoint = "none" if kind == "file" else request.getfixturevalue("s3").endpoint
    whole = statistics.median(undisturbed(f"{root}/timed-{n}", endpoint, writers) for n in range(3))
    dice = random.Random(1)
    killed, left, begun = 0, Counter[int](), time.monotonic()
    for number in itertools.count():
        pictures.store(f"{root}/{number}", 0, BEFORE)
        pid = writers.start(f"{root}/{number}", BEFORE, AFTER, endpoint)
        time.sleep(dice.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        died = writers.wait(pid) == -signal.SIGKILL
        versions = check(f"{root}/{number}", expected)
        killed += died
        left[versions] += died
        if killed == times:
            break
        assert number < 10 * times, f"only {killed} of {number + 1} writers were killed before their end"
    print(
        f"{killed} writers killed on {kind} ({number + 1} started, {left[1]} before their version, {left[2]} after), "
        f"{time.monotonic() - begun:.0f} s"
    )
