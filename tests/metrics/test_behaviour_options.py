"""Options of the behaviour section: defaults that work, and errors that say what is possible."""

import pytest
from pydantic import ValidationError

from compressor.metrics.behaviour.options import Bias, Generation, Ood, Refusals, Robustness, Similarity
from compressor.metrics.behaviour.perturbations import VARIANTS


def test_an_unknown_variant_lists_what_is_possible():
    """With the nearest name first."""
    with pytest.raises(ValidationError, match=r"no variant 'typo' \(did you mean 'typos'\?\); possible are typos, "):
        Robustness(variants=("typo",))


def test_a_variant_is_asked_once():
    """Twice would be the same numbers at twice the time."""
    with pytest.raises(ValidationError, match="once, not twice: drops, drops"):
        Robustness(variants=("drops", "drops"))


def test_default_variants_are_known():
    """All of them."""
    assert set(Robustness().variants) <= set(VARIANTS)


def test_the_schema_lists_the_variants():
    """Editors offer them."""
    assert Robustness.model_json_schema()["properties"]["variants"]["items"]["enum"] == list(VARIANTS)


@pytest.mark.parametrize("options", [Robustness, Bias, Generation, Refusals])
def test_options_without_anything_have_defaults(options):
    """And are frozen."""
    made = options()
    with pytest.raises(ValidationError, match="frozen"):
        made.seed = 1


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (Robustness, {"tasks": []}), (Robustness, {"variants": []}), (Robustness, {"seeds": 1}), (Ood, {"text": {}}),
        (Ood, {}), (Generation, {"prompts": 0}), (Similarity, {"data": "x", "items": 2}), (Similarity, {}),
        (Bias, {"templates": ""}), (Refusals, {"max_new_tokens": 0}),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, wrong):
    """Empty, too few, unknown or missing."""
    with pytest.raises(ValidationError):
        options(**wrong)
