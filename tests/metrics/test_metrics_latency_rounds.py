"""Who takes turns with whom, in which order, and until when: no model, no clock."""

import itertools

import pytest
import torch

from compressor.metrics.latency import rounds as module
from compressor.metrics.latency.rounds import (
    DECODE,
    PREFILL,
    TTFT,
    Patience,
    Rounds,
    Shape,
    Span,
    Watch,
    shape_of,
    turns_of,
)

ONE_BURST = Shape(reads=1, turns=1, burst=4)


def timed(ratio: float, count: int, prefill_ratio: float | None = None, clock="wall") -> Rounds:
    """So many rounds in which the model takes `ratio` times as long as the baseline, give or take 1 %."""
    rounds = Rounds.empty(2, ONE_BURST, clock)
    for k in range(count):
        wobble = 1.01 if k % 4 < 2 else 0.99
        for figure, here in ((PREFILL, prefill_ratio or ratio), (TTFT, ratio), (DECODE, ratio)):
            rounds.add(figure, 0, Span(10 * here * wobble, 5 * here * wobble))
            rounds.add(figure, 1, Span(10.0, 5.0))
    return rounds


def test_turns_are_blocks_of_abba_or_baab():
    """Every second turn is the mirror of the one before; both kinds occur; the seed decides which."""
    turns = list(itertools.islice(turns_of(2, seed=0), 40))
    assert all(turns[k + 1] == turns[k][::-1] for k in range(0, 40, 2))
    assert {turns[k] for k in range(0, 40, 2)} == {(0, 1), (1, 0)}
    assert turns == list(itertools.islice(turns_of(2, seed=0), 40))
    assert turns != list(itertools.islice(turns_of(2, seed=1), 40))


def test_a_round_takes_its_turns_in_that_order(monkeypatch):
    """One cold round of each side, then the prompt in mirrored pairs, and the bursts in mirrored pairs."""
    order = []
    model, baseline = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def read(side, ids):
        order.append("A" if side is model else "B")
        return Span(20.0, 2.0), Span(21.0, 2.1), []

    def decode(side, state, steps):
        order.append("a" if side is model else "b")
        return Span(40.0, 4.0)

    monkeypatch.setattr(module, "_prefill", read)
    monkeypatch.setattr(module, "_decode", decode)
    ids = torch.zeros(1, 2, dtype=torch.long)
    taken = module.take_rounds((model, baseline), ids, 4, Patience(min_rounds=3, patience_s=0, limit_s=60))
    assert taken.shape == Shape(reads=2, turns=4, burst=1)
    text = "".join(order).removeprefix("AaBb")
    blocks = [text[k : k + 12] for k in range(0, len(text), 12)]
    assert len(blocks) == 4  # three were asked for, two sides take an even number
    for block in blocks:
        assert block[:4] in ("ABBA", "BAAB")
        assert block[4:8] in ("abba", "baab")
        assert block[8:] in ("abba", "baab")
    assert [[len(times) for times in taken.times["wall"][figure]] for figure in (PREFILL, DECODE)] == [[8, 8], [16, 16]]


def test_rounds_go_on_until_both_their_number_and_the_patience_are_reached():
    """And stop at the limit, but not before three."""
    watch = Watch(Patience(min_rounds=5, patience_s=2.0, limit_s=10.0), num_sides=1)

    def after(count, elapsed_s):
        rounds = Rounds.empty(1, ONE_BURST)
        for _ in range(count):
            rounds.add(PREFILL, 0, Span(1.0, 1.0))
        return watch.after(rounds, elapsed_s)

    assert not after(4, 3.0)
    assert not after(5, 1.0)
    assert after(5, 2.0) == "enough rounds"
    assert after(3, 9.0) == "time"
    assert not after(2, 99.0)


@pytest.mark.parametrize("ratio", [1.0, 1.15])
def test_a_ratio_that_is_clear_ends_the_rounds(ratio):
    """1 % of wobble: 16 turns show on which side of 1.05 it lies, long before the limit."""
    watch = Watch(Patience(2, 0.0, 60.0, {PREFILL: 1.05, DECODE: 1.05}), num_sides=2)
    assert not watch.after(timed(ratio, 14), 1.0)
    assert watch.after(timed(ratio, 16), 2.0) == "decided"


def test_a_ratio_on_the_budget_goes_on_to_the_limit():
    """Only the time ends it."""
    watch = Watch(Patience(2, 0.0, 60.0, {DECODE: 1.05}), num_sides=2)
    assert not watch.after(timed(1.05, 40), 30.0)
    assert watch.after(timed(1.05, 80), 59.5) == "time"


def test_once_the_decoding_is_decided_only_prompts_are_read():
    """The prompt's ratio lies on the budget still."""
    watch = Watch(Patience(2, 0.0, 60.0, {PREFILL: 1.05, DECODE: 1.05}), num_sides=2)
    assert watch.needs_decoding
    assert not watch.after(timed(1.0, 16, prefill_ratio=1.05), 2.0)
    assert not watch.needs_decoding


def test_looks_are_rare():
    """Each look is a chance for a false alarm: the next comes when the time has grown by 30 %."""
    watch = Watch(Patience(2, 0.0, 60.0, {DECODE: 1.05}), num_sides=2)
    assert not watch.after(timed(1.05, 16), 10.0)
    assert not watch.after(timed(1.0, 18), 12.0)
    assert watch.after(timed(1.0, 20), 13.0) == "decided"


def test_two_sides_stop_after_whole_blocks():
    """Five rounds would leave one side first more often."""
    watch = Watch(Patience(2, 0.0, 1.0), num_sides=2)
    assert not watch.after(timed(1.0, 5), 99.0)
    assert watch.after(timed(1.0, 6), 99.0)


@pytest.mark.parametrize(
    ("generate", "prefill_ms", "step_ms", "limit_s", "shape"),
    [
        # Both sides together: 2 s to read, 0.2 s a step; four rounds in 20 s leave 3 s, or 15 steps
        (32, 2000, 200, 20, Shape(reads=1, turns=15, burst=1)),
        (8, 2000, 200, 20, Shape(reads=1, turns=8, burst=1)),
        (32, 2000, 200, 1, Shape(reads=1, turns=4, burst=1)),
        # 2 ms a step: bursts of at most eight; reading takes 4 of 68 ms, so it is done four times
        (32, 4, 2, 60, Shape(reads=4, turns=4, burst=8)),
        # 50 ms of 20 ms a step and side
        (32, 100, 40, 60, Shape(reads=3, turns=16, burst=2)),
    ],
)
def test_a_round_is_cut_to_the_time(generate, prefill_ms, step_ms, limit_s, shape):
    """Fewer steps for a slow model, longer bursts for a fast one."""
    assert shape_of(2, generate, prefill_ms, step_ms, limit_s) == shape


def test_one_step_is_averaged_over_whole_rounds():
    """Two bursts a round; by either clock."""
    rounds = Rounds.empty(1, Shape(reads=1, turns=2, burst=3))
    for ms in (1.0, 3.0, 5.0, 9.0):
        rounds.add(DECODE, 0, Span(ms, ms / 2))
    assert rounds.of(DECODE, 0) == [2.0, 7.0]
    assert rounds.of(DECODE, 0, "cpu") == [1.0, 3.5]
    assert rounds.shape.steps == 6


def test_the_clock_that_counts_gives_the_ratio():
    """On the wall the load of the machine came down on one side; its computing was the same."""
    rounds = Rounds.empty(2, ONE_BURST, "cpu")
    for k in range(20):
        rounds.add(DECODE, 0, Span(30.0 if k % 3 else 9.0, 5.0))
        rounds.add(DECODE, 1, Span(10.0 if k % 4 else 40.0, 5.0))
    assert rounds.ratio(DECODE).ci95 == pytest.approx((1.0, 1.0))


def test_a_model_that_waits_does_not_hide_behind_its_computing():
    """It computes as long as the baseline, but sleeps as long again: 2 by the clock on the wall."""
    rounds = Rounds.empty(2, ONE_BURST, "cpu")
    for _ in range(20):
        rounds.add(DECODE, 0, Span(20.0, 10.0))
        rounds.add(DECODE, 1, Span(10.0, 10.0))
    assert rounds.ratio(DECODE).value == pytest.approx(2.0)
