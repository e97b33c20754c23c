"""`compress run`: a model through a list of passes, measured after each, gated, exported, loaded back."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import Progress, release_memory
from compressor.checkpoint import write_text
from compressor.errors import RecipeError
from compressor.exporters import model_card, write_manifest
from compressor.metrics import PeakMemory, describe_environment
from compressor.models import Model, load_model
from compressor.passes import PASSES, Context
from compressor.pipeline.costs import latency_budgets
from compressor.pipeline.exporting import format_of, measured_files, write_export
from compressor.pipeline.folder import RunFolder, claimed, default_out, journal_key, text_digests
from compressor.pipeline.gating import gate_run
from compressor.pipeline.measuring import Measured, Measuring, suite_texts
from compressor.pipeline.planning import make_plan
from compressor.recipe import Recipe, load_recipe
from compressor.recipe.options import EXPORTS, kind_of
from compressor.reports import Export, Ledger, Report, check_complete, read_items, to_markdown
from compressor.reports.html import to_html


@dataclass(frozen=True)
class RunResult:
    """The report of a run, its folder, and the exit code of its verdict (0 without a gate)."""

    report: Report
    out: Path
    exit_code: int


def run(
    recipe: Recipe | str | Path,
    out: Path | str | None = None,
    *,
    device: str = "cpu",
    fresh: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Compress a model by a recipe. A run that was killed continues where it stopped, with the same bytes.

    Raises RecipeError, UnsupportedModel and EnvironmentProblem before long work where that is possible, IntegrityError
    where files do not hold what they say or the export differs from the live model.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if device != "cpu":
        raise RecipeError(f"device {device!r}: this version computes on the cpu")
    source = source_of(recipe)
    model, plan = source(), make_plan(recipe, source())
    out = Path(out) if out else default_out(recipe)
    plan.check_room(out)
    torch.manual_seed(recipe.seed)
    with claimed(out, fresh=fresh):
        folder = RunFolder(out, journal_key(recipe, model, device))
        finished = folder.journal.last("finished")
        if finished:
            return RunResult(Report.load(out / "report.json"), out, finished["exit_code"])
        evaluate = recipe.evaluate
        texts = suite_texts(evaluate, model.tokenizer)
        budgets = latency_budgets(recipe.gate)
        measure = Measuring(evaluate, texts, folder.work / "baseline", folder.journal, source, progress, budgets)
        before = after = measure(model, -1, files=model.path)
        report = Report.start(recipe.sha256, describe_environment(), plan.to_json(), recipe.model, before.measurement)
        _write_items(out, "baseline", before)
        for i, step in enumerate(recipe.passes):
            kind = kind_of(step, PASSES)
            done = _apply(step, i, model, recipe, folder, source, progress)
            last = i == len(recipe.passes) - 1
            exports = [_export(target, model, texts.own[0].ids, folder) for target in recipe.export] if last else []
            files = measured_files(out, recipe.export) if last else None
            after = measure(model, i, files=files, full=last or evaluate.when == "each")
            name = step.id or (kind if _is_only(kind, recipe) else f"{kind}-{i + 1}")  # type: ignore[attr-defined]
            options = step.model_dump(mode="json", exclude={"id"})
            ledger = Ledger.from_json(done["ledger"])
            report = report.after(
                kind,
                name,
                options,
                done["seconds"],
                done["peak_memory_bytes"],
                after.measurement,
                ledger,
                done["cpu_seconds"],
            )
            _write_items(out, name, after)
            folder.drop_generations_before(i)
        return _finish(report.with_exports(exports), recipe, model, folder, before, after)


def source_of(recipe: Recipe) -> Callable[[], Model]:
    """Loads the recipe's model anew, as it was before any pass."""
    return lambda: load_model(recipe.model, dtype=recipe.dtype)


def _apply(
    step: Any,
    i: int,
    model: Model,
    recipe: Recipe,
    folder: RunFolder,
    source: Callable[[], Model],
    progress: Progress | None,
) -> dict[str, Any]:
    """One pass, unless the journal says that it is done; the model is at its generation afterwards either way."""
    journal = folder.journal
    done = journal.last("step", step=i)
    if done is None:
        counts = model.parameter_counts()
        context = Context(
            calibration=recipe.calibration,
            seed=recipe.seed + i,
            memory_bytes=recipe.memory,
            workplace=folder.workplace(i),
            progress=progress,
            reference=source,
        )
        journal.append("begin", step=i)
        release_memory(cycles=True)  # the model that the plan used up, baselines
        cpu = time.process_time()
        with PeakMemory() as peak:
            ledger = step.apply(model, context)
        check_complete(ledger, sum(counts.values()))
        model.finish_generation(folder.generation(i))
        done = journal.append(
            "step",
            step=i,
            seconds=_seconds(journal.entries(), i),
            cpu_seconds=time.process_time() - cpu,
            peak_memory_bytes=peak.peak_bytes,
            ledger=ledger.to_json(),
        )
    elif folder.generation(i).exists():  # an older generation than the last two is gone, and not needed
        model.use_generation(folder.generation(i))
    return done


def _seconds(entries: list[dict[str, Any]], step: int) -> float:
    """Wall time of a step over all the sessions that worked on it; what a kill cut off counts to its last block."""
    total, started, last = 0.0, None, 0.0
    for entry in entries:
        if entry.get("step") != step or entry["kind"] not in ("begin", "block"):
            continue
        if entry["kind"] == "begin":
            total += last - started if started is not None else 0.0
            started = entry["time"]
        last = entry["time"]
    return total + (time.time() - started if started is not None else 0.0)


def _export(options: Any, model: Model, ids: Tensor, folder: RunFolder) -> Export:
    """Write beside the final name, load back, compare, then rename: the folder appears when it is proven."""
    name = format_of(options).folder
    done = folder.journal.last("export", path=name)
    if done is None or not (folder.out / name).exists():
        written = write_export(options, model, folder.out / name, ids, staged=folder.work / "export")
        done = folder.journal.append("export", path=name, bytes=written.bytes, parity=written.parity)
    return Export(format=kind_of(options, EXPORTS), path=name, bytes=done["bytes"], parity=done["parity"])


def _finish(
    report: Report, recipe: Recipe, model: Model, folder: RunFolder, before: Measured, after: Measured
) -> RunResult:
    """Verdict, report, card and manifest; the journal's last line says that the run is complete."""
    exit_code = 0
    out = folder.out
    if recipe.gate is not None:
        result = gate_run(recipe.gate, report, out, model.source.path, before, after)
        report, exit_code = report.with_gate(result.to_json()), result.exit_code
    report.save(out / "report.json")
    write_text(out / "report.md", to_markdown(report))
    write_text(out / "report.html", to_html(report, read_items(out)))
    write_text(out / "recipe.yaml", recipe.dumped())
    digests = text_digests(recipe)
    calibration = [{"name": name, "sha256": digest} for name, digest in digests.items()]
    write_text(
        out / "README.md",
        model_card(
            report,
            base_model=recipe.model,
            licence=model.source.licence,
            name=f"{Path(recipe.model).name}-{recipe.name}",
            quantization=_describe(recipe),
            calibration=calibration,
        ),
    )
    assert model.reader is not None
    sources = [{"name": recipe.model, "revision": model.source.revision, "digest": model.reader.digest()}]
    sources += [{"name": name, "revision": None, "digest": digest} for name, digest in digests.items()]
    write_manifest(out, recipe=recipe.sha256, seed=recipe.seed, sources=sources, report=report)
    folder.journal.append("finished", exit_code=exit_code)
    folder.clean()
    return RunResult(report, out, exit_code)


def _describe(recipe: Recipe) -> str:
    parts = []
    for step in recipe.passes:
        options: Any = step
        match kind_of(step, PASSES):
            case "quantize":
                grid = "symmetric" if options.symmetric else "asymmetric"
                group = "one scale a row" if options.group_size == "channel" else f"groups of {options.group_size}"
                inputs = ", int8 activations" if options.activations else ""
                parts.append(f"int{options.bits}, {grid}, {group}{inputs} ({options.method})")
            case "prune":
                parts.append(f"{options.structure} pruning of {options.ratio:.0%} ({options.score})")
            case "distill":
                parts.append(f"distillation on {options.tokens:,} tokens")
    return "; ".join(parts)


def _is_only(kind: str, recipe: Recipe) -> bool:
    return sum(kind_of(step, PASSES) == kind for step in recipe.passes) == 1


def _write_items(out: Path, name: str, measured: Measured) -> None:
    if measured.items:
        (out / "items").mkdir(exist_ok=True)
        write_text(out / "items" / f"{name}.jsonl", "".join(json.dumps(item) + "\n" for item in measured.items))
