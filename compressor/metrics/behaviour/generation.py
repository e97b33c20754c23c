"""Is what a model writes still healthy: does it repeat itself, does it end, does it write anything at all?

A sequence is the token ids that were generated after a prompt, greedy, up to and with end-of-text if it came; what
follows the first end-of-text is padding and is cut. A sequence that is shorter than `max_new_tokens` has ended too:
some generators leave the end-of-text out. N sequences, L tokens of one of them.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from compressor.metrics.behaviour.figures import Figures
from compressor.metrics.behaviour.intervals import rate, rate_change
from compressor.metrics.bootstrap import bootstrap_mean
from compressor.reports.estimate import Estimate

EosId = int | Collection[int] | None
SHARES = ("ended", "empty")
TOO_SHORT = "no sequence is long enough"


def generation_health(sequences: Iterable[Sequence[int]], eos_id: EosId, max_new_tokens: int) -> Figures:
    """Diversity, repetition, length and endings of generated sequences.

    `distinct_1`, `_2`, `_3`: different n-grams over all n-grams of a sequence, mean over the sequences that have any;
    `repeated_4gram_share`: 4-grams that stood earlier in the sequence; `longest_loop`: tokens of the longest stretch
    that repeats one piece at once, two turns at least; `tokens`: mean length without end-of-text; `ended` and `empty`:
    shares of the sequences. ValueError for no sequences, or one that is longer than `max_new_tokens`.
    """
    columns = _columns(sequences, eos_id, max_new_tokens)
    values: dict[str, Estimate | None] = {}
    reasons = {}
    for name, column_N in columns.items():
        known = [value for value in column_N if value is not None]
        if name in SHARES:
            values[name] = rate([bool(value) for value in known])
        else:
            values[name] = bootstrap_mean(known) if known else None
        if not known:
            reasons[name] = TOO_SHORT
    return Figures(values, reasons)


def generation_change(
    baseline: Iterable[Sequence[int]], candidate: Iterable[Sequence[int]], eos_id: EosId, max_new_tokens: int
) -> Figures:
    """The figures of `generation_health`, candidate minus baseline, paired by prompt; and how long the two agree.

    `common_prefix`: mean tokens until the first that differs, end-of-text included; `identical`: share of the prompts
    where nothing differs. A pair of which one side is too short for a figure is left out of it. ValueError where the
    two have not the same number of sequences.
    """
    before, after = [list(row) for row in baseline], [list(row) for row in candidate]
    if len(before) != len(after):
        raise ValueError(f"the same prompts are needed, got {len(before)} sequences and {len(after)}")
    columns_before = _columns(before, eos_id, max_new_tokens)
    columns_after = _columns(after, eos_id, max_new_tokens)
    values: dict[str, Estimate | None] = {}
    reasons = {}
    for name, column_N in columns_after.items():
        pairs = [(b, a) for b, a in zip(columns_before[name], column_N, strict=True) if a is not None and b is not None]
        if name in SHARES:
            values[name] = rate_change([bool(b) for b, _ in pairs], [bool(a) for _, a in pairs])
        else:
            values[name] = bootstrap_mean([a - b for b, a in pairs]) if pairs else None
        if not pairs:
            reasons[name] = TOO_SHORT
    cut_before = [_cut(row, eos_id) for row in before]
    cut_after = [_cut(row, eos_id) for row in after]
    values["common_prefix"] = bootstrap_mean([*map(common_prefix, cut_before, cut_after)])
    values["identical"] = rate([one == other for one, other in zip(cut_before, cut_after, strict=True)])
    return Figures(values, reasons)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens until the first that differs."""
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return at
    return min(len(one), len(other))


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Different n-grams over all n-grams; None for a sequence without any."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def longest_loop(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch in which a piece of any length follows itself at once, two turns at least."""
    tokens_L = np.asarray(tokens)
    longest = 0
    for period in range(1, len(tokens_L) // 2 + 1):
        same = np.concatenate([[False], tokens_L[period:] == tokens_L[:-period], [False]])
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        runs = edges[1::2] - edges[::2]  # tokens that equal the one a period earlier
        if runs.size and runs.max() >= period:
            longest = max(longest, int(runs.max()) + period)
    return longest


def _columns(sequences: Iterable[Sequence[int]], eos_id: EosId, max_new_tokens: int) -> dict[str, list[float | None]]:
    """One value of each figure for each sequence; None where the sequence is too short for it."""
    rows = [list(row) for row in sequences]
    if not rows:
        raise ValueError("there are no generated sequences to judge")
    stops = _stops(eos_id)
    columns: dict[str, list[float | None]] = {}
    for number, row in enumerate(rows):
        cut = _cut(row, eos_id)
        if len(cut) > max_new_tokens:
            raise ValueError(f"sequence {number} has {len(cut)} tokens, at most {max_new_tokens} were asked for")
        ended = len(cut) < max_new_tokens or cut[-1] in stops
        tokens = cut[:-1] if cut and cut[-1] in stops else cut
        fours = distinct(tokens, 4)
        found: dict[str, float | None] = {f"distinct_{n}": distinct(tokens, n) for n in (1, 2, 3)} | {
            "repeated_4gram_share": None if fours is None else 1 - fours,
            "longest_loop": float(longest_loop(tokens)),
            "tokens": float(len(tokens)),
            "ended": float(ended),
            "empty": float(not tokens),
        }
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
    return columns


def _cut(row: Sequence[int], eos_id: EosId) -> list[int]:
    stops = _stops(eos_id)
    end = next((at for at, token in enumerate(row) if token in stops), None)
    return list(row) if end is None else list(row[: end + 1])


def _stops(eos_id: EosId) -> frozenset[int]:
    return frozenset() if eos_id is None else frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
