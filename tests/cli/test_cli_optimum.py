"""`optimum-cli compress`: our command as optimum's, its task check before the work."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

pytest.importorskip("optimum.commands.base", reason="the extra `optimum` is not installed")

from compressor.cli.app import app
from compressor.cli.optimum import CompressCommand, check_task
from compressor.errors import UnsupportedModel


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess:
    """Run `optimum-cli` as its script does, from the project's folder."""
    script = "import sys; from optimum.commands.optimum_cli import main; sys.argv[0] = 'optimum-cli'; main()"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def model_folder(folder: Path, architecture: str | None) -> Path:
    """A configuration, which is all that the check reads."""
    folder.mkdir()
    names = {} if architecture is None else {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps({"model_type": "x", **names}))
    return folder


def test_help_is_ours():
    """optimum lists the command; `--help` behind it reaches our own parser."""
    answer = optimum_cli("compress", "--help")
    assert answer.returncode == 0
    assert "bisect" in answer.stdout


def test_arguments_pass_through():
    """A recipe is checked as by `compress check`, with one JSON document on stdout."""
    answer = optimum_cli("compress", "check", "int4_moe", "--json")
    assert (answer.returncode, json.loads(answer.stdout)["model"]) == (0, "demo/tiny-moe")


def test_another_task_is_refused_as_an_error_of_the_command(tmp_path, monkeypatch, capsys):
    """Exit code 3 and one JSON document, before anything is written."""
    monkeypatch.setattr(app, "registered_callback", app.registered_callback)  # given back: other tests use the app
    folder = model_folder(tmp_path / "m", "BertForSequenceClassification")
    parser = ArgumentParser()
    CompressCommand(parser.add_subparsers())
    options = ["--to", "onnx", "--out", str(tmp_path / "o"), "--json"]
    parsed = parser.parse_args(["compress", "export", str(folder), *options])
    with pytest.raises(SystemExit) as ended:
        parsed.func(parsed).run()
    assert (ended.value.code, json.loads(capsys.readouterr().out)["error"]["type"]) == (3, "UnsupportedModel")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel", "BertForMaskedLM"])
def test_decoders_and_encoders_pass(tmp_path, capsys, architecture):
    """Their tasks are text-generation, feature-extraction and fill-mask."""
    check_task(["export", str(model_folder(tmp_path / "m", architecture)), "--to", "onnx", "--out", "o"])
    assert capsys.readouterr().err == ""


def test_the_recipes_model_is_checked(tmp_path):
    """--model stands for the recipe's own, as in the run."""
    folder = model_folder(tmp_path / "m", "T5ForConditionalGeneration")
    with pytest.raises(UnsupportedModel, match="a model for text2text-generation, says optimum; possible are"):
        check_task(["run", "int4_moe", "--model", str(folder)])


def test_the_hub_is_asked_for_the_task_of_an_id(monkeypatch):
    """With its revision; what the hub says counts before anything is fetched."""
    from optimum.exporters.tasks import TasksManager

    asked = []

    def infer(model, revision=None):
        asked.append((model, revision))
        return "image-classification"

    monkeypatch.setattr(TasksManager, "infer_task_from_model", infer)
    with pytest.raises(UnsupportedModel, match="image-classification"):
        check_task(["run", "int4_moe", "--model", "org/name@v2"])
    assert asked == [("org/name", "v2")]


def test_what_optimum_does_not_know_is_said(tmp_path, capsys):
    """A configuration without an architecture: the command itself will judge."""
    check_task(["export", str(model_folder(tmp_path / "m", None)), "--to", "onnx", "--out", "o"])
    assert "optimum does not know what" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["doctor"], ["run"], ["run", "--help"], ["run", "no_such_recipe"], ["run", "int4_moe"]]
)
def test_other_commands_and_mistakes_are_left_to_the_command(arguments, capsys):
    """Nothing to check (demo models are ours), or an error that is reported later."""
    check_task(arguments)
    assert capsys.readouterr().err == ""
