"""What is measured of a model, once or before and after each pass of a run; a resumed run gets it back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
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
    measure_memory,
    measure_routing,
    window_bytes,
)
from compressor.models import Model
from compressor.pipeline.costs import add_peaks, measure_speed
from compressor.pipeline.suite import Evidence, SuiteResult, measure_suite
from compressor.recipe import Evaluate, Latency
from compressor.reports import Accuracy, LayerRouting, Measurement
from compressor.reports import Latency as LatencyFigures

LATER = "measured only at the end (evaluate.when)"


@dataclass(frozen=True)
class Texts:
    """The evaluation windows of a suite: its texts, and those unlike them."""

    own: list[TextSet]
    foreign: list[TextSet]


@dataclass(frozen=True)
class Measured:
    """Figures of a model, the lines of its items file, and what a later model is compared with."""

    measurement: Measurement
    windows: tuple[dict[str, Any], ...] = ()
    evidence: Evidence = field(default_factory=Evidence)
    routing_tokens: dict[int, Tensor] | None = None

    @property
    def items(self) -> list[dict[str, Any]]:
        """The lines of items/*.jsonl."""
        return [*self.windows, *(item.to_json() for item in self.evidence.items)]

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        accuracy = self.measurement.accuracy
        return {
            "measurement": self.measurement.to_json(),
            "window_nll": {name: list(values) for name, values in accuracy.window_nll.items()},
            "windows": list(self.windows),
            "evidence": self.evidence.to_json(),
            "routing_tokens": {k: v.tolist() for k, v in (self.routing_tokens or {}).items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` gives."""
        measurement = Measurement.from_json(data["measurement"])
        nll = {name: tuple(values) for name, values in data["window_nll"].items()}
        return cls(
            measurement=replace(measurement, accuracy=replace(measurement.accuracy, window_nll=nll)),
            windows=tuple(data["windows"]),
            evidence=Evidence.from_json(data["evidence"]),
            routing_tokens={int(k): torch.tensor(v) for k, v in data["routing_tokens"].items()} or None,
        )


def suite_texts(evaluate: Evaluate, tokenizer: Any) -> Texts:
    """The windows of all texts of a suite; RecipeError for a text that does not fill one, or a name used twice."""
    own = evaluation_texts(evaluate.text, tokenizer, evaluate.windows, evaluate.length)
    if evaluate.ood is None:
        return Texts(own, [])
    foreign = evaluation_texts(dict(evaluate.ood.text), tokenizer, evaluate.windows, evaluate.length)
    if both := {text.name for text in own} & {text.name for text in foreign}:
        raise RecipeError(f"evaluate.ood.text: {min(both)!r} is a name in evaluate.text too; give it another")
    return Texts(own, foreign)


def evaluation_texts(text: str | dict[str, str], tokenizer: Any, count: int, length: int) -> list[TextSet]:
    """The windows of each evaluation text; RecipeError for a text that does not fill one."""
    sets = []
    for name, content in load_texts(text, "held_out").items():
        ids = windows(content, tokenizer, length, count)
        if not len(ids):
            raise RecipeError(f"evaluate.text: {name!r} holds less than one window of {length} tokens")
        sets.append(TextSet(name, ids, window_bytes(ids, tokenizer)))
    return sets


def measure_model(
    model: Model,
    evaluate: Evaluate,
    texts: Texts,
    *,
    keep: Path | None = None,
    baseline: Measured | None = None,
    states: BaselineStates | None = None,
    beside: Callable[[], Model] | None = None,
    files: Path | None = None,
    full: bool = True,
    budgets: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measure a model by a suite; `full=False` takes memory alone.

    A baseline leaves its last hidden states in `keep`; a later model is compared with them (`states`) and with
    `baseline`, and timed in turns with `beside`, until the ratios in `budgets` are decided. `files` is the model on
    disk.
    """
    accuracy, latency = Accuracy(reasons={"perplexity": LATER}), LatencyFigures(reasons={"prefill_ms": LATER})
    routing: tuple[LayerRouting, ...] | None = None
    reason: str | None = LATER
    lines: list[dict[str, Any]] = []
    counts = _counts(model)
    suite: SuiteResult | None = None
    release_memory(cycles=True)
    with PeakMemory() as peak:
        if full:
            result = _accuracy(model, texts, keep, states, counts, progress)
            accuracy, lines = result.accuracy, list(result.items())
            before = baseline.evidence if baseline else None
            suite = measure_suite(model, evaluate, before, texts=result.by_window(), progress=progress)
            reasons = {**accuracy.reasons, **suite.task_reasons}
            accuracy = replace(accuracy, tasks=suite.tasks, reasons=reasons)
            latency = _latency(model, evaluate.latency, beside, files, budgets, progress)
            routing, reason = _routing(model, counts, baseline)
    memory = measure_memory(model, files=files, peak=peak)
    if full and evaluate.latency is not None and evaluate.latency.loading:
        memory = add_peaks(memory, files, evaluate.latency)
    measurement = Measurement(
        accuracy=accuracy,
        memory=memory,
        latency=latency,
        routing=routing,
        routing_reason=reason,
    )
    if suite is None:
        return Measured(measurement)
    return Measured(
        measurement=replace(measurement, behaviour=suite.behaviour),
        windows=tuple(lines),
        evidence=suite.evidence,
        routing_tokens=dict(counts.tokens) if counts else None,
    )


@dataclass
class Measuring:
    """Measures a run's models against its baseline; keeps every result in the journal, so that nothing runs twice."""

    evaluate: Evaluate
    texts: Texts
    folder: Path
    journal: Journal
    source: Callable[[], Model]  # the baseline, loaded anew
    progress: Progress | None = None
    budgets: Mapping[str, float] | None = None
    baseline: Measured | None = None

    def __call__(self, model: Model, step: int, *, files: Path | None = None, full: bool = True) -> Measured:
        """The measurement after a step (-1: before any); `full=False` takes memory alone."""
        entry = self.journal.last("measured", step=step)
        if entry is None:
            first = step < 0
            measured = measure_model(
                model,
                self.evaluate,
                self.texts,
                keep=self.folder if first else None,
                baseline=self.baseline,
                states=None if first or not full else BaselineStates(self.folder, self.source().head()),
                beside=None if first else self.source,
                files=files,
                full=full,
                budgets=self.budgets,
                progress=self.progress,
            )
            entry = self.journal.append("measured", step=step, **measured.to_json())
        measured = Measured.from_json(entry)
        if step < 0:
            self.baseline = measured
        return measured


def _accuracy(
    model: Model,
    texts: Texts,
    keep: Path | None,
    states: BaselineStates | None,
    counts: RoutingCounts | None,
    progress: Progress | None,
) -> AccuracyResult:
    observe = counts.observe if counts else None
    options: dict[str, Any] = {"foreign": texts.foreign, "observe_routing": observe, "progress": progress}
    if keep is not None:
        return measure_baseline(model, texts.own, keep, **options)[0]
    return measure_accuracy(model, texts.own, baseline=states, **options)


def _latency(
    model: Model,
    wanted: Latency | None,
    beside: Callable[[], Model] | None,
    files: Path | None,
    budgets: Mapping[str, float] | None,
    progress: Progress | None,
) -> LatencyFigures:
    if wanted is None:
        return LatencyFigures(reasons={"prefill_ms": "not asked for"})
    baseline = beside() if beside else None
    return measure_speed(model, baseline, wanted, files=files, budgets=budgets, progress=progress)


def _counts(model: Model) -> RoutingCounts | None:
    stack = next((s for k in range(model.num_blocks) if (s := model.anatomy(k).experts)), None)
    return RoutingCounts(stack.num_experts) if stack else None


def _routing(
    model: Model, counts: RoutingCounts | None, baseline: Measured | None
) -> tuple[tuple[LayerRouting, ...] | None, str | None]:
    if counts is None:
        return None, "the model has no experts"
    if baseline is None or baseline.routing_tokens is None:
        return measure_routing(counts.tokens).section(), None
    kept = model.state.kept_experts or None
    return measure_routing(counts.tokens, baseline.routing_tokens, kept=kept).section(), None
