"""Load times: what is counted and in which order, never a time."""

import contextlib

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.errors import RecipeError
from compressor.metrics.latency import crowd, measure_loading
from compressor.metrics.latency import loading as module
from compressor.metrics.latency.rounds import Span


def loader_of(model):
    return lambda: contextlib.nullcontext(model)


def test_a_folder_is_loaded_until_it_answers(llama_folder):
    """Four loads at least, each a positive time, and no baseline."""
    measured = measure_loading(llama_folder, loads=1, max_seconds=0.0)
    assert measured.load_s.n == 4
    assert 0 < measured.load_s.ci95[0] <= measured.load_s.value
    assert measured.ratio_to_baseline is None
    assert measured.reasons["ratio_to_baseline"] == "no baseline was loaded beside it"


def test_both_sides_take_turns_after_a_load_that_does_not_count():
    """A B, then mirrored pairs; every load ends in a forward of the model that was given."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    model, order = LlamaForCausalLM(config).eval(), []

    def loader(name):
        @contextlib.contextmanager
        def load():
            order.append(name)
            yield model

        return load

    measured = measure_loading(loader("A"), baseline=loader("B"), loads=4, max_seconds=60.0)
    text = "".join(order)
    assert text[:2] == "AB"
    assert [text[2:6] in ("ABBA", "BAAB"), text[6:] in ("ABBA", "BAAB")] == [True, True]
    assert (measured.load_s.n, measured.baseline_load_s.n, measured.ratio_to_baseline.n) == (4, 4, 4)


def test_the_ratio_is_that_of_the_seconds(monkeypatch):
    """Loads of 3 s beside loads of 2 s."""
    slow, fast = loader_of(torch.nn.Linear(1, 1)), loader_of(torch.nn.Linear(1, 1))
    monkeypatch.setattr(crowd, "others_share", lambda: 0.0)
    monkeypatch.setattr(module, "_span", lambda load: Span(3000.0, 0.0) if load is slow else Span(2000.0, 0.0))
    measured = measure_loading(slow, baseline=fast, loads=4)
    assert (measured.load_s.value, measured.baseline_load_s.value) == (3.0, 2.0)
    assert measured.ratio_to_baseline.ci95 == pytest.approx((1.5, 1.5))


def test_with_a_budget_loads_go_on_until_it_is_decided(monkeypatch):
    """Times that wobble by 10 % need more than the four asked for."""
    load = loader_of(torch.nn.Linear(1, 1))
    times = iter([1.0] + [1.1, 1.0, 0.9, 1.0, 1.0, 1.2, 1.0, 0.95] * 40)
    monkeypatch.setattr(module, "_span", lambda load: Span(1000 * next(times), 0.0))
    monkeypatch.setattr(crowd, "others_share", lambda: 0.0)
    measured = measure_loading(load, baseline=load, loads=4, budget_ratio=1.1, max_seconds=60.0)
    assert measured.load_s.n > 4
    assert measured.ratio_to_baseline.ci95[1] <= 1.1


def test_loads_must_be_positive():
    """None would have no time."""
    with pytest.raises(RecipeError, match="at least 1"):
        measure_loading("demo/tiny-moe", loads=0)
