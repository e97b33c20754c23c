"""Whether a model is as often right as it is sure: confidence against accuracy, in bins of equally many items."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compressor.reports.items import CLEAN, Pair, TaskItem

MOST_BINS, USUAL_BINS = 10, 5
ITEMS_A_BIN, FEWEST_IN_A_BIN = 40, 10  # the interval of a bin then spans about 0.3 of the axis, at worst 0.5


@dataclass(frozen=True)
class Bin:
    """Mean confidence and accuracy of `n` items, with the 95 % interval of the accuracy (Wilson)."""

    confidence: float
    accuracy: float
    ci95: tuple[float, float]
    n: int


@dataclass(frozen=True)
class Reliability:
    """The bins of one task in both models."""

    task: str
    before: tuple[Bin, ...]
    after: tuple[Bin, ...]
    n: int


def reliabilities(pairs: Mapping[tuple[str, str], Sequence[Pair]]) -> list[Reliability]:
    """Return the bins of every task whose items have confidences in both models, the largest task first."""
    found = []
    for (task, variant), of_task in pairs.items():
        both = [pair for pair in of_task if all(_has_confidence(item) for item in pair)]
        if variant == CLEAN and len(both) >= FEWEST_IN_A_BIN:
            before, after = (equal_mass_bins([pair[side] for pair in both]) for side in (0, 1))
            found.append(Reliability(task, before, after, len(both)))
    return sorted(found, key=lambda one: (-one.n, one.task))


def equal_mass_bins(items: Sequence[TaskItem]) -> tuple[Bin, ...]:
    """Sort items by confidence and cut them into at most ten bins whose sizes differ by one at most.

    Few items make fewer bins, down to one.
    """
    n = len(items)
    count = max(1, min(MOST_BINS, n // ITEMS_A_BIN), min(USUAL_BINS, n // FEWEST_IN_A_BIN))
    confidence = np.array([item.confidence for item in items], dtype=np.float64)
    score = np.array([item.score for item in items], dtype=np.float64)
    order = np.argsort(confidence, kind="stable")
    bins = []
    for chosen in np.array_split(order, count):
        accuracy = float(score[chosen].mean())
        bins.append(Bin(float(confidence[chosen].mean()), accuracy, _wilson(accuracy, len(chosen)), len(chosen)))
    return tuple(bins)


def _has_confidence(item: TaskItem) -> bool:
    return item.confidence is not None and math.isfinite(item.confidence)


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = 1.959964
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)
