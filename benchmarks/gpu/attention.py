"""The quantized KV cache: is it right, and how fast is a decode step beside torch's attention in bfloat16?

`python -m benchmarks.gpu.attention --out FILE.json`. B sequences, Q query heads on H key/value heads of D channels.
"""

import random
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.gpu.harness import (
    Report,
    copy_bandwidth,
    differing,
    guards_hold,
    poisoned,
    relative_error,
    replayed,
    rotations,
    run,
    seconds,
)
from compressor.kernels import kv_cache, ops_kv
from compressor.kernels.cuda import attention as kernels
from compressor.kernels.cuda.launch import device_of, launch

BF16, FP16 = torch.bfloat16, torch.float16
# Queries times key scales, and weights, are float16 operands of the tensor cores: as exact as a float16 cache
TOLERANCE = {BF16: 3e-3, FP16: 1.5e-3}
RING = 96
# B, Q, H, D, context; the first is the case of the bar
SHAPES = (
    (8, 64, 8, 128, 32768),
    (1, 64, 8, 128, 32768),
    (8, 32, 8, 128, 4096),
    (1, 32, 8, 128, 4096),
    (4, 16, 4, 256, 8192),
)


@dataclass
class Cache:
    """Random codes with scales as real ones have, and rings."""

    codes: Tensor
    scales: Tensor
    rings: tuple[Tensor, Tensor]
    bits: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, *self.rings))


def random_tokens(B: int, H: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys with channels of different sizes and offsets, values with tokens of different sizes."""
    keys = (torch.randn(B, H, T, D, device=device) + torch.randn(D, device=device)) * torch.randn(
        D, device=device
    ).exp()
    values = torch.randn(B, H, T, D, device=device) * torch.rand(T, 1, device=device)
    return keys.to(dtype), values.to(dtype)


def random_cache(B: int, H: int, T: int, D: int, bits: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """T / 32 blocks, a sequence at a time, so that 32-bit copies of a long cache are never whole in memory."""
    codes, scales = ops_kv.empty_blocks(torch.empty(B, H, 1, D, device=device), T // kv_cache.BLOCK, bits)
    for b in range(B):
        codes[b : b + 1], scales[b : b + 1] = write(*random_tokens(1, H, T, D, dtype, device), bits)
    return Cache(codes, scales, random_tokens(B, H, RING, D, dtype, device), bits)


def write(keys: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The kernel; on the CPU its definition."""
    return (kernels.kv_write_cuda if keys.is_cuda else ops_kv.kv_write_cpu)(keys, values, bits)


def attend(query: Tensor, cache: Cache, starts: Tensor, lengths: Tensor) -> Tensor:
    """The kernels; on the CPU their definition."""
    step = kernels.kv_attention_cuda if query.is_cuda else ops_kv.kv_attention_cpu
    scaling = query.shape[-1] ** -0.5
    return step(query, cache.codes, cache.scales, *cache.rings, starts, lengths, cache.bits, scaling)


# ---- is it right? ----


def check(report: Report) -> None:
    """Against float64 over the same codes, fresh random data each time: widths, groups, lengths, padding."""
    pick = random.Random(0)
    widths = kernels.WIDTHS if report.on_gpu else (64,)
    for D in widths:
        for bits in (8, 4):
            for dtype in (BF16, FP16):
                check_write(report, pick.choice((1, 3)), pick.choice((1, 5)), pick.choice((1, 2, 7)), D, bits, dtype)
                check_append(report, D, bits, dtype)
                for group in (1, 3, 8, 9, 16):
                    B, num_blocks = pick.choice((1, 2, 5)), pick.choice((0, 1, 4, 33, 150))
                    check_attention(report, B, pick.choice((1, 2, 4)), group, num_blocks, D, bits, dtype, pick)


def check_write(report: Report, B: int, H: int, N: int, D: int, bits: int, dtype: torch.dtype) -> None:
    case = {"b": B, "h": H, "blocks": N, "d": D, "bits": bits, "dtype": str(dtype).removeprefix("torch.")}
    tokens = random_tokens(B, H, 32 * N, D, dtype, report.device)
    found, expected = write(*tokens, bits), ops_kv.kv_write_cpu(*(part.cpu() for part in tokens), bits)
    for name, one, other in zip(("codes", "scales"), found, expected, strict=True):
        report.checked(f"kv_write {name}", differing(one.cpu(), other), 0, **case)


def check_append(report: Report, D: int, bits: int, dtype: torch.dtype) -> None:
    """Token by token into rings of 64, until they have given three blocks."""
    B, H, T = 2, 3, 140
    keys, values = random_tokens(B, H, T, D, dtype, report.device)
    held = [torch.zeros_like(part) for part in write(keys[:, :, :96], values[:, :, :96], bits)]
    rings = [torch.full((B, H, 64, D), torch.nan, dtype=dtype, device=report.device) for _ in range(2)]
    append = kernels.kv_append_cuda if report.on_gpu else ops_kv.kv_append_cpu
    for length in range(1, T + 1):
        new = (part[:, :, length - 1 : length].contiguous() for part in (keys, values))
        lengths = torch.full((B,), length, dtype=torch.int32, device=report.device)
        append(*new, *held, *rings, lengths, bits)
    case = {"d": D, "bits": bits, "dtype": str(dtype).removeprefix("torch.")}
    expected = write(keys[:, :, :96], values[:, :, :96], bits)
    report.checked("kv_append codes", differing(held[0], expected[0]), 0, **case)
    report.checked("kv_append scales", differing(held[1], expected[1]), 0, **case)
    slots = torch.arange(96, T, device=report.device) % 64
    report.checked("kv_append ring", differing(rings[0][:, :, slots], keys[:, :, 96:]), 0, **case)


def check_attention(
    report: Report,
    B: int,
    H: int,
    group: int,
    num_blocks: int,
    D: int,
    bits: int,
    dtype: torch.dtype,
    pick: random.Random,
) -> None:
    case = {"b": B, "h": H, "group": group, "blocks": num_blocks, "d": D, "bits": bits}
    case |= {"dtype": str(dtype).removeprefix("torch.")}
    cache = random_cache(B, H, 32 * num_blocks, D, bits, dtype, report.device)
    longest = 32 * num_blocks + RING
    lengths = [pick.randint(max(1, longest - 31), longest) if b == 0 else pick.randint(1, longest) for b in range(B)]
    starts = [pick.choice((0, pick.randrange(length))) for length in lengths]
    limits = [torch.tensor(part, dtype=torch.int32, device=report.device) for part in (starts, lengths)]
    query = torch.randn(B, H * group, D, device=report.device).to(dtype)
    y = attend(query, cache, *limits)
    codes = (cache.codes, cache.scales, cache.rings)
    reference = kv_cache.attend(query.double(), *codes, *limits, bits, D**-0.5)
    report.checked("kv_attention", relative_error(y, reference), TOLERANCE[dtype], **case)
    report.checked("kv_attention again", differing(attend(query, cache, *limits), y), 0, **case)
    if report.on_gpu:
        report.checked(
            "kv_attention replayed", differing(replayed(lambda: attend(query, cache, *limits)), y), 0, **case
        )
        check_guards(report, query, cache, *limits, y, case)


def check_guards(
    report: Report, query: Tensor, cache: Cache, starts: Tensor, lengths: Tensor, y: Tensor, case: dict
) -> None:
    """Every element written, nothing beside them: results and partial results full of NaN inside buffers of NaN."""
    device, (B, Q, D), H = device_of(query), query.shape, cache.codes.shape[1]
    plan = kernels.attention_plan((B, Q, D), H, cache.codes.shape[2], RING, cache.bits, query.dtype, device)
    heads = (B, plan.grid[1], plan.parts, kernels.HEADS)
    parts_buffer, parts = poisoned((*heads, D), torch.float32, query.device)
    sums_buffer, sums = poisoned((*heads, 2), torch.float32, query.device)
    buffer, out = poisoned((B, Q, D), query.dtype, query.device)
    args = (query, cache.codes, cache.scales, *cache.rings, starts, lengths, parts, sums, cache.codes.shape[2], D**-0.5)
    launch(plan.attention, device, plan.grid, kernels.THREADS, args, shared=plan.shared)
    launch(plan.combine, device, B * Q, D // 2, (parts, sums, out, Q, plan.parts))
    report.checked("kv_attention poisoned", differing(out, y), 0, **case)
    pairs = ((parts_buffer, parts), (sums_buffer, sums), (buffer, out))
    report.checked("kv_attention guards", sum(not guards_hold(*pair) for pair in pairs), 0, **case)


# ---- how fast is it? ----


def time(report: Report) -> None:
    """A decode step of each cache, and writing a prompt; in one run on the same device, caches rotating."""
    bandwidth = copy_bandwidth(report)
    report.timed("copy", 1 / bandwidth, bytes_per_s=bandwidth)
    for shape in SHAPES if report.on_gpu else ((1, 4, 2, 64, 128),):
        time_dense(report, *shape, bandwidth)
        for bits in (8, 4):
            time_quantized(report, *shape, bits, bandwidth)
            time_write(report, *shape, bits, bandwidth)


def time_dense(report: Report, B: int, Q: int, H: int, D: int, context: int, bandwidth: float) -> None:
    """torch's attention on a bfloat16 cache, as transformers calls it: grouped, and with groups as rows."""
    nbytes = 4 * B * H * context * D
    caches = [
        [torch.randn(B, H, context, D, dtype=BF16, device=report.device) for _ in range(2)]
        for _ in range(rotations(nbytes, report))
    ]
    query = torch.randn(B, Q, 1, D, dtype=BF16, device=report.device)
    rows = query.view(B, H, Q // H, D)
    case = {"b": B, "q": Q, "h": H, "d": D, "context": context}
    for name, calls in (
        ("torch sdpa, grouped", [lambda c=c: sdpa(query, *c, enable_gqa=True) for c in caches]),
        ("torch sdpa, rows", [lambda c=c: sdpa(rows, *c) for c in caches]),
    ):
        took = seconds(calls, report)
        report.timed(name, took, **case, of_copy=nbytes / took / bandwidth)


def time_quantized(report: Report, B: int, Q: int, H: int, D: int, context: int, bits: int, bandwidth: float) -> None:
    coded = context - 64  # with 64 exact tokens in the ring
    one = random_cache(B, H, coded, D, bits, BF16, report.device)
    caches = [one]
    for _ in range(rotations(one.nbytes, report) - 1):
        rings = one.rings[0].clone(), one.rings[1].clone()
        caches.append(Cache(one.codes.clone(), one.scales.clone(), rings, bits))
    starts, lengths = (torch.full((B,), n, dtype=torch.int32, device=report.device) for n in (0, coded + 70))
    assert kv_cache.quantized_tokens(coded + 70, RING) == coded
    query = torch.randn(B, Q, D, dtype=BF16, device=report.device)
    took = seconds([lambda c=c: attend(query, c, starts, lengths) for c in caches], report)
    case = {"b": B, "q": Q, "h": H, "d": D, "context": context}
    report.timed(f"ours int{bits}", took, **case, of_copy=one.nbytes / took / bandwidth)


def time_write(report: Report, B: int, Q: int, H: int, D: int, context: int, bits: int, bandwidth: float) -> None:
    """Quantizing all keys and values of a prompt."""
    tokens = [
        [torch.randn(B, H, context, D, dtype=BF16, device=report.device) for _ in range(2)]
        for _ in range(rotations(4 * B * H * context * D, report))
    ]
    written = sum(part.nbytes for part in write(*tokens[0], bits))
    took = seconds([lambda t=t: write(*t, bits) for t in tokens], report)
    nbytes = 4 * B * H * context * D + written
    report.timed(f"kv_write int{bits}", took, b=B, h=H, d=D, context=context, of_copy=nbytes / took / bandwidth)


if __name__ == "__main__":
    sys.exit(run(check, time))
