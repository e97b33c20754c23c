"""Greedy generation in batches, held against one prompt at a time through transformers."""

import pytest
import torch

from compressor.errors import RecipeError
from compressor.metrics.tasks.generating import generate_greedily
from tests.tiny_models import tiny_model, tiny_tokenizer

PROMPTS = ["a", "The quick brown fox", "b" * 40, "", "jumps over", "x y z"]


def alone(module, prompt: str, new: int) -> list[int]:
    """`generate` of transformers, one prompt, no padding."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]])
    found = module.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()
    return found[: found.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in found else found


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_batches_write_what_single_prompts_write(family):
    """Six prompts of 0 to 40 tokens, in batches of four, token by token."""
    module = tiny_model(family)
    found = generate_greedily(module, tiny_tokenizer(), PROMPTS, max_new_tokens=12, longest=256, batch_size=4)
    assert [list(text.tokens) for text in found] == [alone(module, prompt, 12) for prompt in PROMPTS]


def test_a_text_ends_before_its_first_stop_string():
    """The stop string is taken from what the model writes; the text is what stands before it."""
    module, tokenizer = tiny_model("llama"), tiny_tokenizer()
    [whole] = generate_greedily(module, tokenizer, ["hello"], max_new_tokens=12, longest=256)
    assert whole.ended == "length"
    stop = whole.text[5:7]
    [found] = generate_greedily(module, tokenizer, ["hello"], max_new_tokens=12, stop=[stop], longest=256)
    assert (found.text, found.ended) == (whole.text[: whole.text.index(stop)], "stop")


def test_the_end_of_text_token_ends_a_row_and_is_not_shown():
    """The third token that a model writes, named as its end: what stands before its first use remains."""
    module, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.eos_token = None
    module.generation_config.eos_token_id = None
    [free] = generate_greedily(module, tokenizer, ["hello"], max_new_tokens=6, longest=256)
    module.generation_config.eos_token_id = [free.tokens[2]]
    first = free.tokens.index(free.tokens[2])
    [found] = generate_greedily(module, tokenizer, ["hello"], max_new_tokens=6, longest=256)
    assert (found.tokens, found.ended) == (free.tokens[:first], "end")


def test_long_prompts_keep_their_end_and_say_so():
    """With 20 tokens read at once and 12 written, the last 8 of the prompt count."""
    module, tokenizer = tiny_model("llama"), tiny_tokenizer()
    long, short = generate_greedily(
        module, tokenizer, ["u" * 5 + "abcdefgh", "abcdefgh"], max_new_tokens=12, longest=20
    )
    assert long.tokens == short.tokens
    assert (long.cut, short.cut) == (True, False)


def test_no_room_for_a_prompt_is_refused():
    """As many new tokens as the model reads."""
    with pytest.raises(RecipeError, match="20 new tokens leave no room"):
        generate_greedily(tiny_model("llama"), tiny_tokenizer(), ["a"], max_new_tokens=20, longest=20)
