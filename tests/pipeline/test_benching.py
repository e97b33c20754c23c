"""What a bench opens, what it compares it with, and what it says of both."""

import json
from types import SimpleNamespace

import pytest
import torch

from compressor.errors import IntegrityError
from compressor.exporters import write_manifest
from compressor.metrics.latency import measuring
from compressor.pipeline import bench, benching, export
from compressor.reports import Latency, Measurement, Memory, Report
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model in a folder."""
    return save_tiny(tmp_path_factory.mktemp("dense") / "dense", "llama")


@pytest.fixture
def make_run(tmp_path):
    """`make_run(source)`: the folder of a finished run whose manifest names a source."""

    def make(source):
        run = tmp_path / "run"
        save_tiny(run / "model", "llama", seed=1)
        measured = Measurement(memory=Memory(weight_bytes=1))
        report = Report.start("0" * 64, {}, None, str(source), measured)
        report = report.after("quantize", "quantize", {}, 1.0, None, measured, None)
        (run / "report.json").write_text(json.dumps(report.to_json()))
        sources = [{"name": str(source), "revision": None, "digest": "0" * 64}]
        write_manifest(run, recipe="0" * 64, seed=0, sources=sources)
        return run

    return make


@pytest.fixture
def calls(monkeypatch):
    """Nothing is timed and no process started; what would have been timed, with how many threads."""
    seen = []

    def measure_speed(model, baseline, wanted, *, progress=None):
        seen.append(SimpleNamespace(model=model, baseline=baseline, wanted=wanted, threads=torch.get_num_threads()))
        return Latency(extra={"threads": 1, "clock": "cpu", "crowded": "others compute"})

    monkeypatch.setattr(benching, "measure_speed", measure_speed)
    monkeypatch.setattr(benching, "PROBED_BYTES", 0)
    return seen


@pytest.mark.parametrize("part", ["", "model"])
def test_a_run_is_timed_beside_its_source(dense, make_run, calls, part):
    """The run's folder, and a folder in it: the model is the run's, the baseline what its manifest names."""
    run = make_run(dense)
    found = bench(run / part)
    assert (calls[0].model.path, calls[0].baseline.path) == (run / "model", dense)
    assert (found.model.name, found.baseline.name, found.notes) == (str(run / part), str(dense), ())


def test_none_leaves_the_baseline_out(dense, make_run, calls):
    """Asked for, so nothing is noted."""
    found = bench(make_run(dense), "none")
    assert (calls[0].baseline, found.baseline, found.notes) == (None, None, ())


def test_a_bare_model_has_no_baseline_and_says_so(dense, calls):
    """Nothing names what it came from."""
    found = bench(dense)
    assert found.baseline is None
    assert found.notes[0].endswith("is no run, so nothing says what it came from: give --baseline to compare")


def test_a_source_that_is_not_here_is_not_fetched(make_run, calls):
    """A hub id in the manifest: no network unless asked."""
    found = bench(make_run("org/name"))
    assert found.baseline is None
    assert found.notes == ("the run's source, org/name, is not here: give --baseline to compare",)


def test_a_run_with_a_changed_file_is_refused(dense, make_run, calls):
    """What is timed is what the run wrote."""
    run = make_run(dense)
    (run / "model" / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        bench(run)
    assert calls == []


def test_threads_hold_while_it_is_timed(dense, calls):
    """torch has its own number again afterwards."""
    before = torch.get_num_threads()
    bench(dense, threads=3)
    assert (calls[0].threads, torch.get_num_threads()) == (3, before)


def test_sizes_reach_the_timing(dense, calls):
    """Batch sizes, prompt and steps."""
    bench(dense, batch=[2], prompt=5, generate=7)
    wanted = calls[0].wanted
    assert (wanted.batch, wanted.prompt, wanted.generate) == ((2,), 5, 7)


def test_peaks_of_large_models_are_left_out_with_the_reason(dense, calls):
    """A process that loads it once more is not cheap; the limit is 0 bytes here."""
    memory = bench(dense).to_json()["model"]["memory"]
    assert memory["generating_peak_bytes"] is None
    assert memory["generating_peak_bytes_reason"] == "peaks are measured of models up to 0 bytes of weights"


def test_both_sides_are_timed_in_turns(dense, make_run, monkeypatch):
    """For real, with little patience: a ratio for each figure and batch, the baseline's tokens/s from its steps."""
    monkeypatch.setattr(measuring, "PATIENCE_S", 0.1)
    monkeypatch.setattr(benching, "PROBED_BYTES", 0)
    found = bench(make_run(dense), batch=(1, 2), prompt=8, generate=4, threads=1)
    assert found.latency.ratio_to_baseline.keys() >= {"prefill_ms", "decode_ms_per_token"}
    assert found.verdicts()["decode_ms_per_token"].keys() == {"1", "2"}
    theirs = found.latency.extra["baseline"]
    for batch in (1, 2):
        step = theirs["decode_ms_per_token"][str(batch)].value
        assert theirs["tokens_per_s"][str(batch)].value == pytest.approx(1000 * batch / step)
    assert found.model.memory.weight_bytes == found.baseline.memory.weight_bytes  # the same architecture, dense


@pytest.fixture(scope="module")
def onnx_folder(dense, tmp_path_factory):
    """The dense model as a graph."""
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    folder = tmp_path_factory.mktemp("onnx") / "onnx"
    export(dense, folder, "onnx")
    return folder


def test_an_onnx_folder_is_timed_beside_the_dense_model(dense, onnx_folder, monkeypatch):
    """onnxruntime against torch, in turns."""
    monkeypatch.setattr(measuring, "PATIENCE_S", 0.1)
    monkeypatch.setattr(benching, "PROBED_BYTES", 0)
    found = bench(onnx_folder, dense, batch=(1,), prompt=8, generate=4, threads=1)
    assert (found.model.kind, found.baseline.kind) == ("onnx", "dense")
    assert found.verdicts()["prefill_ms"].keys() == {"1"}


def test_unlike_threads_are_noted(dense, onnx_folder, calls):
    """A crowded machine keeps torch to one thread; a session that is open keeps its own."""
    assert bench(onnx_folder, dense, threads=2).notes == ("onnxruntime computed with 2 threads, torch with 1",)
    assert bench(onnx_folder, dense, threads=1).notes == ()
