"""Times of one or two models that take turns in this process, in blocks of A B B A or B A A B.

B sequences in a batch, P prompt tokens, T of either kind, V vocabulary. A *turn* is one short measurement of each side,
one right after the other, so that both meet the same machine. Which side begins is drawn, but every second turn is the
mirror of the one before: each side comes first equally often, and a drift within a block cancels.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compressor.metrics.latency.crowd import Clock
from compressor.metrics.latency.ratio import is_decided, paired_ratio, ratio_of_computing
from compressor.reports.estimate import Estimate

FEWEST_ROUNDS = 3  # even when the time is over: an interval of two rounds would say nothing
WARM_UP_STEPS = 2
# Where the fewest rounds of all steps would pass the time limit, fewer steps are taken, but not fewer than this.
FEWEST_STEPS = 4
# A turn decodes a burst of tokens on each side. Whole generations would lie seconds apart on a larger model, and the
# load of the machine would have changed: with two busy processes, turns of one step gave a third more precision in the
# same time than turns of eight. But a model that fits into the CPU's caches would find them full of the other's weights
# after each change, so a burst lasts about this long, up to so many steps.
BURST_MS = 50.0
LONGEST_BURST = 8
# The prompt is read more than once in a round where decoding takes this many times as long: its ratio would otherwise
# be the last to be decided.
READ_EVERY = 4
MOST_READS = 4
# With a budget, rounds may end before the limit once it is clear on which side the ratio lies. Looking often at 95 %
# would raise the false alarms of the last look, so an early end needs 99 %, and this many blocks.
EARLY_LEVEL = 0.99
EARLY_BLOCKS = 8
LOOK_EVERY = 1.3  # a look when the time passed has grown by this factor

Sides = Sequence[nn.Module]
PREFILL, TTFT, DECODE = FIGURES = ("prefill_ms", "ttft_ms", "decode_ms_per_token")


class Span(NamedTuple):
    """How long something took by the clock on the wall, and how long this process computed meanwhile."""

    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Shape:
    """What a round is: the prompt read in so many turns, then `turns` turns of `burst` decoding steps."""

    reads: int
    turns: int
    burst: int

    @property
    def steps(self) -> int:
        """Decoding steps of each side in a round."""
        return self.burst * self.turns


@dataclass
class Rounds:
    """Times in ms, in the order taken: `times[clock][figure][side][turn]`; side 0 is the model, 1 the baseline.

    `prefill_ms` is the forward over the prompt, `ttft_ms` the way from the request to the first token on the host,
    `decode_ms_per_token` one step, on average over a burst. `clock` is the one that counts (see crowd.py).
    """

    shape: Shape
    clock: Clock
    times: dict[Clock, dict[str, tuple[list[float], ...]]]
    stopped: str = ""

    @classmethod
    def empty(cls, num_sides: int, shape: Shape, clock: Clock = "wall") -> Self:
        """Nothing timed yet."""
        clocks: tuple[Clock, ...] = ("wall", "cpu")
        return cls(shape, clock, {c: {f: tuple([] for _ in range(num_sides)) for f in FIGURES} for c in clocks})

    def add(self, figure: str, side: int, span: Span) -> None:
        """Put one measurement behind the others."""
        self.times["wall"][figure][side].append(span.wall_ms)
        self.times["cpu"][figure][side].append(span.cpu_ms)

    def of(self, figure: str, side: int, clock: Clock | None = None) -> list[float]:
        """The times of a figure, turn by turn; of decoding, one step on average over each whole round."""
        times = self.times[clock or self.clock][figure][side]
        turns = self.shape.turns if figure == DECODE else 1
        return [sum(times[i : i + turns]) / turns for i in range(0, len(times), turns)]

    def ratio(self, figure: str, *, level: float = 0.95) -> Estimate:
        """The model's time / the baseline's, by the clock that counts (and see `ratio_of_computing`)."""
        wall = self.times["wall"][figure]
        if self.clock == "wall":
            return paired_ratio(*wall, level=level)
        return ratio_of_computing(self.times["cpu"][figure], wall, level=level)


@dataclass(frozen=True)
class Patience:
    """How long one batch size is timed.

    Without a budget: at least `min_rounds` and `patience_s`. With `budgets` (limits of a figure's ratio): until each
    ratio lies clearly on one side of its limit. `limit_s` ends both, but not before the fewest rounds.
    """

    min_rounds: int
    patience_s: float
    limit_s: float
    budgets: Mapping[str, float] = field(default_factory=dict)


def turns_of(num_sides: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Who comes when: each order that is drawn is followed by its mirror image."""
    draw = random.Random(seed)
    forward = tuple(range(num_sides))
    while True:
        first = forward[:: draw.choice((1, -1))]
        yield first
        yield first[::-1]


class Watch:
    """Says after each round whether it was the last one, and what may be left out of the next.

    The time passed is told, not read, so that recorded rounds can be replayed (benchmarks/latency_gate.py).
    """

    def __init__(self, patience: Patience, num_sides: int):
        self.patience = patience
        self.num_sides = num_sides
        self.undecided = dict(patience.budgets)
        self._next_look_s = 0.0

    @property
    def needs_decoding(self) -> bool:
        """Once its ratio is decided only the prompt is read on; decoding needs the prompt read in any case."""
        return not self.undecided or DECODE in self.undecided

    def after(self, rounds: Rounds, elapsed_s: float) -> str:
        """Why no further round is needed; empty to go on. Two sides stop after whole blocks only."""
        patience, count = self.patience, len(rounds.of(PREFILL, 0)) // rounds.shape.reads
        if count % self.num_sides:
            return ""
        if self.undecided and elapsed_s >= self._next_look_s:
            self.undecided = {
                name: limit for name, limit in self.undecided.items() if not is_clear(rounds, name, limit)
            }
            self._next_look_s = LOOK_EVERY * elapsed_s
        if count < FEWEST_ROUNDS:
            return ""
        if count >= patience.min_rounds:
            if patience.budgets and not self.undecided:
                return "decided"
            if not patience.budgets and elapsed_s >= patience.patience_s:
                return "enough rounds"
        return "time" if elapsed_s * (1 + self.num_sides / count) > patience.limit_s else ""


def take_rounds(
    sides: Sides, ids_BP: Tensor, generate: int, patience: Patience, *, clock: Clock = "wall", seed: int = 0
) -> Rounds:
    """Warm both sides up, then let them take turns until the patience is over."""
    rounds = Rounds.empty(len(sides), _warm_up(sides, ids_BP, generate, patience.limit_s), clock)
    watch = Watch(patience, len(sides))
    prefill_turns, decode_turns = turns_of(len(sides), seed), turns_of(len(sides), seed + 1)
    start = time.perf_counter()
    while not rounds.stopped:
        _one_round(sides, ids_BP, rounds, prefill_turns, decode_turns if watch.needs_decoding else None)
        rounds.stopped = watch.after(rounds, time.perf_counter() - start)
    return rounds


def is_clear(rounds: Rounds, figure: str, limit: float) -> bool:
    """Whether the rounds so far show early on which side of a limit the ratio of a figure lies."""
    if len(rounds.times[rounds.clock][figure][0]) < 2 * EARLY_BLOCKS:
        return False
    return is_decided(rounds.ratio(figure, level=EARLY_LEVEL), limit)


def generate_once(model: nn.Module, ids_BP: Tensor, tokens: int) -> None:
    """Read the prompt and generate so many tokens greedily."""
    _, _, state = _prefill(model, ids_BP)
    if tokens > 1:  # the first comes from the prompt
        _decode(model, state, tokens - 1)


def decoding_step_ms(model: nn.Module, ids_B1: Tensor) -> float:
    """Milliseconds of one forward of a single token, by the wall clock."""
    return _forward(model, ids_B1, DynamicCache(config=model.config))[0].wall_ms  # type: ignore[arg-type]


def _one_round(
    sides: Sides,
    ids_BP: Tensor,
    rounds: Rounds,
    prefill_turns: Iterator[tuple[int, ...]],
    decode_turns: Iterator[tuple[int, ...]] | None,
) -> None:
    states: dict[int, Any] = {}
    for _ in range(rounds.shape.reads):
        for side in next(prefill_turns):
            prefill, first_token, states[side] = _prefill(sides[side], ids_BP)
            rounds.add(PREFILL, side, prefill)
            rounds.add(TTFT, side, first_token)
    if decode_turns is not None:
        for _ in range(rounds.shape.turns):
            for side in next(decode_turns):
                rounds.add(DECODE, side, _decode(sides[side], states[side], rounds.shape.burst))


def _warm_up(sides: Sides, ids_BP: Tensor, generate: int, limit_s: float) -> Shape:
    """A cold round of all sides, and what shape the rounds have if they take as long."""
    prefill_ms = step_ms = 0.0
    for model in sides:
        cold, _, state = _prefill(model, ids_BP)
        prefill_ms += cold.wall_ms
        step_ms += _decode(model, state, min(generate, WARM_UP_STEPS)).wall_ms
    return shape_of(len(sides), generate, prefill_ms, step_ms, limit_s)


def shape_of(num_sides: int, generate: int, prefill_ms: float, step_ms: float, limit_s: float) -> Shape:
    """Rounds of at most `generate` steps, of which the fewest fit into the limit; times are of all sides together."""
    round_ms = 1000 * limit_s / (FEWEST_ROUNDS + 1)
    steps = min(generate, max(FEWEST_STEPS, int((round_ms - prefill_ms) / step_ms)))
    burst = min(steps, LONGEST_BURST, max(1, round(BURST_MS * num_sides / step_ms)))
    reads = min(MOST_READS, max(1, int(steps * step_ms / (READ_EVERY * prefill_ms))))
    return Shape(reads, steps // burst, burst)


def _prefill(model: nn.Module, ids_BP: Tensor) -> tuple[Span, Span, Any]:
    """The time of the forward, the time to the first token, and what decoding goes on from."""
    _wait_for(ids_BP.device)
    begun = now()
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    forward, logits_BTV = _forward(model, ids_BP, cache)
    next_B1 = logits_BTV[:, -1:].argmax(-1)
    next_B1.tolist()  # a token that is still on the GPU has not been answered
    return forward, since(begun), [cache, next_B1]


def _decode(model: nn.Module, state: Any, steps: int) -> Span:
    """The time of one step on average; the state moves on."""
    cache, next_B1 = state
    spans = []
    for _ in range(steps):
        span, logits_BTV = _forward(model, next_B1, cache)
        next_B1 = logits_BTV[:, -1:].argmax(-1)
        spans.append(span)
    state[1] = next_B1
    return Span(sum(span.wall_ms for span in spans) / steps, sum(span.cpu_ms for span in spans) / steps)


def _forward(model: nn.Module, ids_BT: Tensor, cache: DynamicCache) -> tuple[Span, Tensor]:
    _wait_for(ids_BT.device)
    start = now()
    output = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    _wait_for(ids_BT.device)
    return since(start), output.logits


def now() -> tuple[float, float]:
    """Seconds by the wall clock, and of this process's computing."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> Span:
    """What has passed since `now()` gave `start`."""
    wall_s, cpu_s = now()
    return Span(1000 * (wall_s - start[0]), 1000 * (cpu_s - start[1]))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
