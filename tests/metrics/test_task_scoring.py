"""Log-likelihoods in batches, held against one request at a time through stock transformers in float64."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.calibration import Calibration
from compressor.errors import IntegrityError
from compressor.metrics.tasks import scoring
from compressor.metrics.tasks.encoding import Request
from compressor.metrics.tasks.scoring import Scored, loglikelihoods, measure_noise, shared_rows
from compressor.models import load_model, wrap_live
from compressor.passes import Context, Quantize
from tests.tiny_models import VOCAB, save_tiny, tiny_ids, tiny_model, tiny_tokenizer


def requests(count: int = 12, seed: int = 0) -> list[Request]:
    """Contexts of 1 to 40 tokens, continuations of 1 to 9."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (1,), generator=draw))
        return tuple(torch.randint(0, VOCAB, (length,), generator=draw).tolist())

    return [Request(tokens(40), tokens(9)) for _ in range(count)]


@torch.no_grad()
def by_definition(module, asked: list[Request]) -> list[tuple[float, bool]]:
    """Sum of log-softmax in float64 at each token of the continuation, one request at a time."""
    found = []
    for request in asked:
        ids = torch.tensor([request.context + request.continuation])
        logits = module(ids).logits[0, len(request.context) - 1 : -1].double()
        target = torch.tensor(request.continuation)
        chosen = torch.log_softmax(logits, -1)[torch.arange(len(target)), target]
        found.append((float(chosen.sum()), bool(logits.argmax(-1).equal(target))))
    return found


def packed(family: str):
    """A live model whose linears and experts are packed to 4 bits."""
    model = wrap_live(tiny_model(family), tiny_tokenizer())
    Quantize(method="rtn", group_size=32).apply(
        model, Context(Calibration(data="/no/text.txt", samples=1, length=8), ids=tiny_ids(8))
    )
    assert model.is_quantized
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_log_likelihoods_are_their_definition_at_any_batch_size(family, batch_size):
    """Within 1e-4 nats in float32."""
    module = tiny_model(family)
    expected = by_definition(module, requests())
    found = loglikelihoods(wrap_live(module, tiny_tokenizer()), requests(), batch_size=batch_size)
    assert [scored.loglik for scored in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [scored.greedy for scored in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_packed_models_score_the_same_at_any_batch_size(family):
    """Batches of 1, 5 and 32 rows differ by less than 1e-4 nats, and are what the packed module itself computes."""
    model = packed(family)
    by_size = [[scored.loglik for scored in loglikelihoods(model, requests(), batch_size=n)] for n in (1, 5, 32)]
    assert by_size[1] == pytest.approx(by_size[0], abs=1e-4)
    assert by_size[2] == pytest.approx(by_size[0], abs=1e-4)
    expected = [value for value, _ in by_definition(model.skeleton, requests())]
    assert by_size[2] == pytest.approx(expected, abs=1e-4)


def test_a_stored_model_scores_like_stock_transformers(tmp_path):
    """Streamed from its files in slabs of a few rows, within 1e-4 nats."""
    folder = save_tiny(tmp_path, "llama")
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = loglikelihoods(load_model(str(folder)), requests(), batch_size=2, slab_bytes=60 * 64 * 4)
    assert [scored.loglik for scored in found] == pytest.approx(
        [value for value, _ in by_definition(stock, requests())], abs=1e-4
    )


def test_small_slabs_read_the_blocks_again_and_change_nothing():
    """Three slabs of 2 blocks are 6 steps of progress; one slab is 2; the numbers are equal."""
    model, steps = wrap_live(tiny_model("llama"), tiny_tokenizer()), []
    asked = [Request(tuple(range(n, n + 10)), (7,)) for n in range(6)]
    slabs = {"slab_bytes": 20 * 64 * 4}  # 20 tokens of 64 numbers: one batch
    few = loglikelihoods(model, asked, batch_size=2, progress=lambda *step: steps.append(step[1:]), **slabs)
    assert steps == [(n, 6) for n in range(1, 7)]
    steps.clear()
    whole = loglikelihoods(model, asked, batch_size=2, progress=lambda *step: steps.append(step[1:]))
    assert steps == [(1, 2), (2, 2)]
    assert [scored.loglik for scored in few] == pytest.approx([scored.loglik for scored in whole], abs=1e-5)


def test_what_begins_another_row_is_read_there():
    """Of five inputs two rows remain: one holds its own beginning, another stands alone."""
    inputs = [(1, 2), (1, 2, 3), (4,), (1, 2), (1,)]
    rows, row_of = shared_rows(inputs)
    assert sorted(rows) == [(1, 2, 3), (4,)]
    assert all(rows[row][: len(tokens)] == tokens for tokens, row in zip(inputs, row_of, strict=True))


def test_four_letters_after_one_question_take_one_row(monkeypatch):
    """Choices of one token are read at the same position of the same row."""
    seen = []
    embed = scoring.Model.embed
    monkeypatch.setattr(scoring.Model, "embed", lambda self, ids: seen.append(tuple(ids.shape)) or embed(self, ids))
    module = tiny_model("llama")
    asked = [Request((5, 6, 7), (letter,)) for letter in (65, 66, 67, 68)]
    found = loglikelihoods(wrap_live(module, tiny_tokenizer()), asked)
    assert seen == [(1, 3)]
    assert [scored.loglik for scored in found] == pytest.approx(
        [value for value, _ in by_definition(module, asked)], abs=1e-4
    )


def test_equal_requests_get_equal_answers_in_their_places():
    """A repeated request is scored once and returned twice."""
    model = wrap_live(tiny_model("llama"), tiny_tokenizer())
    one, other = requests(2)
    first, second, third = loglikelihoods(model, [one, other, one])
    assert first == third != second


def test_the_lead_is_the_weakest_token_against_its_best_rival():
    """By the definition in float64: smallest over tokens of logit minus the largest other logit."""
    module, asked = tiny_model("llama"), requests(4, seed=3)
    greedy = module.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    asked.append(Request((1, 2, 3), tuple(greedy)))
    for request, scored in zip(asked, loglikelihoods(wrap_live(module, tiny_tokenizer()), asked), strict=True):
        with torch.no_grad():
            logits = module(torch.tensor([request.context + request.continuation])).logits[0].double()
        leads = []
        for n, token in enumerate(request.continuation):
            row = logits[len(request.context) - 1 + n]
            leads.append(float(row[token] - row[torch.arange(VOCAB) != token].max()))
        assert scored.lead == pytest.approx(min(leads), abs=1e-4)
        assert scored.greedy == (min(leads) > 0)


def test_the_models_own_choice_is_kept_at_each_position():
    """`top` of the greedy continuation is that continuation."""
    module = tiny_model("llama")
    own = module.generate(torch.tensor([[9, 8]]), max_new_tokens=4, do_sample=False)[0, 2:].tolist()
    [scored] = loglikelihoods(wrap_live(module, tiny_tokenizer()), [Request((9, 8), tuple(own))])
    assert scored.top == tuple(own)
    assert scored.greedy


def test_small_chunks_of_the_head_change_nothing(monkeypatch):
    """Three positions of logits at a time give the numbers of all at once."""
    model = wrap_live(tiny_model("llama"), tiny_tokenizer())
    whole = [scored.loglik for scored in loglikelihoods(model, requests())]
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 3 * 4 * VOCAB)
    assert [scored.loglik for scored in loglikelihoods(model, requests())] == pytest.approx(whole, abs=1e-5)


def test_tokens_outside_the_vocabulary_are_refused():
    """A wrong tokenizer is named before anything is computed."""
    model = wrap_live(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(IntegrityError, match=f"token {VOCAB}, its vocabulary ends at {VOCAB - 1}"):
        loglikelihoods(model, [Request((1,), (VOCAB,))])


def test_noise_is_twice_the_largest_difference_of_two_runs(monkeypatch):
    """Re-scored values 0.03 and 0.01 nats away give 0.06."""
    asked = requests(2)
    before = [Scored(-5.0, False, -1.0, (0,)), Scored(-7.0, False, -1.0, (0,))]
    after = [Scored(-5.01, False, -1.0, (0,)), Scored(-6.97, False, -1.0, (0,))]
    monkeypatch.setattr(scoring, "loglikelihoods", lambda *_, **__: after)
    noise = measure_noise(None, {"task": list(zip(asked, before, strict=True))})
    assert noise["task"] == pytest.approx(0.06)


def test_noise_is_never_below_what_float32_resolves(monkeypatch):
    """Two equal runs at -100 nats leave 2 * 100 * 2^-23."""
    asked, same = requests(1), [Scored(-100.0, False, -1.0, (0,))]
    monkeypatch.setattr(scoring, "loglikelihoods", lambda *_, **__: same)
    noise = measure_noise(None, {"task": list(zip(asked, same, strict=True))})
    assert noise["task"] == pytest.approx(2 * 100 * 2**-23)


def test_noise_of_a_bfloat16_model_covers_its_batch_sizes():
    """Between batches of 1 and 32, no log-likelihood moves by more than the noise measured on all of them."""
    model, asked = wrap_live(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer()), requests(24)
    many = loglikelihoods(model, asked, batch_size=32)
    noise = measure_noise(model, {"all": list(zip(asked, many, strict=True))})["all"]
    single = loglikelihoods(model, asked, batch_size=1)
    assert max(abs(a.loglik - b.loglik) for a, b in zip(many, single, strict=True)) <= noise


def test_a_broken_model_gives_nan_not_a_score():
    """NaN weights show in every log-likelihood, and nothing counts as greedy."""
    module = tiny_model("llama")
    module.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    found = loglikelihoods(wrap_live(module, tiny_tokenizer()), requests(3))
    assert all(math.isnan(scored.loglik) for scored in found)
