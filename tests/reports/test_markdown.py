"""What a person reads says what matters, and first what matters most."""

import pytest

from compressor.reports import (
    Accuracy,
    Estimate,
    ExpertRow,
    Export,
    Latency,
    LayerRouting,
    Ledger,
    LedgerRow,
    Measurement,
    Memory,
    Report,
    to_markdown,
)


def measured(perplexity: float, weight_bytes: int, decode: float, reasons: dict | None = None) -> Measurement:
    return Measurement(
        accuracy=Accuracy(
            perplexity={"wiki": Estimate(perplexity, (perplexity - 1, perplexity + 1), 16)}, reasons=reasons or {}
        ),
        memory=Memory(weight_bytes=weight_bytes),
        latency=Latency(decode_ms_per_token={"1": Estimate(decode, (decode, decode), 5)}),
        routing=(LayerRouting(layer=0, tokens=(90, 10), shift=0.125),),
    )


@pytest.fixture
def report() -> Report:
    rows = [
        LedgerRow(name=f"q{k}", action="quantized", reason="", parameters=100, bits=4.0, group_size=64)
        for k in range(6)
    ]
    rows.append(LedgerRow(name="norm", action="kept", reason="norms stay", parameters=400, bits=16.0))
    experts = (ExpertRow(layer=1, tokens=(900, 3), starved=(1,), policy=("own", "shrunk to the layer")),)
    ledger = Ledger(weights=tuple(rows), experts=experts)
    report = Report.start(
        "ab" * 32, {"cpu": {"model": "Test | 2"}}, None, "demo/tiny-moe", measured(20.0, 4_000_000, 5.0)
    )
    after = measured(25.0, 1_000_000, 6.0, {"kl_mean": "the baseline is gone"})
    report = report.after("quantize", "quantize-1", {"group_size": 128}, 3.0, None, after, ledger)
    parity = {"max_abs": 0.001, "relative": 0.0002, "greedy_equal": True}
    exports = [
        Export(format="safetensors", path="model", bytes=1_100_000, parity=parity),
        Export(format="onnx", path="onnx", bytes=5, parity_reason="onnxruntime is not installed"),
    ]
    check = {"metric": "perplexity_ratio", "status": "fail", "text": "perplexity_ratio (wiki) is 1.25"}
    return report.with_exports(exports).with_gate({"verdict": "regression", "checks": [check]})


def test_the_verdict_comes_first(report):
    """Under the title stands the verdict with the check that decided."""
    lines = to_markdown(report).splitlines()
    assert lines[2] == "**Verdict: REGRESSION**"
    assert lines[4] == "- fail: perplexity_ratio (wiki) is 1.25"


@pytest.mark.parametrize(
    "text",
    [
        "Worst domain by perplexity: **wiki**, 1.25 × the baseline's",
        "Weights: 4.00 MB before, 1.00 MB after (0.25 ×)",
        "Slower than the baseline: decode at batch 1 (1.2 ×)",
        "| baseline | 20 [19, 21] |",
        "| quantize-1 | 25 [24, 26] (×1.25 [1.143, 1.368]) |",
        "1.00 MB (×0.25)",
        "kl_mean: the baseline is gone (quantize-1)",
        "| quantize-1 | 1 | 10 (layer 0, expert 1) | 0.125 (layer 0) |",
        "quantized: 600 parameters (60.0%)",
        "norms stay: 1 weight, 400 parameters (`norm`)",
        "group size 64 instead of 128: 6 weights, 600 parameters (`q0`, `q1`, `q2`, `q3` and 2 more)",
        "layer 1: expert 1 (3 tokens, shrunk to the layer)",
        "| safetensors | `model` | 1.10 MB | 0.001 | 0.0002 | yes |",
        "not compared: onnxruntime is not installed",
        "cpu: model Test | 2",
        "compress run recipe.yaml",
    ],
)
def test_the_report_says(report, text):
    """Every part of the report reaches the reader."""
    assert text in to_markdown(report)


def test_a_loaded_report_prints_the_same(report):
    """`compress report` on the file shows what the run has shown."""
    assert to_markdown(Report.from_json(report.to_json())) == to_markdown(report)


def test_every_row_has_the_columns_of_its_table(report):
    """No cell breaks a table."""
    width = None
    for line in to_markdown(report).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        columns = line.replace("\\|", "").count("|")
        assert width in (None, columns)
        width = columns


def test_a_report_without_steps_is_readable():
    """Before the first pass there are figures all the same."""
    text = to_markdown(Report.start("0", {}, None, "m", measured(20.0, 10, 5.0)))
    assert "No step has been applied" in text
    assert "Verdict: none" in text
