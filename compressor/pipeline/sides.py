"""The models that a gate compares: finished runs with their records, or bare models that have to be measured here."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor.errors import EnvironmentProblem, IntegrityError, RecipeError
from compressor.exporters import verify_manifest
from compressor.models import Model
from compressor.pipeline.onnx_subject import load_subject
from compressor.reports import Ledger, Measurement, Report, TaskItem, task_items
from compressor.reports.items import ITEMS, read_lines

REPORT, MODEL = "report.json", "model"


@dataclass(frozen=True)
class Side:
    """A model with what is known of it: its files, and what was measured.

    `windows` are the scores by text window, `items` those of tasks; `measurement` is None until it was measured.
    `source` is the model that a run started from, with the digest of its weights; `ledgers` say what its passes did.
    `timed_beside` names the model that its speed was measured in turns with.
    """

    name: str
    model: str | None
    measurement: Measurement | None = None
    windows: tuple[dict[str, Any], ...] = ()
    items: tuple[TaskItem, ...] = ()
    environment: dict[str, Any] | None = None
    run: Path | None = None
    report: Report | None = None
    source: dict[str, Any] | None = None
    ledgers: tuple[Ledger, ...] = ()
    timed_beside: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder of its weights, if it is one."""
        return Path(self.model) if self.model and Path(self.model).is_dir() else None

    def load(self) -> Model:
        """The model, ready to be measured."""
        if self.model is None:
            raise EnvironmentProblem(f"{self.name}: its model/ is not here, so nothing can be measured")
        return load_subject(self.model)


def find_side(name: str | Path) -> Side:
    """A finished run (its last step), or a model by name; errors say what is there instead.

    A run's files are compared with its manifest: IntegrityError for one that was changed.
    """
    path = Path(name)
    if path.is_file() and path.suffix == ".json":
        return _report_alone(path)
    run = path
    if (run / REPORT).is_file():
        return _run(run)
    if (run / "work").is_dir() and not (run / "config.json").exists():
        raise EnvironmentProblem(f"{run}: this run has not finished; `compress run` with the same recipe continues it")
    return Side(str(name), str(name))


def original_of(candidate: Side) -> Side:
    """The model that a run started from, as the run measured it."""
    report = candidate.report
    if report is None or candidate.source is None:
        raise RecipeError(f"{candidate.name} is a model, not a run: give --baseline, the model that it came from")
    windows, items = _records(candidate.run / ITEMS / "baseline.jsonl") if candidate.run else ((), ())
    return Side(
        name=report.baseline.name,
        model=_here(candidate.source["name"]),
        measurement=_with_windows(report.baseline.measurement, windows),
        windows=windows,
        items=items,
        environment=dict(report.environment),
        source=candidate.source,
    )


def same_original(candidate: Side, baseline: Side) -> bool:
    """Whether a bare model is the one that the candidate's run started from: same weights, to the byte."""
    if candidate.source is None or baseline.report is not None:
        return False
    reader = baseline.load().reader
    return reader is not None and reader.digest() == candidate.source["digest"]


def _run(run: Path) -> Side:
    manifest = verify_manifest(run)
    report = Report.load(run / REPORT)
    if not report.steps:
        raise IntegrityError(f"{run / REPORT}: a report without steps")
    last = report.steps[-1]
    windows, items = _records(run / ITEMS / f"{last.id}.jsonl")
    return Side(
        name=str(run),
        model=str(run / MODEL) if (run / MODEL / "config.json").exists() else None,
        measurement=_with_windows(last.measurement, windows),
        windows=windows,
        items=items,
        environment=dict(report.environment),
        run=run,
        report=report,
        source=manifest["sources"][0],
        ledgers=tuple(step.ledger for step in report.steps if step.ledger is not None),
        timed_beside=report.baseline.name,
    )


def _report_alone(path: Path) -> Side:
    """A report without its run: its figures can be judged, its files and items cannot."""
    report = Report.load(path)
    if not report.steps:
        raise IntegrityError(f"{path}: a report without steps")
    return Side(
        name=str(path),
        model=None,
        measurement=report.steps[-1].measurement,
        environment=dict(report.environment),
        source={"name": report.baseline.name, "digest": None},
        timed_beside=report.baseline.name,
        report=report,
    )


def _records(path: Path) -> tuple[tuple[dict[str, Any], ...], tuple[TaskItem, ...]]:
    """Text windows and task items of an items file; none where a run measured neither."""
    lines = read_lines(path)
    return tuple(line for line in lines if "text" in line and "window" in line), tuple(task_items(lines))


def _with_windows(measurement: Measurement, windows: Iterable[dict[str, Any]]) -> Measurement:
    """With the NLL of each window, by which two measurements of the same windows pair."""
    nll: dict[str, dict[int, float]] = {}
    for line in windows:
        nll.setdefault(line["text"], {})[line["window"]] = line["nll"] if line["nll"] is not None else float("nan")
    by_text = {text: tuple(by_window[k] for k in sorted(by_window)) for text, by_window in nll.items()}
    return replace(measurement, accuracy=replace(measurement.accuracy, window_nll=by_text))


def check_same_windows(candidate: Side, baseline: Side) -> None:
    """IntegrityError where the two were measured on different windows of a text of the same name."""
    before = {(line["text"], line["window"]): line["ids_sha256"] for line in baseline.windows}
    after = {(line["text"], line["window"]): line["ids_sha256"] for line in candidate.windows}
    for text, window in [*before, *after]:
        one, other = before.get((text, window)), after.get((text, window))
        if one != other:
            missing = candidate.name if other is None else baseline.name
            what = f"{missing} has no such window" if None in (one, other) else "they hold other tokens"
            raise IntegrityError(
                f"text {text!r}, window {window}: {candidate.name} and {baseline.name} cannot be paired: {what}; "
                "measure both with the same evaluate section and the same tokenizer"
            )


def _here(name: str) -> str | None:
    """The model's name if it can be read without asking the network, else None."""
    path = Path(name).expanduser()
    return name if name.startswith("demo/") or path.exists() else None
