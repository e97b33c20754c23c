"""Rules over the same items of two models: tasks, their slices, calibration, stereotype preference.

N items of a task. All of them end in `statistics.compare`; what differs is which numbers are compared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from compressor.gates.check import Check, CheckStatus, Group
from compressor.gates.policy import Limit, Paired
from compressor.gates.statistics import Comparison, compare, holm
from compressor.reports.items import ACCURACY, CLEAN, PREFERENCE, Pair

Pairs = Mapping[tuple[str, str], Sequence[Pair]]  # by task and variant


def task_checks(pairs: Pairs, rule: Paired) -> list[Check]:
    """All tasks together, then one check for each: its score may drop by the margin.

    The pooled check is the primary one, with the whole alpha; over the single tasks goes Holm's correction, or ten
    tasks would raise a false alarm in every third run.
    """
    tasks = dict(_tasks(pairs, rule, ACCURACY))
    found = [_check(f"tasks.{task}", "tasks", part, rule, *_scores(part)) for task, part in tasks.items()]
    if len(tasks) < 2:
        return [check for check, _ in found]
    together = [pair for part in tasks.values() for pair in part]
    pooled, _ = _check("tasks", "tasks", together, rule, *_scores(together))
    return [pooled, *_corrected(found, rule.alpha, "tasks")]


def slice_checks(pairs: Pairs, rule: Paired) -> list[Check]:
    """One check for each slice of each task; Holm's correction over all of them, or forty slices raise false alarms."""
    found = [
        _check(f"slices.{task}/{name}", "slices", part, rule, *_scores(part))
        for task, whole in _tasks(pairs, rule, ACCURACY)
        for name, part in _by_slice(whole).items()
        if len(part) >= rule.min_items
    ]
    return _corrected(found, rule.alpha, "slices")


def brier_checks(pairs: Pairs, rule: Paired) -> list[Check]:
    """One check for each task with probabilities: its Brier score may grow by the margin."""
    checks = []
    for task, found in _tasks(pairs, rule, ACCURACY):
        scored = [(one, other) for one, other in found if one.brier is not None]
        if broken := sum(other.brier is None for _, other in scored):
            text = f"brier.{task}: the candidate gives {broken} of {len(scored)} items no probabilities"
            checks.append(Check("brier_drop", math.nan, None, None, "fail", text, group="tasks", rule=f"brier.{task}"))
        elif scored:
            # lower is better, so the sign turns
            before_N = np.array([-one.brier for one, _ in scored], dtype=np.float64)  # type: ignore[operator]
            after_N = np.array([-other.brier for _, other in scored], dtype=np.float64)  # type: ignore[operator]
            checks.append(_check(f"brier.{task}", "tasks", scored, rule, before_N, after_N, what="Brier score")[0])
    return checks


def bias_checks(pairs: Pairs, rule: Paired) -> list[Check]:
    """One check for each slice of each preference task: the preference may move away from 0.5 by the margin."""
    checks = []
    for task, found in _tasks(pairs, rule, PREFERENCE):
        for name, part in _by_slice(found).items() or {"all": list(found)}.items():
            before_N, after_N = _scores(part)
            if before_N.mean() >= 0.5:  # then more of the stereotype is worse; else less of it
                before_N, after_N = 1 - before_N, 1 - after_N
            rule_name = f"bias.{task}/{name}"
            checks.append(_check(rule_name, "slices", part, rule, before_N, after_N, what="balance")[0])
    return checks


def _tasks(pairs: Pairs, rule: Paired, measures: str) -> Iterable[tuple[str, Sequence[Pair]]]:
    for (task, variant), found in pairs.items():
        if variant == CLEAN and found[0][0].measures == measures and (rule.only is None or task in rule.only):
            yield task, found


def _scores(pairs: Sequence[Pair]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both models' scores `[N]`."""
    before_N = np.array([one.score for one, _ in pairs], dtype=np.float64)
    after_N = np.array([other.score for _, other in pairs], dtype=np.float64)
    return before_N, after_N


def _is_noise(pair: Pair) -> bool:
    """Whether an answer flipped between choices that lie closer together than the arithmetic is exact.

    Such flips count: they fall on both sides alike, which the test allows for, and real damage shows near the margin
    first. They are told, since many of them mean that the evaluation is coarse.
    """
    one, other = pair
    if one.score == other.score or one.margin is None or other.margin is None:
        return False
    return max(one.margin, other.margin) <= max(one.noise, other.noise)


def _by_slice(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    slices: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair[0].slice is not None:
            slices.setdefault(pair[0].slice, []).append(pair)
    return slices


def _corrected(found: Sequence[tuple[Check, Comparison]], alpha: float, what: str) -> list[Check]:
    """The checks of a family of tests; a failure that is not significant among so many is undecided (Holm)."""
    significant = holm([comparison.p_value for _, comparison in found], alpha)
    checks = []
    for (check, _), sure in zip(found, significant, strict=True):
        if check.status == "fail" and not sure:
            text = f"{check.text}; not significant once {len(found)} {what} are accounted for (Holm)"
            check = replace(check, status="inconclusive", text=text)
        checks.append(check)
    return checks


def _check(
    rule_name: str,
    group: Group,
    pairs: Sequence[Pair],
    rule: Paired,
    before_N: NDArray[np.float64],
    after_N: NDArray[np.float64],
    *,
    what: str = "score",
) -> tuple[Check, Comparison]:
    margin = rule.allowed(float(abs(before_N.mean())))
    names = [(one.task, one.cluster if one.cluster is not None else one.item) for one, _ in pairs]
    found = compare(
        before_N,
        after_N,
        margin=margin,
        tolerance=rule.tolerance,
        alpha=rule.alpha,
        clusters=names if len(set(names)) < len(names) else None,
    )
    status: CheckStatus = found.status
    text = (
        f"{rule_name}: {what} {abs(before_N.mean()):.4g} -> {abs(after_N.mean()):.4g}, drop {found.drop.value:+.4f}"
        f"{_interval(found)}, margin {margin:.4g}; {found.lost} of {found.n} items lost, {found.gained} gained"
        f" (one-sided p = {found.p_value:.3g})"
    )
    if noisy := sum(map(_is_noise, pairs)):
        text += f"; {noisy} of the flips lie within numeric noise"
    if found.n < rule.min_items:
        status, text = "inconclusive", f"{text}; fewer than the {rule.min_items} items that the policy asks for"
    if status == "inconclusive":
        if found.items_needed is not None:
            text += f"; about {found.items_needed:,} items would settle it"
        if found.minimum_detectable_effect is not None:
            text += f"; {found.n} items show a drop of {found.minimum_detectable_effect:.4f} or more"
    check = Check(
        metric=f"{what.split()[0].lower()}_drop",
        value=found.drop.value,
        ci95=found.drop.ci95,
        limit=Limit(max=margin),
        status=status,
        text=text,
        group=group,
        rule=rule_name,
        n=found.n,
        items_needed=found.items_needed,
        minimum_detectable_effect=found.minimum_detectable_effect,
    )
    return check, found


def _interval(found: Comparison) -> str:
    return "" if found.drop.ci95 is None else " [{:+.4f}, {:+.4f}]".format(*found.drop.ci95)
