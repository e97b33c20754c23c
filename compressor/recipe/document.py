"""A YAML file as plain values that still know where they were written."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from compressor.errors import RecipeError

Address = tuple[str | int, ...]  # keys and list positions from the top: ("passes", 0, "quantize", "bits")


@dataclass(frozen=True)
class Document:
    """A mapping read from YAML 1.2 and, by address, the file and line (or the option) that each value comes from."""

    name: str
    data: dict[str, Any]
    places: dict[Address, str]

    def place(self, address: Address) -> str:
        """Where the value at an address was written; for one that is not there, where its parent was."""
        while address not in self.places:
            address = address[:-1]
        return self.places[address]


def read_document(path: Path, name: str | None = None) -> Document:
    """Read a YAML file that holds a mapping; every way in which it is not one is a RecipeError with the line."""
    name = name or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name} cannot be read: {error}") from error
    tree = parse_yaml(text, name)
    if not isinstance(tree, CommentedMap):
        raise RecipeError(f"{name} holds {_kind(tree)}; it has to be a mapping of keys to values")
    places: dict[Address, str] = {(): name}
    data = _plain(tree, (), name, places)
    return Document(name, data, places)


def parse_yaml(text: str, name: str) -> Any:
    """The tree of a YAML 1.2 text (`2:4` is a string, `1e-4` a number); a RecipeError names `name` and the line."""
    try:
        return YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = str(error.problem or error.context).splitlines()[0]
        raise RecipeError(f"{name}{line}: this is not YAML: {problem}") from error
    except (YAMLError, ValueError) as error:  # a ValueError: a date that is none
        raise RecipeError(f"{name}: this is not YAML: {error}") from error


def plain_value(text: str, name: str) -> Any:
    """A value as YAML reads it, without line numbers: `4` is a number, `[1, 8]` a list, `2:4` a string."""
    return _plain(parse_yaml(text, name), (), name, {})


def nearest(word: object, known: Iterable[str]) -> str:
    """`; did you mean 'group_size'?`, or nothing when no known word resembles it."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _plain(node: Any, address: Address, name: str, places: dict[Address, str]) -> Any:
    if isinstance(node, CommentedMap):
        for key in node:
            # Keys that arrive through an anchor (`<<: *base`) have no line of their own: their parent's is named.
            if key in (node.lc.data or {}):
                places[(*address, key)] = f"{name}, line {node.lc.key(key)[0] + 1}"
        return {key: _plain(value, (*address, key), name, places) for key, value in node.items()}
    if isinstance(node, CommentedSeq):
        for position in range(len(node)):
            places[(*address, position)] = f"{name}, line {node.lc.item(position)[0] + 1}"
        return [_plain(value, (*address, position), name, places) for position, value in enumerate(node)]
    # ruamel's numbers and strings are subclasses that remember their spelling; pydantic wants the plain ones.
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _kind(tree: Any) -> str:
    return "nothing" if tree is None else "a list" if isinstance(tree, CommentedSeq) else f"only {str(tree)[:40]!r}"
