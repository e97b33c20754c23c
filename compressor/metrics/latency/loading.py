"""How long a folder takes to become a model that answers."""

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.metrics.bootstrap import bootstrap_median
from compressor.metrics.latency.crowd import Conditions, quiet_conditions
from compressor.metrics.latency.ratio import is_decided, paired_ratio, ratio_of_computing
from compressor.metrics.latency.rounds import EARLY_LEVEL, Span, decoding_step_ms, now, since, turns_of
from compressor.metrics.opening import opened
from compressor.reports.estimate import Estimate

FEWEST_LOADS = 4  # two blocks of A B B A: one alone has no interval

Times = list[list[Span]]  # by side
Loader = Callable[[], contextlib.AbstractContextManager[nn.Module]]


@dataclass(frozen=True, kw_only=True)
class LoadTimes:
    """Seconds until a model has answered its first token, medians over loads with a warm file cache, on the wall.

    `ratio_to_baseline` is from loads that took turns; None, as `baseline_load_s` is, where none was loaded beside it.
    `conditions` says which clock and how many threads the ratio rests on.
    """

    load_s: Estimate
    baseline_load_s: Estimate | None = None
    ratio_to_baseline: Estimate | None = None
    conditions: Conditions
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
    deadline = time.perf_counter() + max_seconds
    with contextlib.ExitStack() as stack:
        with sides[0]() as live:
            step = functools.partial(decoding_step_ms, live, _one_token(live))
            conditions = stack.enter_context(quiet_conditions(step, next(live.parameters()).device))
        for load in sides[1:]:
            _span(load)
        is_enough = _enough(conditions, loads, None if baseline is None else budget_ratio, deadline)
        times = _take_turns(sides, is_enough, seed)
    seconds = [bootstrap_median([span.wall_ms / 1000 for span in side]) for side in times]
    if baseline is None:
        reason = "no baseline was loaded beside it"
        reasons = {"baseline_load_s": reason, "ratio_to_baseline": reason}
        return LoadTimes(load_s=seconds[0], conditions=conditions, reasons=reasons)
    return LoadTimes(
        load_s=seconds[0],
        baseline_load_s=seconds[1],
        ratio_to_baseline=_ratio(times, conditions),
        conditions=conditions,
    )


def _loader(model: str | Path | Loader) -> Loader:
    if callable(model):
        return model
    return lambda: opened(model)


def _take_turns(sides: Sequence[Loader], is_enough: Callable[[Times], bool], seed: int) -> Times:
    """The time of each load by side."""
    times: Times = [[] for _ in sides]
    for turn in turns_of(len(sides), seed):
        for side in turn:
            times[side].append(_span(sides[side]))
        if is_enough(times):
            break
    return times


def _enough(conditions: Conditions, loads: int, budget_ratio: float | None, deadline: float) -> Callable[[Times], bool]:
    """When to stop: at the number of loads, once a budget is decided, or where the next turn would end too late."""
    begun = time.perf_counter()

    def enough(times: Times) -> bool:
        count, now_s = len(times[0]), time.perf_counter()
        if count < FEWEST_LOADS or count % len(times):
            return False
        is_open = budget_ratio is not None and not is_decided(_ratio(times, conditions, EARLY_LEVEL), budget_ratio)
        return (count >= loads and not is_open) or now_s + (now_s - begun) * len(times) / count > deadline

    return enough


def _ratio(times: Times, conditions: Conditions, level: float = 0.95) -> Estimate:
    wall_ms = [[span.wall_ms for span in side] for side in times]
    if conditions.clock == "wall":
        return paired_ratio(*wall_ms, level=level)
    return ratio_of_computing([[span.cpu_ms for span in side] for side in times], wall_ms, level=level)


def _span(load: Loader) -> Span:
    gc.collect()  # what the load before left behind would be collected in the middle of this one
    start = now()
    with load() as model:
        decoding_step_ms(model, _one_token(model))
        return since(start)


def _one_token(model: nn.Module) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
