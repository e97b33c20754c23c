"""How a model goes on from prompts: greedily or by drawing, many rows at a time, each until its end of text.

B prompts, P tokens of a prompt, N new tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.errors import RecipeError


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    min_new_tokens: int = 0,
) -> Tensor:
    """Prompts `[B, P]` and what follows them, `[B, P + N]`; rows that end early are filled up with `pad_token_id`.

    Prompts of different lengths are padded on the left, with zeros in `attention_mask`. Greedy, or drawn from the
    `top_k` most likely tokens (0: all), the fewest of which hold `top_p` of the probability, at a temperature; the same
    seed draws the same. A row ends at one of `eos_token_id` (the model's own if None, never if empty), but not before
    `min_new_tokens`. The result is on the CPU, wherever the model is. RecipeError for settings that mean nothing.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    device = model.device
    input_ids = input_ids.cpu()
    batch = input_ids.shape[0]
    ends = _ends(model, eos_token_id)
    pad = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
    mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask.cpu()
    positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
    draw = torch.Generator().manual_seed(seed)
    ended_B = torch.zeros(batch, dtype=torch.bool)
    written, cache, ids = [input_ids], None, input_ids
    for count in range(max_new_tokens):
        inputs = (tensor.to(device) for tensor in (ids, mask_BT, positions))
        out = model(*inputs, past_key_values=cache, logits_to_keep=1)
        cache, logits_BV = out.past_key_values, out.logits[:, -1].float()
        if count < min_new_tokens and ends:
            logits_BV = logits_BV.index_fill(1, torch.tensor(ends, device=logits_BV.device), -torch.inf)
        next_B = _drawn(logits_BV, temperature, top_k, top_p, draw) if do_sample else _greediest(logits_BV)
        next_B[ended_B] = pad
        ids = next_B[:, None]
        written.append(ids)
        ended_B |= torch.isin(next_B, torch.tensor(ends, dtype=torch.int64))
        if bool(ended_B.all()):
            break
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, 1)


def _greediest(logits_BV: Tensor) -> Tensor:
    if logits_BV.is_cuda:
        return logits_BV.argmax(1).cpu()
    # Not torch's argmax: after it torch's threads spin on cores that onnxruntime wants.
    return torch.from_numpy(logits_BV.numpy().argmax(1))


def _drawn(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, draw: torch.Generator) -> Tensor:
    logits_BV = logits_BV.cpu() / temperature
    sorted_BV, tokens_BV = logits_BV.sort(dim=-1, descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    if top_k:
        probabilities_BV[:, top_k:] = 0
        probabilities_BV /= probabilities_BV.sum(-1, keepdim=True)
    # A token stays if those before it do not hold top_p yet; the first always does.
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    probabilities_BV[before_BV >= top_p] = 0
    return tokens_BV.gather(1, torch.multinomial(probabilities_BV, 1, generator=draw))[:, 0]


def _ends(model: Any, given: int | Sequence[int] | None) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id if given is None else given
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _check(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 1:
        raise RecipeError(f"generate: max_new_tokens is {max_new_tokens}; at least 1 is needed")
    if temperature <= 0:
        raise RecipeError(f"generate: temperature is {temperature}; it has to be above 0 (greedy is do_sample=False)")
    if top_k < 0 or not 0 < top_p <= 1:
        raise RecipeError(f"generate: top_k is {top_k}, top_p {top_p}; possible are top_k >= 0 and 0 < top_p <= 1")
