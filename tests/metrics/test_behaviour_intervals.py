"""Intervals of shares and of the worst of many, held against scipy, brute force and simulation."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from compressor.metrics.behaviour.intervals import rate, rate_change, simultaneous


@pytest.mark.parametrize(("count", "total"), [(0, 12), (1, 12), (6, 12), (12, 12), (30, 400)])
def test_rate_has_wilsons_interval(count, total):
    """The same ends as scipy's."""
    expected = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    estimate = rate([True] * count + [False] * (total - count))
    assert estimate.value == count / total
    assert estimate.ci95 == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_rate_of_nothing_is_refused():
    """There is no share of no items."""
    with pytest.raises(ValueError, match="at least one"):
        rate([])


def score_by_brute_force(gained, lost, total, difference):
    """The score statistic with the lost share that maximises the likelihood, searched for numerically."""

    def loss(share):
        up, same = share + difference, 1 - 2 * share - difference
        parts = ((gained, up), (lost, share), (total - gained - lost, same))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in parts if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    share = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - total * difference) / math.sqrt(total * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize(("gained", "lost", "total"), [(2, 5, 40), (1, 9, 60), (7, 7, 25), (3, 1, 200)])
def test_change_ends_where_the_score_test_begins_to_reject(gained, lost, total):
    """At both ends the statistic is 1.96 standard errors from what the flips show."""
    before = [False] * gained + [True] * lost + [False] * (total - gained - lost)
    after = [True] * gained + [False] * lost + [False] * (total - gained - lost)
    estimate = rate_change(before, after)
    assert estimate.value == pytest.approx((gained - lost) / total)
    ends = [score_by_brute_force(gained, lost, total, end) for end in estimate.ci95]
    assert ends == pytest.approx([1.959964, -1.959964], abs=1e-3)


def test_no_flips_among_twelve_is_no_proof():
    """The interval then has the closed form z^2 / (n + z^2) on both sides."""
    z2 = stats.norm.ppf(0.975) ** 2
    assert rate_change([True] * 12, [True] * 12).ci95 == pytest.approx((-z2 / (12 + z2), z2 / (12 + z2)))


def test_change_is_covered_as_often_as_it_says():
    """Over 400 draws of 60 pairs with 10 % and 5 % flips the true change lies inside in 95 %, within 3 points."""
    generator = np.random.default_rng(0)
    kinds = generator.choice(3, p=[0.10, 0.05, 0.85], size=(400, 60))
    inside = 0
    for row in kinds:
        low, high = rate_change(list(row == 1), list(row == 0)).ci95
        inside += low <= 0.05 <= high
    assert inside / 400 == pytest.approx(0.95, abs=0.03)


def test_a_change_picked_among_many_has_a_wider_interval():
    """Among 9 the interval is the one at a confidence of 1 - 0.05 / 9."""
    before, after = [True] * 40, [True] * 36 + [False] * 4
    wider = rate_change(before, after, sides=9)
    assert wider.ci95 == pytest.approx(rate_change(before, after, confidence=1 - 0.05 / 9).ci95)


def test_pairs_of_unequal_length_are_refused():
    """Items have to pair."""
    with pytest.raises(ValueError, match="2 before and 1 after"):
        rate_change([True, True], [True])


def test_the_worst_of_many_is_covered():
    """Eight groups without any change: the interval of the largest one misses 0 in about 5 % of 200 draws."""
    generator = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        shifts_TG = generator.normal(size=(24, 8))
        resampled = shifts_TG[generator.integers(0, 24, (400, 24))].mean(1)
        mean_G = shifts_TG.mean(0)
        worst = np.abs(mean_G).argmax()
        missed += abs(mean_G[worst]) > simultaneous(mean_G, resampled)[worst]
    assert missed / 200 < 0.12


def test_one_group_alone_has_the_ordinary_interval():
    """The half-width is near 1.96 standard errors."""
    values = np.random.default_rng(2).normal(size=400)
    resampled = values[np.random.default_rng(3).integers(0, 400, (2000, 400))].mean(1)
    half = simultaneous(np.array([values.mean()]), resampled[:, None])
    assert half[0] == pytest.approx(1.96 * values.std() / 20, rel=0.08)
