"""What perturbed prompts cost a compressed model more than its baseline. N items."""

from collections.abc import Sequence

import numpy as np

from compressor.errors import IntegrityError
from compressor.metrics.behaviour.figures import Figures
from compressor.metrics.bootstrap import Values, bootstrap_mean
from compressor.reports.estimate import Estimate
from compressor.reports.items import CLEAN, Pair, TaskItem, pair_items


def robustness_gap(
    clean_baseline_N: Values, perturbed_baseline_N: Values, clean_N: Values, perturbed_N: Values
) -> Estimate:
    """How much more the candidate loses on perturbed prompts than the baseline: the mean over items, paired bootstrap.

    Scores of the same items in the same order; above 0 the candidate is the less robust. ValueError for unequal sides.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (clean_baseline_N, perturbed_baseline_N, clean_N)]
    last = np.asarray(perturbed_N, dtype=np.float64)
    if any(side.shape != last.shape for side in sides):
        raise ValueError(f"the same items are needed four times, got {[*(s.size for s in sides), last.size]}")
    return bootstrap_mean((sides[2] - last) - (sides[0] - sides[1]))


def robustness_drop(clean_N: Values, perturbed_N: Values) -> Estimate:
    """How much one model loses on perturbed prompts: mean of clean - perturbed over items, paired bootstrap."""
    clean, perturbed = np.asarray(clean_N, dtype=np.float64), np.asarray(perturbed_N, dtype=np.float64)
    if clean.shape != perturbed.shape:
        raise ValueError(f"the same items are needed twice, got {clean.size} and {perturbed.size}")
    return bootstrap_mean(clean - perturbed)


def robustness_gaps(baseline: Sequence[TaskItem], candidate: Sequence[TaskItem]) -> Figures:
    """`{task: {variant: gap}}` of all perturbed items of two models.

    Items whose prompt the variant left as it was say nothing and are left out; None where that is all of them.
    IntegrityError where the two do not pair, or a perturbed item has no clean one.
    """
    pairs = pair_items(baseline, candidate)
    values: dict[str, dict[str, Estimate | None]] = {}
    reasons = {}
    for (task, variant), perturbed in pairs.items():
        if variant == CLEAN:
            continue
        clean = {before.item: (before, after) for before, after in pairs.get((task, CLEAN), [])}
        fours = [_with_clean(pair, clean) for pair in perturbed if pair[0].prompt != _clean_prompt(pair, clean)]
        values.setdefault(task, {})[variant] = robustness_gap(*zip(*fours, strict=True)) if fours else None
        if not fours:
            reasons[f"{task}.{variant}"] = f"{variant} found nothing to change in {len(perturbed)} prompts"
    return Figures(values, reasons)


def _clean_prompt(perturbed: Pair, clean: dict[int, Pair]) -> str:
    item = perturbed[0]
    if item.item not in clean:
        raise IntegrityError(f"task {item.task!r}: item {item.item} was asked as {item.variant} but never clean")
    return clean[item.item][0].prompt


def _with_clean(perturbed: Pair, clean: dict[int, Pair]) -> tuple[float, float, float, float]:
    before, after = clean[perturbed[0].item]
    return before.score, perturbed[0].score, after.score, perturbed[1].score
