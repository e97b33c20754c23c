"""`optimum-cli compress ...`: our command inside optimum's, with optimum's word on what a model is for.

optimum imports this for every one of its commands (`optimum/commands/register/`), so what is heavy waits.
"""

import json
import sys
from argparse import REMAINDER, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from compressor.cli.app import app, main
from compressor.errors import CompressorError, EnvironmentProblem, UnsupportedModel

TASKS = {
    "text-generation": "decoders, in all formats",
    "feature-extraction": "encoders, in ONNX",
    "fill-mask": "encoders, in ONNX without their head",
}


class CompressCommand(BaseOptimumCLICommand):
    """optimum's entry: it hands all arguments on as they are, and ends with our exit code."""

    COMMAND = CommandInfo(name="compress", help="Compress language models by recipes of passes (compressor).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take everything: no character begins an option of optimum's here, so `--help` is ours too."""
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Check the task, then run the command; does not return."""
        arguments: list[str] = self.args.arguments
        app.callback(help=cast(str, app.info.help))(lambda: check_task(arguments))  # its errors become exit codes too
        sys.exit(main(arguments))


def check_task(arguments: Sequence[str]) -> None:
    """Refuse a `run` or an `export` of a model that optimum knows to be for something else, before any download.

    What optimum does not know is said, and left to the command to judge.
    """
    model = _model_of(arguments)
    if model is None:
        return
    try:
        task = infer_task(model)
    except EnvironmentProblem as error:
        print(f"note: {error}", file=sys.stderr)
        return
    if task is not None and task not in TASKS:
        possible = "; ".join(f"{name} ({what})" for name, what in TASKS.items())
        raise UnsupportedModel(f"{model} is a model for {task}, says optimum; possible are {possible}")


def infer_task(model: str) -> str | None:
    """What a model is for, in optimum's words: of a hub id what the hub says, of a folder its architecture.

    None for demo models and single files. EnvironmentProblem where optimum cannot tell.
    """
    folder = Path(model).expanduser()
    if folder.is_file() or model.startswith("demo/"):
        return None
    from optimum.exporters.tasks import TasksManager

    repository, _, revision = model.partition("@")
    try:
        if folder.is_dir():  # optimum knows tasks of classes, not of folders
            return TasksManager.infer_task_from_model(_architecture(folder))
        return TasksManager.infer_task_from_model(repository, revision=revision or None)
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        why = str(error).partition(". ")[0]  # behind its first sentence optimum lists all tasks there are
        raise EnvironmentProblem(f"optimum does not know what {model} is for: {why}") from error


def _architecture(folder: Path) -> Any:
    """The transformers class that a model's (or a run's) configuration names."""
    import transformers

    run = folder / "model"
    config = json.loads(((run if run.is_dir() else folder) / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or [None]
    if names[0] is None or not hasattr(transformers, names[0]):
        raise ValueError(f"its architecture is {names[0]}, no class of transformers {transformers.__version__}")
    return getattr(transformers, names[0])


def _model_of(arguments: Sequence[str]) -> str | None:
    """The model of a `run` or `export`; None for other commands, and where they will complain by themselves."""
    if not arguments or arguments[0] not in ("run", "export"):
        return None
    from compressor.recipe import load_recipe

    name, *rest = arguments
    group: Any = typer.main.get_command(app)
    given = group.commands[name].make_context(name, rest, resilient_parsing=True).params
    if name == "export":
        return None if given["folder"] is None else str(given["folder"])
    if given["model"] is not None or given["recipe"] is None:
        return given["model"]
    try:
        return load_recipe(given["recipe"], given["settings"] or ()).model
    except CompressorError:
        return None
