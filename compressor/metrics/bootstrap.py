"""How sure a measured number is: percentile bootstrap intervals over the things that were measured.

N things (windows, rounds); R resamples. The resamples depend on N and the seed alone, so two quantities measured on the
same N things are resampled together: an interval of their difference is a paired one.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compressor.reports.estimate import Estimate

RESAMPLES = 1000
Values = Sequence[float] | NDArray[np.float64] | Tensor


def bootstrap_mean(
    values_N: Values, weights_N: Values | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of some values with a 95 % interval from resampling them with replacement.

    `weights_N` (tokens in a window, bytes in a window) makes it the weighted mean, whose numerator and denominator are
    resampled together. With a single value the interval is None. ValueError for no values, values that are not finite,
    or weights that are not positive.
    """
    values_N = _finite(values_N)
    weights_N = np.ones_like(values_N) if weights_N is None else _finite(weights_N)
    if weights_N.shape != values_N.shape or (weights_N <= 0).any():
        raise ValueError(f"{values_N.size} values need as many positive weights, got {weights_N.size}")
    totals_N = values_N * weights_N
    value = float(totals_N.sum() / weights_N.sum())
    if values_N.size == 1:
        return Estimate(value, None, 1)
    picks_RN = _picks(values_N.size, resamples, seed)
    return _with_interval(value, totals_N[picks_RN].sum(1) / weights_N[picks_RN].sum(1), values_N.size)


def bootstrap_median(values_N: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The median of some values with a 95 % interval from resampling them with replacement.

    With a single value the interval is None. ValueError for no values or values that are not finite.
    """
    values_N = _finite(values_N)
    value = float(np.median(values_N))
    if values_N.size == 1:
        return Estimate(value, None, 1)
    return _with_interval(value, np.median(values_N[_picks(values_N.size, resamples, seed)], axis=1), values_N.size)


def mapped(estimate: Estimate, monotone: Callable[[float], float]) -> Estimate:
    """The same estimate in another unit: percentiles go through a monotone function unchanged (exp, reciprocal)."""
    if estimate.ci95 is None:
        return Estimate(monotone(estimate.value), None, estimate.n)
    low, high = sorted(monotone(end) for end in estimate.ci95)
    return Estimate(monotone(estimate.value), (low, high), estimate.n)


def _finite(values_N: Values) -> NDArray[np.float64]:
    array_N = np.asarray(values_N.cpu() if isinstance(values_N, Tensor) else values_N, dtype=np.float64)
    if array_N.ndim != 1 or array_N.size == 0 or not np.isfinite(array_N).all():
        raise ValueError(f"a bootstrap takes a list of one or more finite values, got shape {array_N.shape}: {array_N}")
    return array_N


def _picks(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def _with_interval(value: float, resampled_R: NDArray[np.float64], count: int) -> Estimate:
    low, high = np.quantile(resampled_R, [0.025, 0.975])
    return Estimate(value, (float(low), float(high)), count)
