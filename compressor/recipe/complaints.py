"""Say what is wrong with a recipe: where it stands, what was written, and what is possible."""

import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from compressor.recipe.document import Address, Document, nearest

HAS_TO_BE, TAKES = "it has to be ", "it takes "
KIND = "kind"  # the key by which one of several sets of options is chosen
SHOWN = 60  # characters of a wrong value that are repeated


def complaints(
    errors: Sequence[ErrorDetails], options: type[BaseModel], data: Any, document: Document, address: Address
) -> list[str]:
    """One sentence for each thing that is wrong with `data`, the options at `address`, each with file and line."""
    found: dict[Address, list[ErrorDetails]] = {}
    for detail in errors:
        if detail["type"] == "too_short" and any(_is_inside(other["loc"], detail["loc"]) for other in errors):
            continue  # what is wrong inside was taken out before it was counted
        within = _written(detail["loc"], data)
        if detail["type"] == "missing":
            within = (*within, detail["loc"][-1])
        # A value that fits none of several types gives one error for each: they make one sentence.
        found.setdefault(within, []).append(detail)
    return [
        f"{document.place((*address, *within))}: {_sentence(details, within, options, data, address)}"
        for within, details in found.items()
    ]


def _sentence(
    details: Sequence[ErrorDetails], within: Address, options: type[BaseModel], data: Any, address: Address
) -> str:
    kind, owner = details[0]["type"], next(iter(_options_at(options, within[:-1], data)), None)
    whole_file = "the policy" if options.__name__ == "Policy" else "the recipe"
    section = dotted((*address, *within[:-1])) or whole_file
    if kind == "extra_forbidden" and owner is not None:
        key = within[-1]
        if key in getattr(owner, "NOT_YET", ()):
            return f"{section}: {key!r} is not implemented in this version{takes(owner.model_fields)}"
        return f"{section} has no option {key!r}{nearest(key, owner.model_fields)}{takes(owner.model_fields)}"
    if kind == "missing":
        return f"{section} needs {within[-1]!r}"
    whole = dotted((*address, *within)) or whole_file
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = details[0]["ctx"]["discriminator"].strip("'")
        possible = [str(option.model_fields[tag].default) for option in _options_at(options, within, data)]
        if kind == "union_tag_not_found":
            return f"{whole} needs {tag!r}{takes(possible)}"
        given = details[0]["ctx"]["tag"]
        return f"{whole}: {tag} is {given!r}{nearest(given, possible)}{takes(possible)}"
    given, wanted = details[0]["input"], _alternatives([_wanted(detail) for detail in details])
    if kind == "literal_error" and isinstance(given, str):
        possible = re.findall(r"'([^']*)'", details[0]["ctx"]["expected"])
        return f"{whole} is {given!r}{nearest(given, possible)} ({wanted})"
    if isinstance(given, dict | BaseModel) or (kind == "value_error" and isinstance(given, list | tuple)):
        return f"{whole}: {wanted}"
    shown = repr(given)
    return f"{whole} is {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'}: {wanted}"


def takes(known: Any) -> str:
    """` (it takes bits, group_size, ...)`"""
    return f" (it takes {', '.join(known)})"


def dotted(address: Address) -> str:
    """An address as a user writes it: `quantize.bits` for ("passes", 0, "quantize", "bits")."""
    if address[:1] in (("passes",), ("export",)) and len(address) > 2:
        address = address[2:]
    text = ""
    for part in address:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _alternatives(wanted: Sequence[str]) -> str:
    """`it has to be a valid string or a mapping of options`"""
    first, *others = dict.fromkeys(wanted)
    return " or ".join([first, *(other.removeprefix(HAS_TO_BE).removeprefix(TAKES) for other in others)])


def _wanted(detail: ErrorDetails) -> str:
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{HAS_TO_BE}a mapping of options"
    message = detail["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be "):
        message = (TAKES if detail["type"] == "literal_error" else HAS_TO_BE) + message[16:]
    return message


def _is_inside(location: Sequence[str | int], other: Sequence[str | int]) -> bool:
    return len(location) > len(other) and tuple(location[: len(other)]) == tuple(other)


def _written(location: Sequence[str | int], data: Any) -> Address:
    """The part of a pydantic location that stands in the data; the rest names types that were tried."""
    within: list[str | int] = []
    for part in location:
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if not in_list and not (isinstance(data, dict) and part in data):
            if isinstance(data, dict) and part == data.get(KIND):
                continue  # the kind of options that was chosen
            break
        data = data[part]
        within.append(part)
    return tuple(within)


def _options_at(options: type[BaseModel], within: Address, data: Any) -> list[type[BaseModel]]:
    """The classes of options that the keys may lead to: one, or several where a kind is to be chosen, or none."""
    current = [options]
    for key in within:
        data = data[key] if not isinstance(data, BaseModel) else None
        if isinstance(key, str):
            field = next((found for option in current if (found := option.model_fields.get(key))), None)
            current = _options_in(field.annotation) if field is not None else []
        if isinstance(data, dict) and KIND in data:
            chosen = [o for o in current if KIND in o.model_fields and o.model_fields[KIND].default == data[KIND]]
            current = chosen or current
    return current


def _options_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _options_in(argument)]
