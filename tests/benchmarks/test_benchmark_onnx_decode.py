import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from compressor.runtimes import open_onnx
from tests.runtimes.tiny_graphs import V, decoder_folder

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "onnx_decode.py"


@pytest.fixture(scope="module")
def decode():
    spec = importlib.util.spec_from_file_location("benchmark_onnx_decode", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_onnx_decode"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_onnx(decoder_folder(tmp_path_factory.mktemp("onnx"), "counting"), threads=1)


def test_equal_tokens_are_counted_from_the_first(decode):
    """What comes after a difference counts no more; 32 at most."""
    assert decode.leading([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert decode.leading([5] * 40, [5] * 40) == 32


def test_a_turn_is_greedy_decoding(decode, model):
    """The same tokens as `generate`, with both times."""
    turn = decode.in_onnxruntime(model)([3, 14, 15], 8)
    expected = model.generate(torch.tensor([[3, 14, 15]]), max_new_tokens=8, eos_token_id=[])
    assert turn["tokens"] == expected[0, 3:].tolist()
    assert turn["prefill_ms"] > 0
    assert turn["decode_ms"] > 0


def test_sides_take_turns_in_mirrored_orders(decode, monkeypatch):
    """A warm-up each, then every order is followed by its mirror image."""
    monkeypatch.setattr(decode, "REST_S", 0)
    seen = []
    sides = {name: lambda prompt, new, name=name: seen.append(name) or {"name": name} for name in "abc"}
    found = decode.take_turns(sides, [1], rounds=4)
    assert seen[:3] == ["a", "b", "c"]
    rounds = [seen[at : at + 3] for at in range(3, 15, 3)]
    assert rounds[1] == rounds[0][::-1]
    assert rounds[3] == rounds[2][::-1]
    assert {name: len(turns) for name, turns in found.items()} == {"a": 4, "b": 4, "c": 4}


def test_closeness_to_itself_and_to_chance(decode, model):
    """KL of a model to itself is 0 and it agrees with itself; to equal chances it is log V less its entropy."""
    windows = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(0))
    own = torch.stack([model(row[None]).logits[0].log_softmax(-1) for row in windows])
    itself = decode.closeness(model, windows, own)
    assert abs(itself["kl"]) < 1e-6
    assert itself["same_top"] == 1.0
    chance = torch.full_like(own, -torch.log(torch.tensor(float(V))))
    against = decode.closeness(model, windows, chance)
    assert against["kl"] == pytest.approx(float((chance.exp() * (chance - own)).sum(-1).mean()), rel=1e-4)
    assert against["kl_standard_error"] > 0


def test_a_side_that_failed_is_a_line_with_its_reason(decode):
    """It is not left out of the table."""
    found = {"sides": {"x, genai": {"failed": "RuntimeError: no | such type"}}}
    assert "| x, genai | failed: RuntimeError: no / such type |" in decode.table(found)
