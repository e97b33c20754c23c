"""Template swaps and stereotype pairs: what moved, by how much, and which group is the worst."""

import json

import numpy as np
import pytest

from compressor.errors import RecipeError
from compressor.metrics.behaviour.bias import (
    PERSON,
    Templates,
    preference,
    preference_shift,
    read_templates,
    score_swaps,
    swaps,
    template_bias,
)
from compressor.reports.items import TaskItem

TEMPLATES = Templates(
    tuple((f"{n} {PERSON} is", " good", " bad") for n in range(30)),
    {"age": {"young": "Y", "old": "O"}, "place": {"here": "H", "there": "T", "far": "F"}},
)


def test_swaps_put_every_person_into_every_sentence():
    """30 templates with 2 and 3 people."""
    items = swaps(TEMPLATES)
    assert len(items) == 30 * 5
    assert items[1].context == "0 O is"


def test_score_is_the_difference_of_two_log_likelihoods():
    """In the order of the items; the function is asked for both endings."""
    items = swaps(TEMPLATES)[:2]
    loglik = {("0 Y is", " good"): -1.0, ("0 Y is", " bad"): -3.0, ("0 O is", " good"): -2.0, ("0 O is", " bad"): -1.5}
    assert score_swaps(items, lambda asked: [loglik[pair] for pair in asked]).tolist() == [2.0, -0.5]


def scores(seed, **shifts):
    """Scores with a template effect shared by all people, noise, and a shift for some people."""
    generator = np.random.default_rng(seed)
    effect = generator.normal(0, 5, 30)
    noise = generator.normal(0, 0.1, 150)
    return np.array(
        [effect[item.template] + noise[n] + shifts.get(item.person, 0.0) for n, item in enumerate(swaps(TEMPLATES))]
    )


def test_scores_are_relative_to_the_other_people_in_the_sentence():
    """A planted advantage of 1.2 nats for `far` is +0.8 for it and -0.4 for the other two; the spread is 1.2."""
    place = template_bias(swaps(TEMPLATES), scores(0, far=1.2)).values["place"]
    assert {name: estimate.value for name, estimate in place["score"].items()} == pytest.approx(
        {"here": -0.4, "there": -0.4, "far": 0.8}, abs=0.06
    )
    assert place["spread"].value == pytest.approx(1.2, abs=0.08)


def test_a_sentence_that_all_people_share_adds_no_uncertainty():
    """Template effects of 5 nats cancel: the interval is as wide as the noise of 0.1 makes it."""
    low, high = template_bias(swaps(TEMPLATES), scores(0)).values["place"]["score"]["far"].ci95
    assert high - low < 0.15


def test_the_group_that_moved_most_is_named():
    """`old` lost 0.6 against `young`: each moved by 0.3, and the interval does not reach 0."""
    age = template_bias(swaps(TEMPLATES), scores(0, old=-0.6), scores(0)).values["age"]
    [(name, worst)] = age["worst"].items()
    assert name in ("young", "old")
    assert abs(worst.value) == pytest.approx(0.3)
    assert age["change"]["old"].value == pytest.approx(-0.3)
    assert age["spread_change"].value == pytest.approx(0.6, abs=0.05)


def test_the_interval_of_the_worst_is_wider_than_its_own():
    """It allows for having been picked among three."""
    place = template_bias(swaps(TEMPLATES), scores(1), scores(2)).values["place"]
    [(name, worst)] = place["worst"].items()
    own = place["change"][name]
    assert worst.value == own.value
    assert worst.ci95[1] - worst.ci95[0] > own.ci95[1] - own.ci95[0]


def test_the_bundled_templates_are_whole():
    """24 sentences; every person fits each, and no two swaps ask the same."""
    templates = read_templates("demo")
    items = swaps(templates)
    assert len(templates.sentences) == 24
    assert len({(item.context, item.positive) for item in items}) == len(items) == 24 * 20
    assert not any(PERSON in item.context for item in items)


TWO = {"age": {"a": "A", "b": "B"}}


@pytest.mark.parametrize(
    ("people", "templates", "message"),
    [
        (TWO, [], "a mapping with 'people' and 'templates'"),
        (TWO, [["x"]], r"templates\[0\] needs sentence, positive, negative"),
        (TWO, [{"sentence": "x", "positive": " y", "negative": " n"}], r"templates\[0\].sentence has no \{person\}"),
        ({"age": {"a": "A"}}, [{"sentence": "{person}", "positive": " y", "negative": " n"}], "needs two or more"),
    ],
)
def test_templates_that_cannot_be_used_say_where(tmp_path, people, templates, message):
    """The file and the entry."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"people": people, "templates": templates}))
    with pytest.raises(RecipeError, match=message):
        read_templates(path)


def test_templates_that_are_not_there(tmp_path):
    """What is possible instead."""
    with pytest.raises(RecipeError, match=r"possible are demo or a \.json file"):
        read_templates(tmp_path / "none.json")


def pairs(**slices):
    """Items of a preference task: slice -> string of 1 (stereotype preferred) and 0."""
    bits = [(name, bit) for name, text in slices.items() for bit in text]
    return [
        TaskItem(task="crows", item=n, sha256=str(n), score=float(bit), prompt="", prediction="", slice=name)
        for n, (name, bit) in enumerate(bits)
    ]


def test_preference_by_slice_and_over_all():
    """3 of 4 and 1 of 4: one half over all."""
    shares = preference(pairs(age="1110", race="1000")).values["crows"]["preference"]
    assert {name: estimate.value for name, estimate in shares.items()} == {"all": 0.5, "age": 0.75, "race": 0.25}


def test_shift_away_from_one_half():
    """Age goes from 0.75 to 1 (0.25 farther), race from 0.25 to 0.5 (0.25 nearer): age is the worst slice."""
    figures = preference_shift(pairs(age="1110", race="1000"), pairs(age="1111", race="1100")).values["crows"]
    assert {name: estimate.value for name, estimate in figures["change"].items()} == {
        "all": 0.25, "age": 0.25, "race": 0.25,
    }  # fmt: skip
    assert {name: estimate.value for name, estimate in figures["distance_change"].items()} == {
        "all": 0.25, "age": 0.25, "race": -0.25,
    }  # fmt: skip
    assert {name: estimate.value for name, estimate in figures["worst"].items()} == {"age": 0.25}


def test_distance_interval_turns_around_at_one_half():
    """From 0.45 the share cannot come nearer to one half than 0.05, however uncertain the change is."""
    before = pairs(age="1" * 9 + "0" * 11)
    change = preference_shift(before, before).values["crows"]["distance_change"]["age"]
    assert change.value == 0.0
    assert change.ci95[0] == pytest.approx(-0.05)
    assert change.ci95[1] > 0.05


def test_a_worst_slice_is_worst_with_allowance():
    """Its interval is wider than the slice's own."""
    before, after = pairs(age="10" * 20, race="10" * 20), pairs(age="10" * 18 + "1111", race="10" * 20)
    figures = preference_shift(before, after).values["crows"]
    assert figures["worst"]["age"].ci95[1] > figures["distance_change"]["age"].ci95[1]
