"""`compress bisect`: which pass, which layer and which weight or expert a loss comes from.

The pass is read off the run's report. The layer is found by exchange: the candidate's block in the baseline
(`replaced`) and the baseline's block in the candidate (`restored`), for ranges of blocks first where there are many.
The layer to blame is the one whose restoration takes most of the loss away; inside it each weight and each expert is
restored by itself.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor.calibration import Progress
from compressor.errors import EnvironmentProblem, IntegrityError, RecipeError
from compressor.exporters import verify_manifest
from compressor.models import Model, load_model
from compressor.pipeline.bisect_search import Found, search
from compressor.pipeline.folder import WORK
from compressor.pipeline.measuring import evaluation_texts
from compressor.pipeline.mixtures import Pair
from compressor.pipeline.running import run as run_recipe
from compressor.pipeline.weight_changes import outliers
from compressor.recipe import Evaluate, Recipe, load_recipe
from compressor.reports import Estimate, Report, Step
from compressor.reports.bisect import NAMES, BisectResult, Blamed, Outlier, PassRow, percent, value_text

# How far the artefact's KL may be from what the run measured on the same windows before its files are blamed.
SAME_KL = (1e-4, 0.05)


@dataclass(frozen=True)
class Subject:
    """What is looked into: a model's folder, the baseline's name, and the run around them if there is one."""

    name: str
    model: Path | None
    baseline: str
    evaluate: Evaluate
    dtype: str = "auto"
    report: Report | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def bisect(
    run: str | Path | Recipe,
    *,
    metric: str = "kl_mean",
    limit: float | None = None,
    baseline: str | None = None,
    windows: int = 4,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> BisectResult:
    """Name the pass, then the layer, then the weight or expert that a run's loss comes from.

    `run`: a finished run's folder, a model's folder with its `baseline`, or a recipe (which is run first, or read if it
    was). `metric`: kl_mean or perplexity_ratio (of the text that suffered most). With a `limit`, the first pass beyond
    it is blamed, and a model within it is not searched. `windows` of each text are compared; texts are those of
    `evaluate`, or else the run's (demo/text for a model's folder).
    """
    if metric not in NAMES:
        raise RecipeError(f"bisect follows {' or '.join(NAMES)}, not {metric!r}")
    if isinstance(run, Recipe):
        run = run_recipe(run, progress=progress).out
    subject = _subject(Path(run), baseline, evaluate)
    passes, step, passes_reason = _by_pass(subject.report, metric, limit)
    result = BisectResult(
        candidate=subject.name,
        baseline=subject.baseline,
        metric=metric,
        limit=limit,
        verdict="",
        blamed=Blamed(step=step),
        whole=None,
        windows={},
        tokens=0,
        passes=passes,
        passes_reason=passes_reason,
        notes=subject.notes,
    )
    pair, reason = _pair(subject, windows)
    if pair is None:
        verdict = _pass_verdict(result)
        return replace(result, verdict=verdict, units_reason=reason, parts_reason="no layer was looked for")
    result = replace(
        result,
        windows={text.name: len(text.ids) for text in pair.texts},
        tokens=pair.ids_NT.numel() - len(pair.ids_NT),
    )
    found = search(pair, metric, limit, progress)
    result = _with(result, found, _changed_files(subject, pair, found))
    return _with_outliers(result, outliers(pair, progress)) if found.units else result


# -- what is given --------------------------------------------------------------------------------------------------


def _subject(path: Path, baseline: str | None, evaluate: Evaluate | None) -> Subject:
    run = path.parent if path.name == "report.json" else path
    if (run / "report.json").is_file():
        report, recipe = Report.load(run / "report.json"), load_recipe(run / "recipe.yaml")
        model = run / "model"
        notes: tuple[str, ...] = ()
        try:
            verify_manifest(run)
        except IntegrityError as error:
            notes = (f"The run's files were changed after it: {error}",)
        there = model if (model / "config.json").is_file() else None
        return Subject(
            str(run), there, baseline or recipe.model, evaluate or recipe.evaluate, recipe.dtype, report, run, notes
        )
    if (path / WORK).is_dir():
        raise EnvironmentProblem(f"{path}: this run has not finished; `compress run` with the same recipe continues it")
    if not path.is_dir():
        raise EnvironmentProblem(f"{path}: there is no run and no model here")
    if baseline is None:
        raise RecipeError(f"{path} is a model, not a run: give --baseline, the model that it came from")
    return Subject(str(path), path, baseline, evaluate or Evaluate())


def _pair(subject: Subject, windows: int) -> tuple[Pair | None, str | None]:
    """Both models on the same windows, or why they cannot be taken apart."""
    if subject.model is None:
        return None, f"{subject.name} has no model/ (`export: [safetensors]` writes it), so no layer can be exchanged"
    baseline = load_model(subject.baseline, dtype=subject.dtype)
    _check_source(subject, baseline)
    candidate = load_model(str(subject.model), dtype=str(baseline.dtype).removeprefix("torch."))
    if candidate.num_blocks != baseline.num_blocks:
        return None, (
            f"the candidate has {candidate.num_blocks} layers, the baseline {baseline.num_blocks}: "
            "which belong together is not known, so none can be exchanged"
        )
    widths = [model.config.hidden_size for model in (candidate, baseline)]
    if widths[0] != widths[1]:
        return None, f"the candidate is {widths[0]} wide, the baseline {widths[1]}: no layer can be exchanged"
    if candidate.tokenizer.get_vocab() != baseline.tokenizer.get_vocab():
        return None, "the two have other tokenizers: their predictions cannot be compared"
    wanted = subject.evaluate
    texts = evaluation_texts(wanted.text, baseline.tokenizer, min(windows, wanted.windows), wanted.length)
    return Pair(baseline, candidate, texts), None


def _check_source(subject: Subject, baseline: Model) -> None:
    """IntegrityError if the model that the run started from is another one by now."""
    manifest = subject.folder / "manifest.json" if subject.folder else None
    if manifest is None or not manifest.is_file() or baseline.reader is None:
        return
    source: dict[str, Any] = json.loads(manifest.read_bytes())["sources"][0]
    if source["name"] == subject.baseline and source["digest"] != baseline.reader.digest():
        raise IntegrityError(
            f"{subject.baseline}: not the model that {subject.name} started from (its weights have another digest than "
            f"{manifest} says); give the original with --baseline"
        )


# -- by pass --------------------------------------------------------------------------------------------------------


def _by_pass(
    report: Report | None, metric: str, limit: float | None
) -> tuple[tuple[PassRow, ...], str | None, str | None]:
    """The metric after each step; the step to blame: the first beyond the limit, else the one that added most."""
    if report is None:
        return (), None, "not a run: there is no report that says what each pass did"
    rows: list[PassRow] = []
    neutral = 0.0 if metric == "kl_mean" else 1.0
    before: float | None = neutral
    for step in report.steps:
        value, reason = _after(step, metric)
        growth = None
        if value is not None and before is not None:
            growth = value.value - before if metric == "kl_mean" else value.value / before
        rows.append(PassRow(id=step.id, value=value, growth=growth, reason=reason))
        before = None if value is None else value.value
    measured = [row for row in rows if row.growth is not None]
    if len(measured) < len(rows):
        command = "compress run RECIPE --set evaluate.when=each --out ANOTHER"
        return tuple(rows), None, f"not every pass was measured: `{command}` measures after each"
    beyond = [row for row in measured if limit is not None and row.value is not None and row.value.value > limit]
    worst = beyond[0] if beyond else max(measured, key=lambda row: row.growth or -math.inf)
    lost = worst.growth is not None and worst.growth > neutral
    return tuple(rows), worst.id if lost else None, None


def _after(step: Step, metric: str) -> tuple[Estimate | None, str | None]:
    if metric == "kl_mean":
        accuracy = step.measurement.accuracy
        return accuracy.kl_mean, None if accuracy.kl_mean else accuracy.reasons.get("kl_mean", "it was not measured")
    ratios = [ratio for ratio in (step.from_baseline.perplexity_ratio or {}).values() if ratio is not None]
    reason = step.from_baseline.reasons.get("perplexity_ratio", "it was not measured")
    return (max(ratios, key=lambda ratio: ratio.value), None) if ratios else (None, reason)


def _pass_verdict(result: BisectResult) -> str:
    name = NAMES[result.metric]
    row = next((row for row in result.passes if row.id == result.blamed.step), None)
    if row is None:
        return (
            f"which pass is to blame is not known: {result.passes_reason}"
            if result.passes_reason
            else "nothing is lost"
        )
    return f"{row.id}: {name} is {value_text(row.value)} after this pass"


# -- by layer -------------------------------------------------------------------------------------------------------


def _with(result: BisectResult, found: Found, changed: str | None) -> BisectResult:
    """The result with what the search found; files that are not what the run measured clear its passes."""
    step = None if changed or not found.units else result.blamed.step
    blames = found.layer is not None
    whose = f"pass {step}, " if step and blames else ""
    blamed = Blamed(
        step=step,
        layer=found.layer,
        part=found.part.name if found.part else None,
        expert=found.part.expert if found.part else None,
    )
    return replace(
        result,
        verdict=(f"{changed}; " if changed else whose) + found.sentence,
        blamed=blamed,
        whole=found.scale.estimate(found.whole),
        units=found.units,
        units_reason=None if found.units else "there was nothing to look for",
        parts=found.parts,
        parts_reason=found.parts_reason,
        notes=(*result.notes, *found.notes),
    )


def _with_outliers(result: BisectResult, found: list[Outlier]) -> BisectResult:
    """The weights that moved too far; said in the verdict where the loss leads to no weight."""
    result = replace(result, outliers=tuple(found))
    if not found or result.blamed.part is not None:
        return result
    worst = found[0]
    return replace(
        result,
        verdict=f"{result.verdict}; but layer {worst.layer}, {worst.part} stands out: its weights moved by "
        f"{percent(worst.change)} of their size, others of their kind by {percent(worst.median)}",
    )


def _changed_files(subject: Subject, pair: Pair, found: Found) -> str | None:
    """Says so if the model's files give another KL than the run measured on the same windows."""
    if subject.report is None or subject.folder is None:
        return None
    items = subject.folder / "items" / f"{subject.report.steps[-1].id}.jsonl"
    if not items.is_file():
        return None
    wanted = subject.evaluate
    texts = evaluation_texts(wanted.text, pair.baseline.tokenizer, wanted.windows, wanted.length)
    digests = {text.name: text.sha256 for text in texts}
    measured = {
        (line["text"], line["window"]): math.inf if line["kl"] is None else line["kl"]
        for line in map(json.loads, items.read_text(encoding="utf-8").splitlines())
        if "window" in line and line.get("ids_sha256") == digests.get(line["text"])
    }
    places = [(text.name, window) for text in pair.texts for window in range(len(text.ids))]
    if not all(place in measured for place in places):
        return None
    before = sum(measured[place] for place in places) / len(places)
    now = float(found.whole.kl_N.nan_to_num(nan=math.inf).mean())
    if now == before or abs(now - before) <= max(SAME_KL[0], SAME_KL[1] * before):
        return None
    return (
        f"no pass, since the files in {subject.model} are not what the run measured "
        f"(KL {before:.3g} then, {_shown(now)} now on the same windows)"
    )


def _shown(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"
