"""Does every kernel compile here, for the shapes that are timed, and in how long?

`python -m benchmarks.gpu.build --out FILE.json`. What compiles stays in the cache, for the benchmarks that follow;
with `--cpu` the same for a made-up H100.
"""

import os
import sys
import time as clock
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from benchmarks.gpu import attention, experts, gemm, linear, w8a8
from benchmarks.gpu.harness import Report, run
from compressor.kernels.cuda import attention as attention_kernels
from compressor.kernels.cuda import experts as expert_kernels
from compressor.kernels.cuda import gemm as gemm_kernels
from compressor.kernels.cuda import linear as linear_kernels
from compressor.kernels.cuda import w8a8 as w8a8_kernels
from compressor.kernels.cuda.build import Kernel, compile_kernel
from compressor.kernels.cuda.launch import Device, device_of

BF16 = torch.bfloat16
H100 = Device(index=0, arch="sm_90a", sm_count=132, shared_per_block=232448, l2_bytes=50 << 20)


def check(report: Report) -> None:
    """All of them, side by side; one row for each header."""
    device = device_of(torch.empty(1, device=report.device)) if report.on_gpu else H100
    kernels = list(dict.fromkeys(all_kernels(device, small=not report.on_gpu)))
    begin = clock.perf_counter()
    # Processes, since NVRTC keeps Python's lock; new ones, since CUDA does not survive a fork
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        errors = list(pool.map(partial(compiled, arch=device.arch), kernels, chunksize=4))
    for name in sorted({kernel.name for kernel in kernels}):
        failed = [error for kernel, error in zip(kernels, errors, strict=True) if error and kernel.name == name]
        print(*failed[:1], sep="\n", end="")
        count = sum(kernel.name == name for kernel in kernels)
        report.checked(f"compiles: {name}", len(failed), 0, kernels=count, arch=device.arch)
    report.timed("compile all", clock.perf_counter() - begin, kernels=len(kernels))


def compiled(kernel: Kernel, arch: str) -> str | None:
    """None, or NVRTC's log."""
    try:
        compile_kernel(kernel, arch)
    except Exception as error:  # whatever NVRTC raises: the others are compiled all the same
        return f"{kernel}: {error}\n"
    return None


def all_kernels(device: Device, *, small: bool) -> Iterator[Kernel]:
    """What the timings launch; one shape of each for a rehearsal."""
    few = 1 if small else None
    for n, k in linear.SHAPES[:few]:
        weight = linear_kernels.Weight(n, k, linear.GROUP, False, BF16)
        yield linear_kernels.dequantize_plan(weight, n, device).kernel
        yield from (linear_kernels.pack_plan(name, n, k, device).kernel for name in ("pack", "unpack"))
        yield from (linear_kernels.gemv_plan(weight, m, device).kernel for m in (1, 2, 4, 8))
    yield linear_kernels.sum_plan(BF16, 4, 1).kernel
    for n, k in gemm.SHAPES[:few]:
        weight = linear_kernels.Weight(n, k, gemm.GROUP, False, BF16)
        tokens = [m for m in gemm.TOKENS if m > 8 and gemm_kernels.takes(m, device)]
        yield from (gemm_kernels.gemm_plan(weight, m, device).kernel for m in tokens)
    for n, k in w8a8.SHAPES[:few]:
        for m in w8a8.TOKENS:
            yield w8a8_kernels.quantize_plan(m, k, BF16).kernel
            yield w8a8_kernels.linear_plan(m, n, k, BF16, False, device).kernel
    for _, num_experts, slots, hidden, width in (experts.QWEN, experts.MIXTRAL)[:few]:
        shape = expert_kernels.Experts(num_experts, hidden, width, slots, experts.GROUP, "silu", BF16, True, False)
        for gated in (True, False):
            yield from (expert_kernels.decode_plan(shape, gated, m, device).kernel for m in (1, 4))
            blocks = (8, 16, 32, 64)
            yield from (expert_kernels.grouped_plan(shape, gated, 100, block, device).kernel for block in blocks)
        yield from (expert_kernels.route_plan(shape, block).kernel for block in (8, 16, 32, 64))
        yield expert_kernels.sum_plan(shape, 1, 1).kernel
    for B, Q, H, D, context in attention.SHAPES[:few]:
        for bits in (8, 4):
            arguments = (context // 32, attention.RING, bits, BF16, device)
            plan = attention_kernels.attention_plan((B, Q, D), H, *arguments)
            yield from (plan.attention, plan.combine)
            yield attention_kernels.write_kernel("kv_write", D, bits, BF16)[0]
            yield attention_kernels.write_kernel("kv_append", D, bits, BF16, attention.RING)[0]


def time(report: Report) -> None:
    """Nothing beyond how long it took to compile."""


if __name__ == "__main__":
    sys.exit(run(check, time))
