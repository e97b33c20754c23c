"""When a ratio of times is a verdict, and when two times may not be compared at all.

Times in ms. An environment is what `metrics.describe_environment` writes into a report.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compressor.errors import EnvironmentProblem, RecipeError
from compressor.reports.estimate import Estimate

LatencyStatus = Literal["pass", "inconclusive", "fail"]

# What decides how fast a model runs. Load, free memory, git commit and kernel release are left out: they differ between
# two runs of one machine.
DECIDING = {
    "cpu.model": "CPU",
    "cpu.architecture": "architecture",
    "cpu.cores": "cores",
    "cpu.logical_cores": "logical cores",
    "cpu.usable_cores": "usable cores",
    "cpu.threads": "threads",
    "cpu.capability": "vector instructions used",
    "cpu.instruction_sets": "instruction sets",
    "cpu.governor": "frequency governor",
    "gpus": "GPUs",
    "gpu_driver": "GPU driver",
    "cuda": "CUDA",
    "versions.torch": "torch",
    "versions.transformers": "transformers",
}
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one machine says about one model: a time, and its ratio to a reference that was timed there beside it.

    `reference` names the reference model so that two machines can be seen to mean the same one: the hash of its files.
    `clock` and `threads` stand in the report's latency section: on a crowded machine the CPU time of one thread is
    taken instead of the time on the wall.
    """

    environment: Mapping[str, Any]
    ms: Estimate | None = None
    clock: str = "wall"
    threads: int | None = None
    to_reference: Estimate | None = None
    reference: str | None = None


def latency_verdict(ratio: Estimate, budget: float) -> LatencyStatus:
    """Hold a ratio of times (after / before) against a budget such as 1.05.

    "pass" when the whole 95 % interval lies within the budget, "fail" when all of it lies above, else "inconclusive".
    Without an interval nothing is known; a ratio that is no finite number fails. RecipeError for a budget that is not
    positive.
    """
    if not (math.isfinite(budget) and budget > 0):
        raise RecipeError(f"a latency budget is a positive ratio of after / before such as 1.05, not {budget}")
    if not ratio.is_finite:
        return "fail"
    if ratio.ci95 is None:
        return "inconclusive"
    low, high = ratio.ci95
    return "pass" if high <= budget else "fail" if low > budget else "inconclusive"


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Why times of two environments must not be compared; None when they may.

    A field that only one of them records is a difference: an old report does not say how many threads it used.
    """
    differences = []
    for path, label in DECIDING.items():
        before, after = _at(one, path), _at(other, path)
        if before is _ABSENT or after is _ABSENT or before != after:
            differences.append(f"{label} {_shown(before)} against {_shown(after)}")
    return "; ".join(differences) or None


def refuse_across_machines(candidate: Timing, baseline: Timing) -> None:
    """Raise EnvironmentProblem where two timings have nothing in common that makes them comparable.

    They may be compared when machine, clock and threads are alike, or when both are ratios to one reference that ran
    beside each.
    """
    difference = _difference(candidate, baseline)
    if difference is None or _shared_reference(candidate, baseline):
        return
    missing = "neither names a reference model timed on both"
    if candidate.to_reference is not None and baseline.to_reference is not None:
        missing = f"their references differ ({candidate.reference} and {baseline.reference})"
    elif candidate.to_reference is not None or baseline.to_reference is not None:
        missing = f"only the {'candidate' if candidate.to_reference is not None else 'baseline'} has a reference"
    raise EnvironmentProblem(
        f"times that were taken apart are not compared: {difference}; and {missing}. Time both models on one machine, "
        "or each beside the same reference model"
    )


def ratio_across(candidate: Timing, baseline: Timing) -> Estimate:
    """Candidate / baseline from timings that were not made side by side.

    Through the shared reference if there is one: it cancels what the machines differ in. Else, on like machines, from
    the times themselves. The two were measured independently, so the interval's log half-widths add as squares. Raises
    EnvironmentProblem where `refuse_across_machines` does, or where a time is missing.
    """
    refuse_across_machines(candidate, baseline)
    if _shared_reference(candidate, baseline):
        after, before = candidate.to_reference, baseline.to_reference
    else:
        after, before = candidate.ms, baseline.ms
    if after is None or before is None:
        raise EnvironmentProblem(f"the {'candidate' if after is None else 'baseline'} was not timed")
    value, n = after.value / before.value, min(after.n, before.n)
    if after.ci95 is None or before.ci95 is None:
        return Estimate(value, None, n)
    below = math.hypot(math.log(after.value / after.ci95[0]), math.log(before.ci95[1] / before.value))
    above = math.hypot(math.log(after.ci95[1] / after.value), math.log(before.value / before.ci95[0]))
    return Estimate(value, (value * math.exp(-below), value * math.exp(above)), n)


def _difference(candidate: Timing, baseline: Timing) -> str | None:
    parts = [same_machine(candidate.environment, baseline.environment)]
    for label in ("clock", "threads"):
        after, before = getattr(candidate, label), getattr(baseline, label)
        if after != before:
            parts.append(f"{label} {_shown(after)} against {_shown(before)}")
    return "; ".join(part for part in parts if part) or None


def _shared_reference(candidate: Timing, baseline: Timing) -> bool:
    has_ratios = candidate.to_reference is not None and baseline.to_reference is not None
    return has_ratios and candidate.reference is not None and candidate.reference == baseline.reference


def _at(environment: Mapping[str, Any], path: str) -> Any:
    value: Any = environment
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return _ABSENT
        value = value[key]
    # JSON has no tuples, and the order of instruction sets says nothing
    return sorted(value) if path == "cpu.instruction_sets" and value else value


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not recorded"
    if isinstance(value, list):
        names = [str(item.get("name", item)) if isinstance(item, Mapping) else str(item) for item in value]
        return ", ".join(names) or "none"
    return "unknown" if value is None else str(value)
