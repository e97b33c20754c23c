"""One hook that sees what every layer of experts receives and how its tokens are routed, without model surgery.

M tokens, D model width, E experts, k experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from compressor.layers import routed

IMPLEMENTATION = "compressor_observed"


@dataclass(frozen=True)
class Routed:
    """What one layer of experts received: inputs `[M, D]`, chosen experts and their gates `[M, k]`."""

    hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor


_observers: dict[int, Callable[[Routed], None]] = {}


def observed_experts_forward(experts: Any, hidden_MD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Each expert on its own tokens, one after another; equal to transformers' eager experts."""
    observer = _observers.get(id(experts))
    if observer is not None:
        observer(Routed(hidden_MD.detach(), top_k_index, top_k_weights))
    output = torch.zeros_like(hidden_MD)
    for expert, tokens, slots in routed(top_k_index, experts.num_experts):
        gated = experts._apply_gate(nn.functional.linear(hidden_MD[tokens], experts.gate_up_proj[expert]))
        result = nn.functional.linear(gated, experts.down_proj[expert])
        output.index_add_(0, tokens, (result * top_k_weights[tokens, slots, None]).to(output.dtype))
    return output


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, observed_experts_forward)


@contextmanager
def observe_experts(experts: Any, observer: Callable[[Routed], None] | None) -> Iterator[None]:
    """Run this layer's dense experts through our function for a while, and let `observer` see each call."""
    before = experts.config._experts_implementation
    experts.config._experts_implementation = IMPLEMENTATION
    if observer is not None:
        _observers[id(experts)] = observer
    try:
        yield
    finally:
        experts.config._experts_implementation = before
        _observers.pop(id(experts), None)
