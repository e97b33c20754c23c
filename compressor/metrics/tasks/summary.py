"""From the items of tasks to their figures: scores, calibration, slices, robustness, flips against a baseline."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from compressor.metrics.bootstrap import bootstrap_mean, mapped
from compressor.metrics.tasks.calibration import Bin, calibration_error, reliability
from compressor.metrics.tasks.judging import NOT_A_NUMBER
from compressor.reports.estimate import Estimate
from compressor.reports.items import ACCURACY, CLEAN, PREFERENCE, Pair, TaskItem, pair_items

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class TasksResult:
    """What a model did on its tasks; all figures follow from the items.

    `tasks` are shares of right answers, `bias` shares of stereotypical preferences (0.5 is ideal), `perplexity` that of
    the words which cloze tasks ask. `calibration` has nll, brier, ece and overconfidence by task, where a task has
    them. `robustness` is the figure of `tasks` for every perturbation. `noise` is in nats. `reasons` says why a task
    has no items, `notes` what a reader of the figures should know.
    """

    items: list[TaskItem] = field(repr=False)
    tasks: dict[str, Estimate]
    bias: dict[str, Estimate]
    perplexity: dict[str, Estimate]
    calibration: dict[str, dict[str, Estimate]]
    reliability: dict[str, list[Bin]]
    slices: dict[str, dict[str, Estimate]]
    robustness: dict[str, dict[str, Estimate]]
    noise: dict[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def summarise(
    items: Sequence[TaskItem], *, reasons: Mapping[str, str] | None = None, notes: Iterable[str] = ()
) -> TasksResult:
    """The figures of items, new or read from a file. Intervals resample items, or clusters where items have them."""
    clean = _grouped(items, lambda item: item.task if item.variant == CLEAN else None)
    other = _grouped(items, lambda item: (item.task, item.variant) if item.variant != CLEAN else None)
    right = {task: found for task, found in clean.items() if found[0].measures == ACCURACY}
    robustness: dict[str, dict[str, Estimate]] = {}
    for (task, variant), found in other.items():
        robustness.setdefault(task, {})[variant] = _score(found)
    return TasksResult(
        items=list(items),
        tasks={task: _score(found) for task, found in right.items()},
        bias={task: _score(found) for task, found in clean.items() if found[0].measures == PREFERENCE},
        perplexity={
            task: mapped(_mean(found, lambda item: item.nll), _exp)
            for task, found in right.items()
            if _has(found, "nll") and not _has(found, "confidence")
        },
        calibration={task: figures for task, found in right.items() if (figures := _calibration(found))},
        reliability={
            task: reliability([item.confidence or 0.0 for item in found], [item.score for item in found])
            for task, found in right.items()
            if all(item.confidence is not None for item in found)
        },
        slices={
            task: {name: _score(part) for name, part in sorted(_grouped(found, lambda item: item.slice).items())}
            for task, found in clean.items()
            if any(item.slice is not None for item in found)
        },
        robustness=robustness,
        noise={task: max(item.noise for item in found) for task, found in clean.items()},
        reasons=dict(reasons or {}),
        notes=(*notes, *_broken(clean)),
    )


def flips(baseline: Sequence[TaskItem], items: Sequence[TaskItem]) -> dict[str, dict[str, int]]:
    """How many items changed, by task: from right to wrong, back, from one wrong answer to another.

    `within_noise` counts the changes whose two best answers are, on both sides, as near as numeric noise. Items with
    perturbed prompts and preferences, which are neither right nor wrong, do not count. IntegrityError where the two
    sides were asked different things.
    """
    pairs = pair_items(*([item for item in side if _counts(item)] for side in (baseline, items)))
    return {task: _changes(found) for (task, _), found in pairs.items()}


def _counts(item: TaskItem) -> bool:
    return item.variant == CLEAN and item.measures == ACCURACY


def _changes(pairs: Sequence[Pair]) -> dict[str, int]:
    changed = [(before, after) for before, after in pairs if before.score != after.score]
    both_wrong = [(before, after) for before, after in pairs if before.score == after.score == 0]
    return {
        "right_to_wrong": sum(before.score > after.score for before, after in changed),
        "wrong_to_right": sum(before.score < after.score for before, after in changed),
        "wrong_to_other": sum(before.prediction != after.prediction for before, after in both_wrong),
        "within_noise": sum(
            all(item.margin is not None and item.margin <= item.noise for item in pair) for pair in changed
        ),
        "n": len(pairs),
    }


def _calibration(items: Sequence[TaskItem]) -> dict[str, Estimate]:
    figures: dict[str, Estimate] = {}
    if _has(items, "nll"):
        figures["nll"] = _mean(items, lambda item: item.nll)
    if _has(items, "brier"):
        figures["brier"] = _mean(items, lambda item: item.brier)
    if _has(items, "confidence"):
        confidence = [math.nan if item.confidence is None else item.confidence for item in items]
        correct = [item.score for item in items]
        finite = all(map(math.isfinite, confidence))
        figures["ece"] = calibration_error(confidence, correct) if finite else Estimate(math.nan, None, len(items))
        figures["overconfidence"] = _mean(
            items, lambda item: None if item.confidence is None else item.confidence - item.score
        )
    return figures


def _score(items: Sequence[TaskItem]) -> Estimate:
    return _mean(items, lambda item: item.score)


def _mean(items: Sequence[TaskItem], value: Callable[[TaskItem], float | None]) -> Estimate:
    """The mean over items; those of one cluster are resampled together, and `n` counts what is resampled.

    One item without a finite value makes the mean NaN: a broken model must not look better for its broken items.
    """
    values = np.array([math.nan if (found := value(item)) is None else found for item in items], dtype=np.float64)
    if not np.isfinite(values).all():
        return Estimate(math.nan, None, len(values))
    if all(item.cluster is None for item in items):
        return bootstrap_mean(values)
    names = [("alone", n) if item.cluster is None else ("cluster", item.cluster) for n, item in enumerate(items)]
    place = {name: number for number, name in enumerate(dict.fromkeys(names))}
    cluster_N = np.array([place[name] for name in names])
    sizes = np.bincount(cluster_N).astype(np.float64)
    return bootstrap_mean(np.bincount(cluster_N, weights=values) / sizes, sizes)


def _has(items: Sequence[TaskItem], figure: str) -> bool:
    return any(getattr(item, figure) is not None for item in items)


def _grouped(items: Iterable[TaskItem], key: Callable[[TaskItem], Key | None]) -> dict[Key, list[TaskItem]]:
    groups: dict[Key, list[TaskItem]] = {}
    for item in items:
        if (found := key(item)) is not None:
            groups.setdefault(found, []).append(item)
    return groups


def _broken(clean: Mapping[str, Sequence[TaskItem]]) -> Iterable[str]:
    for task, items in clean.items():
        bad = [item.item for item in items if item.prediction == NOT_A_NUMBER]
        if bad:
            yield f"{task}: log-likelihoods are not numbers in {len(bad)} of {len(items)} items, first in {bad[0]}"


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 or math.isnan(nats) else math.inf  # a float ends at exp(709.8)
