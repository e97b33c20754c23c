"""Every kernel once, on small odd shapes: what compute-sanitizer watches.

`compute-sanitizer --tool memcheck python -m benchmarks.gpu.small`. Each op also against its definition on the CPU.
"""

import sys

import torch
from torch import Tensor

from benchmarks.gpu.attention import attend as attend_quantized
from benchmarks.gpu.attention import check_append, random_cache
from benchmarks.gpu.harness import Report, relative_error, run
from benchmarks.gpu.linear import random_weight
from compressor.kernels import kv_cache, ops_experts, ops_tiled  # noqa: F401  (the ops)
from compressor.kernels.cuda import linear
from compressor.kernels.cuda.experts import pack_experts, pack_gate_up
from compressor.kernels.cuda.w8a8 import tile_codes

BF16 = torch.bfloat16
CPU = torch.device("cpu")
LIMIT = 6e-3  # two roundings to bfloat16


def check(report: Report) -> None:
    """Few tokens, many, ends inside tiles, split rows."""
    ops = torch.ops.compressor
    for n, k, group, zeros in ((48, 320, 64, True), (144, 2048, 128, False), (16, 64, 32, True)):
        weight = random_weight(n, k, group, zeros, BF16, CPU)
        held = (weight.packed, weight.scales, weight.zeros)
        for m in (1, 8, 9, 40, 70, 1100):
            compare(report, "int4", ops.int4_tiled_linear, (torch.randn(m, k).to(BF16), *held, group), n=n, k=k, m=m)
        if report.on_gpu:
            codes = linear.int4_unpack_cuda(linear.int4_pack_cuda(weight.codes.to(report.device)))
            report.checked("pack, unpack", int(not torch.equal(codes.cpu(), weight.codes)), 0, n=n, k=k)
    for n, k in ((40, 272), (264, 1040)):
        tiles = tile_codes(torch.randint(-128, 128, (n, k), dtype=torch.int8))
        held = (tiles, torch.rand(n) / 100, torch.randn(n).to(BF16))
        for m in (1, 9, 40, 200):
            compare(report, "w8a8", ops.w8a8_tiled_linear, (torch.randn(m, k).to(BF16), *held), n=n, k=k, m=m)
    check_experts(report)
    for D in (64, 128):
        for bits in (8, 4):
            check_cache(report, D, bits)
            check_append(report, D, bits, BF16)


def check_experts(report: Report) -> None:
    E, H, F, group = 5, 192, 64, 64
    weights: list[Tensor] = []
    for rows, columns, pack in ((2 * F, H, pack_gate_up), (H, F, pack_experts)):
        codes = torch.randint(-8, 8, (E, rows, columns), dtype=torch.int8)
        weights += pack(codes, (torch.rand(E, rows, columns // group) / 64 + 0.01).to(BF16))
    for m in (1, 5, 20, 150):
        index = torch.rand(m, E).argsort(-1)[:, :2].contiguous()
        args = (torch.randn(m, H).to(BF16), index, torch.rand(m, 2), *weights, group, "silu")
        compare(report, "experts", torch.ops.compressor.int4_experts, args, m=m)


def check_cache(report: Report, D: int, bits: int) -> None:
    """Blocks, a ring, padding; the same codes on the CPU."""
    cache = random_cache(2, 2, 4 * kv_cache.BLOCK, D, bits, BF16, report.device)
    query = torch.randn(2, 6, D).to(BF16)
    limits = torch.tensor([0, 40], dtype=torch.int32), torch.tensor([210, 150], dtype=torch.int32)
    found = attend_quantized(query.to(report.device), cache, *(part.to(report.device) for part in limits))
    cache.codes, cache.scales = cache.codes.cpu(), cache.scales.cpu()
    cache.rings = cache.rings[0].cpu(), cache.rings[1].cpu()
    expected = attend_quantized(query, cache, *limits)
    report.checked("attention", relative_error(found.cpu(), expected.double()), LIMIT, d=D, bits=bits)


def compare(report: Report, name: str, op, args: tuple, **case: object) -> None:
    """An op on the device and on the CPU."""
    there = (part.to(report.device) if isinstance(part, Tensor) else part for part in args)
    found, expected = op(*there), op(*args)
    report.checked(name, relative_error(found.cpu(), expected.double()), LIMIT, **case)


def time(report: Report) -> None:
    """Nothing: shapes are too small."""


if __name__ == "__main__":
    sys.exit(run(check, time))
