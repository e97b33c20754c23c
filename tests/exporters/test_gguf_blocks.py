"""Codes carried into GGUF's blocks of 32 are the codes that were there, bit by bit."""

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from compressor.algorithms.rounding import round_to_nearest
from compressor.exporters.gguf.blocks import carry, inexact
from compressor.quant import QuantizedTensor, QuantSpec


def restored(data: torch.Tensor, type: str) -> torch.Tensor:
    """What gguf's own dequantizer makes of the bytes, float32."""
    return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[type]))


def some_codes(bits: int, group: int | None, symmetric: bool, *, dtype: torch.dtype = torch.bfloat16):
    """A quantized weight `[3, 12, 256]` with scales over four orders of magnitude."""
    weight = torch.randn(3, 12, 256, generator=torch.Generator().manual_seed(bits))
    weight *= torch.logspace(-3, 1, 12)[:, None]
    return round_to_nearest(weight, QuantSpec(bits=bits, group_size=group, symmetric=symmetric), dtype=dtype)


@pytest.mark.parametrize(
    ("type", "bits", "symmetric"),
    [
        ("Q4_0", 4, True), ("Q4_0", 3, True), ("Q4_0", 2, True), ("Q4_0", 3, False), ("Q4_0", 2, False),
        ("Q4_1", 4, True), ("Q5_0", 4, True), ("Q5_0", 4, False), ("Q8_0", 8, True), ("Q8_0", 4, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_blocks_hold_exactly_what_the_codes_stand_for(type, bits, symmetric, group):
    """gguf's dequantizer gives the weights of `dequantize`, no bit of float32 apart."""
    quantized = some_codes(bits, group, symmetric)
    assert inexact(quantized.scales, quantized.zeros, quantized.spec, type) == 0
    assert torch.equal(restored(carry(quantized, type), type), quantized.dequantize())


def test_every_code_of_four_bits_survives():
    """All pairs of codes that share a byte, with one scale: none is exchanged with another."""
    low, high = torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij")
    codes = torch.cat([low.reshape(16, 16), high.reshape(16, 16)], dim=1).to(torch.int8)
    quantized = QuantizedTensor(codes, torch.full((16, 1), 0.5), None, QuantSpec(bits=4, group_size=32))
    assert torch.equal(restored(carry(quantized, "Q4_0"), "Q4_0"), codes * 0.5)


def test_every_difference_of_code_and_zero_point_survives_in_five_bits():
    """From -15 to 15, in every place of a block: the fifth bits lie in bytes of their own."""
    codes = torch.stack([torch.arange(32).roll(shift) % 16 - 8 for shift in range(32)]).to(torch.int8)
    zeros = (torch.arange(32) % 16 - 8).to(torch.int8)[:, None]
    spec = QuantSpec(bits=4, group_size=32, symmetric=False)
    quantized = QuantizedTensor(codes, torch.full((32, 1), 2.0), zeros, spec)
    assert torch.equal(restored(carry(quantized, "Q5_0"), "Q5_0"), (codes.float() - zeros) * 2)


def test_minima_that_float16_cannot_hold_are_counted():
    """1.9921875 (8 bits) times 15 takes 12 bits, float16 has 11: one of two minima is rounded, by at most 2^-12."""
    codes = torch.arange(16, dtype=torch.int8).repeat(2, 2) - 8
    spec = QuantSpec(bits=4, group_size=32, symmetric=False)
    zeros = torch.tensor([[7], [0]], dtype=torch.int8)
    quantized = QuantizedTensor(codes, torch.full((2, 1), 1.9921875), zeros, spec)
    assert inexact(quantized.scales, quantized.zeros, quantized.spec, "Q4_1") == 1
    error = (restored(carry(quantized, "Q4_1"), "Q4_1") - quantized.dequantize()).abs().amax(-1)
    assert error[0] == pytest.approx(1.9921875 * 15 - 29.875, abs=0.0079)
    assert error[1] == 0


@pytest.mark.parametrize(("scale", "count"), [(2.0**-14, 0), (1.9921875 * 2**-15, 0), (1.9921875 * 2**-20, 1)])
def test_scales_below_float16s_range_are_counted(scale, count):
    """bfloat16 scales are float16 numbers from 2^-14 up, below as far as the bits reach."""
    codes = torch.zeros(1, 32, dtype=torch.int8)
    quantized = QuantizedTensor(codes, torch.full((1, 1), scale).bfloat16(), None, QuantSpec(bits=8, group_size=32))
    assert inexact(quantized.scales, quantized.zeros, quantized.spec, "Q8_0") == count
