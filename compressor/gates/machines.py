"""Times that were not taken side by side: what makes two machines differ, and what may be compared all the same.

An environment is what `metrics.describe_environment` writes into a report.
"""

import math
from collections.abc import Mapping
from typing import Any

from compressor.reports.estimate import Estimate

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


def through_reference(candidate: Estimate, baseline: Estimate) -> Estimate:
    """Candidate / baseline from the ratio of each to one reference model that was timed beside it.

    What two machines differ in cancels. The two ratios were measured independently, so the log half-widths of their
    intervals add as squares. ValueError for ratios that are not positive numbers.
    """
    if not all(side.is_finite and side.value > 0 for side in (candidate, baseline)):
        raise ValueError(f"ratios to a reference are positive numbers, not {candidate.value} and {baseline.value}")
    value, n = candidate.value / baseline.value, min(candidate.n, baseline.n)
    if candidate.ci95 is None or baseline.ci95 is None:
        return Estimate(value, None, n)
    below = math.hypot(math.log(candidate.value / candidate.ci95[0]), math.log(baseline.ci95[1] / baseline.value))
    above = math.hypot(math.log(candidate.ci95[1] / candidate.value), math.log(baseline.value / baseline.ci95[0]))
    return Estimate(value, (value * math.exp(-below), value * math.exp(above)), n)


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
