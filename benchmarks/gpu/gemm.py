"""Four-bit weights times 9 to 1024 tokens: are they right, and how fast beside torch bf16, tinygemm and dequantizing?

`python -m benchmarks.gpu.gemm --out FILE.json`. N x K weight, M tokens, groups of 128 in the timings.
"""

import random
import sys

import torch
from torch import Tensor

from benchmarks.gpu.harness import (
    TOLERANCE,
    Call,
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
from benchmarks.gpu.linear import BF16, FP16, GROUP, Weight, ours, ours_int4, random_weight, torch_bf16, torch_tinygemm
from compressor.kernels.cuda import gemm
from compressor.kernels.cuda import linear as kernels
from compressor.kernels.cuda.gemm import GEMM_TOKENS, SKINNY_TOKENS, gemm_tiles, plans, skinny_tiles
from compressor.kernels.cuda.launch import device_of
from compressor.kernels.cuda.linear import Plan

SHAPES = ((4096, 4096), (8192, 8192), (28672, 4096))
TOKENS = (16, 32, 64, 96, 128, 256, 512, 1024)
RANKED = (16, 64, 128, 256)  # numbers of tokens for which plans are compared


# ---- is it right? ----


def check(report: Report) -> None:
    """Against float64 on the dequantized weight; M, N and K end inside tiles."""
    pick = random.Random(0)
    for tokens in (9, 16, 17, 31, 33, 64, 65, 70, 127, 129, 200, 257, 1000, 1024):
        dtype, zeros = pick.choice((BF16, FP16)), pick.random() < 0.5
        n = 16 * pick.choice((1, 3, 17, 36, 132, 300) if report.on_gpu else (1, 3))
        k = 64 * pick.choice((1, 2, 9, 24, 64, 86) if report.on_gpu else (1, 2, 9))
        group = pick.choice([group for group in (32, 64, 128, k) if k % group == 0])
        check_linear(report, n, k, group, zeros, dtype, tokens)
    if report.on_gpu:
        check_linear(report, 4096, 14336, 128, False, BF16, 40)
        check_linear(report, 1024, 14336, 32, True, FP16, 100)
        for tokens in (24, 64, 150):
            check_plans(report, tokens)


def check_linear(report: Report, n: int, k: int, group: int, zeros: bool, dtype: torch.dtype, tokens: int) -> None:
    """What the op does, again, and in a graph."""
    case = {"n": n, "k": k, "m": tokens, "group": group, "zeros": zeros, "dtype": str(dtype).removeprefix("torch.")}
    weight = random_weight(n, k, group, zeros, dtype, report.device)
    x = torch.randn(tokens, k, device=report.device).to(dtype)
    # beyond 64 tokens weights may be rounded to the activations' dtype as well, as a dense model's are
    limit = TOLERANCE[dtype] * (1 if tokens <= SKINNY_TOKENS else 2)
    y = ours(x, weight)
    report.checked("int4_linear", relative_error(y, x.double() @ weight.dense().T), limit, **case)
    report.checked("int4_linear again", differing(ours(x, weight), y), 0, **case)
    if report.on_gpu:
        report.checked("int4_linear replayed", differing(replayed(lambda: ours(x, weight)), y), 0, **case)


def check_plans(report: Report, tokens: int) -> None:
    """Every tile, unsplit and split, on an output of NaN inside a buffer of NaN; N ends inside each tile."""
    weight = random_weight(592, 1088, 64, True, BF16, report.device)
    x = torch.randn(tokens, 1088, device=report.device).to(BF16)
    reference = x.double() @ weight.dense().T
    for name, plan in candidates(x, weight):
        parts = plan.splits if plan.cluster == 1 else 1
        dtype = torch.float32 if parts > 1 else BF16
        buffer, y = poisoned((parts, *reference.shape), dtype, x.device)
        args = [x, weight.packed, weight.scales, weight.zeros, y, tokens]
        kernels.run(plan, device_of(x), args)
        limit = TOLERANCE[BF16] * (2 if plan.kernel.name == "w4a16_gemm" else 1)
        report.checked("plan", relative_error(y.double().sum(0), reference), limit, m=tokens, plan=name)
        report.checked("plan guards", int(not guards_hold(buffer, y)), 0, m=tokens, plan=name)


def candidates(x: Tensor, weight: Weight) -> list[tuple[str, Plan]]:
    """All plans for these operands by the model's order; on Hopper wgmma also where a plan would not choose it."""
    device, tokens = device_of(x), len(x)
    shape = kernels.weight_of(weight.packed, weight.scales, weight.zeros, weight.group)
    tiles = skinny_tiles(tokens) if tokens <= SKINNY_TOKENS else []
    tiles = tiles + (gemm_tiles(tokens) if device.arch == "sm_90a" else [])
    found = sorted(plans(tiles, shape, tokens, device), key=lambda found: found[0])
    return [(_name(plan), plan) for _, plan in found]


def _name(plan: Plan) -> str:
    constants = dict(plan.kernel.constants)
    shown = ("TOKENS", "WARPS_N", "HEIGHT", "STAGES", "SPLITS")
    return " ".join([plan.kernel.name, *(f"{key.lower()}={constants[key]}" for key in shown if key in constants)])


# ---- how fast is it? ----


def time(report: Report) -> None:
    """Each contender at each shape and M, in one run on the same device; weights rotate."""
    bandwidth = copy_bandwidth(report)
    report.timed("copy", 1 / bandwidth, bytes_per_s=bandwidth)
    for n, k in SHAPES if report.on_gpu else ((64, 128),):
        for name, prepare in contenders(report):
            contender, weight_bytes = prepare(n, k, report)
            for m in TOKENS if report.on_gpu else (16, 80):
                if name == "torch tinygemm int4" and m > SKINNY_TOKENS:
                    continue  # several times slower than bf16
                took = seconds(contender(torch.randn(m, k, device=report.device).to(BF16)), report)
                rates = {"of_copy": weight_bytes / took / bandwidth, "tflops": 2 * m * n * k / took / 1e12}
                report.timed(name, took, n=n, k=k, m=m, weight_bytes=weight_bytes, **rates)
    if report.on_gpu:
        time_plans(report, 8192, 8192)


def time_plans(report: Report, n: int, k: int) -> None:
    """The three plans that the model likes best, and the best of the other kernel: does it rank them right?"""
    weights = [random_weight(n, k, GROUP, False, BF16, report.device) for _ in range(rotations(n * k // 2, report))]
    for m in RANKED:
        x = torch.randn(m, k, device=report.device).to(BF16)
        found = candidates(x, weights[0])
        others = [other for other in found[3:] if other[1].kernel.name != found[0][1].kernel.name]
        for name, plan in found[:3] + others[:1]:
            took = seconds([_launch(plan, x, weight) for weight in weights], report)
            report.timed(name, took, n=n, k=k, m=m, tflops=2 * m * n * k / took / 1e12)


def _launch(plan: Plan, x: Tensor, weight: Weight) -> Call:
    shape = kernels.weight_of(weight.packed, weight.scales, weight.zeros, weight.group)
    return lambda: gemm.launch_plan(plan, x, weight.packed, weight.scales, weight.zeros, shape)


def dequantizing(n: int, k: int, report: Report):
    """What M > 1024 gets, and other architectures from 65 on: rows dequantized in chunks, and cuBLAS."""
    weight_bytes = n * k // 2 + n * k // GROUP * 2
    weights = [random_weight(n, k, GROUP, False, BF16, report.device) for _ in range(rotations(weight_bytes, report))]
    shape = kernels.weight_of(weights[0].packed, weights[0].scales, None, GROUP)

    def calls(x: Tensor) -> list[Call]:
        return [lambda w=w: kernels.dense_linear(x, w.packed, w.scales, None, shape) for w in weights]

    return calls, weight_bytes


def contenders(report: Report) -> list:
    """Who takes part here."""
    found: list = [("torch bf16", torch_bf16), (f"ours int4 (M <= {GEMM_TOKENS})", ours_int4)]
    return found + [("ours dequantizing", dequantizing), ("torch tinygemm int4", torch_tinygemm)] * report.on_gpu


if __name__ == "__main__":
    sys.exit(run(check, time))
