"""The command line: it parses, calls, prints (contracts in docs/design.md, section 5).

What a command answers goes to stdout, everything else to stderr, so that `--json` leaves one JSON document on stdout.
torch is imported inside the commands: `compress --help` and a mistyped option answer at once.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.recipe import Recipe
    from compressor.reports import Report

UNUSABLE = 3  # usage, recipe, environment, or an unexpected error; 1 and 2 come only from a verdict
SECONDS_A_LINE = 5.0  # between two lines of progress in a log
# Newer versions of typer carry a copy of click: through its own name the right class is found in all of them.
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__base__)

Advance = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no plan.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (as COMPRESSOR_DEBUG=1 does).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a value: quantize.bits=3. Repeatable.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Another model than the recipe's.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="org/name, a folder, a .gguf or demo/tiny-moe.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its report.json.")]

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


@command
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a bundled one.")],
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; default runs/<recipe>-<model>.")] = None,
    settings: Settings = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming an interrupted run.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Compress a model: passes, a measurement before and after each, verdict, export. Resumes an interrupted run."""
    loaded = _load_recipe(recipe, model, settings)
    from compressor import pipeline
    from compressor.reports import to_markdown

    if not quiet:
        print(pipeline.check(loaded).to_text(), file=sys.stderr)
    try:
        with progress(quiet) as advance:
            result = pipeline.run(loaded, out, device=device, fresh=fresh, progress=advance)
    except KeyboardInterrupt as error:
        hint = " without --fresh" if fresh else ""
        raise Interrupted(f"interrupted; resume with the same command{hint}") from error
    document = {**result.report.to_json(), "out": str(result.out), "exit_code": result.exit_code}
    return Answer(document, f"{to_markdown(result.report).rstrip()}\n\nwritten to {result.out}", result.exit_code)


@command
def check(
    target: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or a model.")],
    model: ModelOption = None,
    settings: Settings = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Say what a run would do, and what it would take, from config and headers only."""
    from compressor.recipe import is_recipe

    subject: Recipe | str = target
    if is_recipe(target):
        subject = _load_recipe(target, model, settings)
    elif model or settings:
        raise typer.BadParameter(f"{target} is a model; these belong to a recipe", param_hint="--model, --set")
    from compressor import pipeline

    result = pipeline.check(subject)
    return Answer(result.to_json(), result.to_text())


@command
def measure(
    model: ModelArgument,
    text: Annotated[
        list[str] | None, typer.Option(help="demo/text (the default), FILE or NAME=FILE; repeat it for more files.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows taken from each text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    baseline: Annotated[str | None, typer.Option(help="A model to compare with: KL, agreement, ratios.")] = None,
    latency: Annotated[bool, typer.Option(help="Measure the speed too.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Measure a model: perplexity by text, memory, speed; with a baseline also how far it has moved from it."""
    texts = _texts(text or ["demo/text"])
    from compressor import pipeline
    from compressor.recipe import Latency

    speeds = Latency() if latency else None
    measured = pipeline.measure(model, texts=texts, windows=windows, length=length, baseline=baseline, latency=speeds)
    return Answer(measured, outline(measured))


@command
def gate(
    run: RunArgument,
    policy: Annotated[Path, typer.Option(help="The limits: a YAML file (docs/gates.md).")],
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Judge a run by a policy: exit 0 pass, 1 regression, 2 inconclusive. Needs no model."""
    from compressor.gates import judge
    from compressor.recipe import load_policy

    verdict = judge(_load_report(run).to_json(), load_policy(policy))
    lines = [f"{check.status:<12}  {check.text}" for check in verdict.checks]
    return Answer(verdict.to_json(), "\n".join([*lines, f"verdict: {verdict.status}"]), verdict.exit_code)


@command
def report(
    run: RunArgument,
    format: Annotated[str, typer.Option(help="md or json.")] = "md",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Print the report of a run."""
    if format not in ("md", "json"):
        raise typer.BadParameter(f"{format!r} is not md or json", param_hint="--format")
    from compressor.reports import to_markdown

    loaded = _load_report(run)
    document = loaded.to_json()
    return Answer(document, json.dumps(document, indent=2) if format == "json" else to_markdown(loaded).rstrip())


@command
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="The folder of a run, or of a model.")],
    to: Annotated[str, typer.Option(help="The format: safetensors.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    shard: Annotated[str, typer.Option(help="Largest size of one file.")] = "5GB",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Write a model in another format."""
    from compressor.recipe import parse_export

    options = parse_export(to, {"shard": shard})
    from compressor import pipeline

    written = pipeline.export(folder, out, to, dict(options))
    return Answer(written, outline(written))


@command
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 32,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Let a model go on from a prompt."""
    from compressor import pipeline

    text = pipeline.generate(model, prompt, max_new_tokens)
    return Answer({"model": model, "prompt": prompt, "text": text}, text)


@command
def doctor(as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False) -> Answer:
    """Say which kernels and devices are used here, which are not, and why."""
    from compressor import pipeline

    found = pipeline.doctor()
    return Answer(found, outline(found))


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Advance]:
    """Show how far the work is, on stderr: a bar on a terminal, now and then a line in a log, nothing when quiet."""
    console = Console(stderr=True)
    if quiet:
        yield lambda label, done, total: None
    elif not console.is_terminal:
        yield _lines(time.monotonic)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bars:
            yield _bar(bars)


def _bar(bars: Progress) -> Advance:
    """One visible bar; work that was interrupted by other work keeps its own clock."""
    tasks: dict[str, TaskID] = {}
    last: dict[str, int] = {}

    def advance(label: str, done: int, total: int) -> None:
        if label not in tasks:
            tasks[label] = bars.add_task(label)
        elif done < last[label]:
            bars.reset(tasks[label])  # the same kind of work again, such as measuring after the next pass
        last[label] = done
        for name, task in tasks.items():
            bars.update(task, visible=name == label)
        bars.update(tasks[label], completed=done, total=total)

    return advance


def _lines(clock: Callable[[], float]) -> Advance:
    """A line with the time left at most every 5 seconds."""
    started: dict[str, tuple[int, float]] = {}
    before: dict[str, int] = {}
    printed = -math.inf

    def advance(label: str, done: int, total: int) -> None:
        nonlocal printed
        now = clock()
        if label not in started or done < before[label]:
            started[label] = (done, now)
        before[label] = done
        first, since = started[label]
        if now - printed < SECONDS_A_LINE:
            return
        printed = now
        left = f", about {(now - since) * (total - done) / (done - first):.0f} s left" if done > first else ""
        print(f"{label}: {done}/{total}{left}", file=sys.stderr, flush=True)

    return advance


def outline(document: Any, indent: int = 0) -> str:
    """A JSON document as indented lines; an estimate as `value [low, high]`."""
    lines = []
    for key, value in document.items() if isinstance(document, Mapping) else enumerate(document):
        head = f"{'  ' * indent}{key}:" if isinstance(document, Mapping) else f"{'  ' * indent}-"
        if isinstance(value, Mapping) and value.keys() == {"value", "ci95", "n"}:
            interval = "" if value["ci95"] is None else " [{:.4g}, {:.4g}]".format(*value["ci95"])
            lines.append(f"{head} {value['value']:.4g}{interval}")
        elif isinstance(value, Mapping | list | tuple) and value:
            lines += [head, outline(value, indent + 1)]
        else:
            lines.append(f"{head} {value:.4g}" if isinstance(value, float) else f"{head} {value}")
    return "\n".join(lines)


def _load_recipe(recipe: str, model: str | None, settings: Sequence[str] | None) -> "Recipe":
    from compressor.recipe import load_recipe

    # Quoted, since a path may hold what YAML would read as something else.
    chosen = [] if model is None else [f"model={json.dumps(model, ensure_ascii=False)}"]
    return load_recipe(recipe, [*chosen, *(settings or ())])


def _load_report(path: Path) -> "Report":
    from compressor.reports import Report

    return Report.load(path / "report.json" if path.is_dir() else path)


def _texts(options: Sequence[str]) -> str | dict[str, str]:
    """One bundled set or file as it is; several as a mapping of names to files."""
    if len(options) == 1 and "=" not in options[0]:
        return options[0]
    texts: dict[str, str] = {}
    for option in options:
        name, _, file = option.partition("=") if "=" in option else (Path(option).stem, "", option)
        if name in texts:
            raise typer.BadParameter(f"two texts have the name {name!r}; write NAME=FILE", param_hint="--text")
        texts[name] = file
    return texts


def _print(text: str) -> None:
    """Print to stdout; a reader that has gone (`compress report ... | head`) is no error of the command."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
