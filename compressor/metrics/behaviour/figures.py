"""Figures by name, and why those that could not be measured are None."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figures:
    """Nested mappings whose leaves are an Estimate, a number or None; `reasons` says why by dotted path.

    They go into the behaviour section of a Measurement as they are: `{"gender": {"worst": None}}` with the reason at
    `gender.worst`.
    """

    values: Mapping[str, Any]
    reasons: Mapping[str, str] = field(default_factory=dict)


def joined(parts: Mapping[str, Figures]) -> Figures:
    """Several groups of figures as one, each under its name, with the paths of the reasons to match."""
    values = {name: part.values for name, part in parts.items()}
    reasons = {f"{name}.{path}": why for name, part in parts.items() for path, why in part.reasons.items()}
    return Figures(values, reasons)
