"""Products of many tokens with an int4 or int8 weight on a CPU: dense a slice of rows at a time.

M tokens, O output features, I input features, G groups in a row, N blocks of rows, B rows of a block. ATen's op is made
for a few tokens: at 512 it takes twenty times as long as a dense product (docs/kernels.md).
"""

import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

SLICE_BYTES = 1 << 22  # of dense weights at once: what a large layer takes meanwhile, not more
TRIED_SHAPE, TRIED_GROUP = (1024, 1024), 64
TRIED_TOKENS = (8, 16, 32, 64, 128, 256, 512)
TRIALS = 3


def multiply(x_MI: Tensor, packed: Tensor, scales_zeros: Tensor) -> Tensor:
    """x times the transposed weight, `[M, O]`: bfloat16 weights, formed a slice of rows at a time."""
    block = rows_of_block()
    assert block is not None
    rows = max(block, SLICE_BYTES // (2 * x_MI.shape[1]) // block * block)
    parts = [
        x_MI @ dense(packed[start : start + rows], scales_zeros[:, start : start + rows], block)
        for start in range(0, len(packed), rows)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def dense(packed: Tensor, scales_zeros: Tensor, block: int) -> Tensor:
    """The weight, transposed `[I, O]` (bfloat16), of ATen's bytes `[O, I/2]` with scales and shifts `[G, O, 2]`."""
    whole = len(packed) // block * block
    parts = [_codes(packed[:whole], block, half=block // 2)] if whole else []
    if whole < len(packed):  # the last rows fill no block; there neighbours share a byte
        parts.append(_codes(packed[whole:], len(packed) - whole, half=1))
    codes_IO = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    scales, zeros = scales_zeros.unsqueeze(1).unbind(-1)
    shifts = (zeros.float() - 8 * scales.float()).to(torch.bfloat16)
    return torch.addcmul(shifts, codes_IO.unflatten(0, (len(scales), -1)), scales.contiguous()).flatten(0, 1)


def _codes(packed: Tensor, block: int, half: int) -> Tensor:
    """Codes from 0 to 15 as bfloat16, `[I, O]`.

    Blocks of B rows lie input by input: a byte holds a row, and the one `half` rows further in its upper bits. Bytes
    are brought into order before they become numbers of four times the size.
    """
    rows, in_features = packed.shape[0], 2 * packed.shape[1]
    bytes_ = packed.reshape(rows // block, in_features, -1).transpose(0, 1).contiguous()
    bytes_ = bytes_.unflatten(-1, (-1, half))  # [I, N, B / (2 half), half]
    codes = torch.empty(*bytes_.shape[:3], 2, half, dtype=torch.bfloat16)
    codes[..., 0, :] = bytes_ & 15
    codes[..., 1, :] = bytes_ >> 4
    return codes.view(in_features, rows)


@cache
def rows_of_block() -> int | None:
    """How many rows ATen interleaves on this machine (its vectors decide); None where it packs in no known way."""
    codes = (
        torch.arange(16, dtype=torch.int32)
        .repeat(96 * 64 // 16)[torch.randperm(96 * 64, generator=torch.Generator().manual_seed(0))]
        .view(96, 64)
    )
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    ones = torch.stack([torch.ones(1, 96), torch.full((1, 96), 8.0)], dim=-1).to(torch.bfloat16)
    found = (block for block in (64, 32) if torch.equal(dense(packed, ones, block).T, codes.to(torch.bfloat16)))
    return next(found, None)


def multiply_int8(x_MI: Tensor, codes_OI: Tensor, scales_O: Tensor) -> Tensor:
    """x times the transposed int8 weight, `[M, O]`: codes are exact in bfloat16, their scales come afterwards."""
    rows = max(1, SLICE_BYTES // (2 * x_MI.shape[1]))
    parts = [
        (x_MI @ codes.to(torch.bfloat16).T).mul_(scales)
        for codes, scales in zip(codes_OI.split(rows), scales_O.split(rows), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@cache
def from_tokens() -> int | None:
    """From how many tokens on an int4 product is faster dense, here: measured once a process; None for never."""
    if rows_of_block() is None:
        return None
    codes = torch.arange(16, dtype=torch.int32).repeat(TRIED_SHAPE[0], TRIED_SHAPE[1] // 16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_zeros = torch.ones(TRIED_SHAPE[1] // TRIED_GROUP, TRIED_SHAPE[0], 2, dtype=torch.bfloat16)
    return _crossing(
        lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, TRIED_GROUP, scales_zeros),
        lambda x: multiply(x, packed, scales_zeros),
    )


@cache
def int8_from_tokens() -> int | None:
    """From how many tokens on a product with int8 weights is faster dense, here: measured once a process."""
    codes = torch.ones(TRIED_SHAPE, dtype=torch.int8)
    scales = torch.ones(TRIED_SHAPE[0], dtype=torch.bfloat16)
    return _crossing(
        lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scales), lambda x: multiply_int8(x, codes, scales)
    )


def _crossing(few: Callable[[Tensor], Tensor], many: Callable[[Tensor], Tensor]) -> int | None:
    """The smallest number of tokens tried at which the second way is the faster one."""
    for tokens in TRIED_TOKENS:
        x = torch.ones(tokens, TRIED_SHAPE[1], dtype=torch.bfloat16)
        if _seconds(partial(many, x)) < _seconds(partial(few, x)):
            return tokens
    return None


def _seconds(run: Callable[[], object]) -> float:
    """The shortest of a few runs: load only lengthens them."""
    times = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
