"""What a report says about a metric: its value, its interval, or why there is none.

A report is the JSON document of design section 5 (`report.json`), so that a gate needs no model and no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

# How a report words that a value exists but JSON cannot hold it (reports.measurement.NOT_FINITE and kin).
NOT_FINITE = "is not a finite number"
# The metrics that stand in a measurement of their own; all others compare two, in delta.from_baseline.
MEASURED = {
    "kl_mean": "accuracy",
    "kl_p99": "accuracy",
    "top1_agreement": "accuracy",
    "weight_bytes": "memory",
    "peak_bytes": "memory",
}


@dataclass(frozen=True)
class Reading:
    """One value of a metric; `part` is the text or batch it belongs to; without a value, `reason` says why.

    `ci95` is None where no interval is known; what was counted rather than sampled has the interval [value, value].
    """

    part: str | None = None
    value: float | None = None
    ci95: tuple[float, float] | None = None
    n: int | None = None
    reason: str | None = None


def readings(report: Mapping[str, Any], metric: str) -> list[Reading]:
    """All values of a metric after the last step: one for each text or batch where the report tells them apart."""
    steps = report.get("steps") or []
    if not steps:
        return [Reading(reason="the report has no steps")]
    if metric == "robustness_gap":
        return _gaps(_section(steps[-1].get("measurement"), "behaviour"))
    if metric in MEASURED:
        values, where = _section(steps[-1].get("measurement"), MEASURED[metric]), f"measurement.{MEASURED[metric]}"
    else:
        values, where = _section(steps[-1].get("delta"), "from_baseline"), "delta.from_baseline"
    reason = values.get(f"{metric}_reason") or f"the last step's {where} in the report does not hold it"
    return _parts(values.get(metric), str(reason))


def _gaps(behaviour: Mapping[str, Any]) -> list[Reading]:
    """The gap of every task and perturbation."""
    reason = str(behaviour.get("robustness_reason") or "evaluate.robustness was not asked for")
    found = [
        replace(reading, part=f"{task}, {reading.part}")
        for task, by_variant in (behaviour.get("robustness") or {}).items()
        for reading in _parts(by_variant, reason)
    ]
    return found or [Reading(reason=reason)]


def _section(parent: Any, key: str) -> Mapping[str, Any]:
    section = parent.get(key) if isinstance(parent, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _parts(value: Any, reason: str) -> list[Reading]:
    """A value, an estimate, or a mapping of either by text or batch (null beside `<key>_reason` where unmeasured)."""
    if not isinstance(value, Mapping) or "value" in value:
        return [_reading(None, value, reason)]
    parts = [
        _reading(str(key), part, str(value.get(f"{key}_reason") or reason))
        for key, part in value.items()
        if not str(key).endswith("_reason")
    ]
    return parts or [Reading(reason=reason)]


def _reading(part: str | None, value: Any, reason: str) -> Reading:
    if isinstance(value, Mapping):
        number, ci95 = value.get("value"), value.get("ci95")
        if number is not None:
            interval = (float(ci95[0]), float(ci95[1])) if ci95 else None
            return Reading(part, float(number), interval, value.get("n"))
    elif isinstance(value, Real) and not isinstance(value, bool):
        return Reading(part, float(value), (float(value), float(value)))
    if reason.endswith(NOT_FINITE):
        return Reading(part, math.nan, reason=reason)
    return Reading(part, reason=reason)
