"""Sizes as people write them: `16GB`, `512MiB`."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SMALLEST_BARE_NUMBER = 10**6
PATTERN = r"^\s*\d+(\.\d+)?\s*([KMGkmg][iI]?|[Tt])?[Bb]\s*$"


def parse_size(text: Any) -> int:
    """Bytes of `16GB` (powers of 1000) or `16GiB` (of 1024); ValueError for anything else."""
    match = re.match(PATTERN, text) if isinstance(text, str) else None
    if match is None:
        raise ValueError("a size is a number with a unit, such as 16GB or 512MiB")
    number, unit = re.findall(r"[\d.]+|[A-Za-z]+", text)
    size = round(float(number) * UNITS[unit.upper()])
    if size == 0:
        raise ValueError("a size is larger than nothing")
    return size


def format_size(size: int) -> str:
    """The shortest exact way to write a number of bytes, so that `parse_size` gives it back."""
    spellings = [f"{size // factor}{unit}" for unit, factor in UNITS.items() if size % factor == 0]
    return min(spellings, key=len).replace("IB", "iB")


def _to_bytes(value: Any) -> int:
    # Python code gives bytes; a small number is `memory: 16` in a recipe, where the unit was forgotten.
    return value if isinstance(value, int) and value >= SMALLEST_BARE_NUMBER else parse_size(value)


Size = Annotated[
    int,
    BeforeValidator(_to_bytes, json_schema_input_type=Annotated[str, Field(pattern=PATTERN)]),
    PlainSerializer(format_size),
]
