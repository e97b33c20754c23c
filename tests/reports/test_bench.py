"""The table of a bench, from figures that are known."""

import json

import pytest

from compressor.reports import Estimate, Latency, Memory
from compressor.reports.bench import Bench, Subject, verdict

CONDITIONS = {"prompt": 128, "generate": 32, "device": "cpu", "threads": 2, "clock": "wall"}


def ms(value: float, spread: float = 1.0) -> Estimate:
    return Estimate(value, (value - spread, value + spread), 8)


def subject(name: str, weights: int, **reasons: str) -> Subject:
    peaks = {"loading_peak_bytes": None, "generating_peak_bytes": None if reasons else 2 * weights}
    memory = Memory(weight_bytes=weights, extra=peaks, reasons=reasons)
    return Subject(name=name, kind="dense", dtype="bfloat16", memory=memory)


def rows(text: str) -> list[str]:
    """Lines without the spaces between columns."""
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture
def bench():
    """Decoding twice as fast, prefill undecided; batch 8 did not fit."""
    latency = Latency(
        prefill_ms={"1": ms(40), "8": None},
        decode_ms_per_token={"1": ms(10), "8": None},
        tokens_per_s={"1": ms(100), "8": None},
        ratio_to_baseline={
            "prefill_ms": {"1": Estimate(0.98, (0.9, 1.1), 8), "8": None},
            "decode_ms_per_token": {"1": Estimate(0.5, (0.45, 0.55), 8), "8": None},
        },
        extra=CONDITIONS
        | {
            "baseline": {
                "prefill_ms": {"1": ms(41), "8": None},
                "decode_ms_per_token": {"1": ms(20), "8": None},
                "tokens_per_s": {"1": ms(50), "8": None},
            }
        },
        reasons={"prefill_ms.8": "batch 8 does not fit in memory", "tokens_per_s.8": "batch 8 does not fit in memory"},
    )
    return Bench(
        model=subject("runs/x", 300_000_000),
        baseline=subject("demo/tiny-moe", 1_000_000_000),
        latency=latency,
        notes=("a note",),
        environment={},
    )


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (Estimate(0.5, (0.4, 0.9), 8), "faster"),
        (Estimate(2.0, (1.1, 3.0), 8), "slower"),
        (Estimate(0.9, (0.8, 1.0), 8), "undecided"),
        (Estimate(0.5, None, 2), "undecided"),
    ],
)
def test_the_whole_interval_decides(ratio, says):
    """1 inside it, or no interval, decides nothing."""
    assert verdict(ratio) == says


def test_the_table_says_the_ratio_and_who_is_faster(bench):
    """A line for each figure and batch that was measured; bytes beneath."""
    lines = rows(bench.to_text())
    assert "decode ms a token 1 10 [9, 11] 20 [19, 21] 0.5 [0.45, 0.55] faster" in lines
    assert "prefill ms 1 40 [39, 41] 41 [40, 42] 0.98 [0.9, 1.1] undecided" in lines
    assert "tokens/s 1 100 [99, 101] 50 [49, 51]" in lines
    assert "weights 300.00 MB 1,000.00 MB 0.3" in lines


def test_what_is_missing_is_said_once(bench):
    """No row of dashes, one line with the reason, behind the notes."""
    text = bench.to_text()
    assert text.splitlines()[-2:] == ["- a note", "- batch 8 does not fit in memory"]
    assert "peak while loading" not in text


def test_without_a_baseline_there_are_no_ratios(bench):
    """One column of figures."""
    alone = Bench(
        model=bench.model,
        baseline=None,
        latency=Latency(prefill_ms={"1": ms(40)}, extra=CONDITIONS, reasons={"ratio_to_baseline": "no baseline"}),
        notes=(),
        environment={},
    )
    text = alone.to_text()
    assert "prefill ms 1 40 [39, 41]" in rows(text)
    assert "baseline" not in text
    assert alone.to_json()["baseline"] is None


def test_json_holds_figures_verdicts_and_reasons(bench):
    """For scripts."""
    document = json.loads(json.dumps(bench.to_json()))
    assert document["verdicts"] == {"prefill_ms": {"1": "undecided"}, "decode_ms_per_token": {"1": "faster"}}
    assert document["latency"]["ratio_to_baseline"]["decode_ms_per_token"]["1"]["value"] == 0.5
    assert document["latency"]["prefill_ms"]["8_reason"] == "batch 8 does not fit in memory"
