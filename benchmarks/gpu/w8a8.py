"""W8A8: are the kernels right to the bit, and how fast are they beside bf16 and `torch._int_mm`?

`python -m benchmarks.gpu.w8a8 --out FILE.json`. M tokens, N x K weight.
"""

import sys

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
from compressor.kernels.cuda.w8a8 import product_cuda, quantize_tokens_cuda, tile_codes, w8a8_linear, w8a8_linear_cuda
from compressor.kernels.ops import token_codes

CHECKS = (  # M, N, K: each kernel and tile, with ends inside tiles
    *((m, 1032, 1040) for m in (1, 7, 8, 9, 17, 31, 32, 33, 64, 65, 200)),
    *((m, 8192, 4096) for m in (3, 16, 129, 512, 1500)),
    (2100, 4104, 2064),
)
SHAPES = ((4096, 4096), (8192, 8192), (28672, 4096))
TOKENS = (1, 8, 16, 32, 64, 256, 512, 2048, 8192)
BF16, FP16 = torch.bfloat16, torch.float16
INT_MM_TOKENS = 17  # torch._int_mm takes no fewer


def ours(x: Tensor, tiles: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernels; on the CPU their definition."""
    return (w8a8_linear_cuda if x.is_cuda else w8a8_linear)(x, tiles, scales, bias)


# ---- is it right? ----


def check(report: Report) -> None:
    """Bits of the definition, and the definition against float64 on the numbers that codes and scales stand for."""
    for m, n, k in CHECKS if report.on_gpu else CHECKS[:11]:
        for dtype, bias in ((BF16, True), (FP16, False)):
            check_linear(report, m, n, k, dtype, bias)


def check_linear(report: Report, m: int, n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
    case = {"n": n, "k": k, "m": m, "bias": bias, "dtype": str(dtype).removeprefix("torch.")}
    x = (torch.randn(m, k) * torch.rand(m, 1)).to(dtype)
    x[m // 2] *= m == 1  # a token of zeros, where it is not the only one
    codes, scales = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n) / 100
    shift = torch.randn(n).to(dtype) if bias else None
    tiles = tile_codes(codes)
    # On the CPU: torch on a GPU divides by a number as it multiplies with its reciprocal, an ulp away.
    expected = w8a8_linear(x, tiles, scales, shift)
    if not report.on_gpu:
        rounded, steps = (part.double() for part in token_codes(x))
        exact = rounded * steps @ (codes.double() * scales.double()[:, None]).T + (0 if shift is None else shift)
        report.checked("w8a8 definition", relative_error(expected, exact), TOLERANCE[dtype], **case)
        return
    x, tiles, scales = x.cuda(), tiles.cuda(), scales.cuda()
    shift = None if shift is None else shift.cuda()
    y = ours(x, tiles, scales, shift)
    report.checked("w8a8 bits", differing(y.cpu(), expected), 0, **case)
    report.checked("w8a8 again", differing(ours(x, tiles, scales, shift), y), 0, **case)
    report.checked("w8a8 replayed", differing(replayed(lambda: ours(x, tiles, scales, shift)), y), 0, **case)
    buffer, out = poisoned((m, n), dtype, x.device)
    product_cuda(*quantize_tokens_cuda(x), tiles, scales, shift, out)
    report.checked("w8a8 poisoned", differing(out, y), 0, **case)
    report.checked("w8a8 guards", int(not guards_hold(buffer, out)), 0, **case)


# ---- how fast is it? ----


def time(report: Report) -> None:
    """The layer and its two parts beside torch, in one run on the same device; weights rotate."""
    bandwidth = copy_bandwidth(report)
    report.timed("copy", 1 / bandwidth, bytes_per_s=bandwidth)
    for n, k in SHAPES if report.on_gpu else ((64, 256),):
        size = (k // 128, n, 128)
        copies = range(rotations(n * k, report))
        tiles = [torch.randint(-128, 128, size, dtype=torch.int8, device=report.device) for _ in copies]
        scales = torch.rand(n, device=report.device) / 100
        dense = [torch.randn(n, k, dtype=BF16, device=report.device) for _ in range(rotations(2 * n * k, report))]
        for m in TOKENS if report.on_gpu else (1, 32):
            x = torch.randn(m, k, dtype=BF16, device=report.device)
            for name, calls in contenders(report, x, tiles, scales, dense).items():
                took = seconds(calls, report)
                rates = {"of_copy": n * k / took / bandwidth, "tops": 2 * m * n * k / took / 1e12}
                report.timed(name, took, n=n, k=k, m=m, **rates)


def contenders(report: Report, x: Tensor, tiles: list[Tensor], scales: Tensor, dense: list[Tensor]) -> dict:
    """Calls over rotating weights, by name."""
    (m, k), n = x.shape, scales.shape[0]
    calls: dict[str, list[Call]] = {
        "torch bf16": [lambda w=w: dense_linear(x, w) for w in dense],
        "ours w8a8": [lambda w=w: ours(x, w, scales) for w in tiles],
    }
    if not report.on_gpu:
        return calls
    codes, steps = quantize_tokens_cuda(x)
    out = x.new_empty(m, n)
    calls["ours w8a8, product alone"] = [lambda w=w: product_cuda(codes, steps, w, scales, None, out) for w in tiles]
    calls["ours w8a8, quantizing alone"] = [lambda: quantize_tokens_cuda(x)]
    if m >= INT_MM_TOKENS:
        rows = token_codes(x)[0].to(torch.int8)
        untiled = [part.view(n, k) for part in tiles]  # any codes serve for a time
        calls["torch._int_mm and epilogue"] = [
            lambda w=w: (torch._int_mm(rows, w.T) * scales * steps[:, None]).to(BF16) for w in untiled
        ]
    return calls


if __name__ == "__main__":
    sys.exit(run(check, time))
