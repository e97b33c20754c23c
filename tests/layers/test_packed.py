import pytest
import torch
from torch import nn

from compressor.algorithms.rounding import round_to_nearest
from compressor.kernels import ops
from compressor.layers import CANONICAL, CPU, PackedLinear, PackedWeight, routed
from compressor.quant import QuantSpec, stack


def quantized(spec: QuantSpec, out_features=48, in_features=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return round_to_nearest(torch.randn(out_features, in_features, generator=generator), spec)


SPECS = [
    QuantSpec(bits=bits, group_size=group, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for group in (64, None)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_canonical_layout_computes_exactly(spec):
    """The product is that of the dequantized weight."""
    weight = quantized(spec)
    x = torch.randn(3, 256)
    assert torch.equal(PackedWeight.of(weight).matmul(x), nn.functional.linear(x, weight.dequantize()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fast_layout_agrees_with_the_float_reference(spec):
    """Within bfloat16's rounding of the dequantized product (int4pack errs 2.3e-3: reference, kernels 9.1)."""
    weight = quantized(spec)
    packed = PackedWeight.of(weight)
    packed.relayout(CPU)
    assert packed.layout == (
        CPU if spec.bits == 4 or (spec.bits == 8 and spec.symmetric and not spec.group_size) else CANONICAL
    )
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = x.double() @ weight.dequantize(torch.float64).T
    error = (packed.matmul(x).double() - expected).norm() / expected.norm()
    assert error < 6e-3


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("experts", [None, 3])
def test_layouts_change_back_without_loss(spec, experts):
    """Canonical to CPU to canonical gives the same codes, scales and zeros, for a stack as well."""
    weight = quantized(spec) if experts is None else stack([quantized(spec, seed=e) for e in range(experts)])
    packed = PackedWeight.of(weight)
    packed.relayout(CPU)
    packed.relayout(CANONICAL)
    again = packed.quantized()
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales, weight.scales)
    assert again.zeros is None if weight.zeros is None else torch.equal(again.zeros, weight.zeros)


@pytest.mark.parametrize("layout", [CANONICAL, CPU])
def test_no_dense_copy_is_held(layout):
    """int4 with groups of 64 takes 4.25 bits a weight, in every layout (4.5 where zeros lie beside the scales)."""
    packed = PackedWeight.of(quantized(QuantSpec(bits=4, group_size=64)))
    packed.relayout(layout)
    held = sum(buffer.nbytes for buffer in packed.buffers())
    assert held * 8 / (48 * 256) == (4.25 if layout == CANONICAL else 4.5)


def test_linear_keeps_its_bias_and_leading_dimensions():
    """[B, T, I] goes in, [B, T, O] comes out, bias added."""
    weight = quantized(QuantSpec(bits=4, group_size=64))
    bias = torch.randn(48)
    x = torch.randn(2, 3, 256)
    expected = nn.functional.linear(x, weight.dequantize(), bias)
    assert torch.allclose(PackedLinear(PackedWeight.of(weight), bias)(x), expected, atol=1e-6)


def test_routed_lists_every_token_once_per_slot():
    """Tokens and slots of each expert, experts without tokens left out."""
    index = torch.tensor([[2, 0], [2, 3], [0, 2]])
    found = {expert: (tokens.tolist(), slots.tolist()) for expert, tokens, slots in routed(index, 5)}
    assert found == {0: ([0, 2], [1, 0]), 2: ([0, 1, 2], [0, 0, 1]), 3: ([1], [1])}


W8A8 = QuantSpec(bits=8, group_size=None, activation_bits=8)


def test_int8_activations_are_rounded_before_the_exact_product():
    """The values of the inputs' codes times those of the weight's, and the bias; [B, T, I] comes back in shape."""
    weight, bias = quantized(W8A8), torch.randn(48)
    x = torch.randn(2, 3, 256)
    scales = x.abs().amax(-1, keepdim=True) / 127.5
    inputs = (x / scales).clamp(-128, 127).round() * scales
    expected = nn.functional.linear(inputs.double(), weight.dequantize(torch.float64), bias.double())
    layer = PackedLinear(PackedWeight.of(weight), bias)
    assert (layer(x) - expected).abs().max() < 1e-5
    assert torch.equal(layer.dense(torch.float32)(x), layer(x))


def test_a_dense_stand_in_of_a_weight_only_layer_rounds_no_inputs():
    """It is a plain linear layer."""
    layer = PackedLinear(PackedWeight.of(quantized(QuantSpec(bits=8, group_size=None))), None)
    assert type(layer.dense(torch.float32)) is nn.Linear


@pytest.mark.skipif(not ops.adds_bytes_exactly(), reason="without VNNI there is no fast layout")
def test_the_fast_layout_of_int8_activations_computes_the_same_and_changes_back():
    """Within 1e-6 of the exact layout in float32; 1 byte a weight; the codes return."""
    weight = quantized(W8A8)
    packed = PackedWeight.of(weight)
    x = torch.randn(5, 256)
    exact = packed.matmul(x)
    packed.relayout(CPU)
    assert packed.layout == CPU
    assert packed.words.nbytes == 48 * 256
    assert (packed.matmul(x) - exact).norm() < 1e-6 * exact.norm()
    packed.relayout(CANONICAL)
    assert torch.equal(packed.quantized().codes, weight.codes)


def test_without_exact_products_of_bytes_int8_activations_stay_exact(monkeypatch):
    """The layout does not change."""
    monkeypatch.setattr(ops, "adds_bytes_exactly", lambda: False)
    packed = PackedWeight.of(quantized(W8A8))
    packed.relayout(CPU)
    assert packed.layout == CANONICAL
