"""How far each weight of a candidate moved from the baseline's, and which moved far more than others of their kind.

A weight that was exchanged, shifted or scaled by mistake shows here even where few tokens reach it, so that the loss of
the whole model hardly does.
"""

import math
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.calibration import Progress, release_memory
from compressor.models import Block
from compressor.pipeline.mixtures import Pair, Part, different_parts
from compressor.reports.bisect import Outlier

# A weight stands out when it moved by so many times the median of its kind. Of demo/tiny-moe in int4 the largest change
# of an expert is 1.02 times the median; codes shifted by one column make it 14 times.
STANDS_OUT = 5.0
FEWEST = 4  # of a kind, to speak of a median


def outliers(pair: Pair, progress: Progress | None = None) -> list[Outlier]:
    """The weights that moved most, farthest first, relative to their size; kinds are q_proj, ..., all experts."""
    moved: dict[str, list[tuple[int, Part, float]]] = {}
    for k in range(pair.num_blocks):
        with pair.candidate.open_block(k, dense=True) as ours, pair.baseline.open_block(k, dense=True) as theirs:
            for part, change in _changes(ours, theirs):
                moved.setdefault("expert" if part.expert is not None else part.name, []).append((k, part, change))
        release_memory()
        if progress is not None:
            progress("comparing weights", k + 1, pair.num_blocks)
    found = []
    for changes in moved.values():
        median = statistics.median(change for *_, change in changes)
        if len(changes) < FEWEST or not math.isfinite(median):
            continue
        found += [
            Outlier(layer=k, part=part.name, expert=part.expert, change=change, median=median)
            for k, part, change in changes
            if change > STANDS_OUT * median
        ]
    return sorted(found, key=lambda one: -one.change)


def _changes(candidate: Block, baseline: Block) -> Iterator[tuple[Part, float]]:
    """What can be compared and is not the same, with the size of its change."""
    ours, theirs = dict(candidate.module.named_parameters()), dict(baseline.module.named_parameters())
    for part in different_parts(candidate, baseline)[0]:
        if part.together:
            continue
        chosen = slice(None) if part.expert is None else part.expert
        pairs = [(ours[name][chosen], theirs[name][chosen]) for name in part.parameters]
        yield part, _relative(pairs)


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """|after - before| / |before| of some tensors together; infinite where they are not finite."""
    moved = sum(float((one.float() - other.float()).square().sum(dtype=torch.float64)) for one, other in pairs)
    size = sum(float(other.float().square().sum(dtype=torch.float64)) for _, other in pairs)
    change = math.sqrt(moved / size) if size else math.inf
    return change if math.isfinite(change) else math.inf
