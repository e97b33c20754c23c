"""The operations of a quantized KV cache, behind `torch.library`. Shapes and formats: `compressor.kernels.kv_cache`.

The CPU implementations are the reference that the CUDA kernels are tested against.
"""

import torch
from torch import Tensor

from compressor.kernels import kv_cache
from compressor.kernels.cuda import attention, available
from compressor.kernels.kv_cache import BLOCK

_library = torch.library.Library("compressor", "FRAGMENT")
_library.define("kv_write(Tensor keys, Tensor values, int bits) -> (Tensor, Tensor)")
_library.define(
    "kv_append(Tensor keys, Tensor values, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) ring_keys, "
    "Tensor(d!) ring_values, Tensor lengths, int bits) -> ()"
)
_library.define(
    "kv_attention(Tensor query, Tensor codes, Tensor scales, Tensor ring_keys, Tensor ring_values, Tensor starts, "
    "Tensor lengths, int bits, float scaling) -> Tensor"
)


def kv_write_cpu(keys_BHTD: Tensor, values_BHTD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of whole blocks, as `kv_cache.quantize_blocks`."""
    return kv_cache.quantize_blocks(keys_BHTD, values_BHTD, bits)


def kv_append_cpu(
    keys_BH1D: Tensor, values_BH1D: Tensor, codes: Tensor, scales: Tensor, ring_keys_BHRD: Tensor,
    ring_values_BHRD: Tensor, lengths_B: Tensor, bits: int,
) -> None:  # fmt: skip
    """One more token of each sequence, in place; `lengths_B` counts it. Where a ring is full, a block is written."""
    R = ring_keys_BHRD.shape[2]
    for b, length in enumerate(lengths_B.tolist()):
        oldest = length - 1 - R
        if oldest >= 0 and oldest % BLOCK == 0:
            full = slice(oldest % R, oldest % R + BLOCK)
            block = kv_cache.quantize_blocks(ring_keys_BHRD[b, None, :, full], ring_values_BHRD[b, None, :, full], bits)
            codes[b, :, oldest // BLOCK], scales[b, :, oldest // BLOCK] = block[0][0, :, 0], block[1][0, :, 0]
        ring_keys_BHRD[b, :, (length - 1) % R] = keys_BH1D[b, :, 0]
        ring_values_BHRD[b, :, (length - 1) % R] = values_BH1D[b, :, 0]


def kv_attention_cpu(
    query_BQD: Tensor, codes: Tensor, scales: Tensor, ring_keys_BHRD: Tensor, ring_values_BHRD: Tensor,
    starts_B: Tensor, lengths_B: Tensor, bits: int, scaling: float,
) -> Tensor:  # fmt: skip
    """Attention of the newest tokens, `[B, Q, D]`, as `kv_cache.attend`."""
    ring = (ring_keys_BHRD, ring_values_BHRD)
    return kv_cache.attend(query_BQD, codes, scales, ring, starts_B, lengths_B, bits, scaling)


_library.impl("kv_write", kv_write_cpu, "CPU")
_library.impl("kv_append", kv_append_cpu, "CPU")
_library.impl("kv_attention", kv_attention_cpu, "CPU")
if available() is None:
    _library.impl("kv_write", attention.kv_write_cuda, "CUDA")
    _library.impl("kv_append", attention.kv_append_cuda, "CUDA")
    _library.impl("kv_attention", attention.kv_attention_cuda, "CUDA")


@torch.library.register_fake("compressor::kv_write", lib=_library)
def _(keys_BHTD: Tensor, values_BHTD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return empty_blocks(keys_BHTD, keys_BHTD.shape[2] // BLOCK, bits)


@torch.library.register_fake("compressor::kv_append", lib=_library)
def _(*_: object) -> None:
    return None


@torch.library.register_fake("compressor::kv_attention", lib=_library)
def _(query_BQD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query_BQD, memory_format=torch.contiguous_format)


def empty_blocks(like_BHTD: Tensor, num_blocks: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of `num_blocks` blocks for the sequences and heads of a tensor, not initialized."""
    B, H, _, D = like_BHTD.shape
    codes = like_BHTD.new_empty((B, H, num_blocks, 2, 4 * D * bits), dtype=torch.uint8)
    return codes, like_BHTD.new_empty((B, H, num_blocks, 1 if bits == 8 else 2, D + BLOCK), dtype=torch.float16)
