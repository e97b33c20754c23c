"""What transformers' own forward hands to a decoder layer beside its input: mask, positions, rotary embeddings.

Families differ in it: full or sliding windows, by layer or for the whole model, rotary frequencies for each kind of
layer. Their forward knows, so it is asked, with the layers themselves left out.

N windows, T tokens in a window, D model width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def layer_arguments(decoder: nn.Module, layers: nn.ModuleList, k: int, hidden_NTD: Tensor) -> dict[str, Any]:
    """Keyword arguments of layer k for full windows (causal, no padding); `decoder` is the model without its head."""
    given: dict[str, Any] = {}

    def skip(hidden: Tensor, **_: Any) -> Tensor:
        return hidden

    def note(hidden: Tensor, **arguments: Any) -> Tensor:
        given.update(arguments)
        return hidden

    with _replaced_forwards(layers, lambda i: note if i == k else skip):
        decoder(inputs_embeds=hidden_NTD, use_cache=False)
    return given


@contextmanager
def _replaced_forwards(layers: Iterable[Any], replacement: Callable[[int], Any]) -> Iterator[None]:
    """Layers that do something else for a while; their attributes stay visible to the code that calls them."""
    own = [vars(layer).get("forward") for layer in layers]  # hooks of other libraries may have set one
    for i, layer in enumerate(layers):
        layer.forward = replacement(i)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
