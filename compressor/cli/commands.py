"""The commands about one model or run: run, check, measure, bench, report, export, generate, doctor.

torch is imported inside the commands: `compress --help` and a mistyped option answer at once.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.app import Answer, AsJson, Debug, Interrupted, Quiet, command
from compressor.cli.terminal import outline, progress

if TYPE_CHECKING:
    from compressor.recipe import Recipe
    from compressor.reports import Report

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a value: quantize.bits=3. Repeatable.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Another model than the recipe's.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="org/name, a folder, a .gguf or demo/tiny-moe.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its report.json.")]


@command
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a bundled one.")],
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; default runs/<recipe>-<model>.")] = None,
    settings: Settings = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu (a run takes no other in this version).")] = "cpu",
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
    windows: Annotated[int | None, typer.Option(min=1, help="Windows taken from each text.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in a window.")] = None,
    suite: Annotated[
        Path | None, typer.Option("--evaluate", help="Tasks and behaviour too: a YAML file with an `evaluate` section.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="A model to compare with: KL, flips, ratios.")] = None,
    latency: Annotated[bool, typer.Option(help="Measure the speed too.")] = True,
    harness: Annotated[
        list[str] | None, typer.Option(help="A task of lm-evaluation-harness (extra `eval`). Repeatable.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of the harness's task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task of the harness.")] = None,
    similarity: Annotated[Path | None, typer.Option(help="MODEL is an encoder: sentence pairs (STS-B), .csv.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Measure a model: perplexity by text, tasks, memory, speed; with a baseline also how far it has moved from it."""
    chosen = {"text": _texts(text) if text else None, "windows": windows, "length": length}
    if similarity is not None:
        from compressor import pipeline

        found = pipeline.measure_encoder(model, similarity)
        return Answer(found, outline(found))
    from compressor import pipeline
    from compressor.recipe import load_evaluate

    evaluate = load_evaluate(suite, {key: value for key, value in chosen.items() if value is not None}, speed=latency)
    with progress(quiet) as advance:
        measured = pipeline.measure(
            model,
            evaluate=evaluate,
            baseline=baseline,
            harness=harness or (),
            include_path=include_path,
            limit=limit,
            progress=advance,
        )
    return Answer(measured, outline(measured))


@command
def bench(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run or one of its folders, or a model.")],
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL|none", help="Timed in turns with it; default what the run came from.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Sequences at a time.")] = "1,8",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in each prompt.")] = 128,
    generate: Annotated[int, typer.Option(min=1, help="Tokens generated after it.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch and onnxruntime; default torch's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures into this file too, as JSON.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Time a model in turns with the one it came from: prompts, decoding, bytes, peaks, and which is faster."""
    sizes = _sizes(batch)
    if out is not None and (out.parent / "manifest.json").is_file():
        text = f"{out.parent} is a finished run, whose manifest lists every file; write elsewhere"
        raise typer.BadParameter(text, param_hint="--out")
    from compressor import pipeline

    options = {"batch": sizes, "prompt": prompt, "generate": generate, "threads": threads}
    with progress(quiet) as advance:
        found = pipeline.bench(model, baseline, progress=advance, **options)  # type: ignore[arg-type]
    document = found.to_json()
    if out is not None:
        from compressor.checkpoint import write_json

        write_json(out, document)
    return Answer(document, found.to_text())


@command
def report(
    run: RunArgument,
    format: Annotated[str, typer.Option(help="md, html or json.")] = "md",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Print the report of a run."""
    if format not in ("md", "html", "json"):
        raise typer.BadParameter(f"{format!r} is not md, html or json", param_hint="--format")
    from compressor.reports import read_items, to_markdown
    from compressor.reports.html import to_html

    loaded = _load_report(run)
    document = loaded.to_json()
    if format == "json":
        return Answer(document, json.dumps(document, indent=2))
    folder = run if run.is_dir() else run.parent
    return Answer(document, to_html(loaded, read_items(folder)) if format == "html" else to_markdown(loaded).rstrip())


@command
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="The folder of a run, or of a model.")],
    to: Annotated[str, typer.Option(help="The format: safetensors, onnx or gguf.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="An option of the format: type=q4_k_m. Repeatable."),
    ] = None,
    shard: Annotated[str | None, typer.Option(help="Largest size of one file of safetensors, such as 5GB.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Write a model in another format."""
    from compressor.recipe import parse_export, parse_settings

    given = parse_settings(settings or ()) | ({} if shard is None else {"shard": shard})
    options = dict(parse_export(to, given))  # complaints come before anything heavy is imported
    from compressor import pipeline

    written = pipeline.export(folder, out, to, options)
    return Answer(written, outline(written))


@command
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 32,
    temperature: Annotated[
        float | None, typer.Option(help="Draw each token, at this temperature; default the most likely one.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens that hold this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same.")] = 0,
    int8_head: Annotated[bool, typer.Option("--int8-head", help="Round the output head to int8: faster.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Let a model go on from a prompt: greedily, or drawn where a temperature, top-k or top-p is given."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is not cpu or cuda", param_hint="--device")
    from compressor import pipeline

    drawn = temperature is not None or top_k > 0 or top_p < 1
    sampling = {
        "do_sample": drawn,
        "temperature": 1.0 if temperature is None else temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    text = pipeline.generate(model, prompt, max_new_tokens, int8_head=int8_head, device=device, **sampling)
    return Answer({"model": model, "prompt": prompt, "text": text}, text)


@command
def doctor(as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False) -> Answer:
    """Say which kernels and devices are used here, which are not, and why."""
    from compressor import pipeline

    found = pipeline.doctor()
    return Answer(found, outline(found))


def _load_recipe(recipe: str, model: str | None, settings: Sequence[str] | None) -> "Recipe":
    from compressor.recipe import load_recipe

    # Quoted, since a path may hold what YAML would read as something else.
    chosen = [] if model is None else [f"model={json.dumps(model, ensure_ascii=False)}"]
    return load_recipe(recipe, [*chosen, *(settings or ())])


def _load_report(path: Path) -> "Report":
    from compressor.reports import Report

    return Report.load(path / "report.json" if path.is_dir() else path)


def _sizes(batch: str) -> tuple[int, ...]:
    """Batch sizes as they are written on the command line: 1,8."""
    parts = batch.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{batch!r} is not a list of sizes such as 1,8", param_hint="--batch")
    return tuple(int(part) for part in parts)


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
