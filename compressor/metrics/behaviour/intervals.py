"""Intervals for shares of few items, and for the worst of many groups.

A percentile bootstrap of twelve equal answers has no width at all, as if twelve prompts had proved something; score
intervals do not make that mistake. N items; R resamples, S groups.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from compressor.reports.estimate import Estimate

CONFIDENCE = 0.95
HALVINGS = 60  # of an interval no wider than 2: far below what a float can tell apart


def rate(flags_N: Sequence[bool], *, confidence: float = CONFIDENCE) -> Estimate:
    """The share of items that are true, with Wilson's score interval. ValueError for no items."""
    count, total = _count(flags_N), len(flags_N)
    z2 = _quantile(confidence) ** 2
    share = count / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * total)) / total) / (1 + z2 / total)
    low = 0.0 if count == 0 else centre - half  # the ends are exact there, but for rounding
    return Estimate(share, (low, 1.0 if count == total else centre + half), total)


def rate_change(
    before_N: Sequence[bool], after_N: Sequence[bool], *, confidence: float = CONFIDENCE, sides: int = 1
) -> Estimate:
    """By how much a share changed on the same items (after - before), with Tango's score interval for paired shares.

    It holds the differences that a score test of the two kinds of flips does not reject (Tango 1998), so it has width
    even where nothing flipped. `sides`: among how many changes this one was picked as the largest; the interval is
    widened (Bonferroni) so that it still holds. ValueError for no items or sides of unequal length.
    """
    _count(before_N)
    if len(before_N) != len(after_N):
        raise ValueError(f"paired items are needed, got {len(before_N)} before and {len(after_N)} after")
    total = len(before_N)
    gained = sum(bool(after) and not before for before, after in zip(before_N, after_N, strict=True))
    lost = sum(bool(before) and not after for before, after in zip(before_N, after_N, strict=True))
    z = _quantile(1 - (1 - confidence) / sides)
    value = (gained - lost) / total
    low = _score_end(gained, lost, total, z, value, -1.0)
    high = _score_end(gained, lost, total, z, value, 1.0)
    return Estimate(value, (low, high), total)


def simultaneous(values_S: NDArray[np.float64], resampled_RS: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half-widths of intervals that hold for all groups at once, so the worst may be picked after looking.

    The 95 % quantile of the largest studentised deviation over the groups, times each group's bootstrap deviation.
    """
    deviation_S = resampled_RS.std(axis=0)
    scale_S = np.where(deviation_S > 0, deviation_S, 1.0)
    largest_R = np.abs((resampled_RS - values_S) / scale_S).max(axis=1)
    return np.asarray(np.quantile(largest_R, CONFIDENCE) * deviation_S, dtype=np.float64)


def _score_end(gained: int, lost: int, total: int, z: float, value: float, bound: float) -> float:
    """The difference between `value` and `bound` at which the score test begins to reject; `bound` if it never does."""
    inside, outside = value, bound
    if abs(_score(gained, lost, total, bound)) <= z:
        return bound
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        if abs(_score(gained, lost, total, middle)) <= z:
            inside = middle
        else:
            outside = middle
    return (inside + outside) / 2


def _score(gained: int, lost: int, total: int, difference: float) -> float:
    """Tango's statistic: how many standard errors the flips are from what `difference` lets expect.

    The share of items lost is the maximum-likelihood one under that difference, the root of a quadratic.
    """
    surplus = gained - lost - total * difference
    if surplus == 0:
        return 0.0
    linear = (2 * total - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    root = math.sqrt(max(0.0, linear**2 - 8 * total * constant))
    lost_share = max(0.0, (root - linear) / (4 * total))
    variance = total * (2 * lost_share + difference * (1 - difference))
    return math.copysign(math.inf, surplus) if variance <= 0 else surplus / math.sqrt(variance)


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _count(flags_N: Sequence[bool]) -> int:
    if len(flags_N) == 0:
        raise ValueError("a share needs at least one item")
    return sum(map(bool, flags_N))
