import pytest
import torch

from compressor.quant import QuantizedTensor, QuantSpec, split_rows, stack


def test_dequantize_is_codes_minus_zero_times_scale():
    """Two groups of a row, each with a scale and zero of its own."""
    spec = QuantSpec(bits=4, group_size=32, symmetric=False)
    codes = torch.tensor([[1] * 32 + [-3] * 32], dtype=torch.int8)
    scales = torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16)
    zeros = torch.tensor([[-1, 2]], dtype=torch.int8)
    expected = torch.tensor([[1.0] * 32 + [-1.25] * 32])
    assert torch.equal(QuantizedTensor(codes, scales, zeros, spec).dequantize(), expected)


def test_rows_split_and_experts_stack_without_changing_weights():
    """Splitting q/k/v and stacking them again gives the same numbers."""
    spec = QuantSpec(bits=4, group_size=None)
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4)
    whole = QuantizedTensor(codes, torch.arange(1, 5, dtype=torch.float32)[:, None], None, spec)
    halves = split_rows(whole, [2, 2])
    assert torch.equal(stack(halves).dequantize().flatten(0, 1), whole.dequantize())


@pytest.mark.parametrize(("bits", "group"), [(5, 64), (4, 48), (1, None)])
def test_impossible_specs_are_refused(bits, group):
    """The error names what was given and what is possible."""
    with pytest.raises(ValueError, match="possible are"):
        QuantSpec(bits=bits, group_size=group)


def test_groups_must_fill_a_row():
    """576 = 9 x 64, so 128 does not fit."""
    assert QuantSpec(bits=4, group_size=64).num_groups(576) == 9
    with pytest.raises(ValueError, match="576"):
        QuantSpec(bits=4, group_size=128).num_groups(576)


@pytest.mark.parametrize("weights", [(4, None, True), (8, 64, True), (8, None, False)], ids=str)
def test_int8_activations_take_int8_weights_with_one_scale_a_row(weights):
    """What else was asked for is in the error."""
    with pytest.raises(ValueError, match=f"they are bits {weights[0]}, group_size {weights[1]}"):
        QuantSpec(*weights, activation_bits=8)
    with pytest.raises(ValueError, match="activation_bits is 4; possible are 8 or None"):
        QuantSpec(8, None, activation_bits=4)
    assert str(QuantSpec(8, None, activation_bits=8)) == "int8 symmetric channel, int8 activations"
