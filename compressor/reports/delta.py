"""What a step changed: ratios after / before, with the interval that the measurements allow."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from compressor.reports.estimate import Estimate
from compressor.reports.measurement import NOT_MEASURED, ByPart, Measurement

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One model against another. Ratios are after / before, by text or by batch; None with a reason where unknown.

    `kl_mean` is how far (nats a token) the KL to the baseline has grown since the other model: against the baseline it
    is that KL itself.
    """

    perplexity_ratio: ByPart | None = None
    kl_mean: Estimate | None = None
    weight_bytes_ratio: float | None = None
    file_bytes_ratio: float | None = None
    decode_latency_ratio: ByPart | None = None
    prefill_latency_ratio: ByPart | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)


def delta(after: Measurement, before: Measurement, *, against_baseline: bool) -> Delta:
    """Compare two measurements of a run.

    Perplexities of the same windows are compared pair by pair. Latencies timed in turns with the baseline are taken as
    they are, if `before` is the baseline. Everything else gets the widest ratio that the two intervals allow.
    """
    reasons: dict[str, str] = {}
    turns = after.latency.ratio_to_baseline or {} if against_baseline else {}
    return Delta(
        perplexity_ratio=_perplexity_ratio(after, before, reasons),
        kl_mean=_kl_growth(after, before, against_baseline, reasons),
        weight_bytes_ratio=_bytes_ratio("weight_bytes", after, before, reasons),
        file_bytes_ratio=_bytes_ratio("file_bytes", after, before, reasons),
        decode_latency_ratio=_latency_ratio(
            "decode_ms_per_token", "decode_latency_ratio", after, before, turns, reasons
        ),
        prefill_latency_ratio=_latency_ratio("prefill_ms", "prefill_latency_ratio", after, before, turns, reasons),
        reasons=reasons,
    )


def paired_ratio(after_nll: tuple[float, ...], before_nll: tuple[float, ...]) -> Estimate:
    """Return the perplexity ratio of two models on the same windows, with a bootstrap interval over the windows.

    Takes the mean NLL of each window in nats, windows of equal length in the same order. Windows differ far more than
    models do, so the pairs are resampled, not the two lists.
    """
    count = len(after_nll)
    generator = np.random.default_rng(0)
    with np.errstate(invalid="ignore", over="ignore"):  # a broken model gives NaN here, and a reason in the report
        differences = np.asarray(after_nll, dtype=np.float64) - np.asarray(before_nll, dtype=np.float64)
        means = [differences[generator.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
        low, high = np.exp(np.quantile(means, [0.025, 0.975]))
        value = np.exp(differences.mean())
    return Estimate(float(value), (float(low), float(high)) if count > 1 else None, count)


def ratio(after: Estimate, before: Estimate) -> Estimate | None:
    """Return after / before with the widest interval that both intervals allow (at least 95 %); None if undefined."""
    if not before.value > 0 or not math.isfinite(after.value / before.value):
        return None
    ci95 = None
    if after.ci95 and before.ci95 and before.ci95[0] > 0:
        ci95 = (after.ci95[0] / before.ci95[1], after.ci95[1] / before.ci95[0])
    return Estimate(after.value / before.value, ci95, min(after.n, before.n))


def _perplexity_ratio(after: Measurement, before: Measurement, reasons: dict[str, str]) -> ByPart | None:
    def one(text: str, later: Estimate, earlier: Estimate) -> Estimate | None:
        later_nll, earlier_nll = after.accuracy.window_nll.get(text), before.accuracy.window_nll.get(text)
        if later_nll and earlier_nll and len(later_nll) == len(earlier_nll):
            return paired_ratio(later_nll, earlier_nll)
        return ratio(later, earlier)

    return _by_part(
        "perplexity_ratio",
        after.accuracy.perplexity,
        before.accuracy.perplexity,
        one,
        reasons,
        after.accuracy.reasons.get("perplexity") or before.accuracy.reasons.get("perplexity"),
    )


def _latency_ratio(
    measured: str,
    name: str,
    after: Measurement,
    before: Measurement,
    turns: Mapping[str, ByPart],
    reasons: dict[str, str],
) -> ByPart | None:
    if taken := turns.get(measured):
        for part in (part for part, estimate in taken.items() if estimate is None):
            why = after.latency.reasons.get(f"ratio_to_baseline.{measured}.{part}", NOT_MEASURED)
            reasons[f"{name}.{part}"] = why
        return dict(taken)
    return _by_part(
        name,
        getattr(after.latency, measured),
        getattr(before.latency, measured),
        lambda _, later, earlier: ratio(later, earlier),
        reasons,
        after.latency.reasons.get(measured) or before.latency.reasons.get(measured),
    )


def _by_part(
    name: str,
    after: ByPart | None,
    before: ByPart | None,
    one: Callable[[str, Estimate, Estimate], Estimate | None],
    reasons: dict[str, str],
    reason: str | None,
) -> ByPart | None:
    """Compare every text or batch that either model has; one that is missing on a side stays, as None with a reason."""
    if not after or not before:
        reasons[name] = reason or f"it was not measured {'after' if not after else 'before'}"
        return None
    ratios: dict[str, Estimate | None] = {}
    for part in [*after, *(part for part in before if part not in after)]:
        later, earlier = after.get(part), before.get(part)
        ratios[part] = None if later is None or earlier is None else one(part, later, earlier)
        if ratios[part] is None:
            side = "after" if later is None else "before"
            missing = later is None or earlier is None
            reasons[f"{name}.{part}"] = f"it was not measured {side}" if missing else "the ratio is not a finite number"
    return ratios


def _kl_growth(
    after: Measurement, before: Measurement, against_baseline: bool, reasons: dict[str, str]
) -> Estimate | None:
    later, earlier = after.accuracy.kl_mean, before.accuracy.kl_mean
    if later is None:
        reasons["kl_mean"] = after.accuracy.reasons.get("kl_mean", "it was not measured after")
        return None
    if against_baseline:
        return later
    if earlier is None:
        reasons["kl_mean"] = before.accuracy.reasons.get("kl_mean", "it was not measured before")
        return None
    ci95 = None
    if later.ci95 and earlier.ci95:
        ci95 = (later.ci95[0] - earlier.ci95[1], later.ci95[1] - earlier.ci95[0])
    return Estimate(later.value - earlier.value, ci95, min(later.n, earlier.n))


def _bytes_ratio(key: str, after: Measurement, before: Measurement, reasons: dict[str, str]) -> float | None:
    later, earlier = getattr(after.memory, key), getattr(before.memory, key)
    if later is None or not earlier:
        side = after if later is None else before
        reasons[f"{key}_ratio"] = side.memory.reasons.get(key, "it was not measured")
        return None
    return later / earlier
