"""What a bench found: the speed of two models in turns, what each takes, whether one is faster; in JSON, as a table."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from compressor.reports.estimate import Estimate
from compressor.reports.markdown import NOTHING, estimate_text, megabytes, number
from compressor.reports.measurement import ByPart, Latency, Memory, section_to_json

SCHEMA = "compressor.bench/1"
WIDTH = 120
TIMES = {"prefill_ms": "prefill ms", "decode_ms_per_token": "decode ms a token"}
BYTES = {"loading_peak_bytes": "peak while loading", "generating_peak_bytes": "peak while generating"}
Row = tuple[str, str, str, str, str, str]  # figure, batch, the model's, the baseline's, their ratio, what it says


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One of the two: its name, what runs it (dense, packed, onnx), the dtype it computes in, what it takes."""

    name: str
    kind: str
    dtype: str
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "dtype": self.dtype, "memory": section_to_json(self.memory)}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The figures of `compress bench`; ratios in `latency` are model / baseline, from turns that both took."""

    model: Subject
    baseline: Subject | None
    latency: Latency
    notes: tuple[str, ...]
    environment: Mapping[str, Any]

    def verdicts(self) -> dict[str, dict[str, str]]:
        """By figure and batch: faster, slower or undecided."""
        ratios = self.latency.ratio_to_baseline or {}
        return {
            figure: {batch: verdict(ratio) for batch, ratio in by_batch.items() if ratio is not None}
            for figure, by_batch in ratios.items()
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model.to_json(),
            "baseline": self.baseline.to_json() if self.baseline else None,
            "latency": section_to_json(self.latency),
            "verdicts": self.verdicts(),
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    def to_text(self, width: int = WIDTH) -> str:
        """A heading, the table, and beneath it what is missing and why."""
        head = _described(self.model) + (f"\nbeside {_described(self.baseline)}" if self.baseline else "")
        parts = [head, _circumstances(self.latency), _table(list(self._rows()), self.baseline is not None, width)]
        remarks = dict.fromkeys([*self.notes, *self._why_missing()])
        return "\n".join([*parts, *(f"- {remark}" for remark in remarks)])

    def _rows(self) -> Iterator[Row]:
        theirs: Any = self.latency.extra.get("baseline", {})
        for figure, label in TIMES.items():
            ratios = (self.latency.ratio_to_baseline or {}).get(figure, {})
            yield from _by_batch(label, getattr(self.latency, figure), theirs.get(figure), ratios)
        yield from _by_batch("tokens/s", self.latency.tokens_per_s, theirs.get("tokens_per_s"), {})
        before = self.baseline.memory if self.baseline else Memory()
        yield _of_bytes("weights", self.model.memory.weight_bytes, before.weight_bytes)
        for key, label in BYTES.items():
            yield _of_bytes(label, self.model.memory.extra.get(key), before.extra.get(key))

    def _why_missing(self) -> Iterator[str]:
        yield from (why for key, why in self.latency.reasons.items() if key != "ratio_to_baseline")
        for side in (self.model, self.baseline):
            if side is not None:
                yield from (f"{side.name}: {why}" for key, why in side.memory.reasons.items() if key in BYTES)


def verdict(ratio: Estimate) -> str:
    """Whether a time is shorter (faster) or longer than the baseline's: its whole interval has to say so."""
    if ratio.ci95 is None or ratio.ci95[0] <= 1 <= ratio.ci95[1]:
        return "undecided"
    return "faster" if ratio.value < 1 else "slower"


def _by_batch(label: str, ours: ByPart | None, theirs: ByPart | None, ratios: ByPart) -> Iterator[Row]:
    for batch, own in (ours or {}).items():
        ratio = ratios.get(batch)
        says = (estimate_text(ratio), verdict(ratio)) if ratio is not None else ("", "")
        yield (label, batch, estimate_text(own), estimate_text((theirs or {}).get(batch)), *says)


def _of_bytes(label: str, ours: Any, theirs: Any) -> Row:
    ratio = number(ours / theirs) if ours is not None and theirs else ""
    return (label, "", megabytes(ours), megabytes(theirs), ratio, "")


def _described(side: Subject) -> str:
    return f"{side.name} ({side.kind}, {side.dtype})"


def _circumstances(latency: Latency) -> str:
    told = latency.extra
    if "clock" not in told:
        return "the speed was not measured"
    size = f"prompt {told['prompt']}, generate {told['generate']}, {told['device']}, threads {told['threads']}"
    how = f"{size}, {told['clock']} clock; medians and ratios with 95 % intervals"
    return f"{how}\n{told['crowded']}" if "crowded" in told else how


def _table(rows: list[Row], with_baseline: bool, width: int) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    heads = ["", "batch", "model", "baseline", "model / baseline", ""] if with_baseline else ["", "batch", "model"]
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place in (0, 5) else "right", no_wrap=place == 0)
    for row in rows:
        if any(cell not in (NOTHING, "") for cell in row[2:]):
            table.add_row(*row[: len(heads)])
    page = io.StringIO()
    Console(file=page, width=width).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip().splitlines())
