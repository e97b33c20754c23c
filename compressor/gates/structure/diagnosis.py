"""What a weight that is not the baseline's looks like: another weight, its rows or columns in another order.

Only broken weights are looked at, a few rows of each. O output features, I input features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.gates.structure.layout import Layout, Linear
from compressor.gates.structure.stored import Packed, Stored, float_rows

ROWS = 64
ALIKE = 0.5  # correlation from which two weights are called the same: unrelated ones lie near 0, 2-bit ones above 0.6
MOST_COMPARED = 512
MOST_ELEMENTS = 1 << 26  # of a weight whose rows and columns are looked for as a whole, 256 MB in float32


def describe(linear: Linear, expected: str, ours: Tensor | Packed, baseline: Stored, layout: Layout) -> str:
    """A clause that says what the weight holds instead, or nothing where that is not clear."""
    rows = float_rows(ours, slice(0, ROWS))
    if not bool(torch.isfinite(rows).all()):
        return ""
    for name in _others(linear, expected, layout, baseline):
        if _correlation(rows, baseline.sample(name, ROWS)) > ALIKE:
            return f"; it holds the baseline's {name}"
    if linear.shape[0] * linear.shape[1] > MOST_ELEMENTS:
        return ""
    whole = float_rows(baseline.weight(expected), slice(None))
    if tuple(whole.shape) != linear.shape:
        return ""
    if order := _order(rows, whole):
        return f"; its rows are in another order (row {order[0]} holds row {order[1]})"
    columns = float_rows(ours, slice(None)).T
    if order := _order(columns[:ROWS], whole.T):
        return f"; its columns are in another order (column {order[0]} holds column {order[1]})"
    if columns.shape == whole.shape and _correlation(columns, whole) > ALIKE:
        return "; it is transposed"
    if _correlation(rows, whole[:ROWS]) < -ALIKE:
        return "; its sign is reversed"
    return ""


def _others(linear: Linear, expected: str, layout: Layout, baseline: Stored) -> Iterator[str]:
    """Weights of the baseline with the same shape: of the same block, and in the same place of other blocks."""
    same_block = [other.name for other in layout.linears if other.block == linear.block]
    same_role = [other.name for other in layout.linears if other.role == linear.role and other.expert == linear.expert]
    names = [name for name in dict.fromkeys((*same_block, *same_role)) if name != expected and baseline.holds(name)]
    for name in names[:MOST_COMPARED]:
        if layout.by_name[name].shape == linear.shape:
            yield name


def _order(rows: Tensor, whole: Tensor) -> tuple[int, int] | None:
    """The first row that holds another one of the baseline, where most rows hold some row."""
    alike = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(whole, dim=1).T
    best = alike.max(dim=1)
    moved = [(i, int(j)) for i, j in enumerate(best.indices) if i != int(j)]
    return moved[0] if moved and float(best.values.median()) > ALIKE else None


def _correlation(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return 0.0
    norm = one.norm() * other.norm()
    return float((one * other).sum() / norm) if norm > 0 else 0.0
