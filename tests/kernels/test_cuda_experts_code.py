"""What the compilers make of the kernels of four-bit experts: registers, local memory, instructions."""

from dataclasses import replace

import pytest

from compressor.kernels.cuda import build
from compressor.kernels.cuda.experts import Experts, decode_plan, grouped_plan, route_plan, sum_plan
from tests.kernels.nvcc import ARCHS, needs_nvcc, nvcc_report
from tests.kernels.test_cuda_experts import FP16, H100, QWEN

slow = pytest.mark.slow
FP16_GELU = replace(QWEN, dtype=FP16, activation="gelu_tanh", wide=False, float_weights=True)
BUDGETS = [
    pytest.param(replace(shape, group_size=group), gated, arch, marks=() if quick else slow)
    for shape in (QWEN, FP16_GELU)
    for group in (128, 32, 64, None)
    for gated in (True, False)
    for arch in ARCHS
    if (quick := (shape, group, gated, arch) == (QWEN, 128, True, "sm_90a")) or arch == "sm_90a" or group in (128, 32)
]


def name(value) -> str:
    return f"{value.hidden}-{value.group_size}-{value.dtype}" if isinstance(value, Experts) else str(value)


@needs_nvcc
@pytest.mark.parametrize(("shape", "gated", "arch"), BUDGETS, ids=name)
def test_the_decode_kernel_keeps_its_budget(shape, gated, arch):
    """Nothing in local memory; weights by 16 bytes, x by cp.async, four MMAs a slice."""
    kernel = decode_plan(shape, gated, 8, H100).kernel
    report, at = nvcc_report(kernel, arch), dict(kernel.constants)
    assert report.registers <= 128
    assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0)
    assert report.count(r"HMMA\.16816\.F32") == 4 * at["DEPTH"]
    assert report.count(r"LDG\.E\.\S*128") >= at["DEPTH"]
    assert report.count(r"LDGSTS\.E\.\S*128") >= 1
    assert report.count(r"(LDL|STL)") == 0


@needs_nvcc
@pytest.mark.parametrize("block", [pytest.param(8, marks=slow), 16, *(pytest.param(b, marks=slow) for b in (32, 64))])
@pytest.mark.parametrize(("shape", "gated", "arch"), BUDGETS, ids=name)
def test_the_grouped_kernel_keeps_its_budget(shape, gated, block, arch):
    """Registers for the blocks that the plan counts on; nothing in local memory; a weight becomes a number once."""
    kernel = grouped_plan(shape, gated, 10, block, H100).kernel
    report, at = nvcc_report(kernel, arch), dict(kernel.constants)
    assert report.registers * 32 * at["WARPS"] * at["RESIDENT"] <= 65536
    assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0)
    tiles = 4 * at["DEPTH"] * at["ROW_TILES"]
    assert report.count(r"HMMA\.16816\.F32") == tiles * block // 8
    assert report.count(r"LDG\.E\.\S*128") >= at["DEPTH"] * at["ROW_TILES"]
    assert report.count(r"LDGSTS\.E\.\S*128") >= 1


@needs_nvcc
@pytest.mark.parametrize("arch", [pytest.param(arch, marks=() if arch == "sm_90a" else slow) for arch in ARCHS])
def test_routing_and_summing_keep_their_budgets(arch):
    """The one block of 1024 threads fits; parts are read by 16 bytes, eight at once."""
    route, total = nvcc_report(route_plan(QWEN, 16).kernel, arch), nvcc_report(sum_plan(QWEN, 1, 8).kernel, arch)
    for report in (route, total):
        assert report.registers <= 64
        assert (report.stack, report.spill_stores) == (0, 0)
    assert total.count(r"LDG\.E\.\S*128") == 8


PLANS = [decode_plan(QWEN, True, 1, H100), grouped_plan(QWEN, False, 10, 32, H100)]
PLANS += [route_plan(QWEN, 16), sum_plan(QWEN, 4, 1)]


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=() if arch == "sm_90a" else slow) for arch in ARCHS])
@pytest.mark.parametrize(
    "plan", [PLANS[0], *(pytest.param(p, marks=slow) for p in PLANS[1:])], ids=lambda p: p.kernel.name
)
def test_nvrtc_compiles_the_kernels(plan, arch):
    """The way that they are compiled at the user's."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    assert build.nvrtc_compile(plan.kernel, arch).startswith(b"\x7fELF")
