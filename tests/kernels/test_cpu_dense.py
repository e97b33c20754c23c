"""Many tokens times an int4 weight on a CPU: ATen's bytes, read by our own code."""

import pytest
import torch

from compressor.kernels import cpu_dense, ops

known_layout = pytest.mark.skipif(cpu_dense.rows_of_block() is None, reason="ATen packs rows in another way here")


def a_weight(rows: int, columns: int, group: int):
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, columns // group, generator=generator).to(torch.bfloat16)
    zeros = torch.randint(-8, 8, scales.shape, generator=generator, dtype=torch.int8)
    return codes, scales, zeros


@known_layout
@pytest.mark.parametrize("rows", [16, 48, 64, 96, 160])
@pytest.mark.parametrize("group", [32, 64])
def test_the_dense_weight_is_that_of_codes_scales_and_zeros(rows, group):
    """Whole blocks and rows that fill none; exact up to the roundings of zero, shift and weight."""
    codes, scales, zeros = a_weight(rows, 128, group)
    packed, scales_zeros = ops.pack_int4_cpu(codes, scales, zeros)
    found = cpu_dense.dense(packed, scales_zeros, cpu_dense.rows_of_block()).T.float()
    spread = scales.float().repeat_interleave(group, 1)
    expected = (codes.float() - zeros.float().repeat_interleave(group, 1)) * spread
    assert float((found - expected).abs().max() / (16 * spread).max()) <= 3 * 2**-9


@known_layout
def test_symmetric_weights_have_one_rounding():
    codes, scales, _ = a_weight(64, 128, 32)
    packed, scales_zeros = ops.pack_int4_cpu(codes, scales, None)
    expected = (codes.float() * scales.float().repeat_interleave(32, 1)).to(torch.bfloat16)
    assert torch.equal(cpu_dense.dense(packed, scales_zeros, cpu_dense.rows_of_block()).T, expected)


@known_layout
def test_a_product_in_slices_is_the_product(monkeypatch):
    """Slices of one block of rows instead of all of them: the same columns."""
    codes, scales, zeros = a_weight(160, 128, 32)
    packed, scales_zeros = ops.pack_int4_cpu(codes, scales, zeros)
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = cpu_dense.multiply(x, packed, scales_zeros)
    monkeypatch.setattr(cpu_dense, "SLICE_BYTES", 1)
    assert torch.equal(cpu_dense.multiply(x, packed, scales_zeros), whole)


@known_layout
@pytest.mark.parametrize("many", [1, None])
def test_both_ways_of_the_op_are_the_float64_product(monkeypatch, many):
    monkeypatch.setattr(cpu_dense, "from_tokens", lambda: many)
    codes, scales, zeros = a_weight(96, 128, 64)
    packed, scales_zeros = ops.pack_int4_cpu(codes, scales, zeros)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact = (codes.double() - zeros.double().repeat_interleave(64, 1)) * scales.double().repeat_interleave(64, 1)
    expected = x.double() @ exact.T
    found = ops.int4_linear_cpu(x, packed, scales_zeros, 64).double()
    assert float((found - expected).norm() / expected.norm()) <= 5e-3


@pytest.mark.parametrize("many", [1, None])
def test_both_ways_of_int8_are_the_float64_product(monkeypatch, many):
    monkeypatch.setattr(cpu_dense, "int8_from_tokens", lambda: many)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (96, 128), generator=generator, dtype=torch.int8)
    scales = torch.rand(96, generator=generator).to(torch.bfloat16)
    x = torch.randn(9, 128, generator=generator).to(torch.bfloat16)
    expected = x.double() @ (codes.double() * scales.double().unsqueeze(1)).T
    found = ops.int8_linear_cpu(x, codes, scales).double()
    assert float((found - expected).norm() / expected.norm()) <= 4e-3


@pytest.mark.parametrize("choice", [cpu_dense.from_tokens, cpu_dense.int8_from_tokens], ids=["int4", "int8"])
def test_the_way_is_chosen_once(choice):
    """A number of tokens that was tried, or never; asked again, the same."""
    chosen = choice()
    assert chosen is None or chosen in cpu_dense.TRIED_TOKENS
    assert choice() == chosen


def test_choosing_draws_nothing_from_torchs_generator():
    """A seed gives the same text whether or not a product has been taken before."""
    cpu_dense.rows_of_block.cache_clear()
    before = torch.get_rng_state()
    cpu_dense.rows_of_block()
    assert torch.equal(torch.get_rng_state(), before)
