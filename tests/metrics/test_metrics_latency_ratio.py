"""The ratio of times that pair, and its interval, against definitions and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from compressor.metrics.latency.ratio import (
    MOST_BLOCKS,
    block_estimate,
    blocks,
    is_decided,
    log_ratios,
    paired_ratio,
    ratio_of_computing,
    trimmed_mean,
)
from compressor.reports.estimate import Estimate


def test_what_the_machine_does_cancels():
    """Turns ten times slower than others leave a constant ratio as it is."""
    assert paired_ratio([2.0, 20.0, 4.0, 8.0], [1.0, 10.0, 2.0, 4.0]).ci95 == pytest.approx((2.0, 2.0))


def test_swapping_the_sides_inverts_the_ratio():
    """Log ratios treat both alike."""
    one, other = [3.0, 5.0, 4.0, 6.0, 2.0, 3.0], [2.0, 4.0, 4.0, 3.0, 2.5, 2.0]
    forth, back = paired_ratio(one, other), paired_ratio(other, one)
    assert forth.value == pytest.approx(1 / back.value)
    # Quantiles of resampled centres are mirrored too; the two differ only in the order of a sort
    assert forth.ci95 == pytest.approx((1 / back.ci95[1], 1 / back.ci95[0]))


def test_computing_decides_unless_the_wall_clock_contradicts_it():
    """Noise on the wall around the same ratio changes nothing; a whole interval above does."""
    cpu = ([1.1] * 12, [1.0] * 12)
    noisy = (np.random.default_rng(0).lognormal(0.1, 0.4, 12), np.ones(12))
    assert ratio_of_computing(cpu, noisy).value == pytest.approx(1.1)
    assert ratio_of_computing(cpu, ([1.5] * 12, [1.0] * 12)).value == pytest.approx(1.5)
    assert ratio_of_computing(cpu, ([0.5] * 12, [1.0] * 12)).value == pytest.approx(1.1)


def test_a_fifth_of_the_blocks_at_each_end_does_not_count():
    """As scipy trims; over rows at once."""
    values_RK = np.random.default_rng(0).standard_t(3, (5, 13))
    assert trimmed_mean(values_RK) == pytest.approx(stats.trim_mean(values_RK, 0.2, axis=1))


def test_one_turn_that_took_a_hundred_times_as_long_does_not_move_the_ratio_much():
    """A plain mean of 20 log ratios would move by log(100) / 20 = 0.23."""
    times = np.random.default_rng(1).normal(10, 0.1, 20)
    spoiled = times.copy()
    spoiled[7] *= 100
    assert paired_ratio(spoiled, [10.0] * 20).value == pytest.approx(paired_ratio(times, [10.0] * 20).value, abs=0.01)


@pytest.mark.parametrize(
    ("turns", "count", "length"), [(2, 1, 2), (7, 3, 2), (128, 64, 2), (129, 32, 4), (1000, 62, 16)]
)
def test_blocks_hold_an_even_number_of_neighbours(turns, count, length):
    """And there are never more than 64; what is left joins the last."""
    ratios_N = np.arange(float(turns))
    values_K = blocks(ratios_N)
    assert len(values_K) == count <= MOST_BLOCKS
    assert values_K[0] == pytest.approx((length - 1) / 2)
    assert values_K[-1] == pytest.approx(ratios_N[length * (count - 1) :].mean())


def test_a_bias_for_who_comes_first_cancels_within_a_block():
    """Whoever comes second is 10 % faster, in A B B A B A A B: the ratio is 1 to the last digit."""
    model_first = np.array([True, False, False, True, True, False])
    times, baseline = np.where(model_first, 1.1, 1.0), np.where(model_first, 1.0, 1.1)
    assert paired_ratio(times, baseline).ci95 == pytest.approx((1.0, 1.0))


def test_a_single_block_has_no_interval():
    """Two turns cannot say how far a third would lie."""
    assert paired_ratio([1.0, 1.1], [1.0, 1.0]).ci95 is None


@pytest.mark.parametrize("spread", ["normal", "heavy"])
@pytest.mark.parametrize("count", [4, 16])
def test_the_interval_holds_the_truth_as_often_as_it_says(spread, count):
    """At least 93 % of 300 draws of few blocks around 0 (a fair 95 % interval would fall below this once in 20)."""
    generator = np.random.default_rng(count)
    held = 0
    for _ in range(300):
        values_K = generator.normal(size=count) if spread == "normal" else generator.standard_t(3, count)
        low, high = block_estimate(values_K, count).ci95
        held += low <= 0 <= high
    assert held >= 0.93 * 300


def test_correlated_neighbours_do_not_fake_precision():
    """Of 120 series in which each turn takes over 0.9 of the one before, 85 % of the intervals hold the truth.

    The interval that takes turns for independent holds it in less than half.
    """
    generator = np.random.default_rng(3)
    in_blocks = in_turns = 0
    for _ in range(120):
        noise_N = generator.normal(size=1200)
        for k in range(1, 1200):
            noise_N[k] += 0.9 * noise_N[k - 1]
        low, high = block_estimate(blocks(noise_N), 1200).ci95
        in_blocks += low <= 0 <= high
        in_turns += abs(noise_N.mean()) <= 1.96 * noise_N.std() / math.sqrt(1200)
    assert in_blocks >= 0.85 * 120
    assert in_turns < 0.5 * 120


def test_a_higher_level_gives_a_wider_interval():
    """99 % holds 95 %."""
    times = np.random.default_rng(2).normal(10, 1, 40)
    narrow, wide = (paired_ratio(times, [10.0] * 40, level=level).ci95 for level in (0.95, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("ci95", "decided"), [((0.9, 1.05), True), ((1.06, 1.2), True), ((1.0, 1.1), False), (None, False)]
)
def test_a_ratio_is_decided_once_the_interval_leaves_the_limit(ci95, decided):
    """On either side of 1.05."""
    assert is_decided(Estimate(1.0, ci95, 8), 1.05) == decided


@pytest.mark.parametrize(("one", "other"), [([1.0], [1.0, 2.0]), ([], []), ([0.0], [1.0]), ([1.0], [float("nan")])])
def test_times_must_pair_and_be_positive(one, other):
    """There is no ratio otherwise."""
    with pytest.raises(ValueError, match="positive times that pair"):
        log_ratios(one, other)
