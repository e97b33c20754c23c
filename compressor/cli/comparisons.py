"""The commands that compare: gate, sweep, bisect."""

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli.app import Answer, AsJson, Debug, Interrupted, Quiet, command
from compressor.cli.terminal import progress

if TYPE_CHECKING:
    from compressor.pipeline import GateResult


class Format(enum.StrEnum):
    """How a gate speaks."""

    text = "text"
    json = "json"
    junit = "junit"
    markdown = "markdown"
    github = "github"


class OnInconclusive(enum.StrEnum):
    """What a gate does when the evidence does not decide."""

    fail = "fail"
    warn = "warn"
    let_pass = "pass"


@command
def gate(
    candidate: Annotated[str, typer.Argument(metavar="[CANDIDATE]", help="A run's folder, or a model.")] = "",
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="A run or a model; may repeat: the original first, then the last accepted artefact."),
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="What has to be kept: a YAML file (docs/gates.md).")] = None,
    preset: Annotated[str | None, typer.Option(help="Instead of a policy: strict, default or loose.")] = None,
    on_inconclusive: Annotated[OnInconclusive, typer.Option(help="When the evidence decides nothing.")] = (
        OnInconclusive.fail
    ),
    format: Annotated[Format, typer.Option(help="What goes to stdout.")] = Format.text,
    out: Annotated[Path | None, typer.Option(help="Write gate.json, gate.xml and gate.md into this folder.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="How many items do I need? With --margin and --flip-rate.")] = (
        False
    ),
    margin: Annotated[float, typer.Option(min=0.0001, max=1.0, help="--plan: drop to be seen (0.01: a point).")] = 0.01,
    flip_rate: Annotated[float, typer.Option(min=0.0001, max=1.0, help="--plan: items that change sides.")] = 0.08,
    self_test: Annotated[bool, typer.Option("--self-test", help="Plant faults in copies: is each caught?")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Decide whether CANDIDATE may replace its baseline: exit 0 pass, 1 regression, 2 inconclusive, 4 damaged."""
    if plan:
        return _plan(margin, flip_rate)
    if not candidate:
        raise typer.BadParameter("a run's folder, or a model, is missing", param_hint="CANDIDATE")
    if self_test:
        return _self_test(candidate, baseline or [], quiet)
    from compressor import pipeline

    rules, evaluate = _policy(policy, preset)
    try:
        with progress(quiet) as advance:
            result = pipeline.gate(
                candidate,
                baseline or None,
                rules,
                evaluate=evaluate,
                on_inconclusive=on_inconclusive.value,
                progress=advance,
            )
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; nothing was decided") from error
    if out is not None:
        _write(result, out)
    return Answer(result.to_json(), _rendered(result, format), result.exit_code)


@command
def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a bundled one.")],
    out: Annotated[Path, typer.Option(help="Folder of all variants; the same command continues an interrupted sweep.")],
    vary: Annotated[
        list[str] | None, typer.Option(metavar="PATH=V1,V2", help="quantize.bits=2,3,4,8. Repeat it for a grid.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Runs of each variant: 0,1,2.")] = "",
    ablate: Annotated[bool, typer.Option("--ablate", help="One variant without each pass: what does it add?")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a value in all variants. Repeatable."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Run variants of a recipe, rank them with intervals, draw the Pareto front of bytes against KL."""
    try:
        numbers = tuple(int(part) for part in seeds.split(",") if part.strip())
    except ValueError:
        text = f"{seeds!r} is not a list of whole numbers such as 0,1,2"
        raise typer.BadParameter(text, param_hint="--seeds") from None
    if not vary and not ablate and len(numbers) < 2:
        raise typer.BadParameter("nothing to compare: give --vary PATH=V1,V2, --seeds or --ablate", param_hint="--vary")
    from compressor import pipeline

    try:
        with progress(quiet) as advance:
            result = pipeline.sweep(
                recipe,
                out,
                vary=vary or (),
                seeds=numbers,
                ablate=ablate,
                settings=settings or (),
                progress=advance,
            )
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; continue with the same command") from error
    return Answer(result.to_json(), result.to_text(), result.exit_code)


@command
def bisect(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    baseline: Annotated[str | None, typer.Option(help="The model it came from; default the run's own.")] = None,
    metric: Annotated[str, typer.Option(help="kl_mean or perplexity_ratio.")] = "kl_mean",
    limit: Annotated[float | None, typer.Option(help="Blame the first pass beyond this.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text that are compared.")] = 4,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Answer:
    """Say which pass, which layer and which expert a loss comes from."""
    from compressor import pipeline

    with progress(quiet) as advance:
        found = pipeline.bisect(run, metric=metric, limit=limit, baseline=baseline, windows=windows, progress=advance)
    return Answer(found.to_json(), found.to_text())


def _policy(path: Path | None, preset: str | None) -> tuple[Any, Any]:
    """Rules, and how models without records are measured."""
    from compressor.gates import PRESETS, Policy
    from compressor.recipe import load_gate

    if (path is None) == (preset is None):
        raise typer.BadParameter("give one of --policy FILE and --preset NAME", param_hint="--policy")
    if path is not None:
        return load_gate(path)
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}", param_hint="--preset")
    return Policy(preset=preset), None


def _plan(margin: float, flip_rate: float) -> Answer:
    from compressor.gates.sample_size import items_needed, items_to_pass, minimum_detectable_effect

    if margin >= flip_rate:
        text = f"a drop of {margin:g} needs at least so many items that change sides, --flip-rate is {flip_rate:g}"
        raise typer.BadParameter(text, param_hint="--margin")
    needed, passing = items_needed(flip_rate, margin), items_to_pass(flip_rate, margin)
    shown = {n: minimum_detectable_effect(n, flip_rate) for n in (200, 500, 1000, 2000, 5000, 10000)}
    lines = [
        f"{needed:,} items show a drop of {margin:g} where {flip_rate:.0%} of the items change sides",
        f"and {passing:,} items let a candidate that loses nothing pass a margin of {margin:g}",
        "(one-sided test at 5 %, power 80 %). With fewer or more items, the smallest drop that shows:",
        *(f"{n:>8,} items: {'none' if drop is None else f'{drop:.4f}'}" for n, drop in shown.items()),
    ]
    document = {
        "items_needed": needed,
        "items_to_pass": passing,
        "margin": margin,
        "flip_rate": flip_rate,
        "minimum_detectable_effect": shown,
    }
    return Answer(document, "\n".join(lines))


def _self_test(candidate: str, baselines: list[str], quiet: bool) -> Answer:
    from compressor import pipeline

    with progress(quiet) as advance:
        rows = pipeline.gate_self_test(candidate, baselines[0] if baselines else None, progress=advance)
    missed = [row for row in rows if row["caught"] is False]
    width = max(len(row["fault"]) for row in rows)
    lines = [f"{row['fault']:<{width}}  {_caught(row)}" for row in rows]
    applied = [row for row in rows if row["caught"] is not None]
    lines.append(f"{len(applied) - len(missed)} of {len(applied)} planted faults caught")
    return Answer({"faults": rows, "missed": len(missed)}, "\n".join(lines), 1 if missed else 0)


def _caught(row: dict[str, Any]) -> str:
    if row["caught"] is None:
        return str(row["text"])
    return f"{'caught' if row['caught'] else 'MISSED'}  {row['rule'] or ''}  {row['named'] or ''}".rstrip()


def _rendered(result: "GateResult", format: Format) -> str:
    from compressor.gates import output

    document = result.to_json()
    match format:
        case Format.json:
            return json.dumps(document, indent=2)
        case Format.junit:
            return output.to_junit(document)
        case Format.markdown:
            return output.to_markdown(document)
        case Format.github:
            return output.to_github(document)
        case Format.text:
            return output.to_text(document)


def _write(result: "GateResult", out: Path) -> None:
    from compressor.checkpoint import write_json, write_text
    from compressor.gates import output

    document = result.to_json()
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "gate.json", document)
    write_text(out / "gate.xml", output.to_junit(document))
    write_text(out / "gate.md", output.to_markdown(document))
