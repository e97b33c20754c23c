"""Four-bit experts of a mixture-of-experts layer, behind `torch.library`. Layouts: `compressor.kernels.cuda.experts`.

M tokens, S slots, H hidden width, F expert width. The CPU implementation is the definition that the CUDA kernels are
tested against: dense weights in float32, one expert after another.
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from compressor.kernels.cuda import available, experts
from compressor.kernels.layouts import unpack_t16x64

_library = torch.library.Library("compressor", "FRAGMENT")
_library.define(
    "int4_experts(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up, Tensor gate_up_scales, "
    "Tensor down, Tensor down_scales, int? group_size, str activation) -> Tensor"
)


def int4_experts_cpu(
    hidden_MH: Tensor, top_k_index_MS: Tensor, top_k_weights_MS: Tensor, gate_up: Tensor, gate_up_scales: Tensor,
    down: Tensor, down_scales: Tensor, group_size: int | None, activation: str,
) -> Tensor:  # fmt: skip
    """The sum over slots of router weight times `down(act(gate(x)) * up(x))`, `[M, H]` in x's dtype.

    Slots whose index is no expert's add nothing. `group_size` None: one scale a row.
    """
    routed = (hidden_MH, top_k_index_MS, top_k_weights_MS)
    shape = experts.experts_of(*routed, gate_up, gate_up_scales, down, down_scales, group_size, activation)
    parts_MSH = torch.zeros(*top_k_index_MS.shape, shape.hidden)
    for expert in top_k_index_MS.unique().tolist():
        if not 0 <= expert < shape.num_experts:
            continue
        token, slot = torch.where(top_k_index_MS == expert)
        both = linear(hidden_MH[token].float(), dense(gate_up[expert], gate_up_scales[expert]))
        gate, up = both.unflatten(-1, (-1, 2, 8)).unbind(-2)  # eight of gate, then the same eight of up
        inner = (activate(gate, activation) * up).flatten(1)
        parts_MSH[token, slot] = linear(inner, dense(down[expert], down_scales[expert]))
    return (parts_MSH * top_k_weights_MS.float()[..., None]).sum(1).to(hidden_MH.dtype)


def dense(packed: Tensor, scales_GN: Tensor) -> Tensor:
    """The weight `[N, K]` of one expert in float32."""
    codes_NK = unpack_t16x64(packed).float()
    return codes_NK * scales_GN.float().T.repeat_interleave(codes_NK.shape[1] // len(scales_GN), 1)


def activate(gate: Tensor, activation: str) -> Tensor:
    return silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")


_library.impl("int4_experts", int4_experts_cpu, "CPU")
if available() is None:
    _library.impl("int4_experts", experts.int4_experts_cuda, "CUDA")


@torch.library.register_fake("compressor::int4_experts", lib=_library)
def _(hidden_MH: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden_MH, memory_format=torch.contiguous_format)
