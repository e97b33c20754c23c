"""`compress bench` against a pipeline that answers at once."""

import json
import sys
import types

import pytest

import compressor
from compressor import cli


class Found:
    def to_json(self):
        return {"verdicts": {}}

    def to_text(self):
        return "the table"


@pytest.fixture
def calls(monkeypatch):
    """What the pipeline was called with."""
    module, seen = types.ModuleType("compressor.pipeline"), []

    def bench(model, baseline, *, progress, **options):
        seen.append((model, baseline, options))
        return Found()

    module.bench = bench
    monkeypatch.setitem(sys.modules, "compressor.pipeline", module)
    monkeypatch.setattr(compressor, "pipeline", module, raising=False)
    return seen


def test_defaults_and_options_reach_the_pipeline(calls, capsys):
    """The defaults are those of a recipe; the table goes to stdout."""
    assert cli.main(["bench", "runs/x"]) == 0
    assert capsys.readouterr().out == "the table\n"
    options = ["--baseline", "none", "--batch", "2, 4", "--prompt", "5", "--generate", "6", "--threads", "1", "--quiet"]
    assert cli.main(["bench", "m", *options]) == 0
    assert calls == [
        ("runs/x", None, {"batch": (1, 8), "prompt": 128, "generate": 32, "threads": None}),
        ("m", "none", {"batch": (2, 4), "prompt": 5, "generate": 6, "threads": 1}),
    ]


def test_json_and_the_file_are_the_same_document(calls, capsys, tmp_path):
    """One for a script now, one for later."""
    assert cli.main(["bench", "m", "--json", "--out", str(tmp_path / "bench.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "bench.json").read_text()) == {"verdicts": {}}


@pytest.mark.parametrize(
    "options", [["--batch", ""], ["--batch", "0"], ["--batch", "1,x"], ["--prompt", "0"], ["--threads", "0"]]
)
def test_sizes_that_are_none_exit_with_3(calls, options):
    """Nothing is opened."""
    assert cli.main(["bench", "m", *options]) == 3
    assert calls == []


def test_figures_are_not_written_into_a_run(calls, capsys, tmp_path):
    """A file that its manifest does not list would make the run damaged."""
    (tmp_path / "manifest.json").write_text("{}")
    assert cli.main(["bench", str(tmp_path), "--out", str(tmp_path / "bench.json")]) == 3
    assert "whose manifest lists every file" in capsys.readouterr().err
    assert calls == []
