"""GPTQ: rounding that pushes each column's error onto the columns not yet rounded (Frantar et al., arXiv 2210.17323).

O output features, I input features, G groups in a row; one leading dimension (experts) is allowed, solved as a batch.
"""

import torch
from torch import Tensor

from compressor.algorithms.rounding import Grid, fit_grid
from compressor.quant import QuantizedTensor, QuantSpec

COLUMNS_AT_ONCE = 128


class NotPositiveDefinite(ArithmeticError):
    """The Hessian could not be factorised at any damping: the caller decides what to do with this weight."""


def gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    search: str = "weighted",
    dtype: torch.dtype = torch.bfloat16,
    keep_OI: Tensor | None = None,
) -> QuantizedTensor:
    """Codes that keep the layer's output, not its weights.

    Minimises `||(W - Q) X||` for inputs X with `hessian_II = X X^T` (any positive multiple gives the same codes).
    Columns are rounded in the order of falling diagonal; the grid is fixed before, on the original columns ("static
    activation order": no g_idx in the file). `search` is `weighted` (by the diagonal of the Hessian), `mse` or
    `minmax`. A column that is never active (zero diagonal) is rounded to nearest. Weights where `keep_OI` is False
    stay exactly zero (pruned before). Weight `[..., O, I]`, Hessian `[..., I, I]` float32. Raises NotPositiveDefinite.
    """
    diagonal = hessian_II.diagonal(dim1=-2, dim2=-1)
    importance = diagonal if search == "weighted" else None
    grid = fit_grid(weight_OI, spec, importance_I=importance, search=search != "minmax", dtype=dtype)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    factor = inverse_cholesky(_permuted(hessian_II, order), damping)
    codes = torch.stack([
        _solve(weight, upper, columns, part, spec, keep)
        for weight, upper, columns, part, keep in zip(
            _stacked(weight_OI), _stacked(factor), _stacked(order, 1), _grids(grid, weight_OI.dim()),
            _stacked(torch.ones_like(weight_OI, dtype=torch.bool) if keep_OI is None else keep_OI), strict=True,
        )
    ]).reshape(weight_OI.shape)  # fmt: skip
    return QuantizedTensor(codes, grid.scales, grid.zeros, spec)


def inverse_cholesky(hessian_II: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the inverse, `H^-1 = U^T U`, with `damping` times the mean diagonal added to H first.

    Damping is raised tenfold, twice, where the matrix is numerically not positive definite.
    """
    identity = torch.eye(hessian_II.shape[-1], device=hessian_II.device)
    mean = hessian_II.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    if not bool(torch.isfinite(hessian_II).all() and (mean > 0).all()):
        raise NotPositiveDefinite("the Hessian is zero or not finite: no input reached this weight, or inputs overflow")
    # Factorising the reversed matrix gives the upper factor of the inverse in one triangular solve:
    # flip(H) = L L^T, so H = R R^T with R = flip(L) upper triangular, and U = R^-1.
    flipped = hessian_II.flip(-1, -2)
    for factor in (1, 10, 100):
        lower, info = torch.linalg.cholesky_ex(flipped + identity * (mean * damping * factor))
        if not bool(info.any()):
            upper = lower.flip(-1, -2)
            return torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)
    raise NotPositiveDefinite(f"not positive definite with damping {100 * damping:g} of the mean diagonal")


def _solve(
    weight_OI: Tensor, factor_II: Tensor, order_I: Tensor, grid: Grid, spec: QuantSpec, keep_OI: Tensor
) -> Tensor:
    """Codes of one weight, columns taken in `order_I`; `factor_II` is already in that order."""
    # Columns live as rows here: a column update then touches contiguous memory (3x faster on CPUs).
    work_IO = weight_OI.float().T[order_I].contiguous()
    num_inputs = work_IO.shape[0]
    group_of = order_I // (num_inputs // grid.scales.shape[-1])
    scales_IO = grid.scales.float().T[group_of]
    zeros_IO = None if grid.zeros is None else grid.zeros.float().T[group_of]
    codes_IO = torch.empty(work_IO.shape, dtype=torch.int8, device=work_IO.device)
    drop_IO = None if bool(keep_OI.all()) else ~keep_OI.T[order_I]
    inverse_diagonal = (1 / factor_II.diagonal()).tolist()
    for start in range(0, num_inputs, COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, num_inputs)
        errors = torch.empty_like(work_IO[start:stop])
        for column in range(start, stop):
            weights, scale = work_IO[column], scales_IO[column]
            code = (weights / scale).round_()
            if zeros_IO is None:
                code.clamp_(spec.lowest, spec.highest)
            else:
                code.add_(zeros_IO[column]).clamp_(spec.lowest, spec.highest)
            if drop_IO is not None:
                code = torch.where(drop_IO[column], 0 if zeros_IO is None else zeros_IO[column], code)
            rounded = (code if zeros_IO is None else code - zeros_IO[column]) * scale
            codes_IO[column] = code.to(torch.int8)
            error = torch.sub(weights, rounded, out=errors[column - start]).mul_(inverse_diagonal[column])
            work_IO[column + 1 : stop].addr_(factor_II[column, column + 1 : stop], error, alpha=-1)
        work_IO[stop:].addmm_(factor_II[start:stop, stop:].T, errors, alpha=-1)
    codes = torch.empty_like(codes_IO)
    codes[order_I] = codes_IO
    return codes.T.contiguous()


def _permuted(hessian_II: Tensor, order_I: Tensor) -> Tensor:
    rows = hessian_II.gather(-2, order_I.unsqueeze(-1).expand_as(hessian_II))
    return rows.gather(-1, order_I.unsqueeze(-2).expand_as(hessian_II))


def _stacked(tensor: Tensor, matrix_dims: int = 2) -> Tensor:
    return tensor if tensor.dim() > matrix_dims else tensor.unsqueeze(0)


def _grids(grid: Grid, weight_dims: int) -> list[Grid]:
    if weight_dims == 2:
        return [grid]
    zeros = [None] * len(grid.scales) if grid.zeros is None else list(grid.zeros)
    return [Grid(scales, zero) for scales, zero in zip(grid.scales, zeros, strict=True)]
