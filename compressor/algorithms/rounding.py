"""Rounding weights to a grid of codes, and the search for that grid.

O output features, I input features, G groups in a row, g inputs in a group; leading dimensions (experts) are allowed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.quant import QuantizedTensor, QuantSpec

# Shrink factors tried for the largest weight of a group, from 1 (nothing is clipped) down to 1 - SHRINK_RANGE.
SHRINK_STEPS = 20
SHRINK_RANGE = 0.55
# Float32 elements searched at once: a chunk of rows and its candidate stay in the cache of a core.
CHUNK_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Grid:
    """Where the codes of each group lie: scales `[..., O, G]`, zeros `[..., O, G]` (int8) or None."""

    scales: Tensor
    zeros: Tensor | None


def fit_grid(
    weight_OI: Tensor, spec: QuantSpec, *, importance_I: Tensor | None = None, search: bool = True, dtype: torch.dtype
) -> Grid:
    """Scales (and zeros) that lose least when the weights are rounded to them.

    Minimises the sum over each group of `importance * (w - Q(w))^2` over a range of clipping thresholds; `importance_I`
    (mean squared activation of each input, `[..., I]`) defaults to ones, which is the plain MSE search. `search=False`
    takes the largest weight of the group as it is (min-max). Scales are rounded to `dtype`, the file's, before codes
    are judged by them. Source: activation-weighted form as in llm-compressor's `imatrix_mse` and GPTQ's `--mse`.
    """
    num_groups = spec.num_groups(weight_OI.shape[-1])
    grouped = weight_OI.float().unflatten(-1, (num_groups, -1))  # [..., O, G, g]
    importance = None
    if importance_I is not None:
        importance = importance_I.float().unflatten(-1, (num_groups, -1)).unsqueeze(-3)  # [..., 1, G, g]
    steps = SHRINK_STEPS if search else 1
    rows = max(1, CHUNK_ELEMENTS // max(1, grouped.numel() // grouped.shape[-3]))
    fitted = [_fit_rows(chunk, importance, spec, steps, dtype) for chunk in grouped.split(rows, dim=-3)]
    scales = torch.cat([scale for scale, _ in fitted], dim=-2)
    zeros = None if spec.symmetric else torch.cat([zero for _, zero in fitted if zero is not None], dim=-2)
    return Grid(scales.to(dtype), zeros)


def _fit_rows(
    grouped: Tensor, importance: Tensor | None, spec: QuantSpec, steps: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    lowest, highest = grouped.amin(-1), grouped.amax(-1)
    best_loss = torch.full_like(lowest, torch.inf)
    best_scale = torch.ones_like(lowest)
    best_zero = torch.zeros_like(lowest)
    for step in range(steps):
        shrink = 1 - SHRINK_RANGE * step / max(1, steps)
        if spec.symmetric:
            scale = torch.maximum(-lowest / -spec.lowest, highest / spec.highest) * shrink
            zero = torch.zeros_like(scale)
        else:
            # zero belongs to the range, so that a group of equal signs keeps an exact 0
            low, high = lowest.clamp(max=0) * shrink, highest.clamp(min=0) * shrink
            scale = (high - low) / (spec.highest - spec.lowest)
            zero = (spec.lowest - low / torch.where(scale > 0, scale, 1)).round().clamp(spec.lowest, spec.highest)
        scale = scale.to(dtype).float()
        scale = torch.where(scale > 0, scale, 1)  # a group of zeros: any scale is exact
        codes = (grouped * (1 / scale).unsqueeze(-1)).round_()
        if spec.symmetric:
            codes.clamp_(spec.lowest, spec.highest)
        else:
            codes.add_(zero.unsqueeze(-1)).clamp_(spec.lowest, spec.highest).sub_(zero.unsqueeze(-1))
        error = codes.mul_(scale.unsqueeze(-1)).sub_(grouped).square_()
        loss = (error if importance is None else error.mul_(importance)).sum(-1)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, None if spec.symmetric else best_zero.to(torch.int8)


def round_to_grid(weight_OI: Tensor, grid: Grid, spec: QuantSpec) -> QuantizedTensor:
    """Each weight at its nearest code."""
    num_groups = grid.scales.shape[-1]
    codes = weight_OI.float().unflatten(-1, (num_groups, -1)) / grid.scales.float().unsqueeze(-1)
    codes.round_()
    if grid.zeros is not None:
        codes += grid.zeros.unsqueeze(-1)
    codes = codes.clamp_(spec.lowest, spec.highest).to(torch.int8).flatten(-2)
    return QuantizedTensor(codes, grid.scales, grid.zeros, spec)


def round_to_nearest(
    weight_OI: Tensor,
    spec: QuantSpec,
    *,
    importance_I: Tensor | None = None,
    search: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedTensor:
    """Round-to-nearest on the best grid (RTN): needs no calibration data unless `importance_I` is given."""
    grid = fit_grid(weight_OI, spec, importance_I=importance_I, search=search, dtype=dtype)
    return round_to_grid(weight_OI, grid, spec)
