"""T16x64 and what reads it: the layout against its definition, numbers over every code, kernels run on the host."""

import ctypes

import numpy as np
import pytest
import torch

from compressor.kernels.cuda.build import Kernel
from compressor.kernels.layouts import check_group, check_t16x64, pack_t16x64, unpack_t16x64
from tests.kernels import emulator
from tests.kernels.host.simt import library, needs_gxx, run_on_host

CODES = torch.randint(-8, 8, (48, 192), generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def test_unpacking_gives_the_codes_back():
    """Packing loses nothing."""
    assert torch.equal(unpack_t16x64(pack_t16x64(CODES)), CODES)


def test_every_code_lies_where_the_layout_says():
    """The table of layouts.py, code by code."""
    packed = pack_t16x64(CODES).numpy().view(np.uint32)
    n, k = np.indices(CODES.shape)
    lane, tile = 4 * (n % 8) + k % 8 // 2, k % 64 // 16
    bit = 4 * (n % 16 // 8) + 8 * (k % 16 // 8) + 16 * (k % 2)
    found = packed[n // 16, k // 64, 4 * lane + tile] >> bit & 15
    assert (found == CODES.numpy() + 8).all()


def test_a_lanes_word_is_operand_a_of_its_tile():
    """Put where PTX ISA says that the lane's registers belong, the nibbles are the 16x16 tile."""
    words = emulator.words_of(pack_t16x64(CODES).numpy())
    tile = np.zeros((16, 16))
    tile[emulator.a_coordinates(16)] = emulator.a_of_word(words[1, 2, :, 3]) - 8
    assert (tile == CODES[16:32, 128 + 48 : 128 + 64].numpy()).all()


@pytest.mark.parametrize("k", [16, 32])
def test_fragments_cover_their_operands_once(k):
    """Every element of A, B and C is in exactly one register of one lane."""
    for coordinates, shape in ((emulator.a_coordinates(k), (16, k)), (emulator.b_coordinates(k), (k, 8))):
        hits = np.zeros(shape)
        np.add.at(hits, coordinates, 1)
        assert (hits == 1).all()
    hits = np.zeros((16, 8))
    np.add.at(hits, emulator.c_coordinates(), 1)
    assert (hits == 1).all()


@pytest.mark.parametrize("zeros", [False, True])
def test_the_emulated_instructions_multiply(zeros):
    """Lane by lane from the packed bytes, in float64, equals the product with the dequantized weight."""
    generator = np.random.default_rng(0)
    scales, x = generator.random((3, 48)), generator.standard_normal((5, 192))
    zero = generator.integers(-8, 8, (3, 48)) if zeros else None
    codes = CODES.numpy().reshape(48, 3, 64) - (0 if zero is None else zero.T[:, :, None])
    weight = (codes * scales.T[:, :, None]).reshape(48, 192)
    found = emulator.int4_linear(pack_t16x64(CODES).numpy(), scales, zero, x)
    np.testing.assert_allclose(found, x @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(17, 64), (16, 32), (0, 64)])
def test_other_shapes_are_refused(rows, columns):
    """With what is possible."""
    with pytest.raises(ValueError, match=f"{rows} x {columns} does not fit T16x64: .*multiple of 16 and columns of 64"):
        check_t16x64(rows, columns)


def test_other_groups_are_refused():
    """Groups divide the row."""
    check_group(576, 576)
    with pytest.raises(ValueError, match="groups of 128 in rows of 576: possible are 32, 64, 128"):
        check_group(576, 128)


# ---- numbers.cuh, compiled for the host ----

_NUMBERS = """#include "numbers.cuh"
extern "C" void to_floats(float* out) { for (unsigned i = 0; i < 65536; i++) out[i] = to_float(i); }
extern "C" void from_floats(const float* in, unsigned short* out, int count) {
    for (int i = 0; i < count; i++) out[i] = (unsigned short)from_float(in[i]);
}
extern "C" void dequantize_all(unsigned low, unsigned high, float* out) {  // [65536, 4, 2]
    for (unsigned q = 0; q < 65536; q++) {
        unsigned a[4];
        dequantize(q | (q ^ 0xffffu) << 16, make_zero(low), make_zero(high), a);
        for (int j = 0; j < 8; j++) *out++ = to_float(a[j / 2] >> (16 * (j % 2)) & 0xffffu);
    }
}
"""
DTYPES = [torch.bfloat16, torch.float16]


def numbers(dtype) -> ctypes.CDLL:
    return library(_NUMBERS, (("BF16", int(dtype == torch.bfloat16)),))


@needs_gxx
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_16_bit_numbers_convert_as_in_torch(dtype):
    """To float: all 65,536. From float: those, what lies between two of them, ties, and beyond the largest."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    floats = torch.empty(65536)
    numbers(dtype).to_floats(ctypes.c_void_p(floats.data_ptr()))
    assert torch.equal(floats.nan_to_num(1e30), every.float().nan_to_num(1e30))

    finite = floats[floats.isfinite()]
    ties = (finite.double() + torch.nextafter(every, torch.full_like(every, torch.inf)).double()[floats.isfinite()]) / 2
    given = torch.cat([finite, ties.float(), finite * 1.0007, finite * 0.9991, torch.tensor([1e38, -1e38, torch.inf])])
    given = given[given.isfinite() | given.isinf()].contiguous()
    found = torch.empty(len(given), dtype=torch.int16)
    numbers(dtype).from_floats(ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(found.data_ptr()), len(given))
    assert torch.equal(found.view(dtype).float(), given.to(dtype).float())


@needs_gxx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high"), [(8, 8), (0, 15), (15, 3)])
def test_dequantizing_is_exact_for_every_code(dtype, low, high):
    """All half-words, in both halves of the word, with the zeros of both rows."""
    found = np.empty((65536, 4, 2), dtype=np.float32)
    numbers(dtype).dequantize_all(low, high, found.ctypes.data_as(ctypes.c_void_p))
    half = np.arange(65536)
    nibbles = np.stack([half, half ^ 0xFFFF], axis=-1)[:, None, :] >> (4 * np.arange(4))[None, :, None] & 15
    assert (found == nibbles - np.array([low, high, low, high])[None, :, None]).all()


# ---- pack.cuh and dequantize.cuh, run on the host ----


@needs_gxx
@pytest.mark.parametrize("grid", [1, 5])
def test_the_kernels_pack_and_unpack_bit_for_bit_as_torch(grid):
    """With fewer warps than tiles, and with more; outputs begin as garbage and end inside guard bands."""
    constants = (("BF16", 1), ("N", 48), ("K", 192))
    packed = torch.full((11, 128), 77, dtype=torch.int32)
    run_on_host(Kernel("pack.cuh", "pack", constants), grid, 256, [CODES, packed[1:-1]])
    assert torch.equal(packed[1:-1].reshape(3, 3, 128), pack_t16x64(CODES))
    assert (packed[[0, -1]] == 77).all()
    codes = torch.full((50, 192), 77, dtype=torch.int8)
    run_on_host(Kernel("pack.cuh", "unpack", constants), grid, 256, [packed[1:-1], codes[1:-1]])
    assert torch.equal(codes[1:-1], CODES)
    assert (codes[[0, -1]] == 77).all()


@needs_gxx
@pytest.mark.parametrize(("dtype", "group", "zeros"), [(torch.bfloat16, 64, True), (torch.float16, 192, False)])
def test_the_kernel_dequantizes_as_torch_rounds(dtype, group, zeros):
    """Rows 16 to 47 of 48, bit for bit, inside guard bands."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.randn(192 // group, 48, generator=generator).to(dtype)
    zero = torch.randint(-8, 8, scales.shape, generator=generator, dtype=torch.int8) if zeros else None
    codes = CODES.float() - (0 if zero is None else zero.float().repeat_interleave(group, 0).T)
    expected = (codes * scales.float().repeat_interleave(group, 0).T).to(dtype)

    constants = (("BF16", int(dtype == torch.bfloat16)), ("N", 48), ("K", 192), ("GROUP", group), ("ZEROS", int(zeros)))
    dense = torch.full((34, 192), torch.nan, dtype=dtype)
    args = [pack_t16x64(CODES), scales, 0 if zero is None else zero, dense[1:-1], 16, 32]
    run_on_host(Kernel("dequantize.cuh", "dequantize_rows", constants), 1, 256, args)
    assert torch.equal(dense[1:-1].view(torch.int16), expected[16:48].contiguous().view(torch.int16))
    assert dense[[0, -1]].isnan().all()
