"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from counterfake import memory

PROBE = """
import resource, sys
import numpy as np
from counterfake import memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def spent():
    np.ones(2**23)  # 64 MiB, given back at once
    before = faults()
    for _ in range(4):
        np.ones(2**23)
    return faults() - before
first, kept = spent(), memory.keep()
print(first, spent(), kept)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_large_blocks_are_not_faulted_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    before, after, kept = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library here is not glibc")
    assert int(after) < int(before) / 10, f"{before} page faults before, {after} after"


def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", absent)
    assert memory.keep() is False
