"""The gate's statistics against definitions, enumeration and scipy. N items; a drop is baseline - candidate."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from compressor.gates.sample_size import items_needed, items_to_pass, minimum_detectable_effect
from compressor.gates.statistics import (
    Comparison,
    compare,
    holm,
    holm_adjusted,
    mcnemar_one_sided,
    paired_drop,
    tango_interval,
)

Z95 = stats.norm.ppf(0.975)


def records(lost, gained, n):
    """0/1 scores of both models `[N]` with so many items lost and gained; half of the others are right."""
    baseline_N, candidate_N = np.zeros(n), np.zeros(n)
    baseline_N[:lost] = 1
    candidate_N[lost : lost + gained] = 1
    both = lost + gained + (n - lost - gained) // 2
    baseline_N[lost + gained : both] = candidate_N[lost + gained : both] = 1
    return baseline_N, candidate_N


def likelihood_score(lost, gained, n, drop):
    """The score statistic of a drop with the rates found by maximising the likelihood numerically."""

    def negative(rate):
        cells = [(lost, rate + drop), (gained, rate), (n - lost - gained, 1 - 2 * rate - drop)]
        return -sum(count * math.log(share) for count, share in cells if count)

    bounds = (max(0.0, -drop) + 1e-12, (1 - drop) / 2 - 1e-12)
    rate = optimize.minimize_scalar(negative, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (lost - gained - n * drop) / math.sqrt(n * (2 * rate + drop - drop**2))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 7), (5, 0), (46, 28), (28, 46), (1, 1)])
def test_mcnemar_is_the_upper_tail_of_a_fair_coin(lost, gained):
    """Among the flips, losses are as likely as gains when neither model is better."""
    expected = stats.binom.sf(lost - 1, lost + gained, 0.5)
    assert mcnemar_one_sided(lost, gained) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("lost", "gained", "n"), [(7, 1, 21), (25, 28, 618), (46, 28, 1000), (3, 9, 40), (2, 5, 12)])
def test_both_ends_of_the_interval_are_where_the_score_statistic_is_196(lost, gained, n):
    """The definition of Tango's interval, with the restricted rates from a numerical optimiser."""
    low, high = tango_interval(lost, gained, n)
    assert likelihood_score(lost, gained, n, low) == pytest.approx(Z95, abs=1e-5)
    assert likelihood_score(lost, gained, n, high) == pytest.approx(-Z95, abs=1e-5)


def test_the_interval_agrees_with_a_published_example():
    """The airway example of Tango's paper, as the R packages ratesci and PropCIs give it: [0.026, 0.517]."""
    assert tango_interval(7, 1, 21) == pytest.approx((0.026, 0.517), abs=5e-4)


def test_identical_answers_still_leave_doubt():
    """Without any flip the interval ends at z² / (n + z²), about 3.84 / n, on both sides."""
    end = Z95**2 / (250 + Z95**2)
    assert tango_interval(0, 0, 250) == pytest.approx((-end, end), rel=1e-9)


@pytest.mark.parametrize(("lost_rate", "gained_rate"), [(0.04, 0.04), (0.1, 0.02), (0.02, 0.1), (0.2, 0.1)])
def test_the_interval_covers_the_true_drop_on_small_samples(lost_rate, gained_rate):
    """Exact coverage with 40 items, summed over all outcomes: at least 94 %, each side missed in under 4 %."""
    n, true = 40, lost_rate - gained_rate
    below = above = 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            chance = stats.binom.pmf(lost, n, lost_rate)
            chance *= stats.binom.pmf(gained, n - lost, gained_rate / (1 - lost_rate))
            if chance > 1e-7:
                low, high = tango_interval(lost, gained, n)
                below, above = below + chance * (high < true), above + chance * (low > true)
    assert below + above <= 0.06
    assert max(below, above) <= 0.04


def test_the_bootstrap_interval_agrees_with_scipy():
    """BCa ends on skewed drops, within a tenth of the width (two independent resamplings)."""
    generator = np.random.default_rng(5)
    baseline_N, candidate_N = generator.lognormal(size=80), generator.normal(size=80)
    ours = paired_drop(baseline_N, candidate_N, resamples=10_000)
    theirs = stats.bootstrap((baseline_N - candidate_N,), np.mean, n_resamples=10_000, rng=1, method="BCa")
    low, high = theirs.confidence_interval
    assert ours.value == pytest.approx(np.mean(baseline_N - candidate_N))
    assert ours.ci95 == pytest.approx((low, high), abs=0.1 * (high - low))


def test_the_bootstrap_is_deterministic():
    """The same scores and seed give the same interval to the bit; another seed another one."""
    generator = np.random.default_rng(0)
    baseline_N, candidate_N = generator.normal(size=50), generator.normal(size=50)
    first = paired_drop(baseline_N, candidate_N)
    assert paired_drop(baseline_N, candidate_N) == first
    assert paired_drop(baseline_N, candidate_N, seed=1).ci95 != first.ci95


def test_items_of_a_passage_count_for_less_than_independent_ones():
    """Where each of 50 passages flips as a whole, ten questions a passage are worth one: the interval of 50 items."""
    baseline_N, candidate_N = records(6, 2, 50)
    clusters = [passage for passage in range(50) for _ in range(10)]
    clustered = paired_drop(np.repeat(baseline_N, 10), np.repeat(candidate_N, 10), clusters)
    assert (clustered.value, clustered.n) == (pytest.approx(0.08), 500)
    # An unbiased variance (49 instead of 50 in the denominator) makes it a little wider.
    assert clustered.ci95 == pytest.approx(tango_interval(6, 2, 50), abs=0.003)


def test_clusters_of_one_item_change_nothing():
    """Naming each item as its own cluster gives the comparison without clusters."""
    baseline_N, candidate_N = records(9, 3, 100)
    assert compare(baseline_N, candidate_N, margin=0.01, clusters=list(range(100))) == compare(
        baseline_N, candidate_N, margin=0.01
    )


def test_sign_flips_of_few_clusters_are_counted_in_full():
    """With six continuous drops the p-value is the share of the 64 sign patterns with at least the observed sum."""
    drops = [0.5, 0.2, -0.1, 0.4, 0.3, 0.05]
    patterns = list(itertools.product((1, -1), repeat=6))
    sums = [sum(sign * drop for sign, drop in zip(signs, drops, strict=True)) for signs in patterns]
    expected = sum(total >= sum(drops) - 1e-12 for total in sums) / 64
    assert compare(drops, np.zeros(6), margin=0).p_value == pytest.approx(expected)


def test_random_sign_flips_agree_with_the_exact_test():
    """On drops of equal size the sign-flip test is McNemar's; 9,999 flips give it within 0.01."""
    baseline_N, candidate_N = records(30, 20, 200)
    assert compare(2 * baseline_N, 2 * candidate_N, margin=0).p_value == pytest.approx(
        mcnemar_one_sided(30, 20), abs=0.01
    )


@pytest.mark.parametrize(
    ("lost", "gained", "n", "margin", "status"),
    [
        (60, 20, 1000, 0.0075, "fail"),  # significant and beyond the margin
        (60, 20, 1000, 0.10, "pass"),  # significant, but the whole interval is within the margin
        (60, 20, 1000, 0.045, "inconclusive"),  # significant; the estimate is within the margin, its upper end is not
        (42, 38, 1000, 0.0075, "inconclusive"),
        (40, 40, 1000, 0.03, "pass"),
        (20, 60, 1000, 0.0, "pass"),  # shown to be better
        (0, 0, 250, 0.0075, "inconclusive"),  # 250 items without a flip cannot exclude 0.75 points
        (0, 0, 1000, 0.0075, "pass"),
        (4, 0, 100, 0.0, "inconclusive"),  # the interval excludes 0, the exact test (p = 0.0625) does not
    ],
)
def test_verdict_of_a_comparison(lost, gained, n, margin, status):
    """Each of the three answers, from flips that a person can judge."""
    found = compare(*records(lost, gained, n), margin=margin)
    assert (found.status, found.lost, found.gained, found.n) == (status, lost, gained, n)


def test_without_tolerance_a_significant_loss_within_the_margin_fails():
    """`tolerance=0` makes a failure of what is undecided by default: 4 points lost of 4.5 that are allowed."""
    pair = records(60, 20, 1000)
    assert compare(*pair, margin=0.045, tolerance=0).status == "fail"
    assert compare(*pair, margin=0.0075, tolerance=0.05).status == "fail"  # the whole interval is above the margin
    assert compare(*pair, margin=0.03, tolerance=0.05).status == "inconclusive"


def test_equal_models_fail_in_at_most_five_percent():
    """Exact false alarms with 60 items and 20 % flips, summed over the outcomes; the interval alone would exceed it."""
    n, flip_rate, alarms = 60, 0.2, 0.0
    for flips in range(n + 1):
        for lost in range(flips + 1):
            chance = stats.binom.pmf(flips, n, flip_rate) * stats.binom.pmf(lost, flips, 0.5)
            if chance > 1e-7:
                alarms += chance * (compare(*records(lost, flips - lost, n), margin=0.0).status == "fail")
    assert 0.01 < alarms <= 0.05


@pytest.mark.parametrize(
    ("lost", "gained", "margin", "decided"),
    [(20, 16, 0.03, "pass"), (8, 8, 0.01, "pass"), (24, 16, 0.005, "fail"), (0, 0, 0.005, "pass")],
)
def test_so_many_items_decide_when_the_rates_stay(lost, gained, margin, decided):
    """With the items that an undecided comparison asks for, at the same rates, it is decided; with 30 % fewer not."""
    found = compare(*records(lost, gained, 400), margin=margin)
    assert found.status == "inconclusive"
    for share, status in ((1.02, decided), (0.7, "inconclusive")):
        factor = share * found.items_needed / 400
        n = round(400 * factor)
        assert compare(*records(round(lost * factor), round(gained * factor), n), margin=margin).status == status


def test_a_drop_on_the_limit_is_decided_by_no_number_of_items():
    """An estimate that equals the margin stays undecided."""
    assert compare(*records(10, 5, 500), margin=0.01).items_needed is None


def test_continuous_scores_where_lower_is_better_are_passed_negated():
    """A Brier score that grows by 0.05 on each of 40 items is a loss of 0.05, and fails a margin of 0.01."""
    generator = np.random.default_rng(3)
    brier_N = generator.uniform(0.1, 0.4, 40)
    worse_N = brier_N + 0.05 + generator.normal(0, 0.02, 40)
    found = compare(-brier_N, -worse_N, margin=0.01)
    assert found.status == "fail"
    assert found.drop.value == pytest.approx((worse_N - brier_N).mean())
    assert compare(-worse_N, -brier_N, margin=0.01).status == "pass"


def test_a_single_cluster_is_no_evidence():
    """One passage says nothing of others: no interval, no verdict, no advice."""
    found = compare(*records(20, 0, 40), margin=0.01, clusters=["passage"] * 40)
    assert (found.status, found.drop.ci95, found.items_needed) == ("inconclusive", None, None)
    assert found.minimum_detectable_effect is None


def test_holm_adjusts_by_rank_and_stays_monotone():
    """The worked example: 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02."""
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        (0.003, (13_737, 27_476, 54_954, 82_432, 137_388)),
        (0.005, (4_944, 9_890, 19_782, 29_674, 49_458)),
        (0.01, (1_234, 2_471, 4_944, 7_417, 12_363)),
        (0.02, (307, 616, 1_234, 1_853, 3_089)),
        (0.03, (None, 273, 547, 822, 1_372)),
    ],
)
def test_items_needed_agrees_with_the_table_of_the_reference(drop, expected):
    """Flip rates 2, 4, 8, 12, 20 %; the table is rounded, a number of items is rounded up."""
    for flip_rate, items in zip((0.02, 0.04, 0.08, 0.12, 0.2), expected, strict=True):
        if items is not None:
            assert items_needed(flip_rate, drop) - items in (0, 1)


def test_more_drop_than_flips_is_refused():
    """Three points cannot be lost with two points of flips."""
    with pytest.raises(ValueError, match=r"a drop of 0\.03 with 0\.02 flips"):
        items_needed(0.02, 0.03)


@pytest.mark.parametrize(("flip_rate", "drop"), [(0.04, 0.01), (0.08, 0.02), (0.2, 0.005), (0.05, 0.05)])
def test_the_detectable_effect_is_the_inverse_of_the_items_needed(flip_rate, drop):
    """The items for a drop detect that drop, up to the rounding of a whole item."""
    n = items_needed(flip_rate, drop)
    assert minimum_detectable_effect(n, flip_rate) == pytest.approx(drop, rel=0.01)


def test_without_flips_the_detectable_effect_brings_its_own():
    """1,000 items, no flip seen: n d = (z_alpha + z_power sqrt(1 - d))²; four items show nothing at all."""
    effect = minimum_detectable_effect(1000, 0.0)
    z_alpha, z_power = stats.norm.ppf([0.95, 0.8])
    assert 1000 * effect == pytest.approx((z_alpha + z_power * math.sqrt(1 - effect)) ** 2)
    assert minimum_detectable_effect(4, 0.5) is None


@pytest.mark.parametrize(("flip_rate", "margin", "drop"), [(0.08, 0.0375, 0.0), (0.02, 0.01, 0.0), (0.06, 0.05, 0.02)])
def test_items_to_pass_pass_in_four_of_five_runs(flip_rate, margin, drop):
    """Simulated flips of a candidate that keeps the margin: 78 to 86 % of 2,000 runs pass."""
    n = items_to_pass(flip_rate, margin, drop)
    rates = [(flip_rate + drop) / 2, (flip_rate - drop) / 2, 1 - flip_rate]
    flips = np.random.default_rng(0).multinomial(n, rates, 2000)
    passed = np.mean([tango_interval(lost, gained, n)[1] <= margin for lost, gained, _ in flips])
    assert 0.78 <= passed <= 0.86


@pytest.mark.parametrize(
    ("baseline", "candidate", "options", "message"),
    [
        ([1, 0], [1], {}, "2 scores of the baseline do not pair with 1"),
        ([], [], {}, "one or more numbers"),
        ([1.0, 0.5], [1.0, math.nan], {}, "1 of the candidate's 2 scores .* item 1, nan"),
        ([1, 0], [1, 0], {"clusters": ["a"]}, "2 items need as many cluster names, got 1"),
        ([1, 0], [1, 0], {"margin": -0.1}, "margin -0.1"),
        ([1, 0], [1, 0], {"alpha": 0.5}, "alpha 0.5"),
    ],
)
def test_what_cannot_be_compared_is_refused(baseline, candidate, options, message):
    """Scores that do not pair, are not finite, or limits that make no sense, in words."""
    with pytest.raises(ValueError, match=message):
        compare(baseline, candidate, **{"margin": 0.01, **options})


def test_a_comparison_cannot_be_changed():
    """A verdict stays what it was."""
    found = compare(*records(1, 0, 10), margin=0.01)
    assert isinstance(found, Comparison)
    with pytest.raises(AttributeError):
        found.status = "pass"
