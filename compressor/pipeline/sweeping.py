"""`compress sweep`: one recipe in many variants, each an ordinary run, compared on the same windows.

`out/` holds `plan.json` (which runs make up the sweep), a folder for each run, and the results: `sweep.json`,
`sweep.md`, `pareto.svg`. A run that was interrupted continues by its own journal, one that finished is only read.
"""

import fcntl
import json
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.calibration import Progress, release_memory
from compressor.checkpoint import CheckpointReader, Journal, write_json, write_text
from compressor.errors import CompressorError, EnvironmentProblem, IntegrityError, RecipeError
from compressor.metrics import bootstrap_mean
from compressor.models import resolve
from compressor.pipeline.folder import WORK, text_digests
from compressor.pipeline.running import run
from compressor.pipeline.sweep_plan import SCHEMA, SweepPlan, plan_sweep
from compressor.recipe import Recipe
from compressor.reports import Estimate, Report
from compressor.reports.ranking import WindowLosses, rank, seed_interval
from compressor.reports.sweep import Ablation, Failure, SweepResult, SweptRun, Variant

PLAN = "plan.json"
UNEXPECTED = 3  # exit code of an error that is not ours


def sweep(
    recipe: str | Path,
    out: Path | str,
    *,
    vary: Sequence[str] = (),
    seeds: Sequence[int] = (),
    ablate: bool = False,
    settings: Sequence[str] = (),
    device: str = "cpu",
    progress: Progress | None = None,
) -> SweepResult:
    """Run a recipe in variants and rank them.

    `vary`: `quantize.bits=2,3,4,8`, values as YAML reads them; several make a grid. `seeds`: those that each variant is
    run with (none: the recipe's). `ablate` adds, for each pass, the recipe without it. `settings` are for all variants.
    RecipeError before the first run where a recipe is wrong or `out` holds something else. A run that fails is
    recorded and the others go on (`SweepResult.failures`, `.exit_code`); a later call tries it again.
    """
    plan = plan_sweep(recipe, vary=vary, seeds=seeds, ablate=ablate, settings=settings)
    out = Path(out)
    finished: dict[str, list[SweptRun]] = {}
    failures = []
    jobs = [(variant, one, folder) for variant in plan.variants for one, folder in variant.runs]
    with _claimed(out, plan):
        digests: dict[str, str] = {}
        for number, (variant, one, folder) in enumerate(jobs, 1):
            done = _run(variant.name, one, out, folder, device, digests, _numbered(progress, number, len(jobs)))
            if isinstance(done, Failure):
                failures.append(done)
            else:
                finished.setdefault(variant.name, []).append(done)
            release_memory(cycles=True)
        command = _command(recipe, out, vary, seeds, ablate, settings)
        result = _compared(str(recipe), command, plan, finished, failures)
        write_json(out / "sweep.json", result.to_json())
        write_text(out / "sweep.md", result.to_text())
        write_text(out / "pareto.svg", result.to_svg())
    return result


@contextmanager
def _claimed(out: Path, plan: SweepPlan) -> Iterator[None]:
    """Hold the folder for this sweep; RecipeError if it holds another one, something else, or one that is running."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / PLAN).is_file())):
        raise RecipeError(f"{out} exists and was not made by a sweep; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise EnvironmentProblem(f"{out}: cannot write here: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"{out}: another sweep is running here") from None
        _check_plan(out / PLAN, plan.to_json())
        yield
    finally:
        os.close(lock)


def _check_plan(path: Path, plan: dict[str, Any]) -> None:
    if not path.is_file():
        write_json(path, plan)
        return
    try:
        before = json.loads(path.read_bytes())
        old: dict[str, Any] = before["runs"]
        if before["schema"] != SCHEMA:
            raise ValueError(f"its schema is {before['schema']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: not the plan of a sweep ({error!r})") from error
    new = plan["runs"]
    differences = [f"it has no {name}" for name in new if name not in old]
    differences += [f"it has {name}, this one has not" for name in old if name not in new]
    differences += [f"{name} has another recipe" for name in new if name in old and old[name] != new[name]]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise RecipeError(
            f"{path.parent} holds another sweep: {'; '.join(differences[:3])}{more}. "
            "Give another --out, or the same recipe and options to go on"
        )


# -- running --------------------------------------------------------------------------------------------------------


def _run(
    variant: str,
    recipe: Recipe,
    out: Path,
    folder: str,
    device: str,
    digests: dict[str, str],
    progress: Progress | None,
) -> SweptRun | Failure:
    """A finished run's figures; whatever stops it is recorded, so that a night's other runs are not lost with it."""
    try:
        if not _is_finished(recipe, out / folder, digests):
            run(recipe, out / folder, device=device, progress=progress)
        return read_run(variant, recipe.seed, out, folder)
    except CompressorError as error:
        kind, message, exit_code = type(error).__name__, str(error), error.exit_code
    except Exception as error:
        kind, message, exit_code = f"unexpected {type(error).__name__}", str(error), UNEXPECTED
    return Failure(variant=variant, seed=recipe.seed, folder=folder, kind=kind, message=message, exit_code=exit_code)


def _is_finished(recipe: Recipe, folder: Path, digests: dict[str, str]) -> bool:
    """Whether the folder holds this run, complete, of the model and the texts as they are now.

    Versions and threads may differ: what is finished is only read. `digests` keeps the model's for the next variant.
    """
    path = folder / WORK / "journal.jsonl"
    if not path.is_file():
        return False
    with path.open(encoding="utf-8") as file:
        key = json.loads(file.readline())["key"]
    if Journal(path, key).last("finished") is None or key["recipe"] != recipe.sha256:
        return False
    if recipe.model not in digests:
        digests[recipe.model] = CheckpointReader(resolve(recipe.model).path).digest()
    return bool(key["source"] == digests[recipe.model] and key["texts"] == text_digests(recipe))


def read_run(variant: str, seed: int, out: Path, folder: str) -> SweptRun:
    """The figures of a finished run, from its report and the scores of its last step by window."""
    report = Report.load(out / folder / "report.json")
    last = report.steps[-1]
    accuracy, memory = last.measurement.accuracy, last.measurement.memory
    change = last.from_baseline
    return SweptRun(
        variant=variant,
        seed=seed,
        folder=folder,
        recipe_sha256=report.recipe_sha256,
        weight_bytes=memory.weight_bytes,
        weight_bytes_ratio=change.weight_bytes_ratio,
        file_bytes=memory.file_bytes,
        kl_mean=accuracy.kl_mean,
        kl_reason=None if accuracy.kl_mean else accuracy.reasons.get("kl_mean", "it was not measured"),
        perplexity_ratio=_known(change.perplexity_ratio),
        tasks=_known(accuracy.tasks),
        decode_ratio=_known(change.decode_latency_ratio),
        seconds=sum(step.seconds for step in report.steps),
        verdict=str(report.gate["verdict"]) if report.gate else None,
        losses=_window_losses(variant, out / folder / "items" / f"{last.id}.jsonl"),
    )


def _window_losses(variant: str, items: Path) -> WindowLosses:
    if not items.is_file():
        return WindowLosses(variant, (), (), ())
    try:
        lines = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
        scored = [line for line in lines if "window" in line and "kl" in line]
        return WindowLosses(
            variant,
            tuple((line["text"], line["window"], line["ids_sha256"]) for line in scored),
            tuple(math.nan if line["kl"] is None else line["kl"] for line in scored),
            tuple(line["tokens"] for line in scored),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{items}: not the scores of a run ({error!r})") from error


def _known(figures: Any) -> dict[str, Estimate]:
    return {name: estimate for name, estimate in (figures or {}).items() if estimate is not None}


def _numbered(progress: Progress | None, number: int, count: int) -> Progress | None:
    if progress is None or count == 1:
        return progress
    return lambda label, done, total: progress(f"run {number} of {count}: {label}", done, total)


# -- comparing ------------------------------------------------------------------------------------------------------


def _compared(
    name: str, command: str, plan: SweepPlan, finished: dict[str, list[SweptRun]], failures: list[Failure]
) -> SweepResult:
    wanted = {variant.name: variant for variant in plan.variants}
    losses = {variant: _over_seeds(variant, runs) for variant, runs in finished.items()}
    variants = {
        place.name: Variant(
            name=place.name,
            settings=wanted[place.name].settings,
            without=wanted[place.name].without,
            runs=tuple(finished[place.name]),
            kl=_weighted(losses[place.name]) if math.isfinite(place.loss) else None,
            kl_over_seeds=seed_interval(losses[place.name].seed_means),
            place=place,
        )
        for place in rank(list(losses.values()))
    }
    ablations = [
        _ablation(label, variants[whole], variants[reduced], losses[whole], losses[reduced])
        for whole, label, reduced in plan.pairs
        if whole in variants and reduced in variants
    ]
    return SweepResult(
        recipe=Path(name).stem,
        command=command,
        variants=tuple(variants.values()),
        ablations=tuple(ablations),
        failures=tuple(failures),
    )


def _over_seeds(variant: str, runs: Sequence[SweptRun]) -> WindowLosses:
    """The mean loss of each window over the seeds."""
    first = runs[0].losses
    if any(one.losses.windows != first.windows for one in runs):
        raise IntegrityError(f"{variant}: its seeds were measured on different windows; give another --out")
    losses = tuple(sum(values) / len(runs) for values in zip(*(one.losses.losses_N for one in runs), strict=True))
    return WindowLosses(variant, first.windows, losses, first.tokens_N, tuple(one.losses.mean for one in runs))


def _weighted(losses: WindowLosses) -> Estimate:
    return bootstrap_mean(losses.losses_N, losses.tokens_N)


def _ablation(step: str, whole: Variant, reduced: Variant, one: WindowLosses, other: WindowLosses) -> Ablation:
    reason = None
    if whole.kl is None or reduced.kl is None:
        reason = "a KL was not measured, or is not finite"
    elif one.windows != other.windows:
        reason = "the two were measured on different windows"
    added = None
    if reason is None:
        differences = [after - before for after, before in zip(one.losses_N, other.losses_N, strict=True)]
        added = bootstrap_mean(differences, one.tokens_N)
    return Ablation(step=step, with_=whole, without=reduced, kl_added=added, kl_reason=reason)


def _command(
    recipe: str | Path,
    out: Path,
    vary: Sequence[str],
    seeds: Sequence[int],
    ablate: bool,
    settings: Sequence[str],
) -> str:
    words = ["compress", "sweep", str(recipe)]
    words += [word for one in vary for word in ("--vary", one)]
    words += ["--seeds", ",".join(map(str, seeds))] if seeds else []
    words += ["--ablate"] if ablate else []
    words += [word for one in settings for word in ("--set", one)]
    return shlex.join([*words, "--out", str(out)])
