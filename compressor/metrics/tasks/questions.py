"""What is asked of a model, item by item, before it is asked: texts only, no tokens and no model."""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError
from compressor.metrics.tasks.options import (
    Classification,
    Cloze,
    Contexts,
    CrowsPairs,
    Generation,
    Match,
    MinimalPairs,
    MultipleChoice,
    Normalise,
    Task,
    Winobias,
)
from compressor.metrics.tasks.reading import Row, read_rows, read_text
from compressor.metrics.tasks.templates import fill, is_template
from compressor.reports.items import CLEAN

PREFERENCES = ("crows_pairs", "winobias")  # no answer is right: the score says which one is preferred


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What the model is to write, and where it stops."""

    expected: str
    match: Match
    max_new_tokens: int
    stop: tuple[str, ...]

    def accepts(self, text: str) -> bool:
        """Whether a written text is the answer; spaces around it do not count."""
        if self.match == "regex":
            return re.search(self.expected, text) is not None
        expected, text = self.expected.strip(), text.strip()
        return expected in text if self.match == "contains" else expected == text


@dataclass(frozen=True, kw_only=True)
class Question:
    """One item of a task, in full: what the model reads and what it may answer.

    The model reads `solved + prompt + cue`, or one of `contexts` where those are the choices, and then each of
    `continuations`; or it writes (`writing`). `answers` are the choices as people know them. `gold` is the choice that
    scores 1: the right one, or in a task of preferences the stereotypical one. `prompt` is what perturbations change,
    empty where nothing stands apart from the choices.
    """

    task: str
    kind: str
    item: int
    variant: str = CLEAN
    solved: str = ""
    prompt: str = ""
    cue: str = ""
    contexts: tuple[str, ...] = ()
    continuations: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    gold: int = 0
    normalise: Normalise = "none"
    writing: Writing | None = None
    slice: str | None = None
    cluster: str | None = None

    @property
    def context(self) -> str:
        """What the model reads before it goes on, where all choices share it."""
        return self.solved + self.prompt + self.cue

    @property
    def asks(self) -> list[tuple[str, str]]:
        """Context and continuation of each log-likelihood that is needed; none where the model writes."""
        contexts = self.contexts or (self.context,) * len(self.continuations)
        return list(zip(contexts, self.continuations, strict=True))

    @property
    def shown(self) -> str:
        """The question as people read it, without solved examples."""
        if self.prompt:
            return self.prompt + self.cue
        return self.continuations[0].strip() if self.contexts else " / ".join(self.answers)

    @property
    def answer(self) -> str | None:
        """The right answer in words; None where there is none."""
        if self.writing is not None:
            return self.writing.expected
        return None if self.kind in PREFERENCES else self.answers[self.gold]

    @property
    def sha256(self) -> str:
        """Digest of everything that is asked, the way of scoring included: equal questions have equal ones."""
        asked: dict[str, Any] = {"kind": self.kind, "asks": self.asks, "gold": self.gold, "normalise": self.normalise}
        if self.writing is not None:
            asked |= {"context": self.context, "writing": asdict(self.writing)}
        if self.normalise == "bytes":
            asked["answers"] = self.answers
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def read_task(task: Task) -> list[Question]:
    """All questions of a task, in the order of its file; RecipeError names file, line, key and what is there."""
    if isinstance(task, Winobias):
        return _spread(list(_winobias(task)), task)
    rows = read_rows(task.data, task.name)
    shots = task.shots if isinstance(task, MultipleChoice | Classification) else 0
    if shots >= len(rows):
        raise RecipeError(f"task {task.name!r}: {task.data} has {len(rows)} items, {shots} of them cannot be examples")
    solved = "".join(f"{_solved(_question(task, row))}\n\n" for row in rows[:shots])
    kept = [_question(task, row) for row in _spread(rows[shots:], task)]
    return [dataclasses.replace(question, solved=solved) for question in kept]


def perturbed(questions: Iterable[Question], change: Callable[[str], str], variant: str) -> list[Question]:
    """The questions with other prompts; choices, solved examples and answers stay as they are.

    Those without a prompt of their own (pairs of sentences, contexts as choices) are left out.
    """
    return [
        dataclasses.replace(question, prompt=change(question.prompt), variant=variant)
        for question in questions
        if question.prompt
    ]


def _spread(found: list[Any], task: Task) -> list[Any]:
    """So many of the things found, one from each of as many equal stretches."""
    if task.items is None or task.items >= len(found):
        return found
    draw = random.Random(task.seed)
    edges = [part * len(found) // task.items for part in range(task.items + 1)]
    return [found[low + int(draw.random() * (high - low))] for low, high in pairwise(edges)]


def _solved(question: Question) -> str:
    return question.prompt + question.cue + question.continuations[question.gold]


def _question(task: Task, row: Row) -> Question:
    assert not isinstance(task, Winobias)
    common: dict[str, Any] = {"task": task.name, "kind": task.kind, "item": row.number}
    common |= {key: row.text(column) for key in ("slice", "cluster") if (column := getattr(task, key)) is not None}
    if isinstance(task, MultipleChoice):
        return Question(**common, **_multiple_choice(task, row))
    if isinstance(task, Contexts):
        return Question(**common, **_contexts(task, row))
    if isinstance(task, Cloze):
        return Question(**common, **_cloze(task, row))
    if isinstance(task, MinimalPairs):
        return Question(**common, **_pair(row.text(task.good), row.text(task.bad)))
    if isinstance(task, CrowsPairs):
        return Question(**common, **_pair(row.text(task.more), row.text(task.less)))
    if isinstance(task, Classification):
        return Question(**common, **_classification(task, row))
    return Question(**common, **_generation(task, row))


def _multiple_choice(task: MultipleChoice, row: Row) -> dict[str, Any]:
    query = fill(task.query, row.text) if is_template(task.query) else row.text(task.query)
    one_column = isinstance(task.choices, str)
    choices = row.entries(task.choices) if one_column else [row.text(column) for column in task.choices]  # type: ignore[arg-type]
    cue, gap = _split(task.delimiter)
    return {
        "prompt": query,
        "cue": cue,
        "continuations": tuple(gap + choice for choice in choices),
        "answers": tuple(choices),
        "gold": _gold(row, task.gold, choices),
        "normalise": task.normalise,
    }


def _contexts(task: Contexts, row: Row) -> dict[str, Any]:
    options = row.entries(task.context_options)
    cue, gap = _split(task.delimiter)
    return {
        "contexts": tuple(option + cue for option in options),
        "continuations": (gap + row.text(task.continuation),) * len(options),
        "answers": tuple(options),
        "gold": _gold(row, task.gold, options),
    }


def _cloze(task: Cloze, row: Row) -> dict[str, Any]:
    if task.context is not None and task.target is not None:
        before, target = row.text(task.context), row.text(task.target)
    else:
        column = task.text or "text"
        # At the last space, not at any white space: as the harness cuts LAMBADA, so that the scores can be compared
        before, _, target = row.text(column).rpartition(" ")
        if not before:
            raise row.problem(f"{column!r} has one word only, so nothing can be asked")
    if not target.strip():
        raise row.problem("the last word, which is asked, is empty")
    return {"prompt": before, "continuations": (f" {target}",), "answers": (target,)}


def _pair(first: str, second: str) -> dict[str, Any]:
    return {"continuations": (first, second), "answers": (first, second)}


def _classification(task: Classification, row: Row) -> dict[str, Any]:
    by_value = task.labels if isinstance(task.labels, dict) else {str(n): text for n, text in enumerate(task.labels)}
    value = row.text(task.label)
    if value not in by_value:
        there = ", ".join(map(repr, by_value))
        raise row.problem(f"{task.label!r} is {value!r}, for which there is no label; there are labels for {there}")
    cue, gap = _split(task.delimiter)
    return {
        "prompt": fill(task.prompt, row.text),
        "cue": cue,
        "continuations": tuple(gap + text for text in by_value.values()),
        "answers": tuple(by_value.values()),
        "gold": list(by_value).index(value),
    }


def _generation(task: Generation, row: Row) -> dict[str, Any]:
    expected = fill(task.answer, row.text)
    if task.match == "regex":
        try:
            re.compile(expected)
        except re.error as error:
            raise row.problem(f"the answer {expected!r} is no regular expression: {error}") from None
    if not expected.strip():
        raise row.problem("the answer is empty")
    writing = Writing(expected=expected, match=task.match, max_new_tokens=task.max_new_tokens, stop=task.stop)
    return {"prompt": fill(task.prompt, row.text), "writing": writing}


def _gold(row: Row, column: str, choices: Sequence[str]) -> int:
    """Which choice is right: a number from 0, or the text of one."""
    if len(choices) < 2:
        raise row.problem(f"there are {len(choices)} choices; a choice needs two")
    if empty := [n for n, choice in enumerate(choices) if not choice.strip()]:
        raise row.problem(f"choice {empty[0]} is empty")
    given = row.text(column)
    if given.isdecimal() and int(given) < len(choices):
        return int(given)
    if given in choices:
        return list(choices).index(given)
    raise row.problem(f"{column!r} is {given!r}: neither a number below {len(choices)} nor one of the choices")


def _split(delimiter: str) -> tuple[str, str]:
    """What of a delimiter stays with the context, and the space that goes to the choice, as tokens have it."""
    cue = delimiter.rstrip()
    return cue, delimiter[len(cue) :]


def _winobias(task: Winobias) -> Iterator[Question]:
    place = Path(task.data).expanduser()
    files = sorted(place.glob("pro_*")) if place.is_dir() else [place]
    if not files or not all(file.name.startswith("pro_") for file in files):
        raise RecipeError(f"task {task.name!r}: {place} is neither a pro_* file nor a folder of such files")
    item = 0
    for file in files:
        other = file.with_name(file.name.replace("pro_", "anti_", 1))
        pro, anti = _sentences(file, task), _sentences(other, task)
        if len(pro) != len(anti) or not pro:
            raise RecipeError(f"task {task.name!r}: {file} has {len(pro)} sentences, its twin {other} has {len(anti)}")
        kind = re.search(r"type\d+", file.name)
        for one, twin in zip(pro, anti, strict=True):
            common: dict[str, Any] = {"task": task.name, "kind": task.kind, "slice": kind.group() if kind else None}
            yield Question(**common, item=item, **_pair(one, twin))
            item += 1


def _sentences(file: Path, task: Winobias) -> list[str]:
    """Lines such as `3 [The mechanic] gave the clerk a present because [he] won.` without number and brackets."""
    lines = [line.strip() for line in read_text(file, task.name).split("\n")]
    return [re.sub(r"^\d+\s+|[\[\]]", "", line) for line in lines if line]
