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
