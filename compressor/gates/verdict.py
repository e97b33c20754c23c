"""Judge a report by a policy: pass, regression, or too little evidence to say."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compressor.gates.policy import Limit, Policy
from compressor.gates.readings import Reading, readings

CheckStatus = Literal["pass", "fail", "inconclusive", "unmeasured"]
VerdictStatus = Literal["pass", "regression", "inconclusive"]

# Mildest first: the most severe of several texts or batches speaks for the metric, that of the metrics for the model.
SEVERITY: tuple[CheckStatus, ...] = ("pass", "unmeasured", "inconclusive", "fail")
EXIT_CODES: dict[VerdictStatus, int] = {"pass": 0, "regression": 1, "inconclusive": 2}
# Above this a sample size is no advice, only a way of saying that the value lies on the limit.
MOST_ITEMS = 1_000_000


@dataclass(frozen=True)
class Check:
    """One limit held against the report; `text` is the sentence that a person reads."""

    metric: str
    value: float | None
    ci95: tuple[float, float] | None
    limit: Limit
    status: CheckStatus
    text: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in report.json. A value that is no finite number is written as null (JSON has none)."""
        return {
            "metric": self.metric,
            "value": _finite(self.value),
            "ci95": None if self.ci95 is None else [_finite(end) for end in self.ci95],
            "limit": self.limit.model_dump(exclude_none=True),
            "status": self.status,
            "text": self.text,
        }


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


def judge(report: Mapping[str, Any], policy: Policy) -> Verdict:
    """Hold every limit of a policy against the last step of a report (the JSON document, not the object).

    A limit is kept when the whole 95 % interval keeps it, and broken when the whole interval breaks it; between them,
    and where there is no measurement, the verdict is inconclusive, never a pass.
    """
    checks = tuple(_check(report, metric, limit) for metric, limit in policy.limits().items())
    worst = max(checks, key=lambda check: SEVERITY.index(check.status)).status
    return Verdict("pass" if worst == "pass" else "regression" if worst == "fail" else "inconclusive", checks)


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
    if value is None:
        return Check(metric, None, None, limit, "unmeasured", f"{name} was not measured: {reading.reason}")
    # NaN compares false with everything: a model that yields it is broken, not unclear.
    if not math.isfinite(value):
        return Check(metric, value, interval, limit, "fail", f"{name} is not a finite number; {limit} is allowed")
    text = f"{name} is {_number(value)}"
    if interval is None:
        text += f"; {limit} is allowed, but no interval is known (n = {reading.n})"
        return Check(metric, value, None, limit, "inconclusive", text)
    low, high = interval
    if low < high:
        text += f" [{_number(low)}, {_number(high)}]"
    text += f"; {limit} is allowed"
    status = _status(low, high, limit)
    if status == "inconclusive":
        text += f", which lies inside the 95 % interval{_more_items(value, interval, reading.n, limit)}"
    return Check(metric, value, interval, limit, status, text)


def _status(low: float, high: float, limit: Limit) -> CheckStatus:
    if limit.max is None:
        kept, broken = low >= limit.bound, high < limit.bound
    else:
        kept, broken = high <= limit.bound, low > limit.bound
    return "pass" if kept else "fail" if broken else "inconclusive"


def _more_items(value: float, interval: tuple[float, float], n: int | None, limit: Limit) -> str:
    """How many items would settle it if the value stays: an interval shrinks with the root of their number."""
    if not n or value == limit.bound:
        return ""
    side = interval[1] if value < limit.bound else interval[0]
    needed = n * ((side - value) / (limit.bound - value)) ** 2
    return f"; about n = {math.ceil(needed)} would settle it (now {n})" if needed < MOST_ITEMS else ""


def _excess(check: Check) -> float:
    """How far the outer end of the interval lies beyond the limit; larger is worse."""
    if check.value is None:
        return 0.0
    if not math.isfinite(check.value):
        return math.inf
    low, high = check.ci95 or (check.value, check.value)
    return check.limit.bound - low if check.limit.max is None else high - check.limit.bound


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
