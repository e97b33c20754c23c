"""How long a model takes to read a prompt and to write each next token, side by side with the baseline.

B sequences in a batch, P prompt tokens, T of either kind, V vocabulary. Both models run in this process, in turns: A B,
B A, A B, ... On a loaded machine medians of separate blocks were off by more than 5 % in 14 % of trials, the median log
ratio of turns in none.
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compressor.errors import RecipeError
from compressor.metrics.bootstrap import bootstrap_median, mapped
from compressor.reports.estimate import Estimate
from compressor.reports.measurement import Latency

FEWEST_ROUNDS = 3  # even when the time is over: an interval of two rounds would say nothing
# A model so small that its rounds are cheap is measured this long, since more rounds narrow the interval.
PATIENCE_S = 6.0
WARM_UP_STEPS = 2
# Where three rounds of all steps would pass the time limit, fewer steps are taken, but not fewer than this.
FEWEST_STEPS = 4


@dataclass(frozen=True)
class Rounds:
    """Times of one batch size, round by round, in ms: `prefill[side][round]`; side 0 is the model, 1 the baseline.

    `steps` is the number of decoding steps in each round.
    """

    prefill: tuple[list[float], ...]
    decode: tuple[list[float], ...]
    steps: int


@torch.inference_mode()
def measure_latency(
    model: nn.Module,
    *,
    batch_sizes: Sequence[int],
    prompt: int,
    generate: int,
    baseline: nn.Module | None = None,
    min_rounds: int = 5,
    max_seconds: float = 60.0,
    seed: int = 0,
) -> Latency:
    """Time a transformers causal LM: a forward over `prompt` random tokens, then `generate` greedy steps with a cache.

    Gives the latency section of the report, medians over rounds by batch size: `prefill_ms`, `decode_ms_per_token` (one
    step of the whole batch), `tokens_per_s` (what the batch decodes), `ratio_to_baseline` (this model / baseline, from
    rounds that pair). An estimate's `n` is the number of rounds.

    Only forward calls are timed, after a warm-up. With a baseline both take turns, an even number of rounds. Rounds go
    on for a few seconds, at least `min_rounds`; `max_seconds` for all batch sizes together ends them earlier, but not
    before three; a slow model takes fewer decoding steps a round instead (`decode_steps`). A batch that does not fit in
    memory, or a prompt too long for the model, is None with a reason. RecipeError for sizes that are not positive. The
    models stay in the mode (train or eval) that they were in.
    """
    _check_sizes(batch=min(batch_sizes, default=0), prompt=prompt, generate=generate, rounds=min_rounds)
    sides = (model,) if baseline is None else (model, baseline)
    measured: dict[int, Rounds] = {}
    reasons: dict[int, str] = {}
    too_long = _too_long(sides, prompt + generate)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for side in sides:
            stack.enter_context(_evaluating(side))
        for index, batch in enumerate(batch_sizes):
            if too_long is not None:
                reasons[batch] = too_long
                continue
            # Time that a batch size leaves over goes to those after it.
            left_s = (max_seconds - (time.perf_counter() - start)) / (len(batch_sizes) - index)
            enough = _enough(len(sides), min_rounds, min(left_s, PATIENCE_S / len(batch_sizes)), left_s)
            ids_BP = _random_ids(sides, batch, prompt, seed)
            try:
                measured[batch] = _rounds(sides, ids_BP, generate, enough, left_s)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                reasons[batch] = f"batch {batch} with {prompt} + {generate} tokens does not fit in memory: {error}"
    circumstances = {
        "prompt": prompt,
        "generate": generate,
        "device": str(_device(model)),
        "threads": torch.get_num_threads(),
    }
    return _section(batch_sizes, measured, reasons, circumstances, has_baseline=baseline is not None)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise RecipeError(f"latency: {name} must be at least 1, not {size}")


def _rounds(
    sides: tuple[nn.Module, ...], ids_BP: Tensor, generate: int, enough: Callable[[int, float], bool], limit_s: float
) -> Rounds:
    warm_up = [_time_once(side, ids_BP, min(generate, WARM_UP_STEPS)) for side in sides]
    rounds = Rounds(tuple([] for _ in sides), tuple([] for _ in sides), _steps(warm_up, generate, limit_s))
    count, start = 0, time.perf_counter()
    with _no_garbage_collection():
        while not enough(count, time.perf_counter() - start):
            # Who comes first finds the caches as the other, or as itself, left them: hence the change of order.
            order = list(range(len(sides)))[:: 1 if count % 2 == 0 else -1]
            for index in order:
                prefill_ms, decode_ms = _time_once(sides[index], ids_BP, rounds.steps)
                rounds.prefill[index].append(prefill_ms)
                rounds.decode[index].append(decode_ms)
            count += 1
    return rounds


def _steps(warm_up: list[tuple[float, float]], generate: int, limit_s: float) -> int:
    """How many decoding steps a round may have, from the cold times of all sides, so that the fewest rounds fit."""
    prefill_ms, step_ms = (sum(times) for times in zip(*warm_up, strict=True))
    round_ms = 1000 * limit_s / (FEWEST_ROUNDS + 1)
    return min(generate, max(FEWEST_STEPS, int((round_ms - prefill_ms) / step_ms)))


def _enough(num_sides: int, min_rounds: int, patience_s: float, limit_s: float) -> Callable[[int, float], bool]:
    """When to stop: after the rounds asked for and some patience, or at the limit; with two sides after even rounds."""

    def enough(count: int, elapsed_s: float) -> bool:
        if count < FEWEST_ROUNDS or count % num_sides:
            return False
        next_turn_ends_s = elapsed_s * (1 + num_sides / count)
        return (count >= min_rounds and elapsed_s >= patience_s) or next_turn_ends_s > limit_s

    return enough


def _time_once(model: nn.Module, ids_BP: Tensor, steps: int) -> tuple[float, float]:
    """Milliseconds of the prefill, and of one decoding step on average."""
    cache = DynamicCache(config=_config(model))
    prefill_ms, logits_BTV = _forward(model, ids_BP, cache)
    decode_ms = 0.0
    for _ in range(steps):
        next_ids_B1 = logits_BTV[:, -1:].argmax(-1)
        step_ms, logits_BTV = _forward(model, next_ids_B1, cache)
        decode_ms += step_ms
    return prefill_ms, decode_ms / steps


def _forward(model: nn.Module, ids_BT: Tensor, cache: DynamicCache) -> tuple[float, Tensor]:
    _wait_for(ids_BT.device)
    start = time.perf_counter()
    output = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    _wait_for(ids_BT.device)
    return 1000 * (time.perf_counter() - start), output.logits


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _section(
    batch_sizes: Sequence[int],
    measured: dict[int, Rounds],
    why_not: dict[int, str],
    circumstances: dict[str, object],
    *,
    has_baseline: bool,
) -> Latency:
    """The figures of all batch sizes; one that was not measured is None, with its reason, in each figure."""
    reasons = {} if has_baseline else {"ratio_to_baseline": "no baseline was timed beside it"}

    def by_batch(path: str, figure: Callable[[int, Rounds], Estimate]) -> dict[str, Estimate | None]:
        reasons.update({f"{path}.{batch}": reason for batch, reason in why_not.items()})
        return {str(batch): figure(batch, measured[batch]) if batch in measured else None for batch in batch_sizes}

    def tokens_per_s(batch: int, rounds: Rounds) -> Estimate:
        return mapped(bootstrap_median(rounds.decode[0]), lambda ms: 1000 * batch / ms)

    ratios = None
    extra = circumstances | {"decode_steps": {str(batch): rounds.steps for batch, rounds in measured.items()}}
    if has_baseline:
        ratios = {
            "prefill_ms": by_batch("ratio_to_baseline.prefill_ms", lambda _, rounds: paired_ratio(*rounds.prefill)),
            "decode_ms_per_token": by_batch(
                "ratio_to_baseline.decode_ms_per_token", lambda _, rounds: paired_ratio(*rounds.decode)
            ),
        }
        extra["baseline"] = {
            "prefill_ms": by_batch("baseline.prefill_ms", lambda _, rounds: bootstrap_median(rounds.prefill[1])),
            "decode_ms_per_token": by_batch(
                "baseline.decode_ms_per_token", lambda _, rounds: bootstrap_median(rounds.decode[1])
            ),
        }
    return Latency(
        prefill_ms=by_batch("prefill_ms", lambda _, rounds: bootstrap_median(rounds.prefill[0])),
        decode_ms_per_token=by_batch("decode_ms_per_token", lambda _, rounds: bootstrap_median(rounds.decode[0])),
        tokens_per_s=by_batch("tokens_per_s", tokens_per_s),
        ratio_to_baseline=ratios,
        extra=extra,
        reasons=reasons,
    )


def paired_ratio(times_ms: Sequence[float], baseline_ms: Sequence[float]) -> Estimate:
    """Time / baseline's time from rounds that pair: the median of the log ratios, with a bootstrap interval."""
    return mapped(bootstrap_median([math.log(a / b) for a, b in zip(times_ms, baseline_ms, strict=True)]), math.exp)


def _random_ids(sides: tuple[nn.Module, ...], batch: int, prompt: int, seed: int) -> Tensor:
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
def _evaluating(model: nn.Module) -> Iterator[None]:
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
