"""The report of a run: the baseline, every step with its measured delta, exports, verdict (docs/design.md, 5)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from compressor.checkpoint.writer import write_json
from compressor.errors import EnvironmentProblem, IntegrityError
from compressor.reports.delta import Delta, delta
from compressor.reports.ledger import Ledger
from compressor.reports.measurement import Measurement, section_from_json, section_to_json

SCHEMA = "compressor.report/1"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The model before any pass."""

    name: str
    measurement: Measurement


@dataclass(frozen=True, kw_only=True)
class Step:
    """One pass of a run: what it was asked, what it took, what came out, what that changed."""

    name: str
    id: str
    options: Mapping[str, object]
    seconds: float
    peak_memory_bytes: int | None
    cpu_seconds: float | None
    measurement: Measurement
    from_previous: Delta
    from_baseline: Delta
    ledger: Ledger | None


@dataclass(frozen=True, kw_only=True)
class Export:
    """One exported folder or file (`path` relative to the report), loaded back and compared with the live model.

    `parity` holds max_abs and relative (of the logits), greedy_equal, and what a format adds (docs/onnx.md); None with
    `parity_reason` if not compared.
    """

    format: str
    path: str
    bytes: int
    parity: Mapping[str, Any] | None = None
    parity_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a run has measured so far; `after`, `with_exports` and `with_gate` return a new one."""

    recipe_sha256: str
    environment: Mapping[str, object]
    plan: object
    baseline: Baseline
    steps: tuple[Step, ...] = ()
    exports: tuple[Export, ...] = ()
    gate: Mapping[str, object] | None = None

    @classmethod
    def start(
        cls,
        recipe_sha256: str,
        environment: Mapping[str, object],
        plan: object,
        baseline_name: str,
        baseline_measurement: Measurement,
    ) -> Self:
        """Begin a report with the model before any pass. `environment` and `plan` are JSON values."""
        baseline = Baseline(name=baseline_name, measurement=baseline_measurement)
        return cls(recipe_sha256=recipe_sha256, environment=environment, plan=plan, baseline=baseline)

    @property
    def latest(self) -> Measurement:
        """The newest measurement: the last step's, or the baseline's."""
        return self.steps[-1].measurement if self.steps else self.baseline.measurement

    def after(
        self,
        name: str,
        id: str,
        options: Mapping[str, object],
        seconds: float,
        peak_memory_bytes: int | None,
        measurement: Measurement,
        ledger: Ledger | None,
        cpu_seconds: float | None = None,
    ) -> "Report":
        """Return the report with one more step, its delta from the model before it and from the baseline computed."""
        if any(step.id == id for step in self.steps):
            raise ValueError(f"the report has a step {id!r} already")
        step = Step(
            name=name,
            id=id,
            options=dict(options),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes,
            cpu_seconds=cpu_seconds,
            measurement=measurement,
            from_previous=delta(measurement, self.latest, against_baseline=not self.steps),
            from_baseline=delta(measurement, self.baseline.measurement, against_baseline=True),
            ledger=ledger,
        )
        return replace(self, steps=(*self.steps, step))

    def with_exports(self, exports: Sequence[Export]) -> "Report":
        """Return the report with these exports added."""
        return replace(self, exports=(*self.exports, *exports))

    def with_gate(self, gate: Mapping[str, object]) -> "Report":
        """Return the report with a verdict: {"verdict", "checks"}, as the gate gives it in JSON."""
        return replace(self, gate=dict(gate))

    def to_json(self) -> dict:
        """Return the document of report.json: JSON values only, NaN and infinities as null."""
        return {
            "schema": SCHEMA,
            "recipe_sha256": self.recipe_sha256,
            "environment": _strict(self.environment),
            "plan": _strict(self.plan),
            "baseline": {"name": self.baseline.name, "measurement": self.baseline.measurement.to_json()},
            "steps": [_step_to_json(step) for step in self.steps],
            "exports": [_export_to_json(export) for export in self.exports],
            "gate": _strict(self.gate),
        }

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read a document of this schema; raises IntegrityError for any other, or if parts are missing."""
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA or not isinstance(data, dict):
            raise IntegrityError(f"not a report: its schema is {schema!r}, this version reads {SCHEMA!r}")
        try:
            return cls(
                recipe_sha256=data["recipe_sha256"],
                environment=data["environment"],
                plan=data["plan"],
                baseline=Baseline(
                    name=data["baseline"]["name"],
                    measurement=Measurement.from_json(data["baseline"]["measurement"]),
                ),
                steps=tuple(map(_step_from_json, data["steps"])),
                exports=tuple(Export(**export) for export in data["exports"]),
                gate=data["gate"],
            )
        except (KeyError, TypeError) as error:
            raise IntegrityError(f"the report is incomplete or malformed: {error!r}") from error

    def save(self, path: Path) -> None:
        """Write report.json atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read report.json; raises IntegrityError if it is not one, EnvironmentProblem if it is not there."""
        path = Path(path)
        if not path.is_file():
            raise EnvironmentProblem(f"{path}: no such report")
        try:
            return cls.from_json(json.loads(path.read_bytes()))
        except ValueError as error:
            raise IntegrityError(f"{path}: not JSON ({error})") from error
        except IntegrityError as error:
            raise IntegrityError(f"{path}: {error}") from error


def _step_to_json(step: Step) -> dict:
    data = {
        "name": step.name,
        "id": step.id,
        "options": _strict(step.options),
        "seconds": step.seconds,
        "peak_memory_bytes": step.peak_memory_bytes,
        "cpu_seconds": step.cpu_seconds,
        "measurement": step.measurement.to_json(),
        "delta": {
            "from_previous": section_to_json(step.from_previous),
            "from_baseline": section_to_json(step.from_baseline),
        },
        "ledger": None if step.ledger is None else step.ledger.to_json(),
    }
    if step.peak_memory_bytes is None:
        data["peak_memory_bytes_reason"] = "it was not measured"
    if step.ledger is None:
        data["ledger_reason"] = "the pass keeps no ledger"
    return data


def _step_from_json(data: dict) -> Step:
    return Step(
        name=data["name"],
        id=data["id"],
        options=data["options"],
        seconds=data["seconds"],
        peak_memory_bytes=data["peak_memory_bytes"],
        cpu_seconds=data.get("cpu_seconds"),
        measurement=Measurement.from_json(data["measurement"]),
        from_previous=section_from_json(Delta, data["delta"]["from_previous"]),
        from_baseline=section_from_json(Delta, data["delta"]["from_baseline"]),
        ledger=None if data["ledger"] is None else Ledger.from_json(data["ledger"]),
    )


def _export_to_json(export: Export) -> dict:
    data = {"format": export.format, "path": export.path, "bytes": export.bytes, "parity": _strict(export.parity)}
    if export.parity is None:
        data["parity_reason"] = export.parity_reason or "it was not compared"
    return data


def _strict(value: object) -> object:
    """The value with lists for tuples and null for what JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return value
