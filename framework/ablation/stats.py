"""What numbers over a few seeds are worth: intervals, tests paired by seed, and what so few cannot show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
ALPHA = 0.05

# Up to so many pairs all patterns of signs are tried; above, so many random ones.
EXACT, RANDOM = 16, 99_999

# Values are logged in float32: what differs by less than its rounding, in parts of the value, is equal.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Sample:
    """Some numbers in short. What they do not give is nan: all of it for none, spread and interval for one.

    Args:
        n: how many.
        mean: their mean; not finite where one of them is not.
        std: the standard deviation of a sample: over n − 1.
        low: the lower end of the mean's 95 % t-interval.
        high: its upper end.
    """

    n: int
    mean: float
    std: float = math.nan
    low: float = math.nan
    high: float = math.nan


def sample(values: Sequence[float]) -> Sample:
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2 or not math.isfinite(mean):
        return Sample(len(values), mean)
    from scipy.special import stdtrit  # here and below: every run of a study imports this file, and computes nothing

    std = statistics.stdev(values)
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(len(values))
    return Sample(len(values), mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class Comparison:
    """How far one cell lies above another, over the seeds that both have.

    Args:
        difference: of the pairs.
        sign_flip: two-sided p of the sign-flip test: every pattern of signs is as likely as the one seen. It takes
            nothing for granted but that, without an effect, a difference is as likely to be positive as negative.
        t_test: two-sided p of the paired t-test, which takes the differences to be normal; nan where they are all
            equal, so that it has no spread to measure them by.
    """

    difference: Sample
    sign_flip: float
    t_test: float


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison:
    """Compares values by seed."""
    from scipy.special import stdtr

    pairs = [(value, theirs[seed]) for seed, value in ours.items() if seed in theirs]
    differences = [value - other for value, other in pairs]
    difference = sample(differences)
    if not pairs or not math.isfinite(difference.mean):
        return Comparison(difference, math.nan, math.nan)
    rounding = ROUNDING * max(abs(value) for pair in pairs for value in pair)
    t_test = math.nan
    if max(differences) - min(differences) > rounding:
        t = difference.mean / (difference.std / math.sqrt(difference.n))
        t_test = float(2 * stdtr(difference.n - 1, -abs(t)))
    return Comparison(difference, _sign_flip(differences, rounding), t_test)


def _sign_flip(differences: Sequence[float], rounding: float) -> float:
    """The share of sign patterns whose mean is as far from 0 as the one seen."""
    n = len(differences)
    extreme = abs(_signs(n) @ differences) / n >= abs(statistics.fmean(differences)) - rounding
    # A random choice of patterns may miss the one seen, and a p of 0 would claim too much.
    return float(extreme.mean()) if n <= EXACT else float((extreme.sum() + 1) / (len(extreme) + 1))


@cache
def _signs(n: int) -> np.ndarray:
    """Patterns of n signs. Of all 2^n the half whose last one is +: the others are their negatives."""
    import numpy as np

    if n > EXACT:
        return np.random.default_rng(0).choice([-1.0, 1.0], (RANDOM, n))
    return 1.0 - 2.0 * (np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction of p values for how many they are; those that are nan stay so, and do not count."""
    known = sorted((p, place) for place, p in enumerate(values) if not math.isnan(p))
    adjusted = [math.nan] * len(values)
    least = 0.0
    for rank, (p, place) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * p))
        adjusted[place] = least
    return adjusted


def smallest_p(seeds: int) -> float:
    """The smallest two-sided p that the sign-flip test can give: one pattern of signs and its negative."""
    return 2.0 / 2.0**seeds


def seeds_needed(comparisons: int) -> int:
    """How many seeds the sign-flip test needs for a p below 0.05 after Holm's correction over `comparisons`."""
    return next(seeds for seeds in range(1, 1000) if comparisons * smallest_p(seeds) < ALPHA)


def reach(seeds: int, comparisons: int) -> str:
    """Says so where that few paired seeds cannot make any difference significant; empty where they can.

    Args:
        seeds: the most pairs that a comparison has.
        comparisons: how many comparisons there are.
    """
    needed, alone = seeds_needed(comparisons), seeds_needed(1)
    if seeds < 1 or seeds >= needed:
        return ""
    many, least = "seeds" if seeds > 1 else "seed", smallest_p(seeds)
    corrected = f" ({min(1.0, comparisons * least):.2g} after Holm's correction over {comparisons} comparisons)"
    takes = f"{alone} seeds, and {needed} after the correction" if seeds < alone < needed else f"{needed} seeds"
    return (
        f"With {seeds} paired {many} the sign-flip test cannot give a p below 2/2^{seeds} = {least:.2g}"
        f"{corrected if comparisons > 1 else ''}, so by it no difference can be significant at {ALPHA}, however large; "
        f"it takes {takes}."
    )
