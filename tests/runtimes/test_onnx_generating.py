"""Greedy and drawn continuations, many rows at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compressor.errors import RecipeError
from compressor.runtimes import open_onnx
from compressor.runtimes.generating import generate
from tests.runtimes.tiny_graphs import EOS, KINDS, V, decoder_folder, expected_logits

PROMPTS = ([3, 14, 15, 9, 2, 6], [5, 35, 8])


class FakeModel:
    """Gives the same logits `[V]` for every next token, or those that a list says step by step for each row."""

    generation_config = SimpleNamespace(eos_token_id=[EOS, 8])
    device = torch.device("cpu")

    def __init__(self, logits=None, script=None):
        self.logits, self.script, self.seen = logits, script, []

    def __call__(self, ids, mask, positions, past_key_values=None, logits_to_keep=0):
        self.seen.append((ids.clone(), mask.clone(), positions.clone()))
        step = len(self.seen) - 1
        if self.script is not None:
            logits = torch.nn.functional.one_hot(torch.tensor(self.script[step]), V).float()[:, None]
        else:
            logits = self.logits.expand(len(ids), 1, -1).clone()
        return SimpleNamespace(logits=logits, past_key_values="cache")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_one_row_alone(tmp_path, kind):
    """Two prompts of different length, twelve tokens each, against numpy without cache and padding."""
    model = open_onnx(decoder_folder(tmp_path, kind), threads=1)
    ids, mask = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, 6 - len(prompt) :], mask[row, 6 - len(prompt) :] = torch.tensor(prompt), 1
    found = model.generate(ids, mask, max_new_tokens=12, eos_token_id=[])
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for _ in range(12):
            text.append(int(expected_logits(kind, np.array(text))[-1].argmax()))
        assert found[row, 6 - len(prompt) :].tolist() == text


def test_each_row_ends_by_itself():
    """A row that has ended is filled up while others go on; the last end stops the loop."""
    model = FakeModel(script=[[1, 2], [EOS, 3], [4, 8], [5, 5]])
    found = generate(model, torch.tensor([[9], [9]]), max_new_tokens=10, pad_token_id=0)
    assert found.tolist() == [[9, 1, EOS, 0], [9, 2, 3, 8]]
    assert len(model.seen) == 3


def test_ends_of_ones_own():
    """An end of one's own replaces the model's, none runs to the length, and a least number of tokens can be asked."""
    script = [[EOS], [5], [6]]
    ids = torch.tensor([[9]])
    assert generate(FakeModel(script=script), ids, max_new_tokens=3, eos_token_id=5).tolist() == [[9, EOS, 5]]
    assert generate(FakeModel(script=script), ids, max_new_tokens=3, eos_token_id=[]).tolist() == [[9, EOS, 5, 6]]
    longer = generate(FakeModel(script=script), ids, max_new_tokens=3, min_new_tokens=2)[0, 1]
    assert longer not in (EOS, 8)


def test_positions_count_tokens_not_padding():
    """A row padded on the left begins at position 0 with its first token."""
    model = FakeModel(script=[[1, 1], [2, 2]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    generate(model, torch.full((2, 3), 9), mask, max_new_tokens=2)
    (_, _, first), (_, second_mask, second) = model.seen
    assert first.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert second.tolist() == [[3], [1]]
    assert second_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def drawn(shares: dict[int, float], rows: int = 4000, **options) -> dict[int, float]:
    """How often each token is drawn from given probabilities."""
    logits = torch.full((V,), -torch.inf)
    for token, share in shares.items():
        logits[token] = float(np.log(share))
    prompts = torch.zeros(rows, 1, dtype=torch.int64)
    found = generate(FakeModel(logits), prompts, max_new_tokens=1, do_sample=True, **options)[:, 1]
    tokens, counts = found.unique(return_counts=True)
    return dict(zip(tokens.tolist(), (counts / rows).tolist(), strict=True))


SHARES = {10: 0.5, 11: 0.25, 12: 0.15, 13: 0.1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SHARES),
        ({"temperature": 0.5}, {10: 0.25 / 0.345, 11: 0.0625 / 0.345, 12: 0.0225 / 0.345, 13: 0.01 / 0.345}),
        ({"top_k": 2}, {10: 2 / 3, 11: 1 / 3}),
        ({"top_p": 0.6}, {10: 2 / 3, 11: 1 / 3}),
        ({"top_p": 0.01}, {10: 1.0}),
        # Of the two that remain the first holds two thirds, so a share of 0.6 leaves it alone.
        ({"top_k": 2, "top_p": 0.6}, {10: 1.0}),
    ],
)
def test_draws_follow_the_probabilities(options, expected):
    """Frequencies of 4,000 draws: as the model says, sharpened by temperature, cut by top_k and top_p."""
    found = drawn(SHARES, **options)
    assert found.keys() == expected.keys()
    assert all(abs(found[token] - share) < 0.04 for token, share in expected.items())


def test_a_seed_draws_the_same():
    """The same seed, the same tokens; another one, others."""
    logits = torch.zeros(V)
    ids = torch.zeros(4, 1, dtype=torch.int64)

    def tokens(seed: int) -> list:
        return generate(FakeModel(logits), ids, max_new_tokens=8, do_sample=True, seed=seed, eos_token_id=[]).tolist()

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it has to be above 0"),
        ({"top_p": 0.0}, "top_p 0.0; possible are"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_settings_that_mean_nothing(options, message):
    """They are refused before anything is computed."""
    with pytest.raises(RecipeError, match=message):
        generate(FakeModel(), torch.zeros(1, 1, dtype=torch.int64), **{"max_new_tokens": 1, **options})
