"""What passes collect of a layer's inputs.

M tokens, I input features.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

# Rows and columns that enter a product at once: widened to float32 they stay in the cache of a core.
ROWS = 1024
COLUMNS = 384


@contextmanager
def exact_bfloat16_products() -> Iterator[None]:
    """Float32 products of bfloat16 values on the bfloat16 units of the CPU.

    The inputs of a bfloat16 model are bfloat16 values, so nothing is rounded before the multiplication and sums are
    kept in float32: the same numbers at 2 to 4 times the speed (measured in docs/decisions.md, 2026-11-21). CPUs
    without such units ignore it.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Hessian:
    """Sum of `x x^T` over the inputs of a layer, `[I, I]` float32; `add` takes `[M, I]`.

    The matrix is symmetric: only blocks on and above its diagonal are summed (a rank-k update), two fifths fewer
    products for 1,536 inputs.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._upper = torch.zeros(width, width, device=device)
        self.tokens = 0

    def add(self, x_MI: Tensor, weight_M: Tensor | None = None) -> None:
        """Count tokens in; `weight_M` is the factor of each token's outer product."""
        self.tokens += len(x_MI)
        exact = x_MI.dtype == torch.bfloat16 and weight_M is None and x_MI.device.type == "cpu"
        for rows in range(0, len(x_MI), ROWS):
            x = x_MI[rows : rows + ROWS].float()
            left = x if weight_M is None else x * weight_M[rows : rows + ROWS, None]
            with exact_bfloat16_products() if exact else nullcontext():
                for start in range(0, x.shape[1], COLUMNS):
                    part = left[:, start : start + COLUMNS]
                    self._upper[start : start + COLUMNS, start:].addmm_(part.T, x[:, start:])

    @property
    def value(self) -> Tensor:
        """The whole matrix."""
        return self._upper.triu() + self._upper.triu(1).T


class InputNorm:
    """Euclidean norm of each input over all tokens, `[I]` float32; `add` takes `[M, I]`."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x_MI: Tensor) -> None:
        self.tokens += len(x_MI)
        self._sum += x_MI.float().square().sum(0).double()

    @property
    def value(self) -> Tensor:
        return self._sum.sqrt().float()
