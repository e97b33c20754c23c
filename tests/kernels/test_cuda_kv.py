"""The CUDA kernels of the KV cache without a GPU: compiled for four generations, and run on the host."""

import ctypes
import importlib.util

import pytest
import torch

from compressor.kernels import kv_cache, ops_kv
from compressor.kernels.cuda.attention import THREADS, attention_plan, attention_shared, write_kernel
from compressor.kernels.cuda.build import nvrtc_compile
from compressor.kernels.cuda.launch import Device
from tests.kernels.host.simt import library, needs_gxx, run_on_host
from tests.kernels.nvcc import ARCHS, needs_nvcc, nvcc_report

H100 = Device(0, "sm_90a", 132, 232448, 50 << 20)
RTX = Device(0, "sm_120", 170, 101376, 96 << 20)
WIDTHS, BITS = (64, 128, 256), (8, 4)
ALL = [(arch, D, bits) for arch in ARCHS for D in WIDTHS for bits in BITS]
FEW = [("sm_80", 64, 8), ("sm_90a", 128, 4), ("sm_120", 256, 8)]
CASES = [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in ALL]
needs_nvrtc = pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-core is not installed")


def plan_of(D, bits, *, B=8, Q=64, H=8, num_blocks=1024, ring=96, dtype=torch.bfloat16, device=H100):
    return attention_plan((B, Q, D), H, num_blocks, ring, bits, dtype, device)


@needs_nvcc
@pytest.mark.parametrize(("arch", "D", "bits"), CASES)
def test_attention_compiles_within_its_budget(arch, D, bits):
    """No spill, no stack, registers for the blocks that the plan counts on, all loads 16 bytes, tensor cores."""
    report = nvcc_report(plan_of(D, bits).attention, arch)
    assert report.stack == report.spill_stores == report.spill_loads == 0
    assert report.registers <= (168 if D == 256 else 128)
    block_copies = 8 * D * bits // 16 // 32
    assert report.count(r"LDGSTS\.E\.\S*128") >= 2 * block_copies
    # Both products of 32 tokens with 8 heads; in 4 bits the minima of the keys too
    assert report.count(r"HMMA\.16816\.F32") >= 2 * (2 * D // 16) + (D // 16 if bits == 4 else 0)


@needs_nvcc
@pytest.mark.parametrize(("arch", "D", "bits"), CASES)
def test_writing_compiles_within_its_budget(arch, D, bits):
    """No spill and no stack; blocks are stored by 16 bytes."""
    for name, ring in (("kv_write", None), ("kv_append", 96)):
        report = nvcc_report(write_kernel(name, D, bits, torch.bfloat16, ring)[0], arch)
        assert report.stack == report.spill_stores == report.spill_loads == 0
        assert report.registers <= 64
        assert report.count(r"STG\.E\.128") >= 1


@needs_nvrtc
@pytest.mark.parametrize("arch", [ARCHS[1], *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHS if a != ARCHS[1])])
def test_nvrtc_compiles_all_kernels(arch):
    """The compiler that users have."""
    plan = plan_of(128, 4)
    kernels = [plan.attention, plan.combine, *(write_kernel(*args)[0] for args in WRITES)]
    assert all(nvrtc_compile(kernel, arch)[:4] == b"\x7fELF" for kernel in kernels)


WRITES = (("kv_write", 128, 4, torch.float16), ("kv_append", 128, 4, torch.float16, 96))

GLUE = """#include "kv_attention.cuh"
extern "C" void codes(unsigned low, unsigned high, unsigned* a) {
    const unsigned words[2] = {low, high};
    unsigned pairs[4];
    kv_codes(words, pairs);
    for (int i = 0; i < 4; i++) a[i] = pairs[i];
}
extern "C" int coded(int length) { return kv_coded(length, RING); }
extern "C" int place(int keys, int chunk, int lane, int code) {
    const KvPlace at = kv_place(keys, chunk, lane, code);
    return at.token * 1000 + at.channel;
}
extern "C" int channel(int number) { return kv_channel(number); }
extern "C" int token(int number) { return kv_token(number); }
extern "C" int share(int first, int held, int split, int splits) {
    const Share share = kv_share(first, held, split, splits);
    return share.begin * 10000 + share.end;
}
"""


def functions(bits, D=64) -> ctypes.CDLL:
    return library(GLUE, plan_of(D, bits).attention.constants)


@needs_gxx
@pytest.mark.parametrize("bits", BITS)
def test_every_code_becomes_its_number(bits):
    """All codes at all eight places of a lane's tile: signed in 8 bits, unsigned in 4, exact in float16."""
    found = (ctypes.c_uint32 * 4)()
    for place in range(8):
        for code in range(2**bits):
            others = 0x5A5A5A5A
            if bits == 4:
                shift = place // 2 * 4 + place % 2 * 16
                words = (others & ~(15 << shift) | code << shift, 0)
            else:
                shift = place % 4 * 8
                own = others & ~(255 << shift) | code << shift
                words = (own, others) if place < 4 else (others, own)
            functions(bits).codes(*words, found)
            half = torch.tensor(found[place // 2] >> 16 * (place % 2) & 0xFFFF, dtype=torch.int32).to(torch.int16)
            assert half.view(torch.float16).item() == (code - 128 if bits == 8 else code)


@needs_gxx
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", WIDTHS)
def test_places_are_those_of_the_layout(bits, D):
    """Every code and scale of a block, against kernels/kv_cache.py."""
    host, tags = functions(bits, D), torch.arange(32 * D) % 251  # codes that tell neighbours apart, by parts of bits
    per_lane = 128 // bits
    for keys in (True, False):
        for part in range(0, 8, bits):
            matrix = (tags >> part & 2**bits - 1).view(32, D)
            codes = kv_cache.to_fragments(matrix if keys else matrix.T, bits, keys)
            words = codes.view(torch.int32).view(-1, 32, 4).tolist()
            for chunk in range(len(words)):
                for lane in range(0, 32, 3):
                    for code in range(per_lane):
                        token, channel = divmod(host.place(keys, chunk, lane, code), 1000)
                        within = code % 8
                        if bits == 4:
                            found = words[chunk][lane][code // 8] >> (within // 2 * 4 + within % 2 * 16) & 15
                        else:
                            found = words[chunk][lane][code // 4] >> code % 4 * 8 & 255
                        assert found == matrix[token, channel]
    assert [host.channel(i) for i in range(D)] == kv_cache._key_order(torch.arange(D)).tolist()
    assert [host.token(i) for i in range(32)] == kv_cache._value_order(torch.arange(32)).tolist()


@needs_gxx
def test_lengths_and_shares_agree_with_the_host():
    """How many tokens are in blocks; and every block belongs to exactly one share."""
    host = functions(8)
    for length in range(1, 400):
        assert host.coded(length) == kv_cache.quantized_tokens(length, 96)
    for held in range(70):
        for splits in (1, 2, 5, 64):
            shares = [divmod(host.share(3, held, split, splits), 10000) for split in range(splits)]
            assert [block for share in shares for block in range(*share)] == list(range(3, 3 + held))


def random_inputs(D, bits, group, dtype, *, ring=64, num_blocks=9):
    """Two sequences of two heads, one of them padded, with codes and rings; lengths end in the middle of things."""
    generator = torch.Generator().manual_seed(D + bits + group)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    B, H, T = 2, 1, num_blocks * 32
    keys, values = ((draw(B, H, T, D) + 0.5 * draw(D)) * draw(D).exp()).to(dtype), (draw(B, H, T, D) * 0.01).to(dtype)
    rings = draw(B, H, ring, D).to(dtype), (draw(B, H, ring, D) * 0.01).to(dtype)
    query = draw(B, H * group, D).to(dtype)
    starts, lengths = (
        torch.tensor([0, 70], dtype=torch.int32),
        torch.tensor([num_blocks * 32 + 40, 150], dtype=torch.int32),
    )
    return keys, values, rings, query, starts, lengths


def attention_on_host(query, codes, scales, rings, starts, lengths, bits, scaling, splits):
    """What `kv_attention_cuda` launches, with poisoned results."""
    B, Q, D = query.shape
    H, num_blocks = codes.shape[1:3]
    plan = attention_plan((B, Q, D), H, num_blocks, rings[0].shape[2], bits, query.dtype, H100)
    grid = (splits + 1, *plan.grid[1:])
    parts = torch.full((B, grid[1], splits + 1, 8, D), torch.nan)
    sums = torch.full((B, grid[1], splits + 1, 8, 2), torch.nan)
    out = torch.full_like(query, torch.nan)
    args = (query, codes, scales, *rings, starts, lengths, parts, sums, num_blocks, scaling)
    run_on_host(plan.attention, grid, THREADS, args, shared=plan.shared)
    run_on_host(plan.combine, B * Q, D // 2, (parts, sums, out, Q, splits + 1))
    return out


@needs_gxx
@pytest.mark.parametrize(
    ("D", "bits", "group", "dtype", "splits"),
    [
        (64, 8, 3, torch.bfloat16, 2),
        (64, 4, 1, torch.float16, 3),
        pytest.param(128, 4, 9, torch.bfloat16, 1, marks=pytest.mark.slow),
        pytest.param(128, 8, 8, torch.float16, 2, marks=pytest.mark.slow),
        pytest.param(256, 8, 2, torch.bfloat16, 2, marks=pytest.mark.slow),
        pytest.param(256, 4, 4, torch.float16, 2, marks=pytest.mark.slow),
    ],
)
def test_attention_run_on_the_host_is_the_definition(D, bits, group, dtype, splits):
    """Both kernels, thread by thread, against float64 over the same codes: small values, padding, unequal lengths."""
    keys, values, rings, query, starts, lengths = random_inputs(D, bits, group, dtype)
    codes, scales = kv_cache.quantize_blocks(keys, values, bits)
    found = attention_on_host(query, codes, scales, rings, starts, lengths, bits, D**-0.5, splits).double()
    expected = kv_cache.attend(query.double(), codes, scales, rings, starts, lengths, bits, D**-0.5)
    # Query times scale, and P, are float16 operands: as far off as a cache rounded to float16 (5e-4 to 8e-4 here)
    assert (found - expected).norm() / expected.norm() < (3e-3 if dtype == torch.bfloat16 else 1.5e-3)


@needs_gxx
@pytest.mark.parametrize(
    ("D", "bits", "dtype"),
    [
        (64, 8, torch.bfloat16),
        (64, 4, torch.float16),
        (128, 4, torch.bfloat16),
        pytest.param(256, 8, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_writing_run_on_the_host_is_bit_exact(D, bits, dtype):
    """Blocks of a prompt, and tokens appended one by one until the ring has given two blocks."""
    keys, values, *_ = random_inputs(D, bits, 1, dtype, num_blocks=3)
    expected = kv_cache.quantize_blocks(keys, values, bits)
    B, H, T, _ = keys.shape
    poisoned = [part.fill_(77) for part in ops_kv.empty_blocks(keys, T // 32, bits)]
    kernel, shared = write_kernel("kv_write", D, bits, dtype)
    run_on_host(kernel, (T // 32, B * H), THREADS, (keys, values, *poisoned), shared=shared)
    assert all(torch.equal(*pair) for pair in zip(poisoned, expected, strict=True))

    ring = 32
    rings = keys[:, :, :ring].clone(), values[:, :, :ring].clone()
    held = [part.fill_(77) for part in ops_kv.empty_blocks(keys, 2, bits)]
    kernel, shared = write_kernel("kv_append", D, bits, dtype, ring)
    for length in (33, 34, 64, 65):  # 35 to 63 are put where they belong: nothing else happens there
        rings[0][:, :, : (length - 1) % ring], rings[1][:, :, : (length - 1) % ring] = (
            part[:, :, (length - 1) // ring * ring : length - 1] for part in (keys, values)
        )
        new = keys[:, :, length - 1].contiguous(), values[:, :, length - 1].contiguous()
        lengths = torch.full((B,), length, dtype=torch.int32)
        run_on_host(kernel, (H, B), THREADS, (*new, *held, *rings, lengths, 2), shared=shared)
    assert torch.equal(held[0], expected[0][:, :, :2])
    assert torch.equal(held[1], expected[1][:, :, :2])
    assert torch.equal(rings[0][:, :, 0], keys[:, :, 64])


def test_plan_fills_one_wave():
    """The case of the bar, 8 sequences of 8 heads: 6 blocks of threads a head are 384 of the 396 that fit an H100."""
    plan = plan_of(128, 8)
    assert plan.grid == (6, 8, 8)
    assert plan.shared * 3 <= H100.shared_per_block


def test_plan_of_a_single_sequence_uses_all_multiprocessors():
    """One sequence of 8 heads in 4 bits: 65 parts a head, and no more parts than there are blocks for four warps."""
    assert plan_of(128, 4, B=1).grid == (65, 8, 1)
    assert plan_of(128, 4, B=1, num_blocks=40).parts == 11


def test_plan_packs_query_heads_in_eights():
    """Nine query heads a key/value head take two passes over its codes."""
    assert plan_of(128, 8, B=1, Q=18, H=2).grid[1] == 4


def test_plan_keeps_within_the_shared_memory_of_small_devices():
    """Heads of 256 in 8 bits: two stages on a H100, one where a block has 99 KB."""
    assert dict(plan_of(256, 8).attention.constants)["STAGES"] == 2
    small = plan_of(256, 8, device=RTX)
    assert dict(small.attention.constants)["STAGES"] == 1
    assert small.shared <= RTX.shared_per_block


def test_a_window_that_does_not_fit_is_refused():
    """The weights of the ring's tokens are in shared memory."""
    with pytest.raises(ValueError, match="a ring of 8224 exact tokens does not fit sm_90a"):
        plan_of(128, 8, ring=8224)


@needs_gxx
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_shared_memory_is_what_the_kernel_addresses(D, bits):
    """The kernel's own constants, compiled."""
    source = """#include "kv_attention.cuh"
    extern "C" int blocks() { return 16 * WARPS * STAGES * STAGE + 2 * WARPS * KV_BLOCK * HEADS; }
    extern "C" int results() { return WARPS * HEADS * (4 * OUT_ROW + sizeof(Pair)); }
    """
    host = library(source, plan_of(D, bits).attention.constants)
    groups = 2 * THREADS // D
    exact = 4 * (8 * D + groups * 8 * (D + 4)) + 8 * groups * 8 + 4 * 96 * 8
    assert attention_shared(D, bits, 96, 2) == max(host.blocks(), host.results(), exact)
