import pytest
import torch

from compressor.algorithms.masks import highest, n_of_m, top_fraction
from compressor.algorithms.saliency import reap, wanda


def test_top_fraction_keeps_the_highest_of_each_row():
    """Half of each row goes, whatever the other rows hold."""
    score = torch.tensor([[1.0, 4.0, 2.0, 3.0], [40.0, 10.0, 30.0, 20.0]])
    assert torch.equal(top_fraction(score, 0.5), torch.tensor([[False, True, False, True], [True, False, True, False]]))


def test_two_of_four_keeps_two_in_every_four_neighbours():
    """The two highest of each quadruple."""
    score = torch.tensor([[1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0]])
    assert n_of_m(score, 2, 4).tolist() == [[False, True, False, True, True, True, False, False]]


def test_rows_that_do_not_divide_are_refused():
    """A ragged last group would silently keep too much."""
    with pytest.raises(ValueError, match="6 weights do not divide into 2:4"):
        n_of_m(torch.ones(1, 6), 2, 4)


def test_highest_is_ascending_and_prefers_lower_indices():
    """Experts keep their order, so that the router's rows do."""
    assert highest(torch.tensor([0.5, 2.0, 0.5, 1.0]), 3).tolist() == [0, 1, 3]


def test_wanda_multiplies_by_the_input_norm():
    """A small weight on a loud input outranks a large one on a silent input."""
    assert torch.equal(wanda(torch.tensor([[-1.0, 3.0]]), torch.tensor([4.0, 1.0])), torch.tensor([[4.0, 3.0]]))


def test_reap_is_a_mean_over_routed_tokens():
    """Frequency alone does not raise the score; an unused expert scores zero."""
    assert reap(torch.tensor([6.0, 6.0, 0.0]), torch.tensor([2, 3, 0])).tolist() == [3.0, 2.0, 0.0]
