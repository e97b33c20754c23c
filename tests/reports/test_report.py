"""The report keeps every figure, computes every delta, and never writes a number that it does not have."""

import json
import math
from dataclasses import replace

import pytest

from compressor.errors import EnvironmentProblem, IntegrityError
from compressor.reports import (
    Accuracy,
    Estimate,
    Export,
    Latency,
    LayerRouting,
    Ledger,
    LedgerRow,
    Measurement,
    Memory,
    Report,
    paired_ratio,
    worst_domain,
    worst_domain_by_kl,
)


def near(value: float, spread: float = 0.1, n: int = 16) -> Estimate:
    return Estimate(value, (value - spread, value + spread), n)


def measurement(wiki: float, plays: float, weight_bytes: int, decode: float, **accuracy) -> Measurement:
    return Measurement(
        accuracy=Accuracy(perplexity={"wiki": near(wiki), "plays": near(plays)}, **accuracy),
        memory=Memory(weight_bytes=weight_bytes, file_bytes=weight_bytes + 100, bits_per_weight=16.0),
        latency=Latency(prefill_ms={"1": near(40.0)}, decode_ms_per_token={"1": near(decode), "8": near(2 * decode)}),
    )


BASELINE = measurement(20.0, 30.0, 1000, 4.0)
PRUNED = measurement(22.0, 36.0, 800, 3.0, kl_mean=near(0.2, 0.01))
QUANTIZED = measurement(22.0, 45.0, 250, 5.0, kl_mean=near(0.25, 0.01), kl={"wiki": near(0.5), "plays": near(0.1)})
LEDGER = Ledger(weights=(LedgerRow(name="a", action="pruned", reason="", parameters=10, bits=16.0),))


@pytest.fixture
def report() -> Report:
    start = Report.start("f" * 64, {"cpu": "test"}, {"passes": 2}, "demo/tiny-moe", BASELINE)
    after = start.after("prune", "prune", {"ratio": 0.25}, 1.5, 1000, PRUNED, LEDGER)
    return after.after("quantize", "quantize", {"bits": 4}, 2.5, None, QUANTIZED, None)


def test_json_survives_reading(report, tmp_path):
    """A report that is saved and loaded says the same."""
    full = report.with_exports([Export(format="safetensors", path="model", bytes=9, parity={"max_abs": 0.1})])
    full = full.with_gate({"verdict": "pass", "checks": []})
    full.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").to_json() == full.to_json()


def test_schema_of_the_document(report):
    """The document has the keys that design.md promises to scripts."""
    data = report.to_json()
    assert data["schema"] == "compressor.report/1"
    assert list(data)[1:] == ["recipe_sha256", "environment", "plan", "baseline", "steps", "exports", "gate"]
    assert data["baseline"]["measurement"]["accuracy"]["perplexity"]["wiki"] == {
        "value": 20.0,
        "ci95": [19.9, 20.1],
        "n": 16,
    }
    assert set(data["steps"][0]["delta"]) == {"from_previous", "from_baseline"}


def test_ratios_are_after_over_before(report):
    """Perplexity, bytes and latency of the second step, against the baseline and against the first step."""
    step = report.steps[1]
    assert step.from_baseline.perplexity_ratio["plays"].value == 45 / 30
    assert step.from_previous.perplexity_ratio["plays"].value == 45 / 36
    assert (step.from_baseline.weight_bytes_ratio, step.from_previous.weight_bytes_ratio) == (0.25, 250 / 800)
    assert step.from_baseline.file_bytes_ratio == 350 / 1100
    assert step.from_baseline.decode_latency_ratio["8"].value == 10 / 8
    assert step.from_previous.decode_latency_ratio["1"].value == 5 / 3
    assert step.from_baseline.prefill_latency_ratio["1"].value == 1.0


def test_unpaired_ratio_has_the_widest_interval(report):
    """Without pairs the interval reaches from the lowest over the highest to the highest over the lowest."""
    ratio = report.steps[0].from_baseline.perplexity_ratio["wiki"]
    assert ratio.ci95 == (21.9 / 20.1, 22.1 / 19.9)


def test_kl_grows_from_step_to_step(report):
    """Against the baseline it is the KL itself, against the step before it is what was added."""
    step = report.steps[1]
    assert step.from_baseline.kl_mean.value == 0.25
    assert step.from_previous.kl_mean.value == pytest.approx(0.05)
    assert step.from_previous.kl_mean.ci95 == pytest.approx((0.03, 0.07))


def test_the_first_step_compares_with_the_baseline(report):
    """Both deltas of the first step are the same."""
    step = report.steps[0]
    assert step.from_previous == step.from_baseline


def test_latency_timed_in_turns_replaces_the_ratio_of_medians():
    """The measured pairs are taken as they are, but only against the baseline they were timed with."""
    turns = {"decode_ms_per_token": {"1": near(1.1), "8": None}}
    reasons = {"ratio_to_baseline.decode_ms_per_token.8": "out of memory"}
    latency = Latency(decode_ms_per_token={"1": near(8.0)}, ratio_to_baseline=turns, reasons=reasons)
    start = Report.start("0", {}, None, "m", BASELINE)
    report = start.after("prune", "a", {}, 1.0, None, PRUNED, None)
    step = report.after("quantize", "b", {}, 1.0, None, replace(QUANTIZED, latency=latency), None).steps[1]
    assert step.from_baseline.decode_latency_ratio["1"].value == 1.1
    assert step.from_baseline.reasons["decode_latency_ratio.8"] == "out of memory"
    assert step.from_previous.decode_latency_ratio["1"].value == 8 / 3


def test_same_windows_are_compared_in_pairs():
    """Windows that all lose 0.01 nats give exp(0.01) without spread, however much they differ among themselves."""
    before = (1.0, 3.0, 5.0, 2.0)
    ratio = paired_ratio(tuple(nll + 0.01 for nll in before), before)
    assert ratio.value == pytest.approx(math.exp(0.01), rel=1e-12)
    assert ratio.ci95 == pytest.approx((math.exp(0.01), math.exp(0.01)), rel=1e-9)
    assert ratio.n == 4


def test_paired_interval_is_that_of_the_mean_difference():
    """For 400 windows of spread 0.1 the interval is exp(mean ± 1.96 · 0.1 / √400), within resampling error."""
    differences = [0.05 + 0.1 * math.sqrt(3) * (2 * (k + 0.5) / 400 - 1) for k in range(400)]
    ratio = paired_ratio(tuple(differences), (0.0,) * 400)
    half = 1.96 * 0.1 / 20
    assert ratio.ci95 == pytest.approx((math.exp(0.05 - half), math.exp(0.05 + half)), abs=1e-3)


def test_windows_are_used_for_the_delta():
    """A measurement with windows gets the paired ratio."""
    before = replace(BASELINE, accuracy=replace(BASELINE.accuracy, window_nll={"wiki": (1.0, 3.0)}))
    after = replace(PRUNED, accuracy=replace(PRUNED.accuracy, window_nll={"wiki": (1.1, 3.1)}))
    step = Report.start("0", {}, None, "m", before).after("prune", "a", {}, 1.0, None, after, None).steps[0]
    assert step.from_baseline.perplexity_ratio["wiki"].value == pytest.approx(math.exp(0.1))
    assert step.from_baseline.perplexity_ratio["plays"].value == 36 / 30


def test_what_was_not_measured_is_null_beside_its_reason():
    """A figure of any depth that is missing carries why."""
    reasons = {"kl_mean": "no baseline", "perplexity.wiki": "empty text"}
    data = Measurement(accuracy=Accuracy(perplexity={"wiki": None}, reasons=reasons)).to_json()
    assert (data["accuracy"]["kl_mean"], data["accuracy"]["kl_mean_reason"]) == (None, "no baseline")
    assert data["accuracy"]["perplexity"] == {"wiki": None, "wiki_reason": "empty text"}
    assert data["memory"]["peak_bytes_reason"] == "it was not measured"
    assert data["routing_reason"] == "it was not measured"
    assert Measurement.from_json(data).to_json() == data


def test_a_text_missing_on_one_side_keeps_its_place_in_the_delta():
    """A text that only the baseline was measured on is null with a reason, not left out."""
    after = Measurement(accuracy=Accuracy(perplexity={"wiki": near(21.0)}))
    data = Report.start("0", {}, None, "m", BASELINE).after("prune", "a", {}, 1.0, None, after, None).to_json()
    ratios = data["steps"][0]["delta"]["from_baseline"]["perplexity_ratio"]
    assert (ratios["plays"], ratios["plays_reason"]) == (None, "it was not measured after")
    assert ratios["wiki"]["value"] == 21 / 20


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_lacks_become_null(value):
    """A model that broke leaves a readable report: every such number is null with a reason."""
    broken = Measurement(
        accuracy=Accuracy(perplexity={"wiki": Estimate(value, None, 4)}, kl_p99=value, window_nll={"wiki": (value,)}),
        routing=(LayerRouting(layer=0, tokens=(1, 2), shift=value),),
    )
    report = Report.start("0", {"load": value}, None, "m", BASELINE).after("prune", "a", {}, 1.0, None, broken, None)
    text = json.dumps(report.to_json(), allow_nan=False)
    accuracy = json.loads(text)["steps"][0]["measurement"]["accuracy"]
    assert accuracy["perplexity"] == {"wiki": None, "wiki_reason": "the value is not a finite number"}
    assert (accuracy["kl_p99"], accuracy["kl_p99_reason"]) == (None, "the value is not a finite number")
    assert worst_domain(broken, BASELINE)[0] == "wiki"
    assert worst_domain(Measurement.from_json(broken.to_json()), BASELINE) == ("wiki", math.inf)


def test_figures_of_a_later_version_are_kept():
    """An addition to a section survives loading and saving."""
    data = Measurement(memory=Memory(extra={"pinned_bytes": 3})).to_json()
    assert data["memory"]["pinned_bytes"] == 3
    assert Measurement.from_json(data).memory.extra == {"pinned_bytes": 3}


def test_worst_domain_is_the_largest_ratio():
    """36 / 30 beats 22 / 20, though both lost; by KL it is the other text."""
    assert worst_domain(PRUNED, BASELINE) == ("plays", 1.2)
    assert worst_domain_by_kl(QUANTIZED) == ("wiki", 0.5)
    assert worst_domain(Measurement(), BASELINE) is None
    assert worst_domain_by_kl(PRUNED) is None


def test_exact_numbers_have_their_own_interval():
    """What was counted has no spread."""
    assert Estimate.exact(5.0).to_json() == {"value": 5.0, "ci95": [5.0, 5.0], "n": 1}


def test_another_schema_is_refused():
    """A report of another version is not read half."""
    with pytest.raises(IntegrityError, match=r"its schema is 'compressor\.report/2'"):
        Report.from_json({"schema": "compressor.report/2"})


def test_a_damaged_report_names_its_file(tmp_path):
    """Broken JSON and missing parts are integrity errors; a missing file is the environment's."""
    path = tmp_path / "report.json"
    with pytest.raises(EnvironmentProblem, match="no such report"):
        Report.load(path)
    for text in ("{", '{"schema": "compressor.report/1"}', "[]"):
        path.write_text(text)
        with pytest.raises(IntegrityError, match=r"report\.json: "):
            Report.load(path)


def test_a_step_id_is_used_once(report):
    """Two steps of one id could not be told apart."""
    with pytest.raises(ValueError, match="'prune' already"):
        report.after("prune", "prune", {}, 1.0, None, PRUNED, None)
