"""A quantized weight before it is packed.

O output features, I input features, G groups in a row; any leading dimensions (experts) are allowed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.quant.spec import QuantSpec


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes `[..., O, I]` (int8), scales `[..., O, G]` in the file's dtype, zeros `[..., O, G]` (int8) or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    spec: QuantSpec

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the codes stand for, `[..., O, I]`; the product is formed in float32 and rounded once."""
        num_groups = self.scales.shape[-1]
        grouped = self.codes.unflatten(-1, (num_groups, -1)).float()
        if self.zeros is not None:
            grouped = grouped - self.zeros.unsqueeze(-1).float()
        return (grouped * self.scales.unsqueeze(-1).float()).flatten(-2).to(dtype)

    def __getitem__(self, index: int) -> "QuantizedTensor":
        zeros = None if self.zeros is None else self.zeros[index]
        return QuantizedTensor(self.codes[index], self.scales[index], zeros, self.spec)


def stack(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """One quantized stack `[E, O, I]` out of E weights of the same shape and spec."""
    return _combined(parts, torch.stack)


def concatenate(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """One stack out of several of the same spec, one after the other."""
    return _combined(parts, torch.cat)


def _combined(parts: list[QuantizedTensor], combine: Callable[[list[Tensor]], Tensor]) -> QuantizedTensor:
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedTensor(
        combine([part.codes for part in parts]),
        combine([part.scales for part in parts]),
        combine(zeros) if zeros else None,
        parts[0].spec,
    )


def split_rows(quantized: QuantizedTensor, sizes: list[int]) -> list[QuantizedTensor]:
    """The parts of a weight whose output rows were concatenated, in order."""
    codes = quantized.codes.split(sizes, dim=-2)
    scales = quantized.scales.split(sizes, dim=-2)
    zeros = [None] * len(sizes) if quantized.zeros is None else quantized.zeros.split(sizes, dim=-2)
    return [QuantizedTensor(c, s, z, quantized.spec) for c, s, z in zip(codes, scales, zeros, strict=True)]
