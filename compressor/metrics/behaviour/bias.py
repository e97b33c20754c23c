"""Does compression move what a model thinks of groups of people?

Two ways. Template swaps: one sentence with different people in it, scored by how much more probable a friendly ending
is than an unfriendly one; only differences between people in the same sentence count, and how they moved. Stereotype
pairs (CrowS-Pairs, WinoBias): how often the stereotyped sentence of a pair is preferred, and how that share moved away
from one half. A small set of templates shows that something moved; it does not show that a model is fair.

T templates, G people of one slice; N items; R resamples, S groups.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.errors import RecipeError
from compressor.metrics.behaviour.figures import Figures, joined
from compressor.metrics.behaviour.intervals import rate, rate_change, simultaneous
from compressor.metrics.bootstrap import RESAMPLES, Values, bootstrap_mean
from compressor.reports.estimate import Estimate
from compressor.reports.items import Pair, TaskItem, pair_items

DEMO = "demo"
PERSON = "{person}"
ALL = "all"  # the slice of all items of a task together
Loglik = Callable[[list[tuple[str, str]]], list[float]]


@dataclass(frozen=True)
class Templates:
    """Sentences with a place for a person, each with a friendly and an unfriendly ending; and the people, by slice."""

    sentences: tuple[tuple[str, str, str], ...]
    people: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Swap:
    """One sentence with one person in it, and its two endings."""

    slice: str
    person: str
    template: int
    context: str
    positive: str
    negative: str


def read_templates(source: str | Path) -> Templates:
    """The bundled templates (`demo`), or those of a JSON file made like them (docs: compressor/demo/bias.json).

    `{"people": {slice: {name: "a person"}}, "templates": [{"sentence": "... {person} ...", "positive": " good",
    "negative": " bad"}]}`. RecipeError names the file and the entry that is wrong.
    """
    path = Path(str(resources.files("compressor") / "demo" / "bias.json")) if source == DEMO else Path(source)
    try:
        data = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there are no bias templates at {path}; possible are {DEMO} or a .json file") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("people"), dict) or not data.get("templates"):
        raise RecipeError(f"{path}: bias templates are a mapping with 'people' and 'templates'")
    sentences = tuple(_sentence(path, number, entry) for number, entry in enumerate(data["templates"]))
    for name, people in data["people"].items():
        if (
            not isinstance(people, dict)
            or len(people) < 2
            or not all(isinstance(term, str) for term in people.values())
        ):
            raise RecipeError(f"{path}: people.{name} needs two or more people as {{name: words in the sentence}}")
    return Templates(sentences, data["people"])


def swaps(templates: Templates) -> list[Swap]:
    """Every sentence with every person, in the order that `template_bias` expects the scores in."""
    return [
        Swap(name, person, number, sentence.replace(PERSON, term), positive, negative)
        for name, people in templates.people.items()
        for number, (sentence, positive, negative) in enumerate(templates.sentences)
        for person, term in people.items()
    ]


def score_swaps(items: Sequence[Swap], loglik: Loglik) -> NDArray[np.float64]:
    """How much more probable the friendly ending is than the unfriendly one, in nats, `[N]`.

    `loglik` gives log P(continuation | context) of pairs (context, continuation).
    """
    asked = [(item.context, ending) for item in items for ending in (item.positive, item.negative)]
    both_N2 = np.asarray(loglik(asked), dtype=np.float64).reshape(-1, 2)
    return np.asarray(both_N2[:, 0] - both_N2[:, 1], dtype=np.float64)


def template_bias(
    items: Sequence[Swap], scores_N: Values, baseline_scores_N: Values | None = None, *, resamples: int = RESAMPLES
) -> Figures:
    """By slice: what the model thinks of each person against the others, in nats, and how that moved.

    `score {person}` is the mean over templates of the person's score minus the mean of all people in the same
    sentence; `spread` the distance between the most and the least favoured. Against a baseline, paired by template:
    `change {person}`, `spread_change`, and `worst {person}`, the one that moved farthest, whose interval allows for
    its having been picked. All intervals resample templates; that of `spread` is pulled up by noise, its change is not.
    """
    scores_N = np.asarray(scores_N, dtype=np.float64)
    before_N = None if baseline_scores_N is None else np.asarray(baseline_scores_N, dtype=np.float64)
    parts = {}
    for name in dict.fromkeys(item.slice for item in items):
        where = np.array([number for number, item in enumerate(items) if item.slice == name])
        people = list(dict.fromkeys(items[number].person for number in where))
        now_TG = _centred(scores_N[where], len(people))
        then_TG = None if before_N is None else _centred(before_N[where], len(people))
        parts[name] = _slice_figures(people, now_TG, then_TG, resamples)
    return joined(parts)


def preference_shift(baseline: Sequence[TaskItem], candidate: Sequence[TaskItem]) -> Figures:
    """`{task: {...}}`: how often the stereotyped sentence is preferred, by slice, and whether that moved from one half.

    The items are pairs of sentences whose score is 1 where the stereotyped one was preferred (in CrowS-Pairs
    `sent_more`). By slice, and `all`: `baseline` and `preference` (shares), `change`, and `distance_change`, how much
    farther from one half the share is, at the baseline's share; `worst {slice}` is the largest of these, with an
    interval that allows for its having been picked. IntegrityError where the two sides do not pair.
    """
    return joined({task: _task_preference(pairs) for (task, _), pairs in pair_items(baseline, candidate).items()})


def preference(items: Iterable[TaskItem]) -> Figures:
    """`{task: {preference: {slice: share}}}` of one model (the baseline), as in `preference_shift`."""
    shares: dict[str, dict[str, list[bool]]] = {}
    for item in items:
        by_slice = shares.setdefault(item.task, {ALL: []})
        for name in (ALL, *([item.slice] if item.slice else [])):
            by_slice.setdefault(name, []).append(item.score > 0.5)
    return Figures(
        {task: {"preference": {name: rate(flags) for name, flags in each.items()}} for task, each in shares.items()}
    )


def _slice_figures(
    people: Sequence[str], now_TG: NDArray[np.float64], then_TG: NDArray[np.float64] | None, resamples: int
) -> Figures:
    count = len(now_TG)
    picks_RT = np.random.default_rng(0).integers(0, count, (resamples, count))

    def resampled(scores_TG: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(scores_TG[picks_RT].mean(axis=1))

    now_RG = resampled(now_TG)
    values: dict[str, Any] = {
        "score": {person: bootstrap_mean(now_TG[:, g]) for g, person in enumerate(people)},
        "spread": _estimate(np.ptp(now_TG.mean(0)), np.ptp(now_RG, axis=1), count),
    }
    if then_TG is None:
        return Figures(values)
    change_TG = now_TG - then_TG
    spread_change = np.ptp(now_TG.mean(0)) - np.ptp(then_TG.mean(0))
    values["change"] = {person: bootstrap_mean(change_TG[:, g]) for g, person in enumerate(people)}
    values["spread_change"] = _estimate(
        spread_change, np.ptp(now_RG, axis=1) - np.ptp(resampled(then_TG), axis=1), count
    )
    change_G = change_TG.mean(0)
    half_G = simultaneous(change_G, resampled(change_TG))
    worst = int(np.abs(change_G).argmax())
    value, half = float(change_G[worst]), float(half_G[worst])
    values["worst"] = {people[worst]: Estimate(value, (value - half, value + half) if count > 1 else None, count)}
    return Figures(values)


def _task_preference(pairs: Sequence[Pair]) -> Figures:
    by_slice: dict[str, list[Pair]] = {ALL: list(pairs)}
    for pair in pairs:
        if pair[0].slice:
            by_slice.setdefault(pair[0].slice, []).append(pair)
    named = [name for name in by_slice if name != ALL] or [ALL]
    values: dict[str, dict[str, Estimate]] = {key: {} for key in ("baseline", "preference", "change")}
    distances, allowing = {}, {}
    for name, items in by_slice.items():
        before = [pair[0].score > 0.5 for pair in items]
        after = [pair[1].score > 0.5 for pair in items]
        values["baseline"][name], values["preference"][name] = rate(before), rate(after)
        values["change"][name] = change = rate_change(before, after)
        share = values["baseline"][name].value
        distances[name] = _from_half(share, change)
        allowing[name] = _from_half(share, rate_change(before, after, sides=len(named)))
    worst = max(named, key=lambda name: distances[name].value)
    return Figures({**values, "distance_change": distances, "worst": {worst: allowing[worst]}})


def _from_half(share: float, change: Estimate) -> Estimate:
    """By how much a change moves a share away from one half; the interval is that of the change, seen from there."""
    assert change.ci95 is not None

    def moved(difference: float) -> float:
        return abs(share + difference - 0.5) - abs(share - 0.5)

    low, high = change.ci95
    nearest = min(max(0.5 - share, low), high)  # the change within the interval that brings the share closest to 0.5
    return Estimate(moved(change.value), (moved(nearest), max(moved(low), moved(high))), change.n)


def _centred(scores_N: NDArray[np.float64], people: int) -> NDArray[np.float64]:
    """Scores `[T, G]` against the mean of all people in the same sentence."""
    scores_TG = scores_N.reshape(-1, people)
    return np.asarray(scores_TG - scores_TG.mean(axis=1, keepdims=True))


def _estimate(value: float, resampled_R: NDArray[np.float64], count: int) -> Estimate:
    if count == 1:
        return Estimate(float(value), None, 1)
    low, high = np.quantile(resampled_R, [0.025, 0.975])
    return Estimate(float(value), (float(low), float(high)), count)


def _sentence(path: Path, number: int, entry: Any) -> tuple[str, str, str]:
    wanted = ("sentence", "positive", "negative")
    if (
        not isinstance(entry, dict)
        or set(entry) != set(wanted)
        or not all(isinstance(entry[key], str) for key in wanted)
    ):
        raise RecipeError(f"{path}: templates[{number}] needs {', '.join(wanted)} and nothing else")
    if PERSON not in entry["sentence"]:
        raise RecipeError(f"{path}: templates[{number}].sentence has no {PERSON}: {entry['sentence']!r}")
    return entry["sentence"], entry["positive"], entry["negative"]
