"""One thing that a gate looked at, and what it found."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from compressor.gates.policy import Limit, Waiver

CheckStatus = Literal["pass", "skipped", "waived", "unmeasured", "inconclusive", "fail"]
Group = Literal["structure", "fidelity", "tasks", "slices", "cost"]
# Mildest first: the most severe of several texts or batches speaks for the metric, that of the metrics for the model.
SEVERITY: tuple[CheckStatus, ...] = ("pass", "skipped", "waived", "unmeasured", "inconclusive", "fail")


@dataclass(frozen=True)
class Check:
    """One rule held against a candidate; `text` is the sentence that a person reads.

    `rule` is the name by which a waiver means it, such as `perplexity_ratio` or `tasks.lambada`; `where` the tensor or
    file that is at fault; `baseline` what it was compared with. A structural rule that needs weights which are not here
    is `skipped`, which decides nothing; a limit on what was not measured is `unmeasured`, which is never a pass.
    """

    metric: str
    value: float | None
    ci95: tuple[float, float] | None
    limit: Limit | None
    status: CheckStatus
    text: str
    group: Group = "fidelity"
    rule: str = ""
    baseline: str | None = None
    n: int | None = None
    items_needed: int | None = None
    minimum_detectable_effect: float | None = None
    where: str | None = None
    waiver: Waiver | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in report.json. A value that is no finite number is written as null (JSON has none)."""
        return {
            "rule": self.rule or self.metric,
            "group": self.group,
            "metric": self.metric,
            "baseline": self.baseline,
            "value": _finite(self.value),
            "ci95": None if self.ci95 is None else [_finite(end) for end in self.ci95],
            "limit": None if self.limit is None else self.limit.model_dump(exclude_none=True),
            "status": self.status,
            "n": self.n,
            "items_needed": self.items_needed,
            "minimum_detectable_effect": _finite(self.minimum_detectable_effect),
            "where": self.where,
            "text": self.text,
            "waiver": None if self.waiver is None else self.waiver.model_dump(mode="json"),
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
