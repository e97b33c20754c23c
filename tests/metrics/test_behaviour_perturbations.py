"""Perturbed prompts: what changes, and what never does."""

import subprocess
import sys

import pytest

from compressor.metrics.behaviour import perturbations
from compressor.metrics.behaviour.perturbations import CASE_RATE, DROP_RATE, TYPO_RATE, VARIANTS

CHOICES = "A. nitrogen\nB. oxygen\n(c) due to 12 gases\nAnswer:"
PROMPT = f"Question: Which of the following gases is not needed, because of the cold, by 24 fish?\n{CHOICES}"
LONG = " ".join(["the quick brown fox jumps over that lazy dog and does what foxes like."] * 200)


@pytest.fixture(params=sorted(VARIANTS))
def variant(request):
    return VARIANTS[request.param]


def test_every_variant_changes_an_ordinary_question(variant):
    """There is something to change in it for each of them."""
    assert variant(PROMPT, 0) != PROMPT


def test_choices_stay_as_they_are(variant):
    """Lettered lines come through every variant; the cue as well, unless it is reworded."""
    assert variant(PROMPT, 3).split("\n")[1:4] == CHOICES.split("\n")[:3]


def test_digits_stay(variant):
    """Another number would be another question."""
    assert "24" in variant(PROMPT, 1)


def test_the_answers_of_solved_examples_stay(variant):
    """What stands behind `Answer:` is an answer, not a prompt."""
    prompt = "Question: Is water wet?\nAnswer: Yes, because of its hydrogen.\n\nQuestion: Is fire hot today?\nAnswer:"
    assert variant(prompt, 0).split("\n")[1].endswith(": Yes, because of its hydrogen.")


def test_the_ends_of_a_prompt_stay(variant):
    """White space at either end decides how the prompt joins with what follows it."""
    changed = variant("  Which gas do fish not need here? \n", 0)
    assert (changed[:2], changed[-2:]) == ("  ", " \n")
    assert changed.strip()


@pytest.mark.parametrize("text", ["a", "I", "not", "Answer:", "42", " ", "é", "Zug", "魚は何を食べますか", "x" * 500])
def test_no_prompt_becomes_empty(variant, text):
    """However little there is to change, something is left."""
    assert variant(text, 0)


def test_an_empty_prompt_is_refused(variant):
    """A task without prompts cannot be perturbed."""
    with pytest.raises(ValueError, match="the prompt is empty"):
        variant("", 0)


def test_same_seed_same_text_in_another_process():
    """Python's own hashes differ between processes; ours must not, for they are part of an item's hash."""
    # The file alone, not the package, which would take seconds to import torch
    script = (
        "import runpy, sys; variants = runpy.run_path(sys.argv[1])['VARIANTS']; "
        "sys.stdout.write('\\x00'.join(variants[name](sys.argv[2], 5) for name in sorted(variants)))"
    )
    command = [sys.executable, "-c", script, perturbations.__file__, PROMPT]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}).stdout
    assert other.split("\0") == [VARIANTS[name](PROMPT, 5) for name in sorted(VARIANTS)]


@pytest.mark.parametrize("name", ["typos", "case_random", "drops", "distractor"])
def test_another_seed_gives_another_text(name):
    """Ten seeds give at least five texts."""
    assert len({VARIANTS[name](PROMPT, seed) for seed in range(10)}) >= 5


def test_typos_hit_one_letter_in_twenty():
    """Words of L letters are hit with 1 - 0.95 ** L; over 2,800 words the share is that, within a tenth."""
    words = LONG.split()
    hit = sum(one != other for one, other in zip(words, VARIANTS["typos"](LONG, 0).split(), strict=True))
    letters = [len(word.strip(".")) for word in words]
    assert hit == pytest.approx(sum(1 - (1 - TYPO_RATE) ** count for count in letters), rel=0.1)


def test_a_typo_is_one_slip_of_the_finger():
    """A changed word is one letter longer, one shorter, or of the same length with one key missed or two swapped."""
    for one, other in zip(LONG.split(), VARIANTS["typos"](LONG, 0).split(), strict=True):
        differing = [at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right]
        swapped = len(differing) == 2 and differing[1] == differing[0] + 1 and sorted(one) == sorted(other)
        assert abs(len(one) - len(other)) == 1 or len(differing) <= 1 or swapped


def test_one_letter_in_seven_changes_case():
    """The share of letters in the other case is CASE_RATE, within a tenth."""
    changed = VARIANTS["case_random"](LONG, 0)
    assert sum(map(str.isupper, changed)) == pytest.approx(CASE_RATE * sum(map(str.isalpha, LONG)), rel=0.1)


def test_one_word_in_ten_is_dropped_and_none_is_added():
    """Of 2,799 words that may go one in ten goes; the others keep their order."""
    words, kept = LONG.split(), VARIANTS["drops"](LONG, 0).split()
    remaining = iter(words)
    assert all(word in remaining for word in kept)
    assert len(words) - len(kept) == round(DROP_RATE * (len(words) - 1))


def test_words_that_turn_a_question_over_are_never_dropped():
    """Only `rain` may go: the first word, the negation and the end of an unfinished sentence stay."""
    assert {VARIANTS["drops"]("Without rain no plant42 except", seed) for seed in range(20)} == {
        "Without no plant42 except"
    }


def test_paraphrase_rewords_frame_contractions_and_phrases():
    """Each rule by hand: the frame by seed, the rest always."""
    prompt = "Question: They don't grow due to frost. What is the reason, for example?\nAnswer:"
    body = "They do not grow because of frost. What's the reason, for instance?"
    changed = {VARIANTS["paraphrase"](prompt, seed) for seed in range(30)}
    assert changed == {
        f"Q: {body}\nA:",
        f"Here is a question: {body}\nThe answer:",
        f"Please answer this question: {body}\nAnswer:",
        f"The question is: {body}\nThe answer is:",
    }


def test_paraphrase_leaves_alone_what_it_has_no_rule_for():
    """`Why don't you` has no plain long form, and `A:` is a choice where questions are called Question."""
    assert VARIANTS["paraphrase"]("Why don't you sing", 0) == "Why don't you sing"
    assert VARIANTS["paraphrase"]("Question: Which?\nA: one\nB: two", 0).endswith("\nA: one\nB: two")


def test_distractor_stands_before_the_question_that_is_asked():
    """Behind the last `Question:`, not among the solved examples."""
    solved = "Question: Is water wet?\nAnswer: Yes.\n\nQuestion: "
    changed = VARIANTS["distractor"](f"{solved}Is fire hot?", 0)
    assert changed.startswith(solved)
    assert changed.endswith(". Is fire hot?")
