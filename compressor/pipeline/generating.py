"""Text from a model: any that can be opened, in the fastest way there is for it here."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError, UnsupportedModel
from compressor.models import DESCRIBED, StaticDecoder, wrap_live
from compressor.pipeline.live import load
from compressor.pipeline.onnx_subject import stored_model
from compressor.runtimes import OnnxModel
from compressor.runtimes.generating import generate as continue_tokens


def generate(
    model: str | nn.Module,
    prompt: str | Sequence[str],
    max_new_tokens: int = 32,
    *,
    tokenizer: Any = None,
    int8_head: bool = False,
    device: str | None = None,
    **sampling: Any,
) -> Any:
    """Continue a prompt (or each of several, in one batch), greedily unless `do_sample=True`; the text with the prompt.

    The model by name, or a live one with its tokenizer. `sampling`: `do_sample`, `temperature`, `top_k`, `top_p`,
    `seed`. `int8_head` computes logits with the output head in int8, where the model is one of torch on a CPU. `device`
    is where a model given by name computes, "cpu" (None) or "cuda"; a live one computes where it is.
    """
    if isinstance(model, str):
        if device not in (None, "cpu"):
            from_name = {"tokenizer": stored_model(model).tokenizer, "int8_head": int8_head}
            return generate(load(model, device=device), prompt, max_new_tokens, **from_name, **sampling)
        stored = stored_model(model)
        with stored.live() as module:
            return generate(module, prompt, max_new_tokens, tokenizer=stored.tokenizer, int8_head=int8_head, **sampling)
    if device is not None:
        raise RecipeError(f"generate: device {device!r} is for a model given by name; move a live one before")
    if tokenizer is None:
        raise RecipeError("generate: a live model needs its tokenizer")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids_BP, mask_BP = _padded([tokenizer(one)["input_ids"] for one in prompts])
    decoder = fast_decoder(model, int8_head=int8_head)
    go_on = decoder.generate if isinstance(decoder, StaticDecoder) else partial(continue_tokens, decoder)
    ids = go_on(
        ids_BP,
        mask_BP,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    pads = (mask_BP == 0).sum(1).tolist()
    texts = [tokenizer.decode(row[skipped:], skip_special_tokens=True) for row, skipped in zip(ids, pads, strict=True)]
    return texts[0] if isinstance(prompt, str) else texts


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids `[B, P]`, padded on the left with 0, which the mask `[B, P]` hides; no padding token is needed."""
    if not all(rows):
        raise RecipeError(f"generate: prompt {rows.index([]) + 1} has no tokens; there is nothing to go on from")
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def fast_decoder(model: nn.Module, *, int8_head: bool = False) -> Any:
    """The fastest thing that decodes like a live model: our own loop where it is described, else the model itself."""
    config: Any = model.config
    if isinstance(model, OnnxModel) or config.model_type not in DESCRIBED:
        if int8_head:
            raise UnsupportedModel(f"int8_head: not for {type(model).__name__}; it takes {', '.join(DESCRIBED)}")
        return model
    if int8_head and next(model.parameters()).device.type != "cpu":
        raise RecipeError("int8_head: its op is one of the CPU; leave it out, or compute there")
    try:
        return StaticDecoder(wrap_live(model, None), model, int8_head=int8_head)
    except UnsupportedModel:  # a known family with a setting that is not described, such as rotations by length
        if int8_head:
            raise
        return model
