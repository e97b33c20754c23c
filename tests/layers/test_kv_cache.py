"""QuantizedKvCache in live models: beside the exact cache, with each way to attend."""

import pytest
import torch
from transformers import DynamicCache

from compressor.errors import UnsupportedModel
from compressor.layers.kv_cache import KV_ATTENTION, QuantizedKvCache, QuantizedKvLayer
from tests.tiny_models import EOS, tiny_model

PROMPT, TOKENS = 70, 140
PADDING = (0, 5, 50)


def model_with(attention, family="llama", **settings):
    """A tiny model with heads of 32 channels that attends in a given way."""
    model = tiny_model(family, head_dim=32, **settings)
    model.set_attn_implementation(attention)
    return model


def tokens_and_mask():
    """Three sequences, two of them padded on the left."""
    ids = torch.randint(0, 256, (3, TOKENS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return ids, mask


@torch.inference_mode()
def decoded_logits(model, cache, ids, mask, prompt=PROMPT):
    """Logits of a prompt's last token and of every token decoded after it, `[B, T, V]`."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        step = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
        )
        found.append(step.logits[:, -1])
    return torch.stack(found, dim=1)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("attention", ["sdpa", "eager", KV_ATTENTION])
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.015), (4, 0.2)])
def test_logits_stay_near_those_of_the_exact_cache(attention, bits, limit):
    """Prompt and 70 decoded tokens of a batch with left padding; most tokens are read from codes."""
    model = model_with(attention)
    ids, mask = tokens_and_mask()
    expected = decoded_logits(model, DynamicCache(config=model.config), ids, mask)
    cache = QuantizedKvCache(model.config, bits=bits, window=32)
    found = decoded_logits(model, cache, ids, mask)
    assert 0 < relative(found, expected) < limit
    assert cache.layers[0].coded == 96


def test_a_window_larger_than_the_context_changes_nothing():
    """Bit for bit: keys and values are then those of the plain cache."""
    model = model_with("sdpa")
    ids, mask = tokens_and_mask()
    found = decoded_logits(model, QuantizedKvCache(model.config, window=256), ids, mask)
    assert torch.equal(found, decoded_logits(model, DynamicCache(config=model.config), ids, mask))


@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_from_codes_is_decoding_from_dequantized_ones(bits):
    """The fused step differs from dequantizing everything by float32 rounding only."""
    ids, mask = tokens_and_mask()
    found = {}
    for attention in ("sdpa", KV_ATTENTION):
        model = model_with(attention)
        found[attention] = decoded_logits(model, QuantizedKvCache(model.config, bits=bits, window=32), ids, mask)
    assert relative(found[KV_ATTENTION], found["sdpa"]) < 1e-5


def test_padding_on_the_left_changes_no_sequence():
    """A sequence alone, without its padding, gives the same logits but for rounding: its blocks begin elsewhere."""
    model = model_with(KV_ATTENTION)
    ids, mask = tokens_and_mask()
    together = decoded_logits(model, QuantizedKvCache(model.config, window=32), ids, mask)[2]
    cut = PADDING[2]
    cache = QuantizedKvCache(model.config, window=32)
    alone = decoded_logits(model, cache, ids[2:, cut:], mask[2:, cut:], PROMPT - cut)[0]
    assert relative(together, alone) < 0.015


def test_chunks_of_a_block_see_what_decoding_sees():
    """32 tokens at once and one by one: what each token attends to is the same (so perplexity can be measured fast)."""
    model = model_with("sdpa")
    ids = tokens_and_mask()[0][:, :128]
    found = []
    for step in (32, 1):
        cache = QuantizedKvCache(model.config, bits=4, window=32)
        with torch.inference_mode():
            parts = [model(ids[:, i : i + step], past_key_values=cache).logits for i in range(0, 128, step)]
        found.append(torch.cat(parts, dim=1))
    assert relative(*found) < 1e-5


def test_generate_takes_the_cache_and_beams_are_reordered():
    """Greedy and beam search in transformers' own loop end up where the exact cache ends up."""
    model = model_with(KV_ATTENTION)
    ids = tokens_and_mask()[0][:2, :100]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": EOS, "attention_mask": torch.ones_like(ids)}
    for beams in (1, 3):
        cache = QuantizedKvCache(model.config, window=32)
        found = model.generate(ids, past_key_values=cache, num_beams=beams, **settings)
        assert torch.equal(found, model.generate(ids, num_beams=beams, **settings))


def test_bytes_are_those_of_the_tensors_held():
    """Codes, scales and rings: by hand for one sequence of 1,000 tokens, and less than the exact cache's."""
    model = model_with("sdpa")
    ids = torch.randint(0, 256, (1, 1000))
    model.config.max_position_embeddings = 1000
    cache = QuantizedKvCache(model.config, bits=4, window=32)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    blocks = 30  # 960 tokens; 40 are in the ring
    block_bytes = 2 * (32 * 32 // 2) + 2 * 2 * (32 + 32)
    ring_bytes = 2 * 64 * 32 * 4
    assert cache.nbytes == 2 * (2 * (blocks * block_bytes + ring_bytes) + 2 * 4)
    assert cache.layers[0].get_seq_length() == 1000


def test_reset_gives_the_memory_back():
    """And the cache can be used again."""
    model = model_with("sdpa")
    ids, mask = tokens_and_mask()
    cache = QuantizedKvCache(model.config, window=32)
    first = decoded_logits(model, cache, ids, mask)
    cache.reset()
    assert cache.nbytes == 0
    assert torch.equal(decoded_logits(model, cache, ids, mask), first)


def test_sliding_layers_keep_their_own_cache():
    """Gemma 3: one layer slides over 8 tokens, the other attends to all and is quantized."""
    model = model_with("sdpa", "gemma3_text")
    kinds = [isinstance(layer, QuantizedKvLayer) for layer in QuantizedKvCache(model.config).layers]
    assert kinds == [False, True]


def test_settings_that_cannot_be_are_refused():
    """Bits, windows, widths, cropping, and padding that is not on the left."""
    model = model_with(KV_ATTENTION)
    with pytest.raises(ValueError, match="bits=3: a KV cache has 8 or 4"):
        QuantizedKvCache(model.config, bits=3)
    with pytest.raises(ValueError, match="window=40: tokens are quantized in blocks of 32"):
        QuantizedKvCache(model.config, window=40)
    ids, mask = tokens_and_mask()
    mask[0, 20] = 0
    with pytest.raises(ValueError, match="padding on the left only"):
        decoded_logits(model, QuantizedKvCache(model.config), ids, mask)
    cache = QuantizedKvCache(model.config)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    narrow = tiny_model("llama")
    with pytest.raises(UnsupportedModel, match="keys of 16 and values of 16 channels"):
        narrow(ids, past_key_values=QuantizedKvCache(narrow.config))
