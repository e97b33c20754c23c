"""What a person sees while a command works, and how its answer looks."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_A_LINE = 5.0  # between two lines of progress in a log

Advance = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Advance]:
    """Show how far the work is, on stderr: a bar on a terminal, now and then a line in a log, nothing when quiet."""
    console = Console(stderr=True)
    if quiet:
        yield lambda label, done, total: None
    elif not console.is_terminal:
        yield _lines(time.monotonic)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bars:
            yield _bar(bars)


def _bar(bars: Progress) -> Advance:
    """One visible bar; work that was interrupted by other work keeps its own clock."""
    tasks: dict[str, TaskID] = {}
    last: dict[str, int] = {}

    def advance(label: str, done: int, total: int) -> None:
        if label not in tasks:
            tasks[label] = bars.add_task(label)
        elif done < last[label]:
            bars.reset(tasks[label])  # the same kind of work again, such as measuring after the next pass
        last[label] = done
        for name, task in tasks.items():
            bars.update(task, visible=name == label)
        bars.update(tasks[label], completed=done, total=total)

    return advance


def _lines(clock: Callable[[], float]) -> Advance:
    """A line with the time left at most every 5 seconds."""
    started: dict[str, tuple[int, float]] = {}
    before: dict[str, int] = {}
    printed = -math.inf

    def advance(label: str, done: int, total: int) -> None:
        nonlocal printed
        now = clock()
        if label not in started or done < before[label]:
            started[label] = (done, now)
        before[label] = done
        first, since = started[label]
        if now - printed < SECONDS_A_LINE:
            return
        printed = now
        left = f", about {(now - since) * (total - done) / (done - first):.0f} s left" if done > first else ""
        print(f"{label}: {done}/{total}{left}", file=sys.stderr, flush=True)

    return advance


def outline(document: Any, indent: int = 0) -> str:
    """A JSON document as indented lines; an estimate as `value [low, high]`."""
    lines = []
    for key, value in document.items() if isinstance(document, Mapping) else enumerate(document):
        head = f"{'  ' * indent}{key}:" if isinstance(document, Mapping) else f"{'  ' * indent}-"
        if isinstance(value, Mapping) and value.keys() == {"value", "ci95", "n"}:
            interval = "" if value["ci95"] is None else " [{:.4g}, {:.4g}]".format(*value["ci95"])
            lines.append(f"{head} {value['value']:.4g}{interval}")
        elif isinstance(value, Mapping | list | tuple) and value:
            lines += [head, outline(value, indent + 1)]
        else:
            lines.append(f"{head} {value:.4g}" if isinstance(value, float) else f"{head} {value}")
    return "\n".join(lines)
