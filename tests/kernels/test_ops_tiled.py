"""Linear layers on our kernels' tiles: the definitions on the CPU, and what tracing sees of the ops."""

import pytest
import torch

from compressor.kernels import ops_tiled  # noqa: F401  (defines the ops)
from compressor.kernels.cuda.w8a8 import tile_codes
from compressor.kernels.layouts import pack_t16x64
from compressor.kernels.ops import token_codes

# Only the output is rounded; sums in float32.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4}


def int4_problem(group=32, zeros=True, dtype=torch.bfloat16, tokens=3):
    """Arguments of the op, and the product in float64."""
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(-8, 8, (48, 128), generator=generator, dtype=torch.int8)
    scales = (torch.rand(128 // group, 48, generator=generator) * 0.02 + 0.01).to(dtype)
    zero = torch.randint(-8, 8, scales.shape, generator=generator, dtype=torch.int8) if zeros else None
    x = torch.randn(tokens, 128, generator=generator).to(dtype)
    shift = 0 if zero is None else zero.T.repeat_interleave(group, 1).double()
    weight = (codes.double() - shift) * scales.T.repeat_interleave(group, 1).double()
    return (x, pack_t16x64(codes), scales, zero, group), x.double() @ weight.T


def w8a8_problem(bias):
    """Arguments of the op, and the product of the rounded input in float64."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (24, 272), generator=generator, dtype=torch.int8)
    scales, shift = torch.rand(24, generator=generator) / 100, torch.randn(24, generator=generator).to(torch.bfloat16)
    x = torch.randn(3, 272, generator=generator).to(torch.bfloat16)
    rounded, steps = token_codes(x)
    expected = (rounded * steps).double() @ (codes.double() * scales.double()[:, None]).T
    args = (x, tile_codes(codes), scales, shift if bias else None)
    return args, expected + shift.double() if bias else expected


def apart(found, expected) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("group", "zeros"), [(32, True), (64, False), (128, True)])
def test_int4_equals_the_product_in_float64(group, zeros, dtype):
    """A group as long as the row (128) is one scale a row."""
    args, expected = int4_problem(group, zeros, dtype)
    assert apart(torch.ops.compressor.int4_tiled_linear(*args), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [False, True])
def test_w8a8_equals_the_product_of_rounded_inputs(bias):
    args, expected = w8a8_problem(bias)
    assert apart(torch.ops.compressor.w8a8_tiled_linear(*args), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [1, 9])
def test_int4_passes_opcheck(tokens):
    """Schema, fake tensors and tracing agree with the real op."""
    torch.library.opcheck(torch.ops.compressor.int4_tiled_linear.default, int4_problem(tokens=tokens)[0])


def test_w8a8_passes_opcheck():
    """Schema, fake tensors and tracing agree with the real op."""
    torch.library.opcheck(torch.ops.compressor.w8a8_tiled_linear.default, w8a8_problem(bias=True)[0])


def test_scales_of_another_group_size_are_refused():
    args, _ = int4_problem(group=32)
    with pytest.raises(ValueError, match="groups of 64 need"):
        torch.ops.compressor.int4_tiled_linear(*args[:4], 64)
