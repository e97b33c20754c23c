"""How fast can a product with int4 weights be on this GPU? Copy bandwidth, bf16 cuBLAS, and the ops that torch has.

`python benchmarks/gpu_ceilings.py --out FILE.json` prints a table and writes JSON. Times are medians of plain launches
on rotated operands, so that the L2 cache does not help; M tokens, N x K weight.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
TOKENS = (1, 4, 8, 16, 64, 256, 1024)
ROTATE_BYTES = 512_000_000  # more than any L2


def seconds(launch: Callable[[int], object], repeats: int = 30) -> float:
    """Median seconds of `launch(i)` by CUDA events, after a warm-up."""
    for i in range(5):
        launch(i)
    times = []
    for i in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch(i)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 2 GB."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda i: target.copy_(source), repeats=10)


def products(n: int, k: int, m: int) -> dict[str, float]:
    """Seconds of dense bf16 and of torch's int4 op (tinygemm, group 128) for one shape."""
    return {"bf16": _dense(n, k, m), "tinygemm_int4": _tinygemm(n, k, m)}


def _dense(n: int, k: int, m: int) -> float:
    copies = max(1, ROTATE_BYTES // (2 * n * k))
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    return seconds(lambda i: torch.nn.functional.linear(x, weights[i % copies]))


def _tinygemm(n: int, k: int, m: int) -> float:
    copies = max(1, ROTATE_BYTES // (n * k // 2))
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8).clone() for _ in range(copies)]
    scales = torch.ones(k // 128, n, 2, dtype=torch.bfloat16, device="cuda")
    return seconds(lambda i: torch.ops.aten._weight_int4pack_mm(x, packed[i % copies], 128, scales))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible to torch: nothing to measure", file=sys.stderr)
        return 3
    device = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    print(f"{device.name}, copy {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for n, k in SHAPES:
        for m in TOKENS:
            found = products(n, k, m)
            limit = (n * k * (4 + 16 / 128) / 8) / (bandwidth / 2)  # int4 weights read once
            rows.append({"n": n, "k": k, "m": m, "byte_limit_s": limit, **{f"{key}_s": v for key, v in found.items()}})
            print(f"{n:>6} x {k:<6} M={m:<5} bf16 {found['bf16'] * 1e6:8.1f} us   "
                  f"tinygemm {found['tinygemm_int4'] * 1e6:8.1f} us   byte limit {limit * 1e6:6.1f} us")  # fmt: skip
    document = {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_bytes_per_s": bandwidth,
        "rows": rows,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps({"device": device.name, "copy_tb_per_s": bandwidth / 1e12, "rows": len(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
