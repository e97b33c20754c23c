"""What a run has finished, one JSON line each, so that a killed run goes on where it stopped."""

import json
import os
import time
from pathlib import Path

from compressor.checkpoint.writer import disk_errors, write_text
from compressor.errors import IntegrityError, RecipeError

RESERVED = ("kind", "time")


class Journal:
    """Append to `journal.jsonl`, or go on with the one that is there.

    The first line holds `key`: all that the results depend on (recipe, sources, versions, threads, device). A journal
    of another key is refused with a RecipeError that lists what differs. A last line that a kill cut off is dropped.
    Every line carries "kind" and "time" (unix seconds). Raises IntegrityError if a line further up is unreadable.
    """

    def __init__(self, path: Path, key: dict):
        self.path = Path(path)
        self.key = json.loads(json.dumps(key))
        self._lines = _read_lines(self.path)
        if self._lines:
            self._check_key(self._lines[0])
        else:
            with disk_errors(self.path, 0):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            first = {"kind": "key", "time": time.time(), "key": self.key}
            write_text(self.path, json.dumps(first) + "\n")
            self._lines = [first]

    @property
    def is_resumed(self) -> bool:
        """Whether anything but the key has been written."""
        return len(self._lines) > 1

    def append(self, kind: str, **fields: object) -> dict:
        """Write one line and return it; when this returns, the line is on the disk."""
        for name in RESERVED:
            if name in fields:
                raise ValueError(f"the journal sets {name!r} itself")
        text = json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n"
        data = text.encode()
        with disk_errors(self.path, len(data)), self.path.open("r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(f"only a part of {len(data)} bytes was written")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # a later line must not be glued to half of this one
                raise
        self._lines.append(json.loads(text))
        return dict(self._lines[-1])

    def entries(self, kind: str | None = None, **match: object) -> list[dict]:
        """Return the lines of a kind (all, if none is given) whose fields equal `match`, oldest first."""
        return [dict(line) for line in self._lines[1:] if _matches(line, kind, match)]

    def last(self, kind: str, **match: object) -> dict | None:
        """Return the newest line of a kind whose fields equal `match`, or None."""
        return next((dict(line) for line in reversed(self._lines[1:]) if _matches(line, kind, match)), None)

    def _check_key(self, first: dict) -> None:
        if first.get("kind") != "key" or "key" not in first:
            raise IntegrityError(f"{self.path}: does not begin with the key of a run")
        differences = _differences(first["key"], self.key)
        if differences:
            raise RecipeError(
                f"{self.path}: was written by a run that differs in {'; '.join(differences)}. "
                "Give --fresh to start again, another --out to keep both, or the same settings to resume"
            )


def _read_lines(path: Path) -> list[dict]:
    """Read a journal and cut off a torn end, in the file too."""
    if not path.is_file():
        return []
    lines: list[dict] = []
    data = path.read_bytes()
    position = 0
    pieces = data.split(b"\n")
    for number, piece in enumerate(pieces[:-1], start=1):
        try:
            line = json.loads(piece)
            line["kind"], line["time"]
        except (ValueError, TypeError, KeyError) as error:
            if number < len(pieces) - 1 or pieces[-1]:
                raise IntegrityError(f"{path}:{number}: not a line of a journal ({error!r})") from error
            break
        lines.append(line)
        position += len(piece) + 1
    if position < len(data):
        with disk_errors(path, 0), path.open("r+b") as file:
            file.truncate(position)
            os.fsync(file.fileno())
    return lines


def _matches(line: dict, kind: str | None, match: dict) -> bool:
    return (kind is None or line["kind"] == kind) and all(
        name in line and line[name] == value for name, value in match.items()
    )


def _differences(old: object, new: object, name: str = "") -> list[str]:
    """Say, part by part, where two keys differ: `recipe.seed: was 0, is 1`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(part for part in new if part not in old)]
        return [
            difference
            for part in names
            for difference in _differences(old.get(part), new.get(part), f"{name}.{part}" if name else part)
        ]
    return [] if old == new else [f"{name}: was {_short(old)}, is {_short(new)}"]


def _short(value: object) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
