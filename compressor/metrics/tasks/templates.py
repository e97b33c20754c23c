"""Prompts with `{column}` or `{column[0]}` in them; `{{` and `}}` are braces. No other formatting, so nothing hides."""

import re
from collections.abc import Callable

FIELD = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}\[\]]+)(?:\[(?P<index>\d+)\])?\}|[{}]")


def is_template(text: str) -> bool:
    """Whether a text names columns to fill in, rather than being the name of one."""
    return "{" in text


def check_template(template: str) -> str:
    """The template itself; ValueError where a brace stands alone or no column is named."""
    found = list(FIELD.finditer(template))
    for match in found:
        if match.group() in "{}":
            raise ValueError(f"the brace at character {match.start()} belongs to no {{column}}; a brace itself is {{{{")
    if not any(match["column"] for match in found):
        raise ValueError("the template names no {column}, so every item would ask the same")
    return template


def fill(template: str, value: Callable[[str, int | None], str]) -> str:
    """The template with the text of each column, which `value(column, index)` gives."""

    def replace(match: re.Match[str]) -> str:
        if match["column"] is None:
            return match.group()[0]
        return value(match["column"], None if match["index"] is None else int(match["index"]))

    return FIELD.sub(replace, template)
