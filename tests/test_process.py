"""What every process of the program does first."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import numpy
from framework.process import {name}

{name}()
held = []
for step in range(12):
    held = [numpy.ones(size, numpy.float32) for size in (2**20, 2**22, 2**24)]  # from malloc, as tensors are
    held = []
    if step == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(name: str, **environment: str) -> int:
    """Pages that ten steps with 84 MiB of arrays take from the system, after two others."""
    words = [sys.executable, "-c", STEPS.format(name=name)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library decides for itself")
def test_memory_of_freed_tensors_is_used_again() -> None:
    kept = faults("prepare")
    assert 3 * kept < faults("quiet")  # not none: where the heap can grow to is up to the system
    assert 3 * kept < faults("prepare", MALLOC_MMAP_THRESHOLD_="65536")  # who asks glibc for something else gets it
