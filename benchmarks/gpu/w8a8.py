"""W8A8 on a GPU: are the kernels right to the bit, and how fast are they beside bf16 and `torch._int_mm`?

`python benchmarks/gpu/w8a8.py` prints one JSON line a row; it ends within a minute on an H100. M tokens, N x K weight.
`--cpu` rehearses the definition alone, where there is no GPU.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.kernels.cuda.w8a8 import product_cuda, quantize_tokens_cuda, tile_codes, w8a8_linear, w8a8_linear_cuda
from compressor.kernels.ops import token_codes

Report = Callable[[dict], None]
CHECKS = (  # M, N, K: each kernel and tile, with ends inside tiles
    *((m, 1032, 1040) for m in (1, 7, 8, 9, 17, 31, 32, 33, 64, 65, 200)),
    *((m, 8192, 4096) for m in (3, 16, 129, 512, 1500)),
    (2100, 4104, 2064),
)
TIMED = ((4096, 4096), (8192, 8192), (28672, 4096))
TOKENS = (1, 8, 16, 32, 64, 256, 512, 2048, 8192)
ROTATE_BYTES = 256_000_000  # more than any L2
BARS = {"bf16": 2.5e-3, "fp16": 5e-4}  # kernels.md 6.2: only the output is rounded


def check(report: Report) -> None:
    """Bits of the definition, guard bands, the same bits again, and in a replayed graph."""
    for m, n, k in CHECKS:
        for dtype, bias in ((torch.bfloat16, True), (torch.float16, False)):
            report({"check": "w8a8", "m": m, "n": n, "k": k, "dtype": str(dtype), **_checked(m, n, k, dtype, bias)})


def _checked(m: int, n: int, k: int, dtype: torch.dtype, bias: bool) -> dict:
    x = torch.randn(m, k, device="cuda").to(dtype) * torch.rand(m, 1, device="cuda").to(dtype)
    x[m // 2] = 0
    tiles = tile_codes(torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda"))
    scales = torch.rand(n, device="cuda") / 100
    shift = torch.randn(n, device="cuda").to(dtype) if bias else None
    # On the CPU: torch on a GPU divides by a number as it multiplies with its reciprocal, an ulp away.
    expected = w8a8_linear(x.cpu(), tiles.cpu(), scales.cpu(), None if shift is None else shift.cpu())
    guarded = torch.full((m + 2, n), float("nan"), dtype=dtype, device="cuda")
    product_cuda(*quantize_tokens_cuda(x), tiles, scales, shift, guarded[1 : m + 1])
    out = w8a8_linear_cuda(x, tiles, scales, shift)
    graph, replayed = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        replayed = w8a8_linear_cuda(x, tiles, scales, shift)
    replayed.fill_(float("nan"))
    graph.replay()
    difference = (out.cpu().double() - expected.double()).norm() / expected.double().norm()
    return {
        "bits_equal": torch.equal(out.cpu(), expected),
        "error": float(difference),
        "guards_whole": bool(guarded[0].isnan().all() and guarded[m + 1].isnan().all()),
        "same_again": torch.equal(guarded[1 : m + 1], out),
        "same_in_graph": torch.equal(replayed, out),
    }


def time(report: Report) -> None:
    """Microseconds of the layer and its two parts beside torch, by graph replay over rotated weights."""
    for n, k in TIMED:
        copies = max(2, ROTATE_BYTES // (n * k))
        tiles = [torch.randint(-128, 128, (k // 128, n, 128), dtype=torch.int8, device="cuda") for _ in range(copies)]
        dense = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(max(2, copies // 2))]
        scales = torch.rand(n, device="cuda") / 100
        for m in TOKENS:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            report({"time": "w8a8", "m": m, "n": n, "k": k, **_timed(x, tiles, dense, scales)})


def _timed(x: Tensor, tiles: list[Tensor], dense: list[Tensor], scales: Tensor) -> dict:
    (m, k), n = x.shape, scales.shape[0]
    codes, row_scales = quantize_tokens_cuda(x)
    out = x.new_empty(m, n)
    rows = token_codes(x)[0].to(torch.int8)
    untiled = [part.view(n, k) for part in tiles]  # any codes serve for a time
    us = {
        "ours": graph_us(lambda i: w8a8_linear_cuda(x, tiles[i % len(tiles)], scales)),
        "product": graph_us(lambda i: product_cuda(codes, row_scales, tiles[i % len(tiles)], scales, None, out)),
        "quantize": graph_us(lambda i: quantize_tokens_cuda(x)),
        "bf16": graph_us(lambda i: F.linear(x, dense[i % len(dense)])),
    }
    if m > 16:  # torch._int_mm takes no fewer

        def int_mm(i: int) -> Tensor:
            sums = torch._int_mm(rows, untiled[i % len(untiled)].T)
            return (sums * scales * row_scales[:, None]).to(x.dtype)

        us["int_mm_and_epilogue"] = graph_us(int_mm)
    return {
        "us": {name: round(value, 2) for name, value in us.items()},
        "bf16_ratio": round(us["bf16"] / us["ours"], 3),
        "product_tops": round(2e-6 * m * n * k / us["product"], 1),
        "product_gb_per_s": round((n * k + m * k + 2 * m * n) / us["product"] / 1000, 1),
        "quantize_gb_per_s": round(3 * m * k / us["quantize"] / 1000, 1),
    }


def graph_us(launch: Callable[[int], object], launches: int = 12, repeats: int = 20) -> float:
    """Median microseconds of one of `launches` launches in a replayed graph."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end) / launches)
    return statistics.median(times)


def rehearse(report: Report) -> None:
    """The definition against float64 on the dequantized operands, on the CPU."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        x, codes = torch.randn(9, 272).to(dtype), torch.randint(-128, 128, (24, 272), dtype=torch.int8)
        scales = torch.rand(24) / 100
        rounded, row_scales = (part.double() for part in token_codes(x))
        exact = rounded * row_scales @ (codes.double() * scales[:, None].double()).T
        error = float((w8a8_linear(x, tile_codes(codes), scales, None).double() - exact).norm() / exact.norm())
        report({"check": "definition", "dtype": name, "error": error, "within": error <= BARS[name]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="only what needs no GPU")
    rows: list[dict] = []

    def report(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    if parser.parse_args().cpu:
        rehearse(report)
    else:
        check(report)
        time(report)
    return int(any(value is False for row in rows for value in row.values()))


if __name__ == "__main__":
    sys.exit(main())
