"""Verdicts on ratios of times, and which times may be compared."""

import copy
import math

import pytest

from compressor.errors import EnvironmentProblem, RecipeError
from compressor.gates.latency_rule import (
    Timing,
    latency_verdict,
    ratio_across,
    refuse_across_machines,
    same_machine,
)
from compressor.reports.estimate import Estimate

HERE = {
    "cpu": {
        "model": "Xeon 6", "architecture": "x86_64", "cores": 2, "logical_cores": 2, "usable_cores": 2, "threads": 2,
        "capability": "AVX512", "instruction_sets": ["avx2", "avx512f"], "governor": None,
        "load_average": [0.1, 0.1, 0.1],
    },
    "memory_bytes": 8_000_000_000,
    "memory_available_bytes": 5_000_000_000,
    "gpus": [],
    "gpu_driver": None,
    "cuda": None,
    "os": "Linux-6.18",
    "python": "3.11.9",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"},
    "git": None,
}  # fmt: skip


def changed(path: str, value: object) -> dict:
    environment = copy.deepcopy(HERE)
    *parents, key = path.split(".")
    place = environment
    for parent in parents:
        place = place[parent]
    place[key] = value
    return environment


@pytest.mark.parametrize(
    ("ci95", "status"),
    [
        ((0.98, 1.05), "pass"),
        ((0.98, 1.0501), "inconclusive"),
        ((1.05, 1.20), "inconclusive"),
        ((1.0501, 1.20), "fail"),
        (None, "inconclusive"),
    ],
)
def test_the_whole_interval_decides(ci95, status):
    """Up to the budget is within it; an interval that holds the budget settles nothing."""
    assert latency_verdict(Estimate(1.04, ci95, 20), 1.05) == status


def test_a_ratio_that_is_no_number_fails():
    """A time that overflowed is broken, not unclear."""
    assert latency_verdict(Estimate(math.nan, (math.nan, math.nan), 20), 1.05) == "fail"


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_must_be_a_positive_ratio(budget):
    """Nothing would pass, or everything."""
    with pytest.raises(RecipeError, match="positive ratio"):
        latency_verdict(Estimate(1.0, (0.9, 1.1), 5), budget)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("cpu.model", "Xeon 5", "CPU Xeon 6 against Xeon 5"),
        ("cpu.threads", 1, "threads 2 against 1"),
        ("cpu.logical_cores", 8, "logical cores 2 against 8"),
        ("cpu.governor", "powersave", "governor unknown against powersave"),
        ("gpus", [{"name": "H100", "memory_bytes": 1}], "GPUs none against H100"),
        ("versions.torch", "2.11.0", "torch 2.13.0 against 2.11.0"),
        ("versions.transformers", "5.17.0", "transformers 5.23.0 against 5.17.0"),
    ],
)
def test_what_decides_the_speed_makes_another_machine(path, value, said):
    """The sentence names the field and both values."""
    assert said in same_machine(HERE, changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("cpu.load_average", [9.0, 9.0, 9.0]),
        ("memory_available_bytes", 1),
        ("git", {"commit": "abc"}),
        ("cpu.instruction_sets", ["avx512f", "avx2"]),
    ],
)
def test_what_changes_from_run_to_run_does_not(path, value):
    """Load, free memory and the commit under test."""
    assert same_machine(HERE, changed(path, value)) is None


def test_a_field_that_was_not_recorded_is_a_difference():
    """An older report without threads may have used any number."""
    older = copy.deepcopy(HERE)
    del older["cpu"]["threads"]
    assert same_machine(HERE, older) == "threads 2 against not recorded"


def test_times_of_two_machines_are_refused():
    """The message names what differs and what is missing."""
    one = Timing(environment=HERE, ms=Estimate(10.0, (9.0, 11.0), 8))
    other = Timing(environment=changed("cpu.model", "Xeon 5"), ms=Estimate(20.0, (19.0, 21.0), 8))
    with pytest.raises(EnvironmentProblem, match=r"Xeon 6 against Xeon 5; and neither names a reference"):
        ratio_across(one, other)


@pytest.mark.parametrize(
    ("references", "said"),
    [
        (("sha1", "sha2"), "their references differ"),
        (("sha1", None), "only the candidate"),
        ((None, "sha2"), "only the b"),
    ],
)
def test_two_references_do_not_help(references, said):
    """Both have to have run the same model."""
    timings = [
        Timing(environment=environment, to_reference=Estimate(1.0, (1.0, 1.0), 4) if name else None, reference=name)
        for environment, name in zip((HERE, changed("cpu.cores", 4)), references, strict=True)
    ]
    with pytest.raises(EnvironmentProblem, match=said):
        refuse_across_machines(*timings)


def test_ratios_to_one_reference_cross_machines():
    """2 x the reference against 1.6 x: 1.25, with log half-widths 0.03 and 0.04 adding to 0.05."""
    candidate = Estimate(2.0, (2.0 * math.exp(-0.03), 2.0 * math.exp(0.03)), 8)
    baseline = Estimate(1.6, (1.6 * math.exp(-0.04), 1.6 * math.exp(0.04)), 6)
    ratio = ratio_across(
        Timing(environment=HERE, to_reference=candidate, reference="sha"),
        Timing(environment=changed("cpu.model", "Xeon 5"), to_reference=baseline, reference="sha"),
    )
    assert ratio.value == pytest.approx(1.25)
    assert ratio.ci95 == pytest.approx((1.25 * math.exp(-0.05), 1.25 * math.exp(0.05)))
    assert ratio.n == 6


def test_times_of_one_machine_may_be_compared():
    """12 ms against 10 ms; without an interval on one side there is none of the ratio."""
    ratio = ratio_across(
        Timing(environment=HERE, ms=Estimate(12.0, (11.0, 13.0), 8)),
        Timing(environment=HERE, ms=Estimate(10.0, None, 1)),
    )
    assert (ratio.value, ratio.ci95, ratio.n) == (pytest.approx(1.2), None, 1)


def test_a_time_that_is_missing_is_said():
    """Same machine, nothing timed."""
    with pytest.raises(EnvironmentProblem, match="baseline was not timed"):
        ratio_across(Timing(environment=HERE, ms=Estimate(12.0, (11.0, 13.0), 8)), Timing(environment=HERE))


@pytest.mark.parametrize(
    ("more", "said"), [({"clock": "cpu"}, "clock cpu against wall"), ({"threads": 1}, "threads 1 against unknown")]
)
def test_times_by_two_clocks_are_refused(more, said):
    """One machine, but one of the times was taken while others used it."""
    calm = Timing(environment=HERE, ms=Estimate(10.0, (9.0, 11.0), 8))
    crowded = Timing(environment=HERE, ms=Estimate(12.0, (11.0, 13.0), 8), **more)
    with pytest.raises(EnvironmentProblem, match=said):
        ratio_across(crowded, calm)
