"""Tokens per expert, and how the shares moved."""

import json
import math

import pytest
import torch

from compressor.metrics.routing import RoutingCounts, measure_routing, total_variation


def test_counts_add_up_over_batches():
    """Each token counts once for each expert that it was sent to."""
    counts = RoutingCounts(num_experts=4)
    counts.observe(2, torch.tensor([[0, 1], [0, 3]]))
    counts.observe(2, torch.tensor([[3, 0]]))
    assert counts.tokens[2].tolist() == [3, 1, 0, 2]


def test_an_expert_that_does_not_exist_is_an_error():
    """A router that was not cut with its experts."""
    with pytest.raises(ValueError, match="expert 4 of 4"):
        RoutingCounts(num_experts=4).observe(0, torch.tensor([[4]]))


def test_even_use_has_all_experts_effective():
    """Entropy is log E, its exponential E."""
    use = measure_routing({0: torch.tensor([5, 5, 5, 5])}).layers[0]
    assert use.entropy == pytest.approx(math.log(4))
    assert use.effective_experts == pytest.approx(4)
    assert use.dead == ()


def test_experts_without_tokens_are_dead():
    """All tokens in one expert: three dead, one effective."""
    use = measure_routing({0: torch.tensor([0, 9, 0, 0])}).layers[0]
    assert use.dead == (0, 2, 3)
    assert use.effective_experts == 1.0


def test_shift_is_the_share_that_moved():
    """Half of all tokens went from expert 0 to expert 1."""
    use = measure_routing({0: torch.tensor([0, 10])}, {0: torch.tensor([10, 10])}).layers[0]
    assert use.shift == 0.5


def test_total_variation_is_one_for_disjoint_distributions():
    """And zero for equal ones."""
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert total_variation(torch.tensor([0.3, 0.7]), torch.tensor([0.3, 0.7])) == 0.0


def test_other_number_of_experts_without_a_map_gives_a_reason():
    """Shares over different experts cannot be compared."""
    use = measure_routing({0: torch.tensor([1, 1])}, {0: torch.tensor([1, 1, 1])}).layers[0]
    assert use.shift is None
    assert "from 3 to 2" in use.shift_reason


def test_kept_experts_are_compared_with_their_old_selves():
    """The baseline is restricted to the kept experts, in their new order, and renormalised."""
    before = torch.tensor([10, 20, 30, 40])
    use = measure_routing({0: torch.tensor([40, 10])}, {0: before}, kept={0: [3, 0]}).layers[0]
    assert use.shift == pytest.approx(0.0)
    assert use.removed_share == pytest.approx(0.5)


def test_a_map_that_does_not_fit_is_an_error():
    """Three experts cannot be the two kept ones."""
    with pytest.raises(ValueError, match="layer 0"):
        measure_routing({0: torch.tensor([1, 1, 1])}, {0: torch.tensor([1, 1, 1, 1])}, kept={0: [0, 1]})


def test_result_is_json_with_the_layers_in_order():
    """The largest shift stands on top, reasons beside nulls."""
    result = measure_routing({3: torch.tensor([2, 2]), 1: torch.tensor([4, 0])}, {1: torch.tensor([2, 2])})
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["shift_max"] == 0.5
    assert [layer["layer"] for layer in document["layers"]] == [1, 3]
    assert document["layers"][1]["shift_reason"] == "the baseline has no such layer"
    assert [row.tokens for row in result.section()] == [(4, 0), (2, 2)]
