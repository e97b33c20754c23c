"""One token at a time as a CUDA graph: the launches of a step, recorded once and replayed without Python.

B sequences, P tokens of a prompt, T tokens of a room. A step of a decoder is a dozen launches and more a layer; at a
few microseconds each of the host they take longer than the products of a small model.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

WARM_UPS = 2


def room_for(tokens: int, first: int) -> int:
    """The room for so many tokens: `first`, or twice as often as it takes, so that few graphs serve all lengths."""
    while first < tokens:
        first *= 2
    return first


class GraphedStep:
    """A decoder for B sequences in a room of T tokens that never grows; one text (or batch) at a time.

    Call it like the decoder: without a cache it reads a prompt `[B, P]`, with the one that it gave a token `[B, 1]`, of
    which `capture` makes a replay; otherwise the same step runs as it is. Inputs may lie on the CPU. Logits are
    overwritten by the next token. Weights must stay where they are.
    """

    @torch.inference_mode()
    def __init__(self, decoder: Any, batch: int, room: int, *, capture: bool):
        self.generation_config = decoder.generation_config
        self.device = torch.device("cpu")  # where inputs are expected: they are few, and read on the host
        self._decoder = decoder
        self._cache = decoder.new_cache(batch, room)
        self._cache.held.zero_()
        self._tables = decoder.prepare_tables(room)
        device = decoder.device
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.ones(batch, room, dtype=torch.bool, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if capture:
            with torch.cuda.device(device):
                self._capture()

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        cache, device = self._cache, self._decoder.device
        new = input_ids.shape[1]
        if past_key_values is None:
            cache.length = 0
            cache.held.zero_()  # what nobody has written yet counts as nothing, but must not be NaN
            self._seen.fill_(True)
            self._seen[:, :new] = attention_mask.to(device).bool()
            return self._decoder(
                input_ids.to(device),
                attention_mask.to(device),
                position_ids.to(device),
                past_key_values=cache,
                logits_to_keep=logits_to_keep,
            )
        assert past_key_values is cache
        room = cache.held.shape[4]
        if new != 1 or cache.length >= room:
            raise ValueError(f"{new} tokens after {cache.length}: this step takes one, in a room of {room}")
        self._ids.copy_(input_ids)
        self._positions.copy_(position_ids)
        self._place.fill_(cache.length)
        cache.length += 1
        if self._graph is None:
            logits = self._step()
        else:
            self._graph.replay()
            logits = self._logits
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _step(self) -> Tensor:
        return self._decoder.step(self._ids, self._positions, self._place, self._cache.held, self._seen)

    def _capture(self) -> None:
        """After a warm-up on another stream: nothing may be compiled, loaded or set up while a graph is captured."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()
