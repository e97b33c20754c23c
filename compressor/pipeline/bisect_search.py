"""From a loss to the layer, and from the layer to the weight or expert, by exchanging them between two models.

N windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from compressor.calibration import Progress
from compressor.metrics import bootstrap_mean
from compressor.metrics.bootstrap import mapped
from compressor.pipeline.mixtures import (
    CANDIDATE,
    Losses,
    Mixture,
    Pair,
    Part,
    States,
    different_parts,
    expert_errors,
    same_rest,
)
from compressor.reports import Estimate
from compressor.reports.bisect import NAMES, UnitRow, percent, value_text

# Up to so many units are exchanged one by one; more in about as many ranges as each range has units. All mixtures of a
# walk are held at the same time.
SINGLY = 12
# Blame needs a culprit: one that takes at least this share of the loss away when it is restored.
CONCENTRATED = 0.5
# Experts that are restored one by one, after the error of the layer's output has put all of them in order.
CONFIRMED_EXPERTS = 4
# A loss below this is rounding (nats a token).
ROUNDING = 1e-6
UNSEARCHED = "no layer is to blame, so none was looked into"


@dataclass(frozen=True)
class Scale:
    """How the losses of windows become the metric: of which windows, and from which baseline."""

    metric: str
    rows: slice
    baseline: Losses

    @classmethod
    def of(cls, metric: str, pair: Pair, baseline: Losses, whole: Losses) -> "Scale":
        """KL over all windows; the perplexity ratio of the text that the whole candidate predicts worse by most."""
        if metric == "kl_mean":
            return cls(metric, slice(None), baseline)
        starts = [0, *torch.tensor([len(text.ids) for text in pair.texts]).cumsum(0).tolist()]
        scales = [cls(metric, slice(start, stop), baseline) for start, stop in pairwise(starts)]
        return max(scales, key=lambda scale: scale.nats(whole))

    def by_window(self, losses: Losses) -> Tensor:
        """Nats a token that each window lost; infinite where a model gives nothing finite."""
        lost_N = losses.kl_N if self.metric == "kl_mean" else losses.nll_N - self.baseline.nll_N
        return lost_N[self.rows].nan_to_num(nan=math.inf, posinf=math.inf)

    def nats(self, losses: Losses) -> float:
        return float(self.by_window(losses).mean())

    def estimate(self, losses: Losses) -> Estimate:
        """The metric with its interval over windows."""
        lost_N = self.by_window(losses)
        if not lost_N.isfinite().all():
            return Estimate(math.inf, None, len(lost_N))
        mean = bootstrap_mean(lost_N)
        return mean if self.metric == "kl_mean" else mapped(mean, math.exp)

    def share(self, restored: Losses, whole: Losses) -> float | None:
        """How much of the candidate's loss is gone; None if there is none."""
        before, after = self.nats(whole), self.nats(restored)
        if math.isinf(before):
            return 0.0 if math.isinf(after) else 1.0
        return (before - after) / before if before > ROUNDING else None


@dataclass(frozen=True)
class Found:
    """What a search came to: the sentence, and its rows. `unit` is 0 for the embedding, 1 for the first block, ..."""

    sentence: str
    scale: Scale
    whole: Losses
    units: tuple[UnitRow, ...] = ()
    layer: int | None = None
    part: Part | None = None
    parts: tuple[UnitRow, ...] = ()
    parts_reason: str | None = None
    notes: tuple[str, ...] = ()


def search(pair: Pair, metric: str, limit: float | None, progress: Progress | None) -> Found:
    """Exchange ranges of units, then single ones, then what is inside the layer that takes most of the loss away."""
    units = _different_units(pair)
    dense, candidate = pair.mixture([]), pair.mixture(range(pair.num_blocks + 2))
    states = pair.embeddings([dense, candidate])
    if limit is not None:
        states = pair.through([dense, candidate], states, 0, pair.num_blocks, progress, "measuring both models")
        losses = pair.losses([dense, candidate], states)
        scale = Scale.of(metric, pair, losses[dense], losses[candidate])
        value = scale.estimate(losses[candidate])
        if value.value <= limit:
            sentence = f"nothing to blame: {NAMES[metric]} {value_text(value)} is within the limit of {limit:g}"
            return Found(sentence, scale, losses[candidate])
    groups, rows = _ranges(units), []
    while True:
        level = _Level.measured(pair, groups, metric, progress)
        rows += [level.row(group) for group in groups]
        if level.scale.nats(level.whole) <= ROUNDING:
            sentence = f"nothing is lost: {NAMES[metric]} {value_text(level.scale.estimate(level.whole))}"
            return Found(sentence, level.scale, level.whole, tuple(rows), parts_reason=UNSEARCHED)
        best = max(groups, key=level.gain)
        if len(best) == 1:
            return _conclude(pair, level, best[0], tuple(rows), progress)
        groups = _ranges(best)


@dataclass(frozen=True)
class _Level:
    """One walk with every group of units replaced, and restored."""

    pair: Pair
    scale: Scale
    groups: tuple[tuple[int, ...], ...]
    losses: dict[Mixture, Losses]
    dense: States
    whole: Losses

    @classmethod
    def measured(
        cls, pair: Pair, groups: Sequence[tuple[int, ...]], metric: str, progress: Progress | None
    ) -> "_Level":
        dense, candidate = pair.mixture([]), pair.mixture(range(pair.num_blocks + 2))
        mixtures = list(
            dict.fromkeys(
                [dense, candidate, *map(pair.mixture, groups), *(_restoring(pair, group) for group in groups)]
            )
        )
        states = pair.through(mixtures, pair.embeddings(mixtures), 0, pair.num_blocks, progress)
        losses = pair.losses(mixtures, states)
        scale = Scale.of(metric, pair, losses[dense], losses[candidate])
        kept = {dense[:-1]: states[dense[:-1]]}
        return cls(pair, scale, tuple(groups), losses, kept, losses[candidate])

    def restored(self, group: tuple[int, ...]) -> Losses:
        return self.losses[_restoring(self.pair, group)]

    def replaced(self, group: tuple[int, ...]) -> Losses:
        return self.losses[self.pair.mixture(group)]

    def gain(self, group: tuple[int, ...]) -> tuple[float, float]:
        """What restoring takes away; among equals (two broken layers), what replacing brings in."""
        return self.scale.share(self.restored(group), self.whole) or 0.0, self.scale.nats(self.replaced(group))

    def row(self, group: tuple[int, ...]) -> UnitRow:
        blocks = [unit - 1 for unit in group if 0 < unit <= self.pair.num_blocks]
        return UnitRow(
            name=_named(self.pair, group),
            layers=(blocks[0], blocks[-1]) if blocks else None,
            replaced=self.scale.estimate(self.replaced(group)),
            restored=self.scale.estimate(self.restored(group)),
            share=self.scale.share(self.restored(group), self.whole),
        )


def _conclude(pair: Pair, level: _Level, unit: int, rows: tuple[UnitRow, ...], progress: Progress | None) -> Found:
    """Blame the unit if its restoration takes enough of the loss away, and look inside it if it is a block."""
    scale, name, group = level.scale, _named(pair, (unit,)), (unit,)
    share = scale.share(level.restored(group), level.whole) or 0.0
    change, notes = _change(scale, level.whole, level.restored(group)), _doubts(level, unit)
    if share < CONCENTRATED:
        sentence = f"no single layer: restoring the worst, {name}, takes {change} ({percent(share)} of the loss)"
        return Found(sentence, scale, level.whole, rows, parts_reason=UNSEARCHED, notes=notes)
    if not 0 < unit <= pair.num_blocks:
        sentence = f"{name}: restoring it takes {change}"
        return Found(sentence, scale, level.whole, rows, parts_reason=f"{name} is one piece", notes=notes)
    parts, refused, losses = _inside(pair, level, unit - 1, progress)
    single = [row for part, row in parts if not part.together]
    best = max(single, key=lambda row: row.share or 0.0, default=None)
    chosen = next((part for part, row in parts if row is best), None)
    layer = unit - 1
    if best is not None and chosen is not None and (best.share or 0.0) >= CONCENTRATED:
        sentence = f"{name}, {chosen.name}: restoring it takes {_change(scale, level.whole, losses[chosen])}"
    else:
        chosen = None
        together = [part for part, row in parts if part.together and (row.share or 0.0) >= CONCENTRATED]
        what = "its experts together are, no single one" if together else "no single part of it is"
        sentence = f"{name}: restoring it takes {change}; {what if parts else 'its parts cannot be exchanged'}"
    reason = "; ".join(refused) or (None if parts else "its parts are the same in both models")
    table = tuple(row for _, row in parts)
    return Found(sentence, scale, level.whole, rows, layer, chosen, table, reason, notes)


def _inside(
    pair: Pair, level: _Level, k: int, progress: Progress | None
) -> tuple[list[tuple[Part, UnitRow]], list[str], dict[Part, Losses]]:
    """Each part of block k restored by itself; of the experts those with the largest share in its output's error."""
    candidate = pair.mixture(range(pair.num_blocks + 2))
    before = pair.through([candidate], pair.embeddings([candidate]), 0, k)
    with pair.candidate.open_block(k, dense=True) as ours, pair.baseline.open_block(k, dense=True) as theirs:
        found, refused = different_parts(ours, theirs)
        errors: dict[int, float] = {}
        if any(part.expert is not None for part in found):
            inputs = before[candidate[: k + 1]].to(pair.candidate.dtype)
            errors = expert_errors(pair.candidate, ours, theirs, inputs)
    worst = sorted(errors, key=lambda expert: -errors[expert])[:CONFIRMED_EXPERTS]
    parts = [part for part in found if part.expert is None or part.expert in worst]
    mixtures: dict[Part, Mixture] = {part: (*candidate[: k + 1], part, *candidate[k + 2 :]) for part in parts}
    if not parts:
        return [], refused, {}
    states = pair.through(
        list(mixtures.values()), before, k, pair.num_blocks, progress, f"comparing parts of layer {k}"
    )
    by_mixture = pair.losses(list(mixtures.values()), states | level.dense)
    losses = {part: by_mixture[mixture] for part, mixture in mixtures.items()}
    rows = [
        (
            part,
            UnitRow(
                name=part.name,
                layers=(k, k),
                restored=level.scale.estimate(losses[part]),
                share=level.scale.share(losses[part], level.whole),
                expert=part.expert,
                output_error=None if part.expert is None else errors[part.expert],
            ),
        )
        for part in parts
    ]
    return sorted(rows, key=lambda row: -(row[1].share or 0.0)), refused, losses


def _doubts(level: _Level, unit: int) -> tuple[str, ...]:
    """What speaks against the unit: a loss within noise, another unit that does as much, or more by itself."""
    singles = [group for group in level.groups if len(group) == 1]
    notes = []
    lost_N = level.scale.by_window(level.whole)
    interval = bootstrap_mean(lost_N).ci95 if lost_N.isfinite().all() else None
    if interval is not None and interval[0] <= 0:
        notes.append("On these windows the loss itself cannot be told from none: compare more of them.")
    others = sorted((group for group in singles if group != (unit,)), key=level.gain, reverse=True)
    name = _named(level.pair, (unit,))
    if others:
        one_N, other_N = (
            level.scale.by_window(level.restored((unit,))),
            level.scale.by_window(level.restored(others[0])),
        )
        gap_N = other_N - one_N
        if gap_N.isfinite().all():
            interval = bootstrap_mean(gap_N).ci95
            if interval is not None and interval[0] <= 0:
                runner_up = _named(level.pair, others[0])
                notes.append(f"On these windows {name} cannot be told apart from {runner_up}: compare more of them.")
    alone = max(singles, key=lambda group: level.scale.nats(level.replaced(group)))
    if alone != (unit,):
        value = value_text(level.scale.estimate(level.replaced(alone)))
        notes.append(
            f"By itself in the baseline {_named(level.pair, alone)} costs more than {name} ({value}): "
            "losses of several layers do not simply add up."
        )
    return tuple(notes)


def _different_units(pair: Pair) -> list[int]:
    """All blocks; the embedding and the head only where they are not the same in both models."""
    same = same_rest(pair)
    first = [] if same["embedding"] else [0]
    last = [] if same["head"] else [pair.num_blocks + 1]
    return [*first, *range(1, pair.num_blocks + 1), *last]


def _ranges(units: Sequence[int]) -> list[tuple[int, ...]]:
    size = 1 if len(units) <= SINGLY else math.ceil(math.sqrt(len(units)))
    return [tuple(units[start : start + size]) for start in range(0, len(units), size)]


def _restoring(pair: Pair, group: Sequence[int]) -> Mixture:
    """The candidate with these units of the baseline."""
    return tuple(choice if unit in group else CANDIDATE for unit, choice in enumerate(pair.mixture([])))


def _named(pair: Pair, group: Sequence[int]) -> str:
    blocks = [unit - 1 for unit in group if 0 < unit <= pair.num_blocks]
    names = ["embedding"] if 0 in group else []
    if blocks:
        names.append(f"layer {blocks[0]}" if len(blocks) == 1 else f"layers {blocks[0]} to {blocks[-1]}")
    return ", ".join([*names, *(["head"] if pair.num_blocks + 1 in group else [])])


def _change(scale: Scale, before: Losses, after: Losses) -> str:
    """`KL from 0.31 to 0.02`"""
    values = [scale.estimate(losses) for losses in (before, after)]
    shown = [f"{value.value:.3g}" if value.is_finite else value_text(value) for value in values]
    return f"{NAMES[scale.metric]} from {shown[0]} to {shown[1]}"
