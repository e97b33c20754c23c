"""What a model did on each item of a task: the lines of items/*.jsonl, and how two models' lines pair.

A line holds the hash of all that was asked, so that two runs can be compared item by item long after the models are
gone: in CI the baseline's model is not needed.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from compressor.errors import IntegrityError

CLEAN = "clean"
ACCURACY, PREFERENCE, SIMILARITY = "accuracy", "preference", "similarity"


@dataclass(frozen=True, kw_only=True)
class TaskItem:
    """One item of a task, as it was asked and as the model answered.

    `score` is 1 for right and 0 for wrong where the task `measures` accuracy; 1 for the stereotype where it measures a
    preference (0.5 on average is ideal); the model's own value where it measures a similarity. `nll` (nats), `brier`
    and `confidence` are of the probabilities that the model gives the choices, None where a task has none. `margin` is
    the distance in nats between the two best answers: within numeric noise of 0 a flip means nothing. `noise` is that
    noise, in nats, as the evaluator knows it. Items that share a passage have one `cluster`.
    """

    task: str
    item: int
    sha256: str
    score: float
    prompt: str
    prediction: str
    measures: str = ACCURACY
    answer: str | None = None
    variant: str = CLEAN  # or the perturbation that the prompt went through
    slice: str | None = None
    cluster: str | None = None
    margin: float | None = None
    noise: float = 0.0
    nll: float | None = None
    brier: float | None = None
    confidence: float | None = None

    def to_json(self) -> dict[str, Any]:
        """One line of items/*.jsonl; what is empty and empty by default is left out."""
        plain = asdict(self)
        return {item.name: plain[item.name] for item in fields(self) if plain[item.name] != item.default}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` gives; raises IntegrityError for anything else."""
        try:
            return cls(**data)
        except TypeError as error:
            raise IntegrityError(f"not an item of a task ({error}): {str(data)[:200]}") from error


ITEMS = "items"  # the folder of a run that holds them: baseline.jsonl and one file for each step


def read_items(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a run's items files, by the name of the step; raises IntegrityError for what is no JSON line."""
    return {path.stem: read_lines(path) for path in sorted((Path(run) / ITEMS).glob("*.jsonl"))}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of one items file; none where a run measured neither texts nor tasks."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise IntegrityError(f"{path}: not JSON lines ({error})") from error


Pair = tuple[TaskItem, TaskItem]  # the baseline's, the candidate's


def task_items(lines: Iterable[dict[str, Any]]) -> list[TaskItem]:
    """The items of tasks among the lines of an items file (lines of text windows have no `task`)."""
    return [TaskItem.from_json(line) for line in lines if "task" in line]


def pair_items(baseline: Sequence[TaskItem], candidate: Sequence[TaskItem]) -> dict[tuple[str, str], list[Pair]]:
    """The same items of two models, by task and variant, in the order of the task.

    Raises IntegrityError where one side has a task or an item that the other has not, or where an item was asked in
    other words: such numbers must not be compared.
    """
    before, after = _by_key(baseline, "the baseline"), _by_key(candidate, "the candidate")
    for key in [*before, *after]:
        if key not in before or key not in after:
            task, variant, item = key
            where = "the candidate" if key not in after else "the baseline"
            raise IntegrityError(f"task {task!r} ({variant}): {where} has no item {item}; measure both alike")
    pairs: dict[tuple[str, str], list[Pair]] = {}
    for key in sorted(before):
        one, other = before[key], after[key]
        if one.sha256 != other.sha256:
            raise IntegrityError(
                f"task {one.task!r} ({one.variant}), item {one.item}: the two were asked different things "
                f"(baseline {one.sha256[:12]}, candidate {other.sha256[:12]}); measure both alike"
            )
        pairs.setdefault((one.task, one.variant), []).append((one, other))
    return pairs


def _by_key(items: Sequence[TaskItem], whose: str) -> dict[tuple[str, str, int], TaskItem]:
    found: dict[tuple[str, str, int], TaskItem] = {}
    for item in items:
        key = (item.task, item.variant, item.item)
        if key in found:
            raise IntegrityError(f"task {item.task!r} ({item.variant}): {whose} has item {item.item} twice")
        found[key] = item
    return found
