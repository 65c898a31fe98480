"""The threads of the C++ kernels, by a small library that is built of the same header."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from blocks.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler, or a processor without a kernel")

THREADS = 3

SOURCE = """
#include "vector.h"

extern "C" {

// Which thread did each of `count` parts: the address of what is its own. None is done before all have begun.
int parts(int count, int64_t* who, Parallel parallel) {
  std::atomic<int> begun{0};
  return guarded([&] {
    run(count, parallel, [&](int i) {
      static thread_local int own;
      who[i] += reinterpret_cast<int64_t>(&own);
      for (++begun; begun < count;) std::this_thread::yield();
    });
  });
}

int without_memory(int part, int count, Parallel parallel) {
  return guarded([&] {
    run(count, parallel, [&](int i) {
      if (i == part) throw std::bad_alloc();
    });
  });
}

// How often each of the threads' tasks is done, where the first thread does as many as it finds, and then the others.
int tasks(const int64_t* bounds, int threads, int64_t* done, int64_t* order) {
  const Tasks all(std::vector<int64_t>(bounds, bounds + threads + 1));
  for (int t : {1, 0, 2}) all.each(t, [&](int64_t task) { ++done[task], *order++ = task; });
  return 0;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("threads")
    (folder / "threads.cpp").write_text(SOURCE)
    command = [*native.compiler(), *native.FLAGS, "-O0", *native.INSTRUCTIONS[native.capability()]]
    subprocess.run([*command, f"-I{native.SOURCES}", "threads.cpp", "-o", "threads.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(Path(folder) / "threads.so"))


@pytest.fixture(params=["OpenMP", "own"])
def parallel(request: pytest.FixtureRequest) -> ctypes.c_void_p:
    found = native.threads()
    if request.param == "OpenMP" and not found:
        pytest.skip("torch has no OpenMP here")
    return found if request.param == "OpenMP" else ctypes.c_void_p()


def who(library: ctypes.CDLL, parallel: ctypes.c_void_p) -> list[int]:
    found = (ctypes.c_int64 * THREADS)()
    assert library.parts(THREADS, found, parallel) == 0
    return list(found)


def test_each_thread_has_one_part(library: ctypes.CDLL, parallel: ctypes.c_void_p) -> None:
    for _ in range(20):
        assert len(set(who(library, parallel))) == THREADS


def test_a_thread_has_the_same_part_in_every_call(library: ctypes.CDLL) -> None:
    if not native.threads():
        pytest.skip("torch has no OpenMP here")
    first = who(library, native.threads())
    assert all(who(library, native.threads()) == first for _ in range(200))


def test_memory_that_runs_out_in_a_thread_runs_out_in_the_call(library: ctypes.CDLL, parallel: ctypes.c_void_p) -> None:
    for part in range(THREADS):
        assert library.without_memory(part, THREADS, parallel) == 1
    assert library.without_memory(-1, THREADS, parallel) == 0
    assert len(set(who(library, parallel))) == THREADS


def test_tasks_are_done_once_and_by_their_owner_first(library: ctypes.CDLL) -> None:
    bounds, done, order = (ctypes.c_int64 * 4)(0, 4, 4, 9), (ctypes.c_int64 * 9)(), (ctypes.c_int64 * 9)()
    assert library.tasks(bounds, 3, done, order) == 0
    assert list(done) == [1] * 9
    assert list(order) == [4, 5, 6, 7, 8, 0, 1, 2, 3]
