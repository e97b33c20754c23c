"""Latency: structure and arithmetic, never a time."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.errors import RecipeError
from compressor.metrics.latency import crowd, measure_latency, measuring
from compressor.reports.measurement import Measurement


def tiny_llama(seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=64, **sizes | more)).eval()


def quick(model, **more):
    return measure_latency(model, **{"batch_sizes": [1, 2], "prompt": 6, "generate": 3, "max_seconds": 0.0} | more)


def test_every_figure_is_positive_with_an_interval_for_each_batch():
    """Three rounds are made even when the time is over; the prompt may be read more than once in each."""
    measured = quick(tiny_llama())
    for figure in (measured.prefill_ms, measured.decode_ms_per_token, measured.tokens_per_s, measured.extra["ttft_ms"]):
        assert list(figure) == ["1", "2"]
        assert all(0 < estimate.ci95[0] <= estimate.value <= estimate.ci95[1] for estimate in figure.values())
    assert [estimate.n for estimate in measured.decode_ms_per_token.values()] == [3, 3]
    assert [estimate.n % 3 for estimate in measured.prefill_ms.values()] == [0, 0]


def test_the_first_token_takes_longer_than_the_forward_that_gives_it():
    """It has to be chosen and brought to the host."""
    measured = quick(tiny_llama(), batch_sizes=[1])
    assert measured.extra["ttft_ms"]["1"].value > measured.prefill_ms["1"].value


def test_tokens_per_second_follow_from_the_decoding_time():
    """A batch of 2 gives two tokens a step."""
    measured = quick(tiny_llama())
    assert measured.tokens_per_s["2"].value == pytest.approx(2000 / measured.decode_ms_per_token["2"].value)


def test_with_a_baseline_there_are_ratios_from_an_even_number_of_rounds():
    """Each side comes first equally often."""
    measured = quick(tiny_llama(), baseline=tiny_llama(1))
    assert set(measured.ratio_to_baseline) == {"prefill_ms", "ttft_ms", "decode_ms_per_token"}
    assert measured.decode_ms_per_token["1"].n == 4
    assert measured.ratio_to_baseline["prefill_ms"]["2"].value > 0
    assert measured.extra["baseline"]["prefill_ms"]["1"].value > 0


def test_without_a_baseline_the_ratio_is_null_with_a_reason():
    """A budget cannot be held either."""
    assert quick(tiny_llama()).reasons["ratio_to_baseline"] == "no baseline was timed beside it"
    with pytest.raises(RecipeError, match="needs a baseline"):
        quick(tiny_llama(), budget_ratio=1.05)


@pytest.mark.parametrize("budget", [{"decode": 1.05}, {"decode_ms_per_token": 0.0}, -1.0])
def test_a_budget_names_a_figure_and_is_positive(budget):
    """The message lists the figures."""
    with pytest.raises(RecipeError, match="prefill_ms, ttft_ms, decode_ms_per_token"):
        quick(tiny_llama(), baseline=tiny_llama(1), budget_ratio=budget)


def test_a_generous_budget_is_decided_before_the_time_is_over():
    """Like models cannot differ by a factor of ten; the report says why the rounds ended."""
    measured = quick(
        tiny_llama(), baseline=tiny_llama(1), budget_ratio=10.0, max_seconds=60.0, min_rounds=2, batch_sizes=[1]
    )
    assert measured.extra["stopped"] == {"1": "decided"}
    assert all(figure["1"].ci95[1] <= 10 for figure in measured.ratio_to_baseline.values())


def test_the_circumstances_are_recorded():
    """Threads, load of others, steps: figures without them cannot be read."""
    extra = quick(tiny_llama(), batch_sizes=[1]).extra
    assert extra["decode_steps"] == {"1": 3}
    assert 0 <= extra["others_share"] <= 1
    assert extra["threads"] in (1, torch.get_num_threads())
    assert extra["stopped"] == {"1": "time"}


def test_on_a_crowded_machine_computing_counts_and_the_wall_stands_beside_it(monkeypatch):
    """The report says so, and survives being written and read."""
    monkeypatch.setattr(crowd, "others_share", lambda: 0.9)
    monkeypatch.setattr(crowd, "HELP", 0.0)  # threads never help enough
    measured = quick(tiny_llama(), baseline=tiny_llama(1), batch_sizes=[1])
    document = json.loads(json.dumps(Measurement(latency=measured).to_json(), allow_nan=False))
    read = Measurement.from_json(document).latency.extra
    assert (read["clock"], read["threads"]) == ("cpu", 1)
    assert "90% of the cores" in read["crowded"]
    assert read["wall"]["decode_ms_per_token"]["1"].value > 0
    monkeypatch.setattr(crowd, "others_share", lambda: 0.0)
    assert quick(tiny_llama(), batch_sizes=[1]).extra["clock"] == "wall"


def test_a_prompt_that_is_too_long_is_null_with_a_reason():
    """64 positions cannot hold 60 + 10."""
    measured = quick(tiny_llama(), prompt=60, generate=10)
    document = json.loads(json.dumps(Measurement(latency=measured).to_json(), allow_nan=False))["latency"]
    assert document["prefill_ms"]["1"] is None
    assert "70 tokens, the model takes 64" in document["prefill_ms"]["1_reason"]
    assert "70 tokens" in document["ttft_ms"]["1_reason"]
    assert document["ratio_to_baseline"] is None


def test_a_batch_that_does_not_fit_is_null_and_the_others_are_measured(monkeypatch):
    """Out of memory at batch 2 costs batch 2 only."""
    real = measuring.take_rounds

    def limited(sides, ids, *more, **options):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(sides, ids, *more, **options)

    monkeypatch.setattr(measuring, "take_rounds", limited)
    measured = quick(tiny_llama(), baseline=tiny_llama(1))
    assert measured.prefill_ms["1"].value > 0
    assert measured.prefill_ms["2"] is None
    assert "no room" in measured.reasons["ratio_to_baseline.prefill_ms.2"]


def test_another_error_is_not_hidden(monkeypatch):
    """A model that cannot run is a fault, not a missing figure."""

    def broken(*_, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(measuring, "take_rounds", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        quick(tiny_llama())


def test_modes_and_threads_are_given_back():
    """A model in training stays so, its frozen part stays in evaluation."""
    model, threads = tiny_llama().train(), torch.get_num_threads()
    model.model.norm.eval()
    quick(model, batch_sizes=[1])
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("wrong", [{"batch_sizes": [0]}, {"prompt": 0}, {"generate": 0}, {"batch_sizes": []}])
def test_sizes_must_be_positive(wrong):
    """Zero tokens take no time."""
    with pytest.raises(RecipeError, match="at least 1"):
        quick(tiny_llama(), **wrong)
