"""What passes collect of a layer's inputs.

M tokens, I input features.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Inputs are packed to this many rows before they enter a product: long thin products are the fast ones.
ROWS = 4096


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
    """Sum of `x x^T` over the inputs of a layer, `[I, I]` float32; `add` takes `[M, I]`."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros(width, width, device=device)
        self.tokens = 0

    def add(self, x_MI: Tensor, weight_M: Tensor | None = None) -> None:
        """Count tokens in; `weight_M` is the factor of each token's outer product."""
        self.tokens += len(x_MI)
        exact = x_MI.dtype == torch.bfloat16 and weight_M is None and x_MI.device.type == "cpu"
        for rows in range(0, len(x_MI), ROWS):
            x = x_MI[rows : rows + ROWS].float()
            left = x if weight_M is None else x * weight_M[rows : rows + ROWS, None]
            if exact:
                with exact_bfloat16_products():
                    self.value.addmm_(left.T, x)
            else:
                self.value.addmm_(left.T, x)


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
