"""Latency: structure and arithmetic, never a time."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.errors import RecipeError
from compressor.metrics import latency as module
from compressor.metrics.latency import measure_latency, paired_ratio
from compressor.reports.measurement import Measurement


def tiny_llama(seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=64, **sizes | more)).eval()


def quick(model, **more):
    return measure_latency(model, **{"batch_sizes": [1, 2], "prompt": 6, "generate": 3, "max_seconds": 0.0} | more)


def test_every_figure_is_positive_with_an_interval_for_each_batch():
    """Three rounds are made even when the time is over."""
    measured = quick(tiny_llama())
    for figure in (measured.prefill_ms, measured.decode_ms_per_token, measured.tokens_per_s):
        assert list(figure) == ["1", "2"]
        assert all(0 < estimate.ci95[0] <= estimate.value <= estimate.ci95[1] for estimate in figure.values())
        assert [estimate.n for estimate in figure.values()] == [3, 3]


def test_tokens_per_second_follow_from_the_decoding_time():
    """A batch of 2 gives two tokens a step."""
    measured = quick(tiny_llama())
    assert measured.tokens_per_s["2"].value == pytest.approx(2000 / measured.decode_ms_per_token["2"].value)


def test_with_a_baseline_there_is_a_ratio_from_an_even_number_of_rounds():
    """Each side comes first equally often."""
    measured = quick(tiny_llama(), baseline=tiny_llama(1))
    assert set(measured.ratio_to_baseline) == {"prefill_ms", "decode_ms_per_token"}
    assert measured.ratio_to_baseline["decode_ms_per_token"]["1"].n == 4
    assert measured.ratio_to_baseline["prefill_ms"]["2"].value > 0
    assert measured.extra["baseline"]["prefill_ms"]["1"].value > 0


def test_sides_take_turns_in_changing_order(monkeypatch):
    """A B, B A, A B, B A, after one warm-up of each."""
    model, baseline, order = tiny_llama(), tiny_llama(1), []

    def record(side, ids, steps):
        order.append("A" if side is model else "B")
        return 1.0, 1.0

    monkeypatch.setattr(module, "_time_once", record)
    quick(model, baseline=baseline, batch_sizes=[1])
    assert "".join(order) == "AB" + "ABBAABBA"


def test_paired_ratio_cancels_what_the_machine_does():
    """Rounds ten times slower than others leave a constant ratio as it is."""
    assert paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]).ci95 == pytest.approx((2.0, 2.0))


def test_rounds_go_on_until_both_their_number_and_the_patience_are_reached():
    """And stop at the limit, but not before three."""
    enough = module._enough(1, min_rounds=5, patience_s=2.0, limit_s=10.0)
    assert not enough(4, 3.0)
    assert not enough(5, 1.0)
    assert enough(5, 2.0)
    assert enough(3, 9.0)
    assert not enough(2, 99.0)


def test_a_slow_model_takes_fewer_steps_so_that_the_rounds_fit():
    """Both sides prefill in 1 s and step in 0.1 s: four rounds in 20 s leave 3 s, or 15 steps of each, a round."""
    assert module._steps([(1000.0, 100.0), (1000.0, 100.0)], 32, 20.0) == 15
    assert module._steps([(1000.0, 100.0), (1000.0, 100.0)], 8, 20.0) == 8
    assert module._steps([(1000.0, 100.0), (1000.0, 100.0)], 32, 1.0) == 4


def test_a_prompt_that_is_too_long_is_null_with_a_reason():
    """64 positions cannot hold 60 + 10."""
    measured = quick(tiny_llama(), prompt=60, generate=10)
    document = json.loads(json.dumps(Measurement(latency=measured).to_json(), allow_nan=False))["latency"]
    assert document["prefill_ms"]["1"] is None
    assert "70 tokens, the model takes 64" in document["prefill_ms"]["1_reason"]
    assert document["ratio_to_baseline"] is None


def test_a_batch_that_does_not_fit_is_null_and_the_others_are_measured(monkeypatch):
    """Out of memory at batch 2 costs batch 2 only."""
    real = module._time_once

    def limited(side, ids, steps):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(side, ids, steps)

    monkeypatch.setattr(module, "_time_once", limited)
    measured = quick(tiny_llama(), baseline=tiny_llama(1))
    assert measured.prefill_ms["1"].value > 0
    assert measured.prefill_ms["2"] is None
    assert "no room" in measured.reasons["ratio_to_baseline.prefill_ms.2"]


def test_another_error_is_not_hidden(monkeypatch):
    """A model that cannot run is a fault, not a missing figure."""

    def broken(side, ids, steps):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(module, "_time_once", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        quick(tiny_llama())


def test_modes_are_given_back():
    """A model in training stays so, its frozen part stays in evaluation."""
    model = tiny_llama().train()
    model.model.norm.eval()
    quick(model, batch_sizes=[1])
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training


@pytest.mark.parametrize("wrong", [{"batch_sizes": [0]}, {"prompt": 0}, {"generate": 0}, {"batch_sizes": []}])
def test_sizes_must_be_positive(wrong):
    """Zero tokens take no time."""
    with pytest.raises(RecipeError, match="at least 1"):
        quick(tiny_llama(), **wrong)
