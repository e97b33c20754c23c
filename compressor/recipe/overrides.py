"""`--set quantize.bits=3`: change single values of a recipe from the command line."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from compressor.errors import RecipeError
from compressor.recipe.complaints import takes
from compressor.recipe.document import Address, Document, nearest, plain_value


def override(document: Document, settings: Sequence[str], keys: Collection[str], kinds: Collection[str]) -> Document:
    """Apply settings such as `calibration.samples=64`, `quantize.bits=3` or `<id of a pass>.bits=3` in order.

    `keys` are those of a recipe, `kinds` the names of passes. Values are read as YAML. A path that leads nowhere, or to
    more than one pass, is a RecipeError; what is wrong with a value is found later and names the setting as its place.
    """
    places = dict(document.places)
    for setting in settings:
        place = f"--set {setting}"
        path, sign, text = setting.partition("=")
        if not sign or not all(path.split(".")):
            raise RecipeError(f"{place}: write a path, = and a value, as in --set quantize.bits=3")
        address = _address(document.data, path.split("."), place, keys, kinds)
        _assign(document.data, address, plain_value(text, place), place)
        places = {known: where for known, where in places.items() if known[: len(address)] != address}
        places[address] = place
    return replace(document, places=places)


def _address(
    data: dict[str, Any], parts: Sequence[str], place: str, keys: Collection[str], kinds: Collection[str]
) -> Address:
    head, *rest = parts
    if head in keys:
        return (head, *rest)
    passes = _named_passes(data)
    ids = [name for _, _, name in passes if name is not None]
    found = [(position, kind) for position, kind, name in passes if head in (kind, name)]
    if not found:
        if head in kinds:
            raise RecipeError(f"{place}: the recipe has no {head} pass; its passes are {_listed(passes)}")
        possible = [*keys, *dict.fromkeys(kind for _, kind, _ in passes), *ids]
        raise RecipeError(f"{place}: the recipe has no {head!r}{nearest(head, possible)}{takes(possible)}")
    if len(found) > 1:
        named = [name or f"pass {position + 1} has no id" for position, kind, name in passes if kind == head]
        raise RecipeError(
            f"{place}: the recipe has {len(found)} {head} passes; name one by its id ({', '.join(named)})"
        )
    if not rest:
        raise RecipeError(f"{place}: name an option of the pass, as in --set {head}.OPTION=VALUE")
    return ("passes", *found[0], *rest)


def _named_passes(data: dict[str, Any]) -> list[tuple[int, str, str | None]]:
    """Position, kind and id of each pass that is written as a one-key mapping; others are complained of later."""
    passes = data.get("passes")
    return [
        (position, kind, options.get("id") if isinstance(options, dict) else None)
        for position, item in enumerate(passes if isinstance(passes, list) else [])
        if isinstance(item, dict) and len(item) == 1
        for kind, options in item.items()
    ]


def _listed(passes: list[tuple[int, str, str | None]]) -> str:
    return ", ".join(kind if name is None else f"{kind} ({name})" for _, kind, name in passes) or "none"


def _assign(data: Any, address: Address, value: Any, place: str) -> None:
    for key in address[:-1]:
        if isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict | list):
            raise RecipeError(f"{place}: {key!r} is {data!r} in the recipe, and nothing can be set inside it")
    if not isinstance(data, dict):
        raise RecipeError(f"{place}: {address[-2]!r} is a list in the recipe; set it as a whole, as in --set x=[1, 8]")
    data[address[-1]] = value
