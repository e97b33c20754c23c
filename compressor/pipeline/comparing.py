"""Measure models that have no records yet, so that a gate can pair them."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from compressor.calibration import Progress
from compressor.errors import EnvironmentProblem, RecipeError
from compressor.metrics import BaselineStates, describe_environment
from compressor.models import Model
from compressor.pipeline.costs import measure_speed
from compressor.pipeline.measuring import Measured, measure_model, suite_texts
from compressor.pipeline.sides import Side
from compressor.recipe import Evaluate


def compare_models(
    model: Model, baseline: Model | None, evaluate: Evaluate, progress: Progress | None = None
) -> tuple[Measured, Measured | None]:
    """Measure a model by a suite, and before it the baseline that it is compared with, if there is one.

    RecipeError where their tokenizers differ: their tokens could not be paired.
    """
    texts = suite_texts(evaluate, model.tokenizer)
    if baseline is None:
        return measure_model(model, evaluate, texts, files=model.path, progress=progress), None
    if baseline.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise RecipeError(f"{baseline.name} has another tokenizer than {model.name}: their tokens cannot be paired")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        untimed = evaluate.model_copy(update={"latency": None})  # it is timed in turns, later
        before = measure_model(baseline, untimed, texts, keep=folder, files=baseline.path, progress=progress)
        after = measure_model(
            model,
            evaluate,
            texts,
            baseline=before,
            states=BaselineStates(folder, baseline.head()),
            beside=lambda: baseline,
            files=model.path,
            progress=progress,
        )
    return after, before


def measure_side(candidate: Side, baseline: Side, evaluate: Evaluate, progress: Progress | None) -> tuple[Side, Side]:
    """Both sides measured alike: together where both models are here, else the one that has no records alone."""
    untimed = evaluate.model_copy(update={"latency": None})  # only where a limit asks for it: time_sides
    if candidate.model is not None and baseline.model is not None:
        after, before = compare_models(candidate.load(), baseline.load(), untimed, progress)
        assert before is not None
        return _with(candidate, after), _with(baseline, before)
    missing = candidate if candidate.measurement is None else baseline
    if missing.model is None:
        raise EnvironmentProblem(f"{missing.name}: neither records nor a model of it are here")
    measured = compare_models(missing.load(), None, untimed, progress)[0]
    if missing is candidate:
        return _with(candidate, measured), baseline
    return candidate, _with(baseline, measured)


def time_sides(
    candidate: Side, baseline: Side, evaluate: Evaluate, budgets: Mapping[str, float], progress: Progress | None
) -> Side:
    """The candidate with its speed, timed in turns with the baseline until the budgets are decided.

    As it was where a model is missing.
    """
    if candidate.model is None or baseline.model is None or evaluate.latency is None:
        return candidate
    assert candidate.measurement is not None
    model = candidate.load()
    figures = measure_speed(
        model, baseline.load(), evaluate.latency, files=model.path, budgets=budgets, progress=progress
    )
    timed = replace(candidate.measurement, latency=figures)
    return replace(candidate, measurement=timed, timed_beside=baseline.name)


def _with(side: Side, measured: Measured) -> Side:
    return replace(
        side,
        measurement=measured.measurement,
        windows=measured.windows,
        items=measured.evidence.items,
        environment=describe_environment(),
    )
