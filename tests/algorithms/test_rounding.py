import pytest
import torch

from compressor.algorithms.rounding import fit_grid, round_to_nearest
from compressor.quant import QuantSpec


def weights(rows=32, columns=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).pow(3)  # heavy tails: clipping pays


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_never_loses_to_minmax(bits, symmetric):
    """The largest weight unclipped is one of the candidates, so each group's error can only fall."""
    weight = weights()
    spec = QuantSpec(bits=bits, group_size=64, symmetric=symmetric)

    def group_error(search):
        rounded = round_to_nearest(weight, spec, search=search).dequantize(torch.float64)
        return (rounded - weight.double()).square().unflatten(-1, (4, 64)).sum(-1)

    assert (group_error(True) <= group_error(False) + 1e-12).all()
    assert group_error(True).sum() < group_error(False).sum() or bits == 8


def test_importance_moves_the_error_to_inputs_that_do_not_matter():
    """The weighted error falls, the plain error rises."""
    weight = weights(seed=1)
    importance = torch.linspace(0.01, 3, 256) ** 3
    spec = QuantSpec(bits=3, group_size=64)
    plain = (round_to_nearest(weight, spec).dequantize() - weight).square()
    weighted = (round_to_nearest(weight, spec, importance_I=importance).dequantize() - weight).square()
    assert (weighted * importance).sum() < (plain * importance).sum()
    assert weighted.sum() > plain.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_error_is_at_most_half_a_step(symmetric):
    """Nothing is clipped, so no weight moves further than half a scale."""
    weight = weights(seed=2).to(torch.bfloat16).float()
    spec = QuantSpec(bits=8, group_size=None, symmetric=symmetric)
    quantized = round_to_nearest(weight, spec, search=False, dtype=torch.float32)
    assert ((quantized.dequantize() - weight).abs() <= quantized.scales * 0.5001).all()


def test_scales_have_the_files_dtype_before_codes_are_chosen():
    """Each code is the nearest one for the bfloat16 scale, not for the scale before rounding."""
    weight = weights(seed=3)
    spec = QuantSpec(bits=4, group_size=64)
    quantized = round_to_nearest(weight, spec)
    assert quantized.scales.dtype == torch.bfloat16
    scales = quantized.scales.float().repeat_interleave(64, dim=-1)
    assert torch.equal(quantized.codes, (weight / scales).round().clamp(-8, 7).to(torch.int8))


def test_a_group_of_zeros_stays_zero():
    """No division by a zero scale."""
    weight = torch.zeros(4, 64)
    for symmetric in (True, False):
        quantized = round_to_nearest(weight, QuantSpec(bits=4, group_size=32, symmetric=symmetric))
        assert torch.equal(quantized.dequantize(), weight)


def test_rows_in_chunks_give_the_same_grid(monkeypatch):
    """Chunking bounds memory and changes no number, stacks of experts included."""
    weight = torch.stack([weights(seed=4), weights(seed=5)])
    spec = QuantSpec(bits=4, group_size=64)
    whole = fit_grid(weight, spec, dtype=torch.bfloat16)
    monkeypatch.setattr("compressor.algorithms.rounding.CHUNK_ELEMENTS", 1000)
    assert torch.equal(fit_grid(weight, spec, dtype=torch.bfloat16).scales, whole.scales)
