"""Products of many tokens with an int4 weight on a CPU: dense a slice of rows at a time, in the layout of ATen's op.

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
    codes = torch.arange(16, dtype=torch.int32).repeat(96 * 64 // 16)[torch.randperm(96 * 64)].view(96, 64)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    ones = torch.stack([torch.ones(1, 96), torch.full((1, 96), 8.0)], dim=-1).to(torch.bfloat16)
    found = (block for block in (64, 32) if torch.equal(dense(packed, ones, block).T, codes.to(torch.bfloat16)))
    return next(found, None)


@cache
def from_tokens() -> int | None:
    """From how many tokens on the dense way is the faster one here: measured once a process; None for never."""
    if rows_of_block() is None:
        return None
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, TRIED_SHAPE, generator=generator, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_zeros = torch.ones(TRIED_SHAPE[1] // TRIED_GROUP, TRIED_SHAPE[0], 2, dtype=torch.bfloat16)
    for tokens in TRIED_TOKENS:
        x = torch.ones(tokens, TRIED_SHAPE[1], dtype=torch.bfloat16)
        few = partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, packed, TRIED_GROUP, scales_zeros)
        if _seconds(partial(multiply, x, packed, scales_zeros)) < _seconds(few):
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
