"""All windows through one block at a time.

N windows, T tokens in a window, D model width, M tokens, k experts per token.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compressor.models import Block, Model, Routed, observe_experts

BATCH_TOKENS = 2048

Progress = Callable[[str, int, int], None]  # what, done, total


def batches(hidden_NTD: Tensor, batch_tokens: int = BATCH_TOKENS) -> Iterator[tuple[slice, Tensor]]:
    """Whole windows at a time, at most `batch_tokens` tokens (or one window)."""
    step = max(1, batch_tokens // hidden_NTD.shape[1])
    for start in range(0, len(hidden_NTD), step):
        where = slice(start, start + step)
        yield where, hidden_NTD[where]


def release_memory(*, cycles: bool = False) -> None:
    """Give freed memory back to the system between blocks; `cycles` also frees what only refers to itself (slow).

    The C library keeps what tensors of changing sizes leave behind: without this, a walk over demo/tiny-moe grew by
    300 MB a block (docs/decisions.md, 2026-11-22).
    """
    if cycles:
        gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: its own policy holds


@torch.no_grad()
def through_block(
    model: Model,
    block: Block,
    hidden_NTD: Tensor,
    *,
    batch_tokens: int = BATCH_TOKENS,
    observe: Callable[[Routed], None] | None = None,
) -> Tensor:
    """What comes out of a block, `[N, T, D]`; `observe` sees each call of its experts."""
    output = torch.empty_like(hidden_NTD)
    for where, batch in batches(hidden_NTD, batch_tokens):
        if block.experts and not block.experts.is_packed:
            with observe_experts(block.experts.module, observe):
                output[where] = model.run_block(block, batch)
        else:
            output[where] = model.run_block(block, batch)
    return output


def last_hidden(
    model: Model,
    ids_NT: Tensor,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    observe_routing: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Output of the last block, before the final norm, `[N, T, D]` in the model's dtype.

    Exact arithmetic: packed weights are dequantized, one block at a time. `observe_routing(layer, top_k_index [M, k])`
    is called for every batch of every layer of experts.
    """
    hidden = model.embed(ids_NT)
    for k in range(model.num_blocks):
        with model.open_block(k, dense=True) as block:

            def observe(routed: Routed, layer: int = k) -> None:
                if observe_routing is not None:
                    observe_routing(layer, routed.top_k_index)

            hidden = through_block(model, block, hidden, batch_tokens=batch_tokens, observe=observe)
        release_memory()
        if progress is not None:
            progress("evaluating", k + 1, model.num_blocks)
    return hidden
