"""Health of generated sequences, counted by hand and by brute force."""

import random

import pytest

from compressor.metrics.behaviour.generation import (
    common_prefix,
    distinct,
    generation_change,
    generation_health,
    longest_loop,
)

EOS = 0


def health(*sequences, limit=8):
    figures = generation_health(sequences, EOS, limit)
    return {name: estimate.value for name, estimate in figures.values.items() if estimate is not None}


def test_distinct_counts_different_ngrams():
    """1 2 1 2 3: three of five tokens, three of four pairs, three of three triples."""
    assert [distinct([1, 2, 1, 2, 3], n) for n in (1, 2, 3)] == [3 / 5, 3 / 4, 1.0]


def test_repeated_4grams_are_those_that_stood_earlier():
    """1 2 3 4 1 2 3 4 has five 4-grams, the last of which stood at the start."""
    assert health([1, 2, 3, 4, 1, 2, 3, 4])["repeated_4gram_share"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("tokens", "length"),
    [([], 0), ([1], 0), ([1, 2, 3], 0), ([1, 1], 2), ([5, 1, 2, 1, 2, 1, 7], 5), ([1, 2, 3, 1, 2], 0), ([4] * 9, 9)],
)
def test_longest_loop_by_hand(tokens, length):
    """Two turns of a piece at least; a turn that is cut short counts as far as it goes."""
    assert longest_loop(tokens) == length


def test_longest_loop_equals_brute_force():
    """Over all stretches and periods of 200 random sequences of two tokens."""
    for seed in range(200):
        draw = random.Random(seed)
        tokens = [draw.randrange(2) for _ in range(12)]
        expected = max(
            (
                end - start
                for start in range(12)
                for end in range(start + 1, 13)
                for period in range(1, (end - start) // 2 + 1)
                if all(tokens[at] == tokens[at - period] for at in range(start + period, end))
            ),
            default=0,
        )
        assert longest_loop(tokens) == expected


def test_what_follows_the_end_of_text_is_padding():
    """Cut at the first end-of-text, which is no token of the text."""
    assert health([1, 2, EOS, EOS, 7])["tokens"] == 2


def test_shares_that_ended_and_that_are_empty():
    """By end-of-text, by being short, at the limit, at once: three of four ended, one of four is empty."""
    values = health([1, 2, 3, EOS], [1, 2], [1, 2, 3, 4], [EOS], limit=4)
    assert (values["ended"], values["empty"]) == (0.75, 0.25)


def test_end_of_text_may_be_one_of_several():
    """Chat models end a turn with another token."""
    assert generation_health([[1, 9, 5]], (0, 9), 3).values["tokens"].value == 1


def test_short_sequences_are_left_out_of_what_they_do_not_have():
    """A sequence of one token has no pair; where none has, the figure is None with the reason."""
    figures = generation_health([[1], [1, 1, 1]], EOS, 8)
    assert figures.values["distinct_2"].value == 0.5
    assert figures.values["distinct_2"].n == 1
    assert figures.values["repeated_4gram_share"] is None
    assert figures.reasons == {"repeated_4gram_share": "no sequence is long enough"}


def test_longer_than_asked_is_refused():
    """Then something other than the continuation was given."""
    with pytest.raises(ValueError, match="sequence 0 has 3 tokens, at most 2"):
        generation_health([[1, 2, 3]], EOS, 2)


def test_nothing_generated_is_refused():
    """No sequences, no figures."""
    with pytest.raises(ValueError, match="no generated sequences"):
        generation_health([], EOS, 2)


def test_common_prefix_ends_at_the_first_difference():
    """And at the end of the shorter one."""
    assert [common_prefix([1, 2, 3], other) for other in ([1, 2, 4], [1, 2], [9], [1, 2, 3])] == [2, 2, 0, 3]


def test_change_is_candidate_minus_baseline_by_prompt():
    """Lengths 3 and 1 become 3 and 3: one token more on average; one of two prompts is the same."""
    figures = generation_change([[1, 2, 3, EOS], [1, EOS]], [[1, 2, 3, EOS], [1, 1, 1, EOS]], EOS, 4).values
    assert figures["tokens"].value == 1.0
    assert figures["identical"].value == 0.5
    assert figures["common_prefix"].value == (4 + 1) / 2
    assert figures["distinct_1"].value == pytest.approx((0 + 1 / 3 - 1) / 2)


def test_a_candidate_like_the_baseline_has_not_changed():
    """Nothing differs, and a share of eight prompts still has an interval."""
    rows = [[1, 2, 3, 4, 5, n] for n in range(1, 9)]
    figures = generation_change(rows, rows, EOS, 6).values
    assert (figures["tokens"].value, figures["tokens"].ci95) == (0.0, (0.0, 0.0))
    assert figures["identical"].value == 1.0
    assert figures["ended"].ci95[1] > 0


def test_other_prompts_are_refused():
    """Sequences have to pair."""
    with pytest.raises(ValueError, match="1 sequences and 2"):
        generation_change([[1]], [[1], [2]], EOS, 4)
