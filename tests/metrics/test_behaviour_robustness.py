"""The gap between what two models lose on perturbed prompts."""

import random

import pytest

from compressor.errors import IntegrityError
from compressor.metrics.behaviour.robustness import robustness_drop, robustness_gap, robustness_gaps
from compressor.reports.items import TaskItem


def test_gap_is_the_mean_difference_of_losses():
    """The baseline loses 1 of 4 items, the candidate 3 of 4: the gap is one half."""
    gap = robustness_gap([1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1])
    assert gap.value == pytest.approx(0.5)
    assert gap.n == 4


def test_a_candidate_that_fails_where_the_baseline_fails_has_no_gap():
    """Paired by item there is nothing left to vary."""
    scores = [float(random.Random(n).random() < 0.7) for n in range(50)]
    gap = robustness_gap([1.0] * 50, scores, [1.0] * 50, scores)
    assert (gap.value, gap.ci95) == (0.0, (0.0, 0.0))


def test_drop_of_one_model():
    """Two of four items lost: one half."""
    assert robustness_drop([1, 1, 1, 1], [0, 1, 0, 1]).value == 0.5


def test_unequal_sides_are_refused():
    """Items have to pair."""
    with pytest.raises(ValueError, match="four times"):
        robustness_gap([1], [1], [1, 1], [1])


def item(number, variant, score, prompt):
    return TaskItem(task="arc", item=number, sha256=prompt, score=score, prompt=prompt, prediction="", variant=variant)


def test_gaps_of_items_leave_out_prompts_that_stayed_the_same():
    """Item 1 was not changed, so the gap rests on items 0 and 2: (1 - 0) - (1 - 1) and (1 - 1) - (1 - 1)."""
    clean = [(0, "a"), (1, "b"), (2, "c")]
    typed = [(0, "aa"), (1, "b"), (2, "cc")]

    def items(scores):
        return [item(n, "clean", 1.0, text) for n, text in clean] + [
            item(n, "typos", score, text) for (n, text), score in zip(typed, scores, strict=True)
        ]

    gap = robustness_gaps(items([1.0, 1.0, 1.0]), items([0.0, 1.0, 1.0])).values["arc"]["typos"]
    assert (gap.value, gap.n) == (0.5, 2)


def test_a_variant_that_changed_nothing_has_a_reason():
    """No number, and why."""
    both = [item(0, "clean", 1.0, "a"), item(0, "drops", 1.0, "a")]
    figures = robustness_gaps(both, both)
    assert figures.values == {"arc": {"drops": None}}
    assert figures.reasons == {"arc.drops": "drops found nothing to change in 1 prompts"}


def test_a_perturbed_item_without_a_clean_one_is_refused():
    """There is nothing to compare it with."""
    alone = [item(4, "drops", 1.0, "a")]
    with pytest.raises(IntegrityError, match="item 4 was asked as drops but never clean"):
        robustness_gaps(alone, alone)
