"""When two models are told apart, and how often equal ones are."""

import math

import numpy as np
import pytest
from scipy import stats

from compressor.reports.ranking import WindowLosses, rank, seed_interval, told_apart


def losses(name, values, *, digest="x", seeds=()):
    windows = tuple(("text", i, digest) for i in range(len(values)))
    return WindowLosses(name, windows, tuple(values), (63,) * len(values), tuple(seeds))


def noisy(generator, base, spread=0.1):
    return base * np.exp(generator.normal(0, spread, len(base)))


def test_equal_losses_are_not_told_apart():
    """Not even by rounding."""
    values = np.random.default_rng(0).gamma(2, 0.05, 20)
    assert not told_apart([losses("a", values), losses("b", values + 1e-14)]).any()


def test_a_small_shift_shows_on_the_same_windows_only():
    """Windows differ by far more than the models do: pairs show it, independent samples do not."""
    generator = np.random.default_rng(0)
    base = generator.gamma(2, 0.05, 40)
    one, other = losses("a", noisy(generator, base, 0.01)), noisy(generator, base * 1.05, 0.01)
    assert told_apart([one, losses("b", other)])[0, 1]
    assert not told_apart([one, losses("b", other, digest="y")])[0, 1]


def test_equal_models_are_rarely_told_apart_however_many():
    """Ten equal models make 45 pairs; in at most 10 of 100 comparisons is any pair told apart (5 % are expected)."""
    generator = np.random.default_rng(0)
    false = 0
    for repeat in range(100):
        base = generator.gamma(2, 0.05, 16)
        models = [losses(str(v), noisy(generator, base)) for v in range(10)]
        false += bool(told_apart(models, seed=repeat).any())
    assert false <= 10


def test_the_spread_between_seeds_counts():
    """A difference that the windows show clearly is within what seeds change."""
    values = np.linspace(0.1, 0.2, 20)
    apart = told_apart([losses("a", values), losses("b", values * 1.05)])
    spread = told_apart([
        losses("a", values, seeds=(0.12, 0.15, 0.18)), losses("b", values * 1.05, seeds=(0.13, 0.157, 0.19)),
    ])  # fmt: skip
    assert (apart[0, 1], spread[0, 1]) == (True, False)


def test_one_window_tells_nothing_apart():
    """There is no spread to judge by."""
    assert not told_apart([losses("a", [0.1]), losses("b", [0.9])]).any()


def test_groups_begin_where_the_first_of_the_last_is_told_apart():
    """Two near-equal models share a group; the third has its own; a broken one comes last without any."""
    generator = np.random.default_rng(1)
    base = generator.gamma(2, 0.05, 60)
    models = [
        losses("broken", [math.nan] * 60), losses("far", noisy(generator, 3 * base)),
        losses("b", noisy(generator, base)), losses("a", noisy(generator, base)),
    ]  # fmt: skip
    places = rank(models)
    assert [place.group for place in places] == [1, 1, 2, None]
    assert [place.name for place in places][2:] == ["far", "broken"]
    assert set(places[0].alike) | {places[0].name} == {"a", "b"}


def test_a_model_that_was_not_measured_has_no_place():
    """No windows: no loss, no group."""
    places = rank([losses("a", [0.1, 0.2, 0.3]), WindowLosses("b", (), (), ())])
    assert [(place.name, place.group) for place in places] == [("a", 1), ("b", None)]


def test_the_interval_over_seeds_is_a_t_interval():
    """Three seeds, against scipy's; one seed has none."""
    values = (0.10, 0.13, 0.11)
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert seed_interval(values).ci95 == pytest.approx(expected)
    assert seed_interval(values[:1]) is None
