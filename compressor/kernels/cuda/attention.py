"""The quantized KV cache on a GPU: writing blocks, appending a token, a decode step of attention (csrc/kv_*.cuh).

B sequences, H key/value heads, Q query heads, T tokens, N blocks held (capacity), D head width, R slots of the ring.
Formats and definitions: `compressor.kernels.kv_cache`. Lengths and starts are read on the device, so that a captured
graph serves growing sequences as long as the capacity suffices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.kernels.cuda.build import Kernel
from compressor.kernels.cuda.launch import Device, device_of, launch
from compressor.kernels.kv_cache import BLOCK

WIDTHS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
WARPS, THREADS = 4, 128
HEADS = 8  # query heads that share a pass over the codes: the columns of the MMA
MAX_SPLITS = 64
RESERVED_BYTES = 1024  # of shared memory, which each resident block takes beside its own


@dataclass(frozen=True)
class AttentionPlan:
    """Both launches of a decode step; `parts` is how many partial results there are of each head."""

    attention: Kernel
    combine: Kernel
    grid: tuple[int, int, int]
    shared: int
    parts: int


def attention_plan(
    shape_BQD: tuple[int, int, int], kv_heads: int, num_blocks: int, ring: int, bits: int, dtype: torch.dtype,
    device: Device,
) -> AttentionPlan:  # fmt: skip
    """How a step is cut: one wave of blocks over heads and shares of their codes, and a block for each head's ring."""
    B, Q, D = shape_BQD
    group = Q // kv_heads
    resident = 3 if D == 256 else 4  # what registers allow
    stages = 2 if attention_shared(D, bits, ring, 2) <= device.shared_per_block else 1
    shared = attention_shared(D, bits, ring, stages)
    if shared > device.shared_per_block:
        held = f"{device.shared_per_block} bytes of shared memory a block"
        raise ValueError(f"a ring of {ring} exact tokens does not fit {device.arch} ({held}): use a smaller window")
    resident = max(1, min(resident, (device.shared_per_block + RESERVED_BYTES) // (shared + RESERVED_BYTES)))
    tiles = B * kv_heads * -(-group // HEADS)
    splits = max(1, min(device.sm_count * resident // tiles - 1, -(-num_blocks // WARPS), MAX_SPLITS))
    constants = (*_constants(D, bits, dtype), ("RING", ring), ("GROUP", group), ("STAGES", stages))
    return AttentionPlan(
        attention=Kernel("kv_attention.cuh", "kv_attention", constants),
        combine=Kernel("kv_combine.cuh", "kv_combine", constants),
        grid=(splits + 1, tiles // B, B),
        shared=shared,
        parts=splits + 1,
    )


def attention_shared(D: int, bits: int, ring: int, stages: int) -> int:
    """Bytes of dynamic shared memory: the most of what the blocks of codes need, their results, and the ring."""
    stage = 8 * D * bits + 2 * _numbers(D, bits)
    blocks = WARPS * (stages * stage + 2 * BLOCK * HEADS)
    results = WARPS * HEADS * (4 * (D + 4) + 8)
    groups = 2 * THREADS // D
    exact = 4 * HEADS * D + groups * HEADS * (4 * (D + 4) + 8) + 4 * HEADS * ring
    return max(blocks, results, exact)


def write_kernel(name: str, D: int, bits: int, dtype: torch.dtype, ring: int | None = None) -> tuple[Kernel, int]:
    """`kv_write`, or `kv_append` for rings of so many tokens, and the shared memory of either."""
    constants = _constants(D, bits, dtype) + (() if ring is None else (("RING", ring),))
    return Kernel("kv_write.cuh", name, constants), 4 * BLOCK * (D + 8) + 16 * D


def kv_write_cuda(keys_BHTD: Tensor, values_BHTD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of T / 32 blocks, bit for bit as `kv_cache.quantize_blocks`."""
    _check(keys_BHTD, bits)
    B, H, T, D = keys_BHTD.shape
    if values_BHTD.shape != keys_BHTD.shape or T % BLOCK:
        given = f"keys {tuple(keys_BHTD.shape)}, values {tuple(values_BHTD.shape)}"
        raise ValueError(f"{given}: blocks are of {BLOCK} tokens, keys and values of one shape")
    codes = keys_BHTD.new_empty((B, H, T // BLOCK, 2, 4 * D * bits), dtype=torch.uint8)
    scales = keys_BHTD.new_empty((B, H, T // BLOCK, 1 if bits == 8 else 2, D + BLOCK), dtype=torch.float16)
    if codes.numel():
        kernel, shared = write_kernel("kv_write", D, bits, keys_BHTD.dtype)
        args = (keys_BHTD.contiguous(), values_BHTD.contiguous(), codes, scales)
        launch(kernel, device_of(codes), (T // BLOCK, B * H), THREADS, args, shared=shared)
    return codes, scales


def kv_append_cuda(
    keys_BH1D: Tensor, values_BH1D: Tensor, codes: Tensor, scales: Tensor, ring_keys_BHRD: Tensor,
    ring_values_BHRD: Tensor, lengths_B: Tensor, bits: int,
) -> None:  # fmt: skip
    """One more token of each sequence, in place, as `ops_kv.kv_append_cpu`."""
    _check(keys_BH1D, bits)
    _check_cache(codes, scales, ring_keys_BHRD, ring_values_BHRD, keys_BH1D.dtype, bits)
    B, H, _, D = keys_BH1D.shape
    kernel, shared = write_kernel("kv_append", D, bits, keys_BH1D.dtype, ring_keys_BHRD.shape[2])
    news = (keys_BH1D.contiguous(), values_BH1D.contiguous())
    args = (*news, codes, scales, ring_keys_BHRD, ring_values_BHRD, lengths_B, codes.shape[2])
    launch(kernel, device_of(codes), (H, B), THREADS, args, shared=shared)


def kv_attention_cuda(
    query_BQD: Tensor, codes: Tensor, scales: Tensor, ring_keys_BHRD: Tensor, ring_values_BHRD: Tensor,
    starts_B: Tensor, lengths_B: Tensor, bits: int, scaling: float,
) -> Tensor:  # fmt: skip
    """Attention of the newest tokens, `[B, Q, D]`, as `kv_cache.attend`, with codes on float16 tensor cores."""
    _check(query_BQD, bits)
    _check_cache(codes, scales, ring_keys_BHRD, ring_values_BHRD, query_BQD.dtype, bits)
    B, Q, D = query_BQD.shape
    H, R = ring_keys_BHRD.shape[1:3]
    if starts_B.dtype != torch.int32 or lengths_B.dtype != torch.int32 or Q % H:
        given = f"{Q} query heads on {H}; starts {starts_B.dtype}, lengths {lengths_B.dtype}"
        raise ValueError(f"{given}: query heads are a multiple of key/value heads, starts and lengths int32")
    device = device_of(codes)
    plan = attention_plan((B, Q, D), H, codes.shape[2], R, bits, query_BQD.dtype, device)
    parts = codes.new_empty((B, plan.grid[1], plan.parts, HEADS, D), dtype=torch.float32)
    sums = codes.new_empty((B, plan.grid[1], plan.parts, HEADS, 2), dtype=torch.float32)
    query = query_BQD.contiguous()
    out = torch.empty_like(query)
    held = (codes, scales, ring_keys_BHRD, ring_values_BHRD, starts_B, lengths_B)
    args = (query, *held, parts, sums, codes.shape[2], float(scaling))
    launch(plan.attention, device, plan.grid, THREADS, args, shared=plan.shared)
    programmatic = int(device.arch.removeprefix("sm_").rstrip("a")) >= 90
    launch(plan.combine, device, B * Q, D // 2, (parts, sums, out, Q, plan.parts), programmatic=programmatic)
    return out


def _constants(D: int, bits: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    return ("D", D), ("BITS", bits), ("MODEL_BF16", int(dtype == torch.bfloat16)), ("BF16", 0)


def _numbers(D: int, bits: int) -> int:
    return (D + BLOCK) * (1 if bits == 8 else 2)


def _check(x: Tensor, bits: int) -> None:
    if x.shape[-1] not in WIDTHS or x.dtype not in DTYPES or bits not in (4, 8):
        given = f"heads of {x.shape[-1]} channels in {x.dtype}, {bits} bits"
        raise ValueError(f"{given}: the KV cache kernels take {WIDTHS}, bfloat16 and float16, 4 and 8 bits")


def _check_cache(codes: Tensor, scales: Tensor, keys: Tensor, values: Tensor, dtype: torch.dtype, bits: int) -> None:
    B, H, R, D = keys.shape
    expected = (B, H, codes.shape[2], 2, 4 * D * bits)
    if codes.shape != expected or scales.shape[2:].numel() != codes.shape[2] * _numbers(D, bits) or R % BLOCK:
        given = f"codes {tuple(codes.shape)}, scales {tuple(scales.shape)}, ring {tuple(keys.shape)}"
        raise ValueError(f"{given} do not belong together in {bits} bits: see compressor.kernels.kv_cache")
    if keys.dtype != dtype or values.dtype != dtype or scales.dtype != torch.float16:
        raise ValueError(f"ring in {keys.dtype}, scales in {scales.dtype}: they are {dtype} (the query's) and float16")
    if not all(tensor.is_contiguous() for tensor in (codes, scales, keys, values)):
        raise ValueError("codes, scales and rings must be contiguous: they are read, and written, in place")
