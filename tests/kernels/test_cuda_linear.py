"""Four-bit linears on a GPU, without one: plans, machine code, and the kernels run on the host from their source."""

import pytest
import torch

from compressor.kernels.cuda import build, linear
from compressor.kernels.cuda.launch import Device
from compressor.kernels.cuda.linear import Weight, gemv_plan
from compressor.kernels.layouts import pack_t16x64
from tests.kernels.host.simt import needs_gxx, run_on_host
from tests.kernels.nvcc import ARCHS, needs_nvcc, nvcc_report

BF16, FP16 = torch.bfloat16, torch.float16
H100 = Device(index=0, arch="sm_90a", sm_count=132, shared_per_block=232448, l2_bytes=50 << 20)
A100 = Device(index=0, arch="sm_80", sm_count=108, shared_per_block=166912, l2_bytes=40 << 20)
RTX5090 = Device(index=0, arch="sm_120", sm_count=170, shared_per_block=101376, l2_bytes=96 << 20)
SHAPES = [(4096, 4096), (28672, 4096), (4096, 14336), (8192, 28672), (1024, 4096), (1024, 14336), (576, 1536), (16, 64)]
# ||y - reference|| / ||reference||, reference in float64 on the same weights: only the output is rounded.
TOLERANCE = {BF16: 3e-3, FP16: 5e-4}


@pytest.mark.parametrize("device", [H100, A100, RTX5090], ids=lambda device: device.arch)
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_are_ones_that_the_device_can_run(device, shape, tokens):
    """Every slice of K belongs to a warp, x and the sums fit, and clusters are whole."""
    rows, columns = shape
    plan = gemv_plan(Weight(rows, columns, 64, False, BF16), tokens, device)
    constants = dict(plan.kernel.constants)
    warps, splits = constants["WARPS"], constants["SPLITS"]
    assert plan.block == 32 * warps <= 512
    assert tokens <= constants["TOKENS"] < 2 * tokens + 1
    assert plan.shared <= device.shared_per_block
    assert plan.grid % splits == 0
    assert plan.grid // splits <= rows // 16
    assert plan.cluster == (splits if device.has_clusters else 1)
    assert constants["CLUSTER"] == int(plan.cluster > 1)


def test_plans_of_large_layers_fill_the_chip():
    """On an H100: two blocks of eight warps on each multiprocessor, eight loads of 512 bytes under way in each warp."""
    plan = gemv_plan(Weight(28672, 4096, 128, False, BF16), 1, H100)
    constants = dict(plan.kernel.constants)
    assert (plan.grid, constants["WARPS"], constants["DEPTH"], constants["SPLITS"]) == (264, 8, 8, 1)


def test_k_is_split_where_x_does_not_leave_room():
    """Eight rows of 14,336 take all of the shared memory, so two blocks share them; a cluster only where there are."""
    weight = Weight(4096, 14336, 128, False, BF16)
    assert gemv_plan(weight, 8, H100).cluster == 2
    plan = gemv_plan(weight, 8, A100)
    assert (plan.cluster, plan.splits) == (1, 2)


def test_chunks_of_dequantized_rows_stay_in_l2():
    """Half of it, in whole tiles; a small weight in one."""
    assert linear.chunk_rows(Weight(28672, 4096, 128, False, BF16), H100) == 3072
    assert linear.chunk_rows(Weight(4096, 1024, 128, False, BF16), H100) == 4096


# ---- the kernels themselves, on the host ----


@pytest.fixture
def host(monkeypatch):
    """Launches go to the host; the device that plans see is the test's."""

    def use(device: Device) -> None:
        monkeypatch.setattr(linear, "device_of", lambda tensor: device)
        monkeypatch.setattr(linear, "launch", on_host)

    def on_host(kernel, device, grid, block, args, *, shared, cluster, programmatic):
        run_on_host(kernel, grid, block, args, shared=shared, cluster=cluster)

    return use


def problem(rows, columns, group, zeros, dtype, tokens, seed=0):
    """x, a packed weight, and their product in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    scales = (torch.rand(columns // group, rows, generator=generator) / 8 + 0.05).to(dtype)
    zero = torch.randint(-8, 8, scales.shape, generator=generator, dtype=torch.int8) if zeros else None
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    shifted = codes.double() - (0 if zero is None else zero.double().repeat_interleave(group, 0).T)
    reference = x.double() @ (shifted * scales.double().repeat_interleave(group, 0).T).T
    return x, pack_t16x64(codes), scales, zero, reference


def relative_error(y, reference) -> float:
    return float((y.double() - reference).norm() / reference.norm())


SMALL = Device(index=0, arch="sm_90a", sm_count=1, shared_per_block=232448, l2_bytes=1 << 20)
TIGHT = Device(index=0, arch="sm_90a", sm_count=8, shared_per_block=10240, l2_bytes=1 << 20)  # x needs two blocks
TIGHT_SM80 = Device(index=0, arch="sm_80", sm_count=8, shared_per_block=10240, l2_bytes=1 << 20)


@needs_gxx
@pytest.mark.parametrize(
    ("device", "shape", "group", "zeros", "dtype", "tokens", "splits"),
    [
        (SMALL, (32, 256), 64, False, BF16, 1, 1),
        (SMALL, (80, 1280), 128, True, BF16, 3, 1),  # several turns of a block, ragged warps
        (SMALL, (48, 4736), 64, False, BF16, 1, 1),  # several turns of the ring
        (SMALL, (48, 576), 576, True, FP16, 5, 2),
        (SMALL, (48, 512), 32, True, FP16, 8, 1),
        (TIGHT, (48, 640), 128, False, BF16, 7, 2),  # a cluster
        (TIGHT_SM80, (48, 640), 64, False, FP16, 6, 2),  # float32 parts and their sum
    ],
)
def test_up_to_eight_tokens_equal_the_product_in_float64(host, device, shape, group, zeros, dtype, tokens, splits):
    """Through the plan and the call that a GPU gets, from the kernel's own source."""
    host(device)
    x, packed, scales, zero, reference = problem(*shape, group, zeros, dtype, tokens)
    assert gemv_plan(Weight(*shape, group, zeros, dtype), tokens, device).splits == splits
    y = linear.int4_linear_cuda(x, packed, scales, zero, group)
    assert relative_error(y, reference) < TOLERANCE[dtype]
    assert torch.equal(linear.int4_linear_cuda(x, packed, scales, zero, group), y)


@needs_gxx
def test_many_tokens_go_through_dequantized_chunks(host):
    """Three chunks of rows, the last one shorter; x begins at an odd address."""
    host(Device(index=0, arch="sm_80", sm_count=1, shared_per_block=232448, l2_bytes=256 * 4 * 128))
    x, packed, scales, zero, reference = problem(528, 128, 32, True, BF16, 65)
    x = torch.cat([torch.zeros(1, dtype=BF16), x.flatten()])[1:].view(65, 128)
    y = linear.int4_linear_cuda(x, packed, scales, zero, 32)
    dense = linear.int4_dequantize_cuda(packed, scales, zero, 32)
    assert relative_error(y, x.double() @ dense.double().T) < TOLERANCE[BF16]
    assert relative_error(y, reference) < 2 * TOLERANCE[BF16]  # here the weights are rounded as well


@needs_gxx
def test_packing_and_unpacking_through_the_calls(host):
    """As the ops call them."""
    host(SMALL)
    codes = torch.randint(-8, 8, (32, 128), dtype=torch.int8)
    packed = linear.int4_pack_cuda(codes)
    assert torch.equal(packed, pack_t16x64(codes))
    assert torch.equal(linear.int4_unpack_cuda(packed), codes)


def test_tensors_that_do_not_fit_together_are_refused():
    """With their shapes and dtypes."""
    x, packed, scales, _, _ = problem(32, 128, 64, False, BF16, 2)
    with pytest.raises(ValueError, match=r"x is \[2, 64\] torch.bfloat16; this weight takes \[M, 128\]"):
        linear.int4_linear_cuda(x[:, :64], packed, scales, None, 64)
    with pytest.raises(ValueError, match=r"scales are \[2, 32\]; groups of 128 need \[1, 32\]"):
        linear.int4_linear_cuda(x, packed, scales, None, 128)
    with pytest.raises(ValueError, match=r"scales are torch.float32; possible are"):
        linear.int4_linear_cuda(x, packed, scales.float(), None, 64)


# ---- machine code ----

GEMV = [
    (gemv_plan(Weight(*shape, group, zeros, dtype), tokens, H100).kernel)
    for shape, group, zeros, dtype, tokens in [
        ((4096, 4096), 128, False, BF16, 1),
        ((4096, 4096), 32, True, BF16, 8),
        ((8192, 8192), 64, True, FP16, 8),  # sixteen warps
        ((4096, 14336), 14336, False, FP16, 8),  # a cluster
    ]
]


# All kernels for Hopper, one for all architectures; the others take minutes together.
QUICK = [(kernel, "sm_90a") for kernel in GEMV[:3]] + [(GEMV[0], arch) for arch in ARCHS if arch != "sm_90a"]
SLOW = [(kernel, arch) for kernel in GEMV[1:3] for arch in ARCHS if arch != "sm_90a"]


@needs_nvcc
@pytest.mark.parametrize(("kernel", "arch"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_gemv_keeps_its_budget(kernel, arch):
    """128 registers, so that 16 warps fit; nothing in local memory; tensor cores fed by 16-byte loads."""
    report = nvcc_report(kernel, arch)
    assert report.registers <= 128
    assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0)
    depth = dict(kernel.constants)["DEPTH"]
    assert report.count(r"HMMA\.16816\.F32") == 4 * depth
    assert report.count(r"LDG\.E\.\S*128") == 2 * depth  # the first turn of the ring, and the loop
    assert report.count(r"LDSM") == 2 * depth
    assert report.count(r"(LDL|STL)") == 0


@needs_nvcc
def test_the_cluster_gemv_keeps_its_budget():
    """Only where there are clusters: sums go through distributed shared memory."""
    report = nvcc_report(GEMV[3], "sm_90a")
    assert report.registers <= 128
    assert (report.stack, report.spill_stores) == (0, 0)
    assert report.count(r"UCGABAR_ARV") == 2  # when all have started, and when all have sent their sums


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_90a", *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHS if a != "sm_90a")])
@pytest.mark.parametrize(
    ("header", "name", "loads", "stores"),
    [("pack.cuh", "pack", 2, 1), ("pack.cuh", "unpack", 1, 2), ("dequantize.cuh", "dequantize_rows", 1, 4)],
)
def test_streaming_kernels_move_16_bytes_a_lane(header, name, loads, stores, arch):
    """In and out; 64 registers, so that all warps of a multiprocessor fit; nothing in local memory."""
    kernel = build.Kernel(header, name, Weight(4096, 4096, 128, True, BF16).constants)
    report = nvcc_report(kernel, arch)
    assert report.registers <= 64
    assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0)
    assert report.count(r"LDG\.E\.\S*128") == loads
    assert report.count(r"STG\.E\.\S*128") == stores


@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_every_kernel(arch):
    """The way that they are compiled at the user's."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    weight = Weight(4096, 4096, 128, True, FP16)
    device = Device(index=0, arch=arch, sm_count=132, shared_per_block=101376, l2_bytes=50 << 20)
    for plan in (
        gemv_plan(Weight(4096, 14336, 128, True, FP16), 8, device),
        linear.sum_plan(BF16, 4, 4096),
        linear.dequantize_plan(weight, 4096, device),
        linear.pack_plan("pack", 4096, 4096, device),
        linear.pack_plan("unpack", 4096, 4096, device),
    ):
        assert build.nvrtc_compile(plan.kernel, arch).startswith(b"\x7fELF")
