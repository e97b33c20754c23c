"""The latency section of the report: how fast a model reads a prompt and writes each next token.

B sequences in a batch, P prompt tokens.
"""

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.metrics.bootstrap import bootstrap_median, mapped
from compressor.metrics.latency.crowd import Clock, quiet_conditions
from compressor.metrics.latency.rounds import (
    DECODE,
    FIGURES,
    PREFILL,
    TTFT,
    Patience,
    Rounds,
    decoding_step_ms,
    take_rounds,
)
from compressor.reports.estimate import Estimate
from compressor.reports.measurement import Latency

# A model so small that its rounds are cheap is measured this long, since more rounds narrow the interval.
PATIENCE_S = 6.0


@torch.inference_mode()
def measure_latency(
    model: nn.Module,
    *,
    batch_sizes: Sequence[int],
    prompt: int,
    generate: int,
    baseline: nn.Module | None = None,
    budget_ratio: float | Mapping[str, float] | None = None,
    min_rounds: int = 5,
    max_seconds: float = 60.0,
    seed: int = 0,
) -> Latency:
    """Time a transformers causal LM: a forward over `prompt` random tokens, then `generate` greedy steps with a cache.

    Gives the latency section of the report, medians over rounds by batch size: `prefill_ms`, `ttft_ms` (from the
    request to the first token), `decode_ms_per_token` (one step of the whole batch), `tokens_per_s` (what the batch
    decodes), and `ratio_to_baseline` (this model / baseline) from turns that both take side by side.

    With a baseline an even number of rounds is made, each side first equally often. Rounds go on for a few seconds, at
    least `min_rounds`. With a `budget_ratio` (of prefill and decoding alike, or by figure: {"decode_ms_per_token":
    1.05}) they go on until each ratio lies clearly below or above it. `max_seconds` for all batch sizes together ends
    them in any case, but not before three; a slow model takes fewer decoding steps a round (`decode_steps`).

    A batch that does not fit in memory, or a prompt too long for the model, is None with a reason. RecipeError for
    sizes that are not positive, and for a budget without a baseline. The models stay in the mode (train or eval) that
    they were in. On a crowded machine the CPU time of one thread may be what counts (`clock`, `threads`, `crowded`; the
    times on the wall are in `wall`).
    """
    _check_sizes(batch=min(batch_sizes, default=0), prompt=prompt, generate=generate, rounds=min_rounds)
    budgets = _budgets(budget_ratio, has_baseline=baseline is not None)
    sides = (model,) if baseline is None else (model, baseline)
    measured: dict[int, Rounds] = {}
    reasons: dict[int, str] = {}
    too_long = _too_long(sides, prompt + generate)
    circumstances: dict[str, Any] = {"prompt": prompt, "generate": generate, "device": str(_device(model))}
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for side in sides:
            stack.enter_context(evaluating(side))
        step = functools.partial(decoding_step_ms, model, random_ids(sides, 1, 1, seed))
        conditions = stack.enter_context(quiet_conditions(step, _device(model)))
        circumstances |= {key: value for key, value in asdict(conditions).items() if value is not None}
        for index, batch in enumerate(batch_sizes):
            if too_long is not None:
                reasons[batch] = too_long
                continue
            # Time that a batch size leaves over goes to those after it.
            left_s = (max_seconds - (time.perf_counter() - start)) / (len(batch_sizes) - index)
            patience = Patience(min_rounds, min(left_s, PATIENCE_S / len(batch_sizes)), left_s, budgets)
            ids_BP = random_ids(sides, batch, prompt, seed)
            try:
                with _no_garbage_collection():
                    measured[batch] = take_rounds(sides, ids_BP, generate, patience, clock=conditions.clock, seed=seed)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                reasons[batch] = f"batch {batch} with {prompt} + {generate} tokens does not fit in memory: {error}"
    return _section(batch_sizes, measured, reasons, circumstances, has_baseline=baseline is not None)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise RecipeError(f"latency: {name} must be at least 1, not {size}")


def _budgets(budget_ratio: float | Mapping[str, float] | None, *, has_baseline: bool) -> dict[str, float]:
    if budget_ratio is None:
        return {}
    if not has_baseline:
        raise RecipeError("latency: a budget_ratio needs a baseline that is timed beside the model")
    both = budget_ratio if isinstance(budget_ratio, Mapping) else {PREFILL: budget_ratio, DECODE: budget_ratio}
    for figure, limit in both.items():
        if figure not in FIGURES or not limit > 0:
            raise RecipeError(
                f"latency: budget_ratio is {figure}: {limit}; possible are positive limits of {', '.join(FIGURES)}"
            )
    return dict(both)


def _section(
    batch_sizes: Sequence[int],
    measured: dict[int, Rounds],
    why_not: dict[int, str],
    circumstances: dict[str, Any],
    *,
    has_baseline: bool,
) -> Latency:
    """The figures of all batch sizes; one that was not measured is None, with its reason, in each figure."""
    reasons = {} if has_baseline else {"ratio_to_baseline": "no baseline was timed beside it"}

    def by_batch(path: str, figure: Callable[[int, Rounds], Estimate]) -> dict[str, Estimate | None]:
        reasons.update({f"{path}.{batch}": reason for batch, reason in why_not.items()})
        return {str(batch): figure(batch, measured[batch]) if batch in measured else None for batch in batch_sizes}

    def absolute(side: int, prefix: str = "") -> dict[str, dict[str, Estimate | None]]:
        return {name: by_batch(prefix + name, _median(name, side)) for name in FIGURES}

    def tokens_per_s(batch: int, rounds: Rounds) -> Estimate:
        return mapped(bootstrap_median(rounds.of(DECODE, 0)), lambda ms: 1000 * batch / ms)

    own = absolute(0)
    extra = circumstances | {TTFT: own[TTFT]}
    extra["decode_steps"] = {str(batch): rounds.shape.steps for batch, rounds in measured.items()}
    extra["stopped"] = {str(batch): rounds.stopped for batch, rounds in measured.items()}
    if circumstances.get("clock") == "cpu":
        extra["wall"] = {name: by_batch(f"wall.{name}", _median(name, 0, "wall")) for name in FIGURES}
    ratios = None
    if has_baseline:
        ratios = {name: by_batch(f"ratio_to_baseline.{name}", _ratio(name)) for name in FIGURES}
        extra["baseline"] = absolute(1, "baseline.")
    return Latency(
        prefill_ms=own[PREFILL],
        decode_ms_per_token=own[DECODE],
        tokens_per_s=by_batch("tokens_per_s", tokens_per_s),
        ratio_to_baseline=ratios,
        extra=extra,
        reasons=reasons,
    )


def _ratio(figure: str) -> Callable[[int, Rounds], Estimate]:
    return lambda _, rounds: rounds.ratio(figure)


def _median(figure: str, side: int, clock: Clock | None = None) -> Callable[[int, Rounds], Estimate]:
    return lambda _, rounds: bootstrap_median(rounds.of(figure, side, clock))


def random_ids(sides: tuple[nn.Module, ...], batch: int, prompt: int, seed: int) -> Tensor:
    """Prompts `[B, P]` of tokens that every side knows."""
    vocab = min(_config(side).get_text_config(decoder=True).vocab_size for side in sides)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, prompt), generator=generator).to(_device(sides[0]))


def _too_long(sides: tuple[nn.Module, ...], tokens: int) -> str | None:
    for side in sides:
        longest = getattr(_config(side).get_text_config(decoder=True), "max_position_embeddings", None)
        if longest is not None and tokens > longest:
            return f"prompt + generate is {tokens} tokens, the model takes {longest} (max_position_embeddings)"
    return None


def _config(model: nn.Module) -> Any:
    return model.config


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), next(model.buffers(), torch.empty(0))).device


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU torch raises a bare RuntimeError, so there its wording is all there is to tell it by.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module gets back its own mode, as parts may be frozen in eval."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a step would count as the model's time."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
