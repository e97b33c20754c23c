"""The op of four-bit experts: its definition on the CPU, and what tracing sees of it."""

import pytest
import torch

from compressor.kernels import ops_experts  # noqa: F401  (defines the op)
from tests.kernels.test_cuda_experts import G32, ROWWISE, SMALL, problem, relative_error, routed

# Only the output is rounded; sums in float32.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4}


@pytest.mark.parametrize("shape", [SMALL, G32, ROWWISE], ids=["g64 bf16 silu", "g32 fp16 gelu", "rows fp16 silu"])
def test_the_op_equals_the_definition_in_float64(shape):
    """Thirteen tokens, one of them with a dropped slot."""
    index = routed(13, shape.slots, shape.num_experts)
    index[4, 0] = shape.num_experts
    args, reference = problem(shape, index)
    assert relative_error(torch.ops.compressor.int4_experts(*args), reference) < TOLERANCE[shape.dtype]


@pytest.mark.parametrize("tokens", [1, 9])
def test_int4_experts_passes_opcheck(tokens):
    """Schema, fake tensors and tracing agree with the real op."""
    args, _ = problem(SMALL, routed(tokens, 2, 4))
    torch.library.opcheck(torch.ops.compressor.int4_experts.default, args)


def test_a_token_less_call_gives_nothing():
    """A rank without tokens: an empty result, not an error."""
    args, _ = problem(SMALL, routed(1, 2, 4))
    empty = [tensor[:0] for tensor in args[:3]]
    assert torch.ops.compressor.int4_experts(*empty, *args[3:]).shape == (0, 128)
