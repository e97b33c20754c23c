"""Four-bit products of more than eight tokens, without a GPU: kernels run on the host, plans, machine code."""

import math

import pytest
import torch

from compressor.kernels.cuda import build, gemm, linear
from compressor.kernels.cuda.gemm import GEMM_TILES, SKINNY_TILES, gemm_plan, gemm_tiles, plans, skinny_tiles, takes
from compressor.kernels.cuda.launch import Device
from compressor.kernels.cuda.linear import Weight
from compressor.kernels.layouts import pack_t16x64
from tests.kernels.host.simt import needs_gxx, run_on_host
from tests.kernels.nvcc import ARCHS, needs_nvcc, nvcc_report

BF16, FP16 = torch.bfloat16, torch.float16
H100 = Device(0, "sm_90a", 132, 232448, 50 << 20)
A100 = Device(0, "sm_80", 108, 166912, 40 << 20)
B200 = Device(0, "sm_100", 148, 232448, 126 << 20)
RTX5090 = Device(0, "sm_120", 170, 101376, 96 << 20)
DEVICES = {device.arch: device for device in (A100, H100, B200, RTX5090)}
# ||y - reference|| / ||reference||: only the output is rounded
TOLERANCE = {BF16: 3e-3, FP16: 5e-4}


# ---- the kernels, on the host ----


@pytest.fixture
def launched(monkeypatch):
    """Launches go to the host, onto outputs of NaN; their kernels' names are kept."""
    names = []

    def on_host(plan, device, args, *, programmatic=False):
        names.append(plan.kernel.name)
        args[4].fill_(torch.nan) if plan.kernel.name != "sum_splits" else None
        run_on_host(plan.kernel, plan.grid, plan.block, args, shared=plan.shared, cluster=plan.cluster)

    monkeypatch.setattr(gemm, "run", on_host)
    return names


def problem(rows, columns, group, zeros, dtype, tokens):
    """x, a packed weight, and their products in float64: exact, and with the weight rounded to the dtype."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    scales = (torch.rand(columns // group, rows, generator=generator) / 8 + 0.05).to(dtype)
    zero = torch.randint(-8, 8, scales.shape, generator=generator, dtype=torch.int8) if zeros else None
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    shifted = codes.double() - (0 if zero is None else zero.double().repeat_interleave(group, 0).T)
    weight = shifted * scales.double().repeat_interleave(group, 0).T
    operands = (x, pack_t16x64(codes), scales, zero, Weight(rows, columns, group, zeros, dtype))
    return operands, x.double() @ weight.T, x.double() @ weight.to(dtype).double().T


def result(monkeypatch, device, tile, splits, stages, operands):
    monkeypatch.setattr(gemm, "device_of", lambda tensor: device)
    plan = gemm.plan_of(tile, operands[-1], len(operands[0]), splits, stages, device)
    return gemm.launch_plan(plan, *operands)


def relative_error(y, reference) -> float:
    return float((y.double() - reference).norm() / reference.norm())


def tile(name, tokens, rows):
    """One of the tiles that plans choose from."""
    (found,) = [
        tile for tile in (*SKINNY_TILES, *GEMM_TILES) if (tile.name, tile.tokens, tile.rows) == (name, tokens, rows)
    ]
    return found


slow = pytest.mark.slow
SKINNY_CASES = [
    # tokens and rows of the tile, splits, stages; device; N, K, group, zeros; dtype; M
    pytest.param(16, 32, 1, 3, H100, (48, 576, 64, True), BF16, 9, id="four ways, a ragged end of K"),
    pytest.param(32, 64, 2, 2, A100, (80, 640, 128, False), FP16, 31, id="parts, a ragged end of N"),
    pytest.param(16, 64, 2, 2, H100, (80, 640, 32, True), FP16, 13, id="a cluster", marks=slow),
    pytest.param(32, 128, 4, 3, H100, (144, 576, 576, True), BF16, 17, id="a scale a row", marks=slow),
    pytest.param(64, 256, 2, 4, H100, (272, 256, 32, False), BF16, 63, id="the largest", marks=slow),
    pytest.param(64, 32, 1, 3, RTX5090, (16, 64, 64, True), FP16, 33, id="one slice", marks=slow),
]
GEMM_CASES = [
    pytest.param(64, 128, 1, 4, H100, (144, 640, 128, False), BF16, 70, id="two tiles each way, a ragged end of K"),
    pytest.param(64, 256, 2, 5, H100, (80, 640, 32, True), FP16, 65, id="a cluster", marks=slow),
    pytest.param(128, 128, 2, 4, H100, (80, 576, 576, True), BF16, 97, id="a scale a row", marks=slow),
    pytest.param(128, 256, 1, 8, H100, (272, 1088, 64, True), BF16, 129, id="the largest", marks=slow),
    pytest.param(64, 128, 1, 4, H100, (32, 64, 32, False), BF16, 3, id="one slice", marks=slow),
    pytest.param(64, 128, 4, 6, H100, (32, 192, 64, False), FP16, 64, id="a block without a slice", marks=slow),
]


@needs_gxx
@pytest.mark.parametrize(("tokens", "rows", "splits", "stages", "device", "shape", "dtype", "m"), SKINNY_CASES)
def test_up_to_64_tokens_equal_the_product_in_float64(
    launched, monkeypatch, tokens, rows, splits, stages, device, shape, dtype, m
):
    """Scales are applied to float32 sums: nothing but the output is rounded; nothing is left out or written twice."""
    operands, exact, _ = problem(*shape, dtype, m)
    y = result(monkeypatch, device, tile("w4a16_skinny", tokens, rows), splits, stages, operands)
    assert relative_error(y, exact) < TOLERANCE[dtype]
    parts = splits > 1 and not device.has_clusters
    assert launched == ["w4a16_skinny"] + ["sum_splits"] * parts


@needs_gxx
@pytest.mark.parametrize(("tokens", "rows", "splits", "stages", "device", "shape", "dtype", "m"), GEMM_CASES)
def test_more_tokens_equal_the_product_with_the_dequantized_weight(
    launched, monkeypatch, tokens, rows, splits, stages, device, shape, dtype, m
):
    """The weight as `int4_dequantize` rounds it: only the output is rounded on top, which stays within the limit."""
    operands, exact, rounded = problem(*shape, dtype, m)
    y = result(monkeypatch, device, tile("w4a16_gemm", tokens, rows), splits, stages, operands)
    assert launched == ["w4a16_gemm"]
    reference = exact if shape[2] == shape[1] else rounded
    assert relative_error(y, reference) < 0.65 * TOLERANCE[dtype]
    assert relative_error(y, exact) < TOLERANCE[dtype]


@needs_gxx
def test_the_linear_goes_here_between_the_gemv_and_dequantizing(launched, monkeypatch):
    """Through the op's own call: 20 tokens, at addresses that are not aligned."""
    (x, packed, scales, _, _), exact, _ = problem(32, 256, 64, False, BF16, 20)
    x = torch.cat([torch.zeros(1, dtype=BF16), x.flatten()])[1:].view(x.shape)
    scales = torch.cat([torch.zeros(1, dtype=BF16), scales.flatten()])[1:].view(scales.shape)
    for module in (gemm, linear):
        monkeypatch.setattr(module, "device_of", lambda tensor: H100)
    y = linear.int4_linear_cuda(x, packed, scales, None, 64)
    assert relative_error(y, exact) < TOLERANCE[BF16]
    assert launched == ["w4a16_skinny"]


# ---- plans ----


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("tokens", [9, 16, 17, 33, 64, 65, 128, 130, 512, 1024])
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (8192, 28672), (1024, 4096), (576, 1536), (16, 64)])
def test_plans_are_ones_that_the_device_can_run(device, tokens, shape):
    """The tile holds the tokens, stages fit into shared memory, clusters are whole, and no block is without a slice."""
    if not takes(tokens, device):
        assert tokens > 64
        assert device is not H100
        return
    plan = gemm_plan(Weight(*shape, 64, True, BF16), tokens, device)
    constants = dict(plan.kernel.constants)
    assert plan.kernel.name == ("w4a16_skinny" if tokens <= 64 else "w4a16_gemm")
    rows = 32 * constants["WARPS_N"] if tokens <= 64 else 128 * constants["HEIGHT"]
    assert tokens <= constants["TOKENS"] or tokens > 64
    tiles = math.ceil(shape[0] / rows) * math.ceil(tokens / constants["TOKENS"])
    assert plan.grid == tiles * plan.splits
    assert plan.shared <= device.shared_per_block
    assert plan.cluster == (plan.splits if device.has_clusters else 1)
    assert plan.splits <= shape[1] // 64


@pytest.mark.parametrize(("tokens", "tile_tokens", "blocks"), [(16, 16, 128), (64, 64, 128), (128, 128, 128)])
def test_an_8192_square_fills_an_h100_in_one_wave(tokens, tile_tokens, blocks):
    """128 of 132 multiprocessors, by tiles or by splits of K."""
    plan = gemm_plan(Weight(8192, 8192, 128, False, BF16), tokens, H100)
    assert (dict(plan.kernel.constants)["TOKENS"], plan.grid) == (tile_tokens, blocks)


def test_only_hopper_takes_more_than_64_tokens():
    """Elsewhere the weight is dequantized in chunks and multiplied by cuBLAS; so it is on Hopper from 1025 on."""
    assert [takes(65, device) for device in DEVICES.values()] == [False, True, False, False]
    assert [takes(tokens, H100) for tokens in (1024, 1025)] == [True, False]


# ---- machine code ----


def kernels(tokens, device, weight):
    """Of the widest and the narrowest tile for so many tokens, and of the widest with K split."""
    tiles = skinny_tiles(tokens) if tokens <= 64 else gemm_tiles(tokens)
    found = [plan.kernel for _, plan in plans([tiles[0], tiles[-1]], weight, tokens, device) if plan.splits <= 2]
    return found[:3]


WEIGHTS = [
    Weight(4096, 4096, 128, False, BF16),
    Weight(4096, 4096, 32, True, BF16),
    Weight(4096, 4096, 64, True, FP16),
    Weight(4096, 4096, 4096, False, FP16),
]


def assert_lean(kernel, arch):
    """Nothing in local memory; tensor cores fed from shared memory, that by copies of 16 bytes."""
    report = nvcc_report(kernel, arch)
    assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0), (kernel, arch)
    assert report.registers <= 248, (kernel, arch)  # of 255, so that another compiler does not spill either
    assert report.count(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128") >= 3
    assert report.count(r"(LDL|STL)") == 0
    return report


@needs_nvcc
def test_the_largest_skinny_tile_keeps_its_budget():
    """64 tokens, 32 rows a warp: 64 products a slice."""
    (kernel,) = kernels(64, H100, WEIGHTS[0])[:1]
    report = assert_lean(kernel, "sm_90a")
    assert report.count(r"HMMA\.16816\.F32\.BF16") == 64
    assert report.count(r"LDSM\.16\.M88\.4") == 16


@needs_nvcc
def test_the_largest_wgmma_tile_runs_its_products_on():
    """Two buffers of weights, 8 products each, one wait in between; in series, ptxas would wait after each product."""
    (kernel,) = kernels(128, H100, WEIGHTS[0])[:1]
    assert dict(kernel.constants)["HEIGHT"] == 2
    report = assert_lean(kernel, "sm_90a")
    assert report.count(r"HGMMA\.64x128x16\.F32\.BF16") == 16
    assert report.count(r"WARPGROUP\.ARRIVE") == 2
    assert report.count(r"WARPGROUP\.DEPBAR") == 3
    assert "MEMBAR.ALL.GPU" not in report.sass[report.sass.index("HGMMA") : report.sass.rindex("HGMMA")]


@slow
@needs_nvcc
@pytest.mark.parametrize("weight", WEIGHTS[1:3], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_skinny_tiles_keep_their_budget(tokens, arch, weight):
    for kernel in kernels(tokens, DEVICES[arch], weight):
        assert assert_lean(kernel, arch).count(r"HMMA\.16816\.F32") >= tokens


@slow
@needs_nvcc
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_wgmma_tiles_keep_their_budget(weight):
    for kernel in kernels(128, H100, weight):
        constants, report = dict(kernel.constants), assert_lean(kernel, "sm_90a")
        assert report.count("HGMMA") % (4 * constants["HEIGHT"]) == 0
        assert report.count("HGMMA") >= 8 * constants["HEIGHT"]
        assert report.count(r"WARPGROUP\.ARRIVE") == report.count("HGMMA") // (4 * constants["HEIGHT"])


@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_what_the_plans_choose(arch):
    """The way that it is compiled at the user's."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    for tokens in (16, 64, 128):
        if takes(tokens, DEVICES[arch]):
            kernel = gemm_plan(WEIGHTS[1], tokens, DEVICES[arch]).kernel
            assert build.nvrtc_compile(kernel, arch).startswith(b"\x7fELF")
