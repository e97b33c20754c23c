"""Bootstrap intervals, held against their definition and the textbook."""

import numpy as np
import pytest
import torch

from compressor.metrics.bootstrap import bootstrap_mean, bootstrap_median, mapped
from compressor.reports.estimate import Estimate


def test_mean_is_the_mean_and_n_the_number_of_values():
    """The value is the plain mean in float64."""
    estimate = bootstrap_mean([1.0, 2.0, 6.0])
    assert estimate.value == 3.0
    assert estimate.n == 3


def test_weights_give_the_weighted_mean():
    """A window with three times the tokens counts three times."""
    assert bootstrap_mean([1.0, 2.0], [3.0, 1.0]).value == pytest.approx(1.25)


def test_weighted_interval_resamples_numerator_and_denominator_together():
    """Equal values under any weights have no uncertainty at all."""
    assert bootstrap_mean([2.0, 2.0, 2.0], [1.0, 5.0, 9.0]).ci95 == pytest.approx((2.0, 2.0))


def test_interval_is_that_of_a_loop_over_resamples():
    """The vectorised interval equals resampling one by one with the same generator."""
    values = np.random.default_rng(3).normal(size=20)
    picks = np.random.default_rng(0).integers(0, 20, (1000, 20))
    expected = np.quantile([values[pick].mean() for pick in picks], [0.025, 0.975])
    assert bootstrap_mean(values).ci95 == pytest.approx(tuple(expected))


def test_interval_is_near_the_normal_one_for_many_values():
    """With 400 values the half-width is 1.96 standard errors, within a tenth."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap_mean(values).ci95
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()) / 20, rel=0.1)


def test_interval_covers_the_truth_about_95_times_in_100():
    """Of 300 samples of 40 values, 92 to 98 % have the true mean inside."""
    draws = np.random.default_rng(7).normal(size=(300, 40))
    intervals = [bootstrap_mean(draw, seed=index).ci95 for index, draw in enumerate(draws)]
    assert 0.92 <= np.mean([low <= 0.0 <= high for low, high in intervals]) <= 0.98


def test_one_value_has_no_interval():
    """Nothing is known about the spread of a single window."""
    assert bootstrap_mean([4.0]) == Estimate(4.0, None, 1)
    assert bootstrap_median([4.0]) == Estimate(4.0, None, 1)


def test_median_ignores_an_outlier():
    """One round that was interrupted does not move the median."""
    assert bootstrap_median([1.0, 2.0, 3.0, 4.0, 1000.0]).value == 3.0


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_that_are_not_finite_are_refused(values):
    """NaN would quietly make every resample NaN."""
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


def test_mapped_keeps_the_ends_in_order():
    """A falling function such as 1/x swaps the ends of the interval."""
    assert mapped(Estimate(2.0, (1.0, 4.0), 5), lambda x: 1 / x) == Estimate(0.5, (0.25, 1.0), 5)
