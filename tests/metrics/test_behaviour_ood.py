"""Foreign text: the KL ratio and the AUROC of detection, held against their definitions and scipy."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import cross_entropy

from compressor.metrics.behaviour.ood import (
    WindowScores,
    auroc,
    auroc_change,
    detection_scores,
    kl_ratio,
    ood_figures,
)


def draws(seed, shift=0.0, size=40, digits=1):
    return np.round(np.random.default_rng(seed).normal(shift, 1, size), digits)


def test_kl_ratio_is_the_ratio_of_means():
    """Means 0.6 and 0.2 give 3."""
    estimate = kl_ratio([0.4, 0.8], [0.1, 0.2, 0.3])
    assert estimate.value == pytest.approx(3.0)
    assert estimate.n == 5


def test_kl_ratio_has_the_interval_of_a_log_ratio():
    """For 400 windows a side the ends are near exp(log ratio +- 1.96 standard errors), by the delta method."""
    generator = np.random.default_rng(0)
    ood, within = generator.gamma(4, 0.1, 400), generator.gamma(4, 0.05, 400)
    relative = np.sqrt(ood.var() / 400 / ood.mean() ** 2 + within.var() / 400 / within.mean() ** 2)
    expected = (ood.mean() / within.mean()) * np.exp([-1.96 * relative, 1.96 * relative])
    assert kl_ratio(ood, within).ci95 == pytest.approx(tuple(expected), rel=0.02)


def test_a_model_like_its_baseline_has_no_ratio():
    """Nothing can be divided by a KL of 0."""
    with pytest.raises(ValueError, match="nothing to divide by"):
        kl_ratio([0.1, 0.2], [0.0, 0.0])


@pytest.mark.parametrize("shift", [0.0, 0.7, -2.0])
def test_auroc_is_the_rank_statistic(shift):
    """Mann-Whitney's U over all pairs, ties counting half (scores are rounded, so there are many)."""
    within, ood = draws(1), draws(2, shift, 55)
    expected = stats.mannwhitneyu(ood, within).statistic / (55 * 40)
    assert auroc(within, ood).value == pytest.approx(expected, abs=1e-12)


def test_auroc_interval_is_that_of_resampling_both_sides():
    """The quick counts give what scipy gives on each resample."""
    within, ood = draws(3, size=12), draws(4, 1.0, 9)
    generator = np.random.default_rng(0)
    areas = []
    for _ in range(100):
        picks = generator.integers(0, 12, 12), generator.integers(0, 9, 9)
        areas.append(stats.mannwhitneyu(ood[picks[1]], within[picks[0]]).statistic / (12 * 9))
    expected = np.quantile(areas, [0.025, 0.975])
    assert auroc(within, ood, resamples=100).ci95 == pytest.approx(tuple(expected), abs=1e-12)


def test_one_window_has_no_interval():
    """There is nothing to resample."""
    assert auroc([1.0, 2.0], [3.0]).ci95 is None


def test_auroc_change_of_equal_scores_is_exactly_nothing():
    """The same windows are resampled on both sides, so nothing is left to vary."""
    sides = draws(5), draws(6, 1.0)
    change = auroc_change(sides, sides)
    assert (change.value, change.ci95) == (0.0, (0.0, 0.0))


def test_auroc_change_is_after_minus_before():
    """From perfect detection to none at all: -1/2."""
    assert auroc_change(([0.0, 0.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 1.0])).value == pytest.approx(-0.5)


def test_other_windows_are_refused():
    """Before and after have to be the same windows."""
    with pytest.raises(ValueError, match="2 and 2 before, 2 and 3 after"):
        auroc_change(([0.0, 1.0], [1.0, 2.0]), ([0.0, 1.0], [1.0, 2.0, 3.0]))


def test_detection_scores_follow_their_definitions():
    """NLL is torch's cross entropy, the others softmax and logsumexp in float64; higher is more foreign."""
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0)) * 3
    targets = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    scores = detection_scores(logits, targets)
    exact = logits.double()
    nll = cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5).mean(1)
    assert scores["nll"] == pytest.approx(nll, abs=1e-5)
    assert scores["max_softmax"] == pytest.approx(-exact.softmax(-1).amax(-1).mean(1), abs=1e-5)
    assert scores["energy"] == pytest.approx(-exact.logsumexp(-1).mean(1), abs=1e-5)


def test_figures_of_a_candidate_and_of_the_baseline_itself():
    """The baseline has no ratio and no change; a candidate that does not differ has a reason instead of a ratio."""
    within = WindowScores([0.0, 0.0], {"nll": [1.0, 2.0]})
    foreign = {"code": WindowScores([0.0, 0.0], {"nll": [3.0, 1.5]})}
    alone = ood_figures(within, foreign)
    assert {key: value.value for key, value in alone.values["code"]["auroc"].items()} == {"nll": 0.75}
    assert set(alone.values["code"]) == {"auroc"}
    both = ood_figures(within, foreign, baseline_within=within, baseline_foreign=foreign)
    assert both.values["code"]["auroc_change"]["nll"].value == 0.0
    assert both.values["code"]["kl_ratio"] is None
    assert "nothing to divide by" in both.reasons["code.kl_ratio"]
