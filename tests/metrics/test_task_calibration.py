"""Calibration figures against numbers worked out by hand."""

import math

import numpy as np
import pytest

from compressor.metrics.tasks.calibration import (
    Bin,
    brier,
    calibration_error,
    choice_nll,
    choice_probabilities,
    reliability,
)


def test_probabilities_are_likelihoods_over_their_sum():
    """Likelihoods of 1 and 3 are a quarter and three quarters, however small both are."""
    assert choice_probabilities([-1000.0, -1000.0 + math.log(3)]) == pytest.approx([0.25, 0.75])


def test_the_nll_of_a_hopeless_choice_is_finite():
    """exp(-2000) is 0 in floats, its logarithm is not needed."""
    assert choice_nll([-2000.0, 0.0], 0) == pytest.approx(2000.0)
    assert choice_nll([math.log(0.25), math.log(0.75)], 1) == pytest.approx(-math.log(0.75))


def test_brier_sums_squares_over_all_choices():
    """(0.2 - 0)^2 + (0.5 - 1)^2 + (0.3 - 0)^2 = 0.38; being surely wrong is 2."""
    assert brier(np.array([0.2, 0.5, 0.3]), 1) == pytest.approx(0.38)
    assert brier(np.array([1.0, 0.0]), 1) == pytest.approx(2.0)


def test_bins_hold_equal_numbers_in_the_order_of_confidence():
    """Five items in two bins: three and two."""
    found = reliability([0.9, 0.1, 0.5, 0.3, 0.7], [1, 0, 1, 0, 0], bins=2)
    assert found == [Bin(pytest.approx(0.3), pytest.approx(1 / 3), 3), Bin(pytest.approx(0.8), 0.5, 2)]


def test_there_are_never_more_bins_than_items():
    """Two items, ten bins asked: two bins of one."""
    assert [part.n for part in reliability([0.5, 0.6], [1, 0])] == [1, 1]


def test_the_calibration_error_is_the_weighted_gap_of_the_bins():
    """Bins of the test above: 3/5 |0.3 - 1/3| + 2/5 |0.8 - 0.5| = 0.14."""
    found = calibration_error([0.9, 0.1, 0.5, 0.3, 0.7], [1, 0, 1, 0, 0], bins=2)
    assert found.value == pytest.approx(0.14)
    assert found.n == 5


def test_the_calibration_error_agrees_with_the_bins_at_any_size():
    """97 random items in 10 bins, by the definition from the bins."""
    draw = np.random.default_rng(0)
    confidence, correct = draw.random(97), draw.integers(0, 2, 97).astype(float)
    expected = sum(part.n * abs(part.accuracy - part.confidence) for part in reliability(confidence, correct)) / 97
    assert calibration_error(confidence, correct).value == pytest.approx(expected)


def test_a_perfect_forecaster_has_a_small_error_and_an_interval_above_it():
    """2,000 items that are right with the probability stated: below 0.04, and the interval holds positive numbers."""
    draw = np.random.default_rng(1)
    confidence = draw.uniform(0.25, 1, 2000)
    found = calibration_error(confidence, (draw.random(2000) < confidence).astype(float))
    assert found.value < 0.04
    assert found.ci95 is not None
    assert 0 < found.ci95[0] < found.ci95[1] < 0.08


def test_one_item_has_no_interval():
    """Surely right once: error 0.1 without an interval."""
    found = calibration_error([0.9], [1.0])
    assert (found.value, found.ci95) == (pytest.approx(0.1), None)
