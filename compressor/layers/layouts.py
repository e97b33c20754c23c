"""How a packed weight may lie in memory, which weights have a layout, and the ways between them.

All keep every bit but one: the CPU's int4 op takes bfloat16 scales, so others do not come back from there as they were.

O output features, I input features, G groups in a row, E experts. A weight is `Held`: words, scales and zeros, `[O, I]`
or a stack `[E, O, I]`.
"""

import torch
from torch import Tensor

from compressor.kernels import ops
from compressor.kernels.cuda.experts import interleave
from compressor.kernels.cuda.linear import DTYPES
from compressor.kernels.cuda.w8a8 import CHUNK, MAX_FEATURES, tile_codes, untile_codes
from compressor.kernels.layouts import COLUMNS, ROWS, pack_t16x64, unpack_t16x64
from compressor.quant import QuantSpec, pack_codes, unpack_codes

CANONICAL = "canonical"  # docs/format.md: the layout of files; computes by dequantizing, exactly
CPU = "cpu"  # ATen's int4pack, or plain int8 codes with one scale a row
# Our kernels' tiles: T16x64 with scales `[G, O]` (kernels/layouts.py), K128 for W8A8 (kernels/cuda/w8a8.py)
CUDA = "cuda"
LAYOUTS = (CANONICAL, CPU, CUDA)
Held = tuple[Tensor, Tensor, Tensor | None]


def int4_group(spec: QuantSpec, in_features: int) -> int | None:
    """The group that the CPU's int4 op is told: ours, or for one scale a row the largest that divides the row."""
    if spec.group_size is not None:
        return spec.group_size
    return next((g for g in reversed(ops.INT4_GROUPS) if in_features % g == 0), None)


def fits_cpu(spec: QuantSpec, shape: tuple[int, ...]) -> bool:
    """Whether the CPU has a fast op for such a weight."""
    *_, out_features, in_features = shape
    if spec.bits == 4 and int4_group(spec, in_features) and out_features % ops.INT4_ROW_MULTIPLE == 0:
        return True
    if spec.activation_bits and not ops.adds_bytes_exactly():
        return False
    return spec.bits == 8 and spec.symmetric and spec.group_size is None and in_features % 4 == 0


def fits_cuda(spec: QuantSpec, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether we have a CUDA kernel for such a weight; `dtype` is that of its scales in the file."""
    *stack, out_features, in_features = shape
    if dtype not in DTYPES:
        return False
    if spec.bits == 4:
        return out_features % ROWS == 0 and in_features % COLUMNS == 0 and (spec.symmetric or not stack)
    fits = out_features % 8 == 0 and in_features % CHUNK == 0 and in_features <= MAX_FEATURES
    return spec.activation_bits is not None and not stack and fits


def to_layout(layout: str, spec: QuantSpec, shape: tuple[int, ...], held: Held, *, gated: bool) -> Held:
    """From the canonical layout. `gated`: a stack of gate and up, whose rows CUDA reads eight and eight."""
    words, scales, zeros = held
    if layout == CPU and spec.bits == 4:
        return _to_int4_cpu(spec, shape, held)
    if layout == CPU:
        return unpack_codes(words, 8, shape[-1]), scales, zeros
    if spec.bits == 8:
        return tile_codes(unpack_codes(words, 8, shape[-1])), scales.flatten().float(), None
    if len(shape) == 2:
        tiles = pack_t16x64(unpack_codes(words, 4, shape[-1]))
        return tiles, scales.T.contiguous(), None if zeros is None else zeros.T.contiguous()
    if gated:
        words, scales = interleave(words), interleave(scales)
    tiles = torch.stack([pack_t16x64(unpack_codes(one, 4, shape[-1])) for one in words])
    return tiles, scales.transpose(1, 2).contiguous(), None


def to_canonical(
    layout: str, spec: QuantSpec, shape: tuple[int, ...], held: Held, *, gated: bool, dtype: torch.dtype
) -> Held:
    """From another layout; `dtype` is that of the scales."""
    words, scales, zeros = held
    if layout == CPU and spec.bits == 4:
        return _from_int4_cpu(spec, shape, held)
    if layout == CPU:
        return pack_codes(words, 8), scales, zeros
    if spec.bits == 8:
        return pack_codes(untile_codes(words, shape[-1]), 8), scales.unsqueeze(1).to(dtype), None
    if len(shape) == 2:
        codes = pack_codes(unpack_t16x64(words), 4)
        return codes, scales.T.contiguous(), None if zeros is None else zeros.T.contiguous()
    codes = torch.stack([pack_codes(unpack_t16x64(one), 4) for one in words])
    scales = scales.transpose(1, 2).contiguous()
    return (_in_halves(codes), _in_halves(scales), None) if gated else (codes, scales, None)


def _in_halves(rows_EOx: Tensor) -> Tensor:
    """All rows of gate, then all of up: `interleave` undone."""
    return rows_EOx.unflatten(1, (-1, 2, 8)).transpose(1, 2).flatten(1, 3).contiguous()


def _to_int4_cpu(spec: QuantSpec, shape: tuple[int, ...], held: Held) -> Held:
    """ATen's bytes and scales beside shifts, in which the zeros live."""
    words, scales, zeros = (None if part is None else _stacked(part, shape) for part in held)
    assert words is not None
    assert scales is not None
    group = int4_group(spec, shape[-1])
    assert group is not None
    repeat = shape[-1] // group // scales.shape[-1]
    parts = [
        ops.pack_int4_cpu(
            unpack_codes(word, 4, shape[-1]),
            scale.repeat_interleave(repeat, dim=-1),
            None if zero is None else zero.repeat_interleave(repeat, dim=-1),
        )
        for word, scale, zero in zip(words, scales, [None] * len(words) if zeros is None else zeros, strict=True)
    ]
    packed, both = torch.stack([p for p, _ in parts]), torch.stack([s for _, s in parts])
    return _unstacked(packed, shape), _unstacked(both, shape), None


def _from_int4_cpu(spec: QuantSpec, shape: tuple[int, ...], held: Held) -> Held:
    packed, both = _stacked(held[0], shape), _stacked(held[1], shape)
    words = torch.stack([pack_codes(ops.unpack_int4_cpu(part, shape[-1]), 4) for part in packed])
    grouped = both[:, :: both.shape[1] // spec.num_groups(shape[-1])].transpose(1, 2)
    scales, shifts = grouped.unbind(-1)
    zeros = None if spec.symmetric else (-shifts.float() / scales.float()).round().to(torch.int8)
    return (
        _unstacked(words, shape),
        _unstacked(scales, shape),
        None if zeros is None else _unstacked(zeros, shape),
    )


def _stacked(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor if len(shape) == 3 else tensor.unsqueeze(0)


def _unstacked(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (tensor if len(shape) == 3 else tensor[0]).contiguous()
