"""Our own decoding loop beside the stock model: the same logits in every way to call it."""

import pytest
import torch
from torch import Tensor

from compressor.models import StaticDecoder, wrap_live
from compressor.runtimes.generating import generate
from tests.models.test_families import SETTINGS, WINDOWS
from tests.tiny_models import FAMILIES, rough_vectors, tiny_ids, tiny_model

DESCRIBED = [(family, settings) for family, settings in SETTINGS if "longrope" not in str(settings)]
CASES = [(family, {}) for family in FAMILIES] + list(WINDOWS.items()) + DESCRIBED
NAMES = [f"{family}-{'-'.join(settings) or 'plain'}" for family, settings in CASES]
SUMS = 2e-5  # float32, summed in another order; relative to the largest logit


def decoder_of(family: str, settings: dict) -> tuple[torch.nn.Module, StaticDecoder]:
    model = rough_vectors(tiny_model(family, **settings)).eval()
    return model, StaticDecoder(wrap_live(model, None), model)


def apart(ours: Tensor, stock: Tensor) -> float:
    return float((ours - stock).abs().max() / stock.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("family", "settings"), CASES, ids=NAMES)
def test_prompt_and_steps_have_the_stock_models_logits(family, settings):
    """A prompt at once, then tokens behind it one by one and two at once: the same places of one long forward."""
    model, decoder = decoder_of(family, settings)
    ids = tiny_ids(2, 24)
    stock = model(ids).logits
    first = decoder(ids[:, :16])
    parts, cache = [first.logits], first.past_key_values
    for piece in (ids[:, 16:17], ids[:, 17:18], ids[:, 18:20], ids[:, 20:]):
        parts.append(decoder(piece, past_key_values=cache).logits)
    assert apart(torch.cat(parts, 1), stock) <= SUMS


@torch.no_grad()
@pytest.mark.parametrize(("family", "settings"), CASES, ids=NAMES)
def test_a_row_padded_on_the_left_is_as_if_it_were_alone(family, settings):
    model, decoder = decoder_of(family, settings)
    ids = tiny_ids(2, 20)
    pads = 5
    padded = torch.cat([ids[:1, :pads].zero_(), tiny_ids(1, 20)[:, : 20 - pads]], 1)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :pads] = 0
    both = torch.cat([padded, ids[1:]])
    out = decoder(both[:, :-1], mask[:, :-1])
    step = decoder(both[:, -1:], mask, past_key_values=out.past_key_values)
    found = torch.cat([out.logits, step.logits], 1)
    assert apart(found[:1, pads:], model(padded[:, pads:]).logits) <= SUMS
    assert apart(found[1:], model(ids[1:]).logits) <= SUMS


@torch.no_grad()
def test_a_cache_that_is_full_grows_and_keeps_what_it_held():
    model, decoder = decoder_of("llama", {})
    ids = tiny_ids(1, 24)
    cache = decoder.new_cache(1, room=8)
    parts = [decoder(ids[:, k : k + 1], past_key_values=cache).logits for k in range(24)]
    assert cache.length == 24
    assert apart(torch.cat(parts, 1), model(ids).logits) <= SUMS


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers():
    model, decoder = decoder_of("qwen3_moe", {})
    ids = tiny_ids(2, 8)
    stock = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(decoder, ids, max_new_tokens=12, eos_token_id=()), stock)


@torch.no_grad()
def test_an_int8_head_is_the_rounded_head():
    """Logits of one scale a row: no further from the exact ones than half a step of each weight allows."""
    model, decoder = decoder_of("llama", {})
    rounded = StaticDecoder(wrap_live(model, None), model, int8_head=True)
    ids = tiny_ids(1, 16)
    exact, found = decoder(ids).logits, rounded(ids).logits
    assert 0 < apart(found, exact) <= 0.02
