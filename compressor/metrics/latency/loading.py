"""How long a folder takes to become a model that answers."""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.metrics.bootstrap import bootstrap_median
from compressor.metrics.latency.ratio import is_decided, paired_ratio
from compressor.metrics.latency.rounds import EARLY_LEVEL, decoding_step_ms, turns_of
from compressor.metrics.latency.threads import others_share, useful_threads
from compressor.models import load_model
from compressor.reports.estimate import Estimate

FEWEST_LOADS = 4  # two blocks of A B B A: one alone has no interval

Loader = Callable[[], contextlib.AbstractContextManager[nn.Module]]


@dataclass(frozen=True, kw_only=True)
class LoadTimes:
    """Seconds until a model has answered its first token, medians over loads with a warm file cache.

    `ratio_to_baseline` is from loads that took turns; None, as `baseline_load_s` is, where none was loaded beside it.
    `threads` is what torch used: one on a crowded machine (`threads_reason`).
    """

    load_s: Estimate
    baseline_load_s: Estimate | None = None
    ratio_to_baseline: Estimate | None = None
    threads: int
    threads_reason: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)


@torch.inference_mode()
def measure_loading(
    model: str | Path | Loader,
    *,
    baseline: str | Path | Loader | None = None,
    budget_ratio: float | None = None,
    loads: int = 6,
    max_seconds: float = 60.0,
    seed: int = 0,
) -> LoadTimes:
    """Time the way from a folder to a model that has answered one token, beside the baseline's.

    What counts is opening the folder, reading its weights, bringing them into the layout they run in, and the first
    forward, which touches every weight that was only mapped. Python, torch and transformers are loaded already, and so
    is the file cache: one load of each side comes first and does not count. At least `loads` of each side follow, with
    a `budget_ratio` as many as decide it; `max_seconds` ends both, but not before four. `model` and `baseline` may also
    be functions that give a context manager with the model in it.
    """
    if loads < 1:
        raise RecipeError(f"load time: loads must be at least 1, not {loads}")
    sides = [_loader(side) for side in (model, baseline) if side is not None]
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        share = others_share()
        with sides[0]() as live:
            ids_B1 = _one_token(live)
            crowded = stack.enter_context(useful_threads(lambda: decoding_step_ms(live, ids_B1), ids_B1.device, share))
        for load in sides[1:]:
            _seconds(load)
        threads = torch.get_num_threads()
        times = _take_turns(sides, loads, None if baseline is None else budget_ratio, start + max_seconds, seed)
    circumstances: Any = {"load_s": bootstrap_median(times[0]), "threads": threads, "threads_reason": crowded}
    if baseline is None:
        reason = "no baseline was loaded beside it"
        return LoadTimes(**circumstances, reasons={"baseline_load_s": reason, "ratio_to_baseline": reason})
    return LoadTimes(
        **circumstances, baseline_load_s=bootstrap_median(times[1]), ratio_to_baseline=paired_ratio(*times)
    )


def _take_turns(
    sides: Sequence[Loader], loads: int, budget_ratio: float | None, deadline: float, seed: int
) -> tuple[list[float], ...]:
    """Seconds of each load by side."""
    times: tuple[list[float], ...] = tuple([] for _ in sides)
    begun = time.perf_counter()
    for turn in turns_of(len(sides), seed):
        for side in turn:
            times[side].append(_seconds(sides[side]))
        count, now = len(times[0]), time.perf_counter()
        if count < FEWEST_LOADS or count % len(sides):
            continue
        is_open = budget_ratio is not None and not is_decided(paired_ratio(*times, level=EARLY_LEVEL), budget_ratio)
        if (count >= loads and not is_open) or now + (now - begun) * len(sides) / count > deadline:
            break
    return times


def _loader(model: str | Path | Loader) -> Loader:
    if callable(model):
        return model
    name = str(model)
    return lambda: load_model(name).live()


def _seconds(load: Loader) -> float:
    gc.collect()  # what the load before left behind would be collected in the middle of this one
    start = time.perf_counter()
    with load() as model:
        decoding_step_ms(model, _one_token(model))
        return time.perf_counter() - start


def _one_token(model: nn.Module) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
