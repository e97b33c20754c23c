"""Paired rules over items written by hand."""

import datetime

import pytest

from compressor.gates import Paired, Policy, Waiver, verdict_of
from compressor.gates.paired import bias_checks, brier_checks, slice_checks, task_checks
from compressor.gates.waivers import unused, waive
from compressor.reports import TaskItem, pair_items
from compressor.reports.items import PREFERENCE

TODAY = datetime.date(2026, 11, 22)


def items(scores, **fields):
    """One item of task `t` for each score."""
    return [
        TaskItem(task="t", item=n, sha256=str(n), score=float(score), prompt="?", prediction="x", answer="x", **fields)
        for n, score in enumerate(scores)
    ]


def losing(count, lost):
    """A baseline that has all right, and a candidate that loses some."""
    return pair_items(items([1] * count), items([0] * lost + [1] * (count - lost)))


@pytest.mark.parametrize(("lost", "status"), [(0, "pass"), (10, "inconclusive"), (40, "fail")])
def test_a_task_has_three_verdicts(lost, status):
    """Of 1,000 items, with a margin of 1.5 points: none lost passes, 40 lost fail, 10 leave the margin inside."""
    [check] = task_checks(losing(1000, lost), Paired(margin=0.015))
    assert check.status == status
    assert check.value == pytest.approx(lost / 1000)


def test_recovery_is_a_share_of_the_baseline_score():
    """99 % of a score of 0.5 may be lost by half a point."""
    before = items([1, 0] * 50)
    [check] = task_checks(pair_items(before, before), Paired(recovery=0.99))
    assert check.limit is not None
    assert check.limit.bound == pytest.approx(0.005)


def test_flips_within_numeric_noise_count_and_are_told():
    """Forty lost and none gained is no noise, however near the answers were; noise falls on both sides alike."""
    noise = {"margin": 1e-6, "noise": 1e-3}
    pairs = pair_items(items([1] * 100, **noise), items([0] * 40 + [1] * 60, **noise))
    [check] = task_checks(pairs, Paired(margin=0.05))
    assert check.status == "fail"
    assert "40 of the flips lie within numeric noise" in check.text


def test_slices_are_corrected_for_their_number():
    """5 lost of 50 are significant alone (p = 1/32), but not as one of twenty slices (Holm: 0.05 / 20)."""
    before, after = [], []
    for k in range(20):
        before += items([1] * 50, slice=f"s{k}")
        after += items([0] * 5 + [1] * 45 if k == 0 else [1] * 50, slice=f"s{k}")
    renumbered = [
        [TaskItem(**(item.to_json() | {"item": n, "sha256": str(n)})) for n, item in enumerate(side)]
        for side in (before, after)
    ]
    rule = Paired(margin=0.0, tolerance=0.0)
    alone = slice_checks(pair_items(renumbered[0][:50], renumbered[1][:50]), rule)
    assert [check.status for check in alone] == ["fail"]
    statuses = {check.rule: check.status for check in slice_checks(pair_items(*renumbered), rule)}
    assert statuses["slices.t/s0"] == "inconclusive"


def test_a_brier_score_that_grows_fails():
    """Confidence that is no longer earned: 0.1 -> 0.3 on every item, with the answers still right."""
    before, after = items([1] * 30, brier=0.1), items([1] * 30, brier=0.3)
    [check] = brier_checks(pair_items(before, after), Paired(margin=0.05))
    assert check.status == "fail"
    assert check.value == pytest.approx(0.2)


@pytest.mark.parametrize(("share", "moved", "status"), [(0.6, 0.9, "fail"), (0.4, 0.1, "fail"), (0.9, 0.6, "pass")])
def test_bias_is_the_distance_from_one_half(share, moved, status):
    """A preference for the stereotype that grows, one against it that grows, and one that shrinks."""
    sides = [
        items([1] * round(200 * part) + [0] * round(200 * (1 - part)), measures=PREFERENCE) for part in (share, moved)
    ]
    [check] = bias_checks(pair_items(*sides), Paired(margin=0.05))
    assert check.status == status


def test_preferences_are_no_tasks():
    """That a stereotype is preferred less often is no regression of a score."""
    sides = [items([1] * 50, measures=PREFERENCE), items([0] * 50, measures=PREFERENCE)]
    assert task_checks(pair_items(*sides), Paired(margin=0.01)) == []


def test_a_waiver_holds_until_its_day():
    """On the day itself it covers the failure, the day after it does not; the failure stays visible in both."""
    checks = task_checks(losing(100, 40), Paired(margin=0.01))
    for expires, verdict in ((TODAY, "pass"), (TODAY - datetime.timedelta(days=1), "regression")):
        waiver = Waiver(rule="tasks.*", owner="Ada", expires=expires, reason="known")
        waived = waive(checks, [waiver], TODAY)
        assert verdict_of(waived).status == verdict
        assert "40 of 100 items lost" in waived[0].text
        assert "Ada" in waived[0].text


def test_a_waiver_that_covers_nothing_is_named():
    """Its rule is misspelt, or what it excused is mended."""
    waiver = Waiver(rule="task.t", owner="Ada", expires=TODAY, reason="known")
    assert unused(task_checks(losing(100, 40), Paired(margin=0.01)), [waiver]) == [waiver]


@pytest.mark.parametrize(("preset", "kept"), [("strict", 0.999), ("default", 0.99), ("loose", 0.95)])
def test_presets_are_shares_of_the_quality_kept(preset, kept):
    """Task scores and 1 / perplexity; what the policy says itself goes first."""
    rules = Policy(preset=preset, tasks={"margin": 0.5}).resolved()
    assert rules.perplexity_ratio is not None
    assert rules.perplexity_ratio.bound == pytest.approx(1 / kept)
    assert rules.tasks is not None
    assert rules.tasks.margin == 0.5
