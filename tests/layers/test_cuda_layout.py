"""Packed weights in the layout of our CUDA kernels, on the CPU: the ops' definitions stand for the kernels."""

import copy

import pytest
import torch
from torch import nn

from compressor.algorithms.rounding import round_to_nearest
from compressor.calibration import Calibration
from compressor.layers import CANONICAL, CPU, CUDA, PackedLinear, PackedWeight, joined, packed_weights, relayout
from compressor.layers.packed import _activation, rounded_inputs
from compressor.models import wrap_live
from compressor.passes import Context, Quantize
from compressor.quant import QuantSpec, stack
from tests.tiny_models import tiny_ids, tiny_model

W8A8 = QuantSpec(8, None, True, 8)
HAVE = [QuantSpec(4, group, symmetric) for group in (32, 64, 128, None) for symmetric in (True, False)] + [W8A8]
HAVE_NOT = [QuantSpec(2, 64), QuantSpec(3, 64), QuantSpec(8, None), QuantSpec(8, 64, symmetric=False)]
TOLERANCE = 3e-3  # one rounding to bfloat16, and one of the dense weight that it is compared with


def packed(spec, rows=48, columns=256, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return PackedWeight.of(round_to_nearest(weight, spec, dtype=dtype))


def a_batch(tokens=5, columns=256):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def apart(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("spec", HAVE, ids=str)
def test_it_computes_what_the_weight_stands_for(spec):
    weight = packed(spec)
    exact = weight.dequantize(torch.float32)
    weight.relayout(CUDA)
    assert weight.layout == CUDA
    inputs = a_batch().float()
    if spec.activation_bits:
        inputs = rounded_inputs(inputs)
    assert apart(weight.matmul(a_batch()), inputs.double() @ exact.double().T) < TOLERANCE


@pytest.mark.parametrize("spec", HAVE, ids=str)
@pytest.mark.parametrize("through", [CANONICAL, CPU])
def test_it_changes_back_without_loss(spec, through):
    """Also by way of the CPU's layout."""
    weight = packed(spec)
    before = weight.quantized()
    for layout in (through, CUDA, through, CANONICAL):
        weight.relayout(layout)
    after = weight.quantized()
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scales, before.scales)
    assert after.scales.dtype == before.scales.dtype
    assert after.zeros is None if before.zeros is None else torch.equal(after.zeros, before.zeros)


@pytest.mark.parametrize(
    "weight",
    [
        *(packed(spec) for spec in HAVE_NOT),
        packed(QuantSpec(4, 32), rows=40),
        packed(QuantSpec(4, 32), columns=96),
        packed(W8A8, rows=44),
        packed(QuantSpec(4, 32), dtype=torch.float32),
    ],
    ids=[*map(str, HAVE_NOT), "rows", "columns", "rows of W8A8", "float32 scales"],
)
def test_what_has_no_kernel_stays_canonical(weight):
    weight.relayout(CUDA)
    assert weight.layout == CANONICAL


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="possible are canonical, cpu, cuda"):
        packed(QuantSpec(4, 32)).relayout("gpu")


def test_a_stack_by_itself_stays_canonical():
    """Whose rows are gate and up, only `PackedExperts` knows."""
    one = packed(QuantSpec(4, 64)).quantized()
    weight = PackedWeight.of(stack([one, one]))
    weight.relayout(CUDA)
    assert weight.layout == CANONICAL


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(4, None, symmetric=False)], ids=str)
def test_joined_layers_give_what_their_parts_give(spec):
    """Within the order of sums (the CPU's product depends on the width); words are held once."""
    parts = [PackedLinear(packed(spec, rows), None) for rows in (64, 16, 32)]
    for part in parts:
        part.packed.relayout(CUDA)
    before = torch.cat([part(a_batch()) for part in parts], dim=-1)
    whole = joined(parts)
    assert apart(whole(a_batch()), before) < TOLERANCE
    assert torch.equal(torch.cat([part(a_batch()) for part in parts], dim=-1), before)
    assert len({one.packed.words.untyped_storage().data_ptr() for one in (whole, *parts)}) == 1


def test_w8a8_layers_stay_apart():
    """K128 lies by columns: a part of a joined weight would not be in one piece."""
    parts = [PackedLinear(packed(W8A8, rows), None) for rows in (64, 32)]
    for part in parts:
        part.packed.relayout(CUDA)
    assert joined(parts) is None


def test_a_compiled_layer_is_one_graph():
    """`fullgraph`: nothing falls back to Python."""
    layer = PackedLinear(packed(QuantSpec(4, 64)), torch.ones(48, dtype=torch.bfloat16))
    layer.packed.relayout(CUDA)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a_batch()), layer(a_batch()))


def quantized_moe(group_size, moe_intermediate_size=64):
    """A tiny Qwen3-MoE in bfloat16 with packed experts."""
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16, moe_intermediate_size=moe_intermediate_size)
    Quantize(method="rtn", bits=4, group_size=group_size).apply(
        wrap_live(model, None), Context(calibration=Calibration(), seed=0, ids=tiny_ids(2, 16))
    )
    return model.eval()


@torch.no_grad()
def test_experts_are_one_call_and_give_what_the_loop_gives():
    """Beside the same codes dequantized, in bfloat16: rounded once between the products instead of twice."""
    model = quantized_moe(group_size=32)
    exact = copy.deepcopy(model)
    relayout(model, CUDA)
    experts = model.model.layers[0].mlp.experts
    assert experts.at_once
    hidden = a_batch(7, 64)
    index = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(t))[:2] for t in range(7)])
    weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16)
    expected = exact.model.layers[0].mlp.experts.float()(hidden.float(), index, weights.float())
    assert apart(experts(hidden, index, weights), expected) < 2 * TOLERANCE


@torch.no_grad()
def test_a_stack_of_experts_changes_back_without_loss():
    model = quantized_moe(group_size=32)
    before = {name: weight.quantized() for name, weight in packed_weights(model).items()}
    relayout(model, CUDA)
    assert {weight.layout for weight in packed_weights(model).values()} == {CUDA}
    relayout(model, CANONICAL)
    for name, weight in packed_weights(model).items():
        assert torch.equal(weight.quantized().codes, before[name].codes), name
        assert torch.equal(weight.quantized().scales, before[name].scales), name


@torch.no_grad()
def test_experts_too_narrow_for_tiles_go_on_in_a_loop():
    """`down` has rows of 32: neither it nor gate and up move, though these would fit."""
    model = quantized_moe(group_size=32, moe_intermediate_size=32)
    ids = tiny_ids(1, 8)
    before = model(ids).logits
    relayout(model, CUDA)
    experts = model.model.layers[0].mlp.experts
    assert not experts.at_once
    assert experts.gate_up.layout == CANONICAL
    assert apart(model(ids).logits, before) < 0.03  # attention moved, in bfloat16


def test_experts_that_gate_in_their_own_way_have_no_kernel():
    """The activation is tried, not read off a name."""
    template = tiny_model("qwen3_moe").model.layers[0].mlp.experts
    assert _activation(template) == "silu"
    template.act_fn = nn.ReLU()
    assert _activation(template) is None
