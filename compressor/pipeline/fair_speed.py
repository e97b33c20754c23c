"""Speeds that were not taken in turns: a ratio through one reference model, or none, with the reason."""

from dataclasses import replace

from compressor.gates.machines import same_machine, through_reference
from compressor.pipeline.costs import LATENCY
from compressor.pipeline.sides import Side
from compressor.reports import Latency
from compressor.reports.delta import Delta
from compressor.reports.measurement import ByPart

# What two timings of one reference have to share, beside the model.
CIRCUMSTANCES = ("prompt", "generate", "device")


def timed_together(candidate: Side, baseline: Side) -> bool:
    """Whether the candidate's figures were taken in turns with this very baseline."""
    measured = candidate.measurement
    return (
        measured is not None
        and measured.latency.ratio_to_baseline is not None
        and candidate.timed_beside == baseline.name
    )


def fair_latency(changed: Delta, candidate: Side, baseline: Side) -> Delta:
    """A comparison of which the ratios of times are fair; those that would not be are None with the reason.

    Fair are times taken in turns, and times that were each taken in turns with one reference model (the original of
    both runs), on whatever machine: what the machines differ in cancels.
    """
    if timed_together(candidate, baseline):
        return changed
    reasons = {key: text for key, text in changed.reasons.items() if not key.startswith(tuple(LATENCY))}
    unfair = _why_unfair(candidate, baseline)
    if unfair is not None:
        none: dict[str, ByPart | None] = dict.fromkeys(LATENCY)
        return replace(changed, **none, reasons=reasons | dict.fromkeys(LATENCY, unfair))  # type: ignore[arg-type]
    assert candidate.measurement is not None
    assert baseline.measurement is not None
    latencies = candidate.measurement.latency, baseline.measurement.latency
    ratios = {name: _through_reference(figure, *latencies) for name, figure in LATENCY.items()}
    for name, by_batch in ratios.items():
        missing = (batch for batch, ratio in by_batch.items() if ratio is None)
        reasons |= {f"{name}.{batch}": "one of the two was not timed at this batch size" for batch in missing}
    return replace(changed, **ratios, reasons=reasons)  # type: ignore[arg-type]


def _why_unfair(candidate: Side, baseline: Side) -> str | None:
    for side in (candidate, baseline):
        if side.measurement is None or side.measurement.latency.ratio_to_baseline is None:
            return _refusal(candidate, baseline, f"{side.name} was not timed in turns with a reference model")
    references = [side.source["digest"] if side.source else None for side in (candidate, baseline)]
    if None in references or len(set(references)) > 1:
        return _refusal(candidate, baseline, "they have no reference model in common")
    assert candidate.measurement is not None
    assert baseline.measurement is not None
    one, other = candidate.measurement.latency.extra, baseline.measurement.latency.extra
    for key in CIRCUMSTANCES:
        if one.get(key) != other.get(key):
            return _refusal(candidate, baseline, f"{key} was {one.get(key)} and {other.get(key)}")
    return None


def _refusal(candidate: Side, baseline: Side, missing: str) -> str:
    machines = None
    if candidate.environment and baseline.environment:
        machines = same_machine(candidate.environment, baseline.environment)
    where = f" (on two machines: {machines})" if machines else ""
    return f"the two were not timed in turns{where}, and {missing}; give folders that hold both models"


def _through_reference(figure: str, after: Latency, before: Latency) -> ByPart:
    ours, theirs = ((side.ratio_to_baseline or {}).get(figure, {}) for side in (after, before))
    ratios = {}
    for batch in [*ours, *(batch for batch in theirs if batch not in ours)]:
        one, other = ours.get(batch), theirs.get(batch)
        ratios[batch] = None if one is None or other is None else through_reference(one, other)
    return ratios
