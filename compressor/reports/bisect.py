"""Where a loss comes from: the pass, the layer, the part of it, each with what putting the original back changes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.reports.estimate import Estimate
from compressor.reports.markdown import NOTHING, estimate_text, number
from compressor.reports.pareto import markdown_table

SCHEMA = "compressor.bisect/1"
NAMES = {"kl_mean": "KL", "perplexity_ratio": "perplexity ratio"}
NOT_FINITE = "not finite"
SHOWN_OUTLIERS = 10


@dataclass(frozen=True, kw_only=True)
class PassRow:
    """The metric after a step of the run, and how far it grew there (a ratio for ratios); None if not measured."""

    id: str
    value: Estimate | None
    growth: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        data = {"id": self.id, "value": _json(self.value), "growth": self.growth}
        return data | ({"value_reason": self.reason} if self.value is None else {})


@dataclass(frozen=True, kw_only=True)
class UnitRow:
    """Layers (embedding, head) or a part of one: the metric when only they are the candidate's, or only they are not.

    `share` is how much of the loss restoring them takes away. `layers` is first and last; None for embedding and head.
    `output_error` is an expert's share in the error of its layer's output.
    """

    name: str
    layers: tuple[int, int] | None
    restored: Estimate
    share: float | None
    replaced: Estimate | None = None
    expert: int | None = None
    output_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name, "layers": list(self.layers) if self.layers else None}
        if self.replaced is not None:
            data["replaced"] = _json(self.replaced)
        data |= {"restored": _json(self.restored), "share": self.share}
        if self.expert is None:
            return data
        error = self.output_error if self.output_error is None or math.isfinite(self.output_error) else NOT_FINITE
        return data | {"expert": self.expert, "output_error": error}


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A weight that moved far more than others of its kind: |after - before| / |before|, beside the kind's median."""

    layer: int
    part: str
    expert: int | None
    change: float
    median: float

    def to_json(self) -> dict[str, Any]:
        change = self.change if math.isfinite(self.change) else NOT_FINITE
        return {"layer": self.layer, "part": self.part, "expert": self.expert, "change": change, "median": self.median}


@dataclass(frozen=True, kw_only=True)
class Blamed:
    """What is to blame, as far as it could be followed; all None where the loss is spread or there is none."""

    step: str | None = None
    layer: int | None = None
    part: str | None = None
    expert: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"pass": self.step, "layer": self.layer, "part": self.part, "expert": self.expert}


@dataclass(frozen=True, kw_only=True)
class BisectResult:
    """The answer in a sentence, what it rests on, and what could not be looked at, with the reason."""

    candidate: str
    baseline: str
    metric: str
    limit: float | None
    verdict: str
    blamed: Blamed
    whole: Estimate | None
    windows: Mapping[str, int]
    tokens: int
    passes: tuple[PassRow, ...] = ()
    passes_reason: str | None = None
    units: tuple[UnitRow, ...] = ()
    units_reason: str | None = None
    parts: tuple[UnitRow, ...] = ()
    parts_reason: str | None = None
    outliers: tuple[Outlier, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "candidate": self.candidate,
            "baseline": self.baseline,
            "metric": self.metric,
            "limit": self.limit,
            "verdict": self.verdict,
            "blamed": self.blamed.to_json(),
            "value": _json(self.whole),
            "windows": dict(self.windows),
            "tokens": self.tokens,
        }
        sections: list[tuple[str, Sequence[PassRow | UnitRow], str | None]] = [
            ("passes", self.passes, self.passes_reason),
            ("layers", self.units, self.units_reason),
            ("parts", self.parts, self.parts_reason),
        ]
        for name, rows, reason in sections:
            data[name] = [row.to_json() for row in rows] or None
            if not rows:
                data[f"{name}_reason"] = reason or "not looked at"
        return data | {"outliers": [one.to_json() for one in self.outliers], "notes": list(self.notes)}

    def to_text(self) -> str:
        """The verdict, then the tables, as Markdown."""
        name = NAMES[self.metric]
        sections = [f"# {self.candidate}: where the loss comes from", f"**{self.verdict}**", self._basis(name)]
        sections += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        sections.append("## By pass\n\n" + self._passes(name))
        sections.append("## By layer\n\n" + self._units(name))
        sections.append("## Inside the layer\n\n" + self._parts(name))
        if self.outliers:
            sections.append("## Weights that moved more than others of their kind\n\n" + self._outliers())
        return "\n\n".join(sections) + "\n"

    def _basis(self, name: str) -> str:
        texts = ", ".join(f"{count} of {text}" for text, count in self.windows.items())
        value = f"{name} {value_text(self.whole)} against {self.baseline}" if self.whole else f"against {self.baseline}"
        limit = "" if self.limit is None else f", limit {number(self.limit)}"
        return f"{value}{limit}; {self.tokens:,} tokens in windows: {texts}." if self.windows else f"{value}{limit}."

    def _passes(self, name: str) -> str:
        if not self.passes:
            return f"{self.passes_reason}."
        header = ["pass", name, "times what it was before" if self.metric == "perplexity_ratio" else "added"]
        rows = [
            [row.id, value_text(row.value) if row.value else f"{NOTHING} ({row.reason})", number(row.growth)]
            for row in self.passes
        ]
        return markdown_table(header, rows) + (f"\n\n{self.passes_reason}." if self.passes_reason else "")

    def _units(self, name: str) -> str:
        if not self.units:
            return f"{self.units_reason}."
        header = ["layers", f"{name}, only these compressed", f"{name}, only these restored", "share of the loss"]
        rows = [
            [row.name, value_text(row.replaced), value_text(row.restored), percent(row.share)] for row in self.units
        ]
        return markdown_table(header, rows)

    def _parts(self, name: str) -> str:
        if not self.parts:
            return f"{self.parts_reason}."
        header = ["part", f"{name}, only this restored", "share of the loss", "share of the layer's output error"]
        rows = [
            [row.name, value_text(row.restored), percent(row.share), percent(row.output_error)] for row in self.parts
        ]
        return markdown_table(header, rows) + (f"\n\n{self.parts_reason}." if self.parts_reason else "")

    def _outliers(self) -> str:
        rows = [
            [f"layer {one.layer}, {one.part}", percent(one.change), percent(one.median)]
            for one in self.outliers[:SHOWN_OUTLIERS]
        ]
        left = len(self.outliers) - len(rows)
        more = f"\n\n{left} more are in the JSON document." if left else ""
        return markdown_table(["weight", "moved by, of its size", "median of its kind"], rows) + more


def value_text(estimate: Estimate | None) -> str:
    """A value with its interval; in words where it is not finite."""
    return estimate_text(estimate) if estimate is None or estimate.is_finite else NOT_FINITE


def percent(share: float | None) -> str:
    """`97 %`, or a dash."""
    if share is None:
        return NOTHING
    return NOT_FINITE if math.isinf(share) else f"{round(100 * share)} %"


def _json(estimate: Estimate | None) -> dict[str, Any] | str | None:
    if estimate is None:
        return None
    return estimate.to_json() if estimate.is_finite else NOT_FINITE
