"""What is measured of a model before and after each pass, and how a resumed run gets it back."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from compressor.calibration import Progress, load_texts, release_memory, windows
from compressor.checkpoint import Journal
from compressor.errors import RecipeError
from compressor.metrics import (
    AccuracyResult,
    BaselineStates,
    PeakMemory,
    RoutingCounts,
    TextSet,
    measure_accuracy,
    measure_baseline,
    measure_latency,
    measure_memory,
    measure_routing,
    window_bytes,
)
from compressor.models import Model
from compressor.recipe import Evaluate, Latency
from compressor.reports import Accuracy, LayerRouting, Measurement
from compressor.reports import Latency as LatencyFigures

# Share of the memory that is free which two live models may take before the speed comparison is left out.
LIVE_SHARE = 0.6


def evaluation_texts(text: str | dict[str, str], tokenizer: Any, count: int, length: int) -> list[TextSet]:
    """The windows of each evaluation text; RecipeError for a text that does not fill one."""
    sets = []
    for name, content in load_texts(text, "held_out").items():
        ids = windows(content, tokenizer, length, count)
        if not len(ids):
            raise RecipeError(f"evaluate.text: {name!r} holds less than one window of {length} tokens")
        sets.append(TextSet(name, ids, window_bytes(ids, tokenizer)))
    return sets


@dataclass
class Measuring:
    """Measures one model against the run's baseline; keeps every result in the journal, so that nothing runs twice."""

    evaluate: Evaluate
    texts: list[TextSet]
    folder: Path
    journal: Journal
    source: Callable[[], Model]  # the baseline, loaded anew
    progress: Progress | None = None
    baseline_routing: dict[int, Tensor] | None = None

    def __call__(
        self, model: Model, step: int, *, files: Path | None = None, full: bool = True
    ) -> tuple[Measurement, list[dict[str, Any]]]:
        """The measurement after a step (-1: before any), and its scores by window; `full=False` takes memory alone."""
        entry = self.journal.last("measured", step=step)
        if entry is None:
            entry = self._measure(model, step, files, full)
        measurement = Measurement.from_json(entry["measurement"])
        nll = {name: tuple(values) for name, values in entry["window_nll"].items()}
        if step < 0 and entry["routing_tokens"]:
            import torch

            self.baseline_routing = {int(k): torch.tensor(v) for k, v in entry["routing_tokens"].items()}
        accuracy = replace(measurement.accuracy, window_nll=nll)
        return replace(measurement, accuracy=accuracy), entry["items"]

    def _measure(self, model: Model, step: int, files: Path | None, full: bool) -> dict[str, Any]:
        later = "measured only at the end (evaluate.when)"
        accuracy, latency = Accuracy(reasons={"perplexity": later}), LatencyFigures(reasons={"prefill_ms": later})
        routing: tuple[LayerRouting, ...] | None = None
        reason: str | None = later
        items: list[dict[str, Any]] = []
        counts = self._counts(model)
        release_memory(cycles=True)
        with PeakMemory() as peak:
            if full:
                result = self._accuracy(model, step, counts)
                accuracy, items = result.accuracy, list(result.items())
                latency = self._latency(model, step)
                routing, reason = self._routing(model, step, counts)
        return self.journal.append(
            "measured",
            step=step,
            measurement=Measurement(
                accuracy=accuracy,
                memory=measure_memory(model, files=files, peak=peak),
                latency=latency,
                routing=routing,
                routing_reason=reason,
            ).to_json(),
            window_nll={name: list(values) for name, values in accuracy.window_nll.items()},
            items=items,
            routing_tokens={k: v.tolist() for k, v in counts.tokens.items()} if counts else {},
        )

    def _accuracy(self, model: Model, step: int, counts: RoutingCounts | None) -> AccuracyResult:
        observe = counts.observe if counts else None
        if step < 0:
            result, _ = measure_baseline(
                model, self.texts, self.folder, observe_routing=observe, progress=self.progress
            )
            return result
        baseline = BaselineStates(self.folder, self.source().head())
        return measure_accuracy(model, self.texts, baseline=baseline, observe_routing=observe, progress=self.progress)

    def _latency(self, model: Model, step: int) -> LatencyFigures:
        wanted = self.evaluate.latency
        if wanted is None:
            return LatencyFigures(reasons={"prefill_ms": "not asked for"})
        baseline = self.source() if step >= 0 else None
        return compare_latency(model, baseline, wanted, self.progress)

    def _counts(self, model: Model) -> RoutingCounts | None:
        stack = next((s for k in range(model.num_blocks) if (s := model.anatomy(k).experts)), None)
        return RoutingCounts(stack.num_experts) if stack else None

    def _routing(
        self, model: Model, step: int, counts: RoutingCounts | None
    ) -> tuple[tuple[LayerRouting, ...] | None, str | None]:
        if counts is None:
            return None, "the model has no experts"
        if step < 0:
            return measure_routing(counts.tokens).section(), None
        kept = model.state.kept_experts or None
        return measure_routing(counts.tokens, self.baseline_routing, kept=kept).section(), None


def compare_latency(model: Model, baseline: Model | None, wanted: Latency, progress: Progress | None) -> LatencyFigures:
    """Speed of a model, beside the baseline in the same process; left out, with the reason, where both do not fit."""
    needed = model.weight_bytes() + (baseline.weight_bytes() if baseline else 0)
    free = psutil.virtual_memory().available
    if needed > LIVE_SHARE * free:
        return LatencyFigures(reasons={"prefill_ms": f"the weights take {needed:,} bytes in memory, {free:,} are free"})
    if progress is not None:
        progress("measuring speed", 0, 1)
    options = {"batch_sizes": wanted.batch, "prompt": wanted.prompt, "generate": wanted.generate}
    with model.live() as live:
        if baseline is None:
            figures = measure_latency(live, **options)  # type: ignore[arg-type]
        else:
            with baseline.live() as dense:
                figures = measure_latency(live, baseline=dense, **options)  # type: ignore[arg-type]
    if progress is not None:
        progress("measuring speed", 1, 1)
    return figures
