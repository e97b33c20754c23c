"""What makes two machines differ, and ratios through a reference that ran on both."""

import copy
import math

import pytest

from compressor.gates.machines import same_machine, through_reference
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


def test_ratios_to_one_reference_cross_machines():
    """2 x the reference against 1.6 x: 1.25, with log half-widths 0.03 and 0.04 adding to 0.05."""
    candidate = Estimate(2.0, (2.0 * math.exp(-0.03), 2.0 * math.exp(0.03)), 8)
    baseline = Estimate(1.6, (1.6 * math.exp(-0.04), 1.6 * math.exp(0.04)), 6)
    ratio = through_reference(candidate, baseline)
    assert ratio.value == pytest.approx(1.25)
    assert ratio.ci95 == pytest.approx((1.25 * math.exp(-0.05), 1.25 * math.exp(0.05)))
    assert ratio.n == 6


def test_without_an_interval_there_is_none_of_the_ratio():
    """One block of turns says nothing about the next."""
    ratio = through_reference(Estimate(1.2, (1.1, 1.3), 8), Estimate(1.0, None, 2))
    assert (ratio.value, ratio.ci95, ratio.n) == (pytest.approx(1.2), None, 2)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_ratio_is_a_positive_number(value):
    """A model that took no time was not timed."""
    with pytest.raises(ValueError, match="positive numbers"):
        through_reference(Estimate(1.0, None, 1), Estimate(value, None, 1))
