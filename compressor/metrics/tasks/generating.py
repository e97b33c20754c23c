"""What a model writes by itself: greedy, many prompts at a time, padded on the left.

N prompts in a batch, T tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compressor.calibration.stream import Progress
from compressor.errors import RecipeError
from compressor.metrics.tasks.encoding import Opening, encoded

BATCH_SIZE = 16


@dataclass(frozen=True)
class Generated:
    """A text as it was written, without what ended it, and the tokens behind it.

    `ended` says why it stops: the model's end of text, one of the stop strings, or the length allowed. `cut`: the
    prompt was too long and lost tokens on the left.
    """

    text: str
    tokens: tuple[int, ...]
    ended: Literal["end", "stop", "length"]
    cut: bool = False


@torch.inference_mode()
def generate_greedily(
    module: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    longest: int,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> list[Generated]:
    """Continue each prompt with the most likely tokens, the same as one prompt at a time.

    `module` is a transformers causal model with its weights in memory. Prompts keep the last tokens where they and the
    answer exceed `longest`, the most that the model reads.
    """
    if max_new_tokens >= longest:
        raise RecipeError(f"{max_new_tokens} new tokens leave no room for a prompt: the model reads {longest}")
    ids = encoded(tokenizer, prompts)
    opening = Opening(tokenizer)
    whole = [opening.of(prompt) + ids[prompt] for prompt in prompts]
    inputs = [tokens[-(longest - max_new_tokens) :] for tokens in whole]
    order = sorted(range(len(inputs)), key=lambda n: (-len(inputs[n]), n))
    written: dict[int, Generated] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = _Texts(tokenizer, _ends(module, tokenizer), tuple(stop), max_new_tokens, len(batch))
        _continue(module, [inputs[n] for n in batch], texts)
        written |= zip(batch, texts.generated(), strict=True)
        if progress is not None:
            progress("generating", start + len(batch), len(order))
    return [replace(written[n], cut=len(inputs[n]) < len(whole[n])) for n in range(len(prompts))]


class _Texts:
    """What the rows of a batch have written so far, and which have ended."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], stop: tuple[str, ...], longest: int, rows: int):
        self.tokenizer, self.ends, self.stop, self.longest = tokenizer, ends, stop, longest
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.found: list[Generated | None] = [None] * rows

    @property
    def all_ended(self) -> bool:
        return all(self.found)

    def add(self, row: int, token: int) -> None:
        if self.found[row] is not None:
            return
        if token in self.ends:
            self.found[row] = Generated(self._decoded(row), tuple(self.tokens[row]), "end")
            return
        self.tokens[row].append(token)
        text = self._decoded(row) if self.stop else ""
        at = min((place for word in self.stop if (place := text.find(word)) >= 0), default=-1)
        if at >= 0:
            self.found[row] = Generated(text[:at], tuple(self.tokens[row]), "stop")
        elif len(self.tokens[row]) == self.longest:
            self.found[row] = Generated(self._decoded(row), tuple(self.tokens[row]), "length")

    def generated(self) -> list[Generated]:
        return [text for text in self.found if text is not None]

    def _decoded(self, row: int) -> str:
        return self.tokenizer.decode(self.tokens[row], skip_special_tokens=True)


def _continue(module: Any, inputs: list[tuple[int, ...]], texts: _Texts) -> None:
    width = max(map(len, inputs))
    device = next(module.parameters()).device
    ids_NT = torch.zeros(len(inputs), width, dtype=torch.long, device=device)
    mask_NT = torch.zeros_like(ids_NT)
    for row, tokens in enumerate(inputs):
        ids_NT[row, width - len(tokens) :] = torch.tensor(tokens)
        mask_NT[row, width - len(tokens) :] = 1
    cache = DynamicCache(config=module.config)
    positions_NT = (mask_NT.cumsum(1) - 1).clamp(min=0)
    while True:
        output = module(
            input_ids=ids_NT, attention_mask=mask_NT, position_ids=positions_NT, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        next_N: Tensor = output.logits[:, -1].float().argmax(-1)
        for row, token in enumerate(next_N.tolist()):
            texts.add(row, token)
        if texts.all_ended:
            return
        ids_NT = next_N[:, None]
        mask_NT = torch.cat([mask_NT, torch.ones_like(ids_NT)], 1)
        positions_NT = positions_NT[:, -1:] + 1


def _ends(module: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that mean the end: the model's own list, and the tokenizer's."""
    configured = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)
