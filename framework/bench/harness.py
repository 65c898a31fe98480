"""Candidates timed against each other: in one process, in turn, every other round in the reverse order.

A round times each candidate once, so that what slows the machine for a while slows them all. What counts is the median
over rounds of the ratio within each, and its quartiles.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch

Act = Callable[[], Any]
Stopwatch = Callable[[Act], float]
"""Runs what it is given, and gives its seconds."""

# What takes less is repeated within a round.
LEAST_SECONDS = 0.1
WARM_UP = 2


def cpu_time(act: Act) -> float:
    """CPU seconds of this thread: what others do on the machine does not count, nor do further threads."""
    start = time.thread_time()
    act()
    return time.thread_time() - start


def wall_time(act: Act) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def cuda_time(act: Act) -> float:
    """Seconds of the GPU, with what it waits for the CPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    act()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def told(act: Act) -> float:
    """For an act that times a part of itself, and gives its seconds."""
    return float(act())


CLOCKS = {cpu_time: "CPU time of the thread", wall_time: "wall time", cuda_time: "GPU time"}


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Args:
        name: of its row.
        act: done once or more in each round.
        timed: gives the seconds of so many acts, where the race's stopwatch cannot: they are done in another process.
        rival: whether it is one of those that the others are held against.
        images: how many one act takes; 0 where it takes none.
        extra: further numbers of its row, by the head of their column.
    """

    name: str
    act: Act
    images: int = 0
    extra: dict[str, float] = field(default_factory=dict)
    timed: Callable[[int], float] | None = None
    rival: bool = False


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)


@dataclass
class Timing:
    """What was measured of one candidate: the seconds of one act, round by round."""

    name: str
    images: int
    extra: dict[str, float]
    seconds: list[float] = field(default_factory=list)
    rival: bool = False

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)

    @property
    def images_per_s(self) -> float:
        return self.images / self.spread.median

    def times_as_fast(self, reference: Timing) -> Spread:
        """How many times as fast as `reference` for each image (or act), from the ratio within each round."""
        share = (self.images or 1) / (reference.images or 1)
        return Spread.of([share * other / own for own, other in zip(self.seconds, reference.seconds, strict=True)])


@dataclass
class Section:
    """One table: candidates in one setting, the first of which is what the others are compared with.

    Args:
        title: the setting.
        clock: what was measured.
        timings: by candidate.
        notes: lines below.
        setting: the same as data.
        part: what tells it from others with the same title, which come into the same table.
    """

    title: str
    clock: str
    timings: list[Timing]
    notes: list[str] = field(default_factory=list)
    setting: dict[str, Any] = field(default_factory=dict)
    part: str = ""

    @property
    def best(self) -> Timing | None:
        """The fastest rival, where there are several."""
        rivals = [timing for timing in self.timings if timing.rival]
        return min(rivals, key=lambda timing: timing.spread.median) if len(rivals) > 1 else None


def race(
    candidates: Sequence[Candidate],
    stopwatch: Stopwatch,
    rounds: int,
    warm_up: int = WARM_UP,
    least: float = LEAST_SECONDS,
) -> list[Timing]:
    """Times the candidates against each other.

    Args:
        candidates: in the order of the first round, which is reversed in the second, and so on.
        stopwatch: what is measured.
        rounds: those that count.
        warm_up: rounds before them, which do not; the last of them tells how often a quick act is repeated.
        least: seconds below which an act is repeated within a round.
    """
    timings = [Timing(one.name, one.images, dict(one.extra), rival=one.rival) for one in candidates]
    repeats = [1] * len(candidates)
    with without_gc():
        for number in range(-warm_up, rounds):
            order = range(len(candidates))
            for place in order if (number + warm_up) % 2 == 0 else reversed(order):
                one, count = candidates[place], repeats[place]
                seconds = (one.timed(count) if one.timed else stopwatch(repeated(one.act, count))) / count
                if number >= 0:
                    timings[place].seconds.append(seconds)
                elif number == -1:
                    repeats[place] = max(1, ceil(least / max(seconds, 1e-9)))
            gc.collect(0)
    return timings


def repeated(act: Act, count: int) -> Act:
    if count == 1:
        return act

    def again() -> None:
        for _ in range(count):
            act()

    return again


@contextmanager
def without_gc() -> Iterator[None]:
    """Python's garbage collector off."""
    gc.collect(1)
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
