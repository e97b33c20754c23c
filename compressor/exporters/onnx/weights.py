"""Codes and scales as ONNX Runtime's operators read them; nothing is rounded here.

O output features, I input features, G groups in a row, B blocks in a row (what the operators call groups), E experts.
Sources: the schemas of MatMulNBits, GatherBlockQuantized and QMoE (onnxruntime, docs/ContribOperators.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import UnsupportedModel
from compressor.quant import QuantizedTensor

# One scale a row becomes one scale for each block of the largest of these sizes that divides the row.
BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True)
class NBits:
    """Packed codes `[..., O, bytes of a row]` (uint8, low bits first), scales `[..., O, B]`, zeros packed like codes.

    Codes are unsigned: what stands for a weight of zero is 2^(bits-1), or `zeros` where the grid is asymmetric.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block_size: int
    shape: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        return self.scales.shape[-1]


def to_nbits(quantized: QuantizedTensor, dtype: torch.dtype, where: str) -> NBits:
    """The same numbers in ONNX Runtime's layout; codes of 2 and 3 bits are stored in 4.

    UnsupportedModel, naming the weight, where one scale a row cannot be spread over blocks (a row that no block size
    divides), and for float16 scales out of range.
    """
    in_features, groups = quantized.codes.shape[-1], quantized.scales.shape[-1]
    block = quantized.spec.group_size or next((size for size in BLOCKS if in_features % size == 0), None)
    if block is None:
        raise UnsupportedModel(f"{where}: rows of {in_features} weights do not divide into blocks of 16 for ONNX")
    repeat = in_features // block // groups
    bits = 8 if quantized.spec.bits == 8 else 4
    middle = 1 << (bits - 1)  # added in uint8, which wraps round: code -1 is 255, and 255 + 128 is 127
    scales = quantized.scales.repeat_interleave(repeat, dim=-1).to(dtype)
    if not torch.isfinite(scales).all():
        raise UnsupportedModel(f"{where}: a scale is out of the range of {dtype}; export with dtype: float32")
    zeros = None
    if quantized.zeros is not None:
        zeros = pack(quantized.zeros.repeat_interleave(repeat, dim=-1).view(torch.uint8) + middle, bits)
    codes = pack(quantized.codes.view(torch.uint8) + middle, bits)
    return NBits(codes, scales, zeros, bits, block, tuple(quantized.codes.shape))


def pack(unsigned: Tensor, bits: int) -> Tensor:
    """Unsigned codes `[..., n]` (uint8), two to a byte for 4 bits (the first in the low half), rows filled with 0."""
    if bits == 8:
        return unsigned
    if unsigned.shape[-1] % 2:
        unsigned = torch.nn.functional.pad(unsigned, (0, 1))
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def interleaved(gate_up: Tensor) -> Tensor:
    """Rows of `[E, 2F, ...]` (gates, then ups) in turns: gate 0, up 0, gate 1, up 1, ... as fused SwiGLU wants them."""
    gate, up = gate_up.chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def interleaved_codes(quantized: QuantizedTensor) -> QuantizedTensor:
    """The same for quantized experts: rows move with their scales."""
    zeros = None if quantized.zeros is None else interleaved(quantized.zeros)
    return QuantizedTensor(interleaved(quantized.codes), interleaved(quantized.scales), zeros, quantized.spec)
