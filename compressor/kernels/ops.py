"""The operations that packed layers call, behind `torch.library`, with the fastest CPU library op for each.

M tokens, O output features, I input features, G groups in a row. The weight-only ops compute in bfloat16, the only
dtype for which the ATen ops have a fast path (float32 is 120 times slower: reference, kernels 9.1); `w8a8_linear`
multiplies integers. A float reference of each is the dequantized weight times the input, for `w8a8_linear` the input
as `token_codes` rounds it; the tests hold the ops to it.
"""

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from compressor.kernels import cpu_dense

INT4_GROUPS = (32, 64, 128)  # what both the op and our formats take
INT4_ROW_MULTIPLE = 16
INT4_ROW_BLOCK = 64  # rows that ATen's CPU layout interleaves at most: weights of whole blocks can be put together
TOKENS_AT_ONCE = 128  # of `w8a8_linear`: they stay in the cache from rounding to result

_library = torch.library.Library("compressor", "DEF")
_library.define("int4_linear(Tensor x, Tensor packed, Tensor scales_zeros, int group_size) -> Tensor")
_library.define("int8_linear(Tensor x, Tensor codes, Tensor scales) -> Tensor")
_library.define("w8a8_linear(Tensor x, Tensor codes, Tensor scales) -> Tensor")


def int4_linear_cpu(x_MI: Tensor, packed: Tensor, scales_zeros: Tensor, group_size: int) -> Tensor:
    """x times the transposed int4 weight; `packed` from `pack_int4_cpu`, output `[M, O]` in x's dtype.

    Few tokens go through ATen's op, many through dense slices of the weight, whichever is faster on this machine.
    """
    many = cpu_dense.from_tokens()
    if many is not None and len(x_MI) >= many:
        return cpu_dense.multiply(x_MI.to(torch.bfloat16), packed, scales_zeros).to(x_MI.dtype)
    result = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MI.to(torch.bfloat16), packed, group_size, scales_zeros)
    return result.to(x_MI.dtype)


def int8_linear_cpu(x_MI: Tensor, codes_OI: Tensor, scales_O: Tensor) -> Tensor:
    """x times the transposed int8 weight with one scale a row; output `[M, O]` in x's dtype.

    Few tokens go through ATen's op, many through dense slices of the weight, whichever is faster on this machine.
    """
    many = cpu_dense.int8_from_tokens()
    if many is not None and len(x_MI) >= many:
        return cpu_dense.multiply_int8(x_MI.to(torch.bfloat16), codes_OI, scales_O).to(x_MI.dtype)
    return torch.ops.aten._weight_int8pack_mm(x_MI.to(torch.bfloat16), codes_OI, scales_O).to(x_MI.dtype)


def w8a8_linear_cpu(x_MI: Tensor, codes_OI: Tensor, scales_O: Tensor) -> Tensor:
    """x, rounded to int8, times the transposed int8 weight with one scale a row; output `[M, O]` in x's dtype.

    Exact where `adds_bytes_exactly`. `onednn.qlinear_pointwise` would be up to twice as fast (five
    times for 2 to 16 tokens without AMX), but its packed weight has no storage: no tracing, no opcheck.
    """
    result = x_MI.new_empty(x_MI.shape[0], codes_OI.shape[0])
    for x, out in zip(x_MI.split(TOKENS_AT_ONCE), result.split(TOKENS_AT_ONCE), strict=True):
        codes, scales = token_codes(x)
        out.copy_((torch._int_mm(codes.to(torch.int8), codes_OI.T) * scales_O).mul_(scales))
    return result


def token_codes(x_MI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[..., M, I]` from -128 to 127, as float32, and scales `[..., M, 1]` with which inputs meet int8 weights.

    Bit for bit what compressed-tensors computes in float32: the scale is the largest input over 127.5, ties go to even.
    """
    x = x_MI.float()
    scales = x.abs().amax(-1, keepdim=True) / 127.5
    scales = torch.where(scales == 0, torch.finfo(torch.float32).eps, scales)  # a token of zeros
    return (x / scales).clamp_(-128, 127).round_(), scales


CPU_OPS = SimpleNamespace(int4_linear=int4_linear_cpu, int8_linear=int8_linear_cpu, w8a8_linear=w8a8_linear_cpu)
for _name, _op in vars(CPU_OPS).items():
    _library.impl(_name, _op, "CPU")


@torch.library.register_fake("compressor::int4_linear", lib=_library)
def _(x_MI: Tensor, packed: Tensor, scales_zeros: Tensor, group_size: int) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], scales_zeros.shape[1])


@torch.library.register_fake("compressor::int8_linear", lib=_library)
def _(x_MI: Tensor, codes_OI: Tensor, scales_O: Tensor) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], codes_OI.shape[0])


@torch.library.register_fake("compressor::w8a8_linear", lib=_library)
def _(x_MI: Tensor, codes_OI: Tensor, scales_O: Tensor) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], codes_OI.shape[0])


@cache
def adds_bytes_exactly() -> bool:
    """Whether this processor has VNNI; without, oneDNN may add products of bytes in 16 bits and cut sums off."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def pack_int4_cpu(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes from -8 to 7 in ATen's CPU layout `[O, I/2]` (uint8), and scales with zeros `[G, O, 2]` (bfloat16).

    ATen reads `w = (q - 8) * scale + zero` with unsigned q; our `(code - z) * scale` is that with `zero = -z * scale`.
    """
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.to(torch.int32) + 8, 1)
    scales = scales_OG.float()
    shift = torch.zeros_like(scales) if zeros_OG is None else -zeros_OG.float() * scales
    return packed, torch.stack([scales, shift], dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()


def unpack_int4_cpu(packed: Tensor, in_features: int) -> Tensor:
    """The codes `[O, I]` (int8) back out of ATen's layout, which depends on the machine.

    The op itself is asked where the layout is none that is known: with scale 1 and zero 0 its product with the identity
    is the code matrix, exactly.
    """
    block = cpu_dense.rows_of_block()
    if block is not None:
        ones = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(1, len(packed), 2)
        return cpu_dense.dense(packed, ones, block).T.to(torch.int8).contiguous()
    num_groups = in_features // INT4_GROUPS[0]
    ones = torch.stack([torch.ones(num_groups, packed.shape[0]), torch.zeros(num_groups, packed.shape[0])], dim=-1)
    identity = torch.eye(in_features, dtype=torch.bfloat16)
    codes_IO = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, packed, INT4_GROUPS[0], ones.to(torch.bfloat16))
    return codes_IO.T.to(torch.int8).contiguous()
