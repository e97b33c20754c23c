"""What running costs: speeds that may be compared, budgets that a policy sets, loading and its peaks."""

import math
from dataclasses import replace

import pytest
import yaml

from compressor.errors import EnvironmentProblem
from compressor.gates import Policy
from compressor.metrics import energy
from compressor.pipeline import check, measure
from compressor.pipeline.costs import latency_budgets
from compressor.pipeline.fair_speed import fair_latency
from compressor.pipeline.sides import Side
from compressor.recipe import Evaluate, load_recipe
from compressor.reports import Accuracy, Estimate, Latency, Measurement, Memory
from compressor.reports.delta import delta
from tests.tiny_models import save_tiny


def a_side(name: str, ratio: float, *, digest: str | None = "same", cpu: str = "A", prompt: int = 128) -> Side:
    """A run on a machine with such a CPU, whose model took `ratio` of its original's time, give or take 3 %."""
    estimate = Estimate(ratio, (ratio * math.exp(-0.03), ratio * math.exp(0.03)), 8)
    latency = Latency(
        prefill_ms={"1": Estimate(10.0, None, 1)},
        decode_ms_per_token={"1": Estimate(5.0, None, 1)},
        ratio_to_baseline={"decode_ms_per_token": {"1": estimate}, "prefill_ms": {"1": estimate}},
        extra={"prompt": prompt, "generate": 32, "device": "cpu"},
    )
    return Side(
        name,
        model=None,
        measurement=Measurement(accuracy=Accuracy(), memory=Memory(), latency=latency),
        environment={"cpu": {"model": cpu}},
        source={"name": "original", "digest": digest},
        timed_beside="original",
    )


def ratios(candidate: Side, baseline: Side):
    """What a gate may say of the times of the two."""
    return fair_latency(delta(candidate.measurement, baseline.measurement, against_baseline=False), candidate, baseline)


def test_two_machines_are_compared_through_the_model_that_ran_on_both():
    """0.6 of the original's time against 0.5 of it: 1.2, and the intervals' log half-widths add as squares."""
    found = ratios(a_side("new", 0.6), a_side("accepted", 0.5, cpu="B")).decode_latency_ratio["1"]
    assert found.value == pytest.approx(1.2)
    assert found.ci95[1] == pytest.approx(1.2 * math.exp(math.hypot(0.03, 0.03)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "other"}, "no reference model in common"),
        ({"digest": None}, "no reference model in common"),
        ({"prompt": 64}, "prompt was 128 and 64"),
    ],
)
def test_nothing_else_crosses_machines(change, said):
    """The sentence names what the machines differ in, and what is missing; there is no ratio."""
    found = ratios(a_side("new", 0.6), a_side("accepted", 0.5, cpu="B", **change))
    assert found.decode_latency_ratio is None
    assert said in found.reasons["decode_latency_ratio"]
    assert "CPU A against B" in found.reasons["prefill_latency_ratio"]


def test_a_model_timed_alone_is_refused():
    """Times of the clock on the wall, apart from each other, are what machines differ in."""
    alone = a_side("accepted", 0.5)
    latency = replace(alone.measurement.latency, ratio_to_baseline=None)
    found = ratios(a_side("new", 0.6), replace(alone, measurement=replace(alone.measurement, latency=latency)))
    assert "accepted was not timed in turns" in found.reasons["decode_latency_ratio"]


def test_a_policy_sets_the_budgets_that_turns_have_to_decide():
    """Upper limits of ratios of times; bytes and lower limits set none."""
    policy = Policy(
        decode_latency_ratio={"max": 1.05}, prefill_latency_ratio={"min": 0.5}, weight_bytes_ratio={"max": 1}
    )
    assert latency_budgets(policy) == {"decode_ms_per_token": 1.05}
    assert latency_budgets(None) == {}


def test_loading_is_measured_where_asked(tmp_path):
    """Seconds to the first token, and the peaks of a process of its own: at least the weights themselves."""
    folder = save_tiny(tmp_path / "dense", "llama")
    text = tmp_path / "text.txt"
    text.write_text("A small text that is long enough for a few windows of bytes. " * 10)
    evaluate = Evaluate(
        text={"small": str(text)}, windows=1, length=64,
        latency={"batch": [1], "prompt": 8, "generate": 4, "loading": True},
    )  # fmt: skip
    found = measure(folder, evaluate=evaluate)
    assert found["latency"]["load_s"]["value"] > 0
    assert found["memory"]["generating_peak_bytes"] > found["memory"]["weight_bytes"]


def test_energy_without_codecarbon_is_refused_before_any_work(moe_folder, tmp_path, monkeypatch):
    """With the command that installs it."""
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: None)
    recipe = tmp_path / "recipe.yaml"
    steps = [{"quantize": {"bits": 8, "group_size": 32}}]
    recipe.write_text(
        yaml.safe_dump({"model": str(moe_folder), "passes": steps, "evaluate": {"latency": {"energy": "DEU"}}})
    )
    with pytest.raises(EnvironmentProblem, match=r"pip install 'compressor\[energy\]'"):
        check(load_recipe(recipe))
