import pytest
import torch

from compressor.kernels import ops


def int4_arguments(m=3):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (32, 128), generator=generator, dtype=torch.int8)
    packed, scales_zeros = ops.pack_int4_cpu(codes, torch.full((32, 2), 0.125), None)
    return torch.randn(m, 128, generator=generator).to(torch.bfloat16), packed, scales_zeros, 64


@pytest.mark.parametrize("m", [1, 3, 17])
def test_int4_linear_passes_opcheck(m):
    """Schema, fake tensors and tracing agree with the real op."""
    torch.library.opcheck(torch.ops.compressor.int4_linear.default, int4_arguments(m))


def test_int8_linear_passes_opcheck():
    """Schema, fake tensors and tracing agree with the real op."""
    codes = torch.randint(-128, 128, (32, 128), dtype=torch.int8)
    x = torch.randn(3, 128).to(torch.bfloat16)
    torch.library.opcheck(torch.ops.compressor.int8_linear.default, (x, codes, torch.ones(32, dtype=torch.bfloat16)))


def test_codes_come_back_out_of_the_cpu_layout():
    """All sixteen codes in all positions, read back through the op itself."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(256)[: 32 * 128].reshape(32, 128)
    codes = torch.stack([row.roll(shift) for shift, row in enumerate(codes)])
    packed, _ = ops.pack_int4_cpu(codes, torch.ones(32, 2), None)
    assert torch.equal(ops.unpack_int4_cpu(packed, 128), codes)


def test_tokens_are_rounded_to_int8_by_their_largest_value():
    """The largest is 127.5 steps: cut off at 127, while -127.5 is -128; other ties go to even too."""
    codes, scales = ops.token_codes(torch.tensor([[255.0, 3, 5, -0.8], [-127.5, 0, 0, 0]]))
    assert codes.tolist() == [[127, 2, 2, 0], [-128, 0, 0, 0]]
    assert scales.tolist() == [[2], [1]]


def test_a_token_of_zeros_has_codes_of_zero_and_a_scale_above_it():
    """No division by zero; the other token is as it would be alone."""
    x = torch.stack([torch.zeros(8), torch.arange(8.0)])
    codes, scales = ops.token_codes(x)
    assert codes[0].tolist() == [0] * 8
    assert scales[0] > 0
    assert torch.equal(codes[1:], ops.token_codes(x[1:])[0])


def w8a8_arguments(m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (48, 72), generator=generator, dtype=torch.int8)
    return torch.randn(m, 72, generator=generator), codes, torch.rand(48, generator=generator) + 0.1


needs_vnni = pytest.mark.skipif(not ops.adds_bytes_exactly(), reason="without VNNI no model uses this op")


@needs_vnni
@pytest.mark.parametrize("m", [1, 3, 130])
def test_w8a8_linear_multiplies_integers_exactly(m):
    """Sums of integers, each scale multiplied once: 1e-6 of the largest output; 130 tokens are two chunks."""
    x, codes, scales = w8a8_arguments(m)
    inputs, sizes = ops.token_codes(x)
    expected = (inputs.double() @ codes.double().T) * scales.double() * sizes.double()
    found = torch.ops.compressor.w8a8_linear(x, codes, scales)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@needs_vnni
def test_w8a8_linear_does_not_saturate_at_its_extremes():
    """Codes of 127 against 127 in all places: the largest sums there are."""
    codes = torch.full((16, 256), 127, dtype=torch.int8)
    x = torch.ones(2, 256)
    found = torch.ops.compressor.w8a8_linear(x, codes, torch.ones(16))
    assert torch.allclose(found, torch.full((2, 16), 127 * 127 * 256 / 127.5))


def test_w8a8_linear_passes_opcheck():
    """Schema, fake tensors and tracing agree with the real op."""
    torch.library.opcheck(torch.ops.compressor.w8a8_linear.default, w8a8_arguments(3))
