"""Text from a model: any that can be opened, in the fastest way there is for it here."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

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
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
    decoder = fast_decoder(model, int8_head=int8_head)
    go_on = decoder.generate if isinstance(decoder, StaticDecoder) else partial(continue_tokens, decoder)
    ids = go_on(
        inputs["input_ids"],
        inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts[0] if isinstance(prompt, str) else texts


def fast_decoder(model: nn.Module, *, int8_head: bool = False) -> Any:
    """The fastest thing that decodes like a live model: our own loop where its family is described, else itself."""
    config: Any = model.config
    if isinstance(model, OnnxModel) or config.model_type not in DESCRIBED:
        if int8_head:
            raise UnsupportedModel(f"int8_head: not for {type(model).__name__}; it takes {', '.join(DESCRIBED)}")
        return model
    if int8_head and next(model.parameters()).device.type != "cpu":
        raise RecipeError("int8_head: its op is one of the CPU; leave it out, or compute there")
    return StaticDecoder(wrap_live(model, None), model, int8_head=int8_head)
