"""Judge a report by a policy: pass, regression, or too little evidence to say."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compressor.gates.check import SEVERITY, Check, CheckStatus
from compressor.gates.policy import Limit, Policy
from compressor.gates.readings import Reading, readings

VerdictStatus = Literal["pass", "regression", "inconclusive"]

EXIT_CODES: dict[VerdictStatus, int] = {"pass": 0, "regression": 1, "inconclusive": 2}
# Above this a sample size is no advice, only a way of saying that the value lies on the limit.
MOST_ITEMS = 1_000_000
COST = ("weight_bytes", "file_bytes", "peak_bytes", "decode_latency", "prefill_latency")


@dataclass(frozen=True)
class Verdict:
    """What the gate says, and each check behind it."""

    status: VerdictStatus
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """What the command returns: 0 pass, 1 regression, 2 inconclusive."""
        return EXIT_CODES[self.status]

    def to_json(self) -> dict[str, Any]:
        """As it stands in report.json under `gate`."""
        return {"verdict": self.status, "checks": [check.to_json() for check in self.checks]}


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """The verdict of all checks together: the most severe one speaks; what is waived does not."""
    checks = tuple(checks)
    worst = max((check.status for check in checks), key=SEVERITY.index, default="inconclusive")
    if worst in ("pass", "skipped", "waived"):
        return Verdict("pass", checks)
    return Verdict("regression" if worst == "fail" else "inconclusive", checks)


def judge(report: Mapping[str, Any], policy: Policy) -> Verdict:
    """Hold every limit of a policy against the last step of a report (the JSON document, not the object).

    A limit is kept when the whole 95 % interval keeps it, and broken when the whole interval breaks it; between them,
    and where there is no measurement, the verdict is inconclusive, never a pass.
    """
    return verdict_of(limit_checks(report, policy))


def limit_checks(report: Mapping[str, Any], policy: Policy) -> list[Check]:
    """One check for each limit of the policy."""
    return [_check(report, metric, limit) for metric, limit in policy.resolved().limits().items()]


def _check(report: Mapping[str, Any], metric: str, limit: Limit) -> Check:
    found = readings(report, metric)
    text = getattr(limit, "text", None)
    if text is not None:
        names = [reading.part for reading in found if reading.part is not None]
        found = [reading for reading in found if reading.part == text] or [
            Reading(text, reason=f"the report has no such text; it has {', '.join(names) or 'none by name'}")
        ]
    candidates = [_judge_one(metric, reading, limit) for reading in found]
    return max(candidates, key=lambda check: (SEVERITY.index(check.status), _excess(check)))


def _judge_one(metric: str, reading: Reading, limit: Limit) -> Check:
    name = metric if reading.part is None else f"{metric} ({reading.part})"
    value, interval = reading.value, reading.ci95
    group: Any = "cost" if metric.startswith(COST) else "fidelity"

    def check(status: CheckStatus, text: str, needed: int | None = None) -> Check:
        return Check(
            metric, value, interval, limit, status, text, group=group, rule=metric, n=reading.n, items_needed=needed
        )

    if value is None:
        return check("unmeasured", f"{name} was not measured: {reading.reason}")
    # NaN compares false with everything: a model that yields it is broken, not unclear.
    if not math.isfinite(value):
        return check("fail", f"{name} is not a finite number; {limit} is allowed")
    text = f"{name} is {_number(value)}"
    if interval is None:
        return check("inconclusive", f"{text}; {limit} is allowed, but no interval is known (n = {reading.n})")
    low, high = interval
    if low < high:
        text += f" [{_number(low)}, {_number(high)}]"
    text += f"; {limit} is allowed"
    status = _status(low, high, limit)
    if status != "inconclusive":
        return check(status, text)
    text += ", which lies inside the 95 % interval"
    needed = _items_needed(value, interval, reading.n, limit)
    if needed is not None:
        text += f"; about n = {needed} would settle it (now {reading.n})"
    return check(status, text, needed)


def _status(low: float, high: float, limit: Limit) -> CheckStatus:
    if limit.max is None:
        kept, broken = low >= limit.bound, high < limit.bound
    else:
        kept, broken = high <= limit.bound, low > limit.bound
    return "pass" if kept else "fail" if broken else "inconclusive"


def _items_needed(value: float, interval: tuple[float, float], n: int | None, limit: Limit) -> int | None:
    """How many items would settle it if the value stays: an interval shrinks with the root of their number."""
    if not n or value == limit.bound:
        return None
    side = interval[1] if value < limit.bound else interval[0]
    needed = n * ((side - value) / (limit.bound - value)) ** 2
    return math.ceil(needed) if needed < MOST_ITEMS else None


def _excess(check: Check) -> float:
    """How far the outer end of the interval lies beyond the limit; larger is worse."""
    if check.value is None:
        return 0.0
    if not math.isfinite(check.value):
        return math.inf
    low, high = check.ci95 or (check.value, check.value)
    assert check.limit is not None
    return check.limit.bound - low if check.limit.max is None else high - check.limit.bound


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
