"""What a model costs to run: its speed in turns with the baseline's, and where asked loading, peaks, energy."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from compressor.calibration import Progress
from compressor.errors import EnvironmentProblem
from compressor.gates import Policy
from compressor.metrics import measure_latency
from compressor.metrics.energy import measure_energy
from compressor.metrics.latency import measure_loading
from compressor.metrics.memory import measure_peaks
from compressor.models import Model
from compressor.recipe import Latency
from compressor.reports import Latency as LatencyFigures
from compressor.reports import Memory

# Share of the memory that is free which two live models may take before the speed comparison is left out.
LIVE_SHARE = 0.6
# The limits of a policy on speed, and the figure that each is about.
LATENCY = {"decode_latency_ratio": "decode_ms_per_token", "prefill_latency_ratio": "prefill_ms"}
NOT_WRITTEN = "it was not written to disk"
NOT_OPENED = "GGUF is loaded by other software: time it there"


def latency_budgets(policy: Policy | None) -> dict[str, float]:
    """The highest ratios that a policy allows, by figure: turns go on until these are decided."""
    limits = {} if policy is None else policy.limits()
    return {LATENCY[name]: limit.max for name, limit in limits.items() if name in LATENCY and limit.max is not None}


def measure_speed(
    model: Model,
    baseline: Model | None,
    wanted: Latency,
    *,
    files: Path | None = None,
    budgets: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> LatencyFigures:
    """Speed of a model, beside the baseline in the same process; left out, with the reason, where both do not fit.

    `files` is the model as it is on disk, which is what loading is timed of; `budgets` are ratios that are to be
    decided.
    """
    needed = model.weight_bytes() + (baseline.weight_bytes() if baseline else 0)
    free = psutil.virtual_memory().available
    if needed > LIVE_SHARE * free:
        return LatencyFigures(reasons={"prefill_ms": f"the weights take {needed:,} bytes in memory, {free:,} are free"})
    if progress is not None:
        progress("measuring speed", 0, 1)
    with model.live() as live, baseline.live() if baseline else contextlib.nullcontext() as dense:
        figures = _in_turns(live, dense, wanted, budgets or {})
    if wanted.loading:
        figures = _with_loading(figures, files, baseline)
    if progress is not None:
        progress("measuring speed", 1, 1)
    return figures


def add_peaks(memory: Memory, files: Path | None, wanted: Latency) -> Memory:
    """The memory section with what a process of its own takes to load the files and to generate with them."""
    keys = ("loading_peak_bytes", "generating_peak_bytes")
    if reason := _why_not_opened(files):
        return replace(memory, extra=dict.fromkeys(keys), reasons={**memory.reasons, **dict.fromkeys(keys, reason)})
    assert files is not None
    try:
        peaks = measure_peaks(files, prompt=wanted.prompt, generate=wanted.generate)
    except EnvironmentProblem as error:  # the process may have been killed for its memory, which says enough
        return replace(memory, extra=dict.fromkeys(keys), reasons={**memory.reasons, **dict.fromkeys(keys, str(error))})
    found = dict(zip(keys, (peaks.loading_bytes, peaks.generating_bytes), strict=True))
    reasons = {key: peaks.reason for key, value in found.items() if value is None and peaks.reason}
    return replace(memory, extra=found, reasons={**memory.reasons, **reasons})


def _in_turns(
    live: nn.Module, dense: nn.Module | None, wanted: Latency, budgets: Mapping[str, float]
) -> LatencyFigures:
    figures = measure_latency(
        live,
        baseline=dense,
        batch_sizes=wanted.batch,
        prompt=wanted.prompt,
        generate=wanted.generate,
        budget_ratio=budgets if budgets and dense is not None else None,
    )
    if wanted.energy is None:
        return figures
    used = measure_energy(live, baseline=dense, country=wanted.energy, prompt=wanted.prompt, generate=wanted.generate)
    return _extended(figures, {"energy": used.figures()}, {f"energy.{key}": why for key, why in used.reasons.items()})


def _with_loading(figures: LatencyFigures, files: Path | None, baseline: Model | None) -> LatencyFigures:
    if reason := _why_not_opened(files):
        return _extended(figures, {"load_s": None}, {"load_s": reason})
    assert files is not None
    times = measure_loading(files, baseline=None if baseline is None else baseline.path)
    found: dict[str, Any] = {"load_s": times.load_s}
    if times.ratio_to_baseline is not None:
        found |= {"baseline_load_s": times.baseline_load_s, "load_ratio_to_baseline": times.ratio_to_baseline}
    return _extended(figures, found, times.reasons)


def _why_not_opened(files: Path | None) -> str | None:
    """Why a fresh process cannot load what was written, or None."""
    if files is None:
        return NOT_WRITTEN
    return NOT_OPENED if any(files.glob("*.gguf")) else None


def _extended(figures: LatencyFigures, extra: Mapping[str, Any], reasons: Mapping[str, str]) -> LatencyFigures:
    return replace(figures, extra={**figures.extra, **extra}, reasons={**figures.reasons, **reasons})
