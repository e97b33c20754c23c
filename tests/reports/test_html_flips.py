"""Which answers changed: counted from pairs of items, with an interval that holds what it promises."""

import math

import numpy as np
import pytest

from compressor.errors import IntegrityError
from compressor.reports.html.flips import Change, browse, shortened
from compressor.reports.html.reliability import equal_mass_bins, reliabilities
from compressor.reports.items import PREFERENCE, TaskItem


def an_item(number: int, score: float, **others) -> dict:
    item = {
        "task": "arc",
        "item": number,
        "sha256": f"{number:064x}",
        "score": score,
        "prompt": f"question {number}",
        "prediction": "right" if score else "wrong",
        "answer": "right",
    }
    return item | others


def scored(*scores: float, **others) -> list[dict]:
    return [an_item(number, score, **others) for number, score in enumerate(scores)]


def a_change(n: int, right_to_wrong: int, wrong_to_right: int) -> Change:
    return Change(
        task="arc",
        variant="clean",
        slice=None,
        n=n,
        right_before=right_to_wrong,
        right_to_wrong=right_to_wrong,
        wrong_to_right=wrong_to_right,
        wrong_to_other=0,
    )


def browsed(before: list[dict], after: list[dict], **steps: list[dict]):
    return browse({"baseline": before, **steps, "last": after}, [*steps, "last"])


def test_every_kind_of_change_is_counted():
    """Of five items two are lost, one is gained, one is wrong in another way, one stays right."""
    before, after = scored(1, 1, 0, 0, 1), scored(0, 0, 1, 0, 1)
    after[3]["prediction"] = "wrong in another way"
    (change,) = browsed(before, after).changes()
    assert (change.n, change.right_before, change.right_after) == (5, 3, 2)
    assert (change.right_to_wrong, change.wrong_to_right, change.wrong_to_other) == (2, 1, 1)
    assert change.difference.value == pytest.approx(-0.2)


@pytest.mark.parametrize(("lost", "gained", "least"), [(0.06, 0.02, 0.94), (0.01, 0.01, 0.94), (0.10, 0.0, 0.93)])
def test_the_interval_of_a_difference_covers(lost, gained, least):
    """In 4,000 draws of 200 items the interval holds the true difference in 94 %, in 93 % if none is gained."""
    draws = np.random.default_rng(0).multinomial(200, [lost, gained, 1 - lost - gained], size=4000)
    ends = [a_change(200, int(a), int(b)).difference.ci95 for a, b, _ in draws]
    assert np.mean([low <= gained - lost <= high for low, high in ends]) >= least


def test_no_flip_is_no_certainty():
    """Fifty items without a flip leave room for a loss of a few points."""
    low, high = a_change(50, 0, 0).difference.ci95
    assert low == -high
    assert 0.03 < high < 0.06


def test_losses_come_first_and_the_tasks_take_turns():
    """A list that is cut keeps the clearest loss of every task."""
    before = [*scored(1, 1, 0), *scored(1, 0, task="piqa")]
    after = [*scored(0, 0, 1), *scored(0, 1, task="piqa")]
    for place, margin in ((0, 1.0), (1, 3.0)):
        before[place]["margin"] = after[place]["margin"] = margin
    flips = browsed(before, after).flips()
    order = [(flip.before.task, flip.before.item, flip.is_loss) for flip in flips]
    assert order == [("arc", 1, True), ("piqa", 0, True), ("arc", 0, True), ("arc", 2, False), ("piqa", 1, False)]


def test_flips_within_noise_come_last_and_say_so():
    """Both margins at or below the noise: the arithmetic alone may have turned the answer."""
    before = scored(1, 1, margin=1e-5, noise=1e-4)
    after = [an_item(0, 0, margin=5e-5, noise=1e-4), an_item(1, 0, margin=2e-4, noise=1e-4)]
    flips = browsed(before, after).flips()
    assert [(flip.before.item, flip.is_within_noise) for flip in flips] == [(1, False), (0, True)]


def test_a_flip_knows_since_which_step():
    """Lost in the first step, regained in the second and lost again in the last: since the last."""
    browser = browsed(scored(1, 1), scored(0, 0), prune=scored(0, 0), distil=scored(0, 1))
    assert {flip.before.item: flip.since for flip in browser.flips()} == {0: "prune", 1: "last"}


def test_perturbed_prompts_are_counted_but_not_browsed():
    """The flips of a variant stand in the table only."""
    typos = {"variant": "typos"}
    browser = browsed(scored(1) + scored(1, 1, **typos), scored(1) + scored(0, 0, **typos))
    assert [(change.variant, change.right_to_wrong) for change in browser.changes()] == [("clean", 0), ("typos", 2)]
    assert browser.flips() == []


@pytest.mark.parametrize("others", [{"measures": PREFERENCE}, {"score": 0.7}])
def test_what_is_not_right_or_wrong_cannot_flip(others):
    """A preference or a similarity is no mistake."""
    graded = [an_item(0, 0.0, task="sts") | others]
    browser = browsed(scored(1) + graded, [*scored(1), graded[0] | {"score": 1.0}])
    assert browser.tasks() == ["arc"]
    assert browser.graded == ("sts",)


def test_slices_are_sorted_by_their_loss():
    """The slice that lost most stands first; items without a slice belong to none."""
    before = [*scored(1, 1), an_item(2, 1, slice="b"), an_item(3, 1, slice="b"), an_item(4, 1, slice="a")]
    after = [*scored(0, 0), an_item(2, 1, slice="b"), an_item(3, 0, slice="b"), an_item(4, 0, slice="a")]
    slices = browsed(before, after).slices()
    assert [(change.slice, change.difference.value) for change in slices] == [("a", -1.0), ("b", -0.5)]


def test_without_items_of_tasks_there_is_nothing_to_browse():
    """Lines of text windows are no items, and a step that was not measured has none."""
    assert browsed([{"text": "wiki", "window": 0}], scored(1)) is None
    assert browse({"baseline": scored(1)}, ["quantize"]) is None


def test_items_that_were_asked_differently_do_not_pair():
    """Comparing them would show flips that are none."""
    with pytest.raises(IntegrityError, match="asked different things"):
        browsed(scored(1), scored(0, sha256="f" * 64))


def test_a_long_prompt_keeps_its_ends():
    """The middle goes, and how much of it is said."""
    assert shortened("a" * 10 + "b" * 1000 + "c" * 10, 10, 10) == (
        "a" * 10 + "\n[… 1,000 characters left out …]\n" + "c" * 10
    )
    assert shortened("short", 10, 10) == "short"


def confident(*pairs: tuple[float, float]) -> list[TaskItem]:
    items = [an_item(number, score, confidence=confidence) for number, (confidence, score) in enumerate(pairs)]
    return [TaskItem.from_json(item) for item in items]


@pytest.mark.parametrize(("n", "count"), [(9, 1), (23, 2), (50, 5), (210, 5), (403, 10), (5000, 10)])
def test_bins_hold_equally_many_items(n, count):
    """Sizes differ by one at most, no item is lost, and a bin's figures are the means of its items."""
    generator = np.random.default_rng(n)
    values = [(float(c), float(s)) for c, s in zip(generator.random(n), generator.random(n) < 0.6, strict=True)]
    bins = equal_mass_bins(confident(*values))
    sizes = [one.n for one in bins]
    assert len(bins) == count
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1
    lowest = sorted(values)[: sizes[0]]
    assert bins[0].confidence == pytest.approx(sum(c for c, _ in lowest) / sizes[0])
    assert bins[0].accuracy == pytest.approx(sum(s for _, s in lowest) / sizes[0])


@pytest.mark.parametrize("right", [0, 3, 17, 19])
def test_the_interval_of_a_bin_is_that_of_a_score_test(right):
    """At either end p of the interval the share lies 1.96 standard errors of p away (Wilson's definition)."""
    (one,) = equal_mass_bins(confident(*((0.5, float(place < right)) for place in range(19))))
    for end in one.ci95:
        reach = 1.959964 * math.sqrt(end * (1 - end) / 19)
        assert abs(right / 19 - end) == pytest.approx(reach, abs=1e-7)


def test_items_without_confidence_draw_no_diagram():
    """NaN and None are left out; fewer than ten items are too few."""
    browser = browsed(scored(*[1] * 12, confidence=0.9), scored(*[1] * 12, confidence=0.8))
    assert [one.n for one in reliabilities(browser.pairs)] == [12]
    assert reliabilities(browsed(scored(*[1] * 12), scored(*[1] * 12)).pairs) == []
    broken = scored(*[1] * 12, confidence=math.nan)
    assert reliabilities(browsed(scored(*[1] * 12, confidence=0.9), broken).pairs) == []
