"""From scores to masks (True = keep).

O output features, I input features, E experts.
"""

import torch
from torch import Tensor


def top_fraction(score_OI: Tensor, sparsity: float) -> Tensor:
    """True for all but the `sparsity` share of lowest scores in each row; the number dropped is rounded down."""
    drop = int(score_OI.shape[-1] * sparsity)
    keep = torch.ones_like(score_OI, dtype=torch.bool)
    return keep.scatter_(-1, score_OI.topk(drop, dim=-1, largest=False).indices, False)


def n_of_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    """True for the n highest scores of every m neighbours in a row; ValueError where m does not divide the row."""
    if score_OI.shape[-1] % m:
        raise ValueError(f"rows of {score_OI.shape[-1]} weights do not divide into {n}:{m} groups")
    groups = score_OI.unflatten(-1, (-1, m))
    keep = groups.topk(n, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, keep, True).flatten(-2)


def highest(score_E: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` highest scores, ascending; ties go to the lower index."""
    return score_E.argsort(descending=True, stable=True)[:keep].sort().values
