"""The one hook on experts: the same numbers as transformers, and every routed token seen."""

import pytest
import torch

from compressor.models import observe_experts
from tests.tiny_models import tiny_ids, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_observed_experts_equal_eager_ones(dtype):
    """The same output bits as transformers' own loop over experts."""
    model = tiny_model("qwen3_moe", dtype=dtype)
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(100, 64, generator=generator).to(dtype)
    _, gates, index = model.model.layers[0].mlp.gate(hidden)
    experts.config._experts_implementation = "eager"
    expected = experts(hidden, index, gates)
    with observe_experts(experts, None):
        assert torch.equal(experts(hidden, index, gates), expected)


@torch.no_grad()
def test_every_routed_token_is_seen():
    """8 windows of 32 tokens, top-2: 512 choices, the router's own."""
    model, ids = tiny_model("qwen3_moe"), tiny_ids()
    layer, calls, router = model.model.layers[1].mlp, [], []
    layer.gate.register_forward_hook(lambda _, arguments, result: router.append((arguments[0], *result[1:])))
    with observe_experts(layer.experts, calls.append):
        model(ids)
    assert sum(call.top_k_index.numel() for call in calls) == 8 * 32 * 2
    hidden, gates, index = router[0]
    assert torch.equal(calls[0].hidden, hidden)
    assert torch.equal(calls[0].top_k_index, index)
    assert torch.equal(calls[0].top_k_weights, gates)


@torch.no_grad()
def test_only_the_observed_layer_reports():
    """The config is shared by all layers; the other layer's calls stay unseen."""
    model, calls = tiny_model("qwen3_moe"), []
    with observe_experts(model.model.layers[0].mlp.experts, calls.append):
        model(tiny_ids(2))
    assert len(calls) == 1


def test_the_implementation_is_put_back_after_an_error():
    """An exception inside leaves the model as it was."""
    model = tiny_model("qwen3_moe")
    before = model.config._experts_implementation
    with pytest.raises(KeyError), observe_experts(model.model.layers[0].mlp.experts, None):
        raise KeyError
    assert model.config._experts_implementation == before
