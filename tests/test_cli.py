"""The command line against a pipeline of its own, so that no model is touched."""

import io
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

import compressor
from compressor import cli
from compressor.cli import terminal
from compressor.errors import IntegrityError
from compressor.reports import Accuracy, Estimate, Measurement, Memory, Report

REPORT = Report.start("0" * 64, {}, None, "demo/tiny-moe", Measurement(memory=Memory(weight_bytes=1000))).after(
    "quantize",
    "quantize",
    {},
    1.0,
    None,
    Measurement(accuracy=Accuracy(kl_mean=Estimate(0.01, (0.008, 0.012), 16)), memory=Memory(weight_bytes=300)),
    None,
)


@dataclass(frozen=True)
class RunResult:
    report: Report
    out: Path
    exit_code: int


@dataclass(frozen=True)
class CheckResult:
    subject: object

    def to_json(self):
        return {"subject": type(self.subject).__name__}

    def to_text(self):
        return f"the plan for {getattr(self.subject, 'model', self.subject)}"


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that answers at once and keeps what it was called with."""
    module = types.ModuleType("compressor.pipeline")
    module.calls = []
    module.exit_code = 0

    def run(recipe, out=None, *, device="cpu", fresh=False, progress=None):
        module.calls.append((recipe, out, device, fresh))
        print("a library prints to stdout")
        progress("quantize", 1, 4)
        return RunResult(REPORT, Path("runs/x"), module.exit_code)

    def measure(model, **options):
        module.calls.append((model, options))
        return {"accuracy": {"kl_mean": {"value": 0.01, "ci95": [0.008, 0.012], "n": 16}}, "notes": []}

    def export(folder, out, format, options):
        module.calls.append((folder, out, format, options))
        return {"path": str(out)}

    module.run, module.measure, module.export, module.check = run, measure, export, CheckResult
    module.generate = lambda model, prompt, max_new_tokens: f"{prompt} and {max_new_tokens} more"
    module.doctor = lambda: {"cuda": {"available": False, "reason": "no driver"}}
    monkeypatch.setitem(sys.modules, "compressor.pipeline", module)
    monkeypatch.setattr(compressor, "pipeline", module, raising=False)
    return module


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder with its report."""
    (tmp_path / "report.json").write_text(json.dumps(REPORT.to_json()))
    return tmp_path


def test_run_prints_plan_and_progress_to_stderr_and_the_report_to_stdout(pipeline, capsys):
    """stdout is for the answer, even where a library prints."""
    assert cli.main(["run", "int4_moe"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("# demo/tiny-moe")
    assert out.endswith("written to runs/x\n")
    assert err.splitlines() == ["the plan for demo/tiny-moe", "a library prints to stdout", "quantize: 1/4"]


def test_run_passes_its_options_on(pipeline):
    """--model and --set change the recipe; the rest goes to the pipeline."""
    options = ["--model", "a: b#c", "--set", "quantize.bits=3", "--set", "seed=7", "--out", "o", "--device", "cuda"]
    assert cli.main(["run", "int4_moe", *options, "--fresh"]) == 0
    [(recipe, out, device, fresh)] = pipeline.calls
    assert (recipe.model, recipe.passes[0].bits, recipe.seed) == ("a: b#c", 3, 7)
    assert (out, device, fresh) == (Path("o"), "cuda", True)


def test_quiet_leaves_out_plan_and_progress(pipeline, capsys):
    """Only what libraries print is left on stderr."""
    assert cli.main(["run", "int4_moe", "--quiet"]) == 0
    assert capsys.readouterr().err == "a library prints to stdout\n"


@pytest.mark.parametrize("exit_code", [0, 1, 2])
def test_run_returns_the_verdict(pipeline, exit_code):
    """The pipeline's exit code is the command's."""
    pipeline.exit_code = exit_code
    assert cli.main(["run", "int4_moe"]) == exit_code


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "int4_moe"],
        ["check", "int4_moe"],
        ["check", "demo/tiny-moe"],
        ["measure", "demo/tiny-moe"],
        ["export", "runs/x", "--to", "safetensors", "--out", "o"],
        ["generate", "demo/tiny-moe", "Once"],
        ["doctor"],
        ["report", "RUN"],
        ["gate", "RUN", "--policy", "RUN/gate.yaml"],
        ["run", "no_such_recipe"],
        ["run"],
        ["bogus"],
    ],
    ids=" ".join,
)
def test_json_leaves_one_document_on_stdout(pipeline, run_folder, capsys, arguments):
    """Errors too are a document, with the exit code in it."""
    (run_folder / "gate.yaml").write_text("kl_mean: {max: 0.02}\n")
    code = cli.main([argument.replace("RUN", str(run_folder)) for argument in arguments] + ["--json"])
    document = json.loads(capsys.readouterr().out)
    assert ("error" in document) == (code == 3)


@pytest.mark.parametrize(
    ("target", "kind"),
    [("int4_moe", "Recipe"), ("recipes/int4_moe.yaml", "Recipe"), ("demo/tiny-moe", "str"), ("org/name@main", "str")],
)
def test_check_tells_recipes_from_models(pipeline, capsys, target, kind):
    """A YAML file or a bundled name is a recipe; everything else is a model."""
    assert cli.main(["check", target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"subject": kind}


def test_check_of_a_model_refuses_options_of_a_recipe(pipeline, capsys):
    """An option that would have no effect is an error."""
    assert cli.main(["check", "demo/tiny-moe", "--set", "seed=1"]) == 3
    assert "demo/tiny-moe is a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ([], "demo/text"),
        (["--text", "a.txt"], "a.txt"),
        (["--text", "wiki=a.txt"], {"wiki": "a.txt"}),
        (["--text", "a.txt", "--text", "code=b.txt"], {"a": "a.txt", "code": "b.txt"}),
    ],
)
def test_measure_names_its_texts(pipeline, options, texts):
    """One as it is, several by name."""
    assert cli.main(["measure", "m", "--no-latency", *options]) == 0
    [(model, called)] = pipeline.calls
    evaluate = called["evaluate"]
    assert (model, evaluate.text, evaluate.windows, evaluate.length, evaluate.latency) == ("m", texts, 16, 256, None)


def test_measure_prints_estimates_with_their_interval(pipeline, capsys):
    """For people, without braces."""
    assert cli.main(["measure", "m"]) == 0
    assert capsys.readouterr().out == "accuracy:\n  kl_mean: 0.01 [0.008, 0.012]\nnotes: []\n"


def test_export_gives_sizes_in_bytes(pipeline):
    """The options are checked as in a recipe."""
    assert cli.main(["export", "runs/x", "--to", "safetensors", "--out", "o", "--shard", "1GB"]) == 0
    assert pipeline.calls == [(Path("runs/x"), Path("o"), "safetensors", {"shard": 10**9})]


@pytest.mark.parametrize(("limit", "exit_code"), [(0.02, 0), (0.005, 1), (0.01, 2)])
def test_gate_exits_with_its_verdict(run_folder, capsys, limit, exit_code):
    """The interval is [0.008, 0.012]."""
    (run_folder / "gate.yaml").write_text(f"kl_mean: {{max: {limit}}}\n")
    assert cli.main(["gate", str(run_folder / "report.json"), "--policy", str(run_folder / "gate.yaml")]) == exit_code
    assert "0.01 [0.008, 0.012]" in capsys.readouterr().out


def test_gate_without_a_report_is_no_verdict(tmp_path, capsys):
    """3 or 4, never 1 or 2: a missing file, then one that is no report."""
    (tmp_path / "gate.yaml").write_text("kl_mean: {max: 0.02}\n")
    arguments = ["gate", str(tmp_path / "report.json"), "--policy", str(tmp_path / "gate.yaml")]
    assert cli.main(arguments) == 3
    (tmp_path / "report.json").write_text('{"schema": "something/1"}')
    assert cli.main(arguments) == 4


@pytest.mark.parametrize(("format", "start"), [("md", "# demo/tiny-moe"), ("json", "{")])
def test_report_has_two_formats(run_folder, capsys, format, start):
    """Markdown for people, JSON for programs."""
    assert cli.main(["report", str(run_folder), "--format", format]) == 0
    assert capsys.readouterr().out.startswith(start)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["run"],
        ["run", "int4_moe", "--bogus"],
        ["run", "no_such_recipe"],
        ["run", "int4_moe", "--set", "quantize.bits=5"],
        ["generate", "m", "p", "--max-new-tokens", "x"],
        ["report", "r", "--format", "pdf"],
        ["measure", "m", "--text", "a=1", "--text", "a=2"],
        ["export", "r", "--to", "onxx", "--out", "o"],
        ["gate", "r"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_3(pipeline, capsys, arguments):
    """1 and 2 come only from a verdict, and nothing has been run."""
    assert cli.main(arguments) == 3
    assert pipeline.calls == []


def test_help_exits_with_0(capsys):
    """Asked for, it is no error."""
    assert cli.main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (IntegrityError("model.safetensors is truncated"), 4, "error: model.safetensors is truncated\n"),
        (KeyError("x"), 3, "error: unexpected KeyError: 'x'\nRun it again with --debug for the traceback.\n"),
        (SystemExit(1), 3, "error: unexpected SystemExit: 1\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_errors_become_exit_codes(pipeline, monkeypatch, capsys, error, exit_code, said):
    """A short sentence on stderr, no traceback, and a code by kind."""

    def fail():
        raise error

    monkeypatch.setattr(pipeline, "doctor", fail)
    assert cli.main(["doctor"]) == exit_code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(pipeline, monkeypatch, capsys, how):
    """Asked for on the command line or in the environment."""
    monkeypatch.setattr(pipeline, "doctor", lambda: 1 // 0)
    if how == "environment":
        monkeypatch.setenv("COMPRESSOR_DEBUG", "1")
    assert cli.main(["doctor", "--debug"] if how == "option" else ["doctor"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "hint"), [([], "same command\n"), (["--fresh"], "same command without --fresh\n")])
def test_ctrl_c_says_how_to_resume(pipeline, monkeypatch, capsys, options, hint):
    """The same command with --fresh would throw away what there is."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    assert cli.main(["run", "int4_moe", "--quiet", *options]) == 130
    assert capsys.readouterr().err == f"error: interrupted; resume with the {hint}"


def test_lines_of_progress_come_every_5_seconds_with_the_time_left(capsys):
    """Ten blocks of 2 s each: lines after 0, 6, 12 and 18 s, the time left from the mean so far."""
    seconds = iter(range(0, 22, 2))
    advance = terminal._lines(lambda: next(seconds))
    for done in range(11):
        advance("quantize", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "quantize: 0/10",
        "quantize: 3/10, about 14 s left",
        "quantize: 6/10, about 8 s left",
        "quantize: 9/10, about 2 s left",
    ]


def test_the_bar_shows_the_work_at_hand_and_starts_again():
    """Work inside other work is shown alone; the same work a second time counts from the start."""
    bars = Progress(console=Console(file=io.StringIO()))
    advance = terminal._bar(bars)
    for label, done in [("walk", 3), ("measure", 4), ("walk", 1)]:
        advance(label, done, 4)
    assert [(task.description, task.completed, task.visible) for task in bars.tasks] == [
        ("walk", 1, True),
        ("measure", 4, False),
    ]


def test_a_reader_that_stops_early_is_no_error(run_folder):
    """`compress report ... | head` keeps the command's own exit code."""
    command = f"{sys.executable} -m compressor report {run_folder} --json; echo $? >&2"
    piped = subprocess.run(["bash", "-c", f"({command}) | true"], capture_output=True, text=True, check=False)
    assert piped.stderr == "0\n"


def test_the_command_line_does_not_import_torch():
    """`compress --help` answers at once."""
    code = "import sys, compressor.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(cli.__file__).parents[2], check=False).returncode == 0


def test_python_m_compressor_is_the_command():
    """For systems with a `compress` of their own; its exit codes are the same."""
    command = [sys.executable, "-m", "compressor"]
    answers = [subprocess.run([*command, word], capture_output=True, check=False) for word in ("--help", "bogus")]
    assert [answer.returncode for answer in answers] == [0, 3]
