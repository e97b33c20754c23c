"""W8A8 without a GPU: the kernels' own source runs on the host, and the compilers say what becomes of it."""

import ctypes

import pytest
import torch

from compressor.kernels.cuda import w8a8
from compressor.kernels.cuda.build import Kernel, nvrtc_compile
from compressor.kernels.cuda.launch import Device
from compressor.kernels.cuda.w8a8 import Tile, linear_plan, quantize_plan, tile_codes, untile_codes, w8a8_linear
from compressor.kernels.ops import token_codes
from tests.kernels.host.simt import library, needs_gxx, run_on_host
from tests.kernels.nvcc import ARCHS, needs_nvcc, nvcc_report

H100 = Device(0, "sm_90a", 132, 232448, 50 << 20)
A100 = Device(0, "sm_80", 108, 166912, 40 << 20)
B200 = Device(0, "sm_100", 148, 232448, 126 << 20)
RTX5090 = Device(0, "sm_120", 170, 101376, 96 << 20)
DEVICES = {device.arch: device for device in (A100, H100, B200, RTX5090)}
GEMMS = ((1, 4096), (16, 8192), (32, 1024), (64, 4096), (300, 4096), (512, 4096), (8192, 8192))  # M, N


def plan_for(m, n, k, device, *, dtype=torch.bfloat16, bias=True):
    return linear_plan.__wrapped__(m, n, k, dtype, bias, device)  # past the cache: tests change the tiles


# ---- The layout ----


def test_codes_come_back_out_of_the_layout():
    """Also where the last block of 128 is padded."""
    codes = torch.randint(-128, 128, (24, 208), dtype=torch.int8)
    assert torch.equal(untile_codes(tile_codes(codes), 208), codes)


def test_the_layout_pads_with_zeros():
    """Products with whatever stands beside them are then nothing."""
    assert tile_codes(torch.ones(8, 144, dtype=torch.int8)).sum() == 8 * 144


def test_codes_that_do_not_fit_the_layout_are_refused():
    with pytest.raises(ValueError, match="eights"):
        tile_codes(torch.zeros(12, 128, dtype=torch.int8))


@needs_gxx
def test_every_chunk_lies_where_the_kernels_look_for_it():
    """`code_chunk` of the headers against the layout in torch, for all chunks of 3 blocks x 40 rows."""
    source = (
        '#include "w8a8.cuh"\nextern "C" long long chunk(int b, int r, int c, int n) { return code_chunk(b, r, c, n); }'
    )
    chunk = library(source, (("BF16", 1),)).chunk
    numbers = torch.arange(40 * 24).view(40, 24)  # one number a chunk of 16 codes: row, then chunk
    low, high = ((part.repeat_interleave(16, 1).to(torch.int8)) for part in (numbers % 64, numbers // 64))
    low, high = (tile_codes(part).reshape(-1, 16)[:, 0].long() for part in (low, high))
    found = [
        [int(low[i] + 64 * high[i]) for b in range(3) for c in range(8) for i in [chunk(b, r, c, 40)]]
        for r in range(40)
    ]
    assert found == numbers.tolist()


_PLACE = """#include "w8a8.cuh"
extern "C" int place(int index, int tiles_m, int tiles_n) {
    const TilePlace place = tile_place(index, tiles_m, tiles_n);
    return place.m * tiles_n + place.n;
}
"""


@needs_gxx
@pytest.mark.parametrize(("tiles_m", "tiles_n"), [(1, 1), (8, 3), (13, 5), (3, 40)])
def test_every_tile_is_computed_once(tiles_m, tiles_n):
    place = library(_PLACE, (("BF16", 1),)).place
    assert sorted(place(i, tiles_m, tiles_n) for i in range(tiles_m * tiles_n)) == list(range(tiles_m * tiles_n))


# ---- Quantization ----

_CODES = """#include "quantize_tokens.cuh"
#include <math.h>
// Pairs of a largest number and a number up to it whose code is not that of a true division.
extern "C" long long wrong(int first, int last, long long* tried) {
    long long wrong = 0;
    for (int highest = first; highest < last; highest++) {
        const float scale = scale_of(highest);
        const Divisor by = make_divisor(scale);
        for (int bits = highest; bits >= 0 && bits > highest - (BF16 ? 9 << 7 : 9 << 10); bits--)
            for (int sign = 0; sign < 2; sign++, ++*tried) {
                const float x = to_float(bits | sign << 15);
                const int exact = (int)rintf(fminf(fmaxf(x / scale, -128.0f), 127.0f));
                wrong += (signed char)code_of(x, by) != exact;
            }
    }
    return wrong;
}
"""


@needs_gxx
@pytest.mark.parametrize(
    ("bf16", "binades"),
    [(1, (0, 1, 2, 9, 66, 67, 127, 254)), (0, (0, 1, 15))],  # subnormal, smallest, around the boost, 1, largest
)
def test_codes_are_those_of_a_true_division(bf16, binades):
    """All largest numbers of a binade with all numbers down to 1/256 of it: quotients of others round to 0."""
    bits = 7 if bf16 else 10
    wrong = library(_CODES, (("BF16", bf16), ("COLUMNS", 128), ("THREADS", 32))).wrong
    wrong.restype, tried = ctypes.c_longlong, ctypes.c_longlong()
    assert sum(wrong(binade << bits, (binade + 1) << bits, ctypes.byref(tried)) for binade in binades) == 0
    assert tried.value > len(binades) << 2 * bits


@needs_gxx
def test_the_quantize_kernel_gives_the_definitions_bits():
    """Rows of zeros, of ties, of tiny and of huge numbers among them; codes past K are zero."""
    x = torch.randn(11, 528).to(torch.bfloat16)
    x[2] = 0
    x[3] = torch.arange(528) % 256 - 127.5
    x[4] *= 1e-38
    x[5] *= 1e30
    codes, scales = quantized_on_host(x)
    expected, expected_scales = token_codes(x)
    assert torch.equal(untile_codes(codes, 640)[:11, :528], expected.to(torch.int8))
    assert torch.equal(scales, expected_scales[:, 0])
    assert untile_codes(codes, 640)[:11, 528:].count_nonzero() == 0


@needs_gxx
def test_a_nan_makes_its_whole_row_nan_and_no_other():
    x = torch.randn(11, 528).to(torch.bfloat16)
    x[7, 100] = float("nan")
    _, scales = quantized_on_host(x)
    assert scales.isnan().tolist() == [row == 7 for row in range(11)]


def quantized_on_host(x):
    m, k = x.shape
    codes = torch.full((-(-k // 128), -(-m // 8) * 8, 128), 77, dtype=torch.int8)
    scales = torch.full((m,), float("nan"))
    plan = quantize_plan(m, k, x.dtype)
    run_on_host(plan.kernel, plan.grid, plan.block, (x, codes, scales, m), shared=plan.shared)
    return codes, scales


# ---- The products ----


@needs_gxx
@pytest.mark.parametrize(
    ("device", "tile", "m", "bias"),
    [
        pytest.param(A100, None, 13, True, id="stream"),
        pytest.param(A100, Tile(64, 64, 3, 2, 1.0, (2, 2)), 70, True, id="mma"),
        pytest.param(H100, Tile(64, 64, 3, 2, 1.0), 70, True, id="wgmma-cluster"),
        pytest.param(A100, None, 32, False, id="stream-32", marks=pytest.mark.slow),
        pytest.param(A100, w8a8.MMA_TILES[0], 150, True, id="mma-large", marks=pytest.mark.slow),
        pytest.param(A100, w8a8.MMA_TILES[1], 150, False, id="mma-medium", marks=pytest.mark.slow),
        pytest.param(H100, w8a8.WGMMA_TILES[0], 140, True, id="wgmma-large", marks=pytest.mark.slow),
        pytest.param(H100, w8a8.WGMMA_TILES[1], 420, False, id="wgmma-medium", marks=pytest.mark.slow),
        pytest.param(H100, w8a8.WGMMA_TILES[2], 50, False, id="wgmma-small", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_give_the_definitions_bits(device, tile, m, bias, monkeypatch):
    """On the host, from their source, with ends of M, N and K inside a tile; nothing is written beside the outputs."""
    n, k = (264, 528) if tile and tile.columns > 64 else (72, 528)
    if tile:
        monkeypatch.setattr(w8a8, "WGMMA_TILES" if device is H100 else "MMA_TILES", (tile,))
    x = torch.randn(m, k).to(torch.bfloat16)
    tiles, scales = tile_codes(torch.randint(-128, 128, (n, k), dtype=torch.int8)), torch.rand(n) / 100
    shift = torch.randn(n).to(torch.bfloat16) if bias else None
    codes, row_scales = token_codes(x)
    padded = torch.nn.functional.pad(codes.to(torch.int8), (0, 0, 0, -m % 8), value=99)
    guarded = torch.full((m + 2, n), float("nan"), dtype=torch.bfloat16)
    plan = plan_for(m, n, 640, device, bias=bias)
    args = (tile_codes(padded), row_scales, tiles, scales, 0 if shift is None else shift, guarded[1:], m)
    run_on_host(plan.kernel, plan.grid, plan.block, args, shared=plan.shared, cluster=plan.cluster)
    assert torch.equal(guarded[1 : m + 1], w8a8_linear(x, tiles, scales, shift))
    assert guarded[0].isnan().all()
    assert guarded[m + 1].isnan().all()


@needs_gxx
def test_a_layer_is_two_launches_that_give_the_definitions_bits(monkeypatch):
    """The call itself, launching on the host; tokens in two dimensions, at an address that is not aligned."""
    launched = []

    def on_host(plan, device, args, *, programmatic=False):
        launched.append((plan.kernel.name, programmatic))
        run_on_host(plan.kernel, plan.grid, plan.block, args, shared=plan.shared, cluster=plan.cluster)

    monkeypatch.setattr(w8a8, "run", on_host)
    monkeypatch.setattr(w8a8, "device_of", lambda tensor: H100)
    x = torch.randn(1 + 13 * 528).to(torch.bfloat16)[1:].view(13, 1, 528)
    tiles, scales = tile_codes(torch.randint(-128, 128, (72, 528), dtype=torch.int8)), torch.rand(72) / 100
    bias = torch.randn(72).to(torch.bfloat16)
    out = w8a8.w8a8_linear_cuda(x, tiles, scales, bias)
    assert torch.equal(out, w8a8_linear(x, tiles, scales, bias))
    assert launched == [("quantize_tokens", False), ("w8a8_stream", True)]


def test_no_tokens_are_no_launch():
    """An expert that nobody chose, say."""
    out = w8a8.w8a8_linear_cuda(
        torch.empty(0, 528, dtype=torch.float16), torch.zeros(5, 72, 128, dtype=torch.int8), torch.ones(72)
    )
    assert out.shape == (0, 72)


def test_the_definition_is_the_product_of_rounded_tokens_and_weights():
    """Against float64 arithmetic on the dequantized operands: only the output is rounded (kernels.md, 6.2)."""
    x, codes = torch.randn(5, 160).to(torch.bfloat16), torch.randint(-128, 128, (16, 160), dtype=torch.int8)
    scales, bias = torch.rand(16) / 100, torch.randn(16).to(torch.bfloat16)
    rounded, row_scales = (part.double() for part in token_codes(x))
    exact = rounded * row_scales @ (codes.double() * scales[:, None].double()).T + bias.double()
    error = (w8a8_linear(x, tile_codes(codes), scales, bias).double() - exact).norm() / exact.norm()
    assert error < 2.5e-3


# ---- Plans ----


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("m", [1, 8, 32, 33, 64, 129, 500, 4096])
@pytest.mark.parametrize("n", [24, 1024, 28672])
def test_plans_cover_all_outputs_within_the_devices_limits(device, m, n):
    plan = plan_for(m, n, 4096, device)
    constants = dict(plan.kernel.constants)
    rows = constants.get("TOKENS") or constants.get("BM") or constants["WARP_M"] * constants["WARPS_M"]
    columns = constants.get("ROWS") or constants.get("BN") or constants["WARP_N"] * constants["WARPS_N"]
    assert plan.grid >= -(-m // rows) * -(-n // columns)
    assert plan.grid % plan.cluster == 0
    assert plan.shared <= device.shared_per_block
    assert plan.block <= 1024


@pytest.mark.parametrize(
    ("device", "m", "name"),
    [(H100, 32, "w8a8_stream"), (H100, 33, "w8a8_wgmma"), (A100, 33, "w8a8_mma"), (B200, 4096, "w8a8_mma")],
)
def test_few_tokens_stream_weights_and_many_go_to_the_tensor_cores_of_the_device(device, m, name):
    assert plan_for(m, 4096, 4096, device).kernel.name == name


def test_prefill_on_hopper_takes_the_largest_tile_in_clusters_of_two():
    """2048 tiles of 128 x 256; the shared memory is 4 stages of 48 KB and what goes with them."""
    plan = plan_for(8192, 8192, 8192, H100)
    assert (plan.grid, plan.block, plan.cluster) == (2048, 288, 2)
    assert plan.shared == 1024 + 4 * 49152 + 8 * 256 + 16 * 4


def test_a_weight_in_rows_is_refused_with_the_layout_that_is_wanted():
    x, rows = torch.zeros(2, 256, dtype=torch.bfloat16), torch.zeros(16, 2, 128, dtype=torch.int8)
    with pytest.raises(ValueError, match="tile_codes"):
        w8a8.w8a8_linear_cuda(x, rows, torch.ones(2))


# ---- Machine code ----


@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_the_kernels_of_decoding(arch):
    for plan in (quantize_plan(1, 4096, torch.float16), plan_for(1, 4096, 4096, DEVICES[arch], dtype=torch.float16)):
        assert nvrtc_compile(plan.kernel, arch)[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_all_tiles(arch):
    for kernel in {plan_for(m, n, 4096, DEVICES[arch]).kernel for m, n in GEMMS}:
        assert nvrtc_compile(kernel, arch)[:4] == b"\x7fELF"


def assert_lean(kernel: Kernel, arch: str, registers: int):
    report = nvcc_report(kernel, arch)
    assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0), (kernel, arch)
    assert report.registers <= registers, (kernel, arch)
    return report


@needs_nvcc
def test_prefill_on_hopper_multiplies_by_wgmma_fed_by_bulk_copies():
    """Registers for 288 threads; no fence of all memory inside the loop, which has 4 products a stage."""
    report = assert_lean(plan_for(8192, 8192, 8192, H100).kernel, "sm_90a", 224)
    assert report.count("IGMMA") % 4 == 0
    assert report.count("IGMMA") >= 4
    assert report.count("UBLKCP") >= 2
    loop = report.sass[report.sass.index("IGMMA") : report.sass.rindex("IGMMA")]
    assert "MEMBAR" not in loop


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("m", "n"), GEMMS)
def test_products_spill_nothing_and_use_the_tensor_cores(arch, m, n):
    kernel = plan_for(m, n, 4096, DEVICES[arch]).kernel
    report = assert_lean(kernel, arch, 128 if kernel.name == "w8a8_stream" else 255)
    wide = {
        "w8a8_stream": r"LDG\.E(\.NA)?\.128",
        "w8a8_mma": r"LDGSTS\.E(\.BYPASS)?\.(LTC\d+B\.)?128",
        "w8a8_wgmma": "UBLKCP",
    }
    assert report.count(wide[kernel.name]) > 0
    assert report.count("IGMMA" if kernel.name == "w8a8_wgmma" else r"IMMA\.16832") > 0


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("features", [4096, 14336, 65536])
def test_quantize_keeps_the_row_in_registers(arch, features):
    report = assert_lean(quantize_plan(1, features, torch.bfloat16).kernel, arch, 64)
    assert report.count(r"LDG\.E(\.NA)?\.128") > 0
