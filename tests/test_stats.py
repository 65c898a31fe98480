"""Statistics of few seeds: against numbers computed by hand, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from framework.ablation.stats import compare, holm, reach, sample, seeds_needed, smallest_p

# t for 95 % from any printed table: 12.706 with 1 degree of freedom, 4.303 with 2
OURS = {0: 0.94, 1: 0.95, 2: 0.99}
THEIRS = {0: 0.92, 1: 0.94, 2: 0.96}


def test_mean_spread_and_interval_by_hand():
    three = sample([1.0, 2.0, 6.0])
    assert (three.n, three.mean) == (3, 3.0)
    assert three.std == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2
    assert three.high - three.mean == pytest.approx(4.303 * math.sqrt(7 / 3), rel=1e-3)
    assert three.mean - three.low == pytest.approx(three.high - three.mean)


def test_one_number_has_no_spread_and_none_has_no_mean():
    one, none = sample([0.5]), sample([])
    assert (one.n, one.mean) == (1, 0.5)
    assert all(math.isnan(value) for value in (one.std, one.low, one.high, none.mean, none.std, none.low))
    assert math.isnan(sample([math.nan, 0.9]).std)


def test_a_difference_is_paired_by_seed_by_hand():
    found = compare(OURS, THEIRS)
    # differences .02, .01, .03: mean .02, std .01
    assert found.difference.n == 3
    assert found.difference.mean == pytest.approx(0.02)
    assert found.difference.std == pytest.approx(0.01)
    assert found.difference.high == pytest.approx(0.02 + 4.303 * 0.01 / math.sqrt(3), rel=1e-3)
    # of eight patterns of signs, +++ and −−− are as extreme
    assert found.sign_flip == 2 / 8
    # t = .02 / (.01 / √3) = √12; with 2 degrees of freedom p = 1 − t / √(t² + 2)
    assert found.t_test == pytest.approx(1 - math.sqrt(12 / 14))


def test_mixed_signs_by_hand():
    # sums of ±1 ±2 ±4: 7, 5, 3, 1 and their negatives; the one seen is 1 + 2 − 4 … as 4 − 2 + 1 = 3
    found = compare({0: 1.0, 1: -2.0, 2: 4.0}, dict.fromkeys(range(3), 0.0))
    assert found.sign_flip == 6 / 8


def test_only_seeds_that_both_have_are_compared():
    found = compare({**OURS, 7: 0.1}, {**THEIRS, 9: 0.9})
    assert found == compare(OURS, THEIRS)
    assert compare({1: 0.5}, {2: 0.5}).difference.n == 0


@pytest.mark.parametrize("n", [2, 5, 12, 16])
def test_both_tests_agree_with_scipy(n):
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(0.3, 1, n), rng.normal(0, 1, n)
    found = compare(dict(enumerate(ours)), dict(enumerate(theirs)))
    d = ours - theirs
    test = scipy.stats.ttest_rel(ours, theirs)
    assert found.t_test == pytest.approx(test.pvalue)
    interval = test.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    flips = scipy.stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=np.inf if n < 16 else 2**16
    )
    assert found.sign_flip == pytest.approx(flips.pvalue)


def test_many_pairs_are_tested_at_random_but_always_alike():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.4, 1, 20), rng.normal(0, 1, 20)
    found = [compare(dict(enumerate(ours)), dict(enumerate(theirs))).sign_flip for _ in range(2)]
    assert found[0] == found[1]
    flips = scipy.stats.permutation_test((ours - theirs,), np.mean, permutation_type="samples", n_resamples=99_999)
    assert found[0] == pytest.approx(flips.pvalue, abs=0.01)
    certain = compare({seed: 1.0 + seed / 100 for seed in range(40)}, dict.fromkeys(range(40), 0.0))
    assert certain.sign_flip == 1 / 100_000  # never 0


def test_equal_differences_have_no_t_but_an_exact_sign_flip():
    # .95 − .92 and .96 − .93 are not quite equal as floats, nor what float32 makes of them
    for kind in (float, np.float32):
        ours, theirs = ({seed: float(kind(v)) for seed, v in enumerate(vs)} for vs in ((0.95, 0.96), (0.92, 0.93)))
        found = compare(ours, theirs)
        assert found.difference.mean == pytest.approx(0.03, abs=1e-6)
        assert found.sign_flip == 2 / 4
        assert math.isnan(found.t_test)
    same = compare(OURS, OURS)
    assert (same.difference.mean, same.difference.low, same.difference.high) == (0, 0, 0)
    assert same.sign_flip == 1
    assert math.isnan(same.t_test)


def test_one_pair_and_a_diverged_one():
    one = compare({0: 0.5}, {0: 0.4})
    assert one.difference.mean == pytest.approx(0.1)
    assert one.sign_flip == 1
    assert math.isnan(one.t_test)
    diverged = compare({0: math.nan, 1: 0.5}, {0: 0.5, 1: 0.5})
    assert math.isnan(diverged.sign_flip)
    assert math.isnan(diverged.t_test)


def test_holm_by_hand():
    # .01 × 4, .02 × 3, .03 × 2 but never less than before it, .4 × 1
    assert holm([0.03, 0.01, 0.4, 0.02]) == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    one, other = holm([math.nan, 0.04])
    assert math.isnan(one)
    assert other == 0.04
    assert holm([]) == []


def test_how_many_seeds_it_takes():
    assert [smallest_p(n) for n in (1, 2, 3, 6)] == [1, 0.5, 0.25, 0.03125]
    # 2/2⁶ = .031; over three comparisons 6/2⁷ = .047; over 399 798/2¹⁴ = .0487
    assert [seeds_needed(k) for k in (1, 3, 399)] == [6, 7, 14]


def test_it_is_said_when_seeds_cannot_reach_significance():
    assert reach(3, 1) == (
        "With 3 paired seeds the sign-flip test cannot give a p below 2/2^3 = 0.25, so by it no difference can be "
        "significant at 0.05, however large; it takes 6 seeds."
    )
    assert "(0.75 after Holm's correction over 3 comparisons)" in reach(3, 3)
    assert reach(3, 3).endswith("it takes 6 seeds, and 7 after the correction.")
    assert reach(6, 3).endswith("however large; it takes 7 seeds.")
    assert reach(1, 1).startswith("With 1 paired seed the")
    assert reach(6, 1) == reach(7, 3) == ""
