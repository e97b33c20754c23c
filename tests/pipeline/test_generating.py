"""`generate`: text from any model that can be opened."""

import pytest
import torch

from compressor.errors import RecipeError, UnsupportedModel
from compressor.layers import CANONICAL, CPU, packed_weights, relayout
from compressor.models import load_model, wrap_live
from compressor.passes import Quantize
from compressor.pipeline import apply, generate
from compressor.pipeline.generating import fast_decoder
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_prompts_of_a_batch_go_on_as_each_would_alone():
    """Padding on the left changes nothing: tokens are those of one prompt after the other."""
    prompts = ["The king", "To be, or not to be, that"]
    assert generate("demo/tiny-moe", prompts, 6) == [generate("demo/tiny-moe", one, 6) for one in prompts]


def test_text_is_what_transformers_writes():
    """The same greedy tokens as the stock model's own `generate`."""
    model = load_model("demo/tiny-moe")
    with model.live() as module:
        inputs = model.tokenizer("The king", return_tensors="pt")
        stock = module.generate(inputs["input_ids"], do_sample=False, max_new_tokens=8)
        expected = model.tokenizer.decode(stock[0], skip_special_tokens=True)
    assert generate("demo/tiny-moe", "The king", 8) == expected


def test_a_seed_draws_the_same_text_and_another_seed_another():
    def drawn(seed: int) -> str:
        return generate("demo/tiny-moe", "The", 12, do_sample=True, temperature=2.0, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(RecipeError, match="temperature is 0"):
        generate("demo/tiny-moe", "The", 2, do_sample=True, temperature=0)


def test_a_live_model_needs_its_tokenizer():
    with pytest.raises(RecipeError, match="needs its tokenizer"):
        generate(tiny_model("llama"), "ab")


def test_an_int8_head_is_refused_for_a_family_that_our_loop_does_not_know():
    """It would do nothing there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, eos_token_id=256))
    assert fast_decoder(model) is model
    with pytest.raises(UnsupportedModel, match="int8_head: not for GPT2LMHeadModel"):
        generate(model, "ab", tokenizer=tiny_tokenizer(), int8_head=True)


def test_prompts_of_different_lengths_need_no_padding_token():
    model, tokenizer = tiny_model("llama").eval(), tiny_tokenizer()
    alone = [generate(model, one, 4, tokenizer=tokenizer, eos_token_id=()) for one in ("abcd", "b")]
    tokenizer.pad_token = None
    assert generate(model, ["abcd", "b"], 4, tokenizer=tokenizer, eos_token_id=()) == alone


def test_a_setting_that_our_loop_does_not_know_goes_through_the_model_itself():
    """Rotations that change with the length of the prompt."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope).eval()
    assert fast_decoder(model) is model
    assert generate(model, "ab", 2, tokenizer=tiny_tokenizer()).startswith("ab")


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(RecipeError, match="prompt 2 has no tokens"):
        generate(tiny_model("llama"), ["a", ""], tokenizer=tiny_tokenizer())


def test_a_live_model_keeps_its_layout_when_it_was_measured():
    """What `live` lends out in another layout goes back to the one it was in."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    apply(model, [Quantize(method="rtn", scale_search="mse", group_size=32)])
    relayout(model, CPU)
    with wrap_live(model, None).live(layout=CANONICAL):
        assert {weight.layout for weight in packed_weights(model).values()} == {CANONICAL}
    assert {weight.layout for weight in packed_weights(model).values()} == {CPU}
