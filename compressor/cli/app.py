"""The frame of every command: it answers, its errors become exit codes (contracts in docs/design.md, section 5).

What a command answers goes to stdout, everything else to stderr, so that `--json` leaves one JSON document on stdout.
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import typer

from compressor.errors import CompressorError

UNUSABLE = 3  # usage, recipe, environment, or an unexpected error; 1 and 2 come only from a verdict
# Newer versions of typer carry a copy of click: through its own name the right class is found in all of them.
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__base__)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no plan.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (as COMPRESSOR_DEBUG=1 does).")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress a transformers model by a recipe, measure what each pass costs, export what others can load.",
)


@dataclass(frozen=True)
class Answer:
    """What a command has to say: a JSON document, the same for people, and the exit code."""

    document: Any
    text: str
    exit_code: int = 0


class Interrupted(CompressorError):
    """Ctrl-C."""

    exit_code = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 to 4, or 130. Errors are printed, not raised."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return app(arguments, prog_name="compress", standalone_mode=False) or 0
    except UsageError as error:
        message = error.format_message()
        # `compress` alone: the help is printed, and there is nothing to add.
        return _failed(f"{message}\nTry 'compress --help'.", error, UNUSABLE, arguments) if message else UNUSABLE
    except CompressorError as error:
        return _failed(str(error), error, error.exit_code, arguments)
    except (Exception, SystemExit) as error:
        # A library's SystemExit(1) must not look like a regression.
        message = f"unexpected {type(error).__name__}: {error}\nRun it again with --debug for the traceback."
        return _failed(message, error, UNUSABLE, arguments)


def _failed(message: str, error: BaseException, exit_code: int, arguments: Sequence[str]) -> int:
    if "--debug" in arguments or os.environ.get("COMPRESSOR_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    if "--json" in arguments:
        kind = type(error).__name__
        _print(json.dumps({"error": {"type": kind, "message": message}, "exit_code": exit_code}, indent=2))
    return exit_code


def command(function: Callable[..., Answer]) -> Callable[..., int]:
    """Make a function a command of its name: its answer is printed, and its exit code returned."""

    @functools.wraps(function)
    def answered(*, as_json: bool, **options: Any) -> int:
        try:
            # Libraries print where they like; stdout is for the answer.
            with contextlib.redirect_stdout(sys.stderr):
                answer = function(as_json=as_json, **options)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted") from error
        _print(json.dumps(answer.document, indent=2, default=str) if as_json else answer.text)
        return answer.exit_code

    app.command()(answered)
    return answered


def _print(text: str) -> None:
    """Print to stdout; a reader that has gone (`compress report ... | head`) is no error of the command."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
