"""Packed layers that read one input, computed as one."""

import pytest
import torch

from compressor.algorithms.rounding import round_to_nearest
from compressor.layers import CANONICAL, CPU, PackedLinear, PackedWeight, joined
from compressor.quant import QuantSpec

SPECS = [QuantSpec(4, 32), QuantSpec(4, 32, symmetric=False), QuantSpec(8, None), QuantSpec(8, None, True, 8)]


def layer(rows: int, spec: QuantSpec, *, bias: bool = False) -> PackedLinear:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, 64, generator=generator).to(torch.bfloat16)
    ones = torch.ones(rows, dtype=torch.bfloat16) if bias else None
    return PackedLinear(PackedWeight.of(round_to_nearest(weight, spec)), ones)


def a_batch() -> torch.Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("layout", [CANONICAL, CPU])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_joined_layer_gives_what_its_parts_give(spec, layout):
    """Bit by bit, and the parts go on giving it."""
    parts = [layer(128, spec), layer(64, spec, bias=True), layer(32, spec)]
    for part in parts:
        part.packed.relayout(layout)
    before = torch.cat([part(a_batch()) for part in parts], dim=-1)
    whole = joined(parts)
    assert torch.equal(whole(a_batch()), before)
    assert torch.equal(torch.cat([part(a_batch()) for part in parts], dim=-1), before)


def test_codes_are_held_once():
    parts = [layer(64, QuantSpec(4, 32)), layer(64, QuantSpec(4, 32))]
    whole = joined(parts)
    held = {tensor.untyped_storage().data_ptr() for tensor in (whole.packed.words, *(p.packed.words for p in parts))}
    assert len(held) == 1


@pytest.mark.parametrize(
    "parts",
    [
        [layer(64, QuantSpec(4, 32)), layer(64, QuantSpec(4, 64))],
        [layer(64, QuantSpec(4, 32)), torch.nn.Linear(64, 64)],
    ],
    ids=["other groups", "a dense layer"],
)
def test_what_does_not_fit_together_is_left_apart(parts):
    assert joined(parts) is None


def test_rows_across_a_block_of_the_cpus_layout_are_left_apart():
    """ATen interleaves 64 rows; 32 and then 64 would be interleaved in another way as one weight."""
    parts = [layer(32, QuantSpec(4, 32)), layer(64, QuantSpec(4, 32))]
    for part in parts:
        part.packed.relayout(CPU)
    assert joined(parts) is None
