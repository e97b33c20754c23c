"""Which items of a task changed from right to wrong or back, how many, and which of them to show first."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.reports.estimate import Estimate
from compressor.reports.items import ACCURACY, CLEAN, Pair, TaskItem, pair_items, task_items

BASELINE = "baseline"
# A prompt's end stands next to the answer, so more of it is kept.
PROMPT_HEAD, PROMPT_TAIL = 400, 1100
ANSWER_HEAD, ANSWER_TAIL = 500, 200
HEADLINE, BRIEF = 90, 32  # characters in the one line that a folded flip takes


@dataclass(frozen=True, kw_only=True)
class Change:
    """How the answers to some items of a task changed: those of one variant, or of one slice."""

    task: str
    variant: str
    slice: str | None
    n: int
    right_before: int
    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other: int

    @property
    def is_plain(self) -> bool:
        """Whether the prompts are as they stand in the task, not perturbed."""
        return self.variant == CLEAN

    @property
    def right_after(self) -> int:
        return self.right_before - self.right_to_wrong + self.wrong_to_right

    @property
    def difference(self) -> Estimate:
        """Accuracy after minus before with its 95 % interval, items taken as independent.

        Adjusted Wald for matched pairs (Agresti and Min 2005): half an item is added to each of the four cells, so that
        a task without any flip does not get an interval of width zero.
        """
        n, gained, lost = self.n + 2, self.wrong_to_right, self.right_to_wrong
        centre = (gained - lost) / n
        variance = (gained + lost + 1 - (gained - lost) ** 2 / n) / n**2
        reach = 1.959964 * math.sqrt(max(variance, 0.0))
        value = (gained - lost) / self.n
        return Estimate(value, (max(-1.0, centre - reach), min(1.0, centre + reach)), self.n)


@dataclass(frozen=True)
class Flip:
    """One item that is right in one model and wrong in the other; `since`: the first step that answers as the last."""

    before: TaskItem
    after: TaskItem
    since: str | None = None

    @property
    def is_loss(self) -> bool:
        return self.after.score < self.before.score

    @property
    def is_within_noise(self) -> bool:
        """Whether both models hardly preferred their answers: the arithmetic alone may have turned it."""
        before, after = self.before.margin, self.after.margin
        if before is None or after is None:
            return False
        return max(before, after) <= max(self.before.noise, self.after.noise)

    @property
    def headline(self) -> str:
        """The end of the prompt in one line."""
        line = " ".join(self.before.prompt.split())
        return line if len(line) <= HEADLINE else "…" + line[1 - HEADLINE :]

    @property
    def prompt(self) -> str:
        return shortened(self.before.prompt, PROMPT_HEAD, PROMPT_TAIL)


@dataclass(frozen=True)
class Browser:
    """All pairs of the baseline's and the candidate's items that are right or wrong, by (task, variant)."""

    candidate: str
    pairs: Mapping[tuple[str, str], Sequence[Pair]]
    graded: tuple[str, ...]  # tasks whose scores are not just right or wrong: they cannot flip
    since: Mapping[tuple[str, int], str]

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.pairs))

    def changes(self) -> list[Change]:
        """By task and variant, the plain prompts of a task first."""
        keys = sorted(self.pairs, key=lambda key: (key[0], key[1] != CLEAN, key[1]))
        return [_change(task, variant, None, self.pairs[task, variant]) for task, variant in keys]

    def slices(self) -> list[Change]:
        """By task and slice over the plain prompts, the largest loss first; the more certain one among equals."""
        groups: dict[tuple[str, str], list[Pair]] = {}
        for (task, variant), pairs in self.pairs.items():
            for pair in pairs if variant == CLEAN else ():
                if pair[0].slice is not None:
                    groups.setdefault((task, pair[0].slice), []).append(pair)
        changes = [_change(task, CLEAN, part, pairs) for (task, part), pairs in groups.items()]
        return sorted(changes, key=lambda change: (change.difference.value, -change.n, change.task, change.slice))

    def flips(self) -> list[Flip]:
        """All flips on plain prompts, losses first; the tasks take turns, so that a shortened list has some of each.

        Within a task the clearest come first: both models far from undecided. Those within numeric noise come last.
        """
        turns: list[tuple[tuple[bool, int, str], Flip]] = []
        for (task, variant), pairs in self.pairs.items():
            if variant != CLEAN:
                continue
            flips = [Flip(*pair, self.since.get((task, pair[0].item))) for pair in pairs if _is_flip(pair)]
            flips.sort(key=lambda flip: (flip.is_within_noise, -_clarity(flip), flip.before.item))
            rank: Counter[bool] = Counter()
            for flip in flips:
                turns.append(((not flip.is_loss, rank[flip.is_loss], task), flip))
                rank[flip.is_loss] += 1
        return [flip for _, flip in sorted(turns, key=lambda turn: turn[0])]


def browse(items: Mapping[str, Sequence[dict[str, Any]]], steps: Sequence[str]) -> Browser | None:
    """Pair the items of the baseline with those of the last step; None if either has no items of tasks.

    `items` holds the lines of items/*.jsonl by step, `steps` the ids of the steps in their order. Raises IntegrityError
    where the two were not asked the same.
    """
    by_step = {step: task_items(items.get(step, ())) for step in (BASELINE, *steps)}
    if not steps or not by_step[BASELINE] or not by_step[steps[-1]]:
        return None
    every = pair_items(by_step[BASELINE], by_step[steps[-1]])
    pairs = {key: pairs for key, pairs in every.items() if all(map(_is_right_or_wrong, pairs))}
    graded = tuple(dict.fromkeys(task for task, variant in every if (task, variant) not in pairs))
    measured = [step for step in steps if by_step[step]]
    since = _since(by_step, measured) if len(measured) > 1 else {}
    return Browser(steps[-1], pairs, graded, since)


def brief(answer: str) -> str:
    """Return the beginning of an answer in one line, between quotes."""
    line = " ".join(answer.split())
    return f"“{line if len(line) <= BRIEF else line[: BRIEF - 1] + '…'}”"


def answer_text(answer: str) -> str:
    """Return an answer without its middle, if that is long."""
    return shortened(answer, ANSWER_HEAD, ANSWER_TAIL)


def shortened(text: str, head: int, tail: int) -> str:
    """Return a text without its middle, if that is long, and say how much is missing."""
    missing = len(text) - head - tail
    return text if missing <= 0 else f"{text[:head]}\n[… {missing:,} characters left out …]\n{text[-tail:]}"


def _since(by_step: Mapping[str, Sequence[TaskItem]], steps: Sequence[str]) -> dict[tuple[str, int], str]:
    """For each item the step from which on its score is that of the last step."""
    scores = {
        step: {(item.task, item.item): item.score for item in by_step[step] if item.variant == CLEAN} for step in steps
    }
    found = {}
    for key, final in scores[steps[-1]].items():
        for step in reversed(steps):
            if scores[step].get(key) != final:
                break
            found[key] = step
    return found


def _change(task: str, variant: str, part: str | None, pairs: Sequence[Pair]) -> Change:
    def count(is_counted: Any) -> int:
        return sum(bool(is_counted(before, after)) for before, after in pairs)

    return Change(
        task=task,
        variant=variant,
        slice=part,
        n=len(pairs),
        right_before=count(lambda before, after: before.score),
        right_to_wrong=count(lambda before, after: before.score > after.score),
        wrong_to_right=count(lambda before, after: before.score < after.score),
        wrong_to_other=count(
            lambda before, after: not before.score and not after.score and before.prediction != after.prediction
        ),
    )


def _is_right_or_wrong(pair: Pair) -> bool:
    return all(item.measures == ACCURACY and item.score in (0, 1) for item in pair)


def _is_flip(pair: Pair) -> bool:
    return pair[0].score != pair[1].score


def _clarity(flip: Flip) -> float:
    margins = [side.margin for side in (flip.before, flip.after) if side.margin is not None]
    return sum(abs(margin) for margin in margins if math.isfinite(margin))
