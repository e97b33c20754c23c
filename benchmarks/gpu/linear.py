"""Linear layers with four-bit weights: are they right, and how fast beside torch bf16, tinygemm and bitsandbytes?

`python -m benchmarks.gpu.linear --out FILE.json`. N x K weight, M tokens, groups of 128 in the timings.
"""

import importlib.util
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

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
from compressor.kernels.cuda import linear as kernels
from compressor.kernels.cuda.launch import device_of
from compressor.kernels.layouts import pack_t16x64, unpack_t16x64

SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336), (28672, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048)
GROUP = 128
BF16, FP16 = torch.bfloat16, torch.float16


@dataclass
class Weight:
    """A random four-bit weight, packed, and what it stands for."""

    codes: Tensor
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int

    def dense(self) -> Tensor:
        """The dequantized weight `[N, K]` in float64."""
        zeros = 0 if self.zeros is None else self.zeros.double().repeat_interleave(self.group, 0).T
        return (self.codes.double() - zeros) * self.scales.double().repeat_interleave(self.group, 0).T


def random_weight(n: int, k: int, group: int, zeros: bool, dtype: torch.dtype, device: torch.device) -> Weight:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    scales = (torch.rand(k // group, n, device=device) * 0.02 + 0.01).to(dtype)
    zero = torch.randint(-8, 8, scales.shape, dtype=torch.int8, device=device) if zeros else None
    return Weight(codes, pack_t16x64(codes), scales, zero, group)


def ours(x: Tensor, weight: Weight) -> Tensor:
    """The kernels; on the CPU their definition."""
    if x.is_cuda:
        return kernels.int4_linear_cuda(x, weight.packed, weight.scales, weight.zeros, weight.group)
    return (x.float() @ weight.dense().float().T).to(x.dtype)


# ---- is it right? ----


def check(report: Report) -> None:
    """Against float64 on the dequantized weight, on fresh random data each time."""
    pick = random.Random(0)
    for tokens in (*range(1, 18), 33, 64, 65, 100, 129, 257):
        dtype, zeros = pick.choice((BF16, FP16)), pick.random() < 0.5
        n = 16 * pick.choice((1, 3, 17, 36, 132, 300))
        k = 64 * pick.choice((1, 2, 9, 24, 64, 86))
        group = pick.choice([group for group in (32, 64, 128, k) if k % group == 0])
        check_linear(report, n, k, group, zeros, dtype, tokens)
    for n, k, tokens in ((4096, 14336, 8), (1024, 14336, 3), (64, 28672, 8), (28672, 512, 5)):  # splits of K, small K
        check_linear(report, n, k, 128, True, BF16, tokens)
    check_packing(report)


def check_linear(report: Report, n: int, k: int, group: int, zeros: bool, dtype: torch.dtype, tokens: int) -> None:
    case = {"n": n, "k": k, "m": tokens, "group": group, "zeros": zeros, "dtype": str(dtype).removeprefix("torch.")}
    weight = random_weight(n, k, group, zeros, dtype, report.device)
    x = torch.randn(tokens, k, device=report.device).to(dtype)
    reference = x.double() @ weight.dense().T
    # beyond eight tokens weights may be rounded to the activations' dtype as well, as a dense model's are
    limit = TOLERANCE[dtype] * (1 if tokens <= 8 else 2)
    y = ours(x, weight)
    report.checked("int4_linear", relative_error(y, reference), limit, **case)
    report.checked("int4_linear again", differing(ours(x, weight), y), 0, **case)
    if report.on_gpu:
        report.checked("int4_linear replayed", differing(replayed(lambda: ours(x, weight)), y), 0, **case)
        if tokens <= 8:
            check_guards(report, x, weight, reference, limit, case)


def check_guards(report: Report, x: Tensor, weight: Weight, reference: Tensor, limit: float, case: dict) -> None:
    """Every element written, nothing beside them: the kernel on an output of NaN inside a buffer of NaN."""
    device = device_of(x)
    shape = kernels.weight_of(weight.packed, weight.scales, weight.zeros, weight.group)
    plan = kernels.gemv_plan(shape, len(x), device)
    parts = plan.splits if plan.cluster == 1 else 1
    buffer, y = poisoned((parts, *reference.shape), torch.float32 if parts > 1 else x.dtype, x.device)
    zeros = 0 if weight.zeros is None else weight.zeros
    kernels.run(plan, device, [x, weight.packed, weight.scales, zeros, y, len(x)], programmatic=device.has_clusters)
    report.checked("int4_linear poisoned", relative_error(y.double().sum(0), reference), limit, **case)
    report.checked("int4_linear guards", int(not guards_hold(buffer, y)), 0, **case)


def check_packing(report: Report) -> None:
    """Bit for bit as torch packs, unpacks and dequantizes."""
    for n, k in ((16, 64), (48, 576), (4096, 4096)):
        weight = random_weight(n, k, 64, True, BF16, report.device)
        report.checked("unpack_t16x64", differing(unpack_t16x64(weight.packed), weight.codes), 0, n=n, k=k)
        if not report.on_gpu:
            continue
        report.checked("int4_pack", differing(kernels.int4_pack_cuda(weight.codes), weight.packed), 0, n=n, k=k)
        report.checked("int4_unpack", differing(kernels.int4_unpack_cuda(weight.packed), weight.codes), 0, n=n, k=k)
        dense = kernels.int4_dequantize_cuda(weight.packed, weight.scales, weight.zeros, 64)
        report.checked("int4_dequantize", differing(dense, weight.dense().to(BF16)), 0, n=n, k=k)


# ---- how fast is it? ----


def time(report: Report) -> None:
    """Each contender at each shape and M, in one run on the same device; weights rotate."""
    bandwidth = copy_bandwidth(report)
    report.timed("copy", 1 / bandwidth, bytes_per_s=bandwidth)
    shapes = SHAPES if report.on_gpu else ((64, 128),)
    tokens = TOKENS if report.on_gpu else (1, 16)
    for n, k in shapes:
        time_streaming(report, n, k, bandwidth)
        for name, prepare in contenders(report):
            contender, weight_bytes = prepare(n, k, report)
            for m in tokens:
                took = seconds(contender(torch.randn(m, k, device=report.device).to(BF16)), report)
                share = weight_bytes / took / bandwidth
                report.timed(name, took, n=n, k=k, m=m, weight_bytes=weight_bytes, of_copy=share)


def time_streaming(report: Report, n: int, k: int, bandwidth: float) -> None:
    """Packing and dequantizing: bytes read and written, as a share of the copy's."""
    if not report.on_gpu:
        return
    weights = [random_weight(n, k, GROUP, False, BF16, report.device) for _ in range(rotations(n * k, report))]
    took = seconds([lambda w=w: kernels.int4_pack_cuda(w.codes) for w in weights], report)
    report.timed("int4_pack", took, n=n, k=k, of_copy=1.5 * n * k / took / bandwidth)
    calls = [lambda w=w: kernels.int4_dequantize_cuda(w.packed, w.scales, None, GROUP) for w in weights]
    took = seconds(calls, report)
    report.timed("int4_dequantize", took, n=n, k=k, of_copy=2.5 * n * k / took / bandwidth)


Contender = Callable[[Tensor], list[Call]]  # for an x: calls over rotating weights


def torch_bf16(n: int, k: int, report: Report) -> tuple[Contender, int]:
    """The dense layer, and the bytes of its weight."""
    weights = [torch.randn(n, k, device=report.device).to(BF16) for _ in range(rotations(2 * n * k, report))]
    return lambda x: [lambda w=w: dense_linear(x, w) for w in weights], 2 * n * k


def ours_int4(n: int, k: int, report: Report) -> tuple[Contender, int]:
    weight_bytes = n * k // 2 + n * k // GROUP * 2
    copies = range(rotations(weight_bytes, report))
    weights = [random_weight(n, k, GROUP, False, BF16, report.device) for _ in copies]
    return lambda x: [lambda w=w: ours(x, w) for w in weights], weight_bytes


def torch_tinygemm(n: int, k: int, report: Report) -> tuple[Contender, int]:
    """ATen's int4 op, with its bf16 scales and zeros."""
    weight_bytes = n * k // 2 + n * k // GROUP * 4
    both = torch.full((k // GROUP, n, 2), 0.01, dtype=BF16, device=report.device)
    weights = []
    for _ in range(rotations(weight_bytes, report)):
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=report.device)
        weights.append(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
    multiply = torch.ops.aten._weight_int4pack_mm
    return lambda x: [lambda w=w: multiply(x, w, GROUP, both) for w in weights], weight_bytes


def bitsandbytes_nf4(n: int, k: int, report: Report) -> tuple[Contender, int]:
    import bitsandbytes

    weight_bytes = n * k // 2 + n * k // 64 * 4
    dense = torch.randn(n, k, device=report.device).to(BF16)
    quantize, multiply = bitsandbytes.functional.quantize_4bit, bitsandbytes.matmul_4bit
    weights = [quantize(dense, blocksize=64, quant_type="nf4") for _ in range(rotations(weight_bytes, report))]
    return lambda x: [lambda w=w, s=s: multiply(x, w.t(), quant_state=s) for w, s in weights], weight_bytes


def contenders(report: Report) -> list[tuple[str, Callable]]:
    """Who takes part here."""
    found: list[tuple[str, Callable]] = [("torch bf16", torch_bf16), ("ours int4", ours_int4)]
    if report.on_gpu:
        found.append(("torch tinygemm int4", torch_tinygemm))
        if importlib.util.find_spec("bitsandbytes"):
            found.append(("bitsandbytes nf4", bitsandbytes_nf4))
    return found


if __name__ == "__main__":
    sys.exit(run(check, time))
