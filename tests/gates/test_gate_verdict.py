"""The gate against reports written by hand, and against reports as the product writes them."""

import math

import pytest
from pydantic import ValidationError

from compressor.gates import Policy, judge
from compressor.reports import Accuracy, Estimate, Measurement, Memory, Report


def estimate(value, low, high, n=16):
    return {"value": value, "ci95": [low, high], "n": n}


def report_with(measurement=None, **from_baseline):
    """A report of one step with these ratios to the baseline."""
    step = {"measurement": measurement or {}, "delta": {"from_previous": {}, "from_baseline": from_baseline}}
    return {"schema": "compressor.report/1", "baseline": {}, "steps": [step]}


def only_check(report, **limits):
    [check] = judge(report, Policy(**limits)).checks
    return check


@pytest.mark.parametrize(
    ("low", "high", "status", "exit_code"),
    [(1.01, 1.05, "pass", 0), (1.04, 1.06, "inconclusive", 2), (1.051, 1.06, "fail", 1)],
)
def test_max_applies_to_the_upper_end_of_the_interval(low, high, status, exit_code):
    """An interval up to the limit keeps it; one that lies above breaks it; one that holds it is open."""
    verdict = judge(
        report_with(perplexity_ratio={"wiki": estimate((low + high) / 2, low, high)}),
        Policy(perplexity_ratio={"max": 1.05}),
    )
    assert (verdict.checks[0].status, verdict.exit_code) == (status, exit_code)


@pytest.mark.parametrize(
    ("low", "high", "status"), [(0.95, 0.97, "pass"), (0.94, 0.96, "inconclusive"), (0.93, 0.949, "fail")]
)
def test_min_applies_to_the_lower_end_of_the_interval(low, high, status):
    """A share that has to be at least 0.95 is judged by its lower end."""
    report = report_with({"accuracy": {"top1_agreement": estimate((low + high) / 2, low, high)}})
    assert only_check(report, top1_agreement={"min": 0.95}).status == status


def test_a_plain_number_is_exact():
    """Bytes are counted, so a ratio equal to the limit keeps it."""
    assert only_check(report_with(weight_bytes_ratio=0.45), weight_bytes_ratio={"max": 0.45}).status == "pass"
    assert only_check(report_with(weight_bytes_ratio=0.4501), weight_bytes_ratio={"max": 0.45}).status == "fail"


def test_the_worst_perturbation_speaks_for_robustness():
    """Of two variants of a task one loses eight points more than the baseline does; without any, nothing is a pass."""
    gaps = {"piqa": {"typos": estimate(0.08, 0.06, 0.1), "drops": estimate(0.0, -0.01, 0.01)}}
    check = only_check(report_with({"behaviour": {"robustness": gaps}}), robustness_gap={"max": 0.05})
    assert (check.status, check.value) == ("fail", 0.08)
    assert "piqa, typos" in check.text
    assert only_check(report_with({"behaviour": {}}), robustness_gap={"max": 0.05}).status == "unmeasured"


def test_the_worst_text_speaks_for_the_perplexity():
    """One broken text among good ones is a regression, and it is the one that is named."""
    ratios = {"wiki": estimate(1.01, 1.0, 1.02), "code": estimate(1.3, 1.2, 1.4), "news": estimate(1.04, 1.0, 1.08)}
    check = only_check(report_with(perplexity_ratio=ratios), perplexity_ratio={"max": 1.05})
    assert (check.status, check.value) == ("fail", 1.3)
    assert "perplexity_ratio (code) is 1.3 [1.2, 1.4]" in check.text


def test_a_limit_on_one_text_ignores_the_others():
    """`text` picks the text that decides."""
    ratios = {"wiki": estimate(1.01, 1.0, 1.02), "code": estimate(1.3, 1.2, 1.4)}
    check = only_check(report_with(perplexity_ratio=ratios), perplexity_ratio={"max": 1.05, "text": "wiki"})
    assert (check.status, check.value) == ("pass", 1.01)


def test_a_text_that_the_report_does_not_have_is_unmeasured():
    """A misspelled text must not pass, and the sentence lists the texts there are."""
    ratios = {"wiki": estimate(1.01, 1.0, 1.02)}
    verdict = judge(report_with(perplexity_ratio=ratios), Policy(perplexity_ratio={"max": 1.05, "text": "wikki"}))
    assert (verdict.status, verdict.checks[0].status) == ("inconclusive", "unmeasured")
    assert "it has wiki" in verdict.checks[0].text


def test_an_unmeasured_metric_is_inconclusive_and_keeps_its_reason():
    """Null beside a reason never passes."""
    report = report_with(decode_latency_ratio=None, decode_latency_ratio_reason="both models do not fit")
    verdict = judge(report, Policy(decode_latency_ratio={"max": 1.0}))
    assert (verdict.status, verdict.exit_code) == ("inconclusive", 2)
    assert verdict.checks[0].text == "decode_latency_ratio was not measured: both models do not fit"


def test_a_batch_that_was_not_measured_keeps_a_limit_from_passing():
    """A latency ratio by batch size is as good as its worst batch, and a missing batch is worse than a good one."""
    ratios = {"1": estimate(0.7, 0.6, 0.8), "8": None, "8_reason": "out of memory"}
    check = only_check(report_with(decode_latency_ratio=ratios), decode_latency_ratio={"max": 1.0})
    assert (check.status, check.text) == ("unmeasured", "decode_latency_ratio (8) was not measured: out of memory")


def test_an_estimate_without_an_interval_is_inconclusive():
    """One window gives a value but no interval, and a limit applies to an interval's end."""
    report = report_with({"accuracy": {"kl_mean": {"value": 0.001, "ci95": None, "n": 1}}})
    assert only_check(report, kl_mean={"max": 0.02}).status == "inconclusive"


def test_a_report_without_steps_is_inconclusive():
    """There is nothing to judge before the first pass."""
    assert judge({"steps": []}, Policy(kl_mean={"max": 0.02})).exit_code == 2


def test_a_regression_outweighs_an_open_check():
    """The verdict is the worst of its checks, which keep the policy's order."""
    report = report_with({"accuracy": {"kl_mean": estimate(0.5, 0.4, 0.6)}})
    verdict = judge(report, Policy(kl_mean={"max": 0.02}, kl_p99={"max": 1.0}))
    assert verdict.status == "regression"
    assert [check.status for check in verdict.checks] == ["fail", "unmeasured"]


def test_an_open_check_says_how_many_items_would_settle_it():
    """Half the distance needs four times the items: interval 1.00 ± 0.10 at n = 16, limit 1.05, needs 64."""
    report = report_with(perplexity_ratio={"wiki": estimate(1.0, 0.9, 1.1)})
    assert "about n = 64 would settle it (now 16)" in only_check(report, perplexity_ratio={"max": 1.05}).text


def test_the_last_step_is_judged():
    """What an earlier step was like does not matter."""
    report = report_with(weight_bytes_ratio=0.9)
    report["steps"] += report_with(weight_bytes_ratio=0.3)["steps"]
    assert only_check(report, weight_bytes_ratio={"max": 0.5}).value == 0.3


def test_verdict_in_json_has_the_limit_and_the_sentence():
    """The document of report.json's `gate`."""
    verdict = judge(report_with(weight_bytes_ratio=0.3), Policy(weight_bytes_ratio={"max": 0.5}))
    [check] = verdict.to_json()["checks"]
    assert {key: value for key, value in check.items() if value is not None} == {
        "rule": "weight_bytes_ratio",
        "group": "cost",
        "metric": "weight_bytes_ratio",
        "value": 0.3,
        "ci95": [0.3, 0.3],
        "limit": {"max": 0.5},
        "status": "pass",
        "text": "weight_bytes_ratio is 0.3; at most 0.5 is allowed",
    }


@pytest.mark.parametrize("limit", [{}, {"max": 1.0, "min": 0.5}, {"max": math.nan}])
def test_a_limit_has_one_finite_bound(limit):
    """No bound, both bounds and NaN are refused."""
    with pytest.raises(ValidationError):
        Policy(kl_mean=limit)


def test_a_policy_that_limits_nothing_is_refused():
    """It would always pass."""
    with pytest.raises(ValidationError, match="limits nothing"):
        Policy()


def measured(perplexity, kl, weight_bytes):
    return Measurement(
        accuracy=Accuracy(perplexity={"wiki": Estimate(perplexity, (perplexity, perplexity), 16)}, kl_mean=kl),
        memory=Memory(weight_bytes=weight_bytes, file_bytes=weight_bytes),
    )


def real_report(perplexity, kl):
    report = Report.start("0" * 64, {}, None, "demo/tiny-moe", measured(10.0, None, 1000))
    return report.after("quantize", "quantize", {}, 1.0, None, measured(perplexity, kl, 300), None).to_json()


def test_a_report_of_the_product_is_judged():
    """Ratios, KL and bytes are found where `Report` writes them."""
    report = real_report(10.5, Estimate(0.01, (0.008, 0.012), 16))
    policy = Policy(
        weight_bytes_ratio={"max": 0.3},
        file_bytes_ratio={"max": 0.3},
        perplexity_ratio={"max": 1.05},
        kl_mean={"max": 0.012},
        weight_bytes={"max": 300},
    )
    verdict = judge(report, policy)
    assert [check.status for check in verdict.checks] == ["pass"] * 5
    assert [check.value for check in verdict.checks] == [0.3, 0.3, 1.05, 0.01, 300.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_yields_no_number_is_a_regression(value):
    """JSON holds null with a reason then; it was measured, and it is broken."""
    report = real_report(value, Estimate(value, None, 16))
    verdict = judge(report, Policy(perplexity_ratio={"max": 1.05}, kl_mean={"max": 0.012}))
    assert [check.status for check in verdict.checks] == ["fail", "fail"]
    assert verdict.to_json()["checks"][0]["value"] is None
