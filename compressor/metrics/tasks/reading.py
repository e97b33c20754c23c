"""The rows of a task's file, each knowing where it stands, so that an error can say so."""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import EnvironmentProblem, RecipeError
from compressor.models import demo_task

HUB, DEMO = "hf:", "demo/"
SUFFIXES = (".jsonl", ".csv", ".json")


@dataclass(frozen=True)
class Row:
    """One item as the file has it; `number` counts from 0 over the file."""

    number: int
    where: str
    task: str
    values: Mapping[str, Any]

    def value(self, column: str) -> Any:
        """What a column holds; RecipeError names the file, the line, the key and the keys that are there."""
        if column in self.values:
            return self.values[column]
        near = difflib.get_close_matches(column, list(self.values), n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise self.problem(f"there is no key {column!r}{guess}; there are {', '.join(map(repr, self.values))}")

    def text(self, column: str, index: int | None = None) -> str:
        """What a column holds as text: text, a number, or one entry of a list of them."""
        value, name = self.value(column), repr(column)
        if index is not None:
            entries = self.entries(column)
            if index >= len(entries):
                raise self.problem(f"{name} has {len(entries)} entries, entry {index} (from 0) was asked for")
            value, name = entries[index], f"{name}[{index}]"
        if not isinstance(value, str | int | float):
            raise self.problem(f"{name} is {_shown(value)}, which is no text")
        return str(value)

    def entries(self, column: str) -> list[str]:
        """What a column lists; a cell of a CSV file holds its list as JSON."""
        value = self.value(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise self.problem(f"{column!r} is no JSON list: {error}") from None
        if not isinstance(value, list | tuple) or not all(isinstance(entry, str | int | float) for entry in value):
            raise self.problem(f"{column!r} is {_shown(value)}, which is no list of texts")
        return [str(entry) for entry in value]

    def problem(self, what: str) -> RecipeError:
        """What is wrong with this row, with its place."""
        return RecipeError(f"{self.where}, task {self.task!r}: {what}")


def read_rows(data: str, task: str) -> list[Row]:
    """All rows of a file or a data set of the hub.

    RecipeError for a file that is missing, empty or not what its name says; EnvironmentProblem where `datasets` is
    missing or the hub does not answer.
    """
    if data.startswith(HUB):
        rows = [Row(n, f"{data}, row {n}", task, values) for n, values in enumerate(_from_hub(data, task))]
    else:
        path = demo_task(data) if data.startswith(DEMO) else Path(data).expanduser()
        content = read_text(path, task)
        if path.suffix not in SUFFIXES:
            raise RecipeError(f"task {task!r}: {path} has to end in {', '.join(SUFFIXES)}")
        read = {".jsonl": _json_lines, ".csv": _csv, ".json": _json}[path.suffix]
        rows = [Row(n, where, task, values) for n, (where, values) in enumerate(read(path, content, task))]
    if not rows:
        raise RecipeError(f"task {task!r}: {data} holds no items")
    return rows


def read_text(path: Path, task: str) -> str:
    """A file as text; RecipeError names what is there instead."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        beside = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise RecipeError(f"task {task!r}: there is no file {path}{guess}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"task {task!r}: {path} is not readable as UTF-8 text: {error}") from None


def _json_lines(path: Path, content: str, task: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _mapping(_parsed(line, where, task), where, task)


def _json(path: Path, content: str, task: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    entries = _parsed(content, str(path), task) if content.strip() else []
    if not isinstance(entries, list):
        raise RecipeError(f"{path}, task {task!r}: the file has to be a list of objects, not {_shown(entries)}")
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        yield where, _mapping(entry, where, task)


def _csv(path: Path, content: str, task: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise RecipeError(f"{where}, task {task!r}: the row has not the {columns} columns of the first line")
            yield where, row
    except csv.Error as error:
        raise RecipeError(f"{path}, line {reader.line_num}, task {task!r}: not CSV: {error}") from None


def _parsed(text: str, where: str, task: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}, task {task!r}: not JSON: {error}") from None


def _mapping(value: Any, where: str, task: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}, task {task!r}: an item is an object with keys, not {_shown(value)}")
    return value


def _from_hub(data: str, task: str) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise EnvironmentProblem(
            f"task {task!r}: {data} needs the extra `eval`: pip install 'compressor[eval]'"
        ) from None
    name, *rest = data.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise RecipeError(f"task {task!r}: {data!r} is not hf:org/name[:config][:split]")
    config, split = [*(part or None for part in rest), None, None][:2]
    try:
        found = datasets.load_dataset(name, config, split=split)
    except ValueError as error:  # an unknown configuration or split; the message lists those there are
        raise RecipeError(f"task {task!r}: {data}: {error}") from error
    except Exception as error:  # the hub client raises many kinds; all mean that the data is not here
        raise EnvironmentProblem(f"task {task!r}: {data} could not be loaded: {error}") from error
    if isinstance(found, dict):
        if len(found) > 1:
            raise RecipeError(
                f"task {task!r}: {data} has the splits {', '.join(found)}; name one: {name}:{config or ''}:SPLIT"
            )
        [found] = found.values()
    yield from found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
