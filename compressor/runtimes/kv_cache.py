"""Keys and values between two steps, kept where onnxruntime reads and writes them: nothing is copied through numpy.

B sequences, H key-value heads, T cached tokens, W the width of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.runtimes.session import NUMBERS, bind_input, bind_output

# A shared buffer has room for so many tokens more than were asked for, and doubles when it is full.
ROOM = 128
PAST, PRESENT = "past_key_values", "present"

Names = Sequence[tuple[str, str]]
Shapes = Sequence[tuple[int, int]]  # heads and width of each past: keys may be wider than values (DeepSeek)


class SharedStorage:
    """One buffer `[B, H, room, W]` for each past, read and appended to: GroupQueryAttention writes in place."""

    def __init__(self, binding: Any, names: Names, batch: int, shapes: Shapes, dtype: torch.dtype):
        self._binding, self._names, self._batch, self._shapes, self._dtype = binding, names, batch, shapes, dtype
        self._buffers: list[Tensor] = []
        self._room = 0

    def bind(self, total: int) -> None:
        """Make room for `total` tokens; as long as there is some, the bindings of the last run hold."""
        if total <= self._room:
            return
        room = max(total + ROOM, 2 * self._room)
        old, self._buffers = self._buffers, []
        for index, ((past, present), (heads, width)) in enumerate(zip(self._names, self._shapes, strict=True)):
            buffer = torch.zeros(self._batch, heads, room, width, dtype=self._dtype)
            if old:
                buffer[:, :, : self._room] = old[index]
            bind_input(self._binding, past, buffer)
            bind_output(self._binding, present, buffer)
            self._buffers.append(buffer)
        self._room = room

    def keep(self) -> None:
        """Nothing to do after a run: it wrote in place."""


class GrowingStorage:
    """What a run wrote is what the next one reads: for graphs that put past and new tokens together themselves."""

    def __init__(self, binding: Any, names: Names, batch: int, shapes: Shapes, dtype: torch.dtype):
        from onnxruntime import OrtValue

        self._binding, self._names = binding, names
        self._values = [
            OrtValue.ortvalue_from_shape_and_type([batch, heads, 0, width], NUMBERS[dtype]) for heads, width in shapes
        ]

    def bind(self, total: int) -> None:
        """Bind what is cached; onnxruntime allocates what the run writes (after a run it is taken: bind it anew)."""
        for (past, present), value in zip(self._names, self._values, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_output(present, "cpu")

    def keep(self) -> None:
        """Take over what the run has written: all outputs in the order of their first binding, the logits before."""
        self._values = self._binding.get_outputs()[-len(self._names) :]


class OnnxCache:
    """The past of one batch, updated in place by each forward. It belongs to the model that made it.

    `length` counts the columns of the attention mask so far, padding included.
    """

    def __init__(self, binding: Any, storage: SharedStorage | GrowingStorage, batch: int):
        self.binding, self.storage, self.batch = binding, storage, batch
        self.length = 0
        self.held: list[Tensor] = []  # what a run reads has to live until it is over

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens, padding included."""
        return self.length
