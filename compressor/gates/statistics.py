"""Did the candidate get worse on the same items, and is that sure enough to say so?

N items, G clusters of items that share a passage (an item is its own cluster where none are given), R resamples. Scores
are higher for better: pass `-brier_N` or `-nll_N` for what should be low. A drop is baseline - candidate, so a loss is
positive. Everything is deterministic: resampling depends on the data's size and the seed alone.

| scores | interval of the drop | test for a loss |
|---|---|---|
| 0/1 | Tango's score interval (Statistics in Medicine 17, 1998) | exact McNemar, one-sided |
| 0/1 in clusters | the same on effective numbers of items (Rao, Scott, Biometrics 48, 1992) | sign flips of clusters |
| any other | BCa bootstrap over clusters (Efron, JASA 82, 1987) | sign flips of clusters |

A bootstrap of 0/1 scores has width zero where no item flipped, and would pass any margin on a handful of items.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compressor.gates.sample_size import minimum_detectable_effect, variance_at
from compressor.reports.estimate import Estimate

Array = NDArray[np.float64]
Scores = Sequence[float] | Array
ComparisonStatus = Literal["pass", "fail", "inconclusive"]

RESAMPLES = 2000
SIGN_FLIPS = 9999
# Up to so many clusters that differ, all sign patterns are counted; beyond, SIGN_FLIPS random ones.
ENUMERATED = 13
# Numbers in one piece of a resampling, so that memory does not grow with N x R.
PIECE = 2**22
Z95 = NormalDist().inv_cdf(0.975)
# No advice any more, only a way of saying that the drop lies on the limit.
MOST_ITEMS = 10**9


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the same items say about two models.

    `lost` and `gained` are the items on which the candidate scores lower and higher. `minimum_detectable_effect` is the
    true drop that so many items would show with the asked power, None where they are too few for any.
    `items_needed` is about how many would decide if the rates stay; None when decided, or when no number would.
    """

    status: ComparisonStatus
    drop: Estimate
    p_value: float
    lost: int
    gained: int
    n: int
    minimum_detectable_effect: float | None
    items_needed: int | None


def compare(
    baseline_N: Scores,
    candidate_N: Scores,
    *,
    margin: float,
    tolerance: float | None = None,
    alpha: float = 0.05,
    clusters: Sequence[Hashable] | None = None,
    power: float = 0.8,
    seed: int = 0,
) -> Comparison:
    """Say whether a candidate may replace the baseline: pass, fail, or too little evidence (non-inferiority).

    - **pass**: the upper end of the two-sided 95 % interval of the drop is at most `margin`, whatever `alpha` is: the
      interval that is printed is the one that decides. So a loss that is significant but surely within the margin
      passes: the margin says that this much may be lost.
    - **fail**: otherwise, where the loss is significant (one-sided p <= `alpha`) and the estimate is above `tolerance`,
      or the whole interval above `margin`. A candidate without a true drop fails in at most `alpha` of all runs.
    - **inconclusive**: otherwise. `tolerance` is the margin unless given: a significant loss whose estimate is still
      within the margin is then undecided, as more items might show that it is acceptable. `tolerance=0` fails it.

    ValueError for scores that are not finite or do not pair.
    """
    if not (math.isfinite(margin) and margin >= 0 and (tolerance is None or tolerance >= 0)):
        raise ValueError(f"margin {margin:g}, tolerance {tolerance}: neither may be negative")
    if not 0 < alpha < 0.5 <= power < 1:
        raise ValueError(f"alpha {alpha:g}, power {power:g}: needs 0 < alpha < 0.5 <= power < 1")
    tolerance = margin if tolerance is None else tolerance
    drops = _Drops.of(baseline_N, candidate_N, clusters)
    drop = drops.estimate(RESAMPLES, seed)
    p_value = drops.p_value(seed)
    status = _status(drop, p_value, margin, tolerance, alpha)
    return Comparison(
        status=status,
        drop=drop,
        p_value=p_value,
        lost=drops.lost,
        gained=drops.gained,
        n=drops.n,
        minimum_detectable_effect=drops.detectable(alpha, power),
        items_needed=_items_needed(drops, drop, p_value, margin, tolerance, alpha)
        if status == "inconclusive"
        else None,
    )


def paired_drop(
    baseline_N: Scores,
    candidate_N: Scores,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of baseline - candidate over the same items with its two-sided 95 % interval.

    0/1 scores take Tango's score interval, which needs no resampling; others a BCa bootstrap over items or clusters.
    `ci95` is None with a single item that is not 0/1, or a single cluster. ValueError for scores that are not finite or
    do not pair.
    """
    return _Drops.of(baseline_N, candidate_N, clusters).estimate(resamples, seed)


def mcnemar_one_sided(lost: int, gained: int) -> float:
    """How likely are so many losses among the flips if neither model is better? Exact, one-sided; 1 without flips."""
    from scipy import special

    if lost < 0 or gained < 0:
        raise ValueError(f"{lost} items lost, {gained} gained: neither may be negative")
    # P(X >= lost) for X ~ Binomial(lost + gained, 1/2) is a regularised incomplete beta function.
    return float(special.betainc(lost, gained + 1, 0.5)) if lost else 1.0


def tango_interval(lost: float, gained: float, n: float) -> tuple[float, float]:
    """The 95 % score interval of the drop when of n items so many were lost and so many gained (Tango 1998)."""
    upper = _upper_end(lost, gained, n)
    return -_upper_end(gained, lost, n), upper


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, corrected so that each can be held against alpha (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def holm(p_values: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which of a family of tests are significant when the chance of any false alarm is to stay below alpha."""
    return [p_value <= alpha for p_value in holm_adjusted(p_values)]


@dataclass(frozen=True)
class _Drops:
    """The paired differences: `totals_G` is their sum in each cluster, `sizes_G` the cluster's number of items."""

    drop_N: Array
    totals_G: Array
    sizes_G: Array
    is_binary: bool

    @classmethod
    def of(cls, baseline_N: Scores, candidate_N: Scores, clusters: Sequence[Hashable] | None) -> "_Drops":
        before_N, after_N = _finite(baseline_N, "baseline"), _finite(candidate_N, "candidate")
        if before_N.size != after_N.size:
            raise ValueError(f"{before_N.size} scores of the baseline do not pair with {after_N.size} of the candidate")
        drop_N = before_N - after_N
        is_binary = bool(((before_N == 0) | (before_N == 1)).all() and ((after_N == 0) | (after_N == 1)).all())
        if clusters is None:
            return cls(drop_N, drop_N, np.ones_like(drop_N), is_binary)
        if len(clusters) != drop_N.size:
            raise ValueError(f"{drop_N.size} items need as many cluster names, got {len(clusters)}")
        numbers: dict[Hashable, int] = {}
        cluster_N = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
        sizes_G = np.bincount(cluster_N).astype(np.float64)
        totals_G = np.bincount(cluster_N, weights=drop_N).astype(np.float64)
        return cls(drop_N, totals_G, sizes_G, is_binary)

    @property
    def n(self) -> int:
        return self.drop_N.size

    @property
    def is_clustered(self) -> bool:
        return self.totals_G.size < self.n

    @cached_property
    def lost(self) -> int:
        return int((self.drop_N > 0).sum())

    @cached_property
    def gained(self) -> int:
        return int((self.drop_N < 0).sum())

    @cached_property
    def value(self) -> float:
        return float(self.drop_N.mean())

    @cached_property
    def standard_error(self) -> float:
        """Of the mean drop, from the spread between clusters."""
        residual_G = self.totals_G - self.value * self.sizes_G
        groups = residual_G.size
        return math.sqrt(float(residual_G @ residual_G) * groups / (groups - 1)) / self.n if groups > 1 else math.inf

    @cached_property
    def effective(self) -> tuple[float, float, float]:
        """Items lost, items gained and all items, each divided by how much clustering inflates the variance."""
        if not self.is_clustered:
            return self.lost, self.gained, self.n
        spread = float(self.drop_N.var())
        # Where no item differs from another nothing is known of how flips cluster: a cluster counts as one item.
        inflation = self.standard_error**2 / (spread / self.n) if spread else self.n / self.totals_G.size
        inflation = max(1.0, inflation)
        return self.lost / inflation, self.gained / inflation, self.n / inflation

    def estimate(self, resamples: int, seed: int) -> Estimate:
        """The mean drop with its 95 % interval."""
        if self.totals_G.size == 1 and (self.is_clustered or not self.is_binary):
            return Estimate(self.value, None, self.n)
        interval = tango_interval(*self.effective) if self.is_binary else self._bca(resamples, seed)
        return Estimate(self.value, interval, self.n)

    def p_value(self, seed: int) -> float:
        """Of the one-sided test that the candidate is worse."""
        if self.is_binary and not self.is_clustered:
            return mcnemar_one_sided(self.lost, self.gained)
        return _sign_flip_p_value(self.totals_G, seed)

    def detectable(self, alpha: float, power: float) -> float | None:
        """The drop that these items would show with this power."""
        if self.is_binary:
            items = self.effective[2] if self.totals_G.size > 1 else 1
            return minimum_detectable_effect(items, (self.lost + self.gained) / self.n, alpha, power)
        if not 0 < self.standard_error < math.inf:
            return None
        return (NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(power)) * self.standard_error

    def _bca(self, resamples: int, seed: int) -> tuple[float, float]:
        """Percentiles of resampled means, moved for their bias and for the skewness of the drops."""
        normal = NormalDist()
        resampled_R = self._resampled(resamples, seed)
        below = float(((resampled_R < self.value).mean() + (resampled_R <= self.value).mean()) / 2)
        bias = normal.inv_cdf(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples))
        left_out_G = (self.totals_G.sum() - self.totals_G) / (self.sizes_G.sum() - self.sizes_G)
        centred_G = left_out_G.mean() - left_out_G
        spread = float((centred_G**2).sum())
        skew = float((centred_G**3).sum()) / (6 * spread**1.5) if spread else 0.0
        ends = [bias + sign * Z95 for sign in (-1, 1)]
        tails = [normal.cdf(bias + end / (1 - skew * end)) for end in ends]
        low, high = np.quantile(resampled_R, tails)
        return float(low), float(high)

    def _resampled(self, resamples: int, seed: int) -> Array:
        groups = self.totals_G.size
        generator = np.random.default_rng(seed)
        means = []
        for start in range(0, resamples, rows := max(1, PIECE // groups)):
            picks_RG = generator.integers(0, groups, (min(rows, resamples - start), groups))
            items_R = self.sizes_G[picks_RG].sum(1) if self.is_clustered else groups
            means.append(self.totals_G[picks_RG].sum(1) / items_R)
        return np.concatenate(means)


def _status(drop: Estimate, p_value: float, margin: float, tolerance: float, alpha: float) -> ComparisonStatus:
    if drop.ci95 is None:
        return "inconclusive"
    low, high = drop.ci95
    if high <= margin:
        return "pass"
    return "fail" if p_value <= alpha and (drop.value > tolerance or low > margin) else "inconclusive"


def _items_needed(
    drops: _Drops, drop: Estimate, p_value: float, margin: float, tolerance: float, alpha: float
) -> int | None:
    """Both the interval and the test statistic go with the root of the number of items while the rates stay."""
    if drop.ci95 is None:
        return None
    distances = []  # (how many standard errors there are, how many it takes)
    if drops.is_binary:
        distances.append((abs(_tango_score(*drops.effective, margin)), Z95))
    elif drop.value != margin:
        half = drop.ci95[1] - drop.value if drop.value < margin else drop.value - drop.ci95[0]
        distances.append((abs(drop.value - margin), half))
    if drop.value > tolerance and 0 < p_value < 0.5:
        distances.append((NormalDist().inv_cdf(1 - p_value), NormalDist().inv_cdf(1 - alpha)))
    factor = min(((wanted / there) ** 2 for there, wanted in distances if there > 0), default=math.inf)
    return max(drops.n + 1, math.ceil(drops.n * factor)) if drops.n * factor <= MOST_ITEMS else None


def _sign_flip_p_value(totals_G: Array, seed: int) -> float:
    """How likely is so large a sum if the two models may be swapped in each cluster?"""
    totals_G = totals_G[totals_G != 0]
    groups = totals_G.size
    observed = totals_G.sum()
    # A sum over the same numbers in another order may differ in its last digits.
    threshold = observed - 1e-9 * np.abs(totals_G).sum()
    if groups <= ENUMERATED:
        patterns_RG = (np.arange(2**groups)[:, None] >> np.arange(groups)) & 1
        return float((observed - 2 * (patterns_RG @ totals_G) >= threshold).mean())
    generator = np.random.default_rng(seed)
    hits = 0
    for start in range(0, SIGN_FLIPS, rows := max(1, PIECE // groups)):
        bytes_RG = generator.integers(0, 256, (min(rows, SIGN_FLIPS - start), -(-groups // 8)), dtype=np.uint8)
        swap_RG = np.unpackbits(bytes_RG, axis=1, count=groups)
        hits += int((observed - 2 * (swap_RG.astype(np.float64) @ totals_G) >= threshold).sum())
    # The observed order is one of the possible ones.
    return (1 + hits) / (1 + SIGN_FLIPS)


def _upper_end(lost: float, gained: float, n: float) -> float:
    low, high = (lost - gained) / n, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _tango_score(lost, gained, n, middle) > -Z95 else (low, middle)
    return high


def _tango_score(lost: float, gained: float, n: float, drop: float) -> float:
    """By how many standard errors the observed drop lies above this one, if this one were true."""
    distance = (lost - gained) / n - drop
    variance = variance_at(lost / n, gained / n, drop)
    return (
        distance * math.sqrt(n / variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0
    )


def _finite(scores_N: Scores, whose: str) -> Array:
    array_N = np.asarray(scores_N, dtype=np.float64)
    if array_N.ndim != 1 or array_N.size == 0:
        raise ValueError(f"the {whose}'s scores are a list of one or more numbers, got shape {array_N.shape}")
    if not np.isfinite(array_N).all():
        first = int(np.flatnonzero(~np.isfinite(array_N))[0])
        raise ValueError(
            f"{int((~np.isfinite(array_N)).sum())} of the {whose}'s {array_N.size} scores are no finite numbers "
            f"(first: item {first}, {array_N[first]})"
        )
    return array_N
