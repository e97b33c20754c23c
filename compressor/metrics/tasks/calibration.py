"""Whether a model is right as often as it is sure.

C choices of an item, N items.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.metrics.bootstrap import RESAMPLES
from compressor.reports.estimate import Estimate

BINS = 10
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Items that a model was about equally sure of: mean confidence, share that was right, how many."""

    confidence: float
    accuracy: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        return {"confidence": self.confidence, "accuracy": self.accuracy, "n": self.n}


def choice_probabilities(loglik_C: Sequence[float]) -> Floats:
    """The probability of each choice, given that it is one of them: a softmax of log-likelihoods."""
    shifted_C = np.asarray(loglik_C, dtype=np.float64) - np.max(loglik_C)
    weight_C = np.exp(shifted_C)
    return weight_C / weight_C.sum()


def choice_nll(loglik_C: Sequence[float], gold: int) -> float:
    """Minus the logarithm of the right choice's probability, in nats; finite also where that probability is tiny."""
    loglik = np.asarray(loglik_C, dtype=np.float64)
    return float(np.logaddexp.reduce(loglik) - loglik[gold])


def brier(probability_C: Floats, gold: int) -> float:
    """Squared distance between the probabilities and the truth, over all choices: 0 is best, 2 worst."""
    truth_C = np.zeros_like(probability_C)
    truth_C[gold] = 1.0
    return float(np.square(probability_C - truth_C).sum())


def reliability(confidence_N: Sequence[float], correct_N: Sequence[float], bins: int = BINS) -> list[Bin]:
    """Items in bins of equal numbers, from the least to the most sure; never more bins than items."""
    confidence, correct = np.asarray(confidence_N, dtype=np.float64), np.asarray(correct_N, dtype=np.float64)
    order = np.argsort(confidence, kind="stable")
    parts = np.split(order, _starts(len(order), bins)[1:])
    return [Bin(float(confidence[part].mean()), float(correct[part].mean()), len(part)) for part in parts]


def calibration_error(
    confidence_N: Sequence[float], correct_N: Sequence[float], bins: int = BINS, *, seed: int = 0
) -> Estimate:
    """Expected calibration error: mean distance of confidence and accuracy over bins of equal numbers.

    The interval is of resampled items. Both are biased upwards where bins hold few items: a figure to show, while
    decisions rest on NLL and Brier score.
    """
    confidence, correct = np.asarray(confidence_N, dtype=np.float64), np.asarray(correct_N, dtype=np.float64)
    value, count = _error(confidence, correct, bins), len(confidence)
    if count == 1:
        return Estimate(value, None, 1)
    draw = np.random.default_rng(seed)
    picks = (draw.integers(0, count, count) for _ in range(RESAMPLES))
    resampled = [_error(confidence[pick], correct[pick], bins) for pick in picks]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, (float(low), float(high)), count)


def _error(confidence: Floats, correct: Floats, bins: int) -> float:
    gap = (confidence - correct)[np.argsort(confidence, kind="stable")]
    return float(np.abs(np.add.reduceat(gap, _starts(len(gap), bins))).sum() / len(gap))


def _starts(count: int, bins: int) -> NDArray[np.int64]:
    """Where bins of equal numbers begin; the first ones hold one more where it does not come out even."""
    bins = min(bins, count)
    sizes = np.full(bins, count // bins)
    sizes[: count % bins] += 1
    return np.concatenate([[0], np.cumsum(sizes)[:-1]])
