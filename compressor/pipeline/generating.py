"""Text from a model: any that can be opened, in the fastest way there is for it here."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from compressor.errors import RecipeError, UnsupportedModel
from compressor.models import DESCRIBED, StaticDecoder, wrap_live
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
    **sampling: Any,
) -> Any:
    """Continue a prompt (or each of several, in one batch), greedily unless `do_sample=True`; the text with the prompt.

    The model by name, or a live one with its tokenizer. `sampling`: `do_sample`, `temperature`, `top_k`, `top_p`,
    `seed`. `int8_head` computes logits with the output head in int8, where the model is one of torch.
    """
    if isinstance(model, str):
        stored = stored_model(model)
        with stored.live() as module:
            return generate(module, prompt, max_new_tokens, tokenizer=stored.tokenizer, int8_head=int8_head, **sampling)
    if tokenizer is None:
        raise RecipeError("generate: a live model needs its tokenizer")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
    ids = continue_tokens(
        fast_decoder(model, int8_head=int8_head),
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
    return StaticDecoder(wrap_live(model, None), model, int8_head=int8_head)
