"""What each expert saw, and what a starved one borrows."""

import pytest
import torch

from compressor.calibration import ExpertInputs, GatheredInputs
from compressor.models import Routed, observe_experts, wrap_live
from tests.tiny_models import tiny_ids, tiny_model


@pytest.fixture
def stack():
    return wrap_live(tiny_model("qwen3_moe")).anatomy(0).experts


def route(stack, hidden):
    with torch.no_grad():
        _, gates, index = stack.router(hidden)
    return Routed(hidden, index, gates)


def hidden_states(tokens=200, seed=0):
    return torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed))


def starve(stack, expert):
    """No token's top-2 is this expert: of each pair of opposite rows one logit is above its zero."""
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    weight = torch.cat([rows, -rows])[torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])]
    weight[expert] = 0
    stack.router.weight.data = weight


@torch.no_grad()
def test_counts_are_the_routers_top_k():
    """Over several batches: as often as the expert is among a token's two highest logits."""
    model, ids, logits = tiny_model("qwen3_moe"), tiny_ids(), []
    inputs = ExpertInputs(wrap_live(model).anatomy(1).experts)
    layer = model.model.layers[1].mlp
    layer.gate.register_forward_hook(lambda _, arguments, result: logits.append(result[0]))
    with observe_experts(layer.experts, inputs):
        for part in ids.split(3):
            model(part)
    chosen = torch.cat(logits).topk(2).indices
    assert inputs.gather().counts() == torch.bincount(chosen.flatten(), minlength=8).tolist()


def test_each_expert_gets_its_rows_and_gates(stack):
    """Rows in the order of the tokens, gates as the model applies them (renormalised over the top-2)."""
    inputs, hidden = ExpertInputs(stack), hidden_states()
    for part in hidden.split(64):
        inputs(route(stack, part))
    gathered, whole = inputs.gather(), route(stack, hidden)
    for expert in range(8):
        rows, slots = torch.where(whole.top_k_index == expert)
        assert torch.equal(gathered.tokens[expert], rows)
        assert torch.allclose(gathered.gates[expert], whole.top_k_weights[rows, slots], atol=1e-6)


def test_nothing_is_borrowed_by_an_expert_with_enough_tokens(stack):
    """Its own rows, no affinities."""
    inputs, hidden = ExpertInputs(stack), hidden_states()
    inputs(route(stack, hidden))
    gathered = inputs.gather()
    x, affinity = gathered.inputs_of(3, at_least=len(gathered.tokens[3]))
    assert affinity is None
    assert torch.equal(x, hidden[gathered.tokens[3]])


def test_a_starved_expert_borrows_what_its_router_would_send_next(stack):
    """Ten tokens more: those with the highest router probability among the tokens that went elsewhere."""
    inputs, hidden = ExpertInputs(stack), hidden_states()
    inputs(route(stack, hidden))
    gathered = inputs.gather()
    own = gathered.tokens[3]
    x, affinity = gathered.inputs_of(3, at_least=len(own) + 10)
    probability = torch.softmax(hidden @ stack.router.weight.T, dim=-1)[:, 3]
    elsewhere = torch.tensor([row for row in range(200) if row not in set(own.tolist())])
    expected = elsewhere[probability[elsewhere].topk(10).indices]
    assert torch.equal(x, hidden[torch.cat([own, expected])])
    relative = (probability[expected] / probability[own].mean()).clamp(max=1)
    assert torch.allclose(affinity, torch.cat([torch.ones(len(own)), relative]), atol=1e-5)


def test_affinity_is_at_most_one(stack):
    """Also for borrowed tokens more probable than the mean of the expert's own."""
    inputs = ExpertInputs(stack)
    inputs(route(stack, hidden_states()))
    _, affinity = inputs.gather().inputs_of(3, at_least=200)
    assert len(affinity) == 200
    assert affinity.max() == 1
    assert affinity.min() > 0


def test_no_more_tokens_are_borrowed_than_there_are(stack):
    """All 200 once, though 1,000 were asked for."""
    inputs = ExpertInputs(stack)
    inputs(route(stack, hidden_states()))
    x, _ = inputs.gather().inputs_of(3, at_least=1000)
    assert len(x) == 200


def test_an_expert_without_tokens_borrows_all(stack):
    """Affinity relative to the most probable of the borrowed tokens."""
    starve(stack, 2)
    inputs = ExpertInputs(stack)
    inputs(route(stack, hidden_states()))
    gathered = inputs.gather()
    assert gathered.counts()[2] == 0
    x, affinity = gathered.inputs_of(2, at_least=50)
    assert x.shape == (50, 64)
    assert affinity.max() == 1


def test_an_expert_that_is_never_probable_borrows_with_finite_weights(stack):
    """A router probability of exactly 0 for every token (underflow) still gives affinities, not NaN."""
    stack.router.weight.data.zero_()
    stack.router.weight.data[:, 0] = torch.tensor([1000.0, 900, 0, 0, 0, 0, 0, 0])
    hidden = hidden_states().abs()
    call = route(stack, hidden + 1)
    gathered = GatheredInputs(stack, call.hidden, [torch.empty(0, dtype=torch.long)] * 8, [torch.empty(0)] * 8)
    _, affinity = gathered.inputs_of(7, at_least=10)
    assert torch.isfinite(affinity).all()
    assert affinity.max() <= 1
