"""Codes of a quantized weight into GGUF's blocks of 32, bit by bit; and how many numbers are rounded in doing so.

R rows, I input features, B blocks in a row; each block of Q4_0, Q4_1, Q5_0 and Q8_0 is 32 weights. Layouts as in
ggml-common.h: the scale `d` (float16) first; nibbles hold weight j low and weight j + 16 high.
"""

import torch
from torch import Tensor

from compressor.exporters.gguf.types import BLOCK
from compressor.quant import QuantizedTensor, QuantSpec

CARRIES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")


def carry(quantized: QuantizedTensor, type: str) -> Tensor:
    """The bytes `[..., O, row bytes]` (uint8) of a weight `[..., O, I]`: `d * q` is what `dequantize` gives.

    Exactly, where `inexact` is 0.
    """
    scales = _repeated(quantized.scales, quantized)
    codes = quantized.codes.unflatten(-1, (-1, BLOCK)).to(torch.int16)  # [..., O, B, 32]
    zeros = None if quantized.zeros is None else _repeated(quantized.zeros, quantized).to(torch.int16)
    if type == "Q4_1":
        levels = codes - quantized.spec.lowest
        parts = [_half(scales), _half(_minima(scales, zeros, quantized.spec.lowest)), _nibbles(levels)]
    else:
        values = codes if zeros is None else codes - zeros.unsqueeze(-1)
        if type == "Q8_0":
            parts = [_half(scales), values.to(torch.int8).view(torch.uint8)]
        elif type == "Q4_0":
            parts = [_half(scales), _nibbles(values + 8)]
        else:
            assert type == "Q5_0", type
            levels = values + 16
            parts = [_half(scales), _high_bits(levels), _nibbles(levels & 15)]
    return torch.cat(parts, dim=-1).flatten(-2)


def inexact(scales: Tensor, zeros: Tensor | None, spec: QuantSpec, type: str) -> int:
    """How many scales (and minima) of a weight are no float16 numbers, and are rounded in a file of this type.

    A bfloat16 scale is exact from 2^-14 to 65504: float16 has more bits there; smaller ones mostly are not.
    """
    count = _rounded(scales)
    if type == "Q4_1":
        count += _rounded(_minima(scales, zeros, spec.lowest))
    return count


def _minima(scales: Tensor, zeros: Tensor | None, lowest: int) -> Tensor:
    """What Q4_1 adds: the value of the lowest code."""
    low = torch.full_like(scales, lowest, dtype=torch.float32) if zeros is None else lowest - zeros.float()
    return scales.float() * low


def _repeated(per_group: Tensor, quantized: QuantizedTensor) -> Tensor:
    """A number for each block of 32 out of one for each group `[..., O, G]`."""
    blocks = quantized.codes.shape[-1] // BLOCK
    return per_group.repeat_interleave(blocks // per_group.shape[-1], dim=-1)


def _rounded(numbers: Tensor) -> int:
    return int((numbers.half().float() != numbers.float()).sum())


def _half(numbers: Tensor) -> Tensor:
    return numbers.half().unsqueeze(-1).contiguous().view(torch.uint8)


def _nibbles(levels: Tensor) -> Tensor:
    """32 levels of 0 .. 15 in 16 bytes."""
    levels = levels.to(torch.uint8)
    return levels[..., :16] | (levels[..., 16:] << 4)


def _high_bits(levels: Tensor) -> Tensor:
    """The fifth bits of 32 levels, bit j of four bytes (little-endian) for weight j."""
    bits = (levels >> 4).to(torch.uint8).unflatten(-1, (4, 8))
    weights = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)
