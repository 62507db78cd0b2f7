"""Fixtures of the chaos tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.writer import Writers


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    """A process that forks writers."""
    made = Writers()
    yield made
    made.close()
